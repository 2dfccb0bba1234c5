"""Recipes as a pass of Olive, between its other passes. Needs: pip install olive-ai (which brings PyTorch)."""

from pathlib import Path

import numpy as np
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pass_config import PassConfigParam

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split


class OnnxqQuantization(Pass):
    """Quantize by a recipe. To name it in Olive's JSON workflows, list it in a package config of yours:
    {"passes": {"OnnxqQuantization": {"module_path": "your_module.OnnxqQuantization"}}}."""

    @classmethod
    def _default_config(cls, accelerator_spec):
        return {
            "recipe": PassConfigParam(type_=str, default_value="int8", description="a built-in recipe or a file"),
            "data": PassConfigParam(type_=str, required=True, description="sample inputs: .npz or a folder of images"),
        }

    def _run_for_config(self, model, config, output_model_path):
        path = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        onnxq.quantize(model.model_path, config.recipe, config.data, output=path)
        return ONNXModelHandler(model_path=path)


data = digits_split()
np.savez("samples.npz", image=data["calibration_images"])
step = create_pass_from_dict(OnnxqQuantization, {"recipe": "int8", "data": "samples.npz"}, disable_search=True)
quantized = step.run(ONNXModelHandler(model_path=str(digits_model_path())), "quantized")

outputs = runtimes.outputs(runtimes.session(quantized.model_path), [{"image": data["test_images"]}])[0]
print(f"{quantized.model_path}: accuracy {np.mean(outputs.argmax(1) == data['test_labels']):.4f}")
