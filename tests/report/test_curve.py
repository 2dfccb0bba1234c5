"""The curve of a search over widths: points made again, files, table and drawing; plans for onnxruntime's own tool."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from PIL import Image

from onnxq_plugins import (
    OnnxqError,
    Recipe,
    cli,
    load,
    ort_arguments,
    ort_model,
    ort_overrides,
    plugins,
    point_recipe,
    quantize,
    runtimes,
)
from onnxq_plugins.measure import drift
from onnxq_plugins.measure.metrics import mean_sqnr
from onnxq_plugins.passes.mixed_precision import MixedPrecision
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.report.curve import Curve, check_folder
from onnxq_plugins.search.widths import Widths
from onnxq_plugins.spec import decode
from tests.zoo import ZOO, Net, feeds, mlp, mobilenet, transformer


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
def onnxq(monkeypatch, capsys, tmp_path):
    """Runs the command line in a folder with a model and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    onnx.save(mlp(), "model.onnx")
    np.savez("data.npz", x=np.concatenate([feed["x"] for feed in feeds(mlp(), 8)]))
    Path("search.json").write_text(json.dumps(recipe_of()))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["onnxq", "quantize", "model.onnx", "--data", "data.npz", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


# ---- a point made again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {}),
        ("mobilenet", {"method": "gptq", "front": [{"use": "scale-inputs"}, {"use": "ranges"}]}),
        ("mobilenet", {"behind": [{"use": "bias-correct"}], "budget": "sqnr", "limit": 25.0}),
        ("transformer", {"budget": "bops"}),
        ("resnet20", {"candidates": ["float", "W4A8", "W8A8"], "budget": "sqnr", "limit": 20.0}),
        ("cnn", {"target": "npu", "candidates": ["W4A8", "W8A8", "W8A16"], "budget": "bops"}),
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
    made = quantize(mlp(), recipe_of(widths=widths), feeds(mlp(), 6), workers=1)
    kept = next(p.value for p in made.model.metadata_props if p.key == "onnxq.recipe")
    again = quantize(mlp(), json.loads(kept), feeds(mlp(), 6), workers=1)
    assert again.model.SerializeToString() == made.model.SerializeToString()


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


# ---- onnxruntime's own tool ---------------------------------------------------------------------------------------------


class Reader(CalibrationDataReader):
    def __init__(self, samples) -> None:
        self.samples = iter(samples)

    def get_next(self):
        return next(self.samples, None)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)  # the tool recommends its pre-processing
    yield
    logging.disable(logging.NOTSET)


def by_tool(result, samples, path: Path, overrides=None) -> onnx.ModelProto:
    """What quantize_static makes of a result."""
    quantize_static(ort_model(result), path, Reader(samples), **ort_arguments(result if overrides is None else overrides))
    return onnx.load(path)


