"""--min-sqnr: the outputs are as good as asked, or the exit code says that they are not."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from onnxq_plugins.report import check
from onnxq_plugins.runtimes.speed import Speed


def test_a_quality_that_is_reached(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--min-sqnr", "10", "-o", "q.onnx")
    assert ran.code == 0 and Path("q.onnx").is_file()


def test_a_quality_that_is_out_of_reach(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--min-sqnr", "250", "-o", "q.onnx", "--report", "r.json")
    assert ran.code == 1
    assert "not 250" in ran.err and "lower --min-sqnr" in ran.err and "Traceback" not in ran.err
    assert "nothing was written (--keep" in ran.err and "q.onnx was not written: " in ran.out
    assert not Path("q.onnx").exists() and '"quality"' in Path("r.json").read_text("utf-8")


def test_keep_writes_what_misses_a_goal(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--min-sqnr", "250", "-o", "q.onnx", "--keep")
    assert ran.code == 1 and "written all the same" in ran.err
    onnxruntime.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])


def test_a_quality_that_cannot_be_checked(ready):
    Path("w.toml").write_text('target = "storage"\n[activations]\nbits = 32\n', "utf-8")
    ran = ready("quantize", "model.onnx", "-r", "w.toml", "--min-sqnr", "10", "-o", "q.onnx")
    assert ran.code == 1 and "was not checked" in ran.err and not Path("q.onnx").exists()


@pytest.mark.parametrize(("ratio", "code"), [(0.9, 1), (1.5, 0)])
def test_a_speed_that_is_asked_for(ready, monkeypatch, ratio, code):
    monkeypatch.setattr(check, "side_by_side", lambda *_: Speed(1.0, 1 / ratio, ratio, ratio, ratio, 9))
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--min-speed", "1.2", "-o", "q.onnx")
    assert ran.code == code and Path("q.onnx").exists() == (code == 0)
    assert f"{ratio:.2f}x the speed of float" in ran.out and ("not 1.2" in ran.err) == (code == 1)


def test_what_is_bad_is_printed_once_and_not_as_a_warning_of_python(ready, monkeypatch):
    monkeypatch.setattr(check, "side_by_side", lambda *_: Speed(1.0, 2.0, 0.5, 0.5, 0.5, 9))
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "-o", "q.onnx")
    assert ran.code == 0 and Path("q.onnx").exists()
    assert ran.err.count("slower than float: 0.50x its speed; next: ") == 1
    assert "warning: slower" in ran.err and "OnnxqWarning" not in ran.err


def test_no_check_says_nothing_of_it(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "-o", "q.onnx", "--no-check", "--report", "r.json")
    assert ran.code == 0 and " dB" not in ran.out and '"check"' not in Path("r.json").read_text("utf-8")


def test_a_speed_needs_the_check(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "-o", "q.onnx", "--no-check", "--min-speed", "1")
    assert ran.code == 1 and "--min-speed was not checked" in ran.err and not Path("q.onnx").exists()
