"""Constants that are added or multiplied become part of the layer before or behind: weights and biases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import LAYER_OPS, BatchNorm, Layer
from onnxq_plugins.graph.rewriting import Rewrite, is_float32, is_output, only_reader, rank_of, rewrite_of, values_of
from onnxq_plugins.graph.redundant import drops
from onnxq_plugins.spec import Array

_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def scale_outputs(graph: Graph, name: str, factor: Array) -> None:
    """Multiply the outputs of a layer, weight and bias, by one factor per channel; computed in float64."""
    _scale_outputs(graph, graph.layer(name), factor)


def add_bias(graph: Graph, name: str, values: Array) -> None:
    """Add one value per output channel to a layer's bias, which is created if missing. Not for MatMul, which has none."""
    _add_bias(graph, graph.layer(name), values)


def _scale_outputs(graph: Graph, layer: Layer, factor: Array) -> None:
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


def _add_bias(graph: Graph, layer: Layer, values: Array) -> None:
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


# ---- into the layer before --------------------------------------------------------------------------------------------------


def layer_at(graph: Graph, tensor: gs.Tensor, reader: gs.Node) -> Layer | None:
    """The layer that computes a tensor which an operator alone reads; its constants are nobody else's."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op not in LAYER_OPS or only_reader(graph, tensor) is not reader:
        return None
    layer = graph._layer(node)
    return layer if layer is not None and _owns(graph, layer) else None


def _owns(graph: Graph, layer: Layer) -> bool:
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
    """The variable and the values of the constant operand of an operator, and whether the constant is the first; None unless it
    has both, in float32."""
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


def _batchnorm(graph: Graph, node: gs.Node) -> BatchNorm | None:
    """The constants of a BatchNormalization outside training."""
    if node.attrs.get("training_mode", 0) or len(node.inputs) < 5 or any(not t.is_empty() for t in node.outputs[1:]):
        return None
    constants = [values_of(node, at) for at in range(1, 5)]
    if any(c is None or c.ndim != 1 or c.shape != constants[0].shape for c in constants):  # type: ignore[union-attr]
        return None
    gamma, beta, mean, variance = (np.asarray(c).astype(np.float64) for c in constants)
    return BatchNorm(gamma, beta, mean, variance)


def _affine_of(norm: BatchNorm, node: gs.Node) -> tuple[Array, Array]:
    factor = norm.gamma / np.sqrt(norm.variance + node.attrs.get("epsilon", 1e-5))
    return factor, norm.beta - norm.mean * factor


def _fits(graph: Graph, layer: Layer, factor: Array, summand: Array) -> bool:
    """True if the constants of a layer stay finite."""
    largest = float(np.abs(factor).max(initial=0))
    held = [graph.constant(name) for name in (layer.weight, layer.bias) if name is not None]
    numbers = [float(np.abs(v).max(initial=0)) * largest for v in held] + [float(np.abs(summand).max(initial=0))]
    return bool(np.isfinite(numbers).all() and max(numbers) < np.finfo(np.float32).max / 2)


@rewrite_of("BatchNormalization")
def fold_batchnorm(graph: Graph, node: gs.Node) -> bool:
    """y = gamma (Wx + b - mean) / sqrt(var + eps) + beta becomes one layer; the graph keeps the statistics."""
    norm = _batchnorm(graph, node)
    layer = layer_at(graph, node.inputs[0], node)
    if norm is None or layer is None or norm.gamma.shape != (layer.channels,):  # else it cannot run; onnxruntime reports why
        return False
    factor, summand = _affine_of(norm, node)
    if not _fits(graph, layer, factor, summand):
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
    _add_bias(graph, layer, summand)
    graph.batchnorms[layer.output] = norm
    graph.bypass(node, node.inputs[0])
    return True


@rewrite_of(*_ARITHMETIC)
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
    if affine is None or not _fits(graph, layer, *affine):
        return False
    factor, summand = affine
    if layer.op == "MatMul" and node.op in ("Add", "Sub"):
        return False  # it has no bias
    if (factor != 1).any():
        _scale_outputs(graph, layer, factor)
    if node.op in ("Add", "Sub"):
        _add_bias(graph, layer, summand)
    if (norm := graph.batchnorms.get(layer.output)) is not None:  # its beta is the output's mean
        graph.batchnorms[layer.output] = replace(norm, gamma=norm.gamma * factor, beta=norm.beta * factor + summand)
    graph.bypass(node, x)
    return True


@rewrite_of(*_ARITHMETIC, "BatchNormalization")
def fold_behind_sum(graph: Graph, node: gs.Node) -> bool:
    """Constants behind MatMul + Add(bias) become part of the matrix and the bias; so do those of a BatchNormalization on two
    axes."""
    if node.op == "BatchNormalization":
        norm, x = _batchnorm(graph, node), node.inputs[0]
        affine = None if norm is None or rank_of(x) != 2 else _affine_of(norm, node)
    else:
        found = operands(node)
        if found is None or not rank_of(found[0]):
            return False
        x, values, constant_first = found
        n = x.shape[-1]
        vector = per_channel(values, len(x.shape) - 1, len(x.shape), n) if isinstance(n, int) else None
        affine = None if vector is None else as_affine(node.op, vector, constant_first)
    add = x.inputs[0] if x.inputs and x.inputs[0].op == "Add" and not x.inputs[0].domain else None
    if affine is None or add is None or only_reader(graph, x) is not node:
        return False
    inner = operands(add)
    layer = layer_at(graph, inner[0], add) if inner is not None else None
    if inner is None or layer is None or layer.op != "MatMul" or rank_of(inner[0]) != rank_of(x):
        return False
    bias = per_channel(inner[1], len(x.shape) - 1, len(x.shape), layer.channels)
    factor, summand = affine
    if bias is None or factor.shape != (layer.channels,) or not _fits(graph, layer, factor, summand):
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
    if total is None or only_reader(graph, x) is not node or any(isinstance(t, gs.Constant) for t in total.inputs):
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
            _add_bias(graph, layer, summand)
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


# ---- into the layer behind --------------------------------------------------------------------------------------------------


@rewrite_of(*_ARITHMETIC, "BatchNormalization")
def fold_ahead(graph: Graph, node: gs.Node) -> bool:
    """Constants per channel that the input of layers was added to or multiplied by become part of their weights and biases:
    factors always, summands where no padding has others."""
    found: tuple[gs.Tensor, Array, Array] | None
    output, rank = node.outputs[0], rank_of(node.outputs[0])
    if rank is None or is_output(graph, output) or not output.outputs or not is_float32(node.inputs[0]):
        return False
    readers = {id(reader): reader for reader in output.outputs}.values()
    layers = [graph._layer(reader) if reader.op in LAYER_OPS else None for reader in readers]
    if any(y is None or y.input != output.name for y in layers) or any(list(r.inputs).count(output) > 1 for r in readers):
        return False
    kept = [y for y in layers if y is not None]
    found = _ahead(graph, node, kept, rank)
    if found is None:
        return False
    x, factor, summand = found
    if rank_of(x) != rank or not all(_takes(graph, y, rank, factor, summand, len(kept) == 1) for y in kept):
        return False
    for layer in kept:
        _scale_inputs(graph, layer, factor, summand)
    graph.bypass(node, x)
    return True


def _ahead(graph: Graph, node: gs.Node, layers: list[Layer], rank: int) -> tuple[gs.Tensor, Array, Array] | None:
    """What an operator in front of layers reads, and the factor and summand per input channel of these."""
    axes = {1 if y.op in ("Conv", "ConvTranspose") else rank - 1 for y in layers}
    counts = {inputs_of(y) for y in layers}
    if len(axes) != 1 or len(counts) != 1:
        return None
    axis, count = axes.pop(), counts.pop()
    if node.op == "BatchNormalization":
        norm = _batchnorm(graph, node)
        if norm is None or axis != 1 or norm.gamma.shape != (count,):
            return None
        return (node.inputs[0], *_affine_of(norm, node))
    found = operands(node)
    vector = None if found is None else per_channel(found[1], axis, rank, count)
    affine = None if found is None or vector is None else as_affine(node.op, vector, found[2])
    return None if found is None or affine is None else (found[0], *affine)


def inputs_of(layer: Layer) -> int:
    """Number of a layer's input channels."""
    return layer.shape[layer.in_axis] * (layer.groups if layer.op == "Conv" else 1)


