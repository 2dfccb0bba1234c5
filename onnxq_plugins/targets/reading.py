"""What a target reads as codes: the planned activation of a layer, and operators other than layers that join in."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.flow import activation_inputs
from onnxq_plugins.spec import Plan
from onnxq_plugins.targets.target import Target


def source_in(graph: Graph, plan: Plan, tensor: str) -> str:
    """The planned activation from which a reader of `tensor` gets its codes: itself or what it is tied to through shape-only
    operators; "" if none is planned."""
    while True:
        if tensor in plan and not graph.is_constant(tensor):
            return tensor
        node = graph.producer(tensor)
        if node is None or not graph.is_shape_only(node):
            return ""
        tensor = node.inputs[0].name


def input_in(graph: Graph, plan: Plan, target: Target, layer: Layer) -> str:
    """The planned activation that a layer reads; "" if it reads float. A weight-only layer reads float even where another
    reader of the same tensor made it planned."""
    spec = plan.get(layer.weight)
    key = source_in(graph, plan, layer.input) if spec is not None else ""
    if key and spec is not None and target.rule(layer, spec, plan[key].bits) is None:
        return "" if target.rule(layer, spec, 0) is not None else key
    return key


# Operators whose float constants are operands; those of others are parameters, such as the bounds of a Clip.
_COMPUTED_WITH = frozenset(
    {"Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "MatMul", "PRelu", "LayerNormalization", "InstanceNormalization"}
)


def operands(graph: Graph, node: Any) -> list[str]:
    """Names of the float constants that an operator computes with. Beside codes they are codes, too; parameters are not."""
    constants = (t.name for t in node.inputs if not t.is_empty() and graph.is_constant(t.name))
    return [n for n in constants if graph.constant(n).dtype == np.float32] if node.op in _COMPUTED_WITH else []


def joins(graph: Graph, target: Target, node: Any) -> bool:
    """True if an operator other than a layer has an integer form that only needs codes to read and to write: of activations
    alone, for targets that quantize as a whole also beside constants."""
    inputs = activation_inputs(graph, node)
    if node.op not in target.integer_ops or node.domain or len(node.outputs) != 1 or not inputs:
        return False
    if not target.whole:
        return len(inputs) == len(node.inputs)
    return (
        not graph.is_shape_only(node)
        and not _absorbed(graph, node)
        and all(graph.tensor(name).dtype == np.float32 for name in (*inputs, node.outputs[0].name))
        and all(np.isfinite(graph.constant(name)).all() for name in operands(graph, node))
    )


def _absorbed(graph: Graph, node: Any) -> bool:
    """True for a Relu or Clip that is the grid of what computes its input. Behind operators that only move values it is an
    operator of its own."""
    read = node.inputs[0].name
    maker = graph.producer(read)
    return graph.elided_activation(read) is node and maker is not None and not graph.is_shape_only(maker)
