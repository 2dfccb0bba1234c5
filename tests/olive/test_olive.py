"""The pass of Olive, where Olive is installed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxq_plugins.cli.digits import digits_model_path, digits_split

pytest.importorskip("olive", reason="needs the extra olive", exc_type=ImportError)

from olive.exception import OlivePassError
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes.olive_pass import create_pass_from_dict

import onnxq_plugins as onnxq
from onnxq_plugins.olive import OnnxqQuantization, package_config

SCRIPT = """
from olive.data.registry import Registry
from onnxq_plugins.cli.digits import digits_split

@Registry.register_dataset()
def few_digits():
    split = digits_split()
    return [({"image": x}, int(y)) for x, y in zip(split["train_images"][:24], split["train_labels"][:24])]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(**config):
    """What the pass makes of the digits model."""
    step = create_pass_from_dict(OnnxqQuantization, config, disable_search=True)
    return step.run(ONNXModelHandler(model_path=str(digits_model_path())), "made")


def test_the_list_has_all_passes_of_olive_and_ours(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["olive", "passes.json"])
    runpy.run_module("onnxq_plugins.olive", run_name="__main__")
    written = OlivePackageConfig.parse_file_or_obj("passes.json")
    own = OlivePackageConfig.load_default_config()
    assert {"onnxqquantization", *own.passes} == set(written.passes) and written.import_pass_module("OnnxqQuantization")
    assert written.extra_dependencies == own.extra_dependencies
    Path("mine.json").write_text(json.dumps({"passes": {"Mine": {"module_path": "a.B"}}}))
    assert set(package_config("mine.json")["passes"]) == {"Mine", "OnnxqQuantization"}


def test_samples_may_be_a_file_or_those_of_olive():
    np.savez("samples.npz", image=digits_split()["calibration_images"])
    Path("script.py").write_text(SCRIPT)
    data_config = {"name": "d", "user_script": "script.py", "load_dataset_config": {"type": "few_digits"}}
    for config in ({"data": "samples.npz"}, {"data_config": {**data_config, "dataloader_config": {"batch_size": 8}}}):
        model = made(recipe="int8", **config)
        assert "17/17 Conv as QLinearConv" in onnxq.audit(model.model_path).summary


def test_parameters_reach_the_recipe():
    np.savez("samples.npz", image=digits_split()["calibration_images"][:8])
    first = onnxq.load(digits_model_path()).layers[0].name
    model = made(data="samples.npz", target="openvino", settings={"weights.bits": 5}, exclude=[first], samples=4)
    layers = {layer.name: layer for layer in onnxq.audit(model.model_path).layers}
    assert not layers[first].quantized and sum(layer.quantized for layer in layers.values()) > 5


@pytest.mark.parametrize("config", [{"recipe": "nope"}, {"recipe": "int8"}, {"target": "gpu"}, {"min_sqnr": 300.0}])
def test_what_cannot_be_had_fails_the_point_of_a_search(config):
    np.savez("samples.npz", image=digits_split()["calibration_images"][:8])
    with pytest.raises(OlivePassError, match=r"\w+ .*\w"):
        made(**{"data": "" if config == {"recipe": "int8"} else "samples.npz", **config})
    assert not list(Path().glob("made/**/*.onnx"))


@pytest.mark.parametrize(("provider", "target"), [("CPU", ""), ("OpenVINO", "openvino"), ("QNN", "npu")])
def test_the_target_is_that_of_the_execution_provider(provider, target):
    spec = AcceleratorSpec("cpu", f"{provider}ExecutionProvider")
    assert OnnxqQuantization.default_config(spec)["target"].default_value == target
    _, fixed, searched = OnnxqQuantization.get_config_params(spec, {"recipe": ["int8", "mixed"], "data": "x.npz"})
    assert searched["recipe"].support == ["int8", "mixed"] and fixed["data"] == "x.npz"
