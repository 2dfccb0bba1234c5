"""Hooks of guests beside passes and targets: recipes, remedies, and changes of a model before it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, Remedy, diagnose, files, hookimpl, quantize, selection
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.laws import LawBroken
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes
from tests.targets.test_hardware import NPU, Brings
from tests.zoo import cnn, feeds, mlp

FAST = {"workers": 1, "check": False}


def plugin(name, body):
    """A plugin object with one hook."""
    return type("Guest", (), {name: hookimpl(body)})()


def made(*plugins, recipe=None, model=None, **options):
    model = cnn() if model is None else model
    samples = feeds(cnn() if isinstance(model, Path) else model, 4)
    return quantize(model, recipe or {"pass": [{"use": "ranges"}]}, samples, plugins=plugins, **FAST, **options)


# ---- recipes --------------------------------------------------------------------------------------------------------------


def test_recipes_of_guests_are_found_by_name(tmp_path):
    (tmp_path / "small.toml").write_text("# small\n[weights]\nbits = 4\n")
    guest = plugin("onnxq_recipes", lambda self: {"acme.small": tmp_path / "small.toml"})
    result = made(guest, recipe="acme.small")
    assert result.report.recipe_name == "acme.small" and {result.plan[y.weight].bits for y in result.graph.layers} == {4}
    found = find_plugins([guest])
    assert found.recipes.keys() == {*builtin_recipes(), "acme.small"}
    assert found.sources["recipe acme.small"] == "given in Python" and found.sources["recipe int8"] == "onnxq-plugins"
    with pytest.raises(OnnxqError, match=r"did you mean 'acme\.small'"):
        made(guest, recipe="acme.smal")


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (None, "onnxq_recipes returns nothing instead of a dict"),
        (["x"], "onnxq_recipes returns a list instead of a dict"),
        ({"small": "x"}, "needs a name like vendor.small"),
        ({"acme.small": "/nowhere.toml"}, "there is no file '/nowhere.toml'; is it part of the wheel?"),
    ],
)
def test_wrong_recipes_set_the_plugin_aside(returned, why):
    found = find_plugins([plugin("onnxq_recipes", lambda self: returned)])
    assert why in found.broken["Guest"] and "int8" in found.recipes


def test_a_name_of_two_packages_belongs_to_neither(tmp_path):
    (tmp_path / "r.toml").write_text("")
    guests = [plugin("onnxq_recipes", lambda self: {"acme.r": tmp_path / "r.toml"}) for _ in range(2)]
    assert "acme.r" not in find_plugins(guests).recipes


def test_auto_tries_recipes_for_targets_that_run_here(tmp_path, monkeypatch):
    for name, target in (("here", "ort-cpu"), ("there", "npu")):
        (tmp_path / f"{name}.toml").write_text(f'target = "{target}"\n')
    guest = plugin("onnxq_recipes", lambda self: {f"acme.{n}": tmp_path / f"{n}.toml" for n in ("here", "there")})
    monkeypatch.setattr(selection, "find_plugins", lambda: find_plugins([guest]))
    assert selection.guest_recipes(None) == ["acme.here"] and selection.guest_recipes("npu") == ["acme.there"]


# ---- remedies -------------------------------------------------------------------------------------------------------------

MSE = Remedy("by least squares", ("ranges.method=mse",))


def test_remedies_of_guests_stand_behind_those_of_the_causes_and_are_tried():
    seen = []

    def body(self, cause, layer, job):
        seen.append((cause.kind, layer and layer.name, job.target.name))
        return [Remedy("2 samples", ("data.samples=2",))]

    plain, guest = (diagnose(made(*guests), workers=1) for guests in ((), (plugin("onnxq_remedies", body),)))
    assert {name for _, name, _ in seen} >= {y.name for y in plain.layers if y.is_layer and y.own}
    for before, after in zip(plain.layers, guest.layers, strict=True):
        for one, other in zip(before.causes, after.causes, strict=True):
            assert other.remedies[:-1] == one.remedies and other.remedies[-1].text == "2 samples"
    tried = diagnose(made(plugin("onnxq_remedies", body)), workers=1, attempts=30).tried
    assert any(attempt.remedy.text == "2 samples" for attempt in tried)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda self: None, r"onnxq_remedies of plugin 'Guest' returns nothing where a list of Remedy"),
        (lambda self: MSE, r"returns a Remedy where a list"),
        (lambda self: ["ranges.method=mse"], r"returns a str where a list"),
        (
            lambda self: 1 / 0,
            r"onnxq_remedies of plugin 'Guest' fails with ZeroDivisionError in tests/test_hooks\.py",
        ),
    ],
)
def test_wrong_remedies_are_told_with_their_owner(body, words):
    with pytest.raises(OnnxqError, match=words):
        diagnose(made(plugin("onnxq_remedies", body), model=mlp()), workers=1)


# ---- before a model is written --------------------------------------------------------------------------------------------


def relabelled(self, model):
    model.doc_string = "for the chip"
    model.graph.node.append(onnx.helper.make_node("Identity", [model.graph.node[0].output[0]], ["left over"], "extra"))
    return model


def test_what_is_returned_is_written_and_audited(tmp_path):
    model = made(plugin("onnxq_exporting", relabelled), output=tmp_path / "m.onnx").model
    written = onnx.load(tmp_path / "m.onnx")
    assert written == model and written.doc_string == "for the chip" and written.graph.node[-1].name == "extra"


def test_plugins_are_called_one_after_another():
    def add(text):
        def body(self, model):
            other = onnx.ModelProto.FromString(model.SerializeToString())
            other.doc_string += text
            return other

        return plugin("onnxq_exporting", body)

    assert made(add("a"), add("b")).model.doc_string == "ab"


def broken(self, model):
    model.graph.node[0].op_type = "Nothing"
    return model


def renamed(self, model):
    old = model.graph.output[0].name
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = "other" if name == old else name
    model.graph.output[0].name = "other"
    return model


def unloadable(self, model):
    weights = np.ones((2, 3), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "wrong"))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["wrong", "wrong"], ["nowhere"], "bad"))
    return model


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            lambda self, model: None,
            r"onnxq_exporting of plugin 'Guest' returns nothing instead of a ModelProto",
        ),
        (lambda self, model: b"", r"returns a bytes instead of a ModelProto"),
        (broken, r"what onnxq_exporting of plugin 'Guest' returns is no valid model, onnx\.checker says: No Op"),
        (unloadable, r"what onnxq_exporting of plugin 'Guest' returns cannot be loaded"),
        (renamed, r"changes the inputs and outputs"),
        (lambda self, model: 1 / 0, r"fails with ZeroDivisionError in tests/test_hooks\.py, line \d+"),
    ],
)
def test_what_is_no_file_is_told_with_its_owner(body, words, tmp_path):
    with pytest.raises((LawBroken, OnnxqError), match=words):
        made(plugin("onnxq_exporting", body), output=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def shifted(self, model):
    """A zero point of 3 for one activation, which a symmetric target has not."""
    quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    zero = next(t for t in model.graph.initializer if t.name == quantizer.input[2])
    wrong = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(zero) + np.int8(3), "wrong")
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and quantizer.input[1] in node.input:
            node.input[2] = "wrong"
    model.graph.initializer.append(wrong)
    return model


def test_what_is_no_file_for_the_target_is_told_with_its_owner():
    target = replace(NPU, signed=True, symmetric=True)
    with pytest.raises(
        LawBroken, match=r"plugin 'Guest' returns is no file for target 'acme\.npu': it has a zero point of 3"
    ):
        made(Brings(target), plugin("onnxq_exporting", shifted), recipe={"target": "acme.npu", "pass": [{"use": "ranges"}]})


def test_of_a_model_with_constants_beside_it_exporters_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(MappedWeights, "least", 64)
    monkeypatch.setattr(files, "LARGE", 0)
    model = onnx.load_from_string(cnn().SerializeToString())
    onnx.save(model, tmp_path / "float.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    guest = plugin("onnxq_exporting", relabelled)
    result = made(guest, model=tmp_path / "float.onnx", output=tmp_path / "m.onnx")
    assert not result.model.doc_string
    assert any("onnxq_exporting of plugin 'Guest' was not called" in note for note in result.report.notes)
    assert not any("was not called" in note for note in made(model=tmp_path / "float.onnx").report.notes)
