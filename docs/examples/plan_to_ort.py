"""A plan made here, carried out by onnxruntime's own quantize_static: widths, scales and codes as TensorQuantOverrides."""

import onnx
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import onnxq_plugins as onnxq
from onnxq_plugins import measure, runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split


class Reader(CalibrationDataReader):
    def __init__(self, images):
        self.feeds = iter([{"image": image[None]} for image in images])

    def get_next(self):
        return next(self.feeds, None)


data = digits_split()
images, test = data["calibration_images"], {"image": data["test_images"]}
result = onnxq.quantize(digits_model_path(), "int8-rounded", images)

# give the tool ort_model(result), not the original: it holds the values that the codes stand for, and corrected biases
quantize_static(onnxq.ort_model(result), "tool.onnx", Reader(images), **onnxq.ort_arguments(result))

reference = runtimes.outputs(runtimes.session(digits_model_path()), [test])[0]
for name, model in (("ours", result.model), ("quantize_static", onnx.load("tool.onnx"))):
    print(f"{name}: SQNR {measure.sqnr(reference, runtimes.outputs(runtimes.session(model), [test])[0]):.1f} dB")
