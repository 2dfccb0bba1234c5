"""Which outputs are classes, and along which axis: the one place that decides if an argmax means anything.

In the order of the rules, for outputs of floats:

1. The user says so (``class_axis``), or labels have the shape of the output without that axis.
2. Probabilities: non-negative values that add up to 1 along the last axis, or axis 1; or their logarithms. Read off the
   values, so that it does not matter which operators, branch or map they come from.
3. Scores that a Softmax, LogSoftmax, Hardmax or ArgMax of the model reads.
4. The only output of floats, straight from a layer, that looks like a classifier's: [N, C] of a network of convolutions,
   recurrences or attention; or [N, C, H, W] with the height and width of an input picture and another number of channels,
   as segmentation has. C must not be a multiple of 64, as embeddings have.

All else is judged by its noise: regressions (one value has no classes), embeddings, boxes, images (as many channels as the
input, or made by DepthToSpace, Tanh, Sigmoid), states, heat maps smaller than the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.measure.arrays import is_float, leaves, values_of
from onnxq_plugins.spec import Array

_ARGMAX = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "ArgMax": 0}  # default axis
_SAME = {"Identity", "Cast", "Dropout", "Mul", "Div", "Add", "Sub", "QuantizeLinear", "DequantizeLinear"}  # keep the shape
_VIEWS = {"Identity", "Cast", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"}
_HEADS = {"Gemm", "MatMul", "Conv", "FusedConv", "FusedMatMul", "FusedGemm", "GlobalAveragePool", "ReduceMean"}
_DENSE = {"Conv", "FusedConv", "ConvTranspose", "Resize", "Upsample"}
_SIGNALS = {"Conv", "FusedConv", "LSTM", "GRU", "RNN", "Softmax", "Attention", "MultiHeadAttention"}
_EMBEDDING = 64  # numbers of channels of embeddings are multiples of it, numbers of classes hardly ever


def class_axes(
    model: onnx.ModelProto,
    reference: Sequence[Sequence[Any]],
    feed: Mapping[str, Array],
    labels: Array | None = None,
    axis: int | None = None,
) -> list[int | None]:
    """For each output of a float model the axis of its classes, counted from the last (-1), or None.

    reference   values of the outputs per feed
    feed        one of the feeds
    labels      [samples, ...] or None
    axis        the user's own: of the outputs that are classes, else of the first output of floats that has it

    Raises OnnxqError if no output has the user's axis.
    """
    samples = [_sample(values) for values in reference]
    axes = [None if y is None else probability_axis(values) for y, values in zip(samples, reference, strict=True)]
    model = inline_local_functions(model) if model.functions else model
    nodes = [*model.graph.node]
    for k, (y, output) in enumerate(zip(samples, model.graph.output, strict=True)):
        if y is not None and axes[k] is None:
            axes[k] = _read_axis(model, nodes, output.name, y.ndim)
    floats = [k for k, y in enumerate(samples) if y is not None]
    if len(floats) == 1 and axes[k := floats[0]] is None:
        axes[k] = _head_axis(nodes, model.graph, model.graph.output[k].name, reference[k], feed)
    axes = [None if a is None or (y := samples[k]) is None or y.shape[a] < 2 else a for k, a in enumerate(axes)]
    if axis is not None:
        return _own_axes(axes, samples, axis)
    whole = labels is not None and labels.dtype.kind in "iufb" and np.array_equal(labels, np.round(labels))
    if whole and labels is not None and labelled(reference, labels, axes) is None:
        fitting = {k: label_axis(labels, _shape(samples[k], labels)) for k in floats}
        k = next((k for k, found in fitting.items() if found is not None), -1)
        axes = [fitting[k] if n == k else a for n, a in enumerate(axes)]
    return axes


def probability_axis(output: Any) -> int | None:
    """The axis along which floats are probabilities of classes, or their logarithms; None if there is no such axis."""
    arrays = [leaf for value in values_of(output) for leaf in leaves(value) if leaf.size]
    if not arrays or not is_float(output):
        return None
    for axis in {-1: None, 1 - arrays[0].ndim: None} if arrays[0].ndim > 2 else (-1,):
        if all(a.ndim >= -axis and a.shape[axis] > 1 and _adds_to_one(a, axis) for a in arrays):
            return axis
    return None


def label_axis(labels: Array, shape: Sequence[Any], known: int | None = None) -> int | None:
    """The axis, counted from the last, without which an output has the labels' shape; None if there is none.

    shape   of the output, samples first; unknown sizes are not int
    known   the axis that is tried first
    """
    rank: int = len(shape)
    if labels.ndim != rank - 1:
        return None
    order: list[int] = [] if known is None else [known]
    order += [1 - rank, -1] if rank > 3 else [-1, 1 - rank]
    for axis in [*order, *range(1 - rank, 0)]:
        size, rest = shape[axis], [n for a, n in enumerate(shape) if a - rank != axis]
        fits = all(not isinstance(n, int) or n == m for n, m in zip(rest[1:], labels.shape[1:], strict=True))
        if fits and not (isinstance(size, int) and size < 2):
            return int(axis)
    return None


def labelled(reference: Sequence[Any], labels: Array, axes: Sequence[int | None]) -> int | None:
    """The number of the output that labels are of: classes of their shape, or integers or strings of it; None if none is."""
    for k, (values, axis) in enumerate(zip(reference, axes, strict=True)):
        y = _sample(values_of(values), floats=axis is not None)
        if y is None:
            continue
        if axis is not None and label_axis(labels, _shape(y, labels), axis) == axis:
            return k
        if axis is None and not is_float(values) and y.shape[1:] == labels.shape[1:] and len(y.shape) == labels.ndim:
            return k
    return None


def _sample(values: Sequence[Any], floats: bool = True) -> Array | None:
    """The first array of an output; None if it has none, or is not of floats where these are wanted."""
    if floats and not is_float(list(values)):
        return None
    return next((leaf for value in values for leaf in leaves(value)), None)


def _shape(y: Array | None, labels: Array) -> tuple[int | None, ...]:
    """An output's shape with the samples in front, of which there is an axis or not."""
    shape = () if y is None else y.shape
    return (None, *shape) if len(shape) == labels.ndim else (None, *shape[1:])


