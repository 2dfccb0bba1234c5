"""Solved plans: files, and networks written from them for other targets."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, hookimpl, quantize, retarget, runtimes
from onnxq_plugins.cli import app
from onnxq_plugins.engine.plans import Solved, read_plan
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.graph.opsets import opset_of
from onnxq_plugins.measure import drift
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.misfits import misfits
from onnxq_plugins.testing.exact import exact_session
from onnxq_plugins.testing.models import make
from tests.networks import feed_of, network
from tests.test_branches import branching, samples
from tests.zoo import cnn, examples, feeds, mobilenet

TARGETS = {target.name: target for target in BUILTIN}
EDGE = ("litert", "ethos-u", "qnn", "web", "portable", "qoperator", "npu", "openvino")


@functools.cache
def quantized(name, target="ort-cpu", recipe="int8", *settings):
    model = make(name)
    return quantize(model, recipe, feeds(model, 8), target=target, settings=settings, workers=1, check=False)


def values(model, samples):
    return runtimes.outputs(runtimes.session(model, written=True), samples)


def sqnr(name, model):
    samples = feeds(make(name), 8, seed=1)
    return worst_sqnr(values(make(name), samples), values(model, samples))


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "transformer", "conv_transpose", "resnet20", "mlp", "prelu"])
@pytest.mark.parametrize("target", ["ort-cpu", "litert", "qnn", "storage", "per-tensor"])
def test_a_plan_gives_the_file_that_it_was_saved_beside(name, target, tmp_path):
    result = quantized(name, target)
    file = result.save_plan(tmp_path / "a.plan")
    again = retarget(file, target)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert not [kind for kind in again.report["changes"] if not kind.endswith("kept")]
    assert read_plan(file).write(tmp_path / "b.plan").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("recipe", ["int4-storage", "int4-weight-only", "sub-layer", "rex-int4", "int8-per-tensor"])
def test_plans_of_every_kind_come_back(recipe, tmp_path):
    model = mobilenet()
    result = quantize(model, recipe, feeds(model, 8), workers=1, check=False)
    made = retarget(result.save_plan(tmp_path / "a.plan"), result.target.name)
    assert made.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "transformer", "conv_transpose", "resnet20"])
@pytest.mark.parametrize("source", ["ort-cpu", "litert"])
@pytest.mark.parametrize("target", EDGE)
def test_a_plan_for_another_target_is_about_as_good_as_one_made_for_it(name, source, target):
    made = retarget(quantized(name, source), target)
    direct = quantized(name, target)
    assert not misfits(TARGETS[target], made.model)
    assert opset_of(made.model) == opset_of(direct.model)
    assert sqnr(name, made.model) > min(sqnr(name, direct.model), 45) - 4


def test_the_sign_of_codes_is_no_change():
    signed = retarget(quantized("mobilenet", "qnn"), "litert")
    samples = feeds(mobilenet(), 4)
    assert set(signed.report["changes"]) == {"weights kept", "activations kept"}
    np.testing.assert_allclose(
        values(signed.model, samples)[0], values(quantized("mobilenet", "qnn").model, samples)[0], atol=1e-5
    )


def test_what_is_solved_anew_is_counted():
    whole = retarget(quantized("mobilenet"), "litert").report["changes"]
    assert whole["activations from stored ranges"] == 1 and whole["weights kept"] == 8
    one_scale = retarget(quantized("mobilenet"), "per-tensor")
    assert one_scale.report["changes"]["weights solved anew per tensor"] == 8
    assert "8 weights solved anew per tensor" in one_scale.changes
    mirrored = retarget(quantized("mobilenet", "litert"), "litert.mirrored", plugins=[Brings()])
    assert mirrored.report["changes"]["activations solved anew"] == 12
    assert sqnr("mobilenet", mirrored.model) > 25
    narrow = retarget(quantized("cnn"), "ort-cpu-avx2")
    assert narrow.report["changes"]["weights solved anew per channel"] == 3


class Brings:
    @hookimpl
    def onnxq_targets(self):
        litert = TARGETS["litert"]
        return [
            replace(litert, name="litert.mirrored", symmetric=True),
            replace(litert, name="acme.chip", suffix=".acme", write=written, settings={"soc": 1}),
        ]


def written(model, settings):
    return f"acme {settings['soc']} {len(model.graph.node)}".encode()


def test_sixteen_bits_stay_where_the_target_has_them_and_become_eight_elsewhere():
    wide = quantized("cnn", "npu", "int8", "activations.bits=16")
    there = retarget(wide, "litert")
    assert {spec.bits for spec in there.plan.values() if spec.codes is None} == {16}
    assert all(spec.symmetric for spec in there.plan.values() if spec.codes is None)
    with pytest.raises(OnnxqError, match=r"16-bit activations|int16|uint16"):
        retarget(wide, "portable")


def test_layers_that_are_in_float_for_their_accuracy_stay_there():
    model = mobilenet()
    name = quantized("mobilenet").graph.layers[2].name
    result = quantize(model, "int8", feeds(model, 8), exclude=[name], workers=1, check=False)
    made = retarget(result, "litert")
    weights = {layer.name: layer.weight for layer in result.graph.layers}
    assert weights[name] not in made.plan and len(made.plan) > 10


def test_layers_that_are_in_float_for_their_speed_are_integers_elsewhere():
    result = quantized("mobilenet", "ort-cpu", "int8", "placement.least=0", "placement.check=false")
    made = retarget(result, "litert")
    assert all(layer.weight in made.plan for layer in result.graph.layers)
    assert made.report["changes"]["weights kept"] == 8


def test_ranges_that_the_plan_does_not_hold_are_asked_for():
    result = quantized("mobilenet")
    solved = replace(Solved.of(result), ranges={})
    with pytest.raises(OnnxqError, match=r"target 'litert' quantizes 1 activations whose ranges .*; quantize with --data"):
        retarget(solved, "litert")


def test_what_is_not_finite_stays_float():
    operators = [
        ("Conv", ["x", "w"], ["h"], {}),
        ("Sub", ["h", "h"], ["zero"], {}),
        ("Div", ["h", "zero"], ["odd"], {}),
        ("Conv", ["h", "v"], ["y"], {}),
    ]
    model = network(operators, [1, 3, 8, 8], {"w": (4, 3, 3, 3), "v": (5, 4, 1, 1)}, outputs=("y", "odd"))
    result = quantize(model, {}, [feed_of(model, seed) for seed in range(3)], workers=1, check=False)
    made = retarget(result, "qnn")
    assert "odd" not in made.plan and "y" in made.plan


# ---- files ----------------------------------------------------------------------------------------------------------------


@functools.cache
def content():
    with TemporaryDirectory() as folder:
        return quantized("cnn").save_plan(Path(folder) / "a.plan").read_bytes()


def entries(solved):
    return {
        name: [None if (x := getattr(spec, key)) is None else x.tolist() for key in ("scale", "zero_point", "codes")]
        for name, spec in solved.plan.items()
    }


@given(cut=st.floats(0, 1, exclude_max=True))
@examples(20)
def test_a_truncated_plan_is_one_sentence(cut, tmp_path_factory):
    file = tmp_path_factory.mktemp("cut") / "a.plan"
    file.write_bytes(content()[: int(cut * len(content()))])
    with pytest.raises(OnnxqError, match="is no plan, or is damaged") as caught:
        read_plan(file)
    assert len(caught.value.problems) == 1


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@examples(60)
def test_a_damaged_plan_is_one_sentence_or_the_same_plan(place, bit, tmp_path_factory):
    damaged = bytearray(content())
    damaged[int(place * len(damaged))] ^= 1 << bit
    file = tmp_path_factory.mktemp("flip") / "a.plan"
    file.write_bytes(bytes(damaged))
    try:
        solved = read_plan(file)
    except OnnxqError as error:
        assert len(error.problems) == 1 and "\n" not in str(error)
    else:
        assert entries(solved) == entries(Solved.of(quantized("cnn")))


def edited(tmp_path, change):
    """A plan with another table."""
    file = tmp_path / "edited.plan"
    with zipfile.ZipFile(io.BytesIO(content())) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.infolist():
            data = old.read(part)
            new.writestr(part.filename, json.dumps(change(json.loads(data))) if part.filename == "plan.json" else data)
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "was written by a newer onnxq-plugins"),
        ({"format": "another"}, "is no plan"),
        ({"plan": {"no such tensor": {"scale": 0}}}, "is no plan"),
        ({"names": "odd"}, "names = 'odd' is unknown"),
        ({"ranges": {"x": ["a", 1]}}, "is no plan"),
        ({"graph": {}}, "is no plan"),
    ],
)
def test_a_plan_that_says_something_else_is_refused(change, words, tmp_path):
    with pytest.raises(OnnxqError, match=words):
        read_plan(edited(tmp_path, lambda table: {**table, **change}))


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros(3))
    (tmp_path / "c.plan").write_bytes(b"")
    for file in tmp_path.iterdir():
        with pytest.raises(OnnxqError, match="is no plan, or is damaged"):
            retarget(file, "litert")
    with pytest.raises(OnnxqError, match="cannot be read: No such file"):
        retarget(tmp_path / "d.plan", "litert")
    with pytest.raises(OnnxqError, match="source"):
        retarget(3, "litert")


def test_arrays_are_never_unpickled(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    file = tmp_path / "a.plan"
    with zipfile.ZipFile(io.BytesIO(content())) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.infolist():
            new.writestr(part.filename, stream.getvalue() if part.filename == "arrays/0.npy" else old.read(part))
    with pytest.raises(OnnxqError, match="is no plan"):
        read_plan(file)


# ---- formats and commands -------------------------------------------------------------------------------------------------


def test_a_target_with_a_format_of_its_own(tmp_path):
    result = quantized("cnn")
    made = retarget(result, "acme.chip", tmp_path / "a.acme", settings=["target.acme.soc=3"], plugins=[Brings()])
    assert (tmp_path / "a.acme").read_bytes() == f"acme 3 {len(made.model.graph.node)}".encode()
    made.save(tmp_path / "a.onnx")
    again = retarget(tmp_path / "a.onnx", "acme.chip", tmp_path / "b.acme", plugins=[Brings()])
    assert (tmp_path / "b.acme").read_bytes() == f"acme 1 {len(again.model.graph.node)}".encode()
    with pytest.raises(OnnxqError, match="has no format of its own"):
        retarget(tmp_path / "a.onnx", "qnn")
    onnx.save(cnn(), tmp_path / "float.onnx")
    with pytest.raises(OnnxqError, match="is not quantized"):
        retarget(tmp_path / "float.onnx", "acme.chip", plugins=[Brings()])
    with pytest.raises(OnnxqError, match=r"only settings of targets"):
        retarget(result, "acme.chip", settings=["weights.bits=4"], plugins=[Brings()])


def test_quantize_writes_the_format_of_its_target(tmp_path):
    model = cnn()
    result = quantize(
        model, "int8", feeds(model, 8), target="acme.chip", plugins=[Brings()], output=tmp_path / "a.acme", workers=1
    )
    assert (tmp_path / "a.acme").read_bytes() == f"acme 1 {len(result.model.graph.node)}".encode()
    assert result.check is not None and result.check.sqnr > 25


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = cnn()
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=np.concatenate([feed["x"] for feed in feeds(model, 8)]))
    return tmp_path


def run(*arguments):
    app(list(arguments), standalone_mode=False)


def test_one_run_writes_files_for_several_targets(folder):
    run(
        "quantize",
        "m.onnx",
        "--data",
        "d.npz",
        "--target",
        "ort-cpu,litert,qnn",
        "-o",
        "out",
        "--save-plan",
        "m.plan",
        "--report",
        "r.json",
    )
    assert {file.name for file in (folder / "out").iterdir()} == {
        f"m.int8.{name}" for name in ("ort-cpu.onnx", "litert.tflite", "qnn.onnx")
    }
    told = json.loads((folder / "r.json").read_text())["targets"]
    assert told["litert"]["changes"] == {"activations kept": 3, "activations from stored ranges": 1, "weights kept": 3}
    run("export", "m.plan", "--target", "litert", "-o", "again.tflite", "--report", "e.json")
    assert (folder / "again.tflite").read_bytes() == (folder / "out" / "m.int8.litert.tflite").read_bytes()
    assert json.loads((folder / "e.json").read_text())["litert"]["changes"]["weights kept"] == 3
    run("export", "m.plan", "--target", "portable")
    assert (folder / "m.portable.onnx").is_file()


def test_nothing_is_written_if_one_target_fails(folder):
    operators = [("Gemm", ["x", "w"], ["h"], {}), ("Mish", ["h"], ["m"], {}), ("Gemm", ["m", "v"], ["y"], {})]
    model = network(operators, [1, 8], {"w": (8, 8), "v": (8, 8)}, opset=18)
    onnx.save(model, "mish.onnx")
    np.savez("x.npz", x=np.concatenate([feed_of(model, seed)["x"] for seed in range(4)]))
    with pytest.raises(OnnxqError, match=r"target 'portable' .*Mish \(1\)") as caught:
        run("quantize", "mish.onnx", "--data", "x.npz", "--target", "ort-cpu,litert,portable,qoperator", "-o", "out")
    assert len(caught.value.problems) == 2 and not (folder / "out").exists()
    for target, words in (("ort-cpu,ort-cpu", "named twice"), ("ort-cpu,nothing", "target 'nothing' is unknown")):
        with pytest.raises(OnnxqError, match=words):
            run("quantize", "m.onnx", "--data", "d.npz", "--target", target)
    with pytest.raises(OnnxqError, match="is a file"):
        run("quantize", "m.onnx", "--data", "d.npz", "--target", "qnn,litert", "-o", "d.npz")


def test_every_model_of_the_kit_goes_to_every_whole_target():
    for name in ("inception", "grouped", "conv1d", "control_flow", "shared_weights", "dead_channels"):
        for target in ("litert", "qnn"):
            assert sqnr(name, retarget(quantized(name), target).model) > 20


def test_sizes_are_those_of_the_files(folder):
    for target in ("litert", "qnn"):
        path = folder / f"sized{TARGETS[target].suffix}"
        result = quantize("m.onnx", "int8", "d.npz", target=target, output=path, check=False)
        assert result.report["bytes"]["quantized"] == path.stat().st_size
        assert f"-> {path.stat().st_size / 1e3:.1f} kB" in result.summary


def test_a_name_for_files_of_another_target_is_refused(folder):
    with pytest.raises(OnnxqError, match=r"target 'ort-cpu' writes .onnx; give such a name, or --target litert"):
        quantize("m.onnx", "int8", "d.npz", output=folder / "m.tflite")
    assert not (folder / "m.tflite").exists()


def test_a_result_all_in_float_is_known_as_quantized(folder):
    quantize("m.onnx", "int8-storage", "d.npz", output=folder / "stored.onnx", check=False)
    with pytest.raises(OnnxqError, match=r"already quantized \(it has weights in codes") as caught:
        quantize(folder / "stored.onnx", "int8", "d.npz")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("target", ["qnn", "portable", "openvino"])
def test_layers_inside_branches_are_written_as_in_a_direct_run(target, tmp_path):
    model, data = branching(), samples(24)
    file = quantize(model, "int8", data, check=False).save_plan(tmp_path / "branches.plan")
    made, direct = retarget(file, target), quantize(model, "int8", data, target=target, check=False)

    def operators(model):
        return Counter(node.op_type for graph in all_graphs(model.graph) for node in graph.node)

    assert operators(made.model) == operators(direct.model)
    assert len(made.report.layers) == 6 and not any("float" in note for note in made.report.notes)
    assert sum(n for what, n in made.report["changes"].items() if what.startswith("weights")) >= 6
    onnx.checker.check_model(made.model, full_check=True)
    for feed in samples(4, seed=1):
        assert drift(run_exact(model, feed), run_exact(made.model, feed)) < 0.1
    again = retarget(read_plan(file), target)  # the plan is left alone
    assert again.model.SerializeToString() == made.model.SerializeToString()


def test_a_plan_of_before_leaves_branches_in_float(tmp_path):
    file = quantize(branching(), "int8", samples(24), check=False).save_plan(tmp_path / "branches.plan")
    made = retarget(replace(read_plan(file), inside={}), "portable")
    assert any("has nothing of the then branch of If 'choice'" in note for note in made.report.notes)
    assert len(made.report.layers) == 2


def run_exact(model, feed):
    return exact_session(model).run(None, feed)
