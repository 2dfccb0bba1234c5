"""What the target declares is what its files have; and what the plugin does beside that."""

import hashlib
import json

import pytest
from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.testing import parametrize_target
from onnxq_plugins.testing.models import cnn, feeds, mlp

from acme_edge import EDGE

RECIPE = {"target": "acme.edge", "pass": [{"use": "ranges"}]}


@parametrize_target(EDGE)
def test_conformance(check):
    check()


def test_the_log_tells_the_digest_and_the_passes(tmp_path):
    path = tmp_path / "model.onnx"
    quantize(cnn(), RECIPE, feeds(cnn(), 4), output=path)
    log = json.loads((tmp_path / "model.acme.json").read_text())
    assert log["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [name for name, _ in log["passes"]] == ["ranges"]


def test_other_targets_get_no_log(tmp_path):
    recipe = {**RECIPE, "target": "ort-cpu"}
    quantize(cnn(), recipe, feeds(cnn(), 4), output=tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_what_the_npu_cannot_run_is_refused():
    with pytest.raises(OnnxqError, match=r"acme\.edge.*4.*8-bit weights"):
        quantize(mlp(), {**RECIPE, "weights": {"bits": 4}}, feeds(mlp(), 4))
