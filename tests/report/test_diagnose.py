"""A network with one planted defect: the diagnosis names its layer first, with the cause, and the remedy helps."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import tomllib

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxq_plugins as onnxq
from onnxq_plugins import OnnxqError, cli, measure, plugins, runtimes
from onnxq_plugins.data import open_data
from onnxq_plugins.export.qdq import export
from onnxq_plugins.job import LayerRule
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.passes import AbsorbBias, Equalize, Round
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.recipe import load_recipe, parse, to_toml
from onnxq_plugins.report.attempts import Attempt, promising
from onnxq_plugins.report.causes import Cause
from onnxq_plugins.report.diagnosis import Diagnosis, diagnose
from onnxq_plugins.report.layer_errors import Own, accumulated_errors, own_errors
from onnxq_plugins.report.remedies import Remedy, quality
from onnxq_plugins.report.rows import LayerError
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Plan
from tests.zoo import Net, conv_transpose, feeds, grouped, inception, mlp, mobilenet, resnet20, transformer

INT8 = {"pass": [{"use": "ranges"}]}


def quantized(model, recipe=INT8, n=16, **options) -> onnxq.Result:
    return onnxq.quantize(model, recipe, feeds(model, n), workers=1, **options)


def chain(plant=lambda net, x: x, seed: int = 0) -> onnx.ModelProto:
    """Four plain layers of 16 channels, and what is planted behind the second."""
    net = Net(["N", 3, 8, 8], seed)
    x = net.op("Relu", net.conv("x", 3, 16))
    x = plant(net, net.op("Relu", net.conv(x, 16, 16)))
    x = net.op("Relu", net.conv(x, 16, 16))
    return net.model(net.gemm(net.op("Flatten", x), 16 * 64, 10), opset=21)


def changed(model: onnx.ModelProto, layer: str, change) -> onnx.ModelProto:
    """The model with another weight and bias in one layer."""
    node = next(n for n in model.graph.node if n.name == layer)
    for name, made in zip(
        node.input[1:],
        change(*(numpy_helper.to_array(t) for name in node.input[1:] for t in model.graph.initializer if t.name == name)),
        strict=True,
    ):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(made, np.float32), name))
    return model


def helped(result: onnxq.Result, remedy: Remedy, found: Diagnosis) -> float:
    """dB that a remedy gains."""
    made = result.again(remedy.on(result.recipe), settings=remedy.settings)
    samples = result.data.spread(8)
    reference, answers = (runtimes.outputs(runtimes.session(m), samples) for m in (made.float_model, made.model))
    return worst_sqnr(reference, answers) - found.sqnr


def first(found: Diagnosis) -> tuple[str, str]:
    return found.layers[0].name, found.layers[0].causes[0].kind


# ---- planted defects ------------------------------------------------------------------------------------------------------


def test_a_layer_of_two_bits():
    result = quantized(chain(), {**INT8, "layer": [{"match": "conv4", "weights": {"bits": 2}}]})
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv4", "few-bits")
    assert "2 bits" in diagnosis.describe(diagnosis.layers[0])
    remedy = diagnosis.layers[0].remedies[0]
    assert "weights.bits = 8" in remedy.typed and helped(result, remedy, diagnosis) > 6


def test_an_outlier_channel_beside_one_scale():
    def loud(weight, bias):  # a channel that never gets through its Relu, so that nothing but its weight is large
        weight = weight.copy()
        weight[5] = -80 * np.abs(weight[5])
        return weight, bias

    result = quantized(changed(chain(), "conv4", loud), {**INT8, "weights": {"block": "tensor"}})
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv4", "outlier-weights")
    assert "channel 5" in diagnosis.layers[0].causes[0].text
    remedy = diagnosis.layers[0].remedies[0]
    assert 'weights.block = "channel"' in remedy.typed and helped(result, remedy, diagnosis) > 6


def test_without_scales_per_channel_another_remedy():
    def loud(weight, bias):
        weight = weight.copy()
        weight[5] = -80 * np.abs(weight[5])
        return weight, bias

    recipe = {**INT8, "target": "per-tensor", "weights": {"block": "tensor"}}
    result = quantized(changed(chain(), "conv4", loud), recipe)
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv4", "outlier-weights")
    remedy = diagnosis.layers[0].remedies[0]
    assert 'use = "shift-equalize"' in remedy.typed and helped(result, remedy, diagnosis) > 6


def test_scales_that_differ_a_little_are_no_outliers():
    """One scale for channels of many sizes: no single one is to blame."""

    def graded(weight, bias):
        return weight * np.where(np.arange(len(weight)) < 6, 2, 0.1)[:, None, None, None], bias

    diagnosis = diagnose(quantized(changed(chain(), "conv4", graded), {**INT8, "weights": {"block": "tensor"}}))
    layer = next(y for y in diagnosis.layers if y.name == "conv4")
    kinds = {cause.kind: cause.text for cause in layer.causes}
    assert "outlier-weights" not in kinds and "dB less error" in kinds["uneven-weights"]
    assert any('weights.block = "channel"' in remedy.typed for remedy in layer.remedies)


def test_channels_that_count_most_and_reach_least():
    """Most channels hold the range, but those with the largest weights do not."""

    def quiet(weight, bias):
        weight = weight.copy()
        weight[3] /= 300
        return weight, bias * 0

    def loud(weight, bias):
        weight = weight.copy()
        weight[3] *= 300
        return weight, bias

    model = chain(lambda net, x: net.op("Relu", net.conv(x, 16, 16, groups=16)))
    recipe = {"pass": [{"use": "ranges"}, {"use": "bias-correct"}]}
    diagnosis = diagnose(quantized(changed(changed(model, "conv2", quiet), "conv4", loud), recipe))
    cause = next(y for y in diagnosis.layers if y.name == "conv4").causes[0]
    assert cause.kind == "uneven-channels" and "of the 16 channels" not in cause.text


def test_a_clipped_activation():
    def sparse(weight, bias):  # few values get through the Relu: a percentile leaves most of them out
        return weight, np.full_like(bias, -2.6)

    result = quantized(
        changed(chain(), "conv2", sparse),
        {"pass": [{"use": "ranges", "method": "percentile", "percentile": 99.5, "judged": False}]},
    )
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv4", "clipped")  # it reads what is clipped
    remedy = diagnosis.layers[0].remedies[0]
    assert remedy.settings[0].startswith("ranges.method=") and helped(result, remedy, diagnosis) > 3


def test_an_activation_with_an_outlier_channel():
    def loud(weight, bias):
        weight = weight.copy()
        weight[3] = 10 * np.abs(weight[3])
        return weight, bias * 0

    def quiet(weight, bias):  # so that the loud channel counts no more than the others
        weight = weight.copy()
        weight[:, 3] /= 30
        return weight, bias

    recipe = {"pass": [{"use": "ranges"}, {"use": "bias-correct"}]}
    result = quantized(changed(changed(chain(), "conv2", loud), "conv4", quiet), recipe)
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv4", "outlier-channels")
    assert "1 of the 16 channels" in diagnosis.layers[0].causes[0].text
    remedy = diagnosis.layers[0].remedies[0]
    assert 'by = "activations"' in remedy.typed and helped(result, remedy, diagnosis) > 6


def test_an_input_with_an_outlier_channel():
    model = chain()
    data = [{"x": f["x"] * np.array([1, 50, 1], np.float32)[:, None, None]} for f in feeds(model, 16)]
    model = changed(model, "conv0", lambda w, b: (w / np.array([1, 50, 1])[:, None, None], b))
    result = onnxq.quantize(model, INT8, data, workers=1)
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv0", "outlier-channels")
    remedy = diagnosis.layers[0].remedies[0]
    assert 'use = "scale-inputs"' in remedy.typed and helped(result, remedy, diagnosis) > 3


def test_a_heavy_tail():
    data = [
        {"x": f["x"] * np.where(np.random.default_rng(n).random(f["x"].shape) < 0.005, 30, 0.3).astype(np.float32)}
        for n, f in enumerate(feeds(chain(), 16))
    ]
    diagnosis = diagnose(onnxq.quantize(chain(), INT8, data, workers=1))
    layer = next(y for y in diagnosis.layers if y.name == "conv0")
    assert "heavy-tail" in [c.kind for c in layer.causes] and layer.own.input < layer.own.weight


def test_what_an_activation_reads_is_named_by_it():
    def silu(net, x):  # values far below 0, of which it makes nearly 0
        x = net.op("Mul", x, net.constant(np.where(np.arange(16) % 8, 1, -60).astype(np.float32).reshape(1, 16, 1, 1)))
        return net.op("Mul", x, net.op("Sigmoid", x))

    recipe = {"target": "litert", "pass": [{"use": "ranges"}]}
    found = diagnose(quantized(chain(silu), recipe, check=False))
    known = [cause for row in found.layers for cause in row.causes if "input of SiLU" in cause.text]
    assert known
    remedies = [remedy for cause in known for remedy in cause.remedies]
    assert any(step.name == "activation-ranges" for remedy in remedies for step in remedy.passes)


def test_an_error_that_is_the_same_everywhere():
    """Weights that all round the same way, on inputs that are never negative."""

    def skewed(weight, bias):
        made = np.rint(weight * 3) / 3 + 0.07
        made[:, 0, 0, 0] = 7  # codes of 1 / 18
        return made, bias

    result = quantized(changed(chain(), "conv4", skewed))
    diagnosis = diagnose(result)
    assert first(diagnosis) == ("conv4", "mean-error")
    remedy = diagnosis.layers[0].causes[0].remedies[0]
    assert 'use = "bias-correct"' in remedy.typed and helped(result, remedy, diagnosis) > 1


def test_an_operator_without_integer_kernel():
    def transposed(net, x):
        return net.op("ConvTranspose", x, net.weight(16, 16, 3, 3, fan_in=144), net.weight(16), pads=[1] * 4)

    result = quantized(chain(transposed))
    diagnosis = diagnose(result)
    assert [f.name for f in diagnosis.floats] == ["convtranspose4"]
    assert "ConvTranspose" in diagnosis.floats[0].why and not diagnosis.floats[0].remedies
    assert 0.2 < diagnosis.floats[0].work < 0.6
    own = next(y for y in diagnosis.layers if y.name == "convtranspose4").own
    assert own is not None and own.weight < own.input  # stored in 8 bits, reads float


@pytest.mark.parametrize(
    "recipe",
    [
        {**INT8, "layer": [{"match": "conv4", "quantize": False}]},
        {**INT8, "layer": [{"match": "conv?", "weights": {"bits": 32}}]},
        {**INT8, "target": "npu", "layer": [{"match": "conv4", "activations": {"bits": 16}}]},
        {**INT8, "target": "npu", "activations": {"bits": 16}},
    ],
    ids=["float", "32", "16-bit", "all 16-bit"],
)
def test_what_the_recipe_says_on_purpose_is_not_undone(recipe):
    diagnosis = diagnose(quantized(chain(), recipe))
    (slow,) = [f for f in diagnosis.floats if f.name == "conv4"]
    assert not slow.remedies
    typed = [r.typed for y in diagnosis.layers for r in y.remedies]
    assert not any('match = "conv4"' in text for text in typed)  # it is float already, or 16 bits


def is_float(model: onnx.ModelProto, tensor: str) -> bool:
    """No quantizer reads a tensor, and no kernel gets it from codes."""
    return tensor in {o for n in model.graph.node for o in n.output if n.op_type != "DequantizeLinear"} and not any(
        tensor in n.input for n in model.graph.node if n.op_type == "QuantizeLinear"
    )


@pytest.mark.parametrize("make", [chain, mobilenet, transformer], ids=lambda f: f.__name__)
def test_an_activation_in_float_is_float(make):
    """Where rounding an activation is the trouble, the rules name all layers that must be float for it not to be rounded:
    those that write it, too."""
    result = quantized(make(), n=4)
    found, tried = diagnose(result, samples=2), 0
    for layer in found.layers[:4]:
        ways = [r for r in layer.remedies if "so that nothing rounds" in r.text]
        for remedy in ways:
            made = result.again(remedy.on(result.recipe))
            root = made.graph.root(layer.input)
            assert all(made.graph.is_constant(name) or made.graph.root(name) != root for name in made.plan)
            if layer.input not in made.graph.inputs:
                assert is_float(made.model, made.names[layer.input]), remedy.typed
            tried += 1
    assert tried


def test_the_writer_of_a_rounded_tensor_is_named():
    """An activation whose error is large: its reader alone in float gains nothing, the writer and the reader do."""
    result = quantized(chain(), {**INT8, "layer": [{"match": "conv4", "quantize": False}]})
    diagnosis = diagnose(result)
    tensor = next(y for y in diagnosis.layers if y.name == "tensor t3")
    remedy = tensor.remedies[-1]
    assert [rule.match for rule in remedy.layers] == ["conv2"]  # its reader is float by the recipe
    made = result.again(remedy.on(result.recipe))
    assert is_float(made.model, made.names[tensor.input])


@pytest.mark.parametrize("target", ["ort-cpu", "npu", "per-tensor", "storage"])
def test_what_is_typed_is_options_or_toml(target):
    """Never a mixture: a block can be put into a file, an option into a command."""
    weights = {"block": "tensor", "bits": 8} if target == "per-tensor" else {"bits": 4}
    for ranges in ({"use": "ranges"}, {"use": "ranges", "method": "percentile", "percentile": 98}):
        recipe = {"pass": [ranges], "weights": weights, "target": target}
        diagnosis = diagnose(quantized(chain(), recipe, 4), samples=2, alone=0)
        typed = {r.typed for y in (*diagnosis.layers, *diagnosis.floats) for r in y.remedies}
        assert typed
        for text in typed:
            if text.startswith("--"):
                words = shlex.split(text)
                assert words[::2] == ["--set"] * (len(words) // 2) and all("=" in word for word in words[1::2])
                load_recipe("int8", plugins.find_plugins().passes, words[1::2])
            else:
                parse(tomllib.loads(text), plugins.find_plugins().passes)


def test_a_remedy_belongs_in_one_place():
    with pytest.raises(ValueError, match="not both"):
        Remedy("", ("target=npu",), layers=(LayerRule(),))


def test_layers_in_float_at_load_get_a_target():
    diagnosis = diagnose(quantized(chain(), {**INT8, "target": "storage"}))
    assert {f.remedies[0].settings for f in diagnosis.floats} == {("target=ort-cpu",)}


# ---- what is measured -----------------------------------------------------------------------------------------------------

MODELS = {f.__name__: f for f in (mobilenet, inception, grouped, mlp, transformer, resnet20, conv_transpose)}


@pytest.fixture(scope="module", params=MODELS)
def result(request) -> onnxq.Result:
    return quantized(MODELS[request.param](), "int8", 4)


def test_accumulated_errors_are_those_of_the_whole_network(result):
    """The last layer's output is the network's output."""
    samples = result.data.spread(4)
    output = result.graph.outputs[0]
    found = accumulated_errors(result.graph, result.model, [output], samples)[output]
    reference, answers = (runtimes.outputs(runtimes.session(m), samples) for m in (result.float_model, result.model))
    assert found == pytest.approx(measure.sqnr(reference[0], answers[0]), abs=0.2)


def test_own_errors_agree_with_the_exporter(result):
    """A layer's own error at its output is that of the network exported with this layer quantized alone."""
    samples = result.data.spread(4)
    found = own_errors(Planned(result.graph, result.plan, result.target), samples)
    planned = [y for y in result.graph.layers if y.weight in result.plan]
    assert set(found) == {y.name for y in planned}
    for layer in planned[:: max(1, len(planned) // 3)]:
        model = export(result.graph, Plan({layer.weight: result.plan[layer.weight]}), ALONE)
        measured = accumulated_errors(result.graph, model, [layer.result], samples)[layer.result]
        assert found[layer.name].weight == pytest.approx(measured, abs=0.3)
        assert found[layer.name].both <= max(found[layer.name].weight, found[layer.name].input) + 1
        assert 0 <= found[layer.name].mean_share <= 1


def test_float_layers_and_plain_values(result):
    diagnosis = diagnose(result, samples=2)
    assert {y.name for y in diagnosis.layers if not y.name.startswith("tensor ")} == {y.name for y in result.graph.layers}
    planned = {name for name in result.plan if not result.graph.is_constant(name)}
    assert set(diagnosis.activations) == planned
    assert planned <= {y.input for y in diagnosis.layers}  # each activation is somebody's
    assert planned <= {y.input for y in diagnosis.layers}
    shares = [y.share for y in diagnosis.layers if y.share is not None]
    assert shares == sorted(shares, reverse=True)
    table = diagnosis.to_dict()
    assert json.loads(json.dumps(table)) == table


def test_one_layer_alone_holds_all_of_the_error():
    recipe = {**INT8, "layer": [{"quantize": False}, {"match": "gemm7", "quantize": True}]}
    result = quantized(chain(), recipe, 4)
    diagnosis = diagnose(result)
    shares = {y.name: y.share for y in diagnosis.layers if y.share is not None}
    assert set(shares) == {"gemm7"} and shares["gemm7"] == pytest.approx(1)
    assert diagnosis.layers[0].lone == pytest.approx(1)
    assert diagnosis.layers[0].own.both == pytest.approx(diagnosis.sqnr, abs=0.5)
    assert all(y.own is None for y in diagnosis.layers[1:])


def test_only_so_many_alone():
    diagnosis = diagnose(quantized(chain()), alone=2, samples=2)
    assert [y.alone is not None for y in diagnosis.layers[:3]] == [True, True, False]
    assert all(y.share is not None for y in diagnosis.layers) and not diagnosis.interaction


def test_remedies_are_tried_when_asked():
    result = quantized(chain(), {**INT8, "layer": [{"match": "conv4", "weights": {"bits": 2}}]})
    untried, found = diagnose(result, samples=4), diagnose(result, samples=4, attempts=1)
    assert not untried.tried and any("none was tried" in note for note in untried.notes)
    (tried,) = found.tried
    assert tried.layer == "conv4" and tried.sqnr > found.sqnr + 6
    assert found.to_dict()["tried"][0]["sqnr"] == round(tried.sqnr, 2)


def test_the_most_promising_remedies_are_tried_first():
    result = quantized(chain(), {**INT8, "layer": [{"match": "conv4", "weights": {"bits": 3}}]})
    diagnosis = diagnose(result, samples=2, attempts=3)
    assert [t.remedy.typed for t in diagnosis.tried] == [remedy.typed for _, remedy in diagnosis.promising[:3]]
    assert diagnosis.promising[0][0] == "conv4" and len({t.remedy.typed for t in diagnosis.tried}) == 3
    refused = diagnose(dataclasses.replace(result, again=refuse), samples=2, attempts=1).tried[0]
    assert refused.sqnr is None and refused.verdict == "refused: no."


def test_a_remedy_for_many_layers_comes_before_one_for_the_worst():
    def layer(name, share, *causes):
        return LayerError(name, "Conv", name, "x", 20.0, Own(20.0, 20.0, 20.0, 0.0), 20.0, share, causes)

    common, own, later = (Remedy(text, settings=(text,)) for text in ("common=1", "own=1", "later=1"))
    rows = [
        layer("a", 0.4, Cause("rounding", "", 10.0, (own, later))),
        layer("b", 0.35, Cause("rounding", "", 10.0, (common,))),
        layer("c", 0.3, Cause("rounding", "", 10.0, (common,))),
        layer("d", -0.05, Cause("rounding", "", 10.0, (Remedy("none=1", settings=("none=1",)),))),
    ]
    found = promising(rows)
    assert [remedy.text for _, remedy in found] == ["common=1", "own=1", "later=1", "none=1"]
    assert [name for name, _ in found] == ["b", "a", "a", "d"]
    weak = layer("e", 0.5, Cause("rounding", "", 0.5, (Remedy("weak=1", settings=("weak=1",)),)))
    assert next(remedy.text for _, remedy in promising([weak, *rows])) == "common=1"


def test_the_smallest_part_in_float_is_asked_for_by_steps():
    recipe = load_recipe("int8", plugins.find_plugins().passes)
    (remedy,) = quality(12.0, recipe)
    assert remedy.settings == ("quality.sqnr=20", "quality.below=20")
    asked = load_recipe("int8", plugins.find_plugins().passes, remedy.settings)
    assert asked.quality.asked and not quality(12.0, asked)
    assert quality(21.0, asked)[0].settings[0] == "quality.sqnr=25" and not quality(45.0, asked)
    model = chain()
    result = quantized(model, {**INT8, "weights": {"bits": 3}})
    found = diagnose(result, samples=4, alone=0)
    assert found.overall == tuple(quality(found.written, result.recipe))
    assert found.written < 25 and helped(result, found.overall[0], found) > 2


def test_channels_that_lie_apart_are_brought_to_the_middle():
    """Behind a linear layer whose channels have unlike means: the grid has room for all of them, and each uses a part."""

    def offset(weight, bias):
        return weight * 0.2, np.linspace(-9, 9, len(bias))

    def linear(net, x):
        return net.op("Relu", net.conv(net.conv(x, 16, 16), 16, 16, k=1))

    result = quantized(changed(chain(linear), "conv4", offset), {"pass": [{"use": "ranges"}, {"use": "bias-correct"}]})
    diagnosis = diagnose(result)
    row = next(y for y in diagnosis.layers if y.name == "conv5")
    (cause,) = [cause for cause in row.causes if cause.kind == "offset-channels"]
    assert 'use = "centre"' in cause.remedies[0].typed and "lie apart" in cause.text
    assert helped(result, cause.remedies[0], diagnosis) > 2
    again = result.again(cause.remedies[0].on(result.recipe))
    typed = [remedy.typed for y in diagnose(again, samples=2, alone=0).layers for remedy in y.remedies]
    assert not any('use = "centre"' in text for text in typed)  # a recipe that has the pass is not offered it


def test_few_large_channels_that_a_float_operator_writes_can_stay_float():
    net = Net(["N", 32])
    x = net.gelu_erf(net.linear("x", 32, 64))
    scale = np.ones(64)
    scale[[3, 40]] = 60
    x = net.op("Max", net.op("Mul", x, net.constant(scale)), net.constant(-1000.0))  # else the layer has the factors
    model = net.model(net.linear(x, 64, 16))
    result = quantized(model, {"pass": [{"use": "ranges"}, {"use": "bias-correct"}]})
    diagnosis = diagnose(result)
    remedies = [remedy for y in diagnosis.layers for remedy in y.remedies if 'use = "split-outliers"' in remedy.typed]
    assert remedies
    changed = remedies[0].on(result.recipe)
    assert [step.name for step in changed.passes] == ["split-outliers", "ranges", "bias-correct"]
    made = result.again(changed)
    typed = [r.settings for y in diagnose(made, samples=2, alone=0).layers for r in y.remedies if r.settings]
    assert all("split-outliers.gain=1" in settings for settings in typed if "outliers" in settings[0])


def test_names_of_remedies():
    rules = tuple(LayerRule(match=name, quantize=False) for name in ("a", "b", "c"))
    assert Remedy("", passes=(Equalize(by="activations"),)).name == "equalize by=activations"
    assert Remedy("", settings=("ranges.method=mse",)).name == "ranges.method=mse"
    assert Remedy("", layers=rules).name == "a in float, b in float, 1 more"
    assert Remedy("", layers=(LayerRule(match="a", weights={"bits": 8}),)).name == "a weights.bits=8"


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ([0.05, 0.05, 0.06], "no clear difference"),
        ([0.3, 0.4, 0.2], "helps: +0.30 dB +- 0.06, 30.0 -> 30.3"),
        ([-0.3, -0.4, -0.2], "harms: -0.30 dB +- 0.06, 30.0 -> 29.7"),
        ([3.0, -2.5, 0.4], "no clear difference: +0.30 dB +- 1.59"),
        ([5.0], "no clear difference: +5.00 dB, 30.0"),
    ],
)
def test_a_remedy_helps_if_its_gain_is_above_its_standard_error(gains, word):
    before = np.full(len(gains), 30.0)
    assert Attempt("a", Remedy(""), before, before + gains, 30.0).verdict.startswith(word)


