"""The tables of a recipe as values: requests of tensors, rules for layers, the quality of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

BlockRequest = Literal["tensor", "channel"] | int | tuple[int, ...]
SubBlockRequest = Literal["none", "channel"] | int | tuple[int, ...]
FLOAT = 32  # bits = 32: stays float


@dataclass(frozen=True)
class TensorRequest:
    """How one kind of tensor is to be quantized; the ``[weights]`` and ``[activations]`` tables.

    bits        2..16, or 32 to stay float (targets run weights of 2..8 bits, activations of 8, some of 16)
    symmetric   signed codes with zero point 0
    block       granularity of the scale: "tensor", "channel", a number of inputs per scale, [outputs, inputs] or one
                size per axis
    sub_block   granularity of integer multipliers below that, written like `block`; "none" for none
    pow2        scales (or multipliers) are powers of two
    max_multiplier   largest multiplier: 15 packs into 4 bits; up to 127, or 32768 for multipliers per channel of one scale
    full             of fewer than 8 bits, with the code -2^(bits-1), which mirrors no other: -8..7 in place of -7..7
    """

    bits: int = 8
    symmetric: bool = True
    block: BlockRequest = "channel"
    sub_block: SubBlockRequest = "none"
    pow2: bool = False
    max_multiplier: int = 15
    full: bool = False


@dataclass(frozen=True)
class LayerRule:
    """Settings for some layers; the ``[[layer]]`` tables. Later rules win.

    match      glob on the layer's name, or a list of them
    op         Conv, ConvTranspose, Gemm, MatMul, or Attention for products of two activations; LSTM, GRU, RNN, Gather or
               Einsum for their constants, of which only `quantize` and ``weights.bits`` count
    kind       dense, grouped or depthwise
    position   first or last layer of the model
    quantize   false leaves the layer in float; true quantizes attention products whether or not it pays
    weights, activations   fields of TensorRequest that differ; activations means the layer's input
    """

    match: str | tuple[str, ...] = "*"
    op: Literal["", "Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LSTM", "GRU", "RNN", "Gather", "Einsum"] = ""
    kind: Literal["", "dense", "grouped", "depthwise"] = ""
    position: Literal["", "first", "last"] = ""
    quantize: bool | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`match` as a list."""
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    @property
    def everywhere(self) -> bool:
        """True if it is about layers of any name."""
        return "*" in self.patterns

    def names(self, name: str) -> bool:
        """True if it is about layers of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Quality:
    """What the outputs must be worth; the ``[quality]`` table. Where they are not, what costs them most is kept in 16 bits
    or in float (`onnxq_plugins.search.fallback`).

    sqnr    dB that each output must have on samples, pooled; None: nothing is checked
    below   act only where an output has less than this, dB, so that the network is destroyed; None: `sqnr`
    """

    sqnr: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if self.below is not None and (self.sqnr is None or self.below > self.sqnr):
            raise ValueError(f"below = {self.below:g} must not be above sqnr, which is what an output then has to reach")

    @property
    def asked(self) -> bool:
        """True if every output must have `sqnr`, not only those that would be destroyed."""
        return self.sqnr is not None and self.least == self.sqnr

    @property
    def least(self) -> float:
        """dB under which something is done."""
        return float(-np.inf if self.sqnr is None else self.sqnr if self.below is None else self.below)


def matches(rule: LayerRule, name: str, op: str, kind: str, ends: Mapping[str, bool]) -> bool:
    """True if a rule is about an operator.

    ends   whether it is the first, or the last, layer
    """
    if op == "Attention" and rule.op != "Attention" and rule.everywhere:
        return False  # rules for all layers mean layers with weights
    return (
        rule.names(name)
        and rule.op in ("", op)
        and rule.kind in ("", kind)
        and (not rule.position or ends.get(rule.position, False))
    )


def tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def changed(value: Any, default: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from a default instance (or from the fields' own defaults), as plain values."""
    changes = {}
    for f in fields(value):
        now = getattr(value, f.name)
        if now != (getattr(default, f.name) if default is not None else default_of(f)):
            changes[f.name] = list(now) if isinstance(now, tuple) else dict(now) if isinstance(now, Mapping) else now
    return changes


def default_of(f: Field[Any]) -> Any:
    """The default of a dataclass field, made by its factory where it has one."""
    return f.default_factory() if f.default_factory is not MISSING else f.default
