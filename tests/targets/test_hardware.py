"""What a target says about hardware, planning and export obey."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxq_plugins import OnnxqError, Rule, Target, hookimpl, quantize, runtimes
from onnxq_plugins.graph import load
from onnxq_plugins.graph.conform import conform
from onnxq_plugins.graph.lowering import lower_opset
from onnxq_plugins.graph.opsets import opset_of
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.recipe import parse
from onnxq_plugins.targets.misfits import misfits
from onnxq_plugins.targets.target import CHAIN
from onnxq_plugins.testing.bench import Bench
from onnxq_plugins.testing.models import outliers
from onnxq_plugins.testing.targets import TARGET_CHECKS
from tests.networks import feed_of, network
from tests.zoo import ZOO, cnn, feeds, grouped, mlp, mobilenet, resnet20, transformer, written_out

INT64 = onnx.TensorProto.INT64
NPU = Target(
    "acme.npu",
    "a chip",
    tuple(Rule(op, "int8", 8, (8,), ("tensor", "channel"), "int8") for op in ("Conv", "Gemm", "MatMul")),
    CHAIN,
    frozenset({"Conv", "Gemm", "MatMul"}),
    flatten=False,
)
WITHOUT_GEMM = frozenset(
    {
        *("Conv", "MatMul", "Add", "Relu", "Flatten", "GlobalAveragePool", "AveragePool", "MaxPool", "Reshape", "Transpose"),
        *("Mul", "Softmax", "ReduceMean", "Sub", "Pow", "Sqrt", "Div", "Tanh", "Erf", "Clip", "Concat", "Slice", "Pad"),
        *("Gather", "Squeeze", "HardSigmoid"),
    }
)


class Brings:
    def __init__(self, *targets):
        self.targets = list(targets)

    @hookimpl
    def onnxq_targets(self):
        return self.targets


def made(model, target=NPU, recipe=None, **options):
    table = {"pass": [{"use": "ranges"}], **(recipe or {})}
    table.setdefault("target", target.name)
    options = {"workers": 1, "check": False, **options}
    return quantize(model, table, feeds(model, 8), plugins=[Brings(target)], **options)


def zero_points(model):
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return [values[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]


def sqnr(model, result):
    samples = feeds(model, 8, seed=1)
    runs = [runtimes.outputs(runtimes.session(m, written=True), samples) for m in (model, result.model)]
    return worst_sqnr(*runs)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("build", [cnn, transformer, resnet20])
def test_codes_of_activations_have_the_sign_and_the_zero_point_of_the_hardware(build, signed, symmetric):
    target = replace(NPU, signed=signed, symmetric=symmetric)
    result = made(build(), target)
    zeros = zero_points(result.model)
    assert zeros and {z.dtype for z in zeros} == {np.dtype(np.int8 if signed else np.uint8)}
    if symmetric:
        assert {int(z) for z in zeros} == {0 if signed else 128}
    assert not misfits(target, result.model)
    assert misfits(replace(target, signed=not signed), result.model)
    assert sqnr(build(), result) > 25


def test_the_sign_of_codes_changes_no_value():
    plain, signed = (made(cnn(), replace(NPU, signed=sign)) for sign in (False, True))
    samples = feeds(cnn(), 4)
    runs = [runtimes.outputs(runtimes.session(r.model, optimize=False), samples) for r in (plain, signed)]
    np.testing.assert_allclose(runs[0][0], runs[1][0], atol=1e-6)


def test_what_does_not_fit_the_hardware_is_refused_with_the_setting():
    with pytest.raises(OnnxqError, match=r"it runs uint8 .*: set activations\.symmetric = false"):
        made(cnn(), NPU, {"activations": {"symmetric": True}})


@pytest.mark.parametrize("bias", ["int32", "float"])
def test_biases(bias):
    target = replace(NPU, bias=bias)
    result = made(cnn(), target)
    makers = {name: n for n in result.model.graph.node for name in n.output}
    convs = [n for n in result.model.graph.node if n.op_type == "Conv"]
    assert convs and all((n.input[2] in makers) == (bias == "int32") for n in convs)
    assert not misfits(target, result.model) and sqnr(cnn(), result) > 25


def test_channels_that_are_not_aligned_stay_float():
    result = made(cnn(), replace(NPU, aligned=4))
    for layer in result.graph.layers:
        fits = layer.channels % 4 == 0 and layer.shape[layer.in_axis] % 4 == 0
        assert (layer.weight in result.plan) == fits
        assert fits or "multiples of 4" in result.report.floats[layer.name]
    depthwise = made(mobilenet(), replace(NPU, aligned=4)).graph
    assert any(y.kind == "depthwise" for y in depthwise.layers)


@pytest.mark.parametrize("build", [cnn, mlp, transformer, written_out, grouped, outliers])
def test_a_missing_gemm_becomes_matmul_and_add_exactly(build):
    model = build()
    graph = conform(load(model, flatten=False), WITHOUT_GEMM)
    written = graph.model()
    onnx.checker.check_model(written, full_check=True)
    assert not any(n.op_type == "Gemm" for n in written.graph.node)
    runs = [runtimes.outputs(runtimes.session(m), feeds(model, 4)) for m in (model, written)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_other_missing_operators_are_told_in_one_sentence_with_their_numbers():
    with pytest.raises(OnnxqError, match=r"target 'acme\.npu' has no .*Tanh \(1\)") as caught:
        made(transformer(), replace(NPU, operators=WITHOUT_GEMM - {"Tanh"}))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("build", [mlp, resnet20])
def test_files_have_the_opsets_that_the_hardware_reads(build, opset):
    target = replace(NPU, opsets=(opset, opset))
    result = made(build(), target)
    assert opset_of(result.model) == opset and not misfits(target, result.model)
    onnx.checker.check_model(result.model, full_check=True)
    assert sqnr(build(), result) > 25


def test_codes_that_need_a_newer_opset_are_refused_before_anything_is_made():
    rules = tuple(replace(rule, weights=(4, 8), storage="int4") for rule in NPU.rules)
    with pytest.raises(OnnxqError, match=r"reads opset 13 at most, and codes of 4 or 16 bits"):
        made(cnn(), replace(NPU, rules=rules, opsets=(0, 13)), {"weights": {"bits": 4}})


REDUCED = network([("ReduceMean", ["x", "axes"], ["y"], {"keepdims": 0})], [2, 3, 4], {"axes": np.array([1])}, opset=18)
SPLIT = network(
    [("Split", ["x"], ["a", "b"], {"num_outputs": 2, "axis": 1}), ("Add", ["a", "b"], ["y"], {})], [2, 4], {}, opset=18
)
LATER = network(
    [("Reshape", ["x", "s"], ["z"], {"allowzero": 0}), ("Relu", ["z"], ["y"], {})], [2, 4], {"s": np.array([4, 2])}
)
NORMAL = network([("LayerNormalization", ["x", "g"], ["y"], {})], [2, 4], {"g": (4,)})


@pytest.mark.parametrize("model", [REDUCED, SPLIT, LATER])
def test_lowering_keeps_the_function(model):
    lowered = onnx.ModelProto.FromString(model.SerializeToString())
    lower_opset(lowered, 13, "t")
    assert opset_of(lowered) == 13
    runs = [runtimes.outputs(runtimes.session(m), [feed_of(model)]) for m in (model, lowered)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])


def test_what_an_older_opset_lacks_is_told_with_numbers():
    model = network(
        [("BitwiseNot", ["x"], ["z"], {}), ("BitwiseNot", ["z"], ["y"], {})], [2], {}, onnx.TensorProto.INT64, opset=18
    )
    with pytest.raises(OnnxqError, match=r"reads opset 13 at most, .*BitwiseNot \(2\)"):
        lower_opset(model, 13, "t")
    lower_opset(NORMAL, 13, "t")  # the exporter writes it out


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "mlp", "transformer", "resnet20", "odd_channels"])
def test_int8_works_without_a_recipe_of_its_own(name):
    target = replace(NPU, signed=True, symmetric=True, rules=tuple(replace(r, granularity=("tensor",)) for r in NPU.rules))
    model = ZOO[name]()
    result = quantize(model, "int8", feeds(model, 8), target=target.name, plugins=[Brings(target)], workers=1, check=False)
    assert result.plan and not misfits(target, result.model)
    assert any("one scale for the weight" in note for note in result.report.notes)


def test_a_model_that_does_not_fit_is_refused_in_one_sentence():
    rules = tuple(replace(rule, weights=(4,)) for rule in NPU.rules)
    with pytest.raises(OnnxqError, match=r"cannot run Conv .* and Gemm .*") as caught:
        made(cnn(), replace(NPU, rules=rules))
    assert len(caught.value.problems) == 1


# ---- settings -------------------------------------------------------------------------------------------------------------


def configured(target):
    return replace(target, max_code=64 if target.settings["soc"] < 3 else 127)


CHIP = replace(NPU, settings={"soc": 1, "mode": "fast"}, configure=configured)


def test_recipes_set_what_targets_have():
    result = made(cnn(), CHIP, {"target": {"use": "acme.npu", "acme": {"soc": 3}}})
    assert result.target.settings == {"soc": 3, "mode": "fast"} and result.target.max_code == 127
    assert result.report.recipe["target"] == {"use": "acme.npu", "acme": {"soc": 3}}
    again = parse({**result.report.recipe, "pass": []}, {})
    assert again.target == "acme.npu" and again.vendors == {"acme": {"soc": 3}}
    assert made(cnn(), CHIP).target is CHIP


def test_settings_from_the_command_line():
    result = made(cnn(), CHIP, settings=["target.acme.soc=3", "target.acme.mode=slow"])
    assert result.target.settings == {"soc": 3, "mode": "slow"}
    assert made(cnn(), CHIP, settings=["target.acme.soc=3", "target=ort-cpu"]).target.name == "ort-cpu"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"use": "acme.npu", "acme": {"sock": 3}}, r"has no setting 'sock'; .*did you mean 'soc'"),
        ({"use": "acme.npu", "acme": {"soc": "three"}}, r"soc = 'three' must be of type int, such as 1"),
        ({"use": "acme.npu", "soc": 3}, r"'soc' must be a table of settings by vendor"),
    ],
)
def test_wrong_settings_are_told(table, words):
    with pytest.raises(OnnxqError, match=words):
        made(cnn(), CHIP, {"target": table})


# ---- what onnxruntime thinks of it ----------------------------------------------------------------------------------------


def test_onnxruntimes_opinion_about_a_foreign_file_is_a_note(monkeypatch):
    def refuses(*_, **__):
        raise OnnxqError("onnxruntime cannot load the model: no.")

    monkeypatch.setattr("onnxq_plugins.report.summary.audit_model", refuses)
    result = made(cnn())
    assert any("onnxruntime does not take it" in note for note in result.report.notes)
    assert "2/2 Conv; 1/1 Gemm quantized for acme.npu" in result.summary
    with pytest.raises(OnnxqError, match="no"):
        made(cnn(), replace(NPU, here=True))


# ---- the kit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", TARGET_CHECKS)
def test_a_sound_target_conforms(check):
    declared = {"operators": WITHOUT_GEMM, "opsets": (13, 13), "rules": NPU.rules[::2], "integer_ops": frozenset({"Add"})}
    target = replace(NPU, signed=True, symmetric=True, **declared)
    TARGET_CHECKS[check](target, Bench({}, (Brings(target),)))


WRONG = [
    ("declaration", {"name": "npu"}, "with a vendor in front"),
    ("declaration", {"doc": " "}, "has no doc"),
    ("declaration", {"rules": ()}, "runs no layer"),
    ("declaration", {"opsets": (14, 13)}, "the lowest comes first"),
    ("declaration", {"opsets": (0, 11)}, "need 13"),
    ("declaration", {"operators": frozenset({"Conv"})}, "not among its operators"),
    ("declaration", {"rules": (replace(NPU.rules[0], op="Relu"),)}, "no layers of that operator"),
    ("declaration", {"rules": (replace(NPU.rules[0], activations=7),)}, "must be 0, 4, 8 or 16"),
    ("recipe", {"aligned": 1000}, "quantizes no layer of"),
    ("files", {"operators": frozenset({"Conv"})}, "refuses every model"),
]


@pytest.mark.parametrize(("check", "changes", "words"), WRONG)
def test_a_wrong_target_fails_in_one_sentence(check, changes, words):
    target = replace(NPU, **changes)
    with pytest.raises(AssertionError) as caught:
        TARGET_CHECKS[f"check_target_{check}"](target, Bench({}, (Brings(target),)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_what_the_target_declares_are_found(monkeypatch):
    target = replace(NPU, signed=True, symmetric=True)
    monkeypatch.setattr(Target, "offset", lambda self, spec: 3)
    with pytest.raises(AssertionError, match="has a zero point of 3"):
        TARGET_CHECKS["check_target_files"](target, Bench({"data": {}}, (Brings(target),)))
    with pytest.raises(AssertionError, match="dB only in onnxruntime"):
        monkeypatch.setattr(Target, "offset", lambda self, spec: 90)
        TARGET_CHECKS["check_target_values"](target, Bench({"data": {}}, (Brings(target),)))


def test_a_single_input_channel_is_not_aligned():
    model = network(
        [("Conv", ["x", "w"], ["h"], {}), ("Conv", ["h", "v"], ["y"], {})],
        [1, 1, 9, 9],
        {"w": (8, 1, 3, 3), "v": (8, 8, 3, 3)},
    )
    result = made(model, replace(NPU, aligned=8))
    assert [layer.name for layer in result.graph.layers if layer.weight in result.plan] == [result.graph.layers[1].name]
    assert not misfits(replace(NPU, aligned=8), result.model)
