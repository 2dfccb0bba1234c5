"""A QDQ model in OpenVINO, and its accuracy there. Needs: pip install 'onnxq-plugins[openvino]'."""

import numpy as np
import openvino

import onnxq_plugins as onnxq
from onnxq_plugins import measure, runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split

data = digits_split()
result = onnxq.quantize(
    digits_model_path(), "int8", data["calibration_images"], target="openvino", output="digits.int8.onnx"
)

compiled = openvino.Core().compile_model("digits.int8.onnx", "CPU")
there = compiled({"image": data["test_images"]})[0]
here = runtimes.outputs(runtimes.session(result.model), [{"image": data["test_images"]}])[0]
for name, outputs in (("OpenVINO", there), ("onnxruntime", here)):
    print(f"{name}: accuracy {np.mean(outputs.argmax(1) == data['test_labels']):.4f}")
print(f"same argmax: {measure.agreement(here, there):.4f}")
