"""Copies with unsigned weights are the same numbers, also in bodies of control flow."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.testing.exact import unsigned_weights


def branched() -> onnx.ModelProto:
    """An If between two quantized products; the input is quantized outside, so are a scale and a zero point."""
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(a, n) for n, a in (("s", np.float32(0.05)), ("z", np.uint8(128)), ("ws", np.float32(0.01)))
    ]

    def branch(name: str) -> onnx.GraphProto:
        codes = numpy_helper.from_array(rng.integers(-127, 128, (16, 4), np.int8), "codes")  # in both by one name
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "ws"], ["w"]),
            helper.make_node("MatMul", ["dx", "w"], [name]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4])], [codes])

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["qx"]),
        helper.make_node("DequantizeLinear", ["qx", "s", "z"], ["dx"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("yes"), else_branch=branch("no")),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_weights_in_bodies_become_unsigned_and_stay_the_same_numbers():
    model = branched()
    raised = unsigned_weights(model)
    assert model == branched() and len(list(all_graphs(raised.graph))) == 3
    for body in list(all_graphs(raised.graph))[1:]:
        constants = {t.name: t.data_type for t in body.initializer}
        decoded = next(n for n in body.node if n.op_type == "DequantizeLinear")
        assert constants[decoded.input[0]] == constants[decoded.input[2]] == TensorProto.UINT8
    x = np.random.default_rng(1).standard_normal((1, 16)).astype(np.float32)
    for condition in (True, False):
        feed = {"x": x, "c": np.array(condition)}
        exact, same = (runtimes.session(m, optimize=False).run(None, feed)[0] for m in (model, raised))
        np.testing.assert_array_equal(exact, same)
