"""Constants that a layer's output is added to or multiplied by become part of it; what `ahead` needs for its input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import LAYER_OPS, BatchNorm, Layer
from onnxq_plugins.graph.rewriting import (
    Rewrite,
    is_output,
    only_reader,
    rank_of,
    read_alone,
    rewrite_of,
    values_of,
)
from onnxq_plugins.spec import Array

ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def add_bias(graph: Graph, name: str, values: Array) -> None:
    """Add one value per output channel to a layer's bias, which is created if missing. Not for MatMul, which has none."""
    add_to_bias(graph, graph.layer(name), values)


def _scale_outputs(graph: Graph, layer: Layer, factor: Array) -> None:
    """Multiply the outputs of a layer, weight and bias, by one factor per channel; computed in float64."""
    weight = graph.constant(layer.weight).astype(np.float64)
    if layer.op == "ConvTranspose":  # [IC, OC / groups, ...]: the factor depends on the group too
        per_group = factor.reshape(layer.groups, -1)
        rows = weight.reshape(layer.groups, -1, *weight.shape[1:])
        weight = (rows * per_group.reshape(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))).reshape(weight.shape)
    else:
        weight = weight * factor.reshape([-1 if a == layer.out_axis else 1 for a in range(weight.ndim)])
    graph.set_constant(layer.weight, weight.astype(np.float32))
    if layer.bias is not None:
        graph.set_constant(layer.bias, (graph.constant(layer.bias).astype(np.float64) * factor).astype(np.float32))


def add_to_bias(graph: Graph, layer: Layer, values: Array) -> None:
    """`add_bias` for a layer that was looked up."""
    if layer.bias is not None:
        graph.set_constant(layer.bias, (graph.constant(layer.bias) + values).astype(np.float32))
        return
    node = graph.producer(layer.output)
    assert node is not None
    bias = graph.add_constant(f"{layer.name}_bias", values.astype(np.float32))
    while len(node.inputs) > 2:  # an empty, optional input
        node.inputs.pop()
    node.inputs.append(bias)
    graph.touched.add(bias.name)
    graph.changed()


# ---- into the layer before ------------------------------------------------------------------------------------------------


def layer_at(graph: Graph, tensor: gs.Tensor, reader: gs.Node) -> Layer | None:
    """The layer that computes a tensor which an operator alone reads; its constants are nobody else's."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op not in LAYER_OPS or only_reader(graph, tensor) is not reader:
        return None
    layer = graph._layer(node)
    return layer if layer is not None and owns(graph, layer) else None


def owns(graph: Graph, layer: Layer) -> bool:
    owned = [graph.tensor(name) for name in (layer.weight, layer.bias) if name is not None]
    return all(len(t.outputs) == 1 and not is_output(graph, t) for t in owned)


def output_rank(layer: Layer, output: gs.Tensor) -> int | None:
    """Number of axes of a layer's output; None if unknown."""
    return rank_of(output) if layer.op == "MatMul" else len(layer.shape)


def per_channel(values: Array, axis: int, rank: int, channels: int) -> Array | None:
    """A constant that is broadcast to [..., channels, ...] as one value per channel; None if it varies along another axis or
    adds axes. `axis` counts from 0."""
    if values.ndim > rank or values.dtype != np.float32:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    if any(n != 1 and (a != axis or n != channels) for a, n in enumerate(shape)):
        return None
    return np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float64)


def operands(node: gs.Node) -> tuple[gs.Tensor, Array, bool] | None:
    """The variable and the values of the constant operand of an operator, and whether the constant is the first; None unless
    it has both, in float32."""
    if len(node.inputs) != 2:
        return None
    constant_first = isinstance(node.inputs[0], gs.Constant)
    x, constant = node.inputs[::-1] if constant_first else node.inputs
    if isinstance(x, gs.Constant) or not isinstance(constant, gs.Constant) or constant.dtype != np.float32:
        return None
    return x, np.asarray(constant.values), constant_first


