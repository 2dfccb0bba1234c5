"""Operators that treat each channel apart, and the split of a layer by output channels that goes on through them.

For such an operator f(Concat(a, b)) = Concat(f(a), f(b)): the Concat that joins the parts of a layer moves behind it, so
that the parts have tensors of their own up to the next operator that mixes channels."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import Layer
from onnxq_plugins.graph.rewrites import split_outputs
from onnxq_plugins.spec import Array

ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Elu", "Gelu", "Mish"}
)
_CHANNELWISE = frozenset({*ACTIVATIONS, "Add", "Sub", "Mul", "Div", "AveragePool", "GlobalAveragePool", "MaxPool"})


def channelwise(graph: Graph, name: str, among: Collection[str]) -> tuple[list[gs.Node], list[str]]:
    """The operators that treat each channel (axis 1) of a tensor apart, one behind the other, and the tensors, itself among
    them, that others read, in topological order.

    among   names of operators that may be taken
    """
    found, tensors = [], {name}
    for node in graph.nodes:
        activations = [t.name for t in node.inputs if not t.is_empty() and not graph.is_constant(t.name)]
        if node.name in among and activations and tensors.issuperset(activations) and _fits(graph, node):
            found.append(node)
            tensors.add(node.outputs[0].name)
    inside = {node.name for node in found}
    ends = [t for t in tensors if t in graph.outputs or any(n.name not in inside for n in graph.consumers(t))]
    return found, sorted(ends)


def _fits(graph: Graph, node: gs.Node) -> bool:
    """True if an operator treats each channel apart."""
    shapes = [t.shape for t in (node.inputs[0], node.outputs[0])]
    if node.domain or len(node.outputs) != 1 or any(s is None or len(s) < 3 for s in shapes) or shapes[0][1] != shapes[1][1]:
        return False
    if node.op == "Conv":
        return (
            isinstance(node.inputs[1], gs.Constant) and node.attrs.get("group", 1) == node.inputs[1].shape[0] == shapes[0][1]
        )
    constants = [t for t in node.inputs if isinstance(t, gs.Constant)]
    return node.op in _CHANNELWISE and all(_along(t.values, shapes[0]) is not None for t in constants)


def _along(values: Array, shape: Sequence[int | str | None]) -> int | None:
    """The axis of a constant that holds the channels, -1 if it has the same values for all; None if neither is true."""
    axis = values.ndim - len(shape) + 1
    if values.size == 1 or axis < 0 or values.shape[axis] == 1:
        return -1
    return axis if values.shape[axis] == shape[1] and values.size == shape[1] else None


def split_through(
    graph: Graph, layer: Layer, parts: Sequence[Array], through: Sequence[gs.Node]
) -> tuple[list[Layer], dict[str, list[str]]]:
    """`split_outputs`, and the split of operators behind the layer that treat each channel apart. Returns the new layers,
    with those that replace depthwise ones, and the names of the parts of each tensor.

    through   what `channelwise` finds behind `Layer.result`

    What other operators read is joined by a Concat. Where parts are not in order and all that read it are dense layers,
    their weights are reordered; elsewhere a Gather restores the order.
    """
    parts = [np.asarray(part) for part in parts]
    made = split_outputs(graph, layer, parts)
    pieces = {layer.result: [graph.tensor(y.result) for y in made]}
    names = [y.name for y in made]
    for node in through:
        output = node.outputs[0]
        written = []
        for k, part in enumerate(parts):
            name, attrs = f"{node.name}_part{k + 1}", dict(node.attrs)
            if node.op == "Conv":
                attrs["group"] = len(part)
                names.append(name)
            inputs = [pieces[t.name][k] if t.name in pieces else _piece(graph, node, t, part, name) for t in node.inputs]
            shape = [len(part) if a == 1 else n for a, n in enumerate(output.shape)]
            written.append(graph.add_variable(f"{output.name}_part{k + 1}", like=output, shape=shape))
            graph.add_node(node.op, name, inputs, [written[-1]], before=node, **attrs)
        pieces[output.name] = written
    inside, joined = {node.name for node in through}, np.concatenate(parts)
    others = {name: any(n.name not in inside for n in graph.consumers(name)) for name in pieces}
    for node in through:
        node.inputs.clear()
    for node in through:
        name = node.outputs[0].name
        if others[name] or name in graph.outputs:
            _join(graph, graph.tensor(name), pieces[name], joined, node)
    graph.tidy()
    layers = {y.name: y for y in graph.layers}
    return [layers[name] for name in names], {name: [t.name for t in written] for name, written in pieces.items()}


def _piece(graph: Graph, node: gs.Node, tensor: gs.Tensor, part: Array, name: str) -> gs.Tensor:
    """The part of a constant for some channels."""
    if not isinstance(tensor, gs.Constant):
        return tensor
    axis = 0 if node.op == "Conv" else _along(tensor.values, node.outputs[0].shape)
    if axis == -1:
        return tensor
    assert axis is not None
    graph.touched.add(tensor.name)
    return graph.add_constant(f"{tensor.name}_{name}", np.take(tensor.values, part, axis=axis))


def _join(graph: Graph, tensor: gs.Tensor, written: Sequence[gs.Tensor], joined: Array, maker: gs.Node) -> None:
    """Write a tensor as the Concat of its parts, which hold the channels `joined`."""
    maker.outputs.clear()
    if (np.diff(joined) > 0).all():
        graph.add_node("Concat", f"{tensor.name}_concat", list(written), [tensor], before=maker, axis=1)
        return
    readers = {node.name for node in graph.consumers(tensor.name)}
    layers = [y for y in graph.layers if y.name in readers and y.input == tensor.name and y.op == "Conv" and y.groups == 1]
    if len(layers) == len(readers) and tensor.name not in graph.outputs:
        for y in layers:
            graph.set_constant(y.weight, np.take(graph.constant(y.weight), joined, axis=y.in_axis))
        graph.add_node("Concat", f"{tensor.name}_concat", list(written), [tensor], before=maker, axis=1)
        return
    whole = graph.add_variable(f"{tensor.name}_parts", like=tensor)
    graph.add_node("Concat", f"{tensor.name}_concat", list(written), [whole], before=maker, axis=1)
    order = graph.add_constant(f"{tensor.name}_order", np.argsort(joined))
    graph.add_node("Gather", f"{tensor.name}_gather", [whole, order], [tensor], before=maker, axis=1)
