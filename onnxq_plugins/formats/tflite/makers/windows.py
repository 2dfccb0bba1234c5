"""Windows that move over an image: pads as LiteRT has them, and pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.formats.tflite.builder import Builder, Refused, Value
from onnxq_plugins.formats.tflite.layouts import channels_last, stored
from onnxq_plugins.formats.tflite.reading import Node
from onnxq_plugins.formats.tflite.schema import Grid
from onnxq_plugins.spec import Array

NHWC = channels_last(4)


@dataclass(frozen=True)
class Window:
    """A window over two axes of `sizes`.

    begins, ends   pads
    ceil           a last window that reaches beyond the pads counts
    """

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    ceil: bool = False

    @property
    def reach(self) -> list[int]:
        """Extent of the window."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def outputs(self) -> list[int]:
        """How many windows there are."""
        found = []
        for size, reach, stride, begin, end in zip(
            self.sizes, self.reach, self.strides, self.begins, self.ends, strict=True
        ):
            room = size + begin + end - reach
            count = (math.ceil if self.ceil else math.floor)(room / stride) + 1
            found.append(count - (self.ceil and (count - 1) * stride >= size + begin))
        return found

    @property
    def same(self) -> bool:
        """True if LiteRT's SAME means these windows."""
        for size, reach, stride, begin, count in zip(
            self.sizes, self.reach, self.strides, self.begins, self.outputs(), strict=True
        ):
            total = max((count - 1) * stride + reach - size, 0)
            if count != -(-size // stride) or begin != total // 2:
                return False
        return True

    def needed(self) -> list[tuple[int, int]]:
        """Pads that make VALID mean these windows."""
        pads = []
        for size, reach, stride, begin, count in zip(
            self.sizes, self.reach, self.strides, self.begins, self.outputs(), strict=True
        ):
            pads.append((begin, max((count - 1) * stride + reach - size - begin, 0)))
        return pads


def window_of(n: Node, x: Value, kernel: Sequence[int], rank: int) -> Window:
    """The window of a convolution or a pooling of one or two dimensions (`rank`); `x` has two."""

    def two(values: Sequence[int] | None, default: int) -> tuple[int, ...]:
        return (default,) * (2 - rank) + (tuple(values) if values is not None else (default,) * rank)

    sizes, strides, dilations = x.shape[2:], two(n.attr("strides"), 1), two(n.attr("dilations"), 1)
    kernel = tuple(kernel) if len(kernel) == 2 else (1, *kernel)
    pads = n.attr("pads") or [0] * (2 * rank)
    begins, ends = two(pads[:rank], 0), two(pads[rank:], 0)
    auto = n.attr("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        totals = []
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            totals.append(max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0))
        less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        begins, ends = (less, more) if auto == "SAME_UPPER" else (more, less)
    elif auto == "VALID":
        begins = ends = (0, 0)
    return Window(sizes, tuple(kernel), strides, dilations, begins, ends, bool(n.attr("ceil_mode", 0)))


def padded(b: Builder, x: Value, window: Window, grid: Grid | None, filling: float) -> tuple[int, str]:
    """The input of a window in NHWC, with the pads that LiteRT does not have itself: (tensor, SAME or VALID)."""
    index, shape = b.tensor(x, NHWC, grid), stored(x.shape, NHWC)
    pads = window.needed()
    if not any(map(any, pads)):
        return index, "VALID"
    if window.same:
        return index, "SAME"
    shape = (shape[0], *(s + sum(p) for s, p in zip(shape[1:3], pads, strict=True)), shape[3])
    table = b.file.constant(b.fresh("pads"), np.asarray([(0, 0), *pads, (0, 0)], np.int32))
    if filling == 0.0:
        return b.emit("PAD", [index, table], shape, "float32", grid, kind="Pad"), "VALID"
    low = np.asarray([filling if grid is None else grid.range[0]], np.float32)
    value = b.file.constant(b.fresh("padding"), low if grid is None else grid.encode(low), grid)
    return b.emit("PADV2", [index, table, value], shape, "float32", grid, kind="PadV2"), "VALID"


def max_pool(b: Builder, n: Node) -> None:
    """MaxPool -> MAX_POOL_2D, of codes where there are some."""
    if len(n.outputs) > 1 and n.outputs[1]:
        raise Refused("its indices are used")
    x, window = _pooled(b, n)
    if set(window.dilations) != {1}:
        raise Refused("LiteRT's pooling has no dilations")
    grid = x.grid if x.grid is not None and x.grid.activation else None
    index, padding = padded(b, x, window, grid, float(np.finfo(np.float32).min))
    _pool(b, n, "MAX_POOL_2D", index, x, window, padding, grid)


def average_pool(b: Builder, n: Node) -> None:
    """AveragePool -> AVERAGE_POOL_2D. Pads that are not LiteRT's SAME and do not count: the mean over all, times the share
    of what counts, in floats."""
    x, window = _pooled(b, n)
    if set(window.dilations) != {1}:
        raise Refused("LiteRT's pooling has no dilations")
    grid = x.grid if x.grid is not None and x.grid.activation and b.source.target(n.outputs[0]) is not None else None
    pads = any(map(any, window.needed()))
    counts = bool(n.attr("count_include_pad", 0))
    if not pads or (window.same and not counts):
        index, padding = padded(b, x, window, grid, 0.0)
        _pool(b, n, "AVERAGE_POOL_2D", index, x, window, padding, grid)
        return
    share = _shares(window, counts)
    grid = grid if np.all(share == 1) else None
    index = _explicit(b, x, window, grid)
    made = _pool(b, n, "AVERAGE_POOL_2D", index, x, window, "VALID", grid, named=bool(np.all(share == 1)))
    if not np.all(share == 1):
        shape = tuple(b.file.tensors[made].shape)
        factor = b.file.constant(b.fresh("share"), share.astype(np.float32)[None, :, :, None])
        _named(b, n, b.emit("MUL", [made, factor], shape, kind="Mul"), x, window, None)


def _explicit(b: Builder, x: Value, window: Window, grid: Grid | None) -> int:
    """The input with all pads, as zeros."""
    index, shape, pads = b.tensor(x, NHWC, grid), stored(x.shape, NHWC), window.needed()
    shape = (shape[0], *(s + sum(p) for s, p in zip(shape[1:3], pads, strict=True)), shape[3])
    table = b.file.constant(b.fresh("pads"), np.asarray([(0, 0), *pads, (0, 0)], np.int32))
    return b.emit("PAD", [index, table], shape, "float32", grid, kind="Pad")


def _shares(window: Window, counts: bool) -> Array:
    """Elements of a window, by how many of them a mean is over."""
    per_axis = []
    for size, k, stride, begin, end, count in zip(
        window.sizes, window.kernel, window.strides, window.begins, window.ends, window.outputs(), strict=True
    ):
        starts = np.arange(count) * stride - begin
        low, high = (-begin, size + end) if counts else (0, size)
        per_axis.append(k / np.maximum(np.minimum(starts + k, high) - np.maximum(starts, low), 1))
    shares: Array = np.multiply.outer(per_axis[0], per_axis[1])
    return shares


def _pooled(b: Builder, n: Node) -> tuple[Value, Window]:
    x = b.value(n.inputs[0])
    rank = x.rank - 2
    if rank not in (1, 2):
        raise Refused(f"pooling of {rank} dimensions")
    if rank == 1:
        x = b.reshaped(x, (*x.shape[:2], 1, x.shape[2]))
    return x, window_of(n, x, n.attr("kernel_shape"), rank)


def _pool(
    b: Builder, n: Node, op: str, index: int, x: Value, window: Window, padding: str, grid: Grid | None, named: bool = True
) -> int:
    shape = (x.shape[0], *window.outputs(), x.shape[1])
    options = {"padding": padding, "strideH": window.strides[0], "strideW": window.strides[1]}
    options |= {"filterHeight": window.kernel[0], "filterWidth": window.kernel[1]}
    made = b.emit(op, [index], shape, "float32", grid, kind="Pool2D", **options)
    if named:
        _named(b, n, made, x, window, grid)
    return made


def _named(b: Builder, n: Node, index: int, x: Value, window: Window, grid: Grid | None) -> None:
    value = b.computed(index, (*x.shape[:2], *window.outputs()), NHWC, grid)
    b.values[n.outputs[0]] = b.reshaped(value, b.source.shapes[n.outputs[0]])
