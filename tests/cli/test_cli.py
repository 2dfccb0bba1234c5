"""The command line: every bad input is one clear sentence, exit code 2 and no file."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import onnxq_plugins
from onnxq_plugins import OnnxqError, audit_model, cli, open_data, plugins, quantize, runtimes
from onnxq_plugins.cli.inventory import summary_lines
from onnxq_plugins.cli.options import OptionGroup, flatten
from onnxq_plugins.data import DataOptions, Input
from onnxq_plugins.laws import LawBroken
from tests.zoo import Net, cnn, feeds, mlp, mobilenet


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def onnxq(monkeypatch, capsys, tmp_path) -> Callable[..., Ran]:
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli.console, "out", Console(soft_wrap=True, width=300))  # tables would wrap at 80
    latency = runtimes.latency
    monkeypatch.setattr(runtimes, "latency", lambda runners, feed, seconds=1.0: latency(runners, feed, 0.02))

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["onnxq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ran(int(caught.value.code or 0), *capsys.readouterr())

    return call


def images(n: int = 8, side: int = 12) -> np.ndarray:
    return np.concatenate([feed["x"] for feed in feeds(cnn(), n)])[:, :, :side, :side]


def write_model(model: onnx.ModelProto | None = None) -> None:
    onnx.save(cnn() if model is None else model, "model.onnx")


def write_data(**arrays: np.ndarray) -> None:
    np.savez("data.npz", **(arrays or {"x": images()}))


def write_png(path: str, width: int = 12, height: int = 12, mode: str = "RGB", seed: int = 0) -> np.ndarray:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels


def listing() -> dict[str, bytes | None]:
    paths = (p for p in sorted(Path().rglob("*")) if "__pycache__" not in str(p))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


# ---- bad input: what prepares the folder, further arguments, key phrases ------------------------------------------------

BAD: list = []


def bad(*phrases: str, name: str = ""):
    def register(prepare):
        BAD.append(pytest.param(prepare, phrases, id=name or prepare.__name__))
        return prepare

    return register


def bad_data(name: str, *phrases: str, **arrays) -> None:
    def prepare() -> list:
        write_data(**arrays)
        return []

    bad(*phrases, name=name)(prepare)


def images_with(value: float) -> np.ndarray:
    data = images()
    data[2, 1, 3, 3] = value
    return data


bad_data("nan", "sample 2", "'x' has NaN", x=images_with(np.nan))
bad_data("inf", "sample 2", "'x' has Inf", x=images_with(np.inf))
bad_data("minus_inf", "'x' has Inf", x=images_with(-np.inf))
bad_data("wrong_input_name", "no array for the model's input 'x'", "'image', 'label'", image=images(), label=np.zeros(4))
bad_data("wrong_size", "wants shape ['any', 3, 12, 12]", "has [1, 3, 8, 8]", x=images(side=8))
bad_data("wrong_layout", "wants shape ['any', 3, 12, 12]", "has [1, 12, 12, 3]", x=images().transpose(0, 2, 3, 1))
bad_data("wrong_rank", "wants shape", x=images().reshape(4, -1))
bad_data("uint8", "wants float32, the data is uint8", "normalize", x=images().astype(np.uint8))
bad_data("strings", "wants float32", x=np.array(["a", "b"]))
bad_data("no_samples", "is empty", x=images()[:0])
bad_data("scalar", "is empty", x=np.float32(1))


@bad("needs sample inputs", "--data")
def no_data():
    return ["--data", ""]


@bad("'nowhere.npz' does not exist", ".npz")
def missing_data():
    return ["--data", "nowhere.npz"]


@bad("not a readable .npz or .npy file")
def text_as_data():
    Path("data.npz").write_text("1,2,3")
    return []


@bad("not a readable .npz or .npy file")
def truncated_data():
    write_data()
    Path("data.npz").write_bytes(Path("data.npz").read_bytes()[:3000])
    return []


@bad("not a readable .npz or .npy file")
def pickled_data():
    np.savez("data.npz", x=np.array([{"a": 1}], dtype=object))
    return []


@bad("holds no image", ".png")
def empty_folder():
    Path("pictures").mkdir()
    return ["--data", "pictures"]


@bad("image 'pictures/b.png' cannot be read", "remove or replace it")
def broken_image():
    Path("pictures").mkdir()
    write_png("pictures/a.png")
    Path("pictures/b.png").write_bytes(Path("pictures/a.png").read_bytes()[:60])
    return ["--data", "pictures"]


def bad_images(name: str, *phrases: str, options: tuple[str, ...] = (), size: tuple[int, int] = (12, 12)) -> None:
    def prepare() -> list:
        Path("pictures").mkdir()
        write_png("pictures/a.png", *size)
        return ["--data", "pictures", *options]

    bad(*phrases, name=name)(prepare)


bad_images("image_size", "wants shape ['any', 3, 12, 12]", "--resize", size=(20, 16))
bad_images("image_layout", "layout 'chwn' is unknown", "nchw", options=("--layout", "chwn"))
bad_images("image_mean", "--mean has 2 values", options=("--mean", "0.5,0.5"))
bad_images("image_mean_text", "mean", "a list of numbers", options=("--mean", "a,b"))
bad_images("image_std", "--std has a zero", options=("--std", "1,0,1"))
bad_images("image_crop", "pictures/a.png", "crop", "12", options=("--crop", "12"), size=(10, 20))
bad_images("image_crop_negative", "crop", "-12", options=("--crop", "-12"))
bad_images("image_resize_negative", "resize", "-12", options=("--resize", "-12"))
bad_images("samples_negative", "samples", "-1", options=("--samples", "-1"))


@bad("images fit a model with one 4-D input")
def images_for_a_model_of_vectors():
    write_model(mlp())
    Path("pictures").mkdir()
    write_png("pictures/a.png")
    return ["--data", "pictures"]


def bad_callable(name: str, body: str, *phrases: str, attribute: str = "make") -> None:
    def prepare() -> list:
        Path(f"data_{name}.py").write_text(f"def make():\n    {body}\n")
        return ["--data", f"data_{name}:{attribute}"]

    bad(*phrases, name=f"callable_{name}")(prepare)


bad_callable("raises", "raise RuntimeError('disk\\non fire')", "'data_raises:make' failed", "RuntimeError: disk on fire")
bad_callable("missing", "pass", "failed", "AttributeError", attribute="nothing")
bad_callable("none", "return None", "NoneType", "is not understood")
bad_callable("empty", "return iter(())", "holds no sample")
bad_callable("list", "return [[1, 2]]", "expected a mapping from input name to array, got list")
bad_callable("feeds", "return [{'y': 1}]", "no array for the model's input 'x'", "'y'")


@bad("failed", "ModuleNotFoundError")
def callable_without_module():
    return ["--data", "no_such_module:make"]


@bad("model 'model.onnx' does not exist")
def missing_model():
    Path("model.onnx").unlink()
    return []


@bad("not a readable ONNX model")
def corrupt_model():
    Path("model.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    return []


@bad("model.onnx'", "corrupt")
def empty_model():
    Path("model.onnx").write_bytes(b"")
    return []


@bad("model 'model.onnx' is a folder; give the path of an .onnx file")
def folder_as_model():
    Path("model.onnx").unlink()
    Path("model.onnx").mkdir()
    return []


@bad("model.onnx'", "again")
def truncated_model():
    content = Path("model.onnx").read_bytes()
    Path("model.onnx").write_bytes(content[: len(content) // 2])
    return []


@bad("model.onnx'", "again")
def model_with_truncated_weight():
    model = cnn()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    write_model(model)
    return []


def half(kind: int) -> onnx.ModelProto:
    model = cnn(opset=22 if kind == TensorProto.BFLOAT16 else 17)
    model.ir_version = 10
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


@bad("is an fp16 model", "--float32")
def fp16_model():
    write_model(half(TensorProto.FLOAT16))
    return []


@bad("is an bf16 model", "--float32")
def bf16_model():
    write_model(half(TensorProto.BFLOAT16))
    return []


def with_opset(version: int) -> None:
    model = cnn()
    model.opset_import[0].version = version
    write_model(model)


@bad("opset 6, too old", "opset 7 or newer")
def opset_6():
    with_opset(6)
    return []


@bad("opset 99, too new", "reads up to 26")
def opset_99():
    with_opset(99)
    return []


@bad("not a valid ONNX model")
def invalid_model():
    model = cnn()
    model.graph.node[0].input[0] = "nowhere"
    write_model(model)
    return []


@bad("cannot load the model", "vendor")
def unknown_operator():
    net = Net(["N", 3, 12, 12])
    model = net.model(net.op("Relu", net.conv("x", 3, 4)))
    model.graph.node[1].domain, model.graph.node[1].op_type = "vendor", "Swish"
    model.opset_import.add(domain="vendor", version=1)
    write_model(model)
    return []


@bad("already quantized", "DequantizeLinear")
def quantized_model():
    quantize(cnn(), {}, images(), output="model.onnx", workers=1)
    return []


@bad("NaN or Inf", "check its weights")
def nan_in_a_weight():
    model = cnn()
    name = next(n for n in model.graph.node if n.name == "conv3").input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    write_model(model)
    return []


def external(location: str, content: bytes | None) -> list:
    model = cnn()
    onnx.save(model, "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    proto = onnx.load("model.onnx", load_external_data=False)
    data = Path("weights").read_bytes()
    Path("weights").unlink()
    if content is not None:
        Path(location).write_bytes(data[: len(content)] if content else data)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    Path("model.onnx").write_bytes(proto.SerializeToString())
    return []


@bad("'../outside'", "outside the model's folder")
def external_data_outside():
    return external("../outside", b"")


@bad("outside the model's folder")
def external_data_absolute():
    return external(str(Path("../outside").resolve()), b"")


@bad("outside the model's folder")
def external_data_behind_a_link():
    Path("../outside").write_bytes(b"secret" * 10000)
    external("link", None)
    Path("link").symlink_to("../outside")
    return []


@bad("the file 'weights'", "is missing", "beside the model")
def external_data_missing():
    return external("weights", None)


@bad("model.onnx'", "again")
def external_data_truncated():
    return external("weights", b"x" * 100)


@bad("the folder 'nowhere' does not exist")
def output_in_a_missing_folder():
    return ["-o", "nowhere/out.onnx"]


@bad("'sub' is a folder")
def output_is_a_folder():
    Path("sub").mkdir()
    return ["-o", "sub"]


@bad("is the model itself", "-o")
def output_is_the_model():
    return ["-o", "model.onnx"]


@bad("'pipe' is not an ordinary file")
def output_is_a_pipe():
    os.mkfifo("pipe")
    return ["-o", "pipe"]


@bad("is the model itself")
def output_is_a_link_to_the_model():
    Path("link.onnx").symlink_to("model.onnx")
    return ["-o", "link.onnx"]


@bad("the folder 'nowhere' does not exist")
def report_in_a_missing_folder():
    return ["--report", "nowhere/report.json"]


@bad("model.onnx", "report")
def report_is_the_model():
    return ["--report", "model.onnx"]


@bad("out.onnx", "report")
def report_is_the_output():
    return ["--report", "out.onnx"]


@bad("data.npz", "-o")
def output_is_the_data():
    return ["-o", "data.npz"]


@bad("recipe 'int9' is neither a built-in nor a file; known: ", "(did you mean 'int8'?)")
def unknown_recipe():
    return ["-r", "int9"]


def bad_recipe(name: str, text: str, *phrases: str) -> None:
    def prepare() -> list:
        Path("my.toml").write_text(text)
        return ["-r", "my.toml"]

    bad("'my.toml'", *phrases, name=f"recipe_{name}")(prepare)


bad_recipe("broken", "[weights\nbits = 8", "cannot be read", "line 1")
bad_recipe("unknown_key", "[weights]\nbit = 8", "unknown key 'bit'", "(did you mean 'bits'?)")
bad_recipe("unknown_pass", "[[pass]]\nuse = 'magic'", "'magic' is not a known pass", "ranges")
bad_recipe("wrong_type", "[weights]\nbits = 'eight'", "must be a whole number")


@bad("nothing matches 'fc*'", "conv0")
def rule_without_layer():
    Path("my.toml").write_text("[[layer]]\nmatch = 'fc*'\nquantize = false")
    return ["-r", "my.toml"]


@bad("cannot run Conv 'conv0', 'conv3' with int8 block [1, 32] weights", "QLinearConv")
def block_that_the_target_lacks():
    return ["--set", "weights.block=32"]


@bad("target 'gpu' is unknown", "ort-cpu")
def unknown_target():
    return ["--target", "gpu"]


@bad("'weights.bits' must look like")
def broken_setting():
    return ["--set", "weights.bits"]


@bad("cache 'model.onnx'", "--cache")
def cache_is_a_file():
    return ["--cache", "model.onnx"]


@pytest.mark.parametrize(("prepare", "phrases"), BAD)
def test_bad_input(onnxq, prepare, phrases):
    lines = 2 if prepare is block_that_the_target_lacks else 1  # one per kind of layer
    write_model()
    write_data()
    options = prepare()
    before = listing()
    arguments = [
        "quantize",
        "model.onnx",
        *([] if "--data" in options else ["--data", "data.npz"]),
        *([] if "-o" in options else ["-o", "out.onnx"]),
        *options,
    ]
    ran = onnxq(*arguments)
    assert (ran.code, ran.out) == (2, ""), ran
    assert all(line.startswith("error: ") for line in ran.err.splitlines()), ran.err
    assert len(ran.err.splitlines()) == lines, ran.err
    for phrase in phrases:
        assert phrase in ran.err, ran.err
    assert listing() == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_output_without_permission(onnxq):
    write_model()
    write_data()
    Path("locked").mkdir(mode=0o500)
    ran = onnxq("quantize", "model.onnx", "--data", "data.npz", "-o", "locked/out.onnx")
    assert (ran.code, "permission denied" in ran.err) == (2, True)


def test_a_broken_plugin_that_the_recipe_needs(onnxq, monkeypatch):
    class Broken:
        name, dist = "vendor", None

        def load(self):
            raise ImportError("no module named torch")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken()])
    write_model()
    write_data()
    Path("my.toml").write_text("[[pass]]\nuse = 'vendor.magic'")
    ran = onnxq("quantize", "model.onnx", "--data", "data.npz", "-r", "my.toml")
    assert ran.code == 2
    assert "'vendor.magic' is not a known pass" in ran.err
    assert "Plugin 'vendor' is broken: import failed with ImportError in " in ran.err
    assert ": no module named torch." in ran.err
    assert onnxq("quantize", "model.onnx", "--data", "data.npz").code == 0  # others do not need it


def test_several_problems_are_several_lines(onnxq):
    write_model()
    write_data()
    ran = onnxq("quantize", "model.onnx", "--data", "data.npz", "--set", "weights.bit=4", "--set", "ranges.mode=x")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 2


# ---- what works -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(onnxq) -> Callable[..., Ran]:
    """The command line in a folder with model.onnx and data.npz."""
    write_model()
    write_data()
    return onnxq


def test_quantize_writes_into_this_folder_and_prints_one_line(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz")
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
    assert runtimes.sqnr(reference, outputs) > 25


def test_external_data_beside_the_model(ready):
    external("weights", b"")
    assert ready("quantize", "model.onnx", "--data", "data.npz").code == 0


def test_notes_go_to_standard_error(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--target", "ort-cpu-avx2", "--set", "weights.bits=8")
    assert "note: 3 layers have 7-bit weight codes" in ran.err
    Path("my.toml").write_text("[[layer]]\nmatch = 'conv0'\nquantize = false")
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "-r", "my.toml")
    assert "float: conv0: the recipe leaves it float" in ran.err


def test_the_report_is_json(ready):
    assert ready("quantize", "model.onnx", "--data", "data.npz", "--report", "report.json", "--verify").code == 0
    report = json.loads(Path("report.json").read_text())
    assert [row["name"] for row in report["layers"]] == ["conv0", "conv3", "gemm7"]
    assert [step["pass"] for step in report["steps"]] == ["scale-inputs", "ranges", "bias-correct", "export"]
    assert report["steps"][0]["drift"] < 1e-4


def test_options_reach_the_engine(ready, monkeypatch):
    passed = {}

    def spy(model, recipe, data, **options):
        passed.update(options, recipe=recipe, data=data)
        return quantize(model, recipe, data, **{**options, "track": onnxq_plugins.calibration.statistics.silent})

    monkeypatch.setattr(cli.quantization, "quantize", spy)
    ran = ready(
        "quantize",
        "model.onnx",
        "--data",
        "data.npz",
        "--samples",
        2,
        "--seed",
        5,
        "--workers",
        1,
        "--cache",
        "c",
        "--verify",
        "--set",
        "ranges.method=mse",
        "--mean",
        "0.5",
        "--resize",
        9,
    )
    assert ran.code == 0
    expected = {
        "samples": 2,
        "seed": 5,
        "workers": 1,
        "cache": Path("c"),
        "verify": True,
        "float32": False,
        "target": None,
        "data": "data.npz",
        "recipe": "int8",
    }
    assert {key: passed[key] for key in expected} == expected
    assert passed["settings"] == ["data.resize=9", "data.mean=[0.5]", "ranges.method=mse"]
    assert any(Path("c").iterdir())


def test_a_callable_as_data(ready):
    Path("my_data.py").write_text(
        "import numpy as np\n\ndef make():\n    for n in range(3):\n"
        "        yield {'x': np.full((1, 3, 12, 12), n, np.float32)}\n"
    )
    ran = ready("quantize", "model.onnx", "--data", "my_data:make", "--report", "report.json")
    assert ran.code == 0, ran.err


def test_a_folder_of_images_as_data(ready):
    Path("pictures").mkdir()
    for n in range(5):
        write_png(f"pictures/{n}.png", 20, 16)
    Path("pictures/notes.txt").write_text("not an image")
    ran = ready(
        "quantize",
        "model.onnx",
        "--data",
        "pictures",
        "--resize",
        14,
        "--crop",
        12,
        "--mean",
        "0.485,0.456,0.406",
        "--std",
        "0.229,0.224,0.225",
        "--samples",
        3,
    )
    assert ran.code == 0, ran.err


def test_audit(ready):
    ready("quantize", "model.onnx", "--data", "data.npz")
    ran = ready("audit", "model.int8.onnx", "--against", "model.onnx")
    assert ran.code == 0
    assert "2/2 Conv as QLinearConv; 1/1 Gemm as QGemm" in ran.out
    assert "x the speed of model.onnx" in ran.out
    ran = ready("audit", "model.onnx")
    assert "0/2 Conv in integer kernels" in ran.out
    assert "neither its input (from the model's input) nor its weight is quantized" in ran.out


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
            "has shape (8, 10) in 'model.onnx' and (8, 4, 12, 12)",
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
def test_bad_input_of_the_other_commands(ready, arguments, phrase):
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
    assert len(ran.err.splitlines()) == (2 if "block.toml" in arguments else 1)
    assert listing() == before


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
    rows = [line.split() for line in ran.out.splitlines() if "%" in line]
    assert float(rows[0][1]) > 30
    same = ready("compare", "model.onnx", "model.onnx", "--data", "data.npz").out
    assert "200.00" in same


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
    assert ran.out.splitlines() == [
        "recipe 'int8' is valid: target ort-cpu, passes: scale-inputs, ranges, bias-correct",
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


def test_version(onnxq):
    assert onnxq("--version").out == f"onnxq-plugins {onnxq_plugins.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(onnxq, command):
    ran = onnxq(command, "--help")
    assert ran.code == 0
    assert len(ran.out) > 100
    assert command in onnxq("--help").out


def test_options_of_quantize_are_in_panels(onnxq):
    lines = onnxq("quantize", "--help").out.splitlines()
    panels: dict[str, list[str]] = {}
    for line in lines:
        if title := re.match(r"╭─ (\w+) ─", line):
            options = panels.setdefault(title[1], [])
        elif option := re.match(r"│ (--[\w-]+)", line):
            options.append(option[1])
    assert panels == {
        "Arguments": [],
        "Options": ["--help"],
        "Data": ["--data", "--samples", "--labels", "--resize", "--crop", "--mean", "--std", "--layout"],
        "Recipe": ["--recipe", "--set", "--target", "--seed", "--float32"],
        "Output": ["--output", "--report", "--test", "--overrides"],
        "Search": ["--curve", "--metric", "--plan"],
        "Work": ["--workers", "--cache", "--dask", "--processes", "--verify", "--trace"],
    }


def test_a_group_of_options_is_one_parameter_of_a_command():
    """Also where the group has an option without a default, which follows one that has."""

    @dataclass(frozen=True)
    class Size(OptionGroup):
        width: Annotated[int, typer.Option()]
        tall: Annotated[bool, typer.Option("--tall")] = False

    calls = []

    def draw(path: Annotated[Path, typer.Argument()], color: str = "red", *, size: Size, names: list[str] | None = None):
        """Draw."""
        calls.append((path, color, size, names))

    draw.__annotations__["size"] = Size  # a local class is no global for get_type_hints
    draw.__annotations__ |= {"path": Annotated[Path, typer.Argument()], "color": str, "names": list[str] | None}
    app = typer.Typer()
    app.command()(flatten(draw))
    runner = CliRunner()
    assert runner.invoke(app, ["a.png", "--width", "3", "--tall", "--names", "b"]).exit_code == 0
    assert runner.invoke(app, ["--width", "4", "--color", "blue", "a.png"]).exit_code == 0
    assert calls[0] == (Path("a.png"), "red", Size(3, True), ["b"])
    assert calls[1][:3] == (Path("a.png"), "blue", Size(4))
    assert runner.invoke(app, ["a.png"]).exit_code == 2  # --width is missing
    assert "size" not in inspect.signature(flatten(draw)).parameters and flatten(draw).__doc__ == "Draw."


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

    good = run("quantize", "model.onnx", "--data", "data.npz")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("model.int8.onnx: 2/2 Conv")
    wrong = run("quantize", "nowhere.onnx", "--data", "data.npz")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: model 'nowhere.onnx' does not exist; give the path of an .onnx file.\n"


# ---- data ---------------------------------------------------------------------------------------------------------------

X = Input("x", np.dtype(np.float32), (None, 3))


def rows(data) -> np.ndarray:
    return np.concatenate([feed["x"] for feed in data])


VALUES = np.arange(18, dtype=np.float32).reshape(6, 3)


class Reader:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self) -> None:
        self.left = iter(VALUES)

    def get_next(self):
        row = next(self.left, None)
        return None if row is None else {"x": row[None]}


class Rewinding(Reader):
    def rewind(self) -> None:
        self.left = iter(VALUES)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: VALUES, id="array"),
        pytest.param(lambda: VALUES.astype(np.float64), id="float64"),
        pytest.param(lambda: {"x": VALUES}, id="mapping"),
        pytest.param(lambda: {"anything": VALUES}, id="single array"),
        pytest.param(lambda: [{"x": row[None]} for row in VALUES], id="list of feeds"),
        pytest.param(lambda: [row[None] for row in VALUES], id="list of arrays"),
        pytest.param(lambda: ({"x": row[None]} for row in VALUES), id="generator"),
        pytest.param(lambda: [{"x": VALUES[:4]}, {"x": VALUES[4:]}], id="batches"),
        pytest.param(lambda: [{"x": row[None], "label": 1} for row in VALUES], id="more than asked"),
        pytest.param(Reader, id="reader"),
        pytest.param(Rewinding, id="rewinding reader"),
    ],
)
def test_sources_give_single_samples_as_often_as_asked(source):
    data = open_data(source(), [X])
    for _ in range(2):
        assert [feed["x"].shape for feed in data] == [(1, 3)] * 6
        assert all(feed["x"].dtype == np.float32 and set(feed) == {"x"} for feed in data)
        np.testing.assert_array_equal(rows(data), VALUES)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_files_of_arrays(tmp_path, suffix):
    (np.save if suffix == ".npy" else np.savez)(tmp_path / f"data{suffix}", VALUES)
    np.testing.assert_array_equal(rows(open_data(tmp_path / f"data{suffix}", [X])), VALUES)


@pytest.mark.parametrize(("wanted", "picked"), [(0, range(6)), (2, [0, 3]), (3, [0, 2, 4]), (6, range(6)), (9, range(6))])
def test_samples_are_spread_evenly(wanted, picked):
    data = open_data(VALUES, [X], DataOptions(samples=wanted))
    np.testing.assert_array_equal(rows(data), VALUES[list(picked)])
    assert data.size == len(picked)


@pytest.mark.parametrize("source", [VALUES, [{"x": row[None]} for row in VALUES]])
def test_a_fixed_batch_is_filled_up(source):
    fixed = Input("x", np.dtype(np.float32), (4, 3))
    found = [feed["x"] for feed in open_data(source, [fixed])]
    assert [batch.shape for batch in found] == [(4, 3)] * 2
    np.testing.assert_array_equal(np.concatenate(found), VALUES[[0, 1, 2, 3, 4, 5, 4, 5]])


def test_several_inputs():
    inputs = [X, Input("length", np.dtype(np.int64), (None,))]
    data = open_data({"x": VALUES, "length": np.arange(6)}, inputs)
    assert [int(feed["length"][0]) for feed in data] == list(range(6))
    with pytest.raises(OnnxqError, match=r"differ in their number of samples.*'length': 5"):
        open_data({"x": VALUES, "length": np.arange(5)}, inputs)
    with pytest.raises(OnnxqError, match="no array for the model's input 'length'"):
        open_data({"x": VALUES}, inputs)


@pytest.mark.parametrize("source", [None, 5, object()])
def test_what_is_no_data(source):
    with pytest.raises(OnnxqError, match="is not understood"):
        open_data(source, [X])


def test_digest_tells_data_apart():
    one, same, other = (open_data(values, [X]).digest() for values in (VALUES, VALUES.copy(), VALUES + 1))
    assert one == same != other


def nchw(size: int, channels: int = 3) -> Input:
    return Input("x", np.dtype(np.float32), (None, channels, size, size))


@pytest.mark.parametrize(
    ("mode", "mean", "std"),
    [
        ("RGB", (0.0,), (1.0,)),
        ("RGB", (0.5,), (0.25,)),
        ("RGB", (0.485, 0.456, 0.406), (0.2, 0.3, 0.4)),
        ("L", (0.0,), (1.0,)),
        ("L", (0.5,), (0.25,)),
    ],
)
@pytest.mark.parametrize(("layout", "channels_last"), [("nchw", False), ("", False), ("nhwc", True), ("", True)])
def test_images_become_exactly_the_expected_array(tmp_path, monkeypatch, mode, mean, std, layout, channels_last):
    monkeypatch.chdir(tmp_path)
    channels = len(mode)
    pixels = write_png("a.png", 12, 12, mode).reshape(12, 12, channels)
    shape = (None, 12, 12, channels) if channels_last else (None, channels, 12, 12)
    data = open_data(tmp_path, [Input("x", np.dtype(np.float32), shape)], DataOptions(mean=mean, std=std, layout=layout))
    wanted = (pixels.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    wanted = wanted[None] if channels_last else wanted.transpose(2, 0, 1)[None]
    (feed,) = data
    assert feed["x"].dtype == np.float32
    np.testing.assert_allclose(feed["x"], wanted, rtol=1e-6, atol=1e-7)


def test_crop_takes_the_middle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = write_png("a.png", 20, 16)
    (feed,) = open_data(tmp_path, [nchw(8)], DataOptions(crop=8))
    np.testing.assert_allclose(feed["x"][0].transpose(1, 2, 0), pixels[4:12, 6:14] / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized"), [((20, 16), (15, 12)), ((16, 20), (12, 15)), ((7, 6), (14, 12)), ((12, 12), (12, 12))]
)
def test_resize_gives_the_shorter_side(tmp_path, monkeypatch, size, resized):
    monkeypatch.chdir(tmp_path)
    pixels = write_png("a.png", *size)
    (feed,) = open_data(tmp_path, [nchw(12)], DataOptions(resize=12, crop=12))
    image = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR), np.float32) / 255
    left, top = (resized[0] - 12) // 2, (resized[1] - 12) // 2
    np.testing.assert_allclose(feed["x"][0].transpose(1, 2, 0), image[top : top + 12, left : left + 12], rtol=1e-6)


def test_images_of_other_modes_are_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = write_png("a.png", mode="RGBA")
    (feed,) = open_data(tmp_path, [nchw(12)])
    np.testing.assert_allclose(feed["x"][0].transpose(1, 2, 0), pixels[:, :, :3] / 255, rtol=1e-6)
    (feed,) = open_data(tmp_path, [nchw(12, channels=1)])
    assert feed["x"].shape == (1, 1, 12, 12)


def test_a_batch_of_images_is_read_in_name_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("c.png", "a.bmp", "b.PNG")):
        Image.fromarray(np.full((12, 12, 3), 50 * n, np.uint8)).save(name)
    found = [float(feed["x"].max()) for feed in open_data(tmp_path, [nchw(12)])]
    np.testing.assert_allclose(found, np.array([50, 100, 0]) / 255, rtol=1e-6)


def test_quantize_with_a_calibration_data_reader_of_a_fixed_batch():
    net = Net([4, 3, 12, 12])
    model = net.model(net.head(net.op("Relu", net.conv("x", 3, 8)), 8))

    class Batches:
        def __init__(self) -> None:
            self.left = [{"x": images(4)}, {"x": images(4) * 2}]

        def get_next(self):
            return self.left.pop() if self.left else None

    result = quantize(model, "int8", Batches(), workers=1)
    both = np.concatenate([images(4), images(4) * 2])
    assert float(result.plan["x"].scale) == pytest.approx((both.max() - both.min()) / 255, rel=1e-5)


def test_mobilenet_from_file_to_file(ready):
    write_model(mobilenet())
    assert ready("quantize", "model.onnx", "--data", "data.npz", "--set", "weights.bits=4").code == 0
    assert audit_model("model.int8.onnx").counts() == {"QLinearConv": 7, "QGemm": 1}


# ---- remarks on how data are read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "remark"), [([], "images were read as RGB/255"), (["--mean", "0.5", "--std", "0.25"], "")]
)
def test_remarks_on_images(ready, options, remark):
    Path("pictures").mkdir()
    for n in range(8):
        write_png(f"pictures/{n}.png", seed=n)
    ran = ready("quantize", "model.onnx", "--data", "pictures", *options)
    assert ran.code == 0 and (remark in ran.err if remark else not ran.err)


def test_image_options_beside_arrays_are_remarked(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--mean", "0.5")
    assert ran.code == 0 and "--mean apply to folders of images only" in ran.err


def test_weight_only_needs_no_data(ready):
    ran = ready(
        "quantize", "model.onnx", "--set", "activations.bits=32", "--set", "weights.bits=4", "--set", "weights.block=32"
    )
    assert ran.code == 0 and "bias-correct was skipped" in ran.err
