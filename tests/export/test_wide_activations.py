"""16-bit activations: what is exported, what onnxruntime makes of it, what they gain; and requests at other widths."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxq_plugins import OnnxqError, Plan, audit_model, load, measure, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.export.qdq import export
from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.plan import requests
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.spec import QuantSpec, fake
from onnxq_plugins.targets.npu import NPU
from onnxq_plugins.targets.refusals import problems
from tests.zoo import ZOO, Net, feeds, kinds, mobilenet, resnet20, slowly

WIDE = {"target": "npu", "activations": {"bits": 16}}


def recipe_of(values):
    return load_recipe(values, find_plugins().passes, ())


def outputs(model, samples, optimize=True):
    return runtimes.outputs(runtimes.session(model, optimize=optimize), samples)


def error_db(reference, found):
    return min(measure.sqnr(a, b) for a, b in zip(reference, found, strict=True))


def operators(model, folder):
    runtimes.session(model, dump=folder / "optimized.onnx")
    return Counter(n.op_type for n in onnx.load(str(folder / "optimized.onnx")).graph.node)


def exported(model, bits):
    """A graph, its solved plan and the QDQ model, with a width for each planned activation: bits(name)."""
    graph, recipe = load(model, flatten=False), recipe_of({"target": "npu"})
    plan = requests.request(graph, recipe, NPU).plan
    plan |= {n: replace(plan[n], bits=bits(n)) for n in plan if not graph.is_constant(n)}
    samples = open_data(feeds(model, 8), graph_inputs(graph))
    job = Job(graph, plan, Calibration(graph, samples, workers=1), NPU, recipe, np.random.default_rng(0))
    complete(job)
    inputs = {y.name: Planned(graph, job.plan, NPU).input(y) for y in graph.layers if y.weight in job.plan}
    assert not problems(NPU, graph, job.plan, inputs)
    return graph, job.plan, export(graph, job.plan, NPU)


def on_grid(layer: str) -> onnx.ModelProto:
    """A layer whose weights 8 bits hold exactly, so that activations make all of the error."""
    net = Net(["N", 16, 6, 6] if layer == "Conv" else ["N", 16])
    codes = net.rng.integers(-127, 128, (24, 16))
    codes[:, 0] = 127
    weight = net.constant((codes[..., None, None] if layer == "Conv" else codes.T) / 512.0)
    return net.model(net.op(layer, "x", weight, *([] if layer == "MatMul" else [net.weight(24)])))


# ---- the zoo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds(ZOO, "mlp", "dead_channels", "no_layer"))
def test_16_bit_activations_are_legal_and_onnxruntime_runs_what_is_written(name):
    model = ZOO[name]()
    samples = feeds(model, 8, seed=1)
    wide, narrow = (
        quantize(model, "int8", feeds(model, 8), target="npu", settings=[f"activations.bits={bits}"], workers=1)
        for bits in (16, 8)
    )
    onnx.checker.check_model(wide.model, full_check=True)
    written, run, eight = (outputs(wide.model, samples, False), outputs(wide.model, samples), outputs(narrow.model, samples))
    assert error_db(written, run) > 130  # no 16-bit code and no float weight was rounded again
    reference = outputs(model, samples)
    assert error_db(reference, run) >= error_db(reference, eight) - 0.5
    planned = [s for n, s in wide.plan.items() if s.codes is None]
    assert {s.bits for s in planned} <= {16}
    stored = {t.name: t for t in wide.model.graph.initializer}
    kinds = {stored[n.input[2]].data_type for n in wide.model.graph.node if n.op_type == "QuantizeLinear"}
    assert kinds <= {TensorProto.UINT16}


@pytest.mark.parametrize("seed", [0, *slowly(1)])
@pytest.mark.parametrize("name", kinds(ZOO, "mlp", "resnet20", "control_flow"))
def test_activations_of_8_and_16_bits_mix(name, seed):
    model = ZOO[name]()
    rng = np.random.default_rng(seed)
    _, _, mixed = exported(model, lambda name: int(rng.choice([8, 16])))
    onnx.checker.check_model(mixed, full_check=True)
    samples = feeds(model, 8, seed=1)
    assert error_db(outputs(mixed, samples, False), outputs(mixed, samples)) > 130
    assert error_db(outputs(model, samples), outputs(mixed, samples)) > 30


@pytest.mark.parametrize("block", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layer", ["gemm", "gemm transposed", "matmul"])
def test_dense_layers_do_not_become_matmulnbits(tmp_path, layer, bits, block):
    """onnxruntime would round their inputs to 8 bits again, for some 45 dB."""
    net = Net(["N", 64])
    x = net.linear("x", 64, 32, bias=False) if layer == "matmul" else net.gemm("x", 64, 32, trans_b="tr" in layer)
    model = net.model(net.linear(x, 32, 1, bias=False))
    result = quantize(model, {**WIDE, "weights": {"bits": bits, "block": block}}, feeds(model, 8), workers=1)
    assert not operators(result.model, tmp_path) & Counter(["MatMulNBits", "QGemm", "QLinearMatMul"])
    samples = feeds(model, 8, seed=1)
    assert error_db(outputs(result.model, samples, False), outputs(result.model, samples)) > 90


def test_a_float_layer_between_16_bit_ones_stays_float():
    """onnxruntime quantizes float weights between 16-bit codes too, if nothing keeps them apart."""
    model = mobilenet()
    result = quantize(model, {**WIDE, "layer": [{"match": "conv3", "quantize": False}]}, feeds(model, 8), workers=1)
    assert "conv3" in result.report["floats"]
    samples = feeds(model, 8, seed=1)
    assert error_db(outputs(result.model, samples, False), outputs(result.model, samples)) > 90


# ---- accuracy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["Conv", "Gemm", "MatMul"])
def test_16_bits_gain_48_db_where_weights_are_exact(layer):
    model = on_grid(layer)
    samples = feeds(model, 8)
    reference = outputs(model, samples)
    eight, sixteen = (
        error_db(
            reference, outputs(quantize(model, {**WIDE, "activations": {"bits": bits}}, samples, workers=1).model, samples)
        )
        for bits in (8, 16)
    )
    assert 40 < sixteen - eight < 56  # 256 times smaller steps: 48.2 dB


@pytest.mark.parametrize("wide", [(8, 8), (16, 8), (8, 16), (16, 16)])
def test_exported_layers_compute_what_numpy_expects(wide):
    """Input -> Conv 1x1 -> Relu -> Conv 1x1, each activation rounded to its own width."""
    net = Net(["N", 5, 4, 4])
    x = net.conv(net.op("Relu", net.conv("x", 5, 8, 1)), 8, 6, 1)
    model = net.model(x)
    last = model.graph.output[0].name
    graph, plan, made = exported(model, lambda name: wide[0] if name == "x" else 16 if name == last else wide[1])
    feed = feeds(model, 4, seed=1)[0]
    first, last = graph.layers

    def layer(x, y):
        weight = weight_values(y, plan[y.weight])[:, :, 0, 0]
        return np.einsum("oi,nihw->nohw", weight.astype(float), x) + graph.constant(y.bias)[:, None, None]

    hidden = fake(np.maximum(layer(fake(feed["x"], plan["x"]), first), 0), plan[first.result])
    wanted = fake(layer(hidden, last), plan[last.result])
    step = float(plan[last.result].scale) + float(plan[first.result].scale)  # a value between two codes may go either way
    assert (plan["x"].bits, plan[first.result].bits) == wide
    assert np.abs(runtimes.session(made).run(None, feed)[0] - wanted).max() <= 2 * step


@pytest.mark.parametrize("method", ["percentile", "mse", "kl"])
def test_every_method_of_ranges_takes_16_bits(method):
    model = mobilenet()
    samples = feeds(model, 8)
    plain, chosen = (
        quantize(model, {**WIDE, "pass": [{"use": "ranges", "method": m}]}, samples, workers=1) for m in ("minmax", method)
    )
    if method != "percentile":  # which clips as it is told
        assert error_db(outputs(plain.model, samples), outputs(chosen.model, samples)) == pytest.approx(200)
    assert error_db(outputs(model, samples), outputs(chosen.model, samples)) > 30


@pytest.mark.parametrize("recipe", ["int8-rounded", "int4-storage", *slowly("int4-rounded", "int8-per-tensor")])
def test_recipes_take_16_bits(recipe):
    model = mobilenet()
    eight, sixteen = (
        quantize(model, recipe, feeds(model, 16), target="npu", settings=[f"activations.bits={bits}"], workers=1).model
        for bits in (8, 16)
    )
    samples = feeds(model, 8, seed=1)
    reference = outputs(model, samples)
    assert error_db(outputs(sixteen, samples, False), outputs(sixteen, samples)) > 130
    chance = 2 if recipe.startswith("int4") else 1  # learned codes of few bits come out one way or another
    assert error_db(reference, outputs(sixteen, samples)) > error_db(reference, outputs(eight, samples)) - chance


@pytest.mark.parametrize("block", ["channel", "tensor"])
def test_a_large_bias_beside_16_bit_inputs_costs_no_weight_its_scale(block):
    """500 / (s_x s_w) is beyond int32; with 8-bit inputs it is not."""
    net = Net(["N", 3, 8, 8])
    weight = net.rng.normal(size=(8, 8, 1, 1)) * 1e-3
    x = net.op("Conv", net.op("Relu", net.conv("x", 3, 8)), net.constant(weight), net.constant([500.0] + [0.1] * 7))
    model = net.model(x)
    result = quantize(model, {**WIDE, "weights": {"block": block}}, feeds(model, 8), workers=1)
    layer = load(model).layers[1]
    spec = result.plan[layer.weight]
    top = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) if block == "channel" else np.abs(weight).max()
    np.testing.assert_allclose(spec.scale, top / 127, rtol=1e-5)
    assert not any("widened" in note for note in result.report["notes"])
    codes = [numpy_helper.to_array(t) for t in result.model.graph.initializer if t.data_type == TensorProto.INT32]
    assert 2**29 < max(np.abs(c.astype(np.int64)).max() for c in codes) <= 2**30 + 2**10
    samples = feeds(model, 8, seed=1)
    assert error_db(outputs(result.model, samples, False), outputs(result.model, samples)) > 90


# ---- what is said -------------------------------------------------------------------------------------------------------


def test_the_summary_and_the_audit_tell_what_runs_in_float():
    model = resnet20()
    result = quantize(model, WIDE, feeds(model, 8), workers=1)
    assert "6/6 layers with 16-bit activations run in float" in result.summary
    assert all("16-bit" in row["why_float"] for row in result.report["layers"])
    assert all(layer.accumulator is None for layer in audit_model(result.model).layers)
    mixed = quantize(
        model, {"target": "npu", "layer": [{"position": "last", "activations": {"bits": 16}}]}, feeds(model, 8), workers=1
    )
    assert "5/5 Conv" in mixed.summary and "1/6 layers with 16-bit activations" in mixed.summary
    eight = quantize(model, {"target": "npu"}, feeds(model, 8), workers=1)
    assert "16-bit" not in eight.summary and set(eight.report["kernels"]) == {"QLinearConv", "QGemm"}


def test_the_audit_tells_of_8_bit_inputs_and_16_bit_outputs():
    net = Net(["N", 3, 8, 8])
    model = net.model(net.conv(net.op("Relu", net.conv("x", 3, 8)), 8, 4))
    hidden = load(model).layers[0].result
    _, _, made = exported(model, lambda name: 16 if name == hidden else 8)
    first, last = audit_model(made).layers
    assert "output is quantized to 16-bit" in first.why and "input" in last.why and "16-bit" in last.why


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "per-tensor", "storage"])
def test_other_targets_refuse_16_bits(target):
    model = mobilenet()
    with pytest.raises(OnnxqError, match=r"uint8 per tensor \(activations.bits = 8\), or float"):
        quantize(model, {"target": target, "activations": {"bits": 16}}, feeds(model, 2), workers=1)


def test_widths_between_are_refused_with_the_choices():
    model = mobilenet()
    with pytest.raises(OnnxqError, match=r"uint8 or uint16 per tensor \(activations.bits = 8 or 16\)"):
        quantize(model, {"target": "npu", "activations": {"bits": 12}}, feeds(model, 2), workers=1)
    graph = load(model)
    layer = graph.layers[0]
    plan = Plan({layer.input: QuantSpec(16, symmetric=True)})
    assert any("int16" in text for text in problems(replace(NPU, either=False), graph, plan, {}))
    assert not problems(NPU, graph, plan, {})


def test_the_opset_rises_only_for_what_needs_it():
    model = mobilenet()
    for settings, opset, ir in (([], 17, 8), (["activations.bits=16"], 21, 10)):
        result = quantize(model, "int8", feeds(model, 8), target="npu", settings=settings, workers=1)
        assert (result.model.opset_import[0].version, result.model.ir_version) == (opset, ir)
        assert any(f"opset 17 became {opset}" in note for note in result.report["notes"]) == (opset > 17)
