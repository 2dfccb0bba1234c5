"""Commands as gates of a CI job: limits, exit codes, JUnit, Markdown, JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from onnxq_plugins import runtimes
from tests.cli.folder import images, listing, write_data


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Latencies in a moment: what is tested is not how fast it is."""
    latency = runtimes.latency
    monkeypatch.setattr(runtimes, "latency", lambda runners, feed, seconds=1.0: latency(runners, feed, 0.02))


COMMANDS = {
    "compare": ("compare", "model.onnx", "q.onnx", "--data", "data.npz"),
    "check": ("check", "int8", "model.onnx", "--data", "data.npz"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_gate_tells_in_every_form_which_limits_are_kept(ready, name):
    ready("quantize", "model.onnx", "--data", "data.npz", "-o", "q.onnx", "--no-check")
    Path("summary.md").write_text("# before\n")
    limits = ("--min-sqnr", "20", "--max-drop", "-1000", "--metric", "agreement", "--min-speed", "0.0001")
    files = ("--junit", "out.xml", "--markdown", "summary.md")
    ran = ready(*COMMANDS[name], *limits, *files, "--json")
    assert ran.code == 1 and "missed: drop of at most -1000" in ran.err
    found = json.loads(ran.out)
    assert [each["kept"] for each in found["limits"]] == [True, False, True]
    assert found["sqnr"] > 20 and found["metric"] == "agreement" and len(found["bytes"]) == len(found["milliseconds"]) == 2
    assert {output["name"] for output in found["outputs"]} == {"y"} or found["outputs"]
    suite = ElementTree.parse("out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    text = Path("summary.md").read_text()
    assert text.startswith("# before\n### ") and "2 of 3 limits kept" in text and text.count("| **no** |") == 1
    kept = ready(*COMMANDS[name], "--min-sqnr", "20", *files)
    assert kept.code == 0 and "dB" in kept.out and Path("summary.md").read_text().count("###") == 2


def test_check_measures_what_the_recipe_makes_and_leaves_nothing(ready):
    write_data(x=images(24))
    ran = ready("check", "model.onnx", "--data", "data.npz", "--min-sqnr", "20")
    assert ran.code == 0 and "recipe 'int8' is valid" in ran.out and "as QLinearConv" in ran.out
    assert "calibrated with, which flatters" in ran.err and sorted(listing()) == ["data.npz", "model.onnx"]
    apart = ready("check", "model.onnx", "--data", "data.npz", "--test", "data.npz", "--min-sqnr", "300")
    assert apart.code == 1 and "flatters" not in apart.err and "missed: SQNR of 300 dB" in apart.err
    narrow = ready(
        "check", "int8", "model.onnx", "--data", "data.npz", "--set", "weights.bits=3", "--min-sqnr", "1", "--json"
    )
    wide = ready("check", "int8", "model.onnx", "--data", "data.npz", "--min-sqnr", "1", "--json")
    assert json.loads(narrow.out)["sqnr"] < json.loads(wide.out)["sqnr"]


def test_check_in_json_without_limits(ready):
    Path("mine.toml").write_text("[[layer]]\nop = 'Gemm'\nquantize = false")
    found = json.loads(ready("check", "mine.toml", "model.onnx", "--shape", "x=1,3,12,12", "--json").out)
    assert (found["layers"], found["quantized"], found["limits"]) == (3, 2, []) and "gemm7" in found["float"]
    assert "12" in found["runs"]
    assert json.loads(ready("check", "int8", "--json").out)["target"] == "ort-cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "int8", "--min-sqnr", "20"), "give a model and --data"),
        (("check", "int8", "model.onnx", "--min-speed", "1"), "give a model and --data"),
        (("check", "int8", "model.onnx", "--junit", "out.xml"), "--junit is for limits"),
        (("check", "int8", "model.onnx", "--data", "data.npz", "--test", "data.npz"), "--test is for limits"),
        (("check", "model.onnx", "--data", "data.npz", "--max-drop", "1"), "--max-drop needs a --metric"),
        (("check", "model.onnx", "--data", "data.npz", "--min-sqnr", "1", "--junit", "model.onnx"), "is the model itself"),
        (("compare", "model.onnx", "model.onnx", "--data", "data.npz", "--markdown", "no/out.md"), "no"),
        (("audit", "model.onnx", "--junit", "out.xml"), "give --no-float"),
    ],
)
def test_a_gate_that_cannot_be_is_one_sentence_and_no_file(ready, arguments, words):
    before = listing()
    ran = ready(*arguments)
    assert ran.code == 2 and words in ran.err and len(ran.err.strip().splitlines()) == 1
    assert listing() == before


def test_audit_as_a_gate(ready):
    ready("quantize", "model.onnx", "--data", "data.npz", "-o", "q.onnx", "--no-check", "--set", "placement.check=false")
    ready("quantize", "model.onnx", "--data", "data.npz", "-o", "part.onnx", "--no-check", "--exclude", "gemm7")
    kept = ready("audit", "q.onnx", "--no-float", "--junit", "kept.xml")
    assert kept.code == 0 and "as QLinearConv" in kept.out
    assert ElementTree.parse("kept.xml").getroot().get("failures") == "0"
    assert ready("audit", "part.onnx").code == 0
    missed = ready("audit", "part.onnx", "--no-float", "--junit", "missed.xml", "--markdown", "out.md")
    assert missed.code == 1 and re.search(r"^missed: gemm7 in integers: Gemm: ", missed.err, re.MULTILINE)
    suite = ElementTree.parse("missed.xml").getroot()
    assert [case.get("name") for case in suite if len(case)] == ["gemm7 in integers"] and len(suite) >= 3
    assert f"{len(suite) - 1} of {len(suite)} limits kept" in Path("out.md").read_text()
    found = json.loads(ready("audit", "part.onnx", "--json", "--against", "model.onnx").out)
    rows = {layer["name"]: layer for layer in found["layers"]}
    assert not rows["gemm7"]["quantized"] and rows["gemm7"]["why"] and rows["conv0"]["kernel"] == "QLinearConv"
    assert len(found["milliseconds"]) == 2 and found["speed"] > 0 and found["limits"] == []
