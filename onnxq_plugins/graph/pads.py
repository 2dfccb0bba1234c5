"""Padding becomes part of the Conv or pooling behind it, which pads for nothing."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.rewriting import Rewrite, is_output, kind_of, left_out, rank_of, rewrite_of, values_of
from onnxq_plugins.spec import Array

_DEPTH = 12  # operators that are asked whether their outputs are never negative
_NEVER_NEGATIVE = {
    "Relu",
    "Sigmoid",
    "HardSigmoid",
    "Abs",
    "Exp",
    "Sqrt",
    "Softmax",
    "Softplus",
    "ReduceL2",
    "ReduceSumSquare",
}
_AS_THEIR_INPUTS = {
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout", "Slice", "Split", "DepthToSpace"),
    *("SpaceToDepth", "Concat", "Add", "Mul", "Max", "Min", "Sum", "HardSwish", "Swish"),
}


def amounts(node: gs.Node) -> Array | None:
    """What a Pad adds, [2, axes] in front and behind; None if that is computed."""
    pads, rank = values_of(node, 1), rank_of(node.inputs[0])
    if pads is None:
        return None
    if left_out(node, 3):
        return pads.reshape(2, -1).astype(np.int64)
    axes = values_of(node, 3)
    if axes is None or rank is None:
        return None
    all_axes = np.zeros((2, rank), np.int64)
    all_axes[:, axes.reshape(-1)] = pads.reshape(2, -1)
    return all_axes


def constant_of(node: gs.Node) -> float | None:
    """What a Pad fills in; None if that is computed, or its mode is another."""
    if node.attrs.get("mode", "constant") not in ("constant", b"constant"):
        return None
    if left_out(node, 2):
        return 0.0
    value = values_of(node, 2)
    return None if value is None or value.size != 1 else float(value.item())


def never_negative(tensor: gs.Tensor, depth: int = _DEPTH) -> bool:
    """True if no value of a tensor is ever below 0, as behind a Relu."""
    if tensor.is_empty():
        return True
    if isinstance(tensor, gs.Constant):
        return bool(tensor.values.dtype.kind in "iuf" and (tensor.values >= 0).all())
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.domain or depth == 0:
        return False
    if node.op in _NEVER_NEGATIVE:
        return True
    if node.op == "Clip":
        low = values_of(node, 1)
        return bool(low is not None and low >= 0) or (left_out(node, 1) and never_negative(node.inputs[0], depth - 1))
    if node.op in ("HardSwish", "Swish"):
        return never_negative(node.inputs[0], depth - 1)
    if node.op not in _AS_THEIR_INPUTS:
        return False
    several = node.op in ("Concat", "Add", "Mul", "Max", "Min", "Sum")
    return all(never_negative(t, depth - 1) for t in (node.inputs if several else node.inputs[:1]))


@rewrite_of("Conv", "AveragePool", "MaxPool")
def absorb_pad(graph: Graph, node: gs.Node) -> bool:
    """Conv(Pad(x)) pads itself where zeros are added to spatial axes. So does AveragePool, which then counts them, and
    MaxPool where they never are the maximum. Others that read the padded tensor still do."""
    pad = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if pad is None or pad.op != "Pad" or pad.domain or isinstance(pad.inputs[0], gs.Constant):
        return False
    added, value = amounts(pad), constant_of(pad)
    if added is None or value is None or added.shape[1] < 3 or (added < 0).any() or added[:, :2].any():
        return False
    own = _own_pads(node, added.shape[1] - 2)
    if own is None:
        return False
    total = own + added[:, 2:]
    if node.op == "Conv":
        fits = value == 0
    else:
        fits = _pools_alike(node, pad, own, total, value)
    if not fits:
        return False
    node.inputs[0] = pad.inputs[0]
    node.attrs.pop("auto_pad", None)
    node.attrs["pads"] = [int(n) for n in total.reshape(-1)]
    if node.op == "AveragePool":
        node.attrs["count_include_pad"] = 1
    return True


def _own_pads(node: gs.Node, axes: int) -> Array | None:
    """The pads of a Conv or pooling, [2, axes]; None if they depend on the size of its input."""
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("VALID", "") or (auto == "NOTSET" and not node.attrs.get("pads")):
        return np.zeros((2, axes), np.int64)
    if auto != "NOTSET" or len(node.attrs["pads"]) != 2 * axes:
        return None
    return np.array(node.attrs["pads"], np.int64).reshape(2, axes)


def _pools_alike(node: gs.Node, pad: gs.Node, own: Array, total: Array, value: float) -> bool:
    """True if a pooling gives the same where it pads itself: each window then has an element that is none of the padding."""
    kernel = np.array(node.attrs.get("kernel_shape", ()), np.int64)
    if len(kernel) != total.shape[1] or (total >= kernel).any() or node.attrs.get("ceil_mode", 0) or len(node.outputs) > 1:
        return False
    if any(n != 1 for n in node.attrs.get("dilations") or ()):
        return False
    if node.op == "AveragePool":  # pads of its own that it does not count would be counted now
        return value == 0 and (not own.any() or bool(node.attrs.get("count_include_pad", 0)))
    kind = kind_of(pad.inputs[0])
    if kind is None or kind.kind not in "fu":
        return False
    if kind.kind == "u" or (value == 0 and never_negative(pad.inputs[0])):
        return value == 0
    return bool(value == -np.inf or value <= np.finfo(kind).min)


@rewrite_of("Pad")
def join_pads(graph: Graph, node: gs.Node) -> bool:
    """Two Pads in a row with the same value are one."""
    first = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if (
        first is None
        or first.op != "Pad"
        or first.domain
        or len(node.inputs[0].outputs) > 1
        or is_output(graph, node.inputs[0])
    ):
        return False
    one, other, value = amounts(first), amounts(node), constant_of(node)
    if one is None or other is None or value is None or constant_of(first) != value or one.shape != other.shape:
        return False
    if (one < 0).any() or (other < 0).any() or isinstance(first.inputs[0], gs.Constant):
        return False
    pads = graph.add_constant(f"{node.name}_pads", (one + other).reshape(-1))
    node.inputs = [first.inputs[0], pads, *node.inputs[2:3]]
    return True


PADS: tuple[Rewrite, ...] = (join_pads, absorb_pad)
