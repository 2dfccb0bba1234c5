"""Trying recipes until one is good enough."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, cli, quantize, runtimes, selection
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.runtimes.speed import Speed
from onnxq_plugins.selection import AutoResult
from onnxq_plugins.selection import auto as choose
from tests.zoo import Net, cnn, feeds, mlp, mobilenet


def paced(monkeypatch, *ratios: float) -> None:
    """Candidates of these speeds, in turn; the last one counts for all others."""

    def against_first(runners, feed, seconds=1.0):
        told = [1.0, *ratios, *[ratios[-1]] * len(runners)][: len(runners)]
        return [Speed(1.0, 1 / ratio, ratio, ratio, ratio, 60) for ratio in told]

    monkeypatch.setattr(selection, "against_first", against_first)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few tests are about latency: all candidates are twice as fast as float."""
    paced(monkeypatch, 2.0)


def recipes_of(outcome: AutoResult) -> list[str]:
    return [trial.recipe for trial in outcome.trials]


def test_speed_keeps_the_first_recipe_that_is_accurate_enough():
    model = mobilenet()
    outcome = choose(model, feeds(model, 20), max_drop=100, metric="agreement")
    assert recipes_of(outcome) == ["int8"] and outcome.met and outcome.best.recipe == "int8"
    assert outcome.metric == "agreement" and outcome.reference == 100


def test_size_keeps_the_smallest_model_that_is_accurate_enough():
    model = mobilenet()
    outcome = choose(model, feeds(model, 20), max_drop=100, prefer="size", recipes=["int8", "int4-rounded"])
    sizes = {trial.recipe: trial.size for trial in outcome.trials}
    assert outcome.best.size == min(sizes.values()) and outcome.result.model.ByteSize() == outcome.best.size
    assert len(set(sizes.values())) == 2


def test_the_most_accurate_model_is_kept_if_none_is_accurate_enough():
    model = mlp()
    drops = iter([0.0, 30.0, 20.0])  # float, then two recipes
    names = ["int8", "int8-rounded"]
    outcome = choose(model, feeds(model, 20), max_drop=1, recipes=names, attempts=0, metric=lambda *_: -next(drops))
    assert recipes_of(outcome) == ["int8", "int8-rounded"] and not outcome.met
    assert outcome.best.recipe == "int8-rounded" and outcome.best.drop == 20


@pytest.mark.parametrize(
    ("given", "metric", "words"),
    [
        (
            {"max_drop": 1.0},
            None,
            "max_drop = 1 is not used: models are judged by sqnr, as no output tells classes apart",
        ),
        ({"max_drop": 1.0}, "sqnr", "judged by sqnr; min_sqnr decides, here 20 dB"),
        (
            {"min_sqnr": 9.0},
            "agreement",
            "min_sqnr = 9 is not used: models are judged by agreement; max_drop",
        ),
        ({"min_sqnr": 9.0}, "sqnr", ""),
        ({"max_drop": 1.0}, "agreement", ""),
        ({}, None, ""),
    ],
)
def test_a_limit_that_says_nothing_about_the_metric_is_told(given, metric, words):
    """On a network whose answer is always the same class, unless another metric is named."""
    net = Net(["N", 13])
    model = net.model(net.op("Add", net.gemm("x", 13, 5), net.constant([900.0, 0, 0, 0, 0])))
    outcome = choose(model, feeds(model, 20), metric=metric, recipes=["int8"], attempts=0, **given)
    told = [note for note in outcome.notes if "is not used" in note]
    assert len(told) == bool(words) and all(words in note for note in told)


def test_models_are_judged_on_samples_they_were_not_made_with():
    model, calls = mlp(), []

    def judge(reference, outputs, labels):
        calls.append((len(reference[0]), labels.tolist()))
        return 0.0

    samples = {"x": np.concatenate([feed["x"] for feed in feeds(model, 20)]), "labels": np.arange(20)}
    outcome = choose(model, samples, metric=judge)
    assert set(map(str, calls)) == {str((10, list(range(1, 20, 2))))}
    assert "made with 10 samples, judged on the other 10" in outcome.notes[0]
    reference = runtimes.outputs(runtimes.session(model), feeds(model, 20))[0].argmax(-1)
    separate = choose(model, samples["x"][:7], test=samples["x"], labels=reference)
    assert separate.metric == "top1" and separate.reference == 100
    assert separate.notes == (
        "one of 20 samples is 5.0 points, more than the drop of 1 to decide on: give more --test samples "
        "for a decision this fine",
    )
    small = choose(model, samples["x"][:7])
    assert "flatters" in small.notes[0]


