"""The examples of docs/pipelines.md run, each where what it needs is installed."""

from __future__ import annotations

import html
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import onnxq_plugins as onnxq
from tests.zoo import feeds, mlp

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    """What an example prints, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(name: str) -> str:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def numbers(text: str, what: str) -> list[float]:
    """The numbers behind a word."""
    return [float(found) for found in re.findall(rf"{what} ([-+0-9.e]+|inf)", text)]


def test_float_rewrites_in_front_of_onnxruntimes_tool(run):
    output = run("rewrites_then_ort.py")
    plain, equalized = numbers(output, "SQNR")
    assert equalized > plain + 1 and numbers(output, "differs by")[0] < 1e-4


def test_a_calibration_reader_as_it_is(run, tmp_path):
    assert "17/17 Conv as QLinearConv" in run("calibration_reader.py")
    assert (tmp_path / "digits.int8.onnx").is_file()


def test_a_plan_for_onnxruntimes_tool(run):
    ours, theirs = numbers(run("plan_to_ort.py"), "SQNR")
    assert abs(ours - theirs) < 1


@pytest.mark.parametrize("name", ["ort_static.py", "ort_dynamic.py"])
def test_a_script_for_onnxruntime_runs_with_its_import_changed(run, name, tmp_path, monkeypatch):
    """Beside the same script as it was: the same ports, outputs no worse."""
    text = (EXAMPLES / name).read_text("utf-8")
    assert text.count("onnxq_plugins.ort") == 1
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / name).write_text(text.replace("onnxq_plugins.ort", "onnxruntime.quantization"), "utf-8")
    ours = numbers(run(name), "SQNR")
    monkeypatch.chdir(theirs)
    before = numbers(run(str(theirs / name)), "SQNR")
    assert ours[0] == before[0] == float("inf") and all(a >= b for a, b in zip(ours[1:], before[1:], strict=True))
    for file in theirs.glob("*.onnx"):
        own, other = (onnx.load(path, load_external_data=False).graph for path in (tmp_path / file.name, file))
        assert [(v.name, v.type) for v in (*own.input, *own.output)] == [
            (v.name, v.type) for v in (*other.input, *other.output)
        ]


def test_passes_of_onnx_ir(run, tmp_path):
    pytest.importorskip("onnx_ir", reason="needs the extra ir")
    output = run("onnx_ir_passes.py")
    assert "17/17 Conv as QLinearConv" in output and (tmp_path / "digits.int8.onnx").is_file()
    assert numbers(output, "differs by")[0] < 1e-4 and numbers(output, "SQNR")[0] > 30


def test_a_model_in_openvino(run):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    output = run("openvino_model.py")
    there, here = numbers(output, "accuracy")
    assert there > 0.97 and abs(there - here) < 0.01 and numbers(output, "argmax:")[0] > 0.99


def test_a_scikit_learn_pipeline(run):
    pytest.importorskip("skl2onnx", reason="needs skl2onnx")
    output = run("sklearn_pipeline.py")
    before, after = numbers(output, "accuracy")
    assert "3/3 MatMul" in output and after > before - 0.03


def test_a_pass_of_olive(run):
    pytest.importorskip("olive", reason="needs olive-ai")
    assert numbers(run("olive_pass.py"), "accuracy")[0] > 0.97


def test_what_a_notebook_shows():
    model = mlp()
    for node in model.graph.node:
        node.name = f"<b>{node.name}</b>"
    result = onnxq.quantize(model, "int8", feeds(model, 4))
    page = result._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "QGemm" in page
    assert page.count("<tr>") == len(result.report["layers"]) + 1
    few, many = (onnxq.quantize(mlp(), "int8", feeds(mlp(), n), check=False) for n in (4, 32))
    assert any("only 4 samples" in note for note in few.report.notes)
    assert all(note in repr(few) and html.escape(note) in few._repr_html_() for note in few.report.notes)
    assert not many.report.notes and "note" not in repr(many) and "<li>" not in many._repr_html_()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_tested_and_told(example):
    assert f'"{example.name}"' in Path(__file__).read_text("utf-8")
    assert example.name in (ROOT / "docs" / "pipelines.md").read_text("utf-8")