def as_affine(op: str, values: Array, constant_first: bool) -> tuple[Array, Array] | None:
    """Factor and summand of an operator on x and a constant; None if it is x in a denominator."""
    one, zero = np.ones_like(values), np.zeros_like(values)
    if op == "Add":
        return one, values
    if op == "Sub":
        return (-one, values) if constant_first else (one, -values)
    if op == "Mul":
        return values, zero
    if op == "Div" and not constant_first and (values != 0).all():
        return one / values, zero
    return None


def batchnorm_of(graph: Graph, node: gs.Node) -> BatchNorm | None:
    """The constants of a BatchNormalization outside training."""
    if node.attrs.get("training_mode", 0) or len(node.inputs) < 5 or any(not t.is_empty() for t in node.outputs[1:]):
        return None
    constants = [values_of(node, at) for at in range(1, 5)]
    if any(c is None or c.ndim != 1 or c.shape != constants[0].shape for c in constants):  # type: ignore[union-attr]
        return None
    gamma, beta, mean, variance = (np.asarray(c).astype(np.float64) for c in constants)
    return BatchNorm(gamma, beta, mean, variance)


def affine_of(norm: BatchNorm, node: gs.Node) -> tuple[Array, Array]:
    factor = norm.gamma / np.sqrt(norm.variance + node.attrs.get("epsilon", 1e-5))
    return factor, norm.beta - norm.mean * factor


def fits(graph: Graph, layer: Layer, factor: Array, summand: Array) -> bool:
    """True if the constants of a layer stay finite."""
    largest = float(np.abs(factor).max(initial=0))
    held = [graph.constant(name) for name in (layer.weight, layer.bias) if name is not None]
    numbers = [float(np.abs(v).max(initial=0)) * largest for v in held] + [float(np.abs(summand).max(initial=0))]
    return bool(np.isfinite(numbers).all() and max(numbers) < np.finfo(np.float32).max / 2)


@rewrite_of("BatchNormalization")
def fold_batchnorm(graph: Graph, node: gs.Node) -> bool:
    """y = gamma (Wx + b - mean) / sqrt(var + eps) + beta becomes one layer; the graph keeps the statistics."""
    norm = batchnorm_of(graph, node)
    layer = layer_at(graph, node.inputs[0], node)
    if norm is None or layer is None or norm.gamma.shape != (layer.channels,):  # else it cannot run; onnxruntime reports why
        return False
    factor, summand = affine_of(norm, node)
    if not fits(graph, layer, factor, summand):
        return False
    if layer.op == "MatMul":  # on tokens BatchNormalization is over axis 1, not over the outputs
        if rank_of(node.inputs[0]) != 2:
            return False
        _scale_outputs(graph, layer, factor)
        bias = graph.add_constant(f"{node.name}_bias", summand.astype(np.float32))
        node.op, node.attrs = "Add", {}
        node.inputs, node.outputs = [node.inputs[0], bias], [node.outputs[0]]
        return True
    _scale_outputs(graph, layer, factor)
    add_to_bias(graph, layer, summand)
    graph.batchnorms[layer.output] = norm
    graph.bypass(node, node.inputs[0])
    return True


@rewrite_of(*ARITHMETIC)
def fold_behind(graph: Graph, node: gs.Node) -> bool:
    """Constants per output channel that a layer's output is added to or multiplied by become part of its weight and bias."""
    found = operands(node)
    layer = layer_at(graph, found[0], node) if found is not None else None
    if found is None or layer is None:
        return False
    x, values, constant_first = found
    rank = output_rank(layer, x)
    if rank is None:
        return False
    vector = per_channel(values, 1 if layer.op in ("Conv", "ConvTranspose") else rank - 1, rank, layer.channels)
    affine = None if vector is None else as_affine(node.op, vector, constant_first)
    if affine is None or not fits(graph, layer, *affine):
        return False
    factor, summand = affine
    if layer.op == "MatMul" and node.op in ("Add", "Sub"):
        return False  # it has no bias
    if (factor != 1).any():
        _scale_outputs(graph, layer, factor)
    if node.op in ("Add", "Sub"):
        add_to_bias(graph, layer, summand)
    if (norm := graph.batchnorms.get(layer.output)) is not None:  # its beta is the output's mean
        graph.batchnorms[layer.output] = replace(norm, gamma=norm.gamma * factor, beta=norm.beta * factor + summand)
    graph.bypass(node, x)
    return True


