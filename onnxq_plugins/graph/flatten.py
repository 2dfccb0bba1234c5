"""MatMul + Add on more than two axes, or on one, becomes Gemm on two."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.functions import variable_and_constant

_POINTWISE = {"Relu", "LeakyRelu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSwish", "HardSigmoid", "Clip", "Elu", "Selu"}


def flatten_matmul(graph: Graph) -> None:
    """MatMul + Add(bias) becomes Gemm, in two dimensions: [batch * tokens, channels].

    onnxruntime has an integer Gemm with bias, but no integer MatMul with bias, so the bias (and what follows it) would
    run separately. Pointwise operators, residual adds and LayerNormalization behind such a Gemm stay in two dimensions as
    well, which leaves few Reshapes. MatMuls with more than one dynamic axis besides the channels are left alone, since a
    Reshape cannot restore their shape.
    """
    flat: dict[str, gs.Tensor] = {}  # tensor name -> its two-dimensional form
    for node in graph.nodes:
        if node.op == "MatMul":
            _matmul_to_gemm(graph, node, flat)
        elif flat and node.outputs and node.outputs[0].name not in flat:
            _stay_flat(graph, node, flat)
    graph.tidy()


def _matmul_to_gemm(graph: Graph, node: gs.Node, flat: dict[str, gs.Tensor]) -> None:
    x, weight = node.inputs
    if isinstance(x, gs.Constant) or not isinstance(weight, gs.Constant) or weight.values.ndim != 2:
        return
    readers = node.outputs[0].outputs
    if len(readers) != 1 or readers[0].op != "Add" or node.outputs[0] in graph._graph.outputs:
        return
    add, n = readers[0], weight.values.shape[1]
    _, bias = variable_and_constant(add)
    if bias is None or bias.values.size != n or bias.values.shape[-1] != n:
        return
    if x.shape is None or bias.values.ndim > len(x.shape):  # the sum has more axes than the product
        return
    output = add.outputs[0]
    bias = graph.add_constant(f"{bias.name}_vector", bias.values.reshape(n)) if bias.values.ndim > 1 else bias
    if x.shape is not None and len(x.shape) == 2:
        add.outputs.clear()
        graph.add_node("Gemm", node.name, [x, weight, bias], [output], before=add)
    elif _unflat_shape(output) is not None:
        add.outputs.clear()
        two_d = graph.add_variable(f"{output.name}_2d", shape=[None, n])
        graph.add_node("Gemm", node.name, [_flat(graph, x, flat, node), weight, bias], [two_d], before=node)
        _unflatten(graph, two_d, output, flat, node)
    node.name = f"{node.name}_was_matmul" if not add.outputs else node.name


def _stay_flat(graph: Graph, node: gs.Node, flat: dict[str, gs.Tensor]) -> None:
    """Run a node that treats tokens independently on the two-dimensional form of its inputs."""
    if not any(t.name in flat for t in node.inputs) or _unflat_shape(node.outputs[0]) is None:
        return
    x, output = node.inputs[0], node.outputs[0]
    if node.op in ("Add", "Sub", "Mul", "Div"):
        operands = []
        for t in node.inputs:
            if isinstance(t, gs.Constant):
                if t.values.size not in (1, output.shape[-1]) or (t.values.ndim and t.values.shape[-1] != t.values.size):
                    return
                operands.append(t if t.values.ndim < 2 else graph.add_constant(f"{t.name}_vector", t.values.reshape(-1)))
            elif list(t.shape or ()) != list(output.shape):
                return
            else:
                operands.append(t)
    elif node.op in _POINTWISE or (
        node.op == "LayerNormalization"
        and len(node.outputs) == 1
        and node.attrs.get("axis", -1) in (-1, len(output.shape) - 1)
    ):
        operands = list(node.inputs)
    else:
        return
    attrs = dict(node.attrs) | ({"axis": -1} if node.op == "LayerNormalization" else {})
    operands = [_flat(graph, t, flat, node) if t is x or node.op in ("Add", "Sub", "Mul", "Div") else t for t in operands]
    node.outputs.clear()
    two_d = graph.add_variable(f"{output.name}_2d", shape=[None, output.shape[-1]])
    graph.add_node(node.op, node.name, operands, [two_d], before=node, **attrs)
    _unflatten(graph, two_d, output, flat, node)


def _flat(graph: Graph, tensor: gs.Tensor, flat: dict[str, gs.Tensor], before: gs.Node) -> gs.Tensor:
    """The two-dimensional form of a tensor."""
    if isinstance(tensor, gs.Constant):
        return tensor
    if tensor.name not in flat:
        channels = tensor.shape[-1]
        shape = graph.add_constant(f"{tensor.name}_2d_shape", np.array([-1, channels], np.int64))
        flat[tensor.name] = graph.add_variable(f"{tensor.name}_2d", shape=[None, channels])
        graph.add_node("Reshape", f"{tensor.name}_flatten", [tensor, shape], [flat[tensor.name]], before=before)
    return flat[tensor.name]


def _unflatten(graph: Graph, two_d: gs.Tensor, output: gs.Tensor, flat: dict[str, gs.Tensor], before: gs.Node) -> None:
    shape = graph.add_constant(f"{output.name}_shape", np.array(_unflat_shape(output), np.int64))
    graph.add_node("Reshape", f"{output.name}_unflatten", [two_d, shape], [output], before=before)
    flat[output.name] = two_d


def _unflat_shape(tensor: gs.Tensor) -> list[int] | None:
    """The target of a Reshape back to the tensor's shape, of one axis or more than two; None if more than one is dynamic."""
    if tensor.shape is None or len(tensor.shape) in (0, 2) or not isinstance(tensor.shape[-1], int):
        return None
    shape = [n if isinstance(n, int) else -1 for n in tensor.shape]
    return shape if shape.count(-1) <= 1 and 0 not in shape else None