def _takes(graph: Graph, layer: Layer, rank: int, factor: Array, summand: Array, alone: bool) -> bool:
    if not _owns(graph, layer) or not _fits(graph, layer, factor, summand):
        return False
    if layer.op in ("Conv", "ConvTranspose") and rank != len(layer.shape):
        return False
    if not summand.any():
        return True
    if layer.op == "ConvTranspose":  # taps at the edge are missing
        return False
    if layer.op == "MatMul" and not (alone or _added(graph, layer)):  # an Add behind each, for one in front of all
        return False
    auto = layer.attrs.get("auto_pad", "NOTSET")
    if layer.op == "Conv" and (any(layer.attrs.get("pads") or ()) and auto == "NOTSET" or auto not in ("NOTSET", "VALID")):
        return False
    # the sum loses what float32 cannot hold beside it
    weight = np.abs(_by_inputs(layer, graph.constant(layer.weight).astype(np.float64)))
    return bool((weight * np.abs(summand)[:, None]).sum(0).max() < _LARGEST_BIAS * max(weight.sum(0).max(), 1e-30))


def _added(graph: Graph, layer: Layer) -> bool:
    """True if a constant is added to a layer's output, and nothing else reads it."""
    add = only_reader(graph, graph.tensor(layer.output))
    return add is not None and add.op in ("Add", "Sub") and not add.domain and operands(add) is not None


