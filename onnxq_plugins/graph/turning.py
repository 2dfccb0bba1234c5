"""Operators that compute the same in another order of axes: which do, and how they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.rewriting import axes_of, left_out, rank_of, values_of

Perm = tuple[int, ...]  # as of a Transpose: axis i of its output is axis perm[i] of its input

UNARY = {
    *(
        "Relu",
        "LeakyRelu",
        "Sigmoid",
        "Tanh",
        "Elu",
        "Selu",
        "Celu",
        "Clip",
        "Neg",
        "Abs",
        "Sqrt",
        "Exp",
        "Log",
        "Erf",
        "Not",
    ),
    *(
        "Softplus",
        "Softsign",
        "HardSigmoid",
        "HardSwish",
        "Swish",
        "Gelu",
        "Mish",
        "ThresholdedRelu",
        "Reciprocal",
        "Floor",
        "Ceil",
    ),
    *("Round", "Sign", "Cast", "Identity", "Sin", "Cos", "IsNaN", "IsInf"),
}
ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Mod", "Equal", "Greater", "Less", "GreaterOrEqual"),
    *("LessOrEqual", "And", "Or", "Xor", "Where", "PRelu"),
}
_NARY = ELEMENTWISE | {"Concat"}
_REDUCE = {
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum"),
    *("ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
}
_ALONG = {"Softmax", "LogSoftmax", "Hardmax", "Split", "Gather", "Concat"}  # one axis


@dataclass(frozen=True)
class Turn:
    """What changes where an operator gets its inputs in another order of axes.

    inputs, outputs   those that are in the other order then; the others stay as they are
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def inverse(perm: Sequence[int]) -> Perm:
    return tuple(int(i) for i in np.argsort(perm))


def turned_shape(shape: Sequence[int | str | None], perm: Perm) -> list[int | str | None]:
    """The shape of x, if this is that of Transpose(x, perm)."""
    return [shape[axis] for axis in inverse(perm)]


def turn_of(node: gs.Node, perm: Perm) -> Turn | None:
    """How an operator computes the same from x as from Transpose(x, perm); None if it does not, or it is not known."""
    rank = len(perm)
    if node.domain or not node.inputs or not node.outputs:
        return None
    x, output = node.inputs[0], node.outputs[0]
    if node.op in _NARY:
        return _nary(node, rank)
    if isinstance(x, gs.Constant) or rank_of(x) != rank:
        return None
    if node.op in UNARY:
        return Turn((0,), (0,)) if len(node.outputs) == 1 else None
    if node.op in _REDUCE:
        return _reduce(node, perm)
    if node.op == "Split":
        return Turn((0,), tuple(range(len(node.outputs))))
    if node.op == "Gather":
        return Turn((0,), (0,)) if rank_of(node.inputs[1]) == 1 and rank_of(output) == rank else None
    if node.op in ("Softmax", "LogSoftmax", "Hardmax"):
        return Turn((0,), (0,))
    if node.op in ("Slice", "Pad", "Tile"):
        needed = {"Slice": (1, 2, 3, 4), "Pad": (1, 3), "Tile": (1,)}[node.op]
        known = all(left_out(node, at) or values_of(node, at) is not None for at in needed)
        return Turn((0,), (0,)) if known else None
    if node.op == "Resize":
        return _resize(node, perm)
    return None


def _nary(node: gs.Node, rank: int) -> Turn | None:
    carried = []
    for at, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant):
            if tensor.values.ndim > rank:
                return None
        elif rank_of(tensor) == rank:
            carried.append(at)
        elif rank_of(tensor) != 0 or node.op == "Concat":
            return None
    return Turn(tuple(carried), (0,)) if carried and rank_of(node.outputs[0]) == rank else None


