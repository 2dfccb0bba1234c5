"""A network as a sum of networks side by side, each with a part of every weight, for expansion by ensembles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import SHAPE_OPS, Graph
from onnxq_plugins.spec import Array

# f(a + b) = f(a) + f(b) in the first input, or nearly so (_LOOSE), whatever the constants in the other inputs.
_ADDITIVE = SHAPE_OPS | {"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "Neg"}
_LOOSE = frozenset({"Relu", "LeakyRelu", "PRelu", "Clip", "GlobalMaxPool", "ReduceMax"})
_SUMS = frozenset({"Add", "Sub", "Sum"})
_TAIL = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})  # at the end of a network they stay behind the sum


@dataclass(frozen=True)
class _Cut:
    """The part of a network that is repeated.

    nodes   operators that every network has a copy of, in topological order
    split   names of the tensors they write
    ends    names of the tensors that become sums over the networks
    tail    names of the operators behind the sums
    """

    nodes: list[gs.Node]
    split: set[str]
    ends: list[str]
    tail: set[str]


def side_by_side(graph: Graph, parts: Mapping[str, Sequence[Array]]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The network becomes the sum of several that read the same input. This changes its function: a Relu of a sum is not the
    sum of Relus, and products of one network's weights with another's activations are lost. The function stays if only one
    network has weights other than 0, and where a path has one named layer and no Relu behind it.

    parts   name of a layer -> its weight in each network, all of the weight's shape. Other layers have the same weight in
            every network; what does not depend on a named layer is computed once

    The first network keeps its names; it alone has biases and other addends. Returns, for each of the other networks, a
    table from tensors of the first (weights included) to its own, and a table from the tensors that are sums now to the
    outputs of the first network. Raises ValueError, naming the operator, if an operator does not allow it (`unfit`).
    """
    if problem := unfit(graph, list(parts)):
        raise ValueError(problem)
    cut, layers = _cut(graph, list(parts)), {y.name: y for y in graph.layers}
    count = len(next(iter(parts.values())))
    tables: list[dict[str, str]] = []
    for m in range(1, count):
        copies: dict[str, gs.Tensor] = {}
        for node in cut.nodes:
            inputs = [copies.get(t.name, t) for t in node.inputs]
            if node.op in _SUMS:
                own = [t for t, old in zip(inputs, node.inputs, strict=True) if old.name in cut.split]
                negative = node.op == "Sub" and len(own) == 1 and node.inputs[0].name not in cut.split
                if len(own) == 1 and not negative:  # other addends belong to the first network
                    copies[node.outputs[0].name] = own[0]
                    continue
                inputs = own
            op = "Neg" if node.op == "Sub" and len(inputs) == 1 else node.op
            if node.name in layers:
                layer = layers[node.name]
                weight = parts[node.name][m] if node.name in parts else graph.constant(layer.weight).copy()
                copies[layer.weight] = graph.add_constant(f"{layer.weight}_net{m + 1}", np.asarray(weight, np.float32))
                inputs = [inputs[0], copies[layer.weight]]
            outputs = [graph.add_variable(f"{t.name}_net{m + 1}", like=t) for t in node.outputs]
            graph.add_node(op, f"{node.name}_net{m + 1}", inputs, outputs, **dict(node.attrs))
            copies |= {old.name: new for old, new in zip(node.outputs, outputs, strict=True)}
        tables.append({old: str(new.name) for old, new in copies.items()})
    firsts = {end: _summed(graph, end, [graph.tensor(table[end]) for table in tables], cut.tail) for end in cut.ends}
    for name, weights in parts.items():
        graph.set_constant(layers[name].weight, np.asarray(weights[0], np.float32))
    for name in cut.split:
        graph.batchnorms.pop(name, None)
    graph.tidy()
    graph.touched.update(cut.split | {y.weight for y in graph.layers})
    return tables, firsts


def unfit(graph: Graph, names: Sequence[str]) -> str:
    """Why a network with parts of these layers cannot be a sum of networks: the first operator that prevents it; "" if it
    can."""
    bodies = next((node for node in graph.nodes if graph.has_body(node)), None)
    if bodies is not None:
        return f"{bodies.op} '{bodies.name}' has a body of its own"
    cut, layers = _cut(graph, names), {y.name for y in graph.layers}
    for node in cut.nodes:
        own = [t.name in cut.split for t in node.inputs]
        what = f"{node.op} '{node.name}'"
        if node.name in layers:
            continue
        if node.op in _SUMS:
            operand = next(t for t, split in zip(node.inputs, own, strict=True) if split)
            if not all(own) and (operand.shape is None or operand.shape != node.outputs[0].shape):
                return f"{what} may broadcast its operand to another shape"
        elif node.op == "Concat":
            if not all(own):
                return f"{what} joins outputs of named layers with other tensors"
        elif node.op in ("Mul", "MatMul") or (node.op == "Div" and own[0]):
            if sum(own) != 1:
                return f"{what} is a product of two activations" if node.op != "Div" else f"{what} divides by an activation"
        elif node.op not in _ADDITIVE | _LOOSE or any(own[1:]):
            return f"{what} of a sum is not the sum of {node.op}s"
        elif node.op == "Clip" and not _holds_zero(node):
            return f"{what} does not map 0 to 0"
        elif node.op in SHAPE_OPS and node.op != "Resize" and not graph.is_shape_only(node):
            return f"{what} does more than move values"
    return ""


def _cut(graph: Graph, names: Sequence[str]) -> _Cut:
    tail: set[str] = set()
    ends = []
    for name in graph.outputs:
        node = graph.producer(name)
        while (
            node is not None
            and node.op in _TAIL
            and len(graph.consumers(node.inputs[0].name)) == 1
            and (node.inputs[0].name not in graph.outputs)
        ):
            tail.add(str(node.name))
            name = node.inputs[0].name
            node = graph.producer(name)
        ends.append(name)
    nodes, split = [], set[str]()
    for node in graph.nodes:
        # a shape is the same in every network
        if node.name in tail or node.op == "Shape" or not (node.name in names or any(t.name in split for t in node.inputs)):
            continue
        nodes.append(node)
        split |= {t.name for t in node.outputs}
    return _Cut(nodes, split, [name for name in dict.fromkeys(ends) if name in split], tail)


def _summed(graph: Graph, end: str, others: Sequence[gs.Tensor], tail: set[str]) -> str:
    """Replace an output of the first network by the sum over all networks; returns the new name of its own part, which its
    other operators go on reading."""
    whole, node = graph.tensor(end), graph.producer(end)
    assert node is not None
    readers = [n for n in graph.consumers(end) if n.name not in tail]
    part = graph.add_variable(f"{end}_net1", like=whole)
    node.outputs[next(i for i, t in enumerate(node.outputs) if t is whole)] = part
    for reader in readers:
        for i, tensor in enumerate(reader.inputs):
            if tensor is whole:
                reader.inputs[i] = part
    total = part
    for k, other in enumerate(others):
        joined = whole if k == len(others) - 1 else graph.add_variable(f"{end}_sum{k + 1}", like=whole)
        graph.add_node("Add", f"{node.name}_ensemble{k + 1}", [total, other], [joined])
        total = joined
    return str(part.name)


def _holds_zero(node: gs.Node) -> bool:
    """True if a Clip has constant bounds with 0 between them, or none."""
    bounds = [t for t in node.inputs[1:] if not t.is_empty()]
    return all(
        isinstance(t, gs.Constant) and float(t.values.item()) * (1 if t is node.inputs[1] else -1) <= 0 for t in bounds
    )
