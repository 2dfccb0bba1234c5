"""Operators that move data, and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxq_plugins.formats.tflite.builder import Builder, Refused, Value
from onnxq_plugins.formats.tflite.layouts import plain, stored
from onnxq_plugins.formats.tflite.makers.elementwise import operand_grids
from onnxq_plugins.formats.tflite.reading import Node
from onnxq_plugins.spec import Array

Maker = Callable[[Builder, Node], None]


def _kind(x: Value) -> str:
    return x.type if x.grid is None else x.grid.type


def reshape(b: Builder, n: Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the shape is known."""
    b.values[n.outputs[0]] = b.reshaped(b.value(n.inputs[0]), b.source.shapes[n.outputs[0]])


def identity(b: Builder, n: Node) -> None:
    """Identity, Dropout: the same tensor."""
    b.values[n.outputs[0]] = b.value(n.inputs[0])


def transpose(b: Builder, n: Node) -> None:
    """Transpose: the data stay where they are, the axes get other names."""
    x = b.value(n.inputs[0])
    perm = list(n.attr("perm") or range(x.rank)[::-1])
    index = b.tensor(x, None, x.grid)
    order = tuple(perm.index(axis) for axis in x.order)
    b.made(n.outputs[0], index, order, x.grid, x.type)


def concat(b: Builder, n: Node) -> None:
    """Concat -> CONCATENATION; codes have to be on one grid: the output's, or the one that all have."""
    values = [b.value(name) for name in n.inputs]
    values = [v for v in values if v.constant is None or v.constant.size]
    axis = int(n.attr("axis")) % values[0].rank
    moving = [v for v in values if v.constant is None]
    grids = {v.grid for v in moving}
    grid = b.source.target(n.outputs[0])
    if not operand_grids(moving, grid):
        alone = grids.pop() if len(grids) == 1 and len(moving) == len(values) else None
        grid = alone if alone is not None and alone.activation else None
    order = max(moving, key=lambda v: math.prod(v.shape)).order
    tensors = [b.tensor(v, order, grid) for v in values]
    shape, kind = b.source.shapes[n.outputs[0]], values[0].type
    made = b.emit("CONCATENATION", tensors, stored(shape, order), kind, grid, kind="Concatenation", axis=order.index(axis))
    b.made(n.outputs[0], made, order, grid)


def pad(b: Builder, n: Node) -> None:
    """Pad -> PAD, PADV2 or MIRROR_PAD."""
    x, mode = b.value(n.inputs[0]), n.attr("mode", "constant")
    pads = b.numbers(n, "pads", 1)
    axes = b.constant(n, 3, "axes")
    places = range(x.rank) if axes is None else [int(a) % x.rank for a in axes.reshape(-1)]
    table = np.zeros((x.rank, 2), np.int64)
    for at, axis in enumerate(places):
        table[axis] = pads[at], pads[at + len(places)]
    grid, kind = x.grid, _kind(x)
    index, shape = b.tensor(x, None, grid), b.source.shapes[n.outputs[0]]
    if (table < 0).any():
        index, x = _cut(b, x, table)
        table = np.maximum(table, 0)
    rows = b.ints(table[list(x.order)])
    if mode == "reflect":
        made = b.emit("MIRROR_PAD", [index, rows], stored(shape, x.order), kind, grid, kind="MirrorPad", mode="REFLECT")
    elif mode != "constant":
        raise Refused(f"LiteRT has no mode '{mode}'")
    else:
        filling = b.constant(n, 2, "value")
        value = float(filling.reshape(-1)[0]) if filling is not None and filling.size else float(n.attr("value", 0.0))
        if value == 0.0:
            made = b.emit("PAD", [index, rows], stored(shape, x.order), kind, grid, kind="Pad")
        else:
            number = np.asarray([max(min(value, 3.4e38), -3.4e38)], "float32" if x.type == "float32" else x.type)
            other = b.file.constant(b.fresh("value"), number if grid is None else grid.encode(number), grid)
            made = b.emit("PADV2", [index, rows, other], stored(shape, x.order), kind, grid, kind="PadV2")
    b.made(n.outputs[0], made, x.order, grid, x.type)


def _cut(b: Builder, x: Value, table: Array) -> tuple[int, Value]:
    """Pads below 0 take something off."""
    begin = np.maximum(-table[:, 0], 0)
    shape = tuple(int(s) for s in np.asarray(x.shape) - begin - np.maximum(-table[:, 1], 0))
    made = _sliced(b, x, list(begin), shape)
    return made.index, made


