"""Operators that a runtime has in place of others, exactly."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from onnxq_plugins.graph.core import Graph


def conform(graph: Graph, operators: Container[str], whole: bool = False) -> Graph:
    """Write each Gemm with a constant weight as MatMul and Add where a runtime has no Gemm. Where all operators are to be
    quantized, write what has no integer kernel of its own: Swish as Sigmoid and Mul, a BatchNormalization that no layer has
    absorbed as a depthwise convolution of one tap. Returns the graph.

    operators   that the runtime has; empty: all
    whole       see `targets.Target`
    """
    if whole:
        _split_swish(graph)
        _convolve_norms(graph)
        graph.tidy()
        graph.touched.clear()
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


def _convolve_norms(graph: Graph) -> None:
    for node in [n for n in graph.nodes if n.op == "BatchNormalization" and not n.domain and len(n.outputs) == 1]:
        x, shape = node.inputs[0], graph.shape(node.inputs[0].name)
        if (
            shape is None
            or len(shape) < 3
            or x.dtype != np.float32
            or not all(graph.is_constant(t.name) for t in node.inputs[1:])
        ):
            continue
        gamma, beta, mean, variance = (graph.constant(t.name).astype(np.float64) for t in node.inputs[1:])
        factor = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        taps = (1,) * (len(shape) - 2)
        weight = graph.add_constant(f"{node.name}_weight", factor.reshape(-1, 1, *taps).astype(np.float32))
        bias = graph.add_constant(f"{node.name}_bias", (beta - mean * factor).astype(np.float32))
        for at, tensor in enumerate((weight, bias, None, None), 1):
            graph.set_input(node, at, tensor)
        node.op, node.attrs = "Conv", {"group": factor.size, "kernel_shape": list(taps)}
        graph.changed()