def test_remedies_are_judged_on_samples_that_no_codes_are_learned_on():
    result = quantized(chain(), {**INT8, "layer": [{"match": "conv4", "weights": {"bits": 2}}]}, n=16)
    found = diagnose(result, samples=2, alone=0, attempts=1)
    assert found.where == "2 of the calibration samples" and found.samples == 2
    assert found.tried_on == "4 of the calibration samples, which no codes are learned on"
    assert len(found.tried[0].before) == len(found.tried[0].after) == 4
    given = diagnose(result, feeds(chain(), 3, seed=1), samples=2, alone=0, attempts=1)
    assert given.where == "2 of the given samples" and given.tried_on == "3 of the given samples"


def test_no_bar_for_nothing():
    """A progress bar appears only where there is something to try."""
    shown: list[str] = []

    def track(items, what, total=None):
        shown.append(what)
        return items

    diagnose(quantized(chain(), n=2), samples=2, track=track)
    assert "trying remedies" not in shown


def refuse(recipe, settings=()):
    raise OnnxqError("no.")


def test_no_samples():
    result = onnxq.quantize(mlp(), {"activations": {"bits": 32}, "weights": {"bits": 4, "block": 16}})
    with pytest.raises(OnnxqError, match="there are none; give some"):
        diagnose(result)
    given = open_data(feeds(mlp(), 3), result_inputs(result))
    assert diagnose(result, given).samples == 3
    assert diagnose(result, feeds(mlp(), 3)).samples == 3


