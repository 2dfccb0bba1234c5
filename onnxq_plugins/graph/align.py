"""Channels added to fill blocks: integer kernels of depthwise convolutions run several times slower where their channels are
no multiple of 16.

A group of channels that move together (`channel_groups`) gets more of them: what writes them has weights and biases of zero,
what reads them weights of zero. Between, they hold f(0), which nothing sees. Exact, to the last bit but for the order of
sums."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.elements import ChannelGroup, Member
from onnxq_plugins.graph.groups import channel_groups
from onnxq_plugins.graph.layer import BatchNorm, Layer

_ALONE = frozenset(  # channels that they compute depend on no others
    {
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Swish",
        "Gelu",
        "Tanh",
        "Add",
        "Sub",
        "Mul",
    }
    | {"Max", "Min", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Sum"}
)


def alignable(graph: Graph, block: int) -> list[ChannelGroup]:
    """Groups with a depthwise convolution whose channels do not fill blocks, and that may have more."""
    odd = {y.weight for y in graph.layers if y.op == "Conv" and y.kind == "depthwise" and y.channels % block}
    groups = [g for g in channel_groups(graph, "permute") if odd & {m.tensor for m in g.weights}]
    return [group for group in groups if _free(graph, group)]


def align(graph: Graph, group: ChannelGroup, block: int) -> None:
    """Fill the last block of a group of `alignable` with channels that are zero."""
    more = -group.size % block
    layers = {y.weight: y for y in graph.layers}
    for member in group.weights:
        values = graph.constant(member.tensor)
        widths = [(0, more * (axis == member.axis)) for axis in range(values.ndim)]
        layer = layers.get(member.tensor)
        if layer is not None and layer.groups > 1:
            node = graph.producer(layer.output)
            assert node is not None
            node.attrs["group"] = group.size + more
        graph.set_constant(member.tensor, np.pad(values, widths))
    for member in group.members:
        if member.constant:
            continue
        tensor = graph.tensor(member.tensor)
        if tensor.shape is not None:
            tensor.shape = [group.size + more if axis == member.axis else n for axis, n in enumerate(tensor.shape)]
        norm = graph.batchnorms.get(member.tensor)
        if norm is not None:
            graph.batchnorms[member.tensor] = BatchNorm(*(np.pad(getattr(norm, f.name), (0, more)) for f in fields(norm)))
    graph.touched.update(group.tensors)


def _free(graph: Graph, group: ChannelGroup) -> bool:
    """True if a group is whole axes of tensors, between operators that compute channels apart and layers."""
    layers = {y.name: y for y in graph.layers}
    names = set(group.tensors)
    nodes = [n for n in graph.nodes if names & {t.name for t in (*n.inputs, *n.outputs)}]
    return all(_whole(graph, m, group.size) for m in group.members) and all(
        _dense_or_depthwise(layers[n.name]) if n.name in layers else n.op in _ALONE and not n.domain for n in nodes
    )


def _dense_or_depthwise(layer: Layer) -> bool:
    return layer.op == "Conv" and (layer.groups == 1 or (layer.kind == "depthwise" and layer.groups == layer.channels))


def _whole(graph: Graph, member: Member, size: int) -> bool:
    """True if a group's channels are all of an axis, in any order."""
    return not member.rows and member.index.shape[1] == 1 and _length(graph, member) == size


def _length(graph: Graph, member: Member) -> int | None:
    if member.constant:
        return int(graph.constant(member.tensor).shape[member.axis])
    shape = graph.tensor(member.tensor).shape
    return shape[member.axis] if shape is not None and isinstance(shape[member.axis], int) else None
