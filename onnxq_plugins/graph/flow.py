"""Who writes and who reads a tensor, seen through operators that only move values and through the Relu or Clip that a kernel
absorbs."""

from __future__ import annotations

from typing import Any

from onnxq_plugins.graph.core import Graph


def activation_inputs(graph: Graph, node: Any) -> list[str]:
    """Names of a node's inputs that are activations."""
    return [t.name for t in node.inputs if not t.is_empty() and not graph.is_constant(t.name)]


def result_of(graph: Graph, node: Any) -> str:
    """The output that carries a node's values after the Relu or Clip it absorbs."""
    after = graph.elided_activation(node.outputs[0].name)
    return str((after or node).outputs[0].name)


def maker_of(graph: Graph, name: str) -> Any:
    """The inverse of `result_of`: the node that computes a tensor, perhaps through the Relu or Clip it absorbs; None for
    inputs."""
    node = graph.producer(name)
    if node is not None and node.op in ("Relu", "Clip") and graph.elided_activation(node.inputs[0].name) is not None:
        return graph.producer(node.inputs[0].name)
    return node


def source_of(graph: Graph, name: str) -> str:
    """Name of the node that computes a tensor, seen through shape-only operators and absorbed activations."""
    node = maker_of(graph, graph.root(name))
    return str(node.name) if node is not None else ""


def readers(graph: Graph, name: str) -> set[str]:
    """Names of the nodes that read a tensor, seen through shape-only operators."""
    names = set()
    for node in graph.consumers(name):
        if graph.is_shape_only(node):
            for output in node.outputs:
                names |= readers(graph, output.name)
        else:
            names.add(str(node.name))
    return names
