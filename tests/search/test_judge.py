"""The judge: which plan makes the better network, on samples that nothing was solved on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.calibration.shapes import multiply_adds
from onnxq_plugins.data import DataOptions
from onnxq_plugins.data.samples import held_out
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search import judge as judging
from onnxq_plugins.search.judge import TIE, Judge, ahead, decibels_of
from tests.jobs import make_job
from tests.measure.test_own_states import STATE, adder
from tests.zoo import ZOO, feeds, mlp, mobilenet


def test_the_first_wins_ties_and_only_ties():
    dB = np.full(8, 20.0)
    assert ahead({"plain": dB, "other": dB + 0.9 * TIE}) == "plain"
    assert ahead({"plain": dB, "other": dB + 2 * TIE, "best": dB + 1}) == "best"
    assert ahead({"plain": dB}) == "plain"
    assert ahead({"plain": dB[:1], "other": dB[:1] + 2 * TIE}) == "other"


def test_a_gain_must_be_larger_than_its_standard_error():
    rng = np.random.default_rng(0)
    plain = rng.normal(20, 8, 32)  # samples differ much more than plans do on each
    by_chance = rng.normal(0, 3, 32)
    by_chance += 0.3 - by_chance.mean()
    assert ahead({"plain": plain, "learned": plain + by_chance}) == "plain"
    assert ahead({"learned": plain - by_chance, "plain": plain}) == "learned"
    assert ahead({"plain": plain, "learned": plain + by_chance / 10 + 0.27}) == "learned"
    assert ahead({"plain": plain, "one": plain + by_chance + 0.2, "other": plain + by_chance / 10 + 0.2}) == "other"


def mean_decibels(reference, other):
    return decibels_of(reference, other).mean()


def test_one_loud_sample_does_not_decide():
    y = [np.full((1, 4), size, np.float32) for size in (1.0, 1.0, 1.0, 1000.0)]
    quiet, loud = (
        [v * np.float32(f) for v, f in zip(y, (1.1, 1.1, 1.1, 1.001), strict=True)],
        [v * np.float32(1.01) for v in y],
    )
    assert worst_sqnr([y], [quiet]) > worst_sqnr([y], [loud]) + 10
    assert mean_decibels([y], [loud]) > mean_decibels([y], [quiet]) + 3
    assert mean_decibels([y, y], [loud, quiet]) == pytest.approx(
        0.25 * mean_decibels([y], [loud]) + 0.75 * mean_decibels([y], [quiet])
    )
    assert mean_decibels([y], [y]) == 60 and mean_decibels([y], [[np.full((1, 4), np.nan, np.float32)] * 4]) == -10


def test_outputs_without_floats_count_by_what_is_equal():
    y = [np.arange(10), np.arange(10)]
    assert mean_decibels([y], [[y[0], np.r_[y[1][:9], 0]]]) == pytest.approx((60 + 10) / 2)


@pytest.mark.parametrize(("total", "state"), [(16, {}), (8, {}), (37, {}), (16, {"h": "h0"})])
def test_some_samples_are_held_out_and_others_are_not(total, state):
    numbers = held_out(total, state)
    assert len(numbers) == total // 4 and set(numbers) < set(range(total))
    assert not state or numbers == list(range(total - total // 4, total))  # a stream is cut once


def test_none_of_a_few_samples_can_be_spared():
    assert held_out(7, {}) == list(range(7))


@pytest.mark.parametrize("name", ["mobilenet", "mlp", "conv_transpose", "transformer"])
def test_multiply_adds_are_those_of_a_run(name):
    job = make_job(ZOO[name](), n=1)
    feed = feeds(ZOO[name](), 1)[0]
    known = multiply_adds(job.graph, job.graph.layers, feed)
    for layer in job.graph.layers:
        job.graph.set_shape(layer.output, [None] * len(job.graph.shape(layer.output)), np.dtype(np.float32))
    assert known == multiply_adds(job.graph, job.graph.layers, feed) > 0


def test_float_outputs_are_computed_once_for_all_judges_of_a_network(monkeypatch):
    job = make_job(mlp(), n=16)
    few, runs = Judge.of(job, apart=False, work=4 * work(job)), []
    count = runtimes.per_feed
    monkeypatch.setattr(
        runtimes, "per_feed", lambda runner, feeds, *more: runs.append(len(feeds)) or count(runner, feeds, *more)
    )
    all_of_them = Judge.of(job, apart=False)
    assert len(few.samples.feeds) == 4 and len(all_of_them.samples.feeds) == 16
    assert runs == [12]  # those that the first has not seen
    assert Judge.of(job, apart=False).samples.reference == all_of_them.samples.reference and runs == [12]
    weight = job.graph.layers[0].weight
    job.graph.constant(weight)[:] *= 2  # a stranger's pass, behind the graph's back
    judge, fresh = Judge.of(job, apart=False), runtimes.session(job.graph.model())
    assert runs == [12, 16]
    for feed, value in zip(judge.samples.feeds, judge.samples.reference[0], strict=True):
        np.testing.assert_array_equal(value, fresh.run(None, feed)[0])


def work(job):
    """Multiply-adds of a sample."""
    return multiply_adds(job.graph, job.graph.layers, next(iter(job.calibration.data)))


def test_large_float_outputs_are_not_kept(monkeypatch):
    monkeypatch.setattr(judging, "_KEPT", 100)
    job = make_job(mlp(), n=16)
    assert Judge.of(job) is not None and not [key for key in job.calibration.data.known if key[1] == "outputs"]


def test_it_finds_the_plan_that_is_worse_and_changes_nothing():
    job = make_job(mobilenet(), n=16)
    judge = Judge.of(job)
    assert len(judge.samples.feeds) == 4
    before, coarse = job.plan, {y.weight: replace(job.plan[y.weight], bits=3) for y in Planned.of(job).layers}
    verdict = judge.best({"coarse": job.plan | coarse, "fine": job.plan})
    assert verdict.name == "fine" and verdict.gain > 5 and job.plan is before and not job.report.notes
    assert judge.best({"fine": job.plan, "again": job.plan}).name == "fine"


def test_what_is_open_is_completed_as_the_engine_does():
    job = make_job(mobilenet(), n=4)
    done = Judge.of(job).completed(job.plan)
    complete(job)
    assert all(np.array_equal(job.plan[n].codes, spec.codes) for n, spec in done.items())
    corrects = make_job(mobilenet(), {"pass": [{"use": "bias-correct"}]}, n=4)
    assert any(spec.shift is not None for spec in Judge.of(corrects).completed(corrects.plan).values())


def test_it_judges_nothing_that_costs_too_much_or_has_no_data():
    job = make_job(mlp(), n=16)
    assert Judge.of(job, work=100.0) is None
    assert len(Judge.of(job, work=8e3).samples.feeds) < 16
    assert len(Judge.of(job, apart=False).samples.feeds) == 16
    job.calibration = Calibration(job.graph, None)
    assert Judge.of(job) is None


def test_a_stream_runs_on_its_own_states():
    job = make_job(adder(1.0), n=1)
    data = runtimes.open_samples([{"x": x} for x in np.ones((16, 1, 4), np.float32)], job.graph, DataOptions(state=STATE))
    job.calibration = Calibration(job.graph, data)
    judge = Judge.of(job)
    assert judge.samples.places == [0, 1, 2, 3] and judge.samples.feeds[0]["sum"].max() == 12
    assert judge.sqnr(job.plan) == 60
