"""How one tensor is quantized (QuantSpec), how all of them are (Plan), and the arithmetic on both. Numpy only.

A number is stored as an integer code: ``x = step * (code - zero_point)`` with ``step = scale * multiplier``.

Granularity is a block: a size per axis, 0 for the whole axis, or None for one scale in all. For a convolution weight
[64 outputs, 32 inputs, 3, 3]:

=====================  ==============  ==================
granularity            block           shape of `scale`
=====================  ==============  ==================
tensor                 None            ()
output channel         (1, 0, 0, 0)    (64, 1, 1, 1)
16 x 16 tiles          (16, 16, 0, 0)  (4, 2, 1, 1)
16 inputs of a channel (1, 16, 0, 0)   (64, 2, 1, 1)
=====================  ==============  ==================

Two-level scales have a coarse float `scale` (one per tensor or output channel) and a fine integer `multiplier` (one per
sub-block). While |code| * multiplier stays within int8 a runtime can fold the multipliers into int8 codes at load: fine
granularity at no cost. Multipliers of whole output channels need no room in the codes: they join the scale, and as powers of
two they are the shifts of hardware that knows one scale per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Block = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class QuantSpec:
    """The record of one tensor: what is asked for (first eight fields) and, once found, the solution (the rest).

    bits        width of a code, 2..16
    symmetric   signed codes with zero point 0, in [-n, n] with n = 2^(bits-1) - 1; otherwise unsigned codes in
                [0, 2^bits - 1] with a zero point
    block       granularity of `scale` (module docstring)
    sub_block   granularity of the integer `multiplier`, finer than `block`: the two-level scale
    pow2        multipliers (or scales, if there is no sub_block) are powers of two
    max_multiplier   largest multiplier asked for: 15 packs into 4 bits, 2^M - 1 into M
    decoded     a weight beside float inputs is decoded to float at load, where the kernel for its codes would round these
                (`layers.float_inputs`), or where 8 bits cost the inputs too much (`search.fallback`)
    full        symmetric codes below 8 bits go down to -2^(bits-1): one more code, of 15 with 4 bits. With 8 bits it would
                gain nothing, and kernels that add products in 16 bits saturate sooner
    scale, zero_point, multiplier
                arrays with one entry per block, shaped as `block_shape` tells
    codes       integer codes in the tensor's own shape (weights only)
    shift       what is added to the layer's bias [outputs] to make up for the codes' mean error (weights only)
    """

    bits: int = 8
    symmetric: bool = True
    block: Block | None = None
    sub_block: Block | None = None
    pow2: bool = False
    max_multiplier: int = 15
    decoded: bool = False
    full: bool = False
    scale: Array | None = None
    zero_point: Array | None = None
    multiplier: Array | None = None
    codes: Array | None = None
    shift: Array | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Smallest and largest code. The symmetric grid is narrow (no -2^(bits-1)) unless it is `full`, so that -x is x's
        mirror."""
        top = 2 ** (self.bits - 1) - 1
        return (-top - (self.full and self.bits < 8), top) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def top(self) -> int:
        """Largest |code|."""
        return max(-self.grid[0], self.grid[1])

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value that the codes of a solved activation stand for."""
        assert self.scale is not None and self.zero_point is not None
        first, last = self.grid
        return float(self.scale * (first - self.zero_point)), float(self.scale * (last - self.zero_point))

    @property
    def multipliers(self) -> Array:
        """The values a multiplier may take, from 1 on, ascending: at most `max_multiplier`; and code * multiplier stays
        within [-127, 127], unless there is one multiplier a channel."""
        whole = self.sub_block is not None and [b for b in self.sub_block if b] == [1]
        top = self.max_multiplier if whole else max(1, min(self.max_multiplier, 127 // self.top))
        return 2 ** np.arange(top.bit_length()) if self.pow2 else np.arange(1, top + 1)

    @property
    def solved(self) -> bool:
        """True once a scale is known."""
        return self.scale is not None

    def request(self) -> QuantSpec:
        """The same request without its solution."""
        return replace(self, scale=None, zero_point=None, multiplier=None, codes=None, shift=None)

    def describe(self, axes: tuple[int, int] | None = None) -> str:
        """A short name such as ``int8 per channel`` for reports and errors.

        axes   output and input axis of a weight: blocks are then told as recipes write them, [outputs, inputs]
        """

        def sizes(block: Block) -> list[int]:
            others = [b for axis, b in enumerate(block) if axes is None or axis not in axes]
            return [*block] if axes is None or any(others) else [block[axis] for axis in axes]

        kind = "int" if self.symmetric else "uint"
        where = "per tensor" if self.block is None else f"block {sizes(self.block)}"
        if self.block is not None and sorted(self.block)[:-1] == [0] * (len(self.block) - 1) and max(self.block) == 1:
            where = "per channel"
        sub = f", sub-block {sizes(self.sub_block)}" if self.sub_block else ""
        sub += " of powers of two" if sub and self.pow2 else ""
        return f"{kind}{self.bits} {where}{sub}"

    def to_dict(self) -> dict[str, Any]:
        """The request as plain values, defaults left out (for reports and metadata)."""
        request = ("bits", "symmetric", "block", "sub_block", "pow2", "max_multiplier", "decoded", "full")
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name in request and getattr(self, f.name) != f.default
        }


class Plan(Mapping[str, QuantSpec]):
    """Tensor name -> QuantSpec. An immutable value: changes make a new plan. A tensor without an entry stays float."""

    def __init__(self, specs: Mapping[str, QuantSpec] | None = None) -> None:
        self._specs = dict(specs or {})

    def __getitem__(self, name: str) -> QuantSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __or__(self, other: Mapping[str, QuantSpec]) -> Plan:
        """This plan with the entries of `other` added or put in place."""
        return Plan({**self._specs, **other})

    def without(self, *names: str) -> Plan:
        """This plan with some tensors back in float."""
        return Plan({name: spec for name, spec in self._specs.items() if name not in names})

    def __repr__(self) -> str:
        solved = sum(spec.solved for spec in self.values())
        return f"<Plan: {len(self)} tensors, {solved} solved>"


def block_shape(shape: tuple[int, ...], block: Block | None) -> tuple[int, ...]:
    """Shape of an array with one entry per block of a tensor of `shape`; a last, smaller block counts."""
    if block is None:
        return ()
    if len(block) != len(shape):
        raise ValueError(f"block {block} has {len(block)} axes, the tensor {shape} has {len(shape)}")
    return tuple(-(-size // b) if b else 1 for size, b in zip(shape, block, strict=True))


def expand(values: Array, shape: tuple[int, ...], block: Block | None) -> Array:
    """Repeat one value per block over the elements, into something that broadcasts against `shape`."""
    if block is None or values.ndim == 0:
        return values
    for axis, (size, b) in enumerate(zip(shape, block, strict=True)):
        if b > 1:
            values = np.repeat(values, b, axis=axis).take(np.arange(size), axis=axis)
    return values


def reduce_blocks(x: Array, block: Block | None, ufunc: np.ufunc) -> Array:
    """Reduce (np.maximum, np.minimum, np.add) each block of `x` to one value; shape `block_shape(x.shape, block)`."""
    if block is None:
        return np.asarray(ufunc.reduce(x, axis=None))
    for axis, b in enumerate(block):
        if b == 0:
            x = ufunc.reduce(x, axis=axis, keepdims=True)
        elif b > 1:
            x = ufunc.reduceat(x, np.arange(0, x.shape[axis], b), axis=axis)
    return x


def step(spec: QuantSpec, shape: tuple[int, ...]) -> Array:
    """scale * multiplier per element, broadcastable to `shape`."""
    assert spec.scale is not None
    size = expand(spec.scale, shape, spec.block)
    if spec.multiplier is not None:
        size = size * expand(spec.multiplier, shape, spec.sub_block)
    return size


def solve_minmax(x: Array, spec: QuantSpec) -> QuantSpec:
    """The smallest scale whose grid still covers every value of `x`: nothing is clipped. An older solution is dropped.

    Two levels: the largest multiplier covers the largest value of each block, every sub-block gets the smallest
    multiplier that covers its own. Source: VS-Quant (arXiv 2102.04503), rounding up.
    """
    spec = spec.request()
    if spec.sub_block is not None:
        values, scale = (
            spec.multipliers,
            from_range(0.0, reduce_blocks(_reach(x, spec), spec.block, np.maximum), replace(spec, symmetric=True)).scale,
        )
        scale = np.asarray(scale / values[-1], np.float32)
        need = reduce_blocks(_reach(x, spec) / expand(scale, x.shape, spec.block), spec.sub_block, np.maximum) / spec.grid[1]
        at = np.searchsorted(values, need * (1 - 1e-6))  # float32 scales: hardly above a multiplier is not above
        return replace(
            spec, scale=scale, zero_point=np.zeros(scale.shape, np.int64), multiplier=values[np.minimum(at, len(values) - 1)]
        )
    if spec.symmetric:
        return from_range(0.0, reduce_blocks(_reach(x, spec), spec.block, np.maximum), spec)
    return from_range(reduce_blocks(x, spec.block, np.minimum), reduce_blocks(x, spec.block, np.maximum), spec)


def _reach(x: Array, spec: QuantSpec) -> Array:
    """|x| in units of the positive end of a symmetric grid: the negative end of a full one reaches further."""
    first, last = spec.grid
    return np.abs(x) if -first == last else np.maximum(x, x * (last / first))


def from_range(low: Array | float, high: Array | float, spec: QuantSpec) -> QuantSpec:
    """Scale (float32) and zero point for the interval [low, high], widened to hold 0.

    An empty interval (all values 0) gets scale 1. With `pow2` and no `sub_block` the scale is rounded up to a power
    of two. The grid's upper end never lies above `high`: onnxruntime removes a Clip only where the grid stays inside.
    """
    lo, hi = np.minimum(low, 0.0), np.maximum(high, 0.0)
    first, last = spec.grid
    span = np.maximum(lo / first, hi / last) if spec.symmetric else (hi - lo) / last
    tiny = float(np.finfo(np.float32).tiny)
    scale = np.where(span > tiny, span, 1.0)
    if spec.pow2 and spec.sub_block is None:
        scale = np.exp2(np.ceil(np.log2(scale)))
    scale = np.asarray(scale, np.float32)
    zero = np.zeros(scale.shape, np.int64)
    if not spec.symmetric:
        zero = np.clip(np.rint(-lo / scale), first, last).astype(np.int64)
        over = (span > tiny) & np.equal(lo, 0.0) & (scale.astype(np.float64) * last > hi)
        scale = np.where(np.logical_and(over, not spec.pow2), np.nextafter(scale, np.float32(0)), scale)
    return replace(spec, scale=np.asarray(scale, np.float32), zero_point=zero)


def encode(x: Array, spec: QuantSpec) -> Array:
    """Integer codes of `x`, rounding half to even as ONNX's QuantizeLinear does; int64."""
    return _encoded(x, spec).astype(np.int64)


def weight_codes(x: Array, spec: QuantSpec) -> Array:
    """`encode` in the smallest type, int8 where that holds the codes: large weights are encoded with little memory."""
    return _encoded(x, spec).astype(np.int8 if spec.grid[0] >= -128 and spec.grid[1] <= 127 else np.int32)


def _encoded(x: Array, spec: QuantSpec) -> Array:
    codes = np.asarray(x / step(spec, x.shape))
    np.rint(codes, out=codes)
    if spec.zero_point is not None and np.any(spec.zero_point):
        codes = codes + expand(spec.zero_point, x.shape, spec.block)
    return np.clip(codes, *spec.grid, out=codes)


def decode(codes: Array, spec: QuantSpec) -> Array:
    """Float32 values of integer codes."""
    zero = expand(spec.zero_point, codes.shape, spec.block) if spec.zero_point is not None else 0
    return ((codes - zero) * step(spec, codes.shape)).astype(np.float32)


def fake(x: Array, spec: QuantSpec) -> Array:
    """`x` after a round trip through its codes: what the quantized model computes with."""
    return decode(encode(x, spec) if spec.codes is None else spec.codes, spec)
