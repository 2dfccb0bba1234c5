"""What costs the outputs too much in 8 bits is found, kept wide or in float, and named; the rest stays integer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxq_plugins import quantize, runtimes
from onnxq_plugins.data import open_data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.qdq import export
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.arrays import sqnr
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.search.fallback import Part, Search
from onnxq_plugins.targets.refusals import needs_narrow
from onnxq_plugins.testing.exact import exact_session
from tests.jobs import LAYERED, make_job
from tests.networks import network, weight
from tests.zoo import ZOO, feeds, kinds, mobilenet


def spectrum():
    """A filterbank in front of a Log, whose small values a grid for the large ones loses, and convolutions behind."""
    return network(
        [
            ("Conv", ["x", "bank"], ["f"], {"strides": [8]}),
            ("Mul", ["f", "f"], ["p"], {}),
            ("Add", ["p", "least"], ["q"], {}),
            ("Log", ["q"], ["l"], {}),
            ("Conv", ["l", "w1", "b1"], ["h"], {"pads": [1, 1]}),
            ("Relu", ["h"], ["r"], {}),
            ("Conv", ["r", "w2", "b2"], ["y"], {"pads": [1, 1]}),
        ],
        [1, 1, 256],
        {
            "bank": (16, 1, 16),
            "least": np.float32(1e-6),
            "w1": weight((24, 16, 3)) / 4,
            "b1": np.full(24, 2.0, np.float32),
            "w2": weight((8, 24, 3)),
            "b2": np.zeros(8, np.float32),
        },
    )


def sounds(n=32, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": (10 ** rng.uniform(-2, 1) * rng.standard_normal((1, 1, 256))).astype(np.float32)} for _ in range(n)]


def silu(scale=300.0):
    """A stem one of whose channels is far larger than the others, in front of SiLU and a depthwise layer: a chain."""
    stem = weight((8, 3, 3, 3))
    stem[0] *= scale
    dense = weight((8, 8, 1, 1))
    dense[:, 0] /= scale
    return network(
        [
            ("Conv", ["x", "stem", "b"], ["a"], {"pads": [1] * 4}),
            ("Sigmoid", ["a"], ["s"], {}),
            ("Mul", ["a", "s"], ["m"], {}),
            ("Conv", ["m", "depth", "b"], ["d"], {"pads": [1] * 4, "group": 8}),
            ("Conv", ["d", "dense", "b"], ["e"], {}),
            ("Relu", ["e"], ["r"], {}),
            ("Conv", ["r", "last", "b"], ["y"], {}),
        ],
        [1, 3, 12, 12],
        {
            "stem": stem,
            "depth": np.abs(weight((8, 1, 3, 3))),
            "dense": dense,
            "last": weight((8, 8, 1, 1)),
            "b": np.full(8, 0.1, np.float32),
        },
    )


def pictures(n=24, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(n)]


PLAIN = {"pass": [{"use": "ranges"}, {"use": "bias-correct"}]}
LEARNED = {"pass": [{"use": "ranges", "method": "mse"}, {"use": "round", "method": "gptq"}]}
SAVED = {"quality": {"sqnr": 20, "below": 15}}


def decibels(model, result, samples):
    judged = Samples.of(model, samples)
    return [sqnr(y, z) for y, z in zip(judged.reference, judged.outputs(exact_session(result.model)), strict=True)]


def test_a_filterbank_before_a_log_stays_float_and_is_named():
    model, data, others = spectrum(), sounds(), sounds(seed=1)
    before = quantize(model, PLAIN, data)
    after = quantize(model, PLAIN, data, min_sqnr=25)
    assert min(decibels(model, before, others)) < 15 and min(decibels(model, after, others)) > 23
    quality = after.report.quality
    assert quality["met"] and quality["asked"] == 25 and min(quality["sqnr"].values()) >= 25
    assert min(quality["before"].values()) < 15
    assert "conv_0" in quality["float"] and 0 < quality["work"] < 1
    assert all(after.report.floats[name].kind == "quality" for name in quality["float"])
    assert any("conv_0" in note and "float" in note for note in after.report.notes)
    rows = {row["name"]: row for row in after.report.layers}
    assert rows["conv_0"]["kernel"] == "Conv" and rows["conv_6"]["kernel"] == "QLinearConv"


def test_the_chain_behind_a_layer_in_float_is_broken():
    model, data, others = silu(), pictures(), pictures(seed=1)
    before = quantize(model, PLAIN, data)
    after = quantize(model, PLAIN, data, min_sqnr=25)
    assert min(decibels(model, before, others)) < 15 and min(decibels(model, after, others)) > 23
    assert {"conv_0", "conv_3"} <= set(after.report.quality["float"]) and "conv_6" not in after.report.quality["float"]
    assert not {"a", "s", "m"} & set(after.plan)


def test_sixteen_bits_where_the_target_has_them():
    model = spectrum()
    after = quantize(model, {**PLAIN, "target": "npu"}, sounds(), min_sqnr=25)
    quality = after.report.quality
    assert quality["met"] and quality["wide"] and not quality["float"]
    assert all(after.plan[name].bits == 16 for name in quality["wide"])
    assert min(decibels(model, after, sounds(seed=1))) > 23


def test_nothing_happens_where_the_outputs_are_good():
    model = mobilenet()
    result = quantize(model, "int8", feeds(model, 16))
    assert "before" not in result.report.quality and result.report.quality["met"]
    assert not any(reason.kind == "quality" for reason in result.report.floats.values())


def test_destroyed_outputs_are_saved_by_the_recipe_and_others_left():
    model = spectrum()
    recipe = {**PLAIN, "quality": {"sqnr": 25, "below": 5}}
    untouched = quantize(model, recipe, sounds())
    saved = quantize(model, {**PLAIN, "quality": {"sqnr": 25, "below": 20}}, sounds())
    assert "float" not in untouched.report.quality or min(untouched.report.quality["before"].values()) < 5
    assert min(saved.report.quality["sqnr"].values()) >= 20


def test_one_seed_one_result():
    model = silu()
    one, other = (quantize(model, PLAIN, pictures(), min_sqnr=25, workers=n) for n in (1, 3))
    assert one.report.quality == other.report.quality
    assert one.model.graph == other.model.graph


def test_without_samples_the_quality_is_not_checked():
    recipe = {"weights": {"bits": 8}, "activations": {"bits": 32}, "target": "storage"}
    result = quantize(mobilenet(), recipe, min_sqnr=20)
    assert not result.report.quality and any("not checked" in note for note in result.report.notes)


@pytest.mark.parametrize(("table", "text"), [({"below": 10}, "below"), ({"sqnr": 10, "below": 12}, "below")])
def test_a_quality_makes_sense(table, text):
    with pytest.raises(OnnxqError, match=text):
        quantize(mobilenet(), {"quality": table}, feeds(mobilenet(), 4))


def test_min_sqnr_is_a_number():
    with pytest.raises(OnnxqError, match="decibels"):
        quantize(mobilenet(), "int8", feeds(mobilenet(), 4), min_sqnr=float("nan"))


def searched(model, samples, recipe=None):
    job = make_job(model, recipe, n=2)
    job.calibration = type(job.calibration)(job.graph, open_data(samples, job.calibration.data.inputs))
    complete(job)
    return job, Search(job, Samples.of(model, samples))


def test_what_is_float_for_its_inputs_keeps_its_weight_in_8_bits():
    after = quantize(spectrum(), PLAIN, sounds(), min_sqnr=25)
    quality, rows = after.report.quality, {row["name"]: row for row in after.report.layers}
    assert quality["float"] == quality["decoded"] == ["conv_0"]
    assert rows["conv_0"]["weights"].startswith("int8") and rows["conv_0"]["why_float_kind"] == "quality"
    assert any("weights still in 8 bits" in note for note in after.report.notes)
    assert not any("MatMulNBits" in note for note in after.report.notes)


@pytest.mark.parametrize("name", kinds(LAYERED))
def test_all_activations_in_float_leave_rounded_weights(name):
    model = ZOO[name]()
    job, search = searched(model, feeds(model, 4), {"target": "ort-cpu"})
    found = search.made(job.plan, ())
    for activation in search.planned.activations:
        found = search.made(job.plan, (*found.taken, activation)) or found
    assert {*found.decoded} == {*search.weights} and all(job.graph.is_constant(n) for n in found.plan)
    exported = search.samples.outputs(runtimes.session(export(job.graph, found.plan, job.target)))
    (expected,) = search.alone.outputs([tuple(search.weights.values())], search.samples)
    assert min(sqnr(y, z) for y, z in zip(expected, exported, strict=True)) > 90


def test_a_weight_that_8_bits_destroy_is_stored_in_16_or_in_float_where_that_is_smaller():
    model = silu(3000.0)  # one output channel of the depthwise layer reads values a thousand times larger
    _, search = searched(model, pictures(8), {"weights": {"block": "tensor"}, "target": "ort-cpu"})
    found = search.run([60.0], [1.0])
    assert found is not None and {*search.weights.values()} & {*found.taken}
    gone = [y for y in search.planned.layers if y.weight in found.taken]
    assert gone and not {y.name for y in gone} & {*found.decoded}
    for layer in gone:
        spec, size = found.plan.get(layer.weight), int(np.prod(layer.shape))
        assert (spec is None) is (2 * size < 4 * layer.channels + 100)
        assert spec is None or (spec.bits, spec.decoded, spec.solved) == (16, True, True)
    exported = runtimes.session(export(search.job.graph, found.plan, search.job.target))
    assert min(found.sqnr) >= 60 and search.samples.outputs(exported)


def test_weights_of_16_bits_are_counted_and_need_no_newer_opset():
    model = network([("Conv", ["x", "w"], ["y"], {})], [1, 3, 12, 12], {"w": weight((256, 3, 5, 5))})
    job, search = searched(model, pictures(8), {"target": "ort-cpu"})
    (layer,) = search.planned.layers
    found = search.made(job.plan, (layer.weight,))
    assert found.plan[layer.weight].bits == 16 and not needs_narrow(job.target, found.plan)
    exported = export(job.graph, found.plan, job.target)
    assert sum(t.data_type == onnx.TensorProto.INT16 for t in exported.graph.initializer) == 1
    expected, made = (search.samples.outputs(runtimes.session(m)) for m in (model, exported))
    assert min(sqnr(y, z) for y, z in zip(expected, made, strict=True)) > 85
    assert "1 Conv stored in 16 bits, computes float" in audit_model(exported).summary


def test_a_target_that_decodes_nothing_gets_float_weights():
    recipe = {**PLAIN, "target": "per-tensor", "weights": {"block": "tensor"}}
    after = quantize(spectrum(), recipe, sounds(), min_sqnr=25)
    assert "conv_0" in after.report.quality["float"] and "decoded" not in after.report.quality
    assert "bank" not in after.plan


def test_what_is_not_needed_goes_back_to_8_bits():
    job, search = searched(silu(), pictures(8))
    enough = search.run([20.0], [1.0])
    assert enough is not None and "last" not in enough.taken
    search.noise["r"] = np.zeros(1)
    more = search.measured(search.made(job.plan, [*enough.taken, "r"]))
    assert more.work > enough.work
    back = search.given_back(more, 20.0)
    assert back.taken == enough.taken and back.sqnr.min() >= 20
    assert search.given_back(more, float(more.sqnr.min()) + 1) is more  # a level that is not reached


def test_too_much_work_is_left_out():
    job, search = searched(silu(), pictures(8))
    whole = search.run([25.0], [1.0])
    assert whole is not None and whole.work > 0.5
    part = Search(job, search.samples).run([25.0], [whole.work / 2])
    assert part is None or part.work <= whole.work / 2


def test_quantizers_that_went_with_others_count_no_more():
    job, search = searched(silu(), pictures(8))
    now = search.made(job.plan, ["m"])
    gone = [name for name in search.planned.activations if name not in now.plan]
    assert gone
    parts = [Part((name,), np.ones(1)) for name in job.plan] + [Part((gone[0], "y"), np.ones(1))]
    left = search.alive(parts, now)
    assert {name for part in left for name in part.names} == {*job.plan} - {*gone}


@pytest.mark.parametrize("scale", [10.0, 40.0, 80.0, 300.0])
def test_learned_codes_never_end_below_plain_ones_that_were_saved(scale):
    """At 40, plain codes have 8 dB and are saved; learned ones have 13 dB, of which few layers in float make no more."""
    model = silu(scale)
    plain, learned = (quantize(model, {**recipe, **SAVED}, pictures()) for recipe in (PLAIN, LEARNED))
    floor = min(decibels(model, plain, pictures(seed=1)))
    assert min(decibels(model, learned, pictures(seed=1))) > floor - 0.3


def test_learned_codes_that_are_good_enough_alone_stay_integer():
    result = quantize(silu(10.0), {**LEARNED, **SAVED}, pictures())
    assert "float" not in result.report.quality and min(result.report.quality["sqnr"].values()) > 20


def test_more_samples_may_have_other_parts(monkeypatch):
    """What a search measures is told by the parts of its own samples, which are more than those of the first check."""
    halves = [(slice(None), slice(None, 4)), (slice(None), slice(4, None))]
    monkeypatch.setattr("onnxq_plugins.measure.samples.parts", lambda values: halves if len(values) <= 8 else [()])
    monkeypatch.setattr("onnxq_plugins.search.quality._CHECK", 1)
    report = quantize(spectrum(), "int8", sounds(), workers=1, min_sqnr=25, keep=True).report["quality"]
    assert [*report["sqnr"]] == ["y"] and [*report["before"]] == ["y[:, :4]", "y[:, 4:]"]
