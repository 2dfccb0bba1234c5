"""What operators cost in onnxruntime's CPU provider, in microseconds, one thread: a small table instead of a stopwatch, so
that the same model gives the same decisions on every machine.

A kernel's time is taken to be linear in what it does:

    t = base + a * multiply-adds + b * values read + c * values written + d * weights + e * values of patches + f * positions

with coefficients a..f >= 0 of its own for each class of kernels (`Kernel`): float or integer, pointwise, dense or depthwise,
along one spatial axis or two. `onnxq_plugins/runtimes/costs.json` holds them per instruction set, fitted to random shapes by
`python -m benchmarks.costs`, which also says how well they fit.

Layouts are part of the cost. Float convolutions of two spatial axes run on blocks of 16 channels (NCHWc), integer ones on
channels in the end (NHWC): a tensor between the two, or from a reader that wants neither, is reordered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

FEATURES = ("base", "Mmac", "kread", "kwritten", "kweights", "kpatches", "kpositions")
BLOCK = 16  # channels of a block in NCHWc


@dataclass(frozen=True)
class Kernel:
    """An operator with the sizes that its time depends on.

    op       of ONNX
    inputs   shapes of the activations it reads
    output   shape of what it writes
    weight   shape of a layer's weight; () for other operators
    groups   of a convolution
    """

    op: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    weight: tuple[int, ...] = ()
    groups: int = 1
    attrs: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def spatial(self) -> bool:
        """True if convolutions of its rank have a blocked layout."""
        return len(self.output) == 4

    def kind(self, integer: bool) -> str:
        """The class of kernels that runs it."""
        side = "int" if integer else "float"
        if self.op != "Conv":
            return f"{self.op} {side}"
        taps, wide = prod(self.weight[2:]), min(self.output[2:], default=1) > 1 and self.spatial
        depth = self.groups > 1 and self.weight[1] == 1 and self.groups == self.weight[0]
        if depth and integer:
            return f"Conv depthwise{'' if self.groups % BLOCK == 0 else ' unaligned'} int"
        if depth:
            return f"Conv depthwise{'' if self.spatial else ' 1d'} float"
        if self.groups > 1:
            return f"Conv grouped {side}"
        shape = "pointwise" if taps == 1 else "dense" if wide else "narrow"
        stem = " stem" if self.weight[1] < BLOCK and not integer and taps > 1 else ""
        return f"Conv {shape}{stem} {side}"

    def features(self, integer: bool) -> tuple[float, ...]:
        """What the kernel does, in the order of `FEATURES`."""
        read, written = sum(map(prod, self.inputs)), prod(self.output)
        if not self.weight:
            inner = self.inputs[0][-1] if self.op == "MatMul" and self.inputs[0] else 0
            return (1.0, written * inner / 1e6, read / 1e3, written / 1e3, 0.0, 0.0, 0.0)
        if self.op != "Conv":  # Gemm, MatMul [K, N]
            rows = written // max(self.output[-1], 1)
            return (1.0, rows * prod(self.weight) / 1e6, read / 1e3, written / 1e3, prod(self.weight) / 1e3, 0.0, rows / 1e3)
        positions, taps = prod(self.output[2:]) * self.output[0], prod(self.weight[2:])
        outputs = self.weight[0] if integer or not self.spatial else -(-self.weight[0] // BLOCK) * BLOCK
        macs = outputs * self.weight[1] * taps * positions
        patches = self.weight[1] * self.groups * taps * positions if taps > 1 and self.groups == 1 else 0
        return (
            1.0,
            macs / 1e6,
            read / 1e3,
            outputs * positions / 1e3,
            outputs * self.weight[1] * taps / 1e3,
            patches / 1e3,
            (taps if taps > 1 else 1) * positions / 1e3,
        )


@dataclass(frozen=True)
class Costs:
    """Microseconds of kernels.

    name    of the instruction set
    source  where they were measured
    table   class of kernels -> a coefficient for each of `FEATURES`
    """

    name: str
    source: str
    table: Mapping[str, Sequence[float]]

    def of(self, kernel: Kernel, integer: bool = False) -> float:
        """Microseconds of a kernel. Classes that were not measured cost what an Add does."""
        row = self.table.get(kernel.kind(integer))
        row = self.table["Add int" if integer else "Add float"] if row is None else row
        return float(sum(a * b for a, b in zip(row, kernel.features(integer), strict=True)))

    def move(self, what: str, size: int) -> float:
        """Microseconds of a conversion of `size` values: ``quantize``, ``dequantize``, ``transpose``, ``block``,
        ``unblock``."""
        base, each = self.table[what]
        return float(base + each * size / 1e3)


@cache
def tables() -> dict[str, Costs]:
    """The tables that come with the package, by instruction set."""
    text = files("onnxq_plugins.runtimes").joinpath("costs.json").read_text(encoding="utf-8")
    return {name: Costs(name, table["source"], table["kernels"]) for name, table in json.loads(text).items()}
