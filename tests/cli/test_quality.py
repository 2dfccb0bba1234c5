"""--min-sqnr: the outputs are as good as asked, or the exit code says that they are not."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime


def test_a_quality_that_is_reached(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--min-sqnr", "10", "-o", "q.onnx")
    assert ran.code == 0 and Path("q.onnx").is_file()


def test_a_quality_that_is_out_of_reach(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--min-sqnr", "250", "-o", "q.onnx", "--report", "r.json")
    assert ran.code == 1
    assert "not 250" in ran.err and "lower --min-sqnr" in ran.err and "Traceback" not in ran.err
    onnxruntime.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])
    assert '"quality"' in Path("r.json").read_text("utf-8")


def test_a_quality_that_cannot_be_checked(ready):
    Path("w.toml").write_text('target = "storage"\n[activations]\nbits = 32\n', "utf-8")
    ran = ready("quantize", "model.onnx", "-r", "w.toml", "--min-sqnr", "10", "-o", "q.onnx")
    assert ran.code == 1 and "was not checked" in ran.err
    assert onnx.load("q.onnx").graph.node
