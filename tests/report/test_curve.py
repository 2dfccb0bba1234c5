"""The curve of a search over widths: points made again, files, table and drawing; plans for onnxruntime's own tool."""

from __future__ import annotations

import io
import json
import os
import sys
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxq_plugins import (
    OnnxqError,
    Recipe,
    point_recipe,
    quantize,
)
from onnxq_plugins.passes.mixed_precision import MixedPrecision
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.report.curve import Curve, check_folder
from onnxq_plugins.search.widths import Widths
from tests.zoo import ZOO, feeds, mlp, mobilenet, rows, slowly


def recipe_of(target: str = "ort-cpu", front=(), behind=(), **parameters) -> dict:
    step = {"use": "mixed-precision", "method": "nearest", "curve": 3, **parameters}
    return {"target": target, "pass": [*front, step, *behind]}


def searched(model, n: int = 6, recipe=None, **parameters):
    return quantize(model, recipe or recipe_of(**parameters), feeds(model, n), workers=1)


def bare(model) -> bytes:
    """A model without the metadata that names its recipe."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.metadata_props[:]
    return copy.SerializeToString()


def chosen(points) -> dict:
    (found,) = (p for p in points if p.get("chosen"))
    return found


@pytest.fixture
def onnxq(onnxq):
    """`onnxq quantize` in a folder with a model and data."""
    onnx.save(mlp(), "model.onnx")
    np.savez("data.npz", x=rows(mlp(), 8))
    Path("search.json").write_text(json.dumps(recipe_of()))
    return partial(onnxq, "quantize", "model.onnx", "--data", "data.npz")


# ---- a point made again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {}),
        ("mobilenet", {"method": "gptq", "front": [{"use": "scale-inputs"}, {"use": "ranges"}]}),
        *slowly(("mobilenet", {"behind": [{"use": "bias-correct"}], "budget": "sqnr", "limit": 25.0})),
        ("transformer", {"budget": "bops"}),
        ("resnet20", {"candidates": ["float", "W4A8", "W8A8"], "budget": "sqnr", "limit": 20.0}),
        ("cnn", {"target": "npu", "behind": [{"use": "bias-correct"}], "candidates": ["W4A8", "W8A16"], "budget": "bops"}),
        *slowly(("cnn", {"target": "npu", "candidates": ["W4A8", "W8A8", "W8A16"], "budget": "bops"})),
    ],
)
def test_a_point_made_again_is_the_network_that_the_search_gave(name, settings, monkeypatch):
    model = ZOO[name]()
    first = searched(model, 18, **settings)  # the search rounds on half of them
    curve = Curve.of(first)
    found = chosen(curve.points)
    monkeypatch.setattr(Widths, "within", None)
    monkeypatch.setattr(Widths, "prices", None)
    table, seed = point_recipe({"recipe": curve.recipe, "widths": found["widths"], "seed": 0})
    again = quantize(model, table, feeds(model, 18), workers=1, seed=seed)
    assert bare(again.model) == bare(first.model)
    (told,) = (step["result"] for step in again.report["steps"] if step["pass"] == "mixed-precision")
    assert told == {"groups": len(found["widths"]), "size": found["size"], "bops": found["bops"]}
    assert again.report["floats"] == first.report["floats"]
    assert Curve.of(again) is None


def test_the_recipe_in_the_model_makes_it_again():
    widths = chosen(Curve.of(searched(mlp())).points)["widths"]
    result = quantize(mlp(), recipe_of(widths=widths), feeds(mlp(), 6), workers=1)
    kept = next(p.value for p in result.model.metadata_props if p.key == "onnxq.recipe")
    again = quantize(mlp(), json.loads(kept), feeds(mlp(), 6), workers=1)
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_widths_are_written_as_an_inline_table():
    table = tomllib.loads('[[pass]]\nuse = "mixed-precision"\nwidths = {"a/b.c" = "W4A8", "tensor x" = "float"}')
    passes = find_plugins().passes
    (step,) = load_recipe(table, passes).passes
    assert step.widths == {"a/b.c": "W4A8", "tensor x": "float"}
    assert load_recipe(Recipe(passes=(step,)).to_dict(), passes).passes == (step,)
    (step,) = load_recipe(recipe_of(), passes, ['mixed-precision.widths={a = "W4A8"}']).passes
    assert step.widths == {"a": "W4A8"}
    hash(step)


@pytest.mark.parametrize("widths", [{"a": 4}, ["W4A8"], "W4A8", {"a": ["W4A8"]}])
def test_widths_that_are_no_table_of_texts_are_refused(widths):
    with pytest.raises(OnnxqError, match="a table of texts"):
        load_recipe(recipe_of(widths=widths), find_plugins().passes)


def test_all_that_does_not_fit_is_told_in_one_sentence():
    widths = chosen(Curve.of(searched(mlp())).points)["widths"]
    first, second, *_ = widths
    asked = {name: w for name, w in widths.items() if name != first} | {second: "W8A16", "nowhere": "W8A8"}
    with pytest.raises(OnnxqError) as error:
        quantize(mlp(), recipe_of(widths=asked), feeds(mlp(), 6), workers=1)
    (text,) = error.value.problems
    assert "no group is called 'nowhere'" in text and f"'{first}' have no width" in text
    assert f"does not run W8A16 for '{second}'" in text and "'ort-cpu'" in text
    with pytest.raises(OnnxqError, match="'W8'"):
        quantize(mlp(), recipe_of(widths={"a": "W8"}), feeds(mlp(), 6), workers=1)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("{", "cannot be read"),
        ("[]", "has no recipe and widths"),
        ("{}", "has no recipe and widths"),
        ('{"points": []}', "whole curve"),
        ('{"recipe": {}, "widths": {}}', "no pass 'mixed-precision'"),
        ('{"recipe": {"pass": 3}, "widths": {}}', "no pass 'mixed-precision'"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_point_is_told(content, phrase, tmp_path):
    path = tmp_path / "point.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OnnxqError, match=phrase) as error:
        point_recipe(path)
    assert len(error.value.problems) == 1 and "point.json" in str(error.value)


# ---- files, table, drawing ----------------------------------------------------------------------------------------------


def test_files_hold_the_curve(tmp_path):
    result = searched(mlp(), metric="agreement")
    curve = Curve.of(result, "model.onnx")
    assert curve.write(tmp_path / "made") == []
    folder = tmp_path / "made"
    whole = json.loads((folder / "curve.json").read_text())
    assert whole["model"] == "model.onnx" and whole["recipe"] == result.report["recipe"] and whole["metric"] == "agreement"
    costs = [p[whole["cost"]] for p in whole["points"]]
    assert costs == sorted(costs, reverse=True) and sum(p["chosen"] for p in whole["points"]) == 1
    reported = result.report["steps"][0]["result"]["curve"]
    assert len(reported) == len(whole["points"])
    for entry in whole["points"]:
        point = json.loads((folder / entry["file"]).read_text())
        (told,) = (p for p in reported if p["widths"] == point["widths"])
        assert list(point["widths"]) == whole["groups"] and point["recipe"] == whole["recipe"]
        for key in ("size", "bops", "sqnr", "agreement"):
            assert point[key] == entry[key] == told[key]
        assert point["chosen"] == entry["chosen"] == told.get("chosen", False)
    assert {f.name for f in folder.iterdir()} == {
        "curve.json",
        "curve.png",
        "curve.svg",
        *(p["file"] for p in whole["points"]),
    }


def test_an_earlier_curve_gives_way_and_other_files_stay(tmp_path):
    curve = Curve.of(searched(mlp()))
    for name in ("point-77.json", "point-best.json", "notes.txt"):
        (tmp_path / name).write_text("x")
    curve.write(tmp_path)
    assert not (tmp_path / "point-77.json").exists()
    assert (tmp_path / "point-best.json").read_text() == (tmp_path / "notes.txt").read_text() == "x"
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_a_failure_while_writing_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    curve = Curve.of(searched(mlp()))
    replace = os.replace
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: replace(a, b) if "02" not in str(b) else (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OnnxqError, match="No space left"):
        curve.write(tmp_path)
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {"point-01.json"} and json.loads((tmp_path / "point-01.json").read_text())["widths"]


def test_places_that_cannot_take_a_curve_are_told_before_the_search(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "curve.json").mkdir(parents=True)
    for place, phrase in (("file", "is a file"), ("no/where", "does not exist"), ("full", "is a folder")):
        with pytest.raises(OnnxqError, match=phrase):
            check_folder(tmp_path / place)
    check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_table_counts_every_group_once():
    curve = Curve.of(searched(mobilenet(), candidates=["W4A8", "W6A8", "W8A8"]))
    columns, rows = curve.table()
    at = [i for i, name in enumerate(columns) if name.startswith("W")]
    assert [columns[i] for i in at] == ["W8A8", "W6A8", "W4A8"]
    for row, point in zip(rows, curve.points, strict=True):
        assert len(row) == len(columns)
        assert sum(int(row[i] or 0) for i in at) == len(point["widths"])
        assert float(row[columns.index("size")]) == pytest.approx(point["size"], abs=1e-3)
        assert row[-1] == ("chosen" if point.get("chosen") else "")


def test_costs_that_are_not_known_here_are_shown():
    points = tuple(
        {"size": 1.0 - n / 10, "bops": 1.0, "latency": 2.5 - n, "sqnr": 20.0 - n, "top1": 80.0, "widths": {"a": "W8A8"}}
        for n in range(3)
    )
    curve = Curve("", {}, 0, "latency", "top1", points)
    assert curve.numbers == ["size", "bops", "latency", "sqnr", "top1"]
    assert "1.500" in curve.table()[1][1]
    left, right = curve.figure().axes
    assert left.get_xlabel() == right.get_xlabel() == "latency" and right.get_ylabel() == "top1"


def test_the_drawing_shows_every_point_on_any_background(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # it would open windows
    curve = Curve.of(searched(mlp(), metric="agreement"))
    left, right = curve.figure().axes
    for axes, key in ((left, "sqnr"), (right, "agreement")):
        (line,) = axes.lines
        assert np.array_equal(line.get_xydata(), [(p["size"], p[key]) for p in curve.points])
        assert any("chosen" in text.get_text() for text in axes.texts)
    assert len(Curve.of(searched(mlp())).figure().axes) == 1
    files, notes = curve.drawn()
    image = np.asarray(Image.open(io.BytesIO(files["curve.png"])).convert("RGBA"))
    assert not notes and image[0, 0, 3] == 0
    drawn = image[image[..., 3] == 255][:, :3] @ [0.299, 0.587, 0.114]
    low, high = np.percentile(drawn, [5, 95])
    assert low > 70 and high < 190  # neither black nor white
    assert curve.drawn()[0] == files


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    curve = Curve.of(searched(mlp()))
    curve.write(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (note,) = curve.write(tmp_path)
    assert "pip install onnxq-plugins[report]" in note
    assert (tmp_path / "curve.json").exists() and not (tmp_path / "curve.png").exists()  # none of an earlier curve


def test_the_curve_of_a_network_without_layers():
    curve = Curve.of(searched(ZOO["no_layer"]()))
    files, _ = curve.files()
    assert set(files) >= {"curve.json", "curve.png"} and len(curve.table()[1]) == len(curve.points)


# ---- command line -------------------------------------------------------------------------------------------------------


def test_a_point_from_the_command_line(onnxq):
    code, out, err = onnxq("-r", "search.json", "-o", "a.onnx", "--curve", "folder", "--seed", 3, "--samples", 5)
    assert code == 0 and "chosen" in out and "SQNR dB" in out, err
    points = json.loads(Path("folder/curve.json").read_text())["points"]
    assert onnxq("--plan", f"folder/{chosen(points)['file']}", "-o", "b.onnx")[0] == 0
    assert bare(onnx.load("a.onnx")) == bare(onnx.load("b.onnx"))
    (seed,) = (p.value for p in onnx.load("b.onnx").metadata_props if p.key == "onnxq.seed")
    assert seed == "3"
    last = Path("folder", points[-1]["file"])
    assert onnxq("--plan", last)[0] == 0 and Path(f"model.{last.stem}.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--plan", "point.json", "-r", "int8"], ["--recipe", "leave"]),
        (["--plan", "point.json", "--curve", "folder"], ["--curve", "leave"]),
        (["--plan", "search.json"], ["has no recipe and widths"]),
        (["--curve", "folder"], ["'int8'", "mixed-precision"]),
        (["-r", "search.json", "--curve", "data.npz"], ["is a file"]),
        (["-r", "search.json", "--curve", "no/where"], ["does not exist"]),
        (["-r", "search.json", "--overrides", "no/where.json"], ["does not exist"]),
        (["-r", "search.json", "--overrides", "made.json", "-o", "made.onnx"], ["both 'made.onnx'"]),
        (["-r", "search.json", "--overrides", "made.onnx"], ["both 'made.onnx'"]),
        (["-r", "search.json", "--overrides", "model.json"], ["is the model itself"]),
        (["--plan", "point.json", "--report", "point.json"], ["is the plan itself"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_the_search(onnxq, monkeypatch, arguments, phrases):
    Path("point.json").write_text(json.dumps({"recipe": recipe_of(), "widths": {"a": "W8A8"}}))
    before = sorted(p.name for p in Path().iterdir())
    monkeypatch.setattr(MixedPrecision, "apply", None)
    code, out, err = onnxq(*arguments)
    assert code == 2 and out == "" and err.count("error: ") == 1 and err.count("\n") == 1
    assert all(phrase in err for phrase in phrases), err
    assert sorted(p.name for p in Path().iterdir()) == before


def test_widths_in_a_recipe_leave_no_curve(onnxq):
    Path("settled.json").write_text(json.dumps(recipe_of(widths={"a": "W8A8"})))
    assert "searches no widths" in onnxq("-r", "settled.json", "--curve", "folder")[2]
