"""A row for each recipe and target, from the runtimes that are here, and a sentence for those that are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins.edge import matrix as module
from onnxq_plugins.edge.matrix import COLUMNS, Cell, Matrix, matrix
from onnxq_plugins.edge.page import page
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Proof
from tests.zoo import cnn, feeds, mlp, rows


@pytest.fixture(scope="module")
def found() -> Matrix:
    model = mlp()
    return matrix(model, feeds(model, 8), recipes=("int8", "int4-storage"), runtimes=("onnxruntime",), samples=3)


def test_a_row_for_the_float_model_and_one_for_each_recipe(found):
    assert [(cell.recipe, cell.target) for cell in found.cells] == [
        ("float", ""),
        ("int8", "ort-cpu"),
        ("int4-storage", "ort-cpu"),
    ]
    float_cell, int8, _ = found.cells
    assert found.samples == 3 and float_cell.proof.identical and float_cell.proof.inspection.milliseconds > 0
    assert int8.proof.identical and int8.decibels > 20 and int8.proof.inspection.counts()["integer"] >= 1
    assert all(len(row) == len(COLUMNS) for row in found.rows())


def test_what_is_not_installed_is_asked_once_and_said(monkeypatch):
    model, asked = mlp(), []

    def inspect(*args):
        asked.append(args)
        raise onnxq.OnnxqError("acme is not installed; pip install acme.")

    plugins = module.find_plugins()
    acme = onnxq.Runtime("acme", "made up", "pip install acme", inspect)
    plugins.targets["acme.edge"] = replace(plugins.targets["ort-cpu"], name="acme.edge", runtime=acme)
    monkeypatch.setattr(module, "find_plugins", lambda: plugins)
    monkeypatch.setattr(module._Proving, "_quantized", lambda self, recipe, target: onnx.load(self.source))
    made = matrix(model, feeds(model, 4), recipes=("int8", "int4-storage"), runtimes=("acme",))
    assert len(asked) == 1 and [cell.why for cell in made.cells[1:]] == ["acme is not installed; pip install acme."] * 2


def test_nothing_is_quantized_for_a_module_that_is_missing(monkeypatch):
    plugins = module.find_plugins()
    acme = onnxq.Runtime("acme", "made up", "pip install acme", None, module="acme_that_is_nowhere")
    plugins.targets["acme.edge"] = replace(plugins.targets["ort-cpu"], name="acme.edge", runtime=acme)
    monkeypatch.setattr(module, "find_plugins", lambda: plugins)
    monkeypatch.setattr(module, "quantize", None)
    made = matrix(mlp(), feeds(mlp(), 4), runtimes=("acme",))
    assert made.cells[1].why == "'acme' is not installed; pip install acme."


def test_targets_that_differ_in_the_format_alone_are_quantized_once(monkeypatch):
    def inspect(file, samples, settings):
        return Inspection((), (Executed("a", "Conv", "integer"),))

    plugins, asked = module.find_plugins(), []
    known = plugins.targets["ort-cpu"]
    for name in ("one", "two"):
        there = onnxq.Runtime(name, "made up", f"pip install {name}", inspect)
        plugins.targets[f"acme.{name}"] = replace(known, name=f"acme.{name}", doc=name, runtime=there)
    other = replace(known, name="acme.three", signed=True, runtime=onnxq.Runtime("three", "", "pip install three", inspect))
    plugins.targets["acme.three"] = other
    monkeypatch.setattr(module, "find_plugins", lambda: plugins)
    quantize = module.quantize
    monkeypatch.setattr(
        module, "quantize", lambda *args, target, **more: asked.append(target) or quantize(*args, target="ort-cpu", **more)
    )
    made = matrix(mlp(), feeds(mlp(), 4), runtimes=("one", "two", "three"))
    assert asked == ["acme.one", "acme.three"] and all(cell.proof for cell in made.cells)


def test_every_operator_that_is_no_integer_is_explained():
    operators = (
        Executed("a", "Conv", "integer"),
        Executed("b", "Conv", "fake"),
        Executed("c", "Softmax", "float", "CPU", "the NPU has none"),
        Executed("d", "Reshape", "moves"),
    )
    cell = Cell("int8", "t", "r", Proof("r", Inspection((), operators, 1.5, {"partitions": 2})), "", 30.0, 100.0)
    text = cell.note
    assert "decoded and computed in float: 1 Conv" in text and "float in the file: 1 Softmax" in text
    assert "the NPU has none" in text and "partitions 2" in text
    assert cell.row()[3:6] == ("1", "1", "1")


def test_what_does_not_load_is_a_sentence_on_the_page():
    cell = Cell("int8", "t", "r", None, "r cannot load <b>'m'</b>.")
    made = Matrix((cell,), 1, "machine")
    text = page(made, "<m>")
    assert "&lt;b&gt;" in text and "<b>" not in text and "<m>" not in text
    assert "cannot load" in made.markdown() and made.to_dict()["cells"][0]["note"] == cell.why


def test_samples_are_of_the_first_ones_shape():
    model = mlp()
    name = model.graph.input[0].name
    one = rows(model, 1)
    mixed = [{name: one}, {name: np.repeat(one, 2, 0)}, {name: one}]
    assert matrix(model, mixed, runtimes=("onnxruntime",)).samples == 2


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"runtimes": ["moon"]}, "runtime 'moon' is unknown"),
        ({"recipes": ["int9"]}, "recipe 'int9'"),
        ({"settings": {"moon": {}}}, "runtime 'moon' is unknown"),
    ],
)
def test_bad_names_are_refused_before_anything_is_quantized(more, text, monkeypatch):
    monkeypatch.setattr(module, "quantize", None)
    with pytest.raises(onnxq.OnnxqError, match=text):
        matrix(mlp(), feeds(mlp(), 2), **more)


def test_the_command_writes_what_it_prints(onnxq):
    model = cnn()
    onnx.save(model, "m.onnx")
    np.savez("d.npz", **{model.graph.input[0].name: rows(model, 8)})
    common = ("matrix", "m.onnx", "--data", "d.npz", "--runtimes", "onnxruntime", "--samples", "2")
    code, out, err = onnxq(*common, "-o", "out.json")
    assert code == 0, err
    told = json.loads(Path("out.json").read_text())
    assert [cell["recipe"] for cell in told["cells"]] == ["float", "int8"] and "ort-cpu" in out and told["samples"] == 2
    code, _, err = onnxq(*common, "-o", "out.pdf")
    assert code == 2 and ".html, .json, .md" in err
    code, _, err = onnxq(*common, "--set", "soc_model=60")
    assert code == 2 and "RUNTIME.KEY=VALUE" in err
    code, _, err = onnxq("matrix", "m.onnx")
    assert code == 2 and "give --data" in err
