"""The check at the end of every run: what is bad is said in Python, in notebooks, in the report and on its page; what is
good is not; and the work is bounded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxq_plugins as onnxq
from onnxq_plugins import OnnxqError, OnnxqWarning, runtimes
from onnxq_plugins.report import check as checking
from onnxq_plugins.report.check import self_check
from onnxq_plugins.runtimes.speed import Speed
from tests.jobs import make_job
from tests.networks import network, weight
from tests.zoo import cnn, control_flow, feeds, mlp, mobilenet, transformer

PLAIN = {"weights": {"bits": 8}, "activations": {"bits": 8}, "data": {"outliers": True}}
LOUD = {**PLAIN, "pass": [{"use": "ranges", "method": "minmax"}]}
RECIPES: dict[str, Any] = {
    "int8 without a quality": LOUD,
    "rounded": {**LOUD, "pass": [*LOUD["pass"], {"use": "round", "method": "gptq"}]},
    "2-bit weights alone": {"weights": {"bits": 2}, "activations": {"bits": 32}, "target": "storage"},
    "an npu": {**LOUD, "target": "npu"},
    "one scale per tensor": {**LOUD, "target": "per-tensor", "weights": {"bits": 8, "block": "tensor"}},
}


@pytest.fixture(autouse=True)
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models are as fast, on every machine."""
    measured(monkeypatch, 1.0)


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(checking, "side_by_side", lambda *_: Speed(1.0, 1 / ratio, ratio, ratio, ratio, 9))


def images() -> np.ndarray:
    return np.concatenate([feed["x"] for feed in feeds(cnn(), 8)])


def deep(layers: int = 4, width: int = 64) -> onnx.ModelProto:
    """Layers that two bits destroy, and that are large enough to become smaller."""
    names = ["x", *(f"r{n}" for n in range(layers - 1)), "y"]
    operators: list[Any] = []
    for n in range(layers):
        operators += [("MatMul", [names[n], f"w{n}"], [f"a{n}" if n < layers - 1 else "y"], {})]
        operators += [("Relu", [f"a{n}"], [names[n + 1]], {})] if n < layers - 1 else []
    return network(operators, ["N", width], {f"w{n}": (width, width) for n in range(layers)})


def rows(count: int = 16, width: int = 64, wild: float = 0.0) -> list[dict[str, np.ndarray]]:
    """Samples; one of them, which is not held out, with a wild value."""
    x = np.random.default_rng(1).standard_normal((count, 1, width)).astype(np.float32)
    x[0, 0, 0] = wild or x[0, 0, 0]
    return [{"x": row} for row in x]


