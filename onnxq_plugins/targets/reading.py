"""Which planned activation a layer reads."""

from __future__ import annotations

from onnxq_plugins.graph import Graph, Layer
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
