"""A plan as overrides for onnxruntime's own tool."""

from __future__ import annotations

import functools
import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from onnxq_plugins import (
    OnnxqError,
    load,
    ort_arguments,
    ort_model,
    ort_overrides,
    quantize,
    runtimes,
)
from onnxq_plugins.measure import drift
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.spec import decode
from tests.zoo import ZOO, Net, feeds, mlp, mobilenet, rows, slowly, transformer


def recipe_of(target: str = "ort-cpu", front=(), behind=(), **parameters) -> dict:
    step = {"use": "mixed-precision", "method": "nearest", "curve": 3, **parameters}
    return {"target": target, "pass": [*front, step, *behind]}


@functools.cache
def case(number: int):
    """The model of a case and what its search gives."""
    name, settings = CASES[number]
    model = ZOO[name]()
    return model, searched(model, 6, **settings)


def searched(model, n: int = 6, recipe=None, **parameters):
    return quantize(model, recipe or recipe_of(**parameters), feeds(model, n), workers=1)


@pytest.fixture
def onnxq(onnxq):
    """`onnxq quantize` in a folder with a model and data."""
    onnx.save(mlp(), "model.onnx")
    np.savez("data.npz", x=rows(mlp(), 8))
    Path("search.json").write_text(json.dumps(recipe_of()))
    return partial(onnxq, "quantize", "model.onnx", "--data", "data.npz")


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


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, *slowly(0, 5, 6)])
def test_the_tool_gives_tensors_the_types_scales_and_codes_of_the_plan(number, tmp_path):
    model, result = case(number)
    told = ort_overrides(result)
    made = by_tool(result, feeds(model, 6), tmp_path / "made.onnx")
    values, graph = constants(made), load(result.float_model)
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    stored = {y.weight for y in result.graph.layers if y.op == "ConvTranspose"}  # the tool leaves them float
    layers = {y.weight: y for y in result.graph.layers if y.weight in result.plan and y.weight not in stored}
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
    planned = [t for t in result.plan if t not in layers and t not in stored]
    shared = {n.outputs[0].name for n in graph.nodes if n.op == "AveragePool"}
    assert seen >= len([t for t in planned if t not in shared]) > 0


@pytest.mark.parametrize("number", [1, 2, 3, 7, *slowly(0, 5, 6)])
def test_the_tool_is_as_accurate_as_our_own_export(number, tmp_path):
    model, result = case(number)
    made, samples = by_tool(result, feeds(model, 6), tmp_path / "made.onnx"), feeds(model, 12, seed=1)
    reference = runtimes.outputs(runtimes.session(model), samples)
    ours, tools = (
        worst_sqnr(reference, runtimes.outputs(runtimes.session(m, optimize=False), samples)) for m in (result.model, made)
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
    ours, tools = (worst_sqnr(reference, runtimes.outputs(runtimes.session(m), samples)) for m in (result.model, made))
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
    assert worst_sqnr(a, b) > 35