def _adds_to_one(values: Array, axis: int) -> bool:
    x = values.astype(np.float64)
    if not np.isfinite(x[x > -np.inf]).all() or np.isnan(x).any():
        return False
    for y in (x, np.exp(x)) if x.max() <= 1e-6 else (x,):
        if y.min() >= -1e-6 and np.abs(y.sum(axis=axis) - 1).max() < 2e-3:
            return True
    return False


def _read_axis(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], name: str, rank: int) -> int | None:
    """The axis along which a Softmax or ArgMax reads a tensor, directly or behind operators that keep its shape."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 13)
    todo, done = [name], set()
    while todo:
        tensor = todo.pop()
        for node in (n for n in nodes if tensor in n.input[:1] or (n.op_type in _SAME and tensor in n.input)):
            if node.op_type in _ARGMAX:
                default = 1 if opset < 13 and node.op_type != "ArgMax" else _ARGMAX[node.op_type]
                axis = int(next((a.i for a in node.attribute if a.name == "axis"), default))
                axis = axis - rank if axis >= 0 else axis
                if -rank < axis or rank == 1:
                    return axis
            elif node.op_type in _SAME and node.output[0] not in done:
                done.add(node.output[0])
                todo.append(node.output[0])
    return None


def _head_axis(
    nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto, name: str, reference: Sequence[Any], feed: Mapping[str, Array]
) -> int | None:
    """The axis of the classes of a network's only output of floats, if it looks like a classifier's or a segmentation's."""
    y = _sample(reference)
    maker, moved = _maker(nodes, graph, name)
    if y is None or y.ndim not in (2, 4):
        return None
    if y.ndim == 2:
        head = maker in _HEADS and any(n.op_type in _SIGNALS for n in nodes)
        axis = -1
    else:
        pictures = [x.shape for x in feed.values() if x.ndim == 4]
        places = [(a, s) for a, s in ((-3, slice(2, 4)), (-1, slice(1, 3))) if (a == -3) != moved]
        axis = next((a for a, s in places if any(y.shape[s] == p[t] for p in pictures for t in _SPACES)), 0)
        channels = {n for p in pictures for n in (p[1], p[3])}
        head = bool(axis) and maker in _DENSE and y.shape[axis] not in channels
    return axis if head and y.shape[axis] > 1 and y.shape[axis] % _EMBEDDING else None


_SPACES = (slice(2, 4), slice(1, 3))  # height and width of NCHW, of NHWC


def _maker(nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto, name: str) -> tuple[str, bool]:
    """The operator that computes a tensor, behind views and a bias; and True if channels are moved to the last axis."""
    producers = {output: node for node in nodes for output in node.output}
    constants = {t.name for t in graph.initializer} | {n.output[0] for n in nodes if n.op_type == "Constant"}
    moved = False
    while (node := producers.get(name)) is not None:
        bias = node.op_type in ("Add", "BatchNormalization") and len([i for i in node.input if i not in constants]) == 1
        moved = moved != (node.op_type == "Transpose")
        if node.op_type not in _VIEWS and node.op_type != "Transpose" and not bias:
            return node.op_type, moved
        name = next((i for i in node.input if i not in constants), "")
    return "", moved


def _own_axes(axes: Sequence[int | None], samples: Sequence[Array | None], axis: int) -> list[int | None]:
    """The axes with the user's own in place of those of all classes; of the first output that has it if there are none."""
    known = [k for k, a in enumerate(axes) if a is not None] or range(len(axes))
    own: list[int | None] = [None] * len(axes)
    for k in known:
        y = samples[k]
        if y is not None and -y.ndim <= axis < y.ndim and y.shape[axis] > 1:
            own[k] = axis - y.ndim if axis >= 0 else axis
            if not isinstance(known, list):
                break
    if not any(a is not None for a in own):
        shapes = ", ".join(str(list(y.shape)) for y in samples if y is not None)
        raise OnnxqError(
            f"class axis {axis} is none with two values or more of an output of floats; they have {shapes or 'none'}."
        )
    return own
