"""The three exact rewrites that carry every graph algorithm: permute, rescale, replace a layer by a sum of layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph, Layer
from onnxq_plugins.graph.elements import ChannelGroup
from onnxq_plugins.spec import Array


def permute(graph: Graph, group: ChannelGroup, order: Sequence[int] | Array) -> None:
    """New channel c of the group is old channel order[c]. The float function stays; ValueError if `order` is no
    permutation or the group is of kind ``rescale``."""
    order = np.asarray(order)
    if group.kind != "permute" or not np.array_equal(np.sort(order), np.arange(group.size)):
        raise ValueError(f"order must be a permutation of {group.size} channels of a group of kind 'permute'")
    for member in group.weights:
        values = graph.constant(member.tensor).copy()
        part = values[slice(*member.rows)] if member.rows else values
        moved = np.moveaxis(part, member.axis, 0)
        moved[member.index.ravel()] = moved[member.index[order].ravel()].copy()
        graph.set_constant(member.tensor, values)
    graph.touched.update(group.tensors)


def rescale(graph: Graph, group: ChannelGroup, factors: Sequence[float] | Array) -> None:
    """Multiply channel c of the group's activations by factors[c] > 0, and undo it in their consumers."""
    factors = np.asarray(factors, np.float64)
    if group.kind != "rescale" or factors.shape != (group.size,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"factors must be {group.size} positive finite numbers for a group of kind 'rescale'")
    for member in group.weights:
        if member.role == "fixed":
            continue
        f = factors if member.role == "output" else 1 / factors
        values = graph.constant(member.tensor).copy()
        part = values[slice(*member.rows)] if member.rows else values
        moved = np.moveaxis(part, member.axis, 0)
        at = member.index.ravel()
        spread = np.repeat(f, member.index.shape[1]).reshape(-1, *(1,) * (moved.ndim - 1))
        moved[at] = (moved[at].astype(np.float64) * spread).astype(np.float32)
        graph.set_constant(member.tensor, values)
    graph.touched.update(group.tensors)


def replace_with_sum(graph: Graph, layer: Layer, parts: Sequence[Array]) -> list[Layer]:
    """Layer W x + b becomes W_1 x + b + W_2 x + ... with sum(W_k) = W; returns the new layers.

    parts   arrays in the weight's shape; ValueError if their sum differs from the weight by more than 1e-5 relative
    """
    weight = graph.constant(layer.weight)
    total = np.sum(np.stack([np.asarray(p, np.float64) for p in parts]), axis=0) if len(parts) else weight * np.inf
    if total.shape != weight.shape or not np.allclose(total, weight, rtol=0, atol=1e-5 * (np.abs(weight).max() or 1.0)):
        raise ValueError(f"layer '{layer.name}': the parts do not add up to its weight")
    node = graph.producer(layer.output)
    assert node is not None
    output, names = node.outputs[0], []
    node.outputs.clear()
    total_so_far: gs.Tensor | None = None
    for k, part in enumerate(parts):
        name = f"{layer.name}_part{k + 1}"
        inputs = [node.inputs[0], graph.add_constant(f"{layer.weight}_part{k + 1}", np.asarray(part, np.float32))]
        if k == 0 and layer.bias is not None:
            inputs.append(node.inputs[2])
        y = graph.add_variable(f"{name}_out", like=output)
        graph.add_node(layer.op, name, inputs, [y], before=node, **dict(node.attrs))
        names.append(name)
        if total_so_far is not None:
            last = k == len(parts) - 1
            joined = output if last else graph.add_variable(f"{name}_sum", like=output)
            graph.add_node("Add", f"{layer.name}_sum{k}", [total_so_far, y], [joined], before=node)
            y = joined
        total_so_far = y
    if len(parts) == 1:
        graph.add_node("Identity", f"{layer.name}_sum", [total_so_far], [output], before=node)
    graph.tidy()
    graph.touched.update([layer.weight, output.name])
    return [graph.layer(name) for name in names]
