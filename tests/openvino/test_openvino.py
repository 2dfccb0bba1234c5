"""`onnxq_plugins.openvino`, where OpenVINO is installed: quantized there, judged there."""

from __future__ import annotations

import enum
import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, OnnxqWarning
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.runtimes.openvino import _judged
from tests.zoo import Net, feeds, mlp

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")

from onnxq_plugins.openvino import QuantizedModel, quantize  # noqa: E402


class Dataset:
    """What nncf.Dataset is for those who read it."""

    def __init__(self, items, transform=lambda item: item):
        self.items, self.transform = items, transform

    def get_inference_data(self, indices=None):
        return (self.transform(self.items[n]) for n in (range(len(self.items)) if indices is None else indices))


def scope(**lists):
    return SimpleNamespace(**{"names": [], "patterns": [], "types": [], "subgraphs": [], "validate": True, **lists})


@pytest.fixture(scope="module")
def digits():
    split = digits_split()
    return [(x[None], y) for x, y in zip(split["train_images"][:64], split["train_labels"][:64], strict=True)]


def test_a_model_of_openvino_that_is_judged_there(digits, tmp_path):
    """All layers run in integers, the outputs are near, and what OpenVINO saves runs the same and tells it."""
    model = quantize(digits_model_path(), Dataset(digits, lambda item: {"image": item[0]}))
    assert isinstance(model, openvino.Model) and isinstance(model, QuantizedModel)
    assert all(layer.quantized for layer in model.audit.layers) and model.sqnr > 20
    assert "17/17 Conv as Convolution u8" in model.summary and "dB in OpenVINO" in model.summary
    openvino.save_model(model, tmp_path / "q.xml", compress_to_fp16=False)
    saved = openvino.Core().read_model(tmp_path / "q.xml")
    assert saved.get_rt_info(["onnxq", "summary"]).astype(str) == model.summary
    test = digits_split()
    runs = [openvino.compile_model(m, "CPU")({"image": test["test_images"]})[0] for m in (model, saved)]
    assert np.array_equal(runs[0].argmax(1), runs[1].argmax(1))
    assert np.mean(runs[0].argmax(1) == test["test_labels"]) > 0.97


@pytest.mark.parametrize("form", [str, Path, lambda path: Path(path).read_bytes(), onnx.load])
def test_forms_of_models_and_samples(form, digits):
    model = quantize(form(str(digits_model_path())), [{"image": x} for x, _ in digits[:8]], subset_size=4)
    assert model.result.data.size == 4 and model.sqnr > 15


def test_a_real_dataset_of_nncf(digits):
    nncf = pytest.importorskip("nncf", reason="needs nncf")
    first = onnx.load(digits_model_path()).graph.node[0]
    left = nncf.IgnoredScope(names=[first.name], types=["MatMul"])
    data = nncf.Dataset(digits, lambda item: item[0])
    model = quantize(digits_model_path(), data, preset=nncf.QuantizationPreset.MIXED, ignored_scope=left, subset_size=16)
    floats = {layer.name for layer in model.audit.layers if not layer.quantized}
    assert first.name in floats and len(floats) == 2
    own = inspect.signature(nncf.quantize).parameters
    ours = inspect.signature(quantize).parameters
    assert list(own)[1:] == list(ours)[1 : len(own)] and all(own[n].default == ours[n].default for n in list(own)[2:][:1])


def test_an_ignored_scope_is_looked_up(digits):
    data = [{"image": x} for x, _ in digits[:8]]
    nodes = [n for n in onnx.load(digits_model_path()).graph.node if n.op_type == "Conv"]
    model = quantize(
        digits_model_path(), data, ignored_scope=scope(patterns=[f"{nodes[1].name}$"], names=[nodes[2].output[0]])
    )
    assert {layer.name for layer in model.audit.layers if not layer.quantized} == {nodes[1].name, nodes[2].name}
    for wrong in (scope(names=["nope"]), scope(patterns=["nope"]), scope(types=["LSTMSequence"]), scope(subgraphs=[1])):
        with pytest.raises(OnnxqError, match="ignored_scope: ") as caught:
            quantize(digits_model_path(), data, ignored_scope=wrong)
        assert len(caught.value.problems) == 1
    assert quantize(digits_model_path(), data, ignored_scope=scope(names=["nope"], validate=False)).sqnr > 15


def test_what_cannot_be_had_is_refused(digits, tmp_path):
    """One sentence for each argument, and for models that hold no ONNX."""
    data = [{"image": x} for x, _ in digits[:8]]
    device = enum.Enum("TargetDevice", {"NPU": "NPU"})
    arguments = {
        "mode": "fp8_e4m3",
        "preset": "performance",
        "target_device": device.NPU,
        "fast_bias_correction": False,
        "advanced_parameters": object(),
    }
    with pytest.raises(OnnxqError) as caught:
        quantize(digits_model_path(), data, **arguments)
    assert [text.split(" ")[0] for text in caught.value.problems] == list(arguments)
    core = openvino.Core()
    model = core.read_model(digits_model_path())
    openvino.save_model(model, tmp_path / "m.xml")
    for given in (model, core.compile_model(model, "CPU"), tmp_path / "m.xml", str(tmp_path / "m.xml")):
        with pytest.raises(OnnxqError, match="holds no ONNX, and OpenVINO writes none") as caught:
            quantize(given, data)
        assert len(caught.value.problems) == 1


def test_a_poor_result_is_a_warning():
    model = mlp()
    with pytest.warns(OnnxqWarning, match="dB in OpenVINO; next: min_sqnr"):
        poor = {"target": "openvino", "weights": {"bits": 2}, "pass": [{"use": "ranges"}]}
        assert quantize(model, feeds(model, 8), recipe=poor).sqnr < 15


@pytest.mark.parametrize(("recipe", "bits"), [("int4-weight-only", 4), ("int8-storage", 8)])
def test_weight_only_recipes_compress_weights_there(recipe, bits):
    """The file is smaller, OpenVINO keeps the weights narrow, and nothing claims to run in integers."""
    net = Net(["N", 128])
    x = "x"
    for _ in range(2):
        x = net.op("Relu", net.linear(x, 128, 128))
    float_model = net.model(x)
    model = quantize(float_model, feeds(float_model, 16), recipe=recipe)
    assert {layer.kernel for layer in model.audit.layers} == {f"FullyConnected i{bits}"}
    assert not any(layer.quantized for layer in model.audit.layers)
    assert all(f"keeps in {bits} bits" in layer.why for layer in model.audit.layers) and model.sqnr > 15
    assert model.result.model.ByteSize() < float_model.ByteSize() * (bits + 2) / 32


def test_a_kernel_that_multiplies_floats_is_float_whatever_its_weights_are():
    assert _judged("u8", "brgconv_avx512_amx_I8") == (True, None) and _judged("i8", "")[0]
    for precision, primitive in (("i8", "brgemm_avx512_f32"), ("i4", "x"), ("f32", "jit_f32"), ("", "")):
        assert not _judged(precision, primitive)[0] and _judged(precision, primitive)[1]
