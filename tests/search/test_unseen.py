"""Where a target quantizes as a whole, a network is judged on samples that its ranges have not seen, and by what other
samples have: what is rare in the data counts, and is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxq_plugins import quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.layers.complete import activation_spec, complete
from onnxq_plugins.measure.arrays import decibels, lower_decibels
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.search.unseen import Unseen
from tests.jobs import make_job
from tests.networks import network, weight

RECIPE = {"pass": [{"use": "ranges"}], "quality": {"sqnr": 20, "below": 18}}


def detector():
    """Boxes, and scores near 0 wherever nothing is found."""
    found = weight((1, 16, 1, 1), 2)
    return network(
        [
            ("Conv", ["x", "w1"], ["h"], {"pads": [1] * 4}),
            ("Relu", ["h"], ["r"], {}),
            ("Conv", ["r", "w2"], ["g"], {"pads": [1] * 4}),
            ("Relu", ["g"], ["q"], {}),
            ("Conv", ["q", "wb"], ["boxes"], {}),
            ("Conv", ["q", "ws", "bs"], ["logits"], {}),
            ("Sigmoid", ["logits"], ["scores"], {}),
        ],
        [1, 3, 12, 12],
        {
            "w1": weight((16, 3, 3, 3)),
            "w2": weight((16, 16, 3, 3), 1),
            "wb": weight((4, 16, 1, 1), 3),
            "ws": np.abs(found) * 0.15,
            "bs": np.full(1, -7, np.float32),
        },
        outputs=("boxes", "scores"),
    )


def pictures(n=24, seed=0):
    """Most are faint, few hold something, the strongest ones much more than others."""
    rng = np.random.default_rng(seed)
    strength = 0.3 * np.exp(1.4 * rng.standard_normal(n))
    return [{"x": (s * rng.standard_normal((1, 3, 12, 12))).astype(np.float32)} for s in strength]


def job_on(model, target, samples):
    job = make_job(model, {"target": target})
    data = open_data(samples, graph_inputs(job.graph))
    job = replace(job, calibration=Calibration(job.graph, data))
    complete(job)
    return job


def of_outputs(model, result, samples):
    reference = runtimes.outputs(runtimes.session(model, written=True), samples)
    outputs = runtimes.outputs(runtimes.session(result.model, written=True), samples)
    return [worst_sqnr([y], [z]) for y, z in zip(reference, outputs, strict=True)]


def test_what_other_samples_have_is_less_where_one_holds_the_signal():
    alike = np.array([[1.0, 0.01]] * 16)
    assert lower_decibels(alike) == pytest.approx(decibels(alike)) == pytest.approx(20)
    loud = np.concatenate([alike[1:] * [1e-4, 1e-3], alike[:1]])
    assert decibels(loud) > 19 and lower_decibels(loud) == pytest.approx(10, abs=0.5)
    assert lower_decibels(np.array([[1.0, np.inf], [1.0, 0.0]])) == -200


def test_each_fold_is_judged_with_the_ranges_of_the_others():
    samples = pictures()
    job = job_on(detector(), "litert", samples)
    unseen = Unseen.of(job, range(24))
    assert unseen is not None and unseen.first == [0, 4, 8, 12, 16, 20]
    for fold in range(4):
        others = [feed for n, feed in enumerate(samples) if n % 4 != fold]
        cut, most = unseen.cut(job.plan, fold), max(float(feed["x"].max()) for feed in others)
        assert cut["x"].value_range[1] == pytest.approx(most, abs=2 * float(cut["x"].scale))
        wide = job.plan | {"x": activation_spec(unseen.reach(["x"])["x"], job.plan["x"])}
        room = unseen.cut(wide, fold)["x"]  # less by the same
        less = max(float(feed["x"].max()) for feed in samples) - most
        assert room.value_range[1] == pytest.approx(wide["x"].value_range[1] - less, abs=2 * float(room.scale))
    faint = job_on(detector(), "litert", [{"x": feed["x"] / 100} for feed in samples])
    _, high = Calibration(faint.graph, faint.calibration.data).ranges(["logits"])["logits"]
    assert high < -6 and Unseen.of(faint, range(24)).reach(["logits"])["logits"][1] > high  # negative on all samples
    assert Unseen.of(job, range(24)).reach(["r"])["r"][0] == 0
    assert Unseen.of(job, range(4)) is None
    assert Unseen.of(job_on(detector(), "ort-cpu", samples), range(24)) is None


@pytest.mark.parametrize("target", ["litert", "qnn"])
def test_samples_with_what_is_rare_keep_their_quality(target):
    model, others = detector(), pictures(seed=2)
    alone = quantize(model, {**RECIPE, "target": target, "quality": {}}, pictures(), check=False)
    saved = quantize(model, {**RECIPE, "target": target}, pictures(), check=False)
    quality = saved.report.quality
    assert quality["unseen"] and quality["met"]
    assert min(of_outputs(model, alone, pictures())) > 25 and min(of_outputs(model, alone, others)) < 15
    assert min(of_outputs(model, saved, others)) > 20
    assert any("'boxes'" in note and "give more samples" in note for note in saved.report.notes)


def test_16_bits_everywhere_come_before_floats_that_would_cut_the_network():
    model, others = detector(), pictures(seed=2)
    result = quantize(model, {**RECIPE, "target": "qnn"}, pictures(), min_sqnr=30, check=False)
    quality = result.report.quality
    assert quality["met"] and quality["wide"] and not quality["float"]
    assert min(of_outputs(model, result, others)) > 28