def result_inputs(result):
    from onnxq_plugins.data import graph_inputs

    return graph_inputs(result.graph)


# ---- remedies as text -----------------------------------------------------------------------------------------------------


def test_the_printed_remedy_is_the_applied_remedy():
    """The lines of a remedy, appended to a recipe's file, make the recipe that `on` returns."""
    known = plugins.find_plugins().passes
    rule = LayerRule(match="a[[]0]*", weights={"bits": 4, "sub_block": [1, 16]})
    remedy = Remedy("", passes=(AbsorbBias(),), layers=(rule,))
    recipe = load_recipe("int8", known)
    changed = remedy.on(recipe)
    file = parse(tomllib.loads(f"{to_toml(recipe.to_dict())}\n{remedy.typed}"), known)
    assert file.layers == changed.layers and set(map(repr, file.passes)) == set(map(repr, changed.passes))
    names = [step.name for step in changed.passes]
    at = names.index("absorb-bias")
    assert names[:at] + names[at + 1 :] == [step.name for step in recipe.passes]
    assert all(step.stage == "rewrite" for step in changed.passes[:at]) and changed.passes[at + 1].stage != "rewrite"
    solved = [step.name for step in Remedy("", passes=(Round(),)).on(recipe).passes]
    assert solved[-2:] == ["round", "bias-correct"]


