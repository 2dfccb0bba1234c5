"""Files of other formats: audited by themselves, compared with what they are told, and refused in a sentence elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.runtimes.micro import MICRO, resolver
from onnxq_plugins.runtimes.tflite import inputs

SAMPLES = digits_split()["calibration_images"][:, None]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network as .tflite."""
    for module in ("ai_edge_litert", "flatbuffers"):
        pytest.importorskip(module, reason="needs the extra litert")
    place = tmp_path_factory.mktemp("formats") / "digits.tflite"
    return onnxq.quantize(digits_model_path(), "int8", SAMPLES[:32], target="litert", check=False).save(place)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with codes in and out, images as LiteRT has them."""
    for module in ("ai_edge_litert", "flatbuffers"):
        pytest.importorskip(module, reason="needs the extra litert")
    place = tmp_path_factory.mktemp("formats") / "codes.tflite"
    return onnxq.quantize(digits_model_path(), "int8", SAMPLES[:32], target="ethos-u", check=False).save(place)


@pytest.fixture
def here(file, tmp_path) -> None:
    """The files that commands are given."""
    shutil.copy(file, tmp_path / "m.tflite")
    shutil.copy(digits_model_path(), tmp_path / "float.onnx")
    np.savez(tmp_path / "d.npz", image=SAMPLES[:8])


# ---- audits ---------------------------------------------------------------------------------------------------------------


def test_a_file_says_what_samples_it_takes(file, codes):
    for each in (file, codes):
        (port,) = inputs(each)
        assert (port.name, port.dtype, port.shape) == ("image", np.float32, (1, 1, 8, 8))


def test_without_a_model_beside_it_nothing_is_said_of_onnxruntime(file):
    proof = onnxq.audit(file, runtime="litert", data=SAMPLES[:4]).proof
    assert proof.samples == 4 and proof.against == "" and proof.decibels is None and not proof.identical
    assert "onnxruntime" not in proof.text and "ran 4 samples, compared with nothing" in proof.text
    assert proof.inspection.milliseconds > 0


def test_it_is_told_against_which_file(file):
    proof = onnxq.audit(file, digits_model_path(), runtime="litert", data=SAMPLES[:4]).proof
    assert f"dB against '{digits_model_path().name}' in onnxruntime" in proof.text and proof.decibels > 30


def test_samples_for_what_only_compiles_are_not_run(file):
    pytest.importorskip("ethosu", reason="needs the extra ethos-u")
    proof = onnxq.audit(file, runtime="vela", data=SAMPLES[:4]).proof
    assert proof.samples == 0 and "onnxruntime" not in proof.text and proof.inspection.operators


@pytest.mark.parametrize("more", [{"data": SAMPLES[:2, ..., :4]}, {"shapes": {"image": (1, 1, 8, 8)}}])
def test_what_does_not_fit_a_file_is_a_sentence(file, more):
    with pytest.raises(onnxq.OnnxqError) as raised:
        onnxq.audit(file, runtime="litert", **more)
    assert len(raised.value.problems) == 1


def test_bytes_that_are_no_tflite_file_are_a_sentence(file, tmp_path):
    (tmp_path / "text.tflite").write_bytes(b"no model at all")
    (tmp_path / "short.tflite").write_bytes(file.read_bytes()[:200])
    for name in ("text", "short"):
        with pytest.raises(onnxq.OnnxqError, match=rf"'.*{name}\.tflite'"):
            onnxq.audit(tmp_path / f"{name}.tflite", runtime="litert", data=SAMPLES[:2])


def test_litert_writes_nothing_on_its_own(file, capfd):
    onnxq.audit(file, runtime="litert", data=SAMPLES[:1])
    assert capfd.readouterr() == ("", "")


def test_onnxruntime_that_is_named_gives_the_table_of_all_runtimes(onnxq):
    onnx.save(onnx.load(digits_model_path()), "float.onnx")
    np.savez("d.npz", image=SAMPLES[:8])
    assert onnxq("quantize", "float.onnx", "--data", "d.npz", "-o", "q.onnx").code == 0
    code, out, err = onnxq("audit", "q.onnx", "--runtime", "onnxruntime", "--data", "d.npz")
    assert code == 0, err
    assert "where the time goes" in out and "integer  fake  float" in out
    assert "onnxruntime: 22 integer; identical to onnxruntime" in out
    _, out, _ = onnxq("audit", "q.onnx", "--data", "d.npz")
    assert "where the time goes" in out and "fake" not in out


@pytest.mark.usefixtures("here")
def test_limits_and_json_of_other_runtimes(onnxq):
    code, out, err = onnxq("audit", "m.tflite", "--runtime", "litert", "--data", "d.npz", "--json", "--no-float")
    assert code == 0, err
    told = json.loads(out)
    assert told["proof"]["runtime"] == "litert" and told["proof"]["against"] == "" and len(told["limits"]) == 22
    np.savez("e.npz", image=SAMPLES[:1])
    code, _, err = onnxq("quantize", "float.onnx", "-r", "int8", "--data", "d.npz", "--target", "portable", "-o", "p.onnx")
    assert code == 0, err
    pytest.importorskip("tract", reason="needs the extra tract")
    code, _, err = onnxq("audit", "p.onnx", "--runtime", "tract", "--data", "e.npz", "--no-float")
    assert code == 1 and "missed: classifier in integers" in err


def test_inputs_that_must_be_codes_are_not_scaled_behind_them(tmp_path):
    """Features of very different size, which get a Mul elsewhere."""
    pytest.importorskip("flatbuffers", reason="needs the extra litert")
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    from tests.zoo import mlp, rows

    model = mlp()
    data = rows(model, 16)
    data[..., 0] *= 100
    recipe = {"pass": [{"use": "scale-inputs"}]}
    name = model.graph.input[0].name
    there = onnxq.quantize(model, recipe, data, target="ort-cpu", check=False)
    assert any(node.op_type == "Mul" for node in there.model.graph.node) and name not in there.plan
    made = onnxq.quantize(model, recipe, data[:, :], target="ethos-u", check=False)
    made.save(tmp_path / "m.tflite")
    assert name in made.plan


# ---- LiteRT Micro ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["file", "codes"])
def test_litert_micro_computes_what_litert_computes(which, request):
    pytest.importorskip("tflite_micro", reason="needs tflite-micro")
    chosen = request.getfixturevalue(which)
    theirs, ours = (
        onnxq.audit(chosen, digits_model_path(), runtime=name, data=SAMPLES[:8]).proof for name in ("litert", "litert-micro")
    )
    assert ours.agreement == 100 and abs(ours.decibels - theirs.decibels) < 1
    assert ours.inspection.counts() == theirs.inspection.counts() and ours.inspection.milliseconds is None
    facts = ours.inspection.facts
    assert 1 < facts["arena kB"] < 200
    size, calls = re.fullmatch(r"MicroMutableOpResolver<(\d+)>: (.*)", facts["resolver"]).groups()
    assert len(calls.split()) == int(size) and {"AddConv2D();", "AddDepthwiseConv2D();", "AddMean();"} <= {*calls.split()}


def test_the_program_of_the_page_adds_what_the_audit_lists(codes):
    pytest.importorskip("tflite_micro", reason="needs tflite-micro")
    page = (Path(__file__).parents[2] / "docs" / "edge-litert.md").read_text("utf-8")
    ((size, body),) = re.findall(r"MicroMutableOpResolver<(\d+)> operators;\n(.*?)  static", page, re.DOTALL)
    told = onnxq.audit(codes, runtime="litert-micro").proof.inspection.facts
    assert told["resolver"] in page
    assert re.findall(r"Add\w+\(\);", body) == re.findall(r"Add\w+\(\);", told["resolver"])
    assert int(size) == body.count("operators.")
    arena = re.search(r"arena\[(\d+) \* 1024\]", page)
    assert told["arena kB"] < int(arena[1])


def test_what_a_resolver_is_told():
    ops = ["CONV_2D", "RESIZE_NEAREST_NEIGHBOR", "PADV2", "BATCH_MATMUL", "RELU6", "SPLIT_V", "CONV_2D"]
    assert resolver(ops) == (
        "MicroMutableOpResolver<6>: AddBatchMatMul(); AddConv2D(); AddPadV2(); AddRelu6(); AddResizeNearestNeighbor(); "
        "AddSplitV();"
    )


def test_litert_micro_names_the_operator_that_it_lacks(tmp_path):
    pytest.importorskip("tflite_micro", reason="needs tflite-micro")
    pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
    from onnxq_plugins.formats.tflite import write
    from tests.formats.quantized import Maker

    m = Maker()
    x = m.input(np.ones((2, 3), np.float32), quantized=False)
    (tmp_path / "m.tflite").write_bytes(write(m.model([m.node("Erf", [m.node("Relu", [x])])])))
    with pytest.raises(onnxq.OnnxqError, match=r"LiteRT Micro cannot run 'm.tflite': .*opcode") as raised:
        MICRO.inspect(tmp_path / "m.tflite", [], dict(MICRO.settings))
    assert len(raised.value.problems) == 1


# ---- commands that read ONNX ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "command",
    [
        ("audit", "{}"),
        ("audit", "float.onnx", "--against", "{}"),
        ("compare", "float.onnx", "{}", "--data", "d.npz"),
        ("compare", "{}", "float.onnx", "--data", "d.npz"),
        ("diagnose", "{}", "--data", "d.npz"),
        ("check", "{}"),
        ("check", "int8", "{}"),
        ("quantize", "{}", "--data", "d.npz"),
        ("matrix", "{}", "--data", "d.npz"),
    ],
    ids=" ".join,
)
def test_what_is_no_onnx_model_is_told_its_command(onnxq, command):
    assert onnxq("quantize", "float.onnx", "--data", "d.npz", "--save-plan", "m.plan", "-o", "q.onnx").code == 0
    for name, right in (("m.tflite", "onnxq audit 'm.tflite' --runtime litert"), ("m.plan", "onnxq export 'm.plan'")):
        code, _, err = onnxq(*(part.format(name) for part in command))
        assert code == 2 and right in err and err.count("\n") == 1


@pytest.mark.usefixtures("here")
def test_small_files_are_told_in_kB(onnxq):
    assert onnxq("quantize", "float.onnx", "--data", "d.npz", "-o", "q.onnx").code == 0
    code, out, err = onnxq("compare", "float.onnx", "q.onnx", "--data", "d.npz")
    assert code == 0, err
    assert re.search(r"\| 248\.9 -> 7\d\.\d kB \|", out) and "MB" not in out


# ---- what is told of other runtimes ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("target", ["litert", "qnn", "portable"])
def test_summaries_and_pages_say_nothing_of_kernels_that_do_not_run(onnxq, target):
    pytest.importorskip("matplotlib", reason="needs the extra report")
    suffix = ".tflite" if target == "litert" else ".onnx"
    common = ("quantize", "float.onnx", "--data", "d.npz", "--target", target, "-o", f"o{suffix}")
    code, out, err = onnxq(*common, "--report", "r.html")
    assert code == 0, err
    assert f"17/17 Conv; 1/1 Gemm quantized for {target} |" in out and "in onnxruntime" not in out
    page = Path("r.html").read_text("utf-8")
    assert f"Layers quantized for {target}" in page and "Latency" not in page and "times the speed" not in page
    told = json.loads(Path("r.json").read_text("utf-8"))
    assert all("why_float" not in row for row in told["layers"]) and sum(told["kernels"].values()) == 18
    (section,) = (each for each in told["sections"] if each["title"] == "Runtimes")
    assert [row[0] for row in section["rows"]] == [target] and len(section["rows"][0]) == len(section["columns"])


@pytest.mark.usefixtures("here")
def test_files_for_several_targets_are_a_table_on_the_page(onnxq):
    pytest.importorskip("matplotlib", reason="needs the extra report")
    common = ("quantize", "float.onnx", "--data", "d.npz", "-o", "out", "--target", "ort-cpu,litert,qoperator")
    code, out, err = onnxq(*common, "--report", "r.html")
    assert code == 0, err
    size = Path("out/float.int8.litert.tflite").stat().st_size
    assert f"248.9 -> {size / 1e3:.1f} kB" in out
    (section,) = (each for each in json.loads(Path("r.json").read_text("utf-8"))["sections"] if each["title"] == "Runtimes")
    rows = {row[0]: row for row in section["rows"]}
    assert [*rows] == ["ort-cpu", "litert", "qoperator"] and rows["ort-cpu"][2] == 22
    assert "<h2>Runtimes</h2>" in Path("r.html").read_text("utf-8")
    assert onnxq("quantize", "float.onnx", "--data", "d.npz", "-o", "q.onnx", "--report", "s.html").code == 0
    assert "<h2>Runtimes</h2>" not in Path("s.html").read_text("utf-8")
