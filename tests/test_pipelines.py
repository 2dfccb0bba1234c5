"""The examples of docs/pipelines.md run, each where what it needs is installed."""

from __future__ import annotations

import html
import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins import cli, runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split
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


def test_a_script_for_nncf_runs_with_its_import_changed(run, tmp_path):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    pytest.importorskip("nncf", reason="needs nncf")
    output = run("openvino_model.py")
    before, after = numbers(output, "accuracy")
    assert after > before - 0.01 and "17/17 Conv as Convolution u8" in output and (tmp_path / "digits.int8.xml").is_file()


def test_a_scikit_learn_pipeline(run):
    pytest.importorskip("skl2onnx", reason="needs skl2onnx")
    output = run("sklearn_pipeline.py")
    before, after = numbers(output, "accuracy")
    assert "3/3 MatMul" in output and after > before - 0.03


def test_text_and_maps_of_a_pipeline_stay():
    """Columns of text, classes as text and a ZipMap are as they were; the matrix products run in integers."""
    skl2onnx = pytest.importorskip("skl2onnx", reason="needs skl2onnx")
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    from sklearn.compose import ColumnTransformer
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    rng = np.random.default_rng(0)
    numbers_, colors = rng.normal(size=(256, 5)), rng.choice(["red", "green", "blue"], size=(256, 1)).astype(object)
    classes = np.where((numbers_[:, 0] > 0) ^ (colors[:, 0] == "red"), "yes", "no")
    columns = ColumnTransformer([("n", StandardScaler(), [0, 1, 2, 3, 4]), ("c", OneHotEncoder(), [5])])
    pipeline = make_pipeline(columns, MLPClassifier((64, 64), max_iter=60, random_state=0))
    pipeline.fit(np.concatenate([numbers_.astype(object), colors], 1), classes)
    types = [("numbers", FloatTensorType([None, 5])), ("colors", StringTensorType([None, 1]))]
    model = skl2onnx.convert_sklearn(pipeline, initial_types=types)
    feed = {"numbers": numbers_.astype(np.float32), "colors": colors}
    result = onnxq.quantize(model, {"extends": "int8", "without": ["placement"]}, [feed], check=False)
    kept = [[node.op_type for node in m.graph.node if node.domain == "ai.onnx.ml"] for m in (model, result.model)]
    assert kept[0] == kept[1] and {"Scaler", "OneHotEncoder", "ZipMap"} <= set(kept[0])
    assert all(layer.quantized for layer in onnxq.audit(result.model).layers if layer.constant_weight)
    before, after = (runtimes.session(m).run(None, feed) for m in (model, result.model))
    assert np.mean(before[0] == after[0]) > 0.98 and after[1][0].keys() == {"yes", "no"}


def test_trees_are_left_as_they_are():
    skl2onnx = pytest.importorskip("skl2onnx", reason="needs skl2onnx")
    from sklearn.datasets import load_iris
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_iris(return_X_y=True)
    x = x.astype(np.float32)
    model = skl2onnx.to_onnx(DecisionTreeClassifier(max_depth=4, random_state=0).fit(x, y), x[:1])
    result = onnxq.quantize(model, "int8", x, check=False)
    before, after = (runtimes.session(m).run(None, {"X": x}) for m in (model, result.model))
    assert np.array_equal(before[0], after[0]) and before[1] == after[1]
    assert "no layer with a constant weight" in result.summary


def test_a_workflow_of_olive(tmp_path, monkeypatch):
    """As docs/pipelines.md types it; "olive.json" names "olive_digits.py"."""
    pytest.importorskip("olive", reason="needs the extra olive", exc_type=ImportError)
    from olive.cli.launcher import main

    from onnxq_plugins.olive import package_config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    for name in ("olive.json", "olive_digits.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "start").mkdir()
    data = digits_split()
    np.savez("start/calibration.npz", image=data["calibration_images"])
    np.savez("start/test.npz", image=data["test_images"], labels=data["test_labels"])
    shutil.copy(digits_model_path(), "start/digits.onnx")
    Path("passes.json").write_text(json.dumps(package_config()))
    main(["run", "--config", "olive.json", "--package-config", "passes.json"])
    points = json.loads(Path("olive/footprint.json").read_text("utf-8"))
    text = json.dumps(points)
    assert all(name in text for name in ("int8", "int4-storage", "ort-cpu", "ort-cpu-avx2"))
    assert "QLinearConv" in onnxq.audit("olive/model.onnx").summary


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


def test_the_workflow_of_github_runs(tmp_path, monkeypatch):
    """Its commands, with the limits that it has but for the speed, which is not that of this machine."""
    text = (EXAMPLES / "ci.yml").read_text("utf-8")
    commands = [re.sub(r"\s+", " ", found) for found in re.findall(r"run: (?:>\n\s+)?(onnxq (?:.+\n)(?:\s+--.+\n)*)", text)]
    assert [command.split()[1] for command in commands] == ["quantize", "compare", "audit"]
    monkeypatch.chdir(tmp_path)
    data = digits_split()
    np.savez("calibration.npz", image=data["calibration_images"])
    np.savez("test.npz", image=data["test_images"], labels=data["test_labels"])
    shutil.copy(digits_model_path(), "model.onnx")
    for command in commands:
        typed = command.replace("--min-speed 1.2", "--min-speed 0.001").replace('"$GITHUB_STEP_SUMMARY"', "summary.md")
        monkeypatch.setattr("sys.argv", typed.split())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, command
    assert Path("accuracy.xml").is_file() and Path("kernels.xml").is_file()
    assert Path("summary.md").read_text("utf-8").count("### model.int8.onnx") == 2
