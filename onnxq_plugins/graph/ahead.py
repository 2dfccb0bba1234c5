"""Constants that the input of layers is added to or multiplied by become part of these; constants in a row are joined."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.affine import (
    ARITHMETIC,
    add_to_bias,
    affine_of,
    as_affine,
    batchnorm_of,
    fits,
    operands,
    owns,
    per_channel,
)
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import LAYER_OPS, Layer
from onnxq_plugins.graph.redundant import drops
from onnxq_plugins.graph.rewriting import Rewrite, is_float32, is_output, only_reader, rank_of, read_alone, rewrite_of
from onnxq_plugins.spec import Array

_LARGEST_BIAS = 4096.0  # average summand that a bias takes over: pixels and decibels do, timestamps do not


@rewrite_of(*ARITHMETIC, "BatchNormalization")
def fold_ahead(graph: Graph, node: gs.Node) -> bool:
    """Constants per channel that the input of layers was added to or multiplied by become part of their weights and biases:
    factors always, summands where no padding has others."""
    output, rank = node.outputs[0], rank_of(node.outputs[0])
    layers = _layers_behind(graph, output)
    found = _ahead(graph, node, layers, rank) if rank is not None and layers and is_float32(node.inputs[0]) else None
    if found is None or rank is None:
        return False
    x, factor, summand = found
    if rank_of(x) != rank or not all(_takes(graph, y, rank, factor, summand, len(layers) == 1) for y in layers):
        return False
    for layer in layers:
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
        norm = batchnorm_of(graph, node)
        if norm is None or axis != 1 or norm.gamma.shape != (count,):
            return None
        return (node.inputs[0], *affine_of(norm, node))
    found = operands(node)
    vector = None if found is None else per_channel(found[1], axis, rank, count)
    affine = None if found is None or vector is None else as_affine(node.op, vector, found[2])
    return None if found is None or affine is None else (found[0], *affine)


def inputs_of(layer: Layer) -> int:
    """Number of a layer's input channels."""
    return layer.shape[layer.in_axis] * (layer.groups if layer.op == "Conv" else 1)


def _takes(graph: Graph, layer: Layer, rank: int, factor: Array, summand: Array, alone: bool) -> bool:
    if not owns(graph, layer) or not fits(graph, layer, factor, summand):
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
    pads = any(layer.attrs.get("pads") or ()) if auto == "NOTSET" else auto != "VALID"
    if layer.op == "Conv" and pads:
        return False
    # the sum loses what float32 cannot hold beside it
    weight = np.abs(_by_inputs(layer, graph.constant(layer.weight).astype(np.float64)))
    return bool((weight * np.abs(summand)[:, None]).sum(0).max() < _LARGEST_BIAS * max(weight.sum(0).max(), 1e-30))


def _added(graph: Graph, layer: Layer) -> bool:
    """True if a constant is added to a layer's output, and nothing else reads it."""
    add = only_reader(graph, graph.tensor(layer.output))
    return add is not None and add.op in ("Add", "Sub") and not add.domain and operands(add) is not None


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
        add_to_bias(graph, layer, moved)


@rewrite_of("Add", "Sub")
def factor_ahead(graph: Graph, node: gs.Node) -> bool:
    """a x + b in front of layers that cannot take b, since they pad, is x + b / a in front of layers that took a."""
    output, rank, found = node.outputs[0], rank_of(node.outputs[0]), operands(node)
    first = found[0].inputs[0] if found is not None and found[0].inputs else None
    if found is None or rank is None or first is None or first.op not in ("Mul", "Div") or first.domain:
        return False
    inner, layers = operands(first), _layers_behind(graph, output)
    if inner is None or not layers or not read_alone(graph, found[0], node) or rank_of(inner[0]) != rank:
        return False
    pair = [_ahead(graph, step, layers, rank) for step in (first, node)]
    if pair[0] is None or pair[1] is None or not pair[0][1].all():
        return False
    factor, summand = pair[0][1] * pair[1][1], pair[1][2]
    moved = summand / factor
    none = np.zeros_like(factor)
    if not np.abs(moved).max() < _LARGEST_BIAS or not all(_takes(graph, y, rank, factor, none, True) for y in layers):
        return False
    for layer in layers:
        _scale_inputs(graph, layer, factor, none)
    axis = 1 if layers[0].op in ("Conv", "ConvTranspose") else rank - 1
    values = moved[:1] if (moved == moved[0]).all() else moved
    shape = [-1 if a == axis else 1 for a in range(rank)] if values.size > 1 else []
    node.op = "Add"
    node.inputs = [inner[0], graph.add_constant(f"{node.name}_moved", values.astype(np.float32).reshape(shape))]
    return True


def _layers_behind(graph: Graph, tensor: gs.Tensor) -> list[Layer]:
    """The layers that read a tensor as their input; none if anything else reads it."""
    readers = list({id(reader): reader for reader in tensor.outputs}.values())
    layers = [graph._layer(reader) if reader.op in LAYER_OPS else None for reader in readers]
    found = [y for y in layers if y is not None and y.input == tensor.name]
    twice = any(sum(t is tensor for t in reader.inputs) > 1 for reader in readers)
    return found if len(found) == len(readers) and not twice and not is_output(graph, tensor) else []


# ---- constants in a row ---------------------------------------------------------------------------------------------------


@rewrite_of(*ARITHMETIC)
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
    first = x.inputs[0] if x.inputs and x.inputs[0].op in ARITHMETIC and not x.inputs[0].domain else None
    inner = operands(first) if first is not None and only_reader(graph, x) is node else None
    before = as_affine(first.op, inner[1].astype(np.float64), inner[2]) if first is not None and inner is not None else None
    if first is None or inner is None or before is None or inner[1].ndim > rank or rank_of(inner[0]) != rank:
        return False
    sums, products = ((node.op in ops) + (first.op in ops) for ops in (("Add", "Sub"), ("Mul", "Div")))
    joined = before[0] * factor if products == 2 else before[1] * factor + summand
    flipped = sums == 2 and (before[0] * factor).ravel()[0] < 0
    if (
        2 not in (sums, products)
        or joined.size > max(values.size, inner[1].size)
        or not np.isfinite(joined.astype(np.float32)).all()
    ):
        return False
    constant = graph.add_constant(f"{node.name}_joined", joined.astype(np.float32))
    node.op = "Mul" if products == 2 else "Sub" if flipped else "Add"
    node.inputs = [constant, inner[0]] if flipped else [inner[0], constant]
    return True


AHEAD: tuple[Rewrite, ...] = (fold_ahead, factor_ahead, join_constants)
