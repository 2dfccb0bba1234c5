"""What each command does, prints and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
from onnx import TensorProto
from rich.console import Console

import onnxq_plugins
from onnxq_plugins import audit_model, cli, load, measure, plugins, runtimes
from onnxq_plugins.cli.inventory import summary_lines
from onnxq_plugins.laws import LawBroken
from onnxq_plugins.plugins import find_plugins
from tests.cli.folder import external, half, images, listing, write_model
from tests.zoo import Net, cnn, mlp, mobilenet


def test_quantize_writes_into_this_folder_and_prints_one_line(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--no-check")
    assert ran.code == 0
    assert ran.err == ""  # no progress bar where nobody looks
    (line,) = ran.out.splitlines()
    assert line.startswith("model.int8.onnx: 2/2 Conv as QLinearConv; 1/1 Gemm as QGemm | ")
    assert sorted(listing()) == ["data.npz", "model.int8.onnx", "model.onnx"]
    assert audit_model("model.int8.onnx").counts() == {"QLinearConv": 2, "QGemm": 1}


def test_the_default_output_is_in_this_folder_and_named_after_the_recipe(ready):
    Path("sub").mkdir()
    Path("model.onnx").rename("sub/model.onnx")
    Path("sub/mine.toml").write_text("[weights]\nbits = 4\n")
    ran = ready("quantize", "sub/model.onnx", "--data", "data.npz", "-r", "sub/mine.toml")
    assert ran.code == 0
    assert Path("model.mine.onnx").exists()


def test_names_inside_the_model_are_short_or_kept(ready):
    """Either file is what its recipe makes."""
    written = {output for node in onnx.load("model.onnx").graph.node for output in node.output}
    inner = {}
    for names in ("short", "keep"):
        assert ready("quantize", "model.onnx", "--data", "data.npz", "-o", f"{names}.onnx", "--names", names).code == 0
        inner[names] = written & {output for node in onnx.load(f"{names}.onnx").graph.node for output in node.output}
        assert audit_model(f"{names}.onnx").counts() == {"QLinearConv": 2, "QGemm": 1}
        ran = ready("diagnose", "model.onnx", "--data", "data.npz", "--quantized", f"{names}.onnx")
        assert ran.code == 0 and "is not what its recipe makes" not in ran.err
    outputs = {value.name for value in onnx.load("model.onnx").graph.output}
    assert inner["short"] == outputs < inner["keep"]
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--names", "long")
    assert ran.code == 2 and "names = 'long' is unknown" in ran.err


def test_excluded_operators(ready):
    first, second = [n.name for n in load("model.onnx").nodes if n.op == "Conv"][:2]
    ran = ready(
        "quantize", "model.onnx", "--data", "data.npz", "--exclude", first, "--exclude", second, "--report", "r.json"
    )
    floats = {row["name"] for row in json.loads(Path("r.json").read_text())["layers"] if row.get("why_float")}
    assert not ran.code and {first, second} <= floats
    assert "no operator 'nowhere'" in ready("quantize", "model.onnx", "--data", "data.npz", "--exclude", "nowhere").err


def test_an_existing_output_is_replaced(ready):
    Path("out.onnx").write_text("old")
    assert ready("quantize", "model.onnx", "--data", "data.npz", "-o", "out.onnx").code == 0
    onnx.checker.check_model(onnx.load("out.onnx"))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_models_are_converted_on_request(ready, kind):
    write_model(half(kind))
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--float32")
    assert ran.code == 0
    assert "note: half-precision weights were converted to float32" in ran.err
    reference, outputs = (runtimes.outputs(runtimes.session(m), [{"x": images()}])[0] for m in (cnn(), "model.int8.onnx"))
    assert measure.sqnr(reference, outputs) > 25


def test_external_data_beside_the_model(ready):
    external("weights", b"")
    assert ready("quantize", "model.onnx", "--data", "data.npz").code == 0


def test_notes_go_to_standard_error(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--target", "ort-cpu-avx2", "--set", "weights.bits=8")
    assert "note: weight codes of 7 bits in 3 layers" in ran.err
    Path("my.toml").write_text("[[layer]]\nmatch = 'conv0'\nquantize = false")
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "-r", "my.toml")
    assert "float: conv0: the recipe leaves it float" in ran.err


def test_the_report_is_json(ready):
    assert ready("quantize", "model.onnx", "--data", "data.npz", "--report", "report.json", "--verify").code == 0
    report = json.loads(Path("report.json").read_text())
    assert [row["name"] for row in report["layers"]] == ["conv0", "conv3", "gemm7"]
    passes = [step.name for step in find_plugins().recipe("int8").passes]
    assert [step["pass"] for step in report["steps"]] == [*passes, "export"]
    assert report["steps"][0]["drift"] < 1e-4


def test_audit(ready):
    ready("quantize", "model.onnx", "--data", "data.npz")
    ran = ready("audit", "model.int8.onnx", "--against", "model.onnx")
    assert ran.code == 0
    assert "2/2 Conv as QLinearConv; 1/1 Gemm as QGemm" in ran.out
    assert "x the speed of model.onnx" in ran.out
    ran = ready("audit", "model.onnx")
    assert "0/2 Conv in integer kernels" in ran.out
    assert "neither its input (from the model's input) nor its weight is quantized" in ran.out


def test_audit_tells_layers_of_one_kernel_and_reason_in_a_line(ready):
    ready("quantize", "model.onnx", "--data", "data.npz", "--set", "placement.check=false")
    folded, every = ready("audit", "model.int8.onnx").out, ready("audit", "model.int8.onnx", "--all").out
    rows = [line.split() for line in folded.splitlines() if "QLinearConv" in line and " bits" in line]
    assert len(rows) == 1 and rows[0][:3] == ["conv0,", "conv3", "2"]
    assert sum("QLinearConv" in line and " bits" in line for line in every.splitlines()) == 2
    assert "other operators" in folded and "Conv," not in folded.partition("other operators")[2].partition("\n")[0]


def test_decibels_say_of_which_samples_they_are(ready):
    """In the summary, in a comparison and in a diagnosis."""
    made = ready("quantize", "model.onnx", "--data", "data.npz")
    assert re.search(r"\d dB on 8 calibration samples, ", made.out)
    compared = ready("compare", "model.onnx", "model.int8.onnx", "--data", "data.npz").out
    assert "8 samples of 'data.npz' | " in compared
    found = ready("diagnose", "model.onnx", "--data", "data.npz", "--measured", "2").out
    assert "measured on 2 of the calibration samples" in found
    assert "dB at the outputs, on 2 of the calibration samples" in found


def test_audit_with_openvino(ready):
    pytest.importorskip("openvino")
    ready("quantize", "model.onnx", "--data", "data.npz", "--target", "openvino")
    ran = ready("audit", "model.int8.onnx", "--runtime", "openvino")
    assert ran.code == 0
    assert "2/2 Conv" in ran.out


def test_compare(ready):
    ready("quantize", "model.onnx", "--data", "data.npz")
    ran = ready("compare", "model.onnx", "model.int8.onnx", "--data", "data.npz", "--samples", 3)
    assert ran.code == 0
    assert "3 samples" in ran.out
    assert "100.00%" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if "%" in line and "SQNR" not in line]
    assert float(rows[0][1]) > 30
    same = ready("compare", "model.onnx", "model.onnx", "--data", "data.npz").out
    assert "200.00" in same


def test_compare_with_limits_is_a_gate(ready):
    """Exit code 1 for what misses a limit, each of which is a test of JUnit."""
    ready("quantize", "model.onnx", "--data", "data.npz", "-o", "q.onnx")
    base = ("compare", "model.onnx", "q.onnx", "--data", "data.npz", "--junit", "out.xml")
    kept = ready(*base, "--min-sqnr", "20", "--min-speed", "0.0001", "--max-drop", "100", "--metric", "agreement")
    suite = ElementTree.parse("out.xml").getroot()
    assert kept.code == 0 and (suite.get("tests"), suite.get("failures"), len(suite)) == ("3", "0", 3)
    missed = ready(*base, "--min-sqnr", "500", "--min-speed", "1000")
    suite = ElementTree.parse("out.xml").getroot()
    assert missed.code == 1 and "missed: SQNR of 500 dB" in missed.err and "missed: 1000 times" in missed.err
    assert suite.get("failures") == "2" and "dB" in suite.find("testcase/failure").get("message")
    assert ready(*base, "--max-drop", "1").code == 2 and ready(*base[:-1], "q.onnx").code == 2


def test_compare_lists_every_output(ready):
    net = Net(["N", 3, 12, 12])
    x = net.conv("x", 3, 4)
    write_model(net.model(x, net.head(net.op("Relu", x), 4)))
    out = ready("compare", "model.onnx", "model.onnx", "--data", "data.npz").out
    assert sum("200.00" in line for line in out.splitlines()) == 2


def test_plugins(ready):
    listing = ready("plugins").out
    assert all(f"\n  {name} " in listing for name in ("ranges", "bias-correct", "scale-inputs", "ort-cpu-avx2"))
    assert listing.index("passes") < listing.index("  ranges ") < listing.index("\ntargets\n") < listing.index("  ort-cpu ")
    assert "method = 'minmax'" in ready("plugins", "ranges").out
    assert "QLinearConv" in ready("plugins", "ort-cpu").out


def test_plugins_lists_the_broken_last(ready, monkeypatch):
    class Broken:
        name, dist = "vendor", None

        def load(self):
            raise ImportError("no module named torch, " * 10)

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken()])
    ran = ready("plugins")
    assert ran.code == 0
    *_, heading, line = ran.out.splitlines()
    assert heading == "broken plugins" and line.startswith("  vendor: ") and line.count("no module named torch") == 10


@pytest.mark.parametrize("terminal", [30, 80, 100])
def test_a_list_of_plugins_fits_the_terminal(ready, monkeypatch, terminal):
    whole = ready("plugins").out.splitlines()
    monkeypatch.setattr(cli.console, "out", Console(soft_wrap=True, width=terminal, force_terminal=True, color_system=None))
    lines = ready("plugins").out.splitlines()
    assert max(map(len, whole)) > 150 and max(map(len, lines)) <= max(terminal, 32)
    for line, full in zip(lines, whole, strict=True):
        start, dots, _ = line.partition(" ...")
        assert full.startswith(start) if dots or terminal == 30 else line == full


@pytest.mark.parametrize(
    ("doc", "terminal", "line"),
    [
        ("Clip. More.\n\nscale", None, "  acme.clip   Clip (acme-clip)"),
        ("Clip all\nweights: those that", 40, "  acme.clip   Clip all ... (acme-clip)"),
        ("Clip all weights", 42, "  acme.clip   Clip all weights (acme-clip)"),
        ("", 80, "  acme.clip    (acme-clip)"),
        ("Clip", 20, "  acme.clip    (acme-clip)"),
    ],
)
def test_a_line_about_a_plugin_names_the_package_of_a_guest(doc, terminal, line):
    assert summary_lines({"acme.clip": doc}, {"acme.clip": "acme-clip"}, 10, terminal) == [line]
    (builtin,) = summary_lines({"acme.clip": doc}, {"acme.clip": "onnxq-plugins"}, 10, None)
    assert "acme-clip" not in builtin


def test_recipes(ready):
    assert "int8" in ready("recipes").out
    text = ready("recipes", "int8").out
    assert tomllib.loads(text)["recipe"] == 1
    Path("mine.toml").write_text(text)
    assert ready("check", "mine.toml").code == 0


def test_check(ready):
    ran = ready("check", "int8", "model.onnx")
    names = [step.name for step in find_plugins().recipe("int8").passes]
    assert ran.out.splitlines() == [
        f"recipe 'int8' is valid: target ort-cpu, passes: {', '.join(names)}",
        "it quantizes 3 of 3 layers of 'model.onnx'",
    ]
    Path("mine.toml").write_text("[[layer]]\nop = 'Gemm'\nquantize = false")
    ran = ready("check", "mine.toml", "model.onnx")
    assert "float: gemm7: the recipe leaves it float" in ran.out
    assert "quantizes 2 of 3 layers" in ran.out
    assert sorted(listing()) == ["data.npz", "mine.toml", "model.onnx"]


def test_quickstart(onnxq):
    ran = onnxq("quickstart", "-o", "start")
    assert ran.code == 0
    assert ran.err == ""
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if "%" in line}
    float_accuracy, int8_accuracy = (float(rows[name][1].rstrip("%")) for name in ("float", "int8"))
    assert float_accuracy > 95
    assert int8_accuracy > float_accuracy - 1
    assert sorted(listing()) == [
        "start",
        "start/calibration.npz",
        "start/digits.int8.onnx",
        "start/digits.onnx",
        "start/report.html",
        "start/report.json",
        "start/test.npz",
    ]
    commands = [line.split()[1:] for line in ran.out.splitlines() if line.startswith("  onnxq ")]
    assert [c[0] for c in commands] == ["quantize", "audit", "compare", "diagnose"]
    for command in commands:  # that it suggests
        assert onnxq(*command).code == 0, command


def test_a_trace_shows_hook_calls_and_does_not_change_the_model(ready):
    trace = ready("plugins", "--trace")
    steps = tomllib.loads(ready("recipes", "int8").out)["pass"]
    assert trace.code == 0 and trace.out.count("onnxq_run_pass(step=") == len(steps)
    assert "onnxq_exported(" in trace.out and not list(Path().glob("*.onnx"))[1:]
    assert "leave 'ranges' out" in ready("plugins", "ranges", "--trace").err
    plain, traced = (
        ready("quantize", "model.onnx", "--data", "data.npz", "-o", f"{name}.onnx", *options)
        for name, options in (("a", ()), ("b", ("--trace",)))
    )
    assert "onnxq_run_pass(" in traced.err and "onnxq_run_pass(" not in plain.err + traced.out
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


@pytest.mark.parametrize("hidden", [False, True])
def test_an_interruption_prints_one_line(ready, monkeypatch, hidden):
    """Ctrl-C may hit while a lock is taken, which then raises its own error."""

    def interrupt(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            if hidden:
                raise RuntimeError("cannot release un-acquired lock")

    monkeypatch.setattr(cli.quantization, "quantize", interrupt)
    before = listing()
    ran = ready("quantize", "model.onnx", "--data", "data.npz")
    assert ran.code == 130
    assert ran.err == "interrupted; nothing was written (with --cache, finished statistics are kept)\n"
    assert listing() == before


def test_a_bug_in_a_pass_exits_with_1(ready, monkeypatch):
    def broken(*_, **__):
        raise LawBroken("pass 'x' changed the float function")

    monkeypatch.setattr(cli.quantization, "quantize", broken)
    ran = ready("quantize", "model.onnx", "--data", "data.npz")
    assert (ran.code, ran.err) == (1, "error: pass 'x' changed the float function\n")


def test_as_a_real_process(ready):
    env = {**os.environ, "PYTHONPATH": str(Path(onnxq_plugins.__file__).parent.parent)}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "onnxq_plugins.cli", *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    good = run("quantize", "model.onnx", "--data", "data.npz", "--no-check")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("model.int8.onnx: 2/2 Conv")
    wrong = run("quantize", "nowhere.onnx", "--data", "data.npz")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: model 'nowhere.onnx' does not exist; give the path of an .onnx file.\n"


def test_mobilenet_from_file_to_file(ready):
    write_model(mobilenet())
    assert ready("quantize", "model.onnx", "--data", "data.npz", "--set", "weights.bits=4").code == 0
    assert audit_model("model.int8.onnx").counts() == {"QLinearConv": 7, "QGemm": 1}


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["audit", "nowhere.onnx"], "does not exist"),
        (["audit", "data.npz"], "not a readable ONNX model"),
        (["audit", "model.onnx", "--against", "nowhere.onnx"], "does not exist"),
        (["audit", "model.onnx", "--against", "other.onnx"], "cannot be timed on the same input"),
        (["audit", "model.onnx", "--runtime", "tensorrt"], "runtime 'tensorrt' is unknown"),
        (["compare", "model.onnx", "nowhere.onnx", "--data", "data.npz"], "does not exist"),
        (["compare", "model.onnx", "other.onnx", "--data", "data.npz"], "different inputs: x and y"),
        (
            ["compare", "model.onnx", "wide.onnx", "--data", "data.npz"],
            "has shape [(1, 10)] in 'model.onnx' and [(1, 4, 12, 12)] in",
        ),
        (["compare", "model.onnx", "model.onnx", "--data", "nowhere.npz"], "does not exist"),
        (["plugins", "nope"], "'nope' is neither a pass nor a target"),
        (["new-plugin", "Nope"], "plugin name 'Nope' must be lower-case words"),
        (["recipes", "nope"], "recipe 'nope' is unknown"),
        (["check", "nope"], "neither a built-in"),
        (["check", "int8", "nowhere.onnx"], "does not exist"),
        (["check", "int8", "--target", "gpu"], "target 'gpu' is unknown"),
        (["check", "block.toml", "model.onnx"], "cannot run Conv 'conv0', '"),
        (["quickstart", "-o", "model.onnx"], "folder 'model.onnx'"),
    ],
)
def test_bad_input_of_each_command(ready, arguments, phrase):
    other = mlp()
    other.graph.input[0].name = other.graph.node[0].input[0] = "y"
    onnx.save(other, "other.onnx")
    net = Net(["N", 3, 12, 12])
    wide = net.model(net.conv("x", 3, 4))
    wide.graph.output[0].name = wide.graph.node[0].output[0] = cnn().graph.output[0].name
    onnx.save(wide, "wide.onnx")
    Path("block.toml").write_text("[weights]\nblock = 32")
    before = listing()
    ran = ready(*arguments)
    assert ran.code == 2
    assert ran.out == "" or arguments[0] == "check"  # the recipe may be valid and the model not
    assert phrase in ran.err
    assert len(ran.err.splitlines()) == 1
    assert listing() == before
