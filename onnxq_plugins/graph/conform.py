"""Operators that a runtime has in place of others, exactly."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from onnxq_plugins.graph.core import Graph


def conform(graph: Graph, operators: Container[str], whole: bool = False) -> Graph:
    """Write each Gemm with a constant weight as MatMul and Add where a runtime has no Gemm, and each Swish as Sigmoid and
    Mul where all operators are to be quantized: it has no integer kernel of its own. Returns the graph.

    operators   that the runtime has; empty: all
    whole       see `targets.Target`
    """
    if whole:
        _split_swish(graph)
    if not operators or "Gemm" in operators or "MatMul" not in operators:
        return graph
    for layer in [layer for layer in graph.layers if layer.op == "Gemm"]:
        node, bias = graph.producer(layer.output), layer.bias
        assert node is not None
        if layer.out_axis == 0:
            graph.set_constant(layer.weight, np.ascontiguousarray(graph.constant(layer.weight).T))
        addend = node.inputs[2] if bias is not None else None
        graph.set_input(node, 2, None)
        node.op, node.attrs = "MatMul", {}
        if addend is not None:
            output = node.outputs[0]
            node.outputs[0] = graph.add_variable(f"{layer.name}_product", like=output)
            graph.add_node("Add", f"{layer.name}_bias", [node.outputs[0], addend], [output], before=node)
            graph.batchnorms.pop(layer.output, None)  # those of the sum, which is no layer's output now
    graph.tidy()
    graph.touched.clear()
    return graph


def _split_swish(graph: Graph) -> None:
    for node in [node for node in graph.nodes if node.op == "Swish" and not node.domain]:
        x, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.0))
        if alpha != 1.0:
            factor = graph.add_constant(f"{node.name}_alpha", np.array(alpha, np.float32))
            scaled = graph.add_variable(f"{node.name}_scaled", like=x)
            graph.add_node("Mul", f"{node.name}_scaled", [x, factor], [scaled], before=node)
            x = scaled
        gate = graph.add_variable(f"{node.name}_gate", like=node.outputs[0])
        graph.add_node("Sigmoid", f"{node.name}_gate", [x], [gate], before=node)
        node.op, node.attrs = "Mul", {}
        graph.set_input(node, 1, gate)
    graph.tidy()
    graph.touched.clear()