def test_recipes_that_do_not_fit_are_reported_and_skipped():
    model = cnn()
    outcome = choose(model, feeds(model, 20), max_drop=100, recipes=["no-such-recipe", "int8"])
    assert outcome.best.recipe == "int8" and "no-such-recipe" in outcome.trials[0].why
    with pytest.raises(OnnxqError, match="no-such-recipe"):
        choose(model, feeds(model, 20), recipes=["no-such-recipe"])
    for wrong in ({"prefer": "fast"}, {"max_drop": -1}, {"max_drop": float("nan")}, {"metric": "f1"}):
        with pytest.raises(OnnxqError):
            choose(model, feeds(model, 20), **wrong)


@pytest.fixture
def coarse(tmp_path) -> str:
    """A recipe that clips far too much."""
    path = tmp_path / "coarse.toml"
    path.write_text('[[pass]]\nuse = "ranges"\nmethod = "percentile"\npercentile = 90\njudged = false\n')
    return str(path)


def test_remedies_are_tried_where_no_recipe_is_good_enough(coarse):
    model = mobilenet()
    outcome = choose(model, feeds(model, 20), recipes=[coarse], metric="sqnr", min_sqnr=25)
    first, *others = outcome.trials
    assert not first.met and first.recipe == coarse and others
    assert all(trial.recipe.startswith(f"{coarse} + ") for trial in others)
    assert outcome.met and outcome.best is others[-1] and outcome.best.sqnr > first.sqnr + 6  # it stops where one is
    assert outcome.result.recipe != load_recipe(coarse, find_plugins().passes)
    again = quantize(model, outcome.result.recipe.to_dict(), outcome.result.data)
    assert again.model.SerializeToString() == outcome.result.model.SerializeToString()
    alone = choose(model, feeds(model, 20), recipes=[coarse], metric="sqnr", min_sqnr=25, attempts=0)
    assert recipes_of(alone) == [coarse] and not alone.met


def test_remedies_that_help_are_added_up(coarse):
    """Each is tried on top of the best so far, and no more than asked for."""

    def error(reference, outputs, labels):
        return -float(np.mean(np.square(reference[0] - outputs[0])))

    model = mobilenet()
    outcome = choose(model, feeds(model, 20), recipes=[coarse], metric=error, max_drop=0, attempts=3)
    assert not outcome.met and 2 <= len(outcome.trials) <= 4
    assert outcome.best is min(outcome.trials, key=lambda trial: trial.drop) and outcome.best is not outcome.trials[0]
    for n, trial in enumerate(outcome.trials[1:], 1):
        best = min(outcome.trials[:n], key=lambda trial: trial.drop)
        assert trial.recipe.startswith(f"{best.recipe} + ")


def test_remedies_are_judged_on_samples_that_no_model_was_made_with(coarse):
    model, sizes = mobilenet(), set()

    def judge(reference, outputs, labels):
        sizes.add(len(reference[0]))
        return 0.0 if reference[0] is outputs[0] else -50.0

    outcome = choose(model, feeds(model, 20), recipes=[coarse], metric=judge, attempts=2)
    assert len(outcome.trials) > 1 and sizes == {10} and outcome.result.data.size == 10


