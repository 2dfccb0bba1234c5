"""The audit of accumulators: what each layer of a file needs, and what saturates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from onnxq_plugins import OnnxqError, audit_model, hookimpl, load, quantize
from onnxq_plugins.cli import app
from onnxq_plugins.export.weights import int8_codes
from onnxq_plugins.job import Pass
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.openvino import audit_openvino
from onnxq_plugins.solvers.accumulator import (
    saturates,
    width,
)
from onnxq_plugins.spec import encode, solve_minmax
from tests.zoo import ZOO, cnn, conv_transpose, feeds, grouped, mlp


def hand_made(op, codes, attributes=None, shape=(1, 4), kind=np.uint8, chain=None, opset=21):
    """Q -> DQ -> layer with given weight codes; `chain` makes more operators in front of the weight's DQ."""
    scale, zero = np.float32(0.1), kind(0)
    tensors = {"s": scale, "z": zero, "zw": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
    ]
    stored = [numpy_helper.from_array(codes, "codes")]
    name = "codes"
    if chain is not None:
        made, extra, name = chain
        nodes, stored = [*made, *nodes], stored + extra
    nodes += [
        helper.make_node("DequantizeLinear", [name, "s", "zw"], ["w"]),
        helper.make_node(op, ["xd", "w"], ["y"], name="layer", **(attributes or {})),
    ]
    stored += [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


ROWS = np.array([[1, -2, 3, 4], [100, -100, 100, -100]], np.int8)  # 8 * 255 and 200 * 255 = 51000: 17 bits


@pytest.mark.parametrize(
    ("op", "codes", "attributes", "shape"),
    [
        ("Gemm", ROWS, {"transB": 1}, (1, 4)),
        ("Gemm", ROWS.T.copy(), {}, (1, 4)),
        ("MatMul", ROWS.T.copy(), {}, (1, 4)),
        ("MatMul", ROWS.T.copy()[None], {}, (1, 1, 4)),
        ("Conv", ROWS.reshape(2, 1, 2, 2), {}, (1, 1, 3, 3)),
        ("Conv", ROWS.reshape(2, 4, 1, 1), {}, (1, 4, 3, 3)),
        ("Conv", np.concatenate([ROWS, ROWS]).reshape(4, 2, 2, 1), {"group": 2}, (1, 4, 3, 3)),
        ("Conv", ROWS.reshape(2, 1, 2, 2), {"group": 2}, (1, 2, 3, 3)),
    ],
)
def test_layouts(op, codes, attributes, shape):
    found = needs(hand_made(op, codes, attributes, shape))["y"]
    assert (found.bits, found.saturates) == (17, True)
    (audit,) = audit_model(hand_made(op, codes, attributes, shape)).layers
    assert (audit.accumulator, audit.saturates) == (17, True)
    small = needs(hand_made(op, np.clip(codes, -4, 4), attributes, shape))["y"]
    assert (small.bits, small.saturates) == (1 + (255 * 8).bit_length(), False)


def test_signed_inputs_reach_further_down():
    assert needs(hand_made("Gemm", np.full((1, 4), -128, np.int8), {"transB": 1}, kind=np.int8))["y"].bits == 18
    assert needs(hand_made("Gemm", np.full((1, 4), 127, np.int8), {"transB": 1}, kind=np.int8))["y"].bits == 17
    assert "y" not in needs(hand_made("Gemm", ROWS, {"transB": 1}, kind=np.uint16))


def test_chains_are_computed():
    codes = np.array([[1, -2, 3, 4], [7, -7, 7, -7]]).astype(ml_dtypes.int4)
    cast = ([helper.make_node("Cast", ["codes"], ["c"], to=TensorProto.INT8)], [], "c")
    assert needs(hand_made("Gemm", codes, {"transB": 1}, chain=cast))["y"].bits == 1 + (14 * 255).bit_length()
    product = (
        [
            helper.make_node("Cast", ["codes"], ["a"], to=TensorProto.INT32),
            helper.make_node("Cast", ["factor"], ["b"], to=TensorProto.INT32),
            helper.make_node("Mul", ["a", "b"], ["m"]),
            helper.make_node("Reshape", ["m", "shape"], ["r"]),
            helper.make_node("Cast", ["r"], ["c"], to=TensorProto.INT8),
        ],
        [
            numpy_helper.from_array(np.array([[15], [15]]).astype(ml_dtypes.uint4), "factor"),
            numpy_helper.from_array(np.array([2, 4]), "shape"),
        ],
        "c",
    )
    found = needs(hand_made("Gemm", codes, {"transB": 1}, chain=product))["y"]
    assert found.bits == 1 + (15 * 14 * 255).bit_length() and found.saturates
    rounded = ([helper.make_node("QuantizeLinear", ["codes", "s", "zw"], ["c"])], [], "c")
    floats = (ROWS * np.float32(0.1)).astype(np.float32)
    assert needs(hand_made("Gemm", floats, {"transB": 1}, chain=rounded))["y"].bits == 17


def test_what_is_no_integer_layer_has_no_accumulator():
    model = cnn()
    assert all(y.accumulator is None and not y.saturates for y in audit_model(model).layers)
    assert audit_model(model).accumulators() == "" and Audit((), {}).accumulators() == ""
    only = quantize(mlp(), {"weights": {"bits": 4, "block": 16}, "activations": {"bits": 32}}, None)
    assert all(y.accumulator is None for y in audit_model(only.model).layers)
    model = conv_transpose()
    made = {y.op: y.accumulator for y in audit_model(quantize(model, "int8", feeds(model, 2)).model).layers}
    assert made["ConvTranspose"] is None and made["Conv"] is not None


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "mlp", "transformer", "resnet20"])
def test_the_target_without_vnni_never_saturates(name):
    model = ZOO[name]()
    plain = audit_model(quantize(model, "int8", feeds(model, 2)).model)
    assert any(y.saturates for y in plain.layers)
    assert "target ort-cpu-avx2 avoids that" in plain.accumulators()
    safe = audit_model(quantize(model, "int8", feeds(model, 2), target="ort-cpu-avx2").model)
    assert not any(y.saturates for y in safe.layers) and safe.accumulators().endswith("never saturate")


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"bits": 4, "sub_block": 2}, {"bits": 3, "sub_block": [4, 4]}])
def test_the_audit_agrees_with_the_plan(settings):
    model = grouped()
    result = quantize(model, {"weights": settings, "pass": []}, feeds(model, 2))
    layers = {y.name: y for y in load(model).layers}
    for row in audit_model(result.model).layers:
        layer = layers[row.name]
        codes = layer.matrix(int8_codes(layer, result.plan[layer.weight]))
        assert row.accumulator == width(codes).max() and row.saturates == saturates(codes).any()


