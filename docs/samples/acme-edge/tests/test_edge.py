"""What the target declares is what its files have; and what the plugin does beside that."""

import hashlib
import json

import onnx
import pytest
from onnxq_plugins import OnnxqError, audit, quantize
from onnxq_plugins.testing import parametrize_plugin, parametrize_target
from onnxq_plugins.testing.models import cnn, feeds, mlp

import acme_edge
from acme_edge import EDGE

RECIPE = {"target": "acme.edge", "pass": [{"use": "ranges"}]}


@parametrize_target(EDGE, plugins=[acme_edge])
def test_conformance(check):
    check()


@parametrize_plugin(acme_edge, recipe=RECIPE)
def test_the_plugin(check):
    check()


@pytest.mark.parametrize("build", [cnn, mlp])
def test_files_are_what_the_compiler_takes(build):
    model = quantize(build(), "int8", feeds(build(), 4), target="acme.edge").model
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    coders = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zeros = [constants[node.input[2]] for node in coders]
    assert zeros and all(zero.dtype == "int8" and zero == 0 for zero in zeros)
    assert model.opset_import[0].version == 13
    assert not any(node.op_type == "Gemm" for node in model.graph.node)
    decoded = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    biases = [name for name in decoded if name in constants and constants[name].dtype == "int32"]
    assert len(biases) == sum(node.op_type == "Conv" for node in model.graph.node)
    assert any(entry.key == "acme.format" for entry in model.metadata_props)


def test_the_sidecar_tells_digest_settings_scales_and_passes(tmp_path):
    path = tmp_path / "model.onnx"
    recipe = {**RECIPE, "target": {"use": "acme.edge", "acme": {"soc": 3}}}
    quantize(cnn(), recipe, feeds(cnn(), 4), output=path)
    sidecar = json.loads((tmp_path / "model.acme.json").read_text())
    assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (sidecar["soc"], sidecar["cores"]) == (3, 1)
    assert "x" in sidecar["scales"] and all(scale > 0 for scale in sidecar["scales"].values())
    assert [name for name, _ in sidecar["passes"]] == ["ranges"]


def test_other_targets_get_no_sidecar(tmp_path):
    recipe = {**RECIPE, "target": "ort-cpu"}
    quantize(cnn(), recipe, feeds(cnn(), 4), output=tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_what_the_npu_cannot_run_is_refused():
    with pytest.raises(OnnxqError, match=r"acme\.edge.*4.*8-bit weights"):
        quantize(mlp(), {**RECIPE, "weights": {"bits": 4}}, feeds(mlp(), 4))


def test_its_files_run_in_its_simulator(tmp_path):
    onnx.save(cnn(), tmp_path / "float.onnx")
    quantize(
        cnn(),
        "int8",
        feeds(cnn(), 4),
        target="acme.edge",
        output=tmp_path / "model.acme",
        check=False,
    )
    told = audit(
        tmp_path / "model.acme", tmp_path / "float.onnx", runtime=EDGE.runtime, data=feeds(cnn(), 2)
    )
    assert told.proof.decibels > 20 and told.proof.inspection.counts()["integer"] == 4
    (tmp_path / "other.acme").write_bytes(b"something")
    with pytest.raises(OnnxqError, match="no file of the Acme NPU"):
        audit(tmp_path / "other.acme", runtime=EDGE.runtime)