def constants(model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


KINDS = {"QInt4": TensorProto.INT4, "QInt8": TensorProto.INT8, "QUInt8": TensorProto.UINT8, "QUInt16": TensorProto.UINT16}
CASES = [
    ("cnn", {}),
    ("mobilenet", {"method": "gptq", "front": [{"use": "scale-inputs"}]}),
    ("mlp", {}),
    ("transformer", {"target": "openvino"}),
    ("conv_transpose", {}),
    ("resnet20", {"behind": [{"use": "bias-correct"}]}),
    ("mobilenet", {"target": "npu", "candidates": ["W4A8", "W8A8", "W8A16"], "budget": "bops", "limit": 0.9}),
    ("inception", {"target": "npu", "candidates": ["W4A8", "W4A16", "W8A16"], "budget": "bops", "limit": 0.9}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_tool_gives_tensors_the_types_scales_and_codes_of_the_plan(name, settings, tmp_path):
    model = ZOO[name]()
    result = searched(model, 6, **settings)
    told = ort_overrides(result)
    made = by_tool(result, feeds(model, 6), tmp_path / "made.onnx")
    values, graph = constants(made), load(result.float_model)
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    layers = {y.weight: y for y in result.graph.layers if y.weight in result.plan}
    assert layers and set(layers) <= set(told["TensorQuantOverrides"])
    for weight in layers:
        spec, entry = result.plan[weight], told["TensorQuantOverrides"][weight]
        assert (
            kinds[f"{weight}_quantized"]
            == KINDS[entry[0]["quant_type"]]
            == (TensorProto.INT4 if spec.bits <= 4 else TensorProto.INT8)
        )
        assert np.array_equal(values[f"{weight}_scale"], np.ravel(spec.scale) if spec.block else spec.scale)
        assert np.array_equal(values[f"{weight}_quantized"].astype(int), spec.codes)
    seen = 0
    for tensor, spec in result.plan.items():
        if tensor in layers or f"{tensor}_scale" not in values:
            continue
        seen += 1
        assert values[f"{tensor}_scale"] == spec.scale and values[f"{tensor}_zero_point"] == spec.zero_point
        assert kinds[f"{tensor}_zero_point"] == (TensorProto.UINT8 if spec.bits == 8 else TensorProto.UINT16)
    planned = [t for t in result.plan if t not in layers]
    shared = {n.outputs[0].name for n in graph.nodes if n.op == "AveragePool"}
    assert seen >= len([t for t in planned if t not in shared]) > 0


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_tool_is_as_accurate_as_our_own_export(name, settings, tmp_path):
    model = ZOO[name]()
    result = searched(model, 6, **settings)
    made, samples = by_tool(result, feeds(model, 6), tmp_path / "made.onnx"), feeds(model, 12, seed=1)
    reference = runtimes.outputs(runtimes.session(model), samples)
    ours, tools = (
        mean_sqnr(reference, runtimes.outputs(runtimes.session(m, optimize=False), samples)) for m in (result.model, made)
    )
    noted = any("range of the tool's own" in note for note in ort_overrides(result)["notes"])
    assert abs(ours - tools) < (3.0 if noted else 0.5), (ours, tools)


def test_overrides_are_plain_and_survive_a_file(tmp_path):
    result = searched(mobilenet())
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps(ort_overrides(result)))
    one = by_tool(result, feeds(mobilenet(), 6), tmp_path / "one.onnx")
    two = by_tool(result, feeds(mobilenet(), 6), tmp_path / "two.onnx", path)
    assert one.SerializeToString() == two.SerializeToString()


def test_the_model_for_the_tool_holds_what_the_codes_stand_for():
    result = searched(mobilenet(), behind=[{"use": "bias-correct"}])
    given, held = constants(result.float_model), constants(ort_model(result))
    assert set(given) == set(held) and len(result.graph.layers) > 3
    for layer in result.graph.layers:
        spec = result.plan[layer.weight]
        assert np.array_equal(held[layer.weight], decode(spec.codes, spec))
        assert np.allclose(held[layer.bias], given[layer.bias] + spec.shift, atol=1e-6)
    samples = feeds(mobilenet(), 4)
    assert (
        drift(
            runtimes.outputs(runtimes.session(mobilenet()), samples),
            runtimes.outputs(runtimes.session(result.float_model), samples),
        )
        < 1e-4
    )


def test_a_shift_without_a_bias_gets_one(tmp_path):
    net = Net(["N", 4, 8, 8])
    x = net.op("Relu", net.op("Conv", "x", net.weight(6, 4, 3, 3)))
    model = net.model(net.op("Conv", x, net.weight(3, 6, 1, 1)))
    result = searched(model, recipe=recipe_of(candidates=["W4A8"], behind=[{"use": "bias-correct"}]), limit=1.0)
    made, samples = by_tool(result, feeds(model, 6), tmp_path / "made.onnx"), feeds(model, 6, seed=2)
    reference = runtimes.outputs(runtimes.session(model), samples)
    ours, tools = (mean_sqnr(reference, runtimes.outputs(runtimes.session(m), samples)) for m in (result.model, made))
    assert abs(ours - tools) < 0.5


def test_layers_that_the_plan_leaves_float_are_left_float(tmp_path):
    layers = [{"position": "last", "quantize": False}]
    model = mobilenet()
    result = quantize(model, {"layer": layers}, feeds(model, 4), workers=1)
    last = result.graph.layers[-1]
    made = by_tool(result, feeds(model, 4), tmp_path / "made.onnx")
    assert last.weight in constants(made) and last.name not in ort_overrides(result)["nodes_to_quantize"]


def test_what_the_tool_cannot_be_told_is_noted(tmp_path):
    tiles = {"weights": {"bits": 4, "sub_block": [1, 4]}}
    result = quantize(mobilenet(), tiles, feeds(mobilenet(), 4), workers=1)
    assert any("multipliers" in note for note in ort_overrides(result)["notes"])
    by_tool(result, feeds(mobilenet(), 4), tmp_path / "made.onnx")  # and it still runs
    notes = ort_overrides(searched(mobilenet(), candidates=["W4A8"]))["notes"]
    assert any("4 bits" in note for note in notes)
    assert ort_overrides(quantize(mobilenet(), {}, feeds(mobilenet(), 4), workers=1))["notes"] == []


def test_weights_alone_are_no_plan_for_the_tool():
    result = quantize(transformer(), {"weights": {"bits": 4, "block": 16}, "activations": {"bits": 32}}, workers=1)
    with pytest.raises(OnnxqError, match="activations"):
        ort_overrides(result)


def test_overrides_that_cannot_be_read_are_told(tmp_path):
    for content in ("{", "[]", "{}"):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(OnnxqError, match="overrides"):
            ort_arguments(tmp_path / "file.json")


def test_overrides_from_the_command_line(onnxq):
    code, _, err = onnxq("-r", "search.json", "-o", "a.onnx", "--overrides", "tool.json", "--report", "report.json")
    assert code == 0, err
    assert json.loads(Path("tool.json").read_text())["model"] == "tool.onnx" and Path("report.json").is_file()
    quantize_static("tool.onnx", "b.onnx", Reader(feeds(mlp(), 8)), **ort_arguments("tool.json"))
    samples = feeds(mlp(), 8, seed=1)
    a, b = (runtimes.outputs(runtimes.session(onnx.load(p), optimize=False), samples) for p in ("a.onnx", "b.onnx"))
    assert mean_sqnr(a, b) > 35
