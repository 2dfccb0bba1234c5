"""Real networks with labelled data from outside the repository: `pytest -m slow`, with ONNXQ_SHARED or ../shared."""

from __future__ import annotations

import numpy as np
import pytest

import onnxq_plugins as onnxq
from benchmarks.models import NAMES, load_case, shared_folder
from onnxq_plugins import measure, runtimes
from onnxq_plugins.runtimes.openvino import audit_openvino

pytestmark = pytest.mark.slow
# largest loss of top-1 in points, least SQNR in dB: onnxruntime's own tool reaches 16.4, 30.4 and 26.9 dB
BOUNDS = {"mobilenet_v1_0.75_224": (1.5, 20.0), "resnet20_cifar10": (0.5, 30.0), "kwt1_speechcommands12": (0.5, 35.0)}


def case_of(name):
    try:
        return load_case(name, shared_folder())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def logits(model, case):
    return runtimes.outputs(runtimes.session(model), [{case.input: x[None]} for x in case.test])[0]


@pytest.mark.parametrize("name", NAMES)
def test_int8_keeps_accuracy_and_runs_as_integer(name):
    case = case_of(name)
    result = onnxq.quantize(case.path, "int8", case.feeds(), verify=True)
    audit = onnxq.audit_model(result.model)
    assert all(layer.quantized for layer in audit.layers if layer.constant_weight)
    before, after = logits(case.path, case), logits(result.model, case)
    loss, least = BOUNDS[name]
    assert 100 * (np.mean(before.argmax(1) == case.labels) - np.mean(after.argmax(1) == case.labels)) <= loss
    assert measure.sqnr(before, after) >= least


@pytest.mark.parametrize("name", NAMES)
def test_int4_storage_keeps_accuracy_in_less_room_and_runs_as_integer(name):
    case = case_of(name)
    int8 = onnxq.quantize(case.path, "int8", case.feeds())
    result = onnxq.quantize(case.path, "int4-storage", case.feeds(), verify=True)
    assert result.report["kernels"] == int8.report["kernels"]
    assert result.model.ByteSize() <= 0.70 * int8.model.ByteSize()
    before, after = logits(case.path, case), logits(result.model, case)
    assert measure.sqnr(before, after) >= 15.0  # 4 bits per channel: 12.4, 24.4 and 32.3 dB
    found = [np.mean(after.argmax(1) == case.labels)]  # a few hundred images: one seed says little
    for seed in (1, 2, 3):
        other = onnxq.quantize(case.path, "int4-storage", case.feeds(), seed=seed).model
        found.append(np.mean(logits(other, case).argmax(1) == case.labels))
    assert 100 * (np.mean(before.argmax(1) == case.labels) - np.mean(found)) <= 2.0


@pytest.mark.parametrize("recipe", ["int4-storage", "sub-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_openvino_and_onnxruntime_agree_on_two_level_scales(name, recipe, tmp_path):
    ov = pytest.importorskip("openvino", reason="needs the extra openvino")
    case = case_of(name)
    path = tmp_path / "model.onnx"
    onnxq.quantize(case.path, recipe, case.feeds(), target="openvino", output=path)
    assert all(layer.quantized for layer in audit_openvino(path).layers if layer.constant_weight)
    runner = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    theirs = np.concatenate([runner([x[None]])[0] for x in case.test])
    assert measure.agreement(logits(path, case), theirs) >= 0.98


def test_folded_and_unfolded_batchnorm_give_the_same():
    case = case_of("mobilenet_v1_0.75_224")
    other = case.path.with_name("mobilenet_v1_0.75_224_bn.onnx")
    graphs = [onnxq.load(path) for path in (case.path, other)]
    assert len(graphs[1].batchnorms) == 27 and not graphs[0].batchnorms
    feed = [{case.input: case.test[:2]}]
    assert measure.drift(*(runtimes.outputs(runtimes.session(g.model()), feed) for g in graphs)) < 1e-4


@pytest.mark.parametrize("kind", ["permute", "rescale"])
@pytest.mark.parametrize("name", NAMES)
def test_channel_groups_keep_the_function(name, kind):
    case = case_of(name)
    graph, rng = onnxq.load(case.path), np.random.default_rng(0)
    feed = [{case.input: case.test[:2]}]
    before = runtimes.outputs(runtimes.session(graph.model()), feed)
    for group in onnxq.channel_groups(graph, kind):
        if kind == "permute":
            onnxq.permute(graph, group, rng.permutation(group.size))
        else:
            onnxq.rescale(graph, group, np.exp(rng.uniform(-1, 1, group.size)))
    assert measure.drift(before, runtimes.outputs(runtimes.session(graph.model()), feed)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_one_scale_per_tensor_keeps_accuracy(name):
    case = case_of(name)
    result = onnxq.quantize(case.path, "int8-per-tensor", case.feeds(), verify=True)
    before, after = logits(case.path, case), logits(result.model, case)
    assert 100 * (np.mean(before.argmax(1) == case.labels) - np.mean(after.argmax(1) == case.labels)) <= 1.5
    assert measure.sqnr(before, after) >= 20.0  # MobileNetV1 without equalization and shifts: -1.8 dB


@pytest.mark.parametrize("name", [*NAMES, "mobilenet_v1_0.75_224_bn"])
def test_calibration_without_data_keeps_accuracy(name):
    case = case_of(name)
    scales = {
        "mob": ["data.mean=0.5", "data.std=0.5"],
        "res": ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"],
        "kwt": ["data-free.inputs={mfcc=[-350,26]}"],
    }
    real = logits(onnxq.quantize(case.path, "int8", case.feeds()).model, case)
    result = onnxq.quantize(case.path, "int8-data-free", settings=scales[name[:3]], verify=True)
    made = logits(result.model, case)
    assert 100 * (np.mean(real.argmax(1) == case.labels) - np.mean(made.argmax(1) == case.labels)) <= 1.5
    assert result.report["kernels"] == onnxq.quantize(case.path, "int8", case.feeds()).report["kernels"]


def test_shifts_run_as_int8_in_openvino(tmp_path):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    case = case_of("mobilenet_v1_0.75_224")
    onnxq.quantize(case.path, "int8-per-tensor", case.feeds(), output=tmp_path / "model.onnx")
    assert all(layer.quantized for layer in audit_openvino(tmp_path / "model.onnx").layers)