def caught(*args: Any, **options: Any) -> tuple[onnxq.Result, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = onnxq.quantize(*args, **options)
    return result, [one for one in seen if issubclass(one.category, OnnxqWarning)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_destroyed_result_is_never_silent(recipe):
    result, seen = caught(deep(), RECIPES[recipe], rows(wild=1e5 if "2-bit" not in recipe else 0.0))
    assert result.check is not None and result.check.destroyed == ("y",) and result.check.sqnr < 3
    (warning,) = result.report.warnings
    assert warning.startswith("output 'y' is destroyed: ") and "next: " in warning
    assert f"warning: {warning}" in repr(result)
    assert "is destroyed" in result._repr_html_() and "<strong>" in result._repr_html_()
    (one,) = seen
    assert str(one.message) == warning and one.filename == __file__
    assert f"{result.check.sqnr:.1f} dB" in result.summary
    table = json.loads(json.dumps(result.report.to_dict()))
    assert table["check"]["destroyed"] == ["y"] and table["warnings"] == [warning]


def test_a_good_result_says_what_it_is_worth_and_nothing_else():
    result, seen = caught(deep(), "int8", rows())
    assert not seen and not result.report.warnings and "warning" not in repr(result)
    check = result.check
    assert check is not None and check.sqnr > 20 and not check.destroyed and not check.slower and not check.larger
    assert check.before == result.report.size("float") and check.after == result.report.size("quantized")
    assert result.summary.endswith(f"| {check.sqnr:.1f} dB on 16 calibration samples, about the speed of float")
    assert [y["name"] for y in result.report.check["outputs"]] == ["y"]


def test_what_is_measured_is_the_user_s_model_beside_the_exported_one():
    model, data = cnn(), feeds(cnn(), 3)
    result = onnxq.quantize(model, PLAIN, data)
    reference, outputs = (runtimes.per_feed(runtimes.session(m), data) for m in (model, result.model))
    assert result.check is not None and result.check.samples == 3
    assert result.check.sqnr == pytest.approx(onnxq.report.check.judge_outputs(["y"], reference, outputs)[0].sqnr)


def test_slower_is_said_with_one_thing_to_try(monkeypatch):
    measured(monkeypatch, 0.8)
    result, seen = caught(deep(), "int8", rows())
    (warning,) = result.report.warnings
    assert warning.startswith("slower than float: 0.80x its speed; next: --target storage") and len(seen) == 1
    assert result.report.check["slower"] and "0.80x the speed of float" in result.summary
    advised = onnxq.quantize(deep(), "int8", rows(), target="storage", settings="activations.bits=32")
    assert advised.check is not None and not any(row["weights"] == "float" for row in advised.report.layers)


def test_slower_without_being_sure_is_not_said(monkeypatch):
    monkeypatch.setattr(checking, "side_by_side", lambda *_: Speed(1.0, 1.2, 0.83, 0.5, 1.2, 9))
    result, seen = caught(deep(), "int8", rows())
    assert not seen and "roughly 0.83x" in result.summary


def test_larger_is_said():
    model = network([("Conv", ["x", "w"], ["y"], {})], [1, 2, 8, 8], {"w": (2, 2, 1, 1)})
    result, seen = caught(model, PLAIN, feeds(model, 8))
    assert result.report.check["larger"] and "larger than float: " in str(seen[0].message)
    assert "keep the float model" in result.report.warnings[0]


def test_poor_is_said_until_nothing_is_left_to_try():
    data = rows(wild=200.0)
    result, _ = caught(deep(), LOUD, data)
    assert "is poor" in result.report.warnings[0] and "next: --min-sqnr 20" in result.report.warnings[0]
    better, _ = caught(deep(), LOUD, data, min_sqnr=20)
    assert not better.missed and better.check is not None and better.check.sqnr >= 20
    four, _ = caught(deep(), {**LOUD, "weights": {"bits": 2}}, data)
    assert "next: -r int8" in four.report.warnings[0]


def test_nan_in_the_result_alone_is_said():
    """A network whose exported form divides by what was rounded to 0."""
    model = network([("MatMul", ["x", "w"], ["y"], {})], [1, 16], {"w": (16, 16)})
    broken = network(
        [("MatMul", ["x", "w"], ["a"], {}), ("Mul", ["a", "zero"], ["z"], {}), ("Div", ["z", "z"], ["y"], {})],
        [1, 16],
        {"w": weight((16, 16)), "zero": np.float32(0)},
    )
    job = make_job(model, PLAIN)
    job.report["bytes"] = {"float": 9, "quantized": 8}
    check = self_check(job, broken, model, began=0.0)
    assert check is not None and check.destroyed == ("y",) and "NaN" in job.report.warnings[0]


def test_a_result_that_does_not_run_is_said():
    model = network([("MatMul", ["x", "w"], ["y"], {})], ["N", 16], {"w": (16, 16)})
    broken = network(
        [("MatMul", ["x", "w"], ["a"], {}), ("Reshape", ["a", "shape"], ["y"], {})],
        ["N", 16],
        {"w": (16, 16), "shape": np.array([7, 7])},
    )
    job = make_job(model, PLAIN)
    job.report["bytes"] = {"float": 9, "quantized": 8}
    assert self_check(job, broken, model, began=0.0) is None
    assert "does not run" in job.report.warnings[0]


def test_scores_next_to_nothing_are_a_note_not_a_warning():
    def scores(bias: float) -> onnx.ModelProto:
        steps = [("MatMul", ["x", "w"], ["a"], {}), ("Add", ["a", "b"], ["s"], {}), ("Sigmoid", ["s"], ["p"], {})]
        constants = {"w": weight((16, 4)), "b": np.full(4, bias, np.float32), "v": weight((16, 4), 1)}
        return network([*steps, ("MatMul", ["x", "v"], ["y"], {})], [1, 16], constants, outputs=["p", "y"])

    job = make_job(scores(-9), PLAIN)
    job.report["bytes"] = {"float": 9, "quantized": 8}
    check = self_check(job, scores(-60), scores(-9), began=0.0)
    assert check is not None and check.worst is not None and check.worst.name == "y"
    assert not job.report.warnings and "hardly varies" in job.report.notes[-1] and "'p" in job.report.notes[-1]


def test_nothing_is_checked_if_the_user_says_so():
    result, seen = caught(deep(), LOUD, rows(wild=1e5), check=False)
    assert result.check is None and not seen and "dB" not in result.summary and not result.report.check


def test_inner_runs_pay_nothing(monkeypatch):
    calls: list[int] = []
    check = onnxq.engine.self_check
    monkeypatch.setattr(onnxq.engine, "self_check", lambda *a, **k: calls.append(1) or check(*a, **k))
    result = onnxq.quantize(control_flow(), "int8", feeds(control_flow(), 6))
    assert len(calls) == 1
    assert result.again is not None and result.again("int8").report.check == {}
    onnxq.diagnose(result, attempts=1)
    onnxq.auto(mlp(), feeds(mlp(), 16), attempts=1)
    assert len(calls) == 1


class Counting:
    """Sessions that count their runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        session, counting = runtimes.session, self

        class Session:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def __getattr__(self, name: str) -> Any:
                return getattr(self.inner, name)

            def run(self, *args: Any) -> Any:
                counting.runs += 1
                return self.inner.run(*args)

        monkeypatch.setattr(checking.runtimes, "session", lambda *a, **k: Session(session(*a, **k)))


@pytest.mark.parametrize(("samples", "runs"), [(3, 2 * 3 + 1), (64, 2 * 16 + 1), (400, 2 * 16 + 1)])
def test_work_is_bounded(monkeypatch, samples, runs):
    model = deep()
    job = make_job(model, PLAIN, n=samples)
    job.report["bytes"] = {"float": 9, "quantized": 8}
    counting = Counting(monkeypatch)
    monkeypatch.setattr(checking, "multiply_adds", lambda *_: 1.0)
    check = self_check(job, model, model, began=0.0)
    assert counting.runs == runs and check is not None and check.samples == (runs - 1) // 2


def test_much_work_is_done_on_few_samples(monkeypatch):
    monkeypatch.setattr(checking, "multiply_adds", lambda *_: 1e12)
    result = onnxq.quantize(deep(), LOUD, rows())
    assert result.check is not None and result.check.samples == 2


def test_large_outputs_are_kept_of_few_samples(monkeypatch):
    monkeypatch.setattr(checking, "_BYTES", 1)
    result = onnxq.quantize(deep(), LOUD, rows())
    assert result.check is not None and result.check.samples == 2


def test_no_run_is_begun_when_time_is_up(monkeypatch):
    monkeypatch.setattr(checking, "_SECONDS", -1.0)
    monkeypatch.setattr(checking, "_SHARE", 0.0)
    result = onnxq.quantize(deep(), LOUD, rows(64))
    assert result.check is not None and result.check.samples == 2
    result = onnxq.quantize(deep(), LOUD, rows(64), min_sqnr=10)
    assert result.check is not None and result.check.samples > 2  # whoever insists on decibels gets all of them


def test_samples_of_the_quality_are_used_again(monkeypatch):
    monkeypatch.setattr(checking, "multiply_adds", None)  # nobody chooses again
    result = onnxq.quantize(deep(), "int8", rows(64))
    assert result.check is not None and result.check.samples == result.report.quality["samples"]


def test_streams_run_on_their_own_states():
    operators = [("Concat", ["x", "h"], ["c"], {"axis": 1}), ("MatMul", ["c", "w"], ["a"], {}), ("Tanh", ["a"], ["hn"], {})]
    model = network(
        [*operators, ("MatMul", ["hn", "v"], ["y"], {})], [1, 8], {"w": (24, 16), "v": (16, 4)}, outputs=["y", "hn"]
    )
    model.graph.input.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 16]))
    data = np.random.default_rng(0).standard_normal((40, 1, 8)).astype(np.float32)
    result = onnxq.quantize(model, "int8", [{"x": x} for x in data], state={"hn": "h"})
    check = result.check
    assert check is not None and check.kind == "steps" and check.samples >= 10
    steps = [{"x": x} for x in data[-check.samples :]]
    assert {y.name for y in check.outputs} == {"y", "hn"} and len(steps) == check.samples


def test_without_data_the_check_runs_on_random_inputs():
    recipe = {"weights": {"bits": 8}, "activations": {"bits": 32}, "target": "storage"}
    result, seen = caught(deep(), recipe)
    assert result.check is not None and result.check.kind == "random inputs" and not seen
    assert "dB on random inputs" in result.summary
    lost, seen = caught(deep(), {**recipe, "weights": {"bits": 2}})
    assert lost.report.check["destroyed"] and "next: give samples (--data)" in str(seen[0].message)


def test_a_target_that_does_not_run_here_is_not_timed():
    result = onnxq.quantize(mobilenet(), {**LOUD, "target": "npu"}, feeds(mobilenet(), 8))
    assert result.check is not None and result.check.speed is None and "speed" not in result.summary
    missed, seen = caught(mobilenet(), {**LOUD, "target": "npu"}, feeds(mobilenet(), 8), min_speed=1.0)
    assert "--min-speed was not checked" in missed.missed and missed.missed in str(seen[0].message)


def test_a_random_model_is_said_to_be_random():
    model = network(
        [("MatMul", ["x", "w"], ["a"], {}), ("RandomNormalLike", ["a"], ["n"], {}), ("Add", ["a", "n"], ["y"], {})],
        [1, 64],
        {"w": (64, 64)},
    )
    result = onnxq.quantize(model, PLAIN, feeds(model, 4))
    assert result.check is not None and not result.check.outputs and not result.report.warnings
    assert any("random" in note for note in result.report.notes)


@pytest.mark.parametrize("goals", [{"min_sqnr": 250.0}, {"min_speed": 1.2}, {"min_sqnr": 250.0, "min_speed": 1.2}])
def test_what_misses_a_goal_is_not_written(tmp_path, goals):
    path = tmp_path / "q.onnx"
    path.write_bytes(b"of a run before")
    result, seen = caught(transformer(), LOUD, feeds(transformer(), 8), output=path, **goals)
    assert path.read_bytes() == b"of a run before" and [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
    assert result.missed and result.missed in str(seen[0].message) and result.missed in repr(result)
    kept = onnxq.quantize(transformer(), LOUD, feeds(transformer(), 8), output=path, keep=True, **goals)
    assert kept.missed and onnx.load(path).graph.node


def test_goals_that_are_reached_write_the_model(tmp_path, monkeypatch):
    measured(monkeypatch, 1.5)
    result = onnxq.quantize(deep(), LOUD, rows(), output=tmp_path / "q.onnx", min_sqnr=10, min_speed=1.2)
    assert not result.missed and (tmp_path / "q.onnx").is_file()


@pytest.mark.parametrize("goals", [{"min_speed": 0.0}, {"min_speed": float("nan")}, {"min_sqnr": float("inf")}])
def test_goals_must_make_sense(goals):
    with pytest.raises(OnnxqError, match="min_s"):
        onnxq.quantize(deep(), LOUD, rows(), **goals)


def test_the_page_shows_the_warning(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    result = onnxq.quantize(deep(), LOUD, rows(wild=1e5))
    result.save_report(tmp_path / "r.html")
    assert "is destroyed" in (tmp_path / "r.html").read_text("utf-8")
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["check"]["destroyed"] == ["y"]


def test_onnxruntime_stays_quiet(capfd):
    onnxq.quantize(deep(), LOUD, rows())
    with pytest.raises(OnnxqError):
        onnxq.quantize(b"none", LOUD, rows())
    assert not capfd.readouterr().err


def test_an_output_in_place_of_the_model_itself(tmp_path):
    path: Path = tmp_path / "m.onnx"
    onnx.save(deep(), path)
    result = onnxq.quantize(path, LOUD, rows(), output=path)
    assert result.check is not None and result.check.sqnr > 20
