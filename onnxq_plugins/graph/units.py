"""Axes of size 1 that operators add, drop or move: beside Transposes and functions, which need not see them.

Layers over time are written as layers of images of one row, and images of one channel are turned by a Reshape: what stands
between then keeps Transposes from joining, and biases and functions from the layers they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.redundant import RESHAPES, Sizes
from onnxq_plugins.graph.rewriting import Rewrite, axes_of, dims, rank_of, read_alone, rewrite_of
from onnxq_plugins.graph.transposes import perm_of, transpose_of
from onnxq_plugins.graph.turning import ELEMENTWISE, UNARY

_REACH = 8  # functions between a layer and the operator that drops axes


def moved_units(source: Sizes | None, result: Sizes | None) -> list[int] | None:
    """The order of axes by which a Transpose does what a Reshape between two shapes does, where that moves axes of size 1
    alone; None if it does something else."""
    if source is None or result is None or len(source) != len(result):
        return None
    wide = [[axis for axis, n in enumerate(shape) if n != 1] for shape in (source, result)]
    if len(wide[0]) != len(wide[1]) or not _alike([source[a] for a in wide[0]], [result[a] for a in wide[1]]):
        return None
    units = iter([axis for axis, n in enumerate(source) if n == 1])
    at = dict(zip(wide[1], wide[0], strict=True))
    return [at[axis] if axis in at else next(units) for axis in range(len(result))]


def _alike(one: Sizes, other: Sizes) -> bool:
    """True if sizes are equal; one of them may be unknown, since there are as many elements."""
    unlike = [(a, b) for a, b in zip(one, other, strict=True) if a != b or a is None]
    return len(unlike) <= 1 and not any(isinstance(a, int) and isinstance(b, int) for a, b in unlike)


def dropped_units(long: Sizes | None, short: Sizes | None) -> list[int] | None:
    """The axes of size 1 which one shape has beyond another; None if there is another difference."""
    if long is None or short is None or len(long) <= len(short):
        return None
    dropped, kept = list[int](), list[int | str | None]()
    for axis, n in enumerate(long):
        more = len(short) - len(kept) < len(long) - axis  # than are needed
        if n == 1 and more and (len(kept) == len(short) or short[len(kept)] != 1):
            dropped.append(axis)
        else:
            kept.append(n)
    return dropped if len(kept) == len(short) and _alike(kept, short) else None


def _units(node: gs.Node, adds: bool) -> list[int] | None:
    """The axes of size 1 that an operator adds to its output, or drops from its input, and does nothing else."""
    if node.domain or node.op not in RESHAPES or isinstance(node.inputs[0], gs.Constant):
        return None
    long, short = (node.outputs[0], node.inputs[0]) if adds else (node.inputs[0], node.outputs[0])
    if node.op == ("Unsqueeze" if adds else "Squeeze"):
        rank = rank_of(short) if adds else rank_of(long)
        if not adds and len(node.inputs) < 2 and "axes" not in node.attrs:
            return None
        named = axes_of(node, None if rank is None else rank + len(np.asarray(_named(node))) if adds else rank)
        return named if rank is not None else None
    return dropped_units(dims(long), dims(short))


def _named(node: gs.Node) -> Sequence[int]:
    if "axes" in node.attrs:
        return list(node.attrs["axes"])
    constant = node.inputs[1] if len(node.inputs) > 1 else None
    return constant.values.reshape(-1).tolist() if isinstance(constant, gs.Constant) else []


@rewrite_of("Transpose", "Reshape")
def join_moved_units(graph: Graph, node: gs.Node) -> bool:
    """A Transpose and a Reshape that moves axes of size 1 are one Transpose."""
    x = node.inputs[0]
    if node.op == "Reshape":
        order, before = moved_units(dims(x), dims(node.outputs[0])), transpose_of(x)
        if order is None or before is None:
            return False
        perm = [before[1][axis] for axis in order]
        node.op, node.attrs = "Transpose", {"perm": perm}
        node.inputs = [before[0].inputs[0]]
        return True
    first = x.inputs[0] if x.inputs else None
    if first is None or first.op != "Reshape" or first.domain or isinstance(first.inputs[0], gs.Constant):
        return False
    moved, later = moved_units(dims(first.inputs[0]), dims(x)), perm_of(node)
    if moved is None or later is None:
        return False
    node.inputs[0] = first.inputs[0]
    node.attrs["perm"] = [moved[axis] for axis in later]
    return True


@rewrite_of("Squeeze", "Reshape", "Flatten")
def drop_units_first(graph: Graph, node: gs.Node) -> bool:
    """Squeeze(Transpose(x)) is Transpose(Squeeze(x)): of fewer axes, and beside what else there is without them."""
    before, dropped = transpose_of(node.inputs[0]), _units(node, adds=False)
    if before is None or not dropped or not read_alone(graph, node.inputs[0], node):
        return False
    transpose, perm = before
    x, output = transpose.inputs[0], node.outputs[0]
    shape = dims(x)
    if shape is None:
        return False
    gone = sorted(perm[axis] for axis in dropped)
    left = [axis for axis in range(len(perm)) if axis not in gone]
    squeezed = graph.add_variable(f"{x.name}_squeezed", like=x, shape=[shape[axis] for axis in left])
    axes = graph.add_constant(f"{node.name}_axes", np.array(gone, np.int64))
    graph.add_node("Squeeze", transpose.name, [x, axes], [squeezed], before=node)
    transpose.name = f"{transpose.name}_was"
    node.op, node.attrs = "Transpose", {"perm": [left.index(a) for i, a in enumerate(perm) if i not in dropped]}
    node.inputs = [squeezed]
    if output.shape is None:
        output.shape = [shape[a] for i, a in enumerate(perm) if i not in dropped]
    return True


@rewrite_of("Transpose")
def add_units_last(graph: Graph, node: gs.Node) -> bool:
    """Transpose(Unsqueeze(x)) is Unsqueeze(Transpose(x))."""
    before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    added, perm = _units(before, adds=True) if before is not None else None, perm_of(node)
    if before is None or not added or perm is None or not read_alone(graph, node.inputs[0], node):
        return False
    x = before.inputs[0]
    shape = dims(x)
    old = [axis for axis in range(len(perm)) if axis not in added]  # of the longer shape, in order
    if shape is None or len(old) != len(shape):
        return False
    order = [old.index(a) for a in perm if a not in added]
    turned = graph.add_variable(f"{x.name}_turned", like=x, shape=[shape[a] for a in order])
    graph.add_node("Transpose", before.name, [x], [turned], before=node, perm=order)
    before.name = f"{before.name}_was"
    axes = graph.add_constant(f"{node.name}_axes", np.array([i for i, a in enumerate(perm) if a in added], np.int64))
    node.op, node.attrs = "Unsqueeze", {}
    node.inputs = [turned, axes]
    return True


@rewrite_of(*(UNARY | ELEMENTWISE))
def drop_units_later(graph: Graph, node: gs.Node) -> bool:
    """f(Squeeze(x)) is Squeeze(f(x)), where x is a layer's output, perhaps behind other functions."""
    parts = [t for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
    squeezes = [t.inputs[0] if t.inputs else None for t in parts]
    output, rank = node.outputs[0], rank_of(node.outputs[0])
    if not parts or rank is None or len(node.outputs) != 1 or any(not read_alone(graph, t, node) for t in parts):
        return False
    dropped = [None if s is None else _units(s, adds=False) for s in squeezes]
    if not dropped[0] or any(d != dropped[0] for d in dropped) or any(rank_of(t) != rank for t in parts):
        return False
    wide = [s.inputs[0] for s in squeezes if s is not None]
    shapes = [dims(t) for t in wide]
    axes = list(dropped[0])
    if not any(_behind_layer(t) for t in wide) or any(s is None or any(s[a] != 1 for a in axes) for s in shapes):
        return False
    constants = {at: t for at, t in enumerate(node.inputs) if isinstance(t, gs.Constant) and t.values.size > 1}
    if node.op not in UNARY:
        if any(t.values.ndim > rank for t in constants.values()):
            return False
        for at, tensor in constants.items():
            values = tensor.values.reshape((1,) * (rank - tensor.values.ndim) + tensor.values.shape)
            node.inputs[at] = graph.add_constant(f"{tensor.name}_wide", np.expand_dims(values, axes))
    for at, tensor in enumerate(node.inputs):
        for part, source in zip(parts, wide, strict=True):
            if tensor is part:
                node.inputs[at] = source
    size = dims(output)
    kept = iter(size or ())
    shape = None if size is None else [1 if axis in axes else next(kept) for axis in range(rank + len(axes))]
    result = graph.add_variable(f"{output.name}_wide", like=output, shape=shape)
    node.outputs = [result]
    at_axes = graph.add_constant(f"{node.name}_axes", np.array(axes, np.int64))
    graph.add_node("Squeeze", f"{node.name}_squeeze", [result, at_axes], [output], before=node)
    return True


def _behind_layer(tensor: gs.Tensor) -> bool:
    """True if a layer of images computes a tensor, perhaps through functions and sums with constants."""
    for _ in range(_REACH):
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or node.domain:
            return False
        if node.op in ("Conv", "ConvTranspose"):
            return True
        variables = [t for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        if node.op not in UNARY | ELEMENTWISE or not variables:
            return False
        tensor = variables[0]
    return False


UNITS: tuple[Rewrite, ...] = (join_moved_units, drop_units_first, add_units_last, drop_units_later)
