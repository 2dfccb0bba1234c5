"""Numbers and sentences that users read are about their own files, and true."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxq_plugins import OnnxqError, cli, quantize, runtime
from onnxq_plugins.testing.models import Net
from tests.zoo import cnn, feeds, mlp, mobilenet, transformer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    latency = runtime.latency
    monkeypatch.setattr(runtime, "latency", lambda runners, feed, seconds=1.0: latency(runners, feed, 0.01))


@pytest.fixture
def onnxq(monkeypatch, capsys, tmp_path):
    """The command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnxq", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def padded(model: onnx.ModelProto, size: int = 10_000) -> onnx.ModelProto:
    """The same function in a file that is larger: a constant that nothing reads."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(size, np.float32), "unused"))
    return model


def rows(model: onnx.ModelProto, n: int) -> np.ndarray:
    return np.concatenate([next(iter(feed.values())) for feed in feeds(model, n)])


# ---- size and speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "proto", "external"])
def test_sizes_are_those_of_the_files(kind, tmp_path):
    model, path = padded(mlp()), tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=kind == "external", size_threshold=0, location="weights")
    result = quantize(model if kind == "proto" else path, "int8", feeds(mlp(), 4), workers=1, output=tmp_path / "q.onnx")
    lying = sum(file.stat().st_size for file in tmp_path.iterdir() if file.name != "q.onnx")
    assert result.report["bytes"] == {"float": lying, "quantized": (tmp_path / "q.onnx").stat().st_size}
    assert lying > 40_000


def test_the_report_times_and_judges_against_the_users_own_file(tmp_path, monkeypatch):
    model, path, timed = mlp(), tmp_path / "m.onnx", []
    onnx.save(model, path)
    session = runtime.session
    monkeypatch.setattr(runtime, "session", lambda source, **more: timed.append(source) or session(source, **more))
    for given, expected in ((path, path), (model, model)):
        timed.clear()
        result = quantize(given, "int8", feeds(model, 4), workers=1)
        timed.clear()
        result.save_report(tmp_path / "r.html")
        assert any(source is expected or (isinstance(source, Path) and source == expected) for source in timed)
    path.unlink()
    assert quantize(model, "int8", feeds(model, 4)).original is model


def test_a_file_that_is_gone_is_replaced_by_what_was_made_of_it(tmp_path):
    onnx.save(mlp(), tmp_path / "m.onnx")
    result = quantize(tmp_path / "m.onnx", "int8", feeds(mlp(), 4), workers=1)
    assert result.original == tmp_path / "m.onnx"
    (tmp_path / "m.onnx").unlink()
    result.save_report(tmp_path / "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["measured"]["sqnr"] > 10


def test_half_precision_models_can_be_reported(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(mlp())
    result = quantize(half, "int8", feeds(mlp(), 4), float32=True, workers=1)
    result.save_report(tmp_path / "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["measured"]["sqnr"] > 10


def test_compare_counts_external_data(onnxq):
    onnx.save(mlp(), "a.onnx")
    onnx.save(padded(mlp(), 10**6), "b.onnx", save_as_external_data=True, size_threshold=0, location="weights")
    np.savez("d.npz", x=rows(mlp(), 4))
    code, out, _ = onnxq("compare", "a.onnx", "b.onnx", "--data", "d.npz")
    assert code == 0 and "-> 4.0" in out