def _reduce(node: gs.Node, perm: Perm) -> Turn | None:
    rank = len(perm)
    if node.op in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [int(node.attrs.get("axis", 0)) % rank]
    else:
        axes = axes_of(node, rank)
        if node.attrs.get("noop_with_empty_axes", 0) and "axes" not in node.attrs and left_out(node, 1):
            return None
    if axes is None:
        return None
    if node.attrs.get("keepdims", 1):
        return Turn((0,), (0,))
    kept = [perm[a] for a in range(rank) if a not in axes]
    return Turn((0,), ()) if kept == sorted(kept) else None


def _resize(node: gs.Node, perm: Perm) -> Turn | None:
    rank = len(perm)
    if not left_out(node, 1) or "axes" in node.attrs or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    at = 2 if left_out(node, 3) else 3
    values = values_of(node, at)
    if values is None or values.size != rank:
        return None
    if at == 2:
        untouched = values == 1
    else:
        shape = node.inputs[0].shape
        untouched = np.array([n == m for n, m in zip(values.tolist(), shape, strict=True)])
    outer = [i for i in range(rank) if perm[i] < 2]  # onnxruntime interpolates along the other axes
    return Turn((0,), (0,)) if all(untouched[i] for i in outer) else None


def turn(graph: Graph, node: gs.Node, perm: Perm) -> None:
    """Tell an operator that its inputs are in the other order, in place: constants and axes."""
    rank = len(perm)
    if node.op in _NARY:
        _turn_constants(graph, node, perm)
    if node.op in _ALONG:
        default = -1 if node.op in ("Softmax", "LogSoftmax", "Hardmax") else 0
        node.attrs["axis"] = perm[int(node.attrs.get("axis", default)) % rank]
    elif node.op in ("ArgMax", "ArgMin"):
        node.attrs["axis"] = perm[int(node.attrs.get("axis", 0)) % rank]
    elif node.op in _REDUCE:
        axes = [perm[a] for a in axes_of(node, rank) or ()]
        if "axes" in node.attrs:
            node.attrs["axes"] = sorted(axes)
        elif not left_out(node, 1):
            node.inputs[1] = graph.add_constant(f"{node.name}_axes", np.array(sorted(axes), np.int64))
    elif node.op == "Slice":
        starts = np.asarray(node.inputs[1].values)
        named = values_of(node, 3)
        axes = list(range(len(starts))) if named is None else [int(a) % rank for a in named.tolist()]
        while len(node.inputs) < 4:
            node.inputs.append(gs.Variable.empty())
        node.inputs[3] = graph.add_constant(f"{node.name}_axes", np.array([perm[a] for a in axes], starts.dtype))
    elif node.op == "Pad" and not left_out(node, 3):
        axes = [int(a) % rank for a in np.asarray(node.inputs[3].values).reshape(-1).tolist()]
        node.inputs[3] = graph.add_constant(f"{node.name}_axes", np.array([perm[a] for a in axes], np.int64))
    elif node.op in ("Pad", "Tile", "Resize"):
        at = (2 if left_out(node, 3) else 3) if node.op == "Resize" else 1
        values = np.asarray(node.inputs[at].values)
        by_axis = values.reshape(-1, rank)[:, list(inverse(perm))]
        node.inputs[at] = graph.add_constant(f"{node.name}_by_axis", by_axis.reshape(values.shape))


def _turn_constants(graph: Graph, node: gs.Node, perm: Perm) -> None:
    for at, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant) and tensor.values.size > 1:
            values = tensor.values.reshape((1,) * (len(perm) - tensor.values.ndim) + tensor.values.shape)
            node.inputs[at] = graph.add_constant(f"{tensor.name}_turned", values.transpose(inverse(perm)))
        elif isinstance(tensor, gs.Constant) and node.op == "Concat":
            node.inputs[at] = graph.add_constant(f"{tensor.name}_turned", tensor.values.transpose(inverse(perm)))


COSTLY: Callable[[str], bool] = {"Softmax", "LogSoftmax", "Hardmax", "ArgMax", "ArgMin"}.__contains__  # off the last axis
