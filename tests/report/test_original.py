"""Sizes, times and accuracy in a report are those of the user's own files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq_plugins import quantize, runtimes
from tests.zoo import cnn, feeds, mlp, rows


def padded(model: onnx.ModelProto, size: int = 10_000) -> onnx.ModelProto:
    """The same function in a file that is larger: a constant that nothing reads."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(size, np.float32), "unused"))
    return model


pytestmark = pytest.mark.usefixtures("quick")

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
    session = runtimes.session
    monkeypatch.setattr(runtimes, "session", lambda source, **more: timed.append(source) or session(source, **more))
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


def test_a_model_that_is_written_over_is_not_taken_for_the_original(tmp_path):
    onnx.save(padded(mlp()), tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    result = quantize(tmp_path / "m.onnx", "int8", feeds(mlp(), 4), workers=1, output=tmp_path / "m.onnx")
    assert result.report["bytes"]["float"] == size and isinstance(result.original, onnx.ModelProto)


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
    assert code == 0 and "4.3 -> 4004.7 kB" in out


# ---- what was written -----------------------------------------------------------------------------------------------------


def test_what_was_written_and_how_long_it_took_is_told(onnxq):
    onnx.save(cnn(), "m.onnx")
    np.savez("d.npz", x=rows(cnn(), 8))
    _, out, _ = onnxq("quantize", "m.onnx", "--data", "d.npz", "--report", "r.html", "--overrides", "o.json")
    lines = out.splitlines()
    assert lines[-2].startswith("report: r.html, r.json (") and lines[-2].endswith(" s)")
    assert lines[-1] == "overrides: o.json, for o.onnx" and all(Path(f).exists() for f in ("r.html", "r.json", "o.onnx"))
    _, out, _ = onnxq("quantize", "m.onnx", "--data", "d.npz", "--report", "only.json")
    assert out.splitlines()[-1].startswith("report: only.json (")
    code, _, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "--report", "r.pdf", "-o", "none.onnx")
    assert code == 2 and "--report 'r.pdf': a report is a page or JSON" in err and not Path("none.onnx").exists()


# ---- widths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "told"), [(["W6A8", "W8A8"], True), (["W4A8", "W8A8"], False)])
def test_a_search_tells_what_its_widths_take_in_the_file(candidates, told):
    model = mlp()
    step = {"use": "mixed-precision", "candidates": candidates, "limit": 0.9, "method": "nearest", "curve": 3}
    result = quantize(model, {"pass": [step]}, feeds(model, 8), workers=1)
    (point,) = (p for p in result.report["steps"][0]["result"]["curve"] if p.get("chosen"))
    eight = quantize(model, "int8", feeds(model, 8), workers=1)
    counts = {y.weight: y.shape for y in result.graph.layers}

    def stored(made) -> float:
        types = {t.name: t.data_type for t in made.graph.initializer}
        sizes = {
            t.name: np.prod(t.dims) * (0.5 if types[t.name] == onnx.TensorProto.INT4 else 1)
            for t in made.graph.initializer
            if types[t.name] in (onnx.TensorProto.INT4, onnx.TensorProto.INT8) and len(t.dims) == 2
        }
        assert len(sizes) == len(counts)
        return float(sum(sizes.values()))

    assert point["stored"] == pytest.approx(stored(result.model) / stored(eight.model), abs=1e-4)
    assert point["size"] <= 0.9 and (point["stored"] == 1) == told
    assert any("codes of 5 to 7 bits take a byte" in note for note in result.report["notes"]) == told


def test_the_curve_shows_what_lies_in_the_file():
    from onnxq_plugins.report.curve import Curve

    model = mlp()
    step = {"use": "mixed-precision", "method": "nearest", "curve": 3}
    curve = Curve.of(quantize(model, {"pass": [step]}, feeds(model, 8), workers=1))
    assert curve is not None and curve.numbers[:3] == ["size", "stored", "bops"]
    columns, rows = curve.table()
    assert [row[columns.index("file")] for row in rows] == [f"{p['stored']:.3f}" for p in curve.points]
    assert all(p["stored"] >= p["size"] for p in curve.points)
