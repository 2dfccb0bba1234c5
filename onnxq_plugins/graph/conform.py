"""Layers in operators that a runtime has."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from onnxq_plugins.graph.core import Graph


def conform(graph: Graph, operators: Container[str]) -> Graph:
    """Write each Gemm with a constant weight as MatMul and Add, exactly, where a runtime has no Gemm. Returns the graph.

    operators   that the runtime has; empty: all
    """
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
