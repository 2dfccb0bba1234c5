"""QLinearConv and QLinearMatMul compute what the QDQ model computed, and nothing else is rewritten."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes
from onnxq_plugins.formats.qoperator import to_qoperator
from tests.zoo import cnn, conv1d, feeds, grouped, kinds, mobilenet, run, transformer

NETWORKS = {"cnn": cnn, "conv1d": conv1d, "grouped": grouped, "mobilenet": mobilenet, "transformer": transformer}


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", kinds(NETWORKS, "cnn", "conv1d"))
def test_codes_are_those_of_the_qdq_model(name):
    model = NETWORKS[name]()
    made = onnxq.quantize(model, "int8", feeds(model, 8), target="portable", check=False).model
    before = made.SerializeToString()
    changed = to_qoperator(made)
    assert made.SerializeToString() == before
    onnx.checker.check_model(changed, full_check=True)
    for feed in feeds(model, 3):
        same = [np.array_equal(*pair) for pair in zip(run(made, feed), run(changed, feed), strict=True)]
        assert all(same)
    assert all(node.domain == "" for node in changed.graph.node)
    assert {entry.domain: entry.version for entry in changed.opset_import} == {"": 13}
    if name != "transformer":
        assert ops(changed)["QLinearConv"] > 0 and ops(changed)["QLinearConv"] + ops(changed)["Conv"] == ops(made)["Conv"]


def test_the_target_writes_it(tmp_path):
    result = onnxq.quantize(cnn(), "int8", feeds(cnn(), 4), target="qoperator", check=False)
    assert ops(onnx.load(result.save(tmp_path / "m.onnx")))["QLinearConv"] > 0


def layer(op: str, between: str = "", bias: float | None = None, zero: int = 0, transposed: bool = False) -> onnx.ModelProto:
    """One layer between Q and DQ, perhaps with a function in between; its output's zero point, and its bias's scale."""
    conv = op == "Conv"
    weight = np.arange(-8, 8, dtype=np.int8).reshape((4, 4, 1, 1) if conv else (4, 4))
    tensors = {
        "s": np.float32(0.1),
        "z": np.uint8(128),
        "ws": np.float32([0.1, 0.2, 0.3, 0.4]),
        "w": weight,
        "ys": np.float32(0.05),
        "yz": np.uint8(zero),
        "six": np.float32(6),
        "nought": np.float32(0),
    }
    axis = 0 if conv or transposed else 1
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=axis),
    ]
    inputs = ["xd", "wd"]
    if bias is not None:
        tensors |= {"b": np.int32([1, 2, 3, 4]), "bs": np.float32(tensors["ws"] * bias)}
        nodes.append(helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0))
        inputs.append("bd")
    attributes = {"transB": 1} if transposed else {}
    nodes.append(helper.make_node(op, inputs, ["y"], name="layer", **attributes))
    last = "y"
    if between:
        extra = ["nought", "six"] if between == "Clip" else []
        nodes.append(helper.make_node(between, ["y", *extra], ["a"]))
        last = "a"
    nodes += [
        helper.make_node("QuantizeLinear", [last, "ys", "yz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "ys", "yz"], ["out"]),
    ]
    shape = [1, 4, 3, 3] if conv else [2, 4]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "out")]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (layer("Conv"), "QLinearConv"),
        (layer("Conv", "Relu"), "QLinearConv"),  # codes from 0 hold nothing below
        (layer("Conv", "Relu", zero=10), "Conv"),  # these do
        (layer("Conv", "Clip"), "Conv"),  # 12.75 is above 6
        (layer("Conv", bias=0.1), "QLinearConv"),
        (layer("Conv", bias=0.3), "Conv"),  # not the scale of the products
        (layer("Conv", "Sigmoid"), "Conv"),
        (layer("MatMul"), "QLinearMatMul"),
        (layer("Gemm", transposed=True), "QLinearMatMul"),
        (layer("Gemm", bias=0.1), "Gemm"),  # QLinearMatMul has no bias
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_is_rewritten_only_where_it_is_the_same(model, made):
    changed = to_qoperator(model)
    assert made in ops(changed)
    onnx.checker.check_model(changed, full_check=True)
    x = np.random.default_rng(0).uniform(-12, 12, [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim])
    feed = {"x": x.astype(np.float32)}
    before, after = (runtimes.session(each, optimize=False).run(None, feed)[0] for each in (model, changed))
    assert np.abs(before - after).max() <= (0.0501 if made.startswith("QLinear") else 0)  # ties may round otherwise


def test_opencv_runs_its_convolutions_in_integers(tmp_path):
    pytest.importorskip("cv2", reason="needs opencv")
    model = mobilenet()
    samples = feeds(model, 8)
    file = onnxq.quantize(model, "int8", samples, target="qoperator", check=False).save(tmp_path / "m.onnx")
    audit = onnxq.audit(file, runtime="opencv", data=samples[:1])
    convolutions = [each for each in audit.proof.inspection.operators if each.op.startswith("Convolution")]
    assert convolutions and all(each.op == "ConvolutionInt8" for each in convolutions)
    assert audit.proof.decibels > 25