def test_the_command_shows_widths(tmp_path):
    model = cnn()
    result = quantize(model, "int8", feeds(model, 2), output=tmp_path / "m.onnx")
    ran = CliRunner().invoke(app, ["audit", "--all", str(tmp_path / "m.onnx")])
    assert ran.exit_code == 0 and "accumulator" in ran.output
    audit = audit_model(result.model)
    assert all(f"{y.accumulator} bits" in ran.output for y in audit.layers) and audit.accumulators() in ran.output


def test_openvino_tells_the_same(tmp_path):
    pytest.importorskip("openvino")
    model = cnn()
    result = quantize(model, "int8", feeds(model, 2), output=tmp_path / "m.onnx", target="openvino")
    expected = {y.name: (y.accumulator, y.saturates) for y in audit_model(result.model).layers}
    assert {y.name: (y.accumulator, y.saturates) for y in audit_openvino(tmp_path / "m.onnx").layers} == expected


def test_a_plan_with_codes_that_saturate_is_refused():
    """Whoever plans 8 bits for a target that runs codes up to 64 is told, unless the codes stay within."""

    @dataclass(frozen=True)
    class Widen(Pass):
        name: ClassVar[str] = "acme.widen"
        top: int = 0

        def apply(self, job):
            layer = job.graph.layers[0]
            spec = replace(job.plan[layer.weight].request(), bits=8)
            if self.top:
                spec = solve_minmax(job.graph.constant(layer.weight), replace(spec, bits=7))
                codes = np.clip(encode(job.graph.constant(layer.weight), spec), -self.top, self.top)
                spec = replace(spec, bits=8, codes=codes)
            job.plan |= {layer.weight: spec}

    class Vendor:
        @hookimpl
        def onnxq_passes(self):
            return [Widen]

    def run(**step):
        return quantize(
            cnn(),
            {"target": "ort-cpu-avx2", "pass": [{"use": "acme.widen", **step}]},
            feeds(cnn(), 4),
            plugins=[Vendor()],
            workers=1,
        )

    with pytest.raises(OnnxqError, match=r"8-bit codes up to 127, target 'ort-cpu-avx2' runs codes up to 64.*plan 7 bits\."):
        run()
    assert run(top=63).plan
