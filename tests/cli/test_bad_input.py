"""Bad input: one clear sentence for each problem, exit code 2 and no file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from onnxq_plugins import plugins, quantize
from tests.cli.folder import external, half, images, listing, write_data, write_model
from tests.data.pictures import write_png
from tests.zoo import Net, cnn, mlp

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
bad_data("wrong_size", "wants shape [N, 3, 12, 12]", "has [1, 3, 8, 8]", x=images(side=8))
bad_data("wrong_layout", "wants shape [N, 3, 12, 12]", "has [1, 12, 12, 3]", x=images().transpose(0, 2, 3, 1))
bad_data("wrong_rank", "wants shape", x=images().reshape(4, -1))
bad_data("uint8", "wants float32, the data is uint8", "normalize", x=images().astype(np.uint8))
bad_data("strings", "wants float32", x=np.array(["a", "b"]))
bad_data("no_samples", "is empty", x=images()[:0])
bad_data("scalar", "wants shape [N, 3, 12, 12], the data has []", x=np.float32(1))


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


@bad("has no image", ".png")
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


bad_images("image_size", "wants shape [N, 3, 12, 12]", "--resize", size=(20, 16))
bad_images("image_layout", "layout 'chwn' is unknown", "nchw", options=("--layout", "chwn"))
bad_images("image_mean", "--mean has 2 values", options=("--mean", "0.5,0.5"))
bad_images("image_mean_text", "mean", "a list of numbers", options=("--mean", "a,b"))
bad_images("image_std", "--std has a zero", options=("--std", "1,0,1"))
bad_images("image_crop", "pictures/a.png", "crop", "12", options=("--crop", "12"), size=(10, 20))
bad_images("image_crop_negative", "crop", "-12", options=("--crop", "-12"))
bad_images("image_size_text", "--size '12by9'", "such as 320x240", options=("--size", "12by9"))
bad_images("image_size_and_crop", "leave resize and crop out", options=("--size", "12x12", "--crop", "9"))
bad_images("image_range", "range = 128", "1 or 255", options=("--range", "128"))
bad_images("image_range_mean", "are of RGB in 0..1", "give --mean 123.7", options=("--range", "255", "--mean", "0.485"))
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
bad_callable("none", "return None", "NoneType", "is not supported")
bad_callable("empty", "return iter(())", "has no sample")
bad_callable("list", "return [[1, 2]]", "wants float32, the data is int64")
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


@bad("'Swish' of domain 'vendor'", "--custom-ops")
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


@bad("NaN or Inf", "its weight")
def nan_in_a_weight():
    model = cnn()
    name = next(n for n in model.graph.node if n.name == "conv3").input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    write_model(model)
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


@bad("cannot run Conv 'conv0', 'conv3' and Gemm 'gemm7' with int8 block [1, 32] weights")
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
    assert len(ran.err.splitlines()) == 1, ran.err
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