def _sliced(b: Builder, x: Value, begin: list[int], shape: tuple[int, ...], steps: list[int] | None = None) -> Value:
    """A part of a tensor that is no constant; `begin` and `shape` in ONNX's order."""
    index, order, grid = b.tensor(x, None, x.grid), x.order, x.grid
    kind, size = _kind(x), stored(shape, order)
    starts = [int(begin[axis]) for axis in order]
    if steps is None or set(steps) == {1}:
        made = b.emit("SLICE", [index, b.ints(starts), b.ints(size)], size, kind, grid, kind="Slice")
        return b.computed(made, shape, order, grid, x.type)
    strides = [int(steps[axis]) for axis in order]
    ends = [s + (n - 1) * t + (1 if t > 0 else -1) for s, n, t in zip(starts, size, strides, strict=True)]
    mask = sum(1 << at for at, end in enumerate(ends) if end < 0)  # -1 would be the last element
    inputs = [index, b.ints(starts), b.ints([max(e, 0) for e in ends]), b.ints(strides)]
    made = b.emit("STRIDED_SLICE", inputs, size, kind, grid, kind="StridedSlice", endMask=mask)
    return b.computed(made, shape, order, grid, x.type)


def slice_(b: Builder, n: Node) -> None:
    """Slice -> SLICE, or STRIDED_SLICE with steps."""
    x, shape = b.value(n.inputs[0]), b.source.shapes[n.outputs[0]]
    starts = b.numbers(n, "starts", 1)
    axes = b.numbers(n, "axes", 3, list(range(len(starts))))
    given = b.numbers(n, "steps", 4, [1] * len(starts))
    begin, steps = [0] * x.rank, [1] * x.rank
    for start, axis, step in zip(starts, axes, given, strict=True):
        size = x.shape[axis % x.rank]
        start = start + size if start < 0 else start
        begin[axis % x.rank] = min(max(start, 0), size if step > 0 else size - 1)
        steps[axis % x.rank] = step
    if math.prod(shape) == 0:
        raise Refused("its output has no elements")
    b.values[n.outputs[0]] = _sliced(b, x, begin, shape, steps)


def split(b: Builder, n: Node) -> None:
    """Split -> one SLICE for each part."""
    x, axis, at = b.value(n.inputs[0]), int(n.attr("axis", 0)), 0
    for name in n.outputs:
        shape = b.source.shapes[name]
        begin = [at if a == axis % x.rank else 0 for a in range(x.rank)]
        b.values[name] = _sliced(b, x, begin, shape)
        at += shape[axis % x.rank]


def gather(b: Builder, n: Node) -> None:
    """Gather -> GATHER; of one constant index: a slice."""
    x, at = b.value(n.inputs[0]), b.value(n.inputs[1])
    axis, shape = int(n.attr("axis", 0)) % x.rank, b.source.shapes[n.outputs[0]]
    if at.constant is not None and at.constant.size == 1 and x.constant is None:
        first = int(at.constant.reshape(-1)[0]) % x.shape[axis]
        part = tuple(1 if a == axis else s for a, s in enumerate(x.shape))
        begin = [first if a == axis else 0 for a in range(x.rank)]
        b.values[n.outputs[0]] = b.reshaped(_sliced(b, x, begin, part), shape)
        return
    if at.constant is not None:
        at = b.literal((at.constant % x.shape[axis]).astype(np.int32))
    grid = x.grid if x.grid is not None and x.grid.activation else None
    if x.grid is not None and x.grid.axis == 0 == axis and x.codes is not None:
        b.values[n.outputs[0]] = _rows_of(b, x, at, shape)
        return
    inputs = [b.tensor(x, plain(x.rank), grid), b.tensor(at, plain(at.rank))]
    made = b.emit("GATHER", inputs, shape, x.type, grid, kind="Gather", axis=axis)
    b.made(n.outputs[0], made, plain(len(shape)), grid, x.type)


def _rows_of(b: Builder, x: Value, at: Value, shape: tuple[int, ...]) -> Value:
    """Rows of a table of codes with a scale per row, decoded after they are gathered."""
    assert x.codes is not None and x.grid is not None
    rows = b.tensor(at, plain(at.rank))
    codes = b.file.constant(b.fresh("table"), x.codes)
    scales = np.asarray(x.grid.scale, np.float32).reshape(-1, *(1,) * (x.rank - 1))
    taken = b.emit("GATHER", [codes, rows], shape, "int8", kind="Gather")
    few = (*at.shape, *(1,) * (x.rank - 1))
    factor = b.emit("GATHER", [b.file.constant(b.fresh("scales"), scales), rows], few, kind="Gather")
    types = b.file.schema.TensorType
    floats = b.emit("CAST", [taken], shape, kind="Cast", inDataType=types.INT8, outDataType=types.FLOAT32)
    return b.computed(b.emit("MUL", [floats, factor], shape, kind="Mul"), shape, plain(len(shape)))


