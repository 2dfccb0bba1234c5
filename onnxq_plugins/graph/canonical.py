"""Exact float rewrites done once, at import, so that every later pass and the exporter see one form.

Each layer gets a weight of its own; padding, BatchNorm and constants move into layers; layouts are straightened; what
computes nothing goes; chains that exporters wrote out (GELU, HardSwish, LayerNormalization, MatMul + Add) become the one
operator that runtimes know. `TABLE` and `AFTER_FUNCTIONS` list the rewrites of single places; `canonicalize` walks through
them.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.affine import BEHIND
from onnxq_plugins.graph.ahead import AHEAD
from onnxq_plugins.graph.bounds import BOUNDS
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.flatten import flatten_matmul
from onnxq_plugins.graph.focus import FOCUS
from onnxq_plugins.graph.functions import fuse_layernorm, fuse_scalar_functions
from onnxq_plugins.graph.layouts import straighten
from onnxq_plugins.graph.pads import PADS
from onnxq_plugins.graph.products import rewrite_products
from onnxq_plugins.graph.redundant import REDUNDANT, join_duplicates
from onnxq_plugins.graph.rewriting import Rewrite, rewrite
from onnxq_plugins.graph.shapes import SHAPES, refresh_shapes
from onnxq_plugins.graph.transposes import TRANSPOSES
from onnxq_plugins.graph.units import UNITS

TABLE: tuple[Rewrite, ...] = (*SHAPES, *REDUNDANT, *TRANSPOSES, *UNITS, *PADS, *FOCUS, *BEHIND)
AFTER_FUNCTIONS: tuple[Rewrite, ...] = (*TABLE, *BOUNDS, *AHEAD)  # a factor of a written-out GELU must not move into a layer
_ROUNDS = 8  # what one rewrite leaves another may take up


def canonicalize(graph: Graph, flatten: bool = True) -> None:
    """Bring a freshly imported graph into canonical form, in place; `flatten` includes `flatten_matmul`."""
    graph.tidy()
    refresh_shapes(graph)
    for _ in range(_ROUNDS):
        if not rewrite(graph, (*SHAPES, *REDUNDANT)) | join_duplicates(graph):
            break
        refresh_shapes(graph)
    rewrite_products(graph)
    split_shared_weights(graph)
    flush_weights(graph)
    normalize_gemm(graph)
    rewrite(graph, TABLE)
    fuse_scalar_functions(graph)
    fuse_layernorm(graph)
    for _ in range(_ROUNDS):
        if not straighten(graph) | rewrite(graph, AFTER_FUNCTIONS):
            break
    if flatten:
        flatten_matmul(graph)
        rewrite(graph, REDUNDANT)
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


def flush_weights(graph: Graph) -> None:
    """Weights below the smallest normal number, which training with decay leaves, become 0: Intel processors take up to ten
    times as long for products with them. Weights that lie in a file stay there."""
    for layer in graph.layers:
        if layer.weight not in graph.mapped.arrays:
            values = graph.constant(layer.weight)
            low = (np.abs(values) < np.finfo(np.float32).tiny) & (values != 0)
            if low.any():
                graph.set_constant(layer.weight, np.where(low, np.float32(0), values))


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
