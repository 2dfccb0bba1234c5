"""The examples of docs/pipelines.md run, each where what it needs is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onnxq_plugins as onnxq
from tests.zoo import feeds, mlp

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"


def run(name: str, folder: Path) -> str:
    """What an example prints, run in a folder of its own."""
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def numbers(text: str, what: str) -> list[float]:
    """The numbers behind a word."""
    return [float(found) for found in re.findall(rf"{what} ([-+0-9.e]+)", text)]


def test_float_rewrites_in_front_of_onnxruntimes_tool(tmp_path):
    told = run("rewrites_then_ort.py", tmp_path)
    plain, equalized = numbers(told, "SQNR")
    assert equalized > plain + 1 and numbers(told, "differs by")[0] < 1e-4


def test_a_calibration_reader_as_it_is(tmp_path):
    assert "17/17 Conv as QLinearConv" in run("calibration_reader.py", tmp_path)
    assert (tmp_path / "digits.int8.onnx").is_file()


def test_a_plan_for_onnxruntimes_tool(tmp_path):
    ours, theirs = numbers(run("plan_to_ort.py", tmp_path), "SQNR")
    assert abs(ours - theirs) < 1


def test_a_model_in_openvino(tmp_path):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    told = run("openvino_model.py", tmp_path)
    there, here = numbers(told, "accuracy")
    assert there > 0.97 and abs(there - here) < 0.01 and numbers(told, "argmax:")[0] > 0.99


def test_a_scikit_learn_pipeline(tmp_path):
    pytest.importorskip("skl2onnx", reason="needs skl2onnx")
    told = run("sklearn_pipeline.py", tmp_path)
    before, after = numbers(told, "accuracy")
    assert "3/3 MatMul" in told and after > before - 0.03


def test_a_pass_of_olive(tmp_path):
    pytest.importorskip("olive", reason="needs olive-ai")
    assert numbers(run("olive_pass.py", tmp_path), "accuracy")[0] > 0.97


def test_what_a_notebook_shows():
    model = mlp()
    for node in model.graph.node:
        node.name = f"<b>{node.name}</b>"
    result = onnxq.quantize(model, "int8", feeds(model, 4))
    page = result._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "QGemm" in page
    assert page.count("<tr>") == len(result.report["layers"]) + 1


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_tested_and_told(example):
    assert f'"{example.name}"' in Path(__file__).read_text("utf-8")
    assert example.name in (ROOT / "docs" / "pipelines.md").read_text("utf-8")
