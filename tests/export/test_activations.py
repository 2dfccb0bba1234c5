"""Activations in the form that onnxruntime's CPU provider runs fastest: the same values, fewer and faster kernels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import load, quantize, runtimes
from onnxq_plugins.graph.opsets import CONTRIB, tuned
from tests.zoo import Net, feeds

SHAPE = ["N", 3, 12, 12]


def detector(form: str) -> onnx.ModelProto:
    """Convolutions with an activation of several operators behind each, as exporters write it out."""
    net = Net(SHAPE)

    def activated(x: str) -> str:
        if form == "silu":
            return net.op("Mul", x, net.op("Sigmoid", x))
        if form == "quick":
            return net.op("Mul", net.op("Sigmoid", net.op("Mul", x, net.constant(1.702))), x)
        return net.gelu_erf(x) if form == "gelu" else net.gelu_tanh(x)

    x = activated(net.conv("x", 3, 16))
    x = activated(net.conv(x, 16, 16))
    return net.model(net.head(activated(net.conv(x, 16, 16)), 16))


def ran(model: onnx.ModelProto, tmp_path) -> list[str]:
    file = tmp_path / "optimized.onnx"
    runtimes.session(model, dump=file)
    return [node.op_type for node in onnx.load(file).graph.node]


@pytest.mark.parametrize(
    ("form", "kernel"), [("silu", "QuickGelu"), ("quick", "QuickGelu"), ("gelu", "Gelu"), ("tanh", "FastGelu")]
)
def test_an_activation_between_integer_layers_is_one_kernel(form, kernel, tmp_path):
    model = detector(form)
    result = quantize(model, "int8", feeds(model, 8))
    kernels = ran(result.model, tmp_path)
    assert kernels.count(kernel) == 3
    assert not {"Sigmoid", "QLinearSigmoid", "Mul", "QLinearMul", "Erf", "Tanh"} & set(kernels)


@pytest.mark.parametrize("form", ["silu", "quick", "gelu", "tanh"])
def test_other_targets_get_standard_operators(form):
    model = detector(form)
    result = quantize(model, "int8", feeds(model, 8), target="openvino")
    assert not any(node.domain for node in result.model.graph.node)
    onnx.checker.check_model(result.model)


def activation(
    node: onnx.NodeProto, nodes: list[onnx.NodeProto], slopes: np.ndarray
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The operator itself and what stands for it, each a model."""
    constants = [numpy_helper.from_array(slopes, "slopes")]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
    one, other = (
        helper.make_model(
            helper.make_graph(ops, "activation", value[:1], value[1:], constants), opset_imports=opsets, ir_version=9
        )
        for ops in ([node], nodes)
    )
    return one, other


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 1, width=32), min_size=3, max_size=3), st.integers(0, 1000))
def test_a_prelu_is_the_larger_of_two_values(slopes, seed):
    values = np.array(slopes, np.float32).reshape(3, 1, 1)
    node = helper.make_node("PRelu", ["x", "slopes"], ["y"], "prelu")
    nodes = tuned(node, values)
    assert nodes is not None and [n.op_type for n in nodes] == ["Mul", "Max"]
    x = np.random.default_rng(seed).standard_normal((2, 3, 4, 5)).astype(np.float32) * 5
    one, other = (runtimes.session(model).run(None, {"x": x})[0] for model in activation(node, nodes, values))
    np.testing.assert_array_equal(one, other)


def test_a_prelu_of_large_or_unknown_slopes_stays():
    node = helper.make_node("PRelu", ["x", "slopes"], ["y"], "prelu")
    assert tuned(node, np.array([0.5, 1.5], np.float32)) is None
    assert tuned(node, None) is None
    assert tuned(helper.make_node("RandomNormal", [], ["y"], shape=[2]), None) is None  # it reads nothing


def test_a_silu_is_recognised_whatever_it_is_written_as():
    for form in ("silu", "quick"):
        graph = load(detector(form))
        assert [node.op for node in graph.nodes].count("Swish") == 3
        model = graph.model()
        assert not any(node.op_type == "Swish" for node in model.graph.node)  # opset 17 has none