def test_the_kept_recipe_can_be_saved(coarse, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = mobilenet()
    onnx.save(model, "m.onnx")
    np.savez("data.npz", x=np.concatenate([feed["x"] for feed in feeds(model, 20)]))
    options = ["--metric", "sqnr", "--min-sqnr", "25", "-r", Path(coarse).name, "--save-recipe", "kept.toml"]
    monkeypatch.setattr(sys, "argv", ["onnxq", "auto", "m.onnx", "--data", "data.npz", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and "coarse.toml + " in capsys.readouterr().out
    kept = load_recipe("kept.toml", find_plugins().passes)
    assert kept.to_dict()["pass"] != load_recipe(coarse, find_plugins().passes).to_dict()["pass"]


@pytest.mark.parametrize(("limit", "code"), [(100, 0), (0.0, 1)])
def test_the_command(limit, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = mlp()
    onnx.save(model, "m.onnx")
    outputs = runtimes.outputs(runtimes.session(model), feeds(model, 20))[0]
    np.savez("data.npz", x=np.concatenate([feed["x"] for feed in feeds(model, 20)]), labels=outputs.argmin(-1))
    (tmp_path / "own_metric.py").write_text(
        "def judge(exact, quantized, labels):\n    return 100.0 * (exact[0] is quantized[0]) + (labels[0] == labels[0])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["onnxq", "auto", "m.onnx", "--data", "data.npz", "--max-drop", str(limit), "--metric", "own_metric:judge"],
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert "kept" in printed.out and "drop is of judge (float: 101.00)" in printed.out
    assert ("no recipe stays within" in printed.err) == bool(code)
    runtimes.session(tmp_path / "m.auto.onnx")


# ---- the float model as an answer -----------------------------------------------------------------------------------------


def test_float_is_kept_where_nothing_is_faster(monkeypatch, tmp_path):
    paced(monkeypatch, 0.8)
    model = mobilenet()
    outcome = choose(model, feeds(model, 20), max_drop=100, metric="agreement")
    assert outcome.kept_float and outcome.met and outcome.best is outcome.unchanged
    assert recipes_of(outcome) == ["int8"] and outcome.trials[0].rejected == "slower than float"
    assert "keep float: no recipe that is good enough is better (int8 0.80x its speed)" in outcome.reason
    assert onnx.load(outcome.save(tmp_path / "kept.onnx")).SerializeToString() == model.SerializeToString()
    assert outcome.summary == f"the float model as it is | {model.ByteSize() / 1e3:.1f} kB"
    assert not outcome.result.plan and outcome.result.save_report(tmp_path / "r.json").is_file()
    smaller = choose(model, feeds(model, 20), max_drop=100, prefer="size", recipes=["int8", "int8-storage"])
    assert not smaller.kept_float and smaller.unchanged.rejected.startswith("larger than")
    assert smaller.reason.endswith("is slower than float, 0.80x its speed, and was kept for its size")
    paced(monkeypatch, 1.01)
    alike = choose(model, feeds(model, 20), max_drop=100, metric="agreement", recipes=[smaller.best.recipe])
    assert alike.reason == f"{smaller.best.recipe} is about as fast as float, and was kept for its size"
    paced(monkeypatch, 2.0)
    assert choose(model, feeds(model, 20), max_drop=100, metric="agreement").reason == ""


def test_speed_keeps_the_fastest_of_the_recipes_that_were_named(monkeypatch):
    paced(monkeypatch, 1.2, 1.5)
    model = mobilenet()
    outcome = choose(model, feeds(model, 20), max_drop=100, recipes=["int8", "int8-rounded"])
    assert outcome.best.recipe == "int8-rounded" and outcome.trials[0].rejected == "slower than int8-rounded"
    assert outcome.best.speed == 1.5 and outcome.unchanged.rejected == "slower than int8-rounded"


def test_accuracy_keeps_the_most_accurate_of_all():
    model = mobilenet()
    outcome = choose(model, feeds(model, 20), metric="sqnr", min_sqnr=5, prefer="accuracy")
    assert recipes_of(outcome) == ["int8", "int8-rounded"] and outcome.best.sqnr >= max(t.sqnr for t in outcome.trials) - 0.1
    assert [trial.rejected == "" for trial in outcome.trials] == [trial is outcome.best for trial in outcome.trials]


def test_all_run_in_turn_once_all_are_made(monkeypatch):
    counts = []

    def against_first(runners, feed, seconds):
        counts.append(len(runners))
        return [Speed(1.0, 0.5, 2.0, 2.0, 2.0, 60)] * len(runners)

    monkeypatch.setattr(selection, "against_first", against_first)
    model = mlp()
    told = []
    outcome = choose(model, feeds(model, 20), recipes=["nope", "int8", "int8-rounded"], max_drop=100, tell=told.append)
    assert counts == [3] and [trial.speed for trial in outcome.trials] == [0.0, 2.0, 2.0]
    assert [trial.speed for trial in told] == [0.0] * 3
    other = choose(model, feeds(model, 20), recipes=["int8"], target="openvino", max_drop=100)
    assert counts == [3] and other.trials[0].pace is None and other.best is other.trials[0]


@pytest.mark.parametrize("prefer", ["speed", "accuracy"])
def test_the_command_copies_the_float_model(prefer, tmp_path, monkeypatch, capsys):
    paced(monkeypatch, 0.7)
    monkeypatch.chdir(tmp_path)
    model = mobilenet()
    onnx.save(model, "m.onnx")
    np.savez("data.npz", x=np.concatenate([feed["x"] for feed in feeds(model, 20)]))
    options = ["--max-drop", "100", "--min-sqnr", "1", "--prefer", prefer, "--save-recipe", "kept.toml"]
    monkeypatch.setattr(sys, "argv", ["onnxq", "auto", "m.onnx", "--data", "data.npz", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert not ended.value.code and "keep float: no recipe that is good enough is better (int8 0.70x" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert rows["float"].rstrip().endswith("kept") and "slower than float" in rows["int8"]
    assert onnx.load("m.auto.onnx").SerializeToString() == model.SerializeToString()
    load_recipe("kept.toml", find_plugins().passes)