def test_a_rule_matches_one_layer_whatever_its_name():
    from fnmatch import fnmatchcase

    from onnxq_plugins.report.remedies import layer_rule

    for name in ("a*", "conv[1]", "x?y", "plain/conv"):
        match = layer_rule(name, quantize=False).match
        other = name.replace("*", "bc").replace("?", "z").replace("[1]", "1").replace("plain", "any")
        assert fnmatchcase(name, match) and not fnmatchcase(other, match)


@pytest.mark.parametrize("name", ["int8", "int4-storage", "sub-layer", "mixed", "int8-data-free"])
def test_recipes_as_files(name):
    known = plugins.find_plugins().passes
    recipe = load_recipe(name, known)
    assert parse(tomllib.loads(to_toml(recipe.to_dict())), known) == parse(recipe.to_dict(), known)


# ---- the command ----------------------------------------------------------------------------------------------------------


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(chain(), "model.onnx")
    np.savez("data.npz", x=np.concatenate([f["x"] for f in feeds(chain(), 6)]))
    before = sorted(p.name for p in tmp_path.iterdir())

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["onnxq", "diagnose", "model.onnx", "--data", "data.npz", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        return capsys.readouterr().out

    table = json.loads(run("--json"))
    assert {y["name"] for y in table["layers"]} >= {"conv0", "conv2", "conv4"}
    text = run("--set", "weights.bits=4", "--try", "1")
    assert "few-bits" in text and "weights.bits = 8" in text and "dB at the outputs" in text
    assert "Tried, judged on 6 of the calibration samples" in text
    assert "helps: +" in text and "-r my.toml" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_several_layers_have_in_common_is_said_once(monkeypatch, capsys):
    """Remedies of the same words, and layers that are float for one reason."""
    from onnxq_plugins.cli import inspection

    model = chain()
    names = [y.name for y in onnxq.load(model).layers]
    rules = [{"match": name, "quantize": False} for name in names[1:3]]
    found = diagnose(quantized(model, {**INT8, "weights": {"bits": 3}, "layer": rules}), samples=4)
    inspection._show_diagnosis(found, "summary", False)
    text = capsys.readouterr().out
    told = [layer for layer in found.explained if round(100 * layer.share)]  # of others there is nothing to gain
    remedies = [remedy for layer in told for remedy in layer.remedies[:3]]
    assert len({remedy.text for remedy in remedies}) < len(remedies)
    for remedy in remedies:
        assert text.count(f"  {remedy.text} (") == 1
    assert len(found.floats) == 2 and f"{found.floats[0].name}, {found.floats[1].name}: run in float (" in text


NAMES = ["layer1_0_residual_branch_conv1", "tensor layer1_0_residual_branch_out", "fc"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_shortens_no_name(width):
    from onnxq_plugins.cli.inspection import error_columns, fit

    layers = [
        LayerError(
            name,
            "ConvTranspose",
            name,
            "x",
            21.25,
            Own(45.5, 40.25, 38.125, 0.0),
            30.0,
            0.3,
            (Cause("uneven-channels", "", 1.0), Cause("heavy-tail", "", 1.0)),
        )
        for name in NAMES
    ]
    lines = fit(error_columns(layers), width)
    for n, (name, line) in enumerate(zip(NAMES, lines[1:], strict=True), 1):
        assert line.split()[0] == f"{n}" and name in line and "uneven-channels, heavy-tail" in line
    assert max(map(len, lines)) <= max(width, 79)
    assert ("accumulated dB" in lines[0]) == (width == 200) and "noise %" in lines[0]


def test_a_diagnosis_in_a_notebook():
    diagnosis = diagnose(quantized(chain(), n=4), samples=2)
    assert len(repr(diagnosis)) < 300 and diagnosis.layers[0].name in repr(diagnosis)
    html = diagnosis._repr_html_()
    assert (
        diagnosis.layers[0].name in html and html.count("<tr>") == 1 + min(5, len(diagnosis.layers)) and "[[layer]]" in html
    )
    odd = dataclasses.replace(diagnosis, layers=(dataclasses.replace(diagnosis.layers[0], name="<b>"),))
    assert "<b>" not in odd._repr_html_()


def test_a_layer_in_a_list_of_none():
    assert LayerError("a", "Conv", "a", "", 30.0, None).badness == (True, 200.0)


def test_a_model_brings_its_recipe(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(chain(), "model.onnx")
    np.savez("data.npz", x=np.concatenate([f["x"] for f in feeds(chain(), 6)]))
    onnxq.quantize("model.onnx", "int8", "data.npz", output="made.onnx", settings=["weights.bits=5"], seed=3)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["onnxq", "diagnose", "model.onnx", "--data", "data.npz", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    code, out, err = run("--quantized", "made.onnx")
    assert code == 0 and "few-bits" in out and "5 bits" in out and "note" not in err
    _, _, err = run("--quantized", "made.onnx", "--samples", "2")
    assert "is not what its recipe makes" in err
    for bad, told in (
        (("--quantized", "model.onnx"), "no recipe in its metadata"),
        (("--quantized", "data.npz"), "not a readable ONNX model"),
        (("--quantized", "nowhere.onnx"), "does not exist"),
        (("--quantized", "made.onnx", "-r", "int8"), "leave --recipe out"),
        (("--measured", "0"), "at least 1"),
    ):
        code, out, err = run(*bad)
        assert code == 2 and told in err and err.count("\n") == 1


def test_operators_may_have_the_names_of_their_outputs():
    """As in models from TensorFlow: a layer, and a tensor beside it that is rounded too, have one name."""
    net = Net(["N", 3, 8, 8])
    x = net.conv("x", 3, 8)
    pooled = net.op("Add", x, net.op("Sigmoid", x))
    model = net.model(net.conv(pooled, 8, 8), net.head(net.op("Relu", net.conv(pooled, 8, 8)), 8))
    for node in model.graph.node:
        node.name = node.output[0]
    result = onnxq.quantize(model, "int8", feeds(model, 8), workers=1)
    diagnosis = diagnose(result)
    assert {layer.name for layer in result.graph.layers} <= {entry.name for entry in diagnosis.layers}
