"""Newer opsets and older ones: the function stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxq_plugins.graph import load
from onnxq_plugins.graph.opsets import opset_of, raise_opset
from onnxq_plugins.measure import drift
from tests.zoo import Net, feeds, run, written_out


def old(nodes, rank=3):
    """A model of opset 11 from x [2, 4, 6] through operators whose attributes became inputs later."""
    sizes = [2, 4, 6, 3][:rank]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes)],
        [helper.make_empty_tensor_value_info("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    return onnx.shape_inference.infer_shapes(model)


NODES = {
    "squeeze": [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[0, 2]),
        helper.make_node("Squeeze", ["u"], ["y"], axes=[2]),
    ],
    "reduce": [
        helper.make_node("ReduceSum", ["x"], ["a"], axes=[1]),
        helper.make_node("ReduceMean", ["a"], ["b"], axes=[2], keepdims=0),
        helper.make_node("ReduceMax", ["b"], ["y"]),
    ],
    "split": [
        helper.make_node("Split", ["x"], ["a", "b"], axis=2, split=[2, 4]),
        helper.make_node("Split", ["b"], ["c", "d"], axis=2),
        helper.make_node("Concat", ["a", "d"], ["y"], axis=2),
    ],
    "softmax": [helper.make_node("Softmax", ["x"], ["y"])],
    "softmax of the last axis": [helper.make_node("LogSoftmax", ["x"], ["y"], axis=2)],
    "dropout": [helper.make_node("Dropout", ["x"], ["y"], ratio=0.5)],
}


@pytest.mark.parametrize("version", [13, 17, 21])
@pytest.mark.parametrize("name", NODES)
def test_raising_the_opset_keeps_the_function(name, version):
    model = old(NODES[name])
    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    raise_opset(newer, version)
    onnx.checker.check_model(newer, full_check=True)
    feed = {"x": np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)}
    before, after = run(model, feed), run(newer, feed)
    assert before[0].shape == after[0].shape and drift(before, after) < 1e-6 and opset_of(newer) == version


def test_raising_reaches_bodies():
    then, other = (
        helper.make_graph(
            [helper.make_node(op, ["x"], [name], axes=[1])], name, [], [helper.make_empty_tensor_value_info(name)]
        )
        for op, name in (("ReduceSum", "yes"), ("ReduceMax", "no"))
    )
    nodes = [
        helper.make_node("ReduceMin", ["x"], ["low"], keepdims=0),
        helper.make_node("Cast", ["low"], ["condition"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], then_branch=then, else_branch=other),
    ]
    model = old(nodes)
    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    raise_opset(newer, 21)
    feed = {"x": np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)}
    assert drift(run(model, feed), run(newer, feed)) < 1e-6


@pytest.mark.parametrize("opset", [13, 17])
def test_operators_that_an_opset_lacks_are_written_out(opset):
    """GELU, HardSwish and LayerNormalization are single operators inside, whatever the opset of the file."""
    net = Net(["N", 6, 16])
    x = net.gelu_erf(net.linear(net.layernorm("x", 16), 16, 16))
    model = net.model(net.linear(net.hardswish(net.gelu_tanh(x)), 16, 4), opset=opset)
    graph = load(model)
    assert {"Gelu", "LayerNormalization", "HardSwish"} <= {node.op for node in graph.nodes}
    exported = graph.model()
    onnx.checker.check_model(exported, full_check=True)
    assert opset_of(exported) == opset
    for feed in feeds(model, 2):
        assert drift(run(model, feed, False), run(exported, feed, False)) < 1e-4


def test_fused_operators_are_fused_by_the_runtime_again(tmp_path):
    from onnxq_plugins import runtimes

    runtimes.session(load(written_out()).model(), dump=tmp_path / "m.onnx")
    assert "Gelu" in {node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