@rewrite_of(*ARITHMETIC, "BatchNormalization")
def fold_behind_sum(graph: Graph, node: gs.Node) -> bool:
    """Constants behind MatMul + Add(bias) become part of the matrix and the bias; so do those of a BatchNormalization on two
    axes."""
    if node.op == "BatchNormalization":
        norm, x = batchnorm_of(graph, node), node.inputs[0]
        affine = None if norm is None or rank_of(x) != 2 else affine_of(norm, node)
    else:
        found = operands(node)
        if found is None or not rank_of(found[0]):
            return False
        x, values, constant_first = found
        n = x.shape[-1]
        vector = per_channel(values, len(x.shape) - 1, len(x.shape), n) if isinstance(n, int) else None
        affine = None if vector is None else as_affine(node.op, vector, constant_first)
    add = x.inputs[0] if x.inputs and x.inputs[0].op == "Add" and not x.inputs[0].domain else None
    if affine is None or add is None or not read_alone(graph, x, node):
        return False
    inner = operands(add)
    layer = layer_at(graph, inner[0], add) if inner is not None else None
    if inner is None or layer is None or layer.op != "MatMul" or rank_of(inner[0]) != rank_of(x):
        return False
    bias = per_channel(inner[1], len(x.shape) - 1, len(x.shape), layer.channels)
    factor, summand = affine
    if bias is None or factor.shape != (layer.channels,) or not fits(graph, layer, factor, summand):
        return False
    _scale_outputs(graph, layer, factor)
    total = graph.add_constant(f"{add.name}_sum", (bias * factor + summand).astype(np.float32))
    add.inputs = [inner[0], total]
    graph.bypass(node, x)
    return True


@rewrite_of("Add", "Sub")
def fold_into_sum(graph: Graph, node: gs.Node) -> bool:
    """A constant that is added to the sum of a layer's output and something else, as in the cell of an LSTM, is the layer's
    bias."""
    found = operands(node)
    if found is None or not rank_of(found[0]) or (node.op == "Sub" and found[2]):
        return False
    x, rank = found[0], len(found[0].shape)
    total = x.inputs[0] if x.inputs and x.inputs[0].op == "Add" and not x.inputs[0].domain else None
    if total is None or not read_alone(graph, x, node) or any(isinstance(t, gs.Constant) for t in total.inputs):
        return False
    for at, part in enumerate(total.inputs):
        layer = layer_at(graph, part, total)
        if layer is None or output_rank(layer, part) != rank:
            continue
        vector = per_channel(found[1], 1 if layer.op in ("Conv", "ConvTranspose") else rank - 1, rank, layer.channels)
        if vector is None:
            continue
        summand = -vector if node.op == "Sub" else vector
        if layer.takes_bias:
            add_to_bias(graph, layer, summand)
            if (norm := graph.batchnorms.get(layer.output)) is not None:
                graph.batchnorms[layer.output] = replace(norm, beta=norm.beta + summand)
        else:
            bias = graph.add_constant(f"{layer.name}_bias", summand.astype(np.float32))
            biased = graph.add_variable(f"{layer.name}_biased", like=part)
            graph.add_node("Add", f"{layer.name}_bias", [part, bias], [biased], before=node)
            total.inputs[at] = biased
        graph.bypass(node, x)
        return True
    return False


BEHIND: tuple[Rewrite, ...] = (fold_batchnorm, fold_behind, fold_behind_sum, fold_into_sum)