def expand(b: Builder, n: Node) -> None:
    """Expand and Tile -> TILE."""
    x, shape = b.value(n.inputs[0]), b.source.shapes[n.outputs[0]]
    x = b.reshaped(x, (*(1,) * (len(shape) - x.rank), *x.shape)) if x.rank < len(shape) else x
    if x.shape == shape:
        b.values[n.outputs[0]] = x
        return
    times = b.ints([shape[axis] // x.shape[axis] for axis in x.order])
    made = b.emit("TILE", [b.tensor(x, None, x.grid), times], stored(shape, x.order), _kind(x), x.grid, kind="Tile")
    b.made(n.outputs[0], made, x.order, x.grid, x.type)


def reduction(op: str, codes: bool = True, moves: bool = False) -> Maker:
    """ReduceMean and others.

    codes   LiteRT computes it on codes
    moves   whose grid stays then
    """

    def make(b: Builder, n: Node) -> None:
        x, target = b.value(n.inputs[0]), b.source.target(n.outputs[0])
        every = list(range(2, x.rank)) if n.op.startswith("Global") else list(range(x.rank))
        axes = b.numbers(n, "axes", 1, None) or every
        if not axes or (n.attr("noop_with_empty_axes", 0) and axes == every):
            b.values[n.outputs[0]] = x
            return
        axes = sorted(axis % x.rank for axis in axes)
        grid = target if codes and operand_grids([x], target) else None
        grid = x.grid if moves and x.grid is not None and x.grid.activation else grid
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        places = b.ints(sorted(x.order.index(axis) for axis in axes))
        index = b.tensor(x, None, x.grid if grid is not None else None)
        made = b.emit(op, [index, places], stored(shape, x.order), x.type, grid, kind="Reducer", keepDims=True)
        value = b.computed(made, shape, x.order, grid, x.type)
        b.values[n.outputs[0]] = b.reshaped(value, b.source.shapes[n.outputs[0]])

    return make


def norm(b: Builder, n: Node) -> None:
    """ReduceL2: the root of the sum of squares."""
    x = b.value(n.inputs[0])
    axes = sorted(axis % x.rank for axis in b.numbers(n, "axes", 1, None) or range(x.rank))
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    squares = b.emit("SQUARE", [b.tensor(x)], stored(x.shape, x.order), kind="Square")
    places = b.ints(sorted(x.order.index(axis) for axis in axes))
    made = b.emit("SUM", [squares, places], stored(shape, x.order), kind="Reducer", keepDims=True)
    root = b.computed(b.emit("SQRT", [made], stored(shape, x.order)), shape, x.order)
    b.values[n.outputs[0]] = b.reshaped(root, b.source.shapes[n.outputs[0]])


def argmax(op: str) -> Maker:
    """ArgMax, ArgMin: of codes where there are some."""

    def make(b: Builder, n: Node) -> None:
        x, shape = b.value(n.inputs[0]), b.source.shapes[n.outputs[0]]
        if n.attr("select_last_index", 0):
            raise Refused("LiteRT takes the first of equal elements, not the last")
        axis, kind = int(n.attr("axis", 0)) % x.rank, "ArgMax" if op == "ARG_MAX" else "ArgMin"
        grid = x.grid if x.grid is not None and x.grid.type == "int8" else None
        left = tuple(s for a, s in enumerate(x.shape) if a != axis)
        place = b.ints(np.asarray([x.rank and axis]))
        made = b.emit(
            op,
            [b.tensor(x, plain(x.rank), grid), place],
            left,
            "int64",
            kind=kind,
            outputType=b.file.schema.TensorType.INT64,
        )
        b.values[n.outputs[0]] = b.reshaped(b.computed(made, left, plain(len(left)), None, "int64"), shape)

    return make


def depth_to_space(b: Builder, n: Node) -> None:
    """DepthToSpace as a Reshape, a Transpose and a Reshape."""
    x, block = b.value(n.inputs[0]), int(n.attr("blocksize"))
    batch, channels, height, width = x.shape
    few = channels // block**2
    if n.attr("mode", "DCR") == "DCR":
        six, perm = (batch, block, block, few, height, width), (0, 3, 4, 1, 5, 2)
    else:
        six, perm = (batch, few, block, block, height, width), (0, 1, 4, 2, 5, 3)
    _shuffled(b, n, b.reshaped(x, six), perm, (0, 2, 3, 4, 5, 1))


def space_to_depth(b: Builder, n: Node) -> None:
    """SpaceToDepth, likewise."""
    x, block = b.value(n.inputs[0]), int(n.attr("blocksize"))
    batch, channels, height, width = x.shape
    six = (batch, channels, height // block, block, width // block, block)
    _shuffled(b, n, b.reshaped(x, six), (0, 3, 5, 1, 2, 4), (0, 4, 5, 1, 2, 3))


def _shuffled(b: Builder, n: Node, x: Value, perm: tuple[int, ...], order: tuple[int, ...]) -> None:
    """Turn the axes of x, so that the result is stored in an `order` in which it can be reshaped where it lies, to NHWC."""
    index = b.tensor(x, None, x.grid)
    turned = b.computed(index, [x.shape[a] for a in perm], tuple(perm.index(a) for a in x.order), x.grid, x.type)
    moved = b.computed(b.tensor(turned, order, x.grid), turned.shape, order, x.grid, x.type)
    b.values[n.outputs[0]] = b.reshaped(moved, b.source.shapes[n.outputs[0]])
