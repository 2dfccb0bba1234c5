"""A script for onnxruntime's quantize_static, its import changed: calibrate on images, quantize, compare."""

import time

import numpy as np
import onnxruntime

from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.ort import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static


class DigitsReader(CalibrationDataReader):
    """Images one by one, under the name of the model's input."""

    def __init__(self, images, model_path):
        session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
        self.name = session.get_inputs()[0].name
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {self.name: image[None]}


def evaluate(model_path, images, labels):
    """Accuracy, logits, and milliseconds of a run."""
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = session.run(None, {name: images})[0]
    start = time.perf_counter()
    for _ in range(20):
        session.run(None, {name: images[:1]})
    return np.mean(logits.argmax(1) == labels), logits, 1000 * (time.perf_counter() - start) / 20


data = digits_split()
quant_pre_process(digits_model_path(), "digits.prepared.onnx", skip_symbolic_shape=True)
quantize_static(
    "digits.prepared.onnx",
    "digits.quantized.onnx",
    DigitsReader(data["calibration_images"], "digits.prepared.onnx"),
    quant_format=QuantFormat.QDQ,
    per_channel=True,
    activation_type=QuantType.QUInt8,
    weight_type=QuantType.QInt8,
)

reference = None
for path in ("digits.prepared.onnx", "digits.quantized.onnx"):
    accuracy, logits, milliseconds = evaluate(path, data["test_images"], data["test_labels"])
    reference = logits if reference is None else reference
    noise = np.mean((logits - reference) ** 2)
    sqnr = 10 * np.log10(np.mean(reference**2) / noise) if noise else np.inf
    print(f"{path}: accuracy {accuracy:.4f}, SQNR {sqnr:.1f} dB, {milliseconds:.2f} ms")
