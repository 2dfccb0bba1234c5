"""Exact float rewrites done once, at import, so that every later pass and the exporter see one form.

Each layer gets a weight of its own, BatchNorm and constant additions move into layers, and
chains that exporters wrote out (GELU, HardSwish, LayerNormalization, MatMul + Add) become the one operator that
runtimes know. Each function is one rewrite; `canonicalize` applies them in order.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.flatten import flatten_matmul
from onnxq_plugins.graph.functions import fuse_layernorm, fuse_scalar_functions, variable_and_constant
from onnxq_plugins.graph.layer import BatchNorm
from onnxq_plugins.graph.products import rewrite_products
from onnxq_plugins.spec import Array


def canonicalize(graph: Graph, flatten: bool = True) -> None:
    """Bring a freshly imported graph into canonical form, in place; `flatten` includes `flatten_matmul`."""
    graph.tidy()
    rewrite_products(graph)
    split_shared_weights(graph)
    normalize_gemm(graph)
    fold_batchnorm(graph)
    fold_bias(graph)
    fuse_scalar_functions(graph)
    fuse_layernorm(graph)
    if flatten:
        flatten_matmul(graph)
    graph.tidy()
    graph.touched.clear()


def split_shared_weights(graph: Graph) -> None:
    """Law L7: each layer owns its weight and bias. The exporter merges equal codes again."""
    for layer in graph.layers:
        node = graph.producer(layer.output)
        assert node is not None
        for i, tensor in enumerate(node.inputs[1:], start=1):
            if isinstance(tensor, gs.Constant) and len(tensor.outputs) > 1:
                node.inputs[i] = graph.add_constant(f"{tensor.name}_{layer.name}", tensor.values.copy())
    graph.changed()


def normalize_gemm(graph: Graph) -> None:
    """alpha and beta of a Gemm move into its weight and bias; a bias other than a vector [N] becomes an Add behind it."""
    for layer in [layer for layer in graph.layers if layer.op == "Gemm"]:
        node = graph.producer(layer.output)
        assert node is not None
        alpha, beta = node.attrs.pop("alpha", 1.0), node.attrs.pop("beta", 1.0)
        if alpha != 1.0:
            graph.set_constant(layer.weight, graph.constant(layer.weight) * np.float32(alpha))
        if layer.bias is not None:
            bias, n = graph.constant(layer.bias) * np.float32(beta), layer.shape[layer.out_axis]
            if bias.size == 1 or bias.shape in ((n,), (1, n)):
                graph.set_constant(layer.bias, np.broadcast_to(bias.ravel(), (n,)))
            else:  # one per sample
                graph.set_constant(layer.bias, bias)
                output, product = node.outputs[0], graph.add_variable(f"{layer.name}_product", like=node.outputs[0])
                addend = node.inputs.pop()
                node.outputs[0] = product
                graph.add_node("Add", f"{layer.name}_bias", [product, addend], [output], before=node)
    graph.tidy()


def fold_batchnorm(graph: Graph) -> None:
    """y = gamma (Wx + b - mean) / sqrt(var + eps) + beta becomes one layer; the graph keeps the statistics."""
    for node in graph.nodes:
        if node.op != "BatchNormalization" or node.attrs.get("training_mode", 0):
            continue
        if not all(isinstance(t, gs.Constant) for t in node.inputs[1:5]):
            continue
        layer = next((y for y in graph.layers if y.output == node.inputs[0].name), None)
        if layer is None or len(graph.consumers(layer.output)) > 1 or layer.output in graph.outputs:
            continue
        if layer.op == "MatMul":  # on tokens BatchNormalization is over axis 1, not over the outputs, and MatMul has no bias
            continue
        gamma, beta, mean, variance = (graph.constant(t.name).astype(np.float64) for t in node.inputs[1:5])
        if any(v.shape != (layer.channels,) for v in (gamma, beta, mean, variance)):
            continue  # it cannot run; onnxruntime reports why
        factor = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        scale_outputs(graph, layer.name, factor)
        add_bias(graph, layer.name, beta - mean * factor)
        graph.batchnorms[layer.output] = BatchNorm(gamma, beta, mean, variance)
        output = node.outputs[0]
        graph.bypass(node, node.inputs[0])
        if output.name in graph.outputs:  # the layer took over the output's name
            graph.batchnorms[output.name] = graph.batchnorms.pop(layer.output)


def fold_bias(graph: Graph) -> None:
    """A constant per output channel that is added behind a Conv, ConvTranspose or Gemm becomes part of the bias."""
    for node in graph.nodes:
        if node.op != "Add":
            continue
        x, constant = variable_and_constant(node)
        layer = next((y for y in graph.layers if x is not None and y.output == x.name), None)
        if layer is None or constant is None or layer.op == "MatMul" or len(graph.consumers(layer.output)) > 1:
            continue
        rank, values = len(layer.shape), constant.values
        channel_axis = 1 if layer.op != "Gemm" else rank - 1  # of the output
        shape = (1,) * (rank - values.ndim) + tuple(values.shape)
        if len(shape) != rank or any(n != (layer.channels if a == channel_axis else 1) for a, n in enumerate(shape)):
            continue
        if layer.output not in graph.outputs:
            add_bias(graph, layer.name, values.reshape(-1).astype(np.float64))
            if (norm := graph.batchnorms.get(layer.output)) is not None:  # its beta is the output's mean
                graph.batchnorms[layer.output] = replace(norm, beta=norm.beta + values.reshape(-1))
            graph.bypass(node, graph.tensor(layer.output))


def scale_outputs(graph: Graph, name: str, factor: Array) -> None:
    """Multiply the outputs of a layer, weight and bias, by one factor per channel; computed in float64."""
    layer = graph.layer(name)
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


def add_bias(graph: Graph, name: str, values: Array) -> None:
    """Add one value per output channel to a layer's bias, which is created if missing. Not for MatMul, which has none."""
    layer = graph.layer(name)
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