_LARGEST_BIAS = 4096.0  # average summand that a bias takes over: pixels and decibels do, timestamps do not


def _by_inputs(layer: Layer, weight: Array) -> Array:
    """A weight as [input channels, the rest]; those of groups beside each other."""
    if layer.op == "Conv":
        per_group = weight.reshape(layer.groups, layer.shape[0] // layer.groups, layer.shape[1], -1)
        return per_group.transpose(0, 2, 1, 3).reshape(inputs_of(layer), -1)
    return np.moveaxis(weight, layer.in_axis, 0).reshape(layer.shape[layer.in_axis], -1)


def _scale_inputs(graph: Graph, layer: Layer, factor: Array, summand: Array) -> None:
    """W (factor x + summand) + b as W' x + b'."""
    weight = graph.constant(layer.weight).astype(np.float64)
    if layer.op == "Conv":
        groups, inputs = layer.groups, layer.shape[1]
        rows = weight.reshape(groups, layer.shape[0] // groups, inputs, -1)
        moved = (rows.sum(-1) * summand.reshape(groups, 1, inputs)).sum(-1).reshape(-1)
        scaled = (rows * factor.reshape(groups, 1, inputs, 1)).reshape(weight.shape)
    else:
        shape = [-1 if a == layer.in_axis else 1 for a in range(weight.ndim)]
        moved = (weight * summand.reshape(shape)).sum(layer.in_axis) if summand.any() else np.zeros(0)
        scaled = weight * factor.reshape(shape)
    graph.set_constant(layer.weight, scaled.astype(np.float32))
    if summand.any() and layer.op == "MatMul":
        node = graph.producer(layer.output)
        assert node is not None
        output, product = node.outputs[0], graph.add_variable(f"{layer.name}_product", like=node.outputs[0])
        node.outputs[0] = product
        bias = graph.add_constant(f"{layer.name}_bias", moved.astype(np.float32))
        graph.add_node("Add", f"{layer.name}_bias", [product, bias], [output], before=node)
    elif summand.any():
        _add_bias(graph, layer, moved)


# ---- constants in a row -----------------------------------------------------------------------------------------------------


@rewrite_of(*_ARITHMETIC)
def join_constants(graph: Graph, node: gs.Node) -> bool:
    """x + 0, x * 1 and the like are x; two constants in a row that are both added, or both multiplied, are one."""
    found = operands(node)
    if found is None or node.inputs[0].dtype != np.float32:
        return False
    x, values, constant_first = found
    affine = as_affine(node.op, values.astype(np.float64), constant_first)
    rank = rank_of(x)
    if affine is None or rank is None or values.size == 0:
        return False
    factor, summand = affine
    if values.ndim <= rank and values.size == 1 and (factor == 1).all() and not summand.any():
        return drops(graph, node)
    first = x.inputs[0] if x.inputs and x.inputs[0].op in _ARITHMETIC and not x.inputs[0].domain else None
    inner = operands(first) if first is not None and only_reader(graph, x) is node else None
    before = as_affine(first.op, inner[1].astype(np.float64), inner[2]) if first is not None and inner is not None else None
    if inner is None or before is None or inner[1].ndim > rank or rank_of(inner[0]) != rank:
        return False
    sums, products = ((node.op in ops) + (first.op in ops) for ops in (("Add", "Sub"), ("Mul", "Div")))
    joined = before[0] * factor if products == 2 else before[1] * factor + summand
    flipped = sums == 2 and (before[0] * factor).ravel()[0] < 0
    if 2 not in (sums, products) or joined.size > max(values.size, inner[1].size) or not np.isfinite(joined.astype(np.float32)).all():
        return False
    constant = graph.add_constant(f"{node.name}_joined", joined.astype(np.float32))
    node.op = "Mul" if products == 2 else "Sub" if flipped else "Add"
    node.inputs = [constant, inner[0]] if flipped else [inner[0], constant]
    return True


BEHIND: tuple[Rewrite, ...] = (fold_batchnorm, fold_behind, fold_behind_sum, fold_into_sum)
AHEAD: tuple[Rewrite, ...] = (fold_ahead, join_constants)
