"""Layers: convolutions and products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxq_plugins.formats.tflite.builder import Builder, Refused, Tail, Value
from onnxq_plugins.formats.tflite.layouts import channels_last, plain, stored
from onnxq_plugins.formats.tflite.makers.windows import padded, window_of
from onnxq_plugins.formats.tflite.reading import Node
from onnxq_plugins.formats.tflite.schema import Grid
from onnxq_plugins.spec import Array

NHWC = channels_last(4)
# Setting `int4` -> operators that read codes of 4 bits. FULLY_CONNECTED does so at no cost; convolutions unpack them in each
# run, outside XNNPACK (ai-edge-litert 2.3: 4 to 10 times slower); TRANSPOSE_CONV does not take them.
INT4 = {"none": (), "fast": ("FULLY_CONNECTED",), "all": ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")}


def conv(b: Builder, n: Node) -> None:
    """Conv [N, C, H, W] or [N, C, L] -> CONV_2D or DEPTHWISE_CONV_2D."""
    x, w, bias = _operands(b, n)
    window, tail = window_of(n, x, w.shape[2:], len(b.source.shapes[n.inputs[0]]) - 2), b.tail(n)
    grid = _integer(x, w, tail, axis=0)
    groups, outputs = n.attr("group", 1), w.shape[0]
    depthwise = groups > 1 and groups == x.shape[1]
    index, padding = padded(b, x, window, grid and x.grid, 0.0)
    shape = (x.shape[0], *window.outputs(), outputs)
    fused = b.fused(tail, grid)
    options = {"strideH": window.strides[0], "strideW": window.strides[1], "padding": padding}
    options |= {"dilationHFactor": window.dilations[0], "dilationWFactor": window.dilations[1]}
    options |= {"fusedActivationFunction": fused or "NONE"}
    op = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    weight = _weight(b, w, (1, 2, 3, 0) if depthwise else (0, 2, 3, 1), grid, op)
    inputs = [index, weight, _bias(b, bias, outputs, x, w, grid)]
    if depthwise:
        options["depthMultiplier"] = outputs // groups
    kind = "DepthwiseConv2D" if depthwise else "Conv2D"
    made = b.emit(op, inputs, shape, "float32", grid, kind=kind, **options)
    _finish_windowed(b, n, tail, made, (shape[0], outputs, *shape[1:3]), grid, fused)


def conv_transpose(b: Builder, n: Node) -> None:
    """ConvTranspose [N, C, H, W] or [N, C, L] -> TRANSPOSE_CONV for each group, without pads, and a SLICE that takes them
    off."""
    x, w, bias = _operands(b, n)
    groups, tail = n.attr("group", 1), b.tail(n)
    rank = len(b.source.shapes[n.inputs[0]]) - 2
    kernel, strides, dilations = w.shape[2:], _two(n.attr("strides"), rank), _two(n.attr("dilations"), rank)
    grid = _integer(x, w, tail, axis=1, groups=groups)
    outputs, inputs = w.shape[1] * groups, w.shape[0] // groups
    wanted = (*((1,) if rank == 1 else ()), *b.source.shapes[n.outputs[0]][2:])
    begins, _ = _transposed_pads(n, x.shape[2:], wanted, kernel, strides, dilations, rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    full = [(s - 1) * t + r for s, t, r in zip(x.shape[2:], strides, reach, strict=True)]
    room = [max(f, p + o) for f, p, o in zip(full, begins, wanted, strict=True)]
    weights, parts = _spread(w, dilations), []
    for g in range(groups):
        part = _rows(weights, g * inputs, (g + 1) * inputs, 0)
        part.grid = part.grid and _part_of(part.grid, g, w.shape[1])
        taken = _slice(b, x, 1, g * inputs, inputs) if groups > 1 else x
        biased = None if bias is None else bias[g * w.shape[1] : (g + 1) * w.shape[1]]
        shape = (x.shape[0], *room, w.shape[1])
        index = b.emit(
            "TRANSPOSE_CONV",
            [
                b.ints(shape),
                _weight(b, part, (1, 2, 3, 0), grid, "TRANSPOSE_CONV"),
                b.tensor(taken, NHWC, grid and x.grid),
                _bias(b, biased, w.shape[1], x, part, grid),
            ],
            shape,
            "float32",
            grid,
            kind="TransposeConv",
            padding="VALID",
            strideH=strides[0],
            strideW=strides[1],
        )
        parts.append(index)
    shape = (x.shape[0], *room, outputs)
    made = parts[0]
    if groups > 1:
        made = b.emit("CONCATENATION", parts, shape, "float32", grid, kind="Concatenation", axis=3)
    if tuple(room) != tuple(wanted) or any(begins):
        taken_shape = (x.shape[0], *wanted, outputs)
        made = b.emit(
            "SLICE", [made, b.ints((0, *begins, 0)), b.ints(taken_shape)], taken_shape, "float32", grid, kind="Slice"
        )
    _finish_windowed(b, n, tail, made, (x.shape[0], outputs, *wanted), grid, "")


def gemm(b: Builder, n: Node) -> None:
    """Gemm with a constant matrix -> FULLY_CONNECTED."""
    a, w, c = b.value(n.inputs[0]), b.value(n.inputs[1]), b.given(n, 2)
    if w.constant is None or n.attr("transA", 0):
        _product(b, n, a, w)
        return
    _dense(b, n, a, w if n.attr("transB", 0) else _turned(w), c, n.attr("alpha", 1.0), n.attr("beta", 1.0))


def matmul(b: Builder, n: Node) -> None:
    """MatMul -> FULLY_CONNECTED with a constant matrix, BATCH_MATMUL else."""
    x, w = b.value(n.inputs[0]), b.value(n.inputs[1])
    if w.constant is not None and w.rank == 2:
        _dense(b, n, x, _turned(w), _added(b, n, w.shape[1]))
    else:
        _product(b, n, x, w)


def _dense(b: Builder, n: Node, x: Value, w: Value, c: Value | None, alpha: float = 1.0, beta: float = 1.0) -> None:
    """x [..., in] times w [out, in], plus c."""
    if c is not None and c.constant is None:
        raise Refused("its bias is computed from the input")
    if alpha != 1.0 and w.constant is not None:
        scaled = w.grid and Grid(w.grid.type, tuple(s * alpha for s in w.grid.scale), w.grid.zero, w.grid.axis)
        w = Value(
            w.shape, w.type, w.order, scaled if alpha > 0 else None, constant=w.constant * np.float32(alpha), codes=w.codes
        )
        w.codes = w.codes if alpha > 0 else None
    rows = c is not None and c.constant is not None and c.constant.ndim > 1 and c.constant.shape[0] > 1
    tail = Tail(n.outputs[0], grid=b.source.target(n.outputs[0])) if rows else b.tail(n)
    grid = None if rows else _integer(x, w, tail, axis=0)
    bias = None
    if c is not None and c.constant is not None and not rows:
        bias = np.broadcast_to(c.constant.reshape(-1) * np.float32(beta), (w.shape[0],))
    if x.rank == 1:
        x = b.reshaped(x, (1, *x.shape))
    order = x.order if x.order[-1] == x.rank - 1 else plain(x.rank)
    shape = (*x.shape[:-1], w.shape[0])
    fused = b.fused(tail, grid)
    inputs = [
        b.tensor(x, order, grid and x.grid),
        _weight(b, w, (0, 1), grid, "FULLY_CONNECTED"),
        _bias(b, bias, w.shape[0], x, w, grid),
    ]
    options = {"fusedActivationFunction": fused or "NONE", "keepNumDims": x.rank > 2}
    made = b.emit("FULLY_CONNECTED", inputs, stored(shape, order), "float32", grid, kind="FullyConnected", **options)
    if rows and c is not None and c.constant is not None:
        other = b.file.constant(b.fresh("bias"), c.constant * np.float32(beta))
        made = b.emit("ADD", [made, other], shape, kind="Add")
    if b.source.shapes[tail.name] != shape:  # a vector
        shape = b.source.shapes[tail.name]
        made, order = b.reshape(made, shape, "float32", grid), plain(len(shape))
    b.finish(tail, made, shape, order, grid, fused)


def _product(b: Builder, n: Node, x: Value, y: Value) -> None:
    """The product of two tensors of matrices. Matrices that lie transposed are read so.

    XNNPACK has it in floats alone, and LiteRT's own kernel for codes takes 25 times as long (ai-edge-litert 2.3, x86-64): on
    codes only where the settings have it so, and on those of 16 bits.
    """
    swap = [False, False]
    if n.op == "Gemm":
        if len(n.inputs) > 2 or n.attr("alpha", 1.0) != 1.0:
            raise Refused("a product of two activations with a bias or a factor")
        swap = [bool(n.attr("transA", 0)), bool(n.attr("transB", 0))]
    tail = b.tail(n)
    rank = max(x.rank, y.rank, 2)
    if min(x.rank, y.rank) < 2:
        raise Refused("a product with a vector that is computed")
    integer = b.settings["products"] == "int8" or (tail.grid is not None and tail.grid.type == "int16")
    grid = tail.grid if integer and _same_codes(x.grid, y.grid, tail.grid) else None
    tensors, adjoint = [], []
    for value, turned in zip((x, y), swap, strict=True):
        wide = b.reshaped(value, (*(1,) * (rank - value.rank), *value.shape)) if value.rank < rank else value
        across = (*range(rank - 2), rank - 1, rank - 2)
        order = across if wide.order == across else plain(rank)
        tensors.append(b.tensor(wide, order, grid and value.grid))
        adjoint.append((order == across) != turned)
    shape = b.source.shapes[n.outputs[0]]
    full = (*(1,) * (rank - len(shape)), *shape)
    made = b.emit("BATCH_MATMUL", tensors, full, "float32", grid, kind="BatchMatMul", adjX=adjoint[0], adjY=adjoint[1])
    b.finish(tail, b.reshape(made, shape, "float32", grid), shape, plain(len(shape)), grid)


# ---- parts of layers --------------------------------------------------------------------------------------------------


def _operands(b: Builder, n: Node) -> tuple[Value, Value, Array | None]:
    """Input, weight and bias of a convolution, one of one dimension as one of two."""
    x, w = b.value(n.inputs[0]), b.value(n.inputs[1])
    if w.constant is None:
        raise Refused("its weight is computed from the input")
    if w.rank > 4:
        raise Refused("LiteRT has no integer convolution of three dimensions")
    if w.rank == 3:
        x = b.reshaped(x, (*x.shape[:2], 1, x.shape[2]))
        codes = None if w.codes is None else w.codes[:, :, None]
        w = Value((*w.shape[:2], 1, w.shape[2]), w.type, plain(4), w.grid, constant=w.constant[:, :, None], codes=codes)
    return x, w, b.constant(n, 2, "bias")


def _same_codes(*grids: Grid | None) -> bool:
    return all(g is not None and g.activation for g in grids) and len({g.type for g in grids if g}) == 1


def _integer(x: Value, w: Value, tail: Tail, axis: int, groups: int = 1) -> Grid | None:
    """The grid of the output of a layer that runs on codes, or None. Raises Refused where codes are there that LiteRT cannot
    multiply."""
    if not _same_codes(x.grid, tail.grid) or w.grid is None or w.codes is None:
        return None
    if w.grid.zero:
        raise Refused("its weight has a zero point; LiteRT multiplies symmetric codes: quantize weights symmetrically")
    if w.grid.type != "int8" or w.grid.axis not in (None, axis):
        return None
    if groups > 1 and w.grid.axis is not None and len(w.grid.scale) not in (w.shape[1], w.shape[1] * groups):
        return None
    return tail.grid


def _weight(b: Builder, w: Value, order: Sequence[int], grid: Grid | None, op: str) -> int:
    """A weight as floats or codes: of 4 bits where all codes fit and the settings have it so for the operator."""
    if grid is None or w.grid is None or w.codes is None:
        return b.tensor(w, tuple(order))
    narrow = op in INT4[b.settings["int4"]] and w.codes.min() >= -8 and w.codes.max() <= 7
    own = replace(w.grid, type="int4") if narrow else w.grid
    return b.tensor(replace(w, grid=own, forms={}), tuple(order), own)


def _bias(b: Builder, bias: Array | None, outputs: int, x: Value, w: Value, grid: Grid | None) -> int:
    """The bias of a layer; on codes int32 (int64 beside int16) at the scale of the products."""
    values = np.zeros(outputs, np.float32) if bias is None else bias.astype(np.float32)
    if grid is None or x.grid is None or w.grid is None:
        return b.file.constant(b.fresh("bias"), values)
    scales = tuple(float(np.float32(x.grid.scale[0] * s)) for s in w.grid.scale)
    own = Grid("int32" if grid.type == "int8" else "int64", scales, 0, None if w.grid.axis is None else 0)
    return b.file.constant(b.fresh("bias"), own.encode(values), own, 0)


def _added(b: Builder, n: Node, outputs: int) -> Value | None:
    """The bias that is added to a product, if one is and that alone reads it; it is written with the product."""
    reader = b.source.only_reader(n.outputs[0])
    if reader is None or reader.op != "Add":
        return None
    others = [name for name in reader.inputs if name != n.outputs[0]]
    value = b.value(others[0]) if others and others[0] in b.source.constants else None
    if value is None or value.constant is None or value.constant.shape[-1:] != (outputs,) or value.constant.size != outputs:
        return None
    if b.source.shapes[reader.outputs[0]] != b.source.shapes[n.outputs[0]]:
        return None
    n.outputs[0] = reader.outputs[0]
    b.done.add(reader)
    return value


def _turned(w: Value) -> Value:
    """The transposed matrix."""
    assert w.constant is not None
    axis = None if w.grid is None or w.grid.axis is None else 1 - w.grid.axis
    grid = w.grid and Grid(w.grid.type, w.grid.scale, w.grid.zero, axis)
    codes = None if w.codes is None else w.codes.T
    return Value(w.shape[::-1], w.type, w.order, grid, constant=w.constant.T, codes=codes)


def _rows(w: Value, first: int, last: int, axis: int) -> Value:
    assert w.constant is not None
    at = np.arange(first, last)
    codes = None if w.codes is None else w.codes.take(at, axis)
    part = w.constant.take(at, axis)
    return Value(part.shape, w.type, w.order, w.grid, constant=part, codes=codes)


def _part_of(grid: Grid, group: int, outputs: int) -> Grid:
    """The scales of one group of a transposed convolution, whose weight has the outputs of one group."""
    if grid.axis is None or len(grid.scale) == outputs:
        return grid
    return Grid(grid.type, grid.scale[group * outputs : (group + 1) * outputs], grid.zero, grid.axis)


def _spread(w: Value, dilations: Sequence[int]) -> Value:
    """A kernel with zeros between its taps: TRANSPOSE_CONV has no dilations."""
    if set(dilations) == {1} or w.constant is None:
        return w
    shape = (*w.shape[:2], *((k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)))

    def wide(values: Array) -> Array:
        out = np.zeros(shape, values.dtype)
        out[:, :, :: dilations[0], :: dilations[1]] = values
        return out

    codes = None if w.codes is None else wide(w.codes)
    return Value(shape, w.type, w.order, w.grid, constant=wide(w.constant), codes=codes)


def _slice(b: Builder, x: Value, axis: int, first: int, size: int) -> Value:
    shape = tuple(size if a == axis else s for a, s in enumerate(x.shape))
    begin = [first if a == axis else 0 for a in x.order]
    index = b.tensor(x, x.order, x.grid)
    kind = x.type if x.grid is None else x.grid.type
    made = b.emit(
        "SLICE", [index, b.ints(begin), b.ints(stored(shape, x.order))], stored(shape, x.order), kind, x.grid, kind="Slice"
    )
    return b.computed(made, shape, x.order, x.grid, x.type)


def _two(values: Sequence[int] | None, rank: int) -> list[int]:
    given = list(values) if values is not None else [1] * rank
    return [1] * (2 - rank) + given


def _transposed_pads(
    n: Node,
    sizes: Sequence[int],
    wanted: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    rank: int,
) -> tuple[list[int], list[int]]:
    """What is taken off a transposed convolution at the beginning and at the end, as ONNX defines it."""
    auto, extra = n.attr("auto_pad", "NOTSET"), _two(n.attr("output_padding"), rank)
    extra = [e if n.attr("output_padding") is not None else 0 for e in extra]
    extra = [0] * (2 - rank) + extra[2 - rank :]
    if auto in ("NOTSET", "VALID") and n.attr("output_shape") is None:
        pads = n.attr("pads") or [0] * (2 * rank)
        return [0] * (2 - rank) + list(pads[:rank]), [0] * (2 - rank) + list(pads[rank:])
    begins, ends = [], []
    for s, o, k, t, d, e in zip(sizes, wanted, kernel, strides, dilations, extra, strict=True):
        total = max(t * (s - 1) + e + (k - 1) * d + 1 - o, 0)
        begin = total // 2 if auto == "SAME_UPPER" else total - total // 2
        begins.append(begin)
        ends.append(total - begin)
    return begins, ends


def _finish_windowed(
    b: Builder, n: Node, tail: Tail, index: int, shape: tuple[int, ...], grid: Grid | None, fused: str
) -> None:
    """Name the output of a convolution; one of one dimension loses its row."""
    wanted = b.source.shapes[tail.name]
    if wanted == shape:
        b.finish(tail, index, shape, NHWC, grid, fused)
        return
    flat = b.reshaped(b.computed(index, shape, NHWC, grid), wanted)
    b.finish(tail, b.tensor(flat, flat.order, grid), wanted, flat.order, grid, fused)
