"""Learned rounding is judged on what it did not see: patches, and samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import Problem, solvable
from onnxq_plugins.layers.sweep import LayerStatistics, sweep
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.solvers.gram import refit, share_of
from onnxq_plugins.solvers.rounding import Effort
from tests.jobs import distance, make_job
from tests.zoo import Net, feeds, mlp, mobilenet

STEP = {"use": "round", "method": "gptq"}


def statistics(x, y, weight, held):
    """What a layer [1, O, D] sees: columns x [1, D, P] and outputs y [1, O, P], of which some are held out."""

    def of(at):
        some, left = x[:, :, at], y[:, :, at] - weight @ x[:, :, at]
        count = some.shape[2]
        h, rest = some @ some.swapaxes(1, 2) / count, left @ some.swapaxes(1, 2) / count
        return LayerStatistics(h, some.mean(axis=2), rest, y[:, :, at].mean(axis=2), count)

    return replace(of(slice(None)), judged=of(held))


def problem(true_everywhere: bool, seed: int = 0):
    """A layer of which the quantized input lacks a part, that other inputs tell: everywhere, or only on what is seen."""
    net = Net(["N", 24])
    job = make_job(net.model(net.gemm("x", 24, 8)), n=8)
    complete(job)
    layer = solvable(job)[0]
    rng = np.random.default_rng(seed)
    weight = layer.matrix(job.graph.constant(layer.weight)).astype(np.float64)
    x = rng.normal(size=(1, 24, 400))
    wrong = 0.5 * np.roll(x, 1, axis=1)
    if not true_everywhere:
        wrong[:, :, 300:] *= -1
    return replace(
        Problem.of(job, layer, statistics(x, weight @ (x + wrong), weight, slice(300, None)), True),
        spec=replace(job.plan[layer.weight], codes=None, shift=None),
    )


def test_a_fit_that_holds_elsewhere_is_taken_and_one_that_does_not_is_left():
    assert problem(True).solve("gptq", Effort()).share > 0.9
    assert problem(False).solve("gptq", Effort()).share == 0


def test_the_share_has_the_least_error_on_the_line():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 50))
    w, y = rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 3, 50))
    h, left = x @ x.swapaxes(1, 2) / 50, (y - w @ x) @ x.swapaxes(1, 2) / 50
    move = 2 * refit(h, left, 0.1)
    slope, curve = share_of(move, h, left)
    errors = [np.mean((y - (w + a * move) @ x) ** 2) for a in (slope / curve, slope / curve - 0.05, slope / curve + 0.05)]
    assert errors[0] == min(errors)


def test_plain_codes_win_where_learned_ones_are_worse_on_what_is_held_out(monkeypatch):
    one = problem(True)
    trial = Problem._trial
    monkeypatch.setattr(Problem, "_trial", lambda *a: (1.0, False, trial(*a)[2]))
    found = one.solve("gptq", Effort())
    scale, weight = np.asarray(found.spec.scale), one.weight
    assert found.share == 0 and np.array_equal(found.spec.codes, np.clip(np.rint(weight / scale), -127, 127))


def test_few_patches_that_are_held_out_are_not_solved_on(monkeypatch):
    """Else the network could not be judged on them."""
    few, many = problem(True), problem(True)
    grams = []
    solved = Problem._solved
    monkeypatch.setattr(Problem, "_solved", lambda one, *a: grams.append(a[-1]) or solved(one, *a))
    held = few.statistics.judged
    few = replace(few, statistics=replace(few.statistics, count=88, judged=replace(held, count=22)))
    few.solve("gptq", Effort())
    many.solve("gptq", Effort())
    apart = few._moments(few.statistics.others(), few.layer.matrix(few.weight), slice(0, 1), few.statistics.others())[0]
    whole = many._moments(many.statistics, few.layer.matrix(few.weight), slice(0, 1), many.statistics)[0]
    off = ~np.eye(24, dtype=bool)
    np.testing.assert_allclose(grams[0][0][off], apart[0][off], atol=1e-6)
    np.testing.assert_allclose(grams[1][0][off], whole[0][off], atol=1e-6)


@pytest.mark.parametrize("better", [True, False])
def test_the_network_decides_in_the_end(better, monkeypatch):
    model = mobilenet()
    answers = iter([20.0, 25.0] if better else [25.0, 20.0])
    monkeypatch.setattr(Judge, "each", lambda *args: np.full(4, next(answers)))
    result = quantize(model, {"pass": [STEP]}, feeds(model, 8), workers=1)
    told = result.report.steps[0]["result"]
    assert told["taken"] == ("learned" if better else "plain") and set(told["sqnr"].values()) == {20.0, 25.0}
    assert any("round lowers the outputs" in note for note in result.report.notes) != better
    nearest = quantize(model, {}, feeds(model, 8), workers=1).plan
    same = all(np.array_equal(spec.codes, result.plan[n].codes) for n, spec in nearest.items() if spec.codes is not None)
    assert same != better


@pytest.mark.parametrize(("bits", "taken"), [(8, "plain"), (4, "learned")])
def test_where_samples_do_not_tell_the_width_decides(bits, taken, monkeypatch):
    model = mobilenet()
    monkeypatch.setattr(Judge, "each", lambda *args: np.full(4, 20.0))
    result = quantize(model, {"weights": {"bits": bits}, "pass": [STEP]}, feeds(model, 8), workers=1)
    assert result.report.steps[0]["result"]["taken"] == taken


def test_samples_that_nothing_is_learned_from_do_no_harm():
    """One sample with values far beyond all others: their patches are clipped."""
    model, recipe = mlp(), {"weights": {"bits": 8}}
    samples = feeds(model, 24)
    samples[5]["x"] *= 40
    ranges = {"use": "ranges", "method": "percentile", "percentile": 97.0}
    others = feeds(model, 64, seed=1)
    plain, learned = (
        distance(model, quantize(model, {**recipe, "pass": [ranges, step]}, samples), others)
        for step in ({"use": "bias-correct"}, STEP)
    )
    assert learned > plain - 0.2


def test_dead_inputs_get_no_weight_from_a_fit():
    job = make_job(mlp(), n=16)
    complete(job)
    layer = solvable(job)[1]
    ((_, seen),) = sweep(job, [layer])
    dead = replace(seen, h=seen.h.copy(), left=seen.left.copy(), mean=seen.mean.copy(), judged=None)
    dead.mean[:, 3] = 0.7  # always the same: what the bias takes
    for other in range(dead.h.shape[1]):
        dead.h[:, 3, other] = dead.h[:, other, 3] = 0.7 * dead.mean[:, other]
    weight = layer.matrix(job.graph.constant(layer.weight))
    off = dead.output - np.einsum("god,gd->go", weight, dead.mean)
    dead.left[:, :, 3] = 0.7 * off
    w, _ = Problem.of(job, layer, dead, True)._target()
    np.testing.assert_allclose(w[:, :, 3], weight[:, :, 3], atol=1e-3)
