"""Shape arithmetic: what operators compute from the sizes of tensors is constant, or a Reshape that needs no sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.rewriting import Rewrite, dims, is_output, kind_of, left_out, rewrite_of, values_of

Size = int | str | None
_MOST = 64  # numbers in a tensor that is followed
_DEPTH = 40  # operators from a size to its use
_ANONYMOUS = {"", "?", "-1", "none", "unk", "unknown", "dynamic", "any", "dim", "*"}  # names that exporters give any axis


def refresh_shapes(graph: Graph) -> None:
    """Infer shapes anew, in place: from the inputs alone, so that axes of equal symbols have equal sizes, which is not so
    for what exporters say of outputs; sizes that only they know stay."""
    model = graph.model({})
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param.lower() in _ANONYMOUS:
                size.Clear()
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # of several types: operators that onnx does not know
        inferred = onnx.ModelProto()
    fresh = {v.name: v.type.tensor_type for g in [inferred.graph] for v in (*g.value_info, *g.output)}
    fresh |= {v.name: v.type.tensor_type for v in model.graph.input}
    certain = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    for name, tensor in graph._tensors.items():
        if isinstance(tensor, gs.Constant):
            continue
        kind = fresh.get(name)
        found = [_size(d) for d in kind.shape.dim] if kind is not None and kind.HasField("shape") else None
        old = dims(tensor)
        if old is None or (found is not None and len(found) != len(old)):
            tensor.shape = found
        else:
            pairs = zip(found or [None] * len(old), old, strict=True)
            tensor.shape = [b if isinstance(b, int) and not isinstance(a, int) and a not in certain else a for a, b in pairs]
        if tensor.dtype is None and kind is not None and kind.elem_type:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)


def _size(dim: onnx.TensorShapeProto.Dimension) -> Size:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


# ---- numbers that are known before the model runs -------------------------------------------------------------------------


def sizes_in(tensor: gs.Tensor, depth: int = _DEPTH) -> list[Size] | None:
    """The integers that a tensor will hold, flat: numbers, symbols of sizes, or None for one that is not known. None if
    nothing is known of it."""
    if isinstance(tensor, gs.Constant):
        values = tensor.values
        return values.reshape(-1).tolist() if values.dtype.kind in "iu" and values.size <= _MOST else None
    if not tensor.inputs or depth == 0 or tensor.inputs[0].domain:
        return None
    node = tensor.inputs[0]
    follow = _FOLLOWED.get(node.op)
    found = follow(node, depth - 1) if follow is not None else None
    return found if found is None or len(found) <= _MOST else None


def _shape(node: gs.Node, depth: int) -> list[Size] | None:
    shape = dims(node.inputs[0])
    return None if shape is None else shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]


def _same(node: gs.Node, depth: int) -> list[Size] | None:
    return sizes_in(node.inputs[0], depth)


def _cast(node: gs.Node, depth: int) -> list[Size] | None:
    return sizes_in(node.inputs[0], depth) if node.attrs.get("to") in (6, 7) else None  # to int32 and int64


def _gather(node: gs.Node, depth: int) -> list[Size] | None:
    found, at = sizes_in(node.inputs[0], depth), values_of(node, 1)
    shape = dims(node.inputs[0])
    if found is None or at is None or shape is None or len(shape) != 1:
        return None
    places = at.reshape(-1).tolist()
    return [found[i] for i in places] if all(-len(found) <= i < len(found) for i in places) else None


def _slice(node: gs.Node, depth: int) -> list[Size] | None:
    found, shape = sizes_in(node.inputs[0], depth), dims(node.inputs[0])
    starts, ends, steps = (values_of(node, at) for at in (1, 2, 4))
    if found is None or starts is None or ends is None or shape is None or len(shape) != 1 or starts.size != 1:
        return None
    if not left_out(node, 4) and (steps is None or steps.size != 1):
        return None
    step = 1 if steps is None else int(steps.item())
    return found[int(starts.item()) : int(ends.item()) : step] if step > 0 else None


def _concat(node: gs.Node, depth: int) -> list[Size] | None:
    parts = [sizes_in(t, depth) for t in node.inputs]
    if any(p is None for p in parts) or any(len(dims(t) or (0, 0)) != 1 for t in node.inputs):
        return None
    return [n for part in parts for n in part or ()]


def _binary(function: Callable[[int, int], int]) -> Callable[[gs.Node, int], list[Size] | None]:
    def follow(node: gs.Node, depth: int) -> list[Size] | None:
        one, other = (sizes_in(t, depth) for t in node.inputs[:2])
        if one is None or other is None or 1 not in (len(one), len(other), abs(len(one) - len(other)) + 1):
            return None
        count = max(len(one), len(other)) if one and other else 0
        pairs = zip(one * (count // len(one)), other * (count // len(other)), strict=True) if count else ()
        return [_of_two(node.op, function, a, b) for a, b in pairs]

    return follow


def _of_two(op: str, function: Callable[[int, int], int], a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return function(a, b) if op != "Div" or b else None
    if op in ("Mul", "Div") and b == 1:
        return a
    if op == "Mul" and a == 1:
        return b
    return a if op in ("Add", "Sub") and b == 0 else b if op == "Add" and a == 0 else None


def _product(node: gs.Node, depth: int) -> list[Size] | None:
    found = sizes_in(node.inputs[0], depth)
    numbers = [n for n in found or () if isinstance(n, int)]
    return [math.prod(numbers)] if found is not None and len(numbers) == len(found) and len(node.inputs) == 1 else None


def _where(node: gs.Node, depth: int) -> list[Size] | None:
    """Of Where(Equal(shape, -1), ones, shape), which torch writes in front of Expand: no size is -1."""
    condition, one, other = node.inputs
    equal = condition.inputs[0] if condition.inputs else None
    if equal is None or equal.op != "Equal":
        return None
    sides = [sizes_in(t, depth) for t in (*equal.inputs, one, other)]
    length = max((len(s) for s in sides if s is not None), default=0)
    if any(s is None or len(s) not in (1, length) for s in sides):
        return None
    wide = [s * length if len(s or ()) == 1 else s for s in sides if s is not None]
    found: list[Size] = []
    for a, b, yes, no in zip(*wide, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            found.append(yes if a == b else no)
        else:
            number, symbol = (a, b) if isinstance(a, int) else (b, a)
            never = isinstance(number, int) and number < 0 and isinstance(symbol, str)
            found.append(no if never else yes if yes == no else None)
    return found


_FOLLOWED: dict[str, Callable[[gs.Node, int], list[Size] | None]] = {
    "Shape": _shape,
    "Identity": _same,
    "Unsqueeze": _same,
    "Squeeze": _same,
    "Reshape": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _binary(lambda a, b: math.trunc(a / b) if abs(a) < 2**50 else a // b),
    "ReduceProd": _product,
    "Where": _where,
}


@rewrite_of(*_FOLLOWED)
def fold_sizes(graph: Graph, node: gs.Node) -> bool:
    """Integers that follow from the sizes of tensors are a constant where these sizes are known."""
    output, sizes = node.outputs[0], dims(node.outputs[0])
    shape = [n for n in sizes or () if isinstance(n, int)]
    if is_output(graph, output) or sizes is None or len(shape) != len(sizes):
        return False
    kind = kind_of(output)
    if kind is None or kind not in (np.dtype(np.int64), np.dtype(np.int32)):
        return False
    found = sizes_in(output)
    if found is None or not all(isinstance(n, int) for n in found) or math.prod(shape) != len(found):
        return False
    values = np.array(found, np.int64).astype(kind).reshape(shape)
    graph.bypass(node, graph.add_constant(f"{output.name}_sizes", values))
    return True


@rewrite_of("Reshape")
def fold_target(graph: Graph, node: gs.Node) -> bool:
    """The target of a Reshape that is computed from sizes is a constant where these are those of the axes that it keeps, or
    all but one are known."""
    x, shape = node.inputs[0], node.inputs[1]
    if isinstance(shape, gs.Constant) or isinstance(x, gs.Constant) or node.attrs.get("allowzero", 0):
        return False
    found, source = sizes_in(shape), dims(x)
    if found is None or source is None:
        return False
    told: list[int] = []
    for axis, n in enumerate(found):
        if isinstance(n, int):
            told.append(n)
        elif isinstance(n, str) and axis < len(source) and source[axis] == n:
            told.append(0)
        else:
            told.append(-1)
    if told.count(-1) > 1 or any(n == 0 and axis >= len(source) for axis, n in enumerate(told)):
        return False
    node.inputs[1] = graph.add_constant(f"{node.name}_shape", np.array(told, np.int64))
    return True


@rewrite_of("Expand")
def drop_expand(graph: Graph, node: gs.Node) -> bool:
    """Expand to a shape that is computed from the sizes its input has computes nothing."""
    x, output = node.inputs[0], node.outputs[0]
    found, shape = sizes_in(node.inputs[1]), dims(x)
    if found is None or shape is None or len(found) > len(shape) or isinstance(x, gs.Constant) or is_output(graph, output):
        return False
    if not all(n == 1 or (n is not None and n == m) for n, m in zip(found[::-1], shape[::-1], strict=False)):
        return False
    graph.bypass(node, x)
    return True


SHAPES: tuple[Rewrite, ...] = (fold_target, drop_expand, fold_sizes)
