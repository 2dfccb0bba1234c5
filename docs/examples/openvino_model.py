"""A script for NNCF with one changed import. Needs: pip install 'onnxq-plugins[openvino]' nncf."""

import numpy as np
import openvino
from nncf import Dataset

from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.openvino import quantize  # was: from nncf import quantize

data = digits_split()
dataset = Dataset(data["calibration_images"], lambda image: {"image": image[None]})
model = quantize(digits_model_path(), dataset, subset_size=64)  # NNCF takes core.read_model(...) in its place
print(model.summary)
openvino.save_model(model, "digits.int8.xml")

float_model = openvino.Core().read_model(digits_model_path())
for name, network in (("float", float_model), ("int8", model)):
    outputs = openvino.compile_model(network, "CPU")({"image": data["test_images"]})[0]
    print(f"{name}: accuracy {np.mean(outputs.argmax(1) == data['test_labels']):.4f}")
