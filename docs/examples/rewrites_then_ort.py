"""Only the float rewrites: equalize the channels of a model, then quantize it with onnxruntime's own tool as before."""

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import onnxq_plugins as onnxq
from onnxq_plugins import measure, runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split


class Reader(CalibrationDataReader):
    """What your pipeline has already."""

    def __init__(self, images):
        self.feeds = iter([{"image": image[None]} for image in images])

    def get_next(self):
        return next(self.feeds, None)


def by_onnxruntime(model, path, images):
    """Your pipeline: one scale per weight tensor."""
    quantize_static(
        model, path, Reader(images), per_channel=False, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )
    return onnx.load(path)


data = digits_split()
images, test = data["calibration_images"], {"image": data["test_images"]}
original = onnx.load(digits_model_path())

# equalize rewrites weights so that one scale fits all channels; the float function stays the same
rewritten = onnxq.quantize(original, {"pass": [{"use": "equalize"}]}, images).float_model

reference = runtimes.outputs(runtimes.session(original), [test])[0]
after = runtimes.outputs(runtimes.session(rewritten), [test])[0]
print(f"the rewritten float model differs by {measure.drift([reference], [after]):.0e}")
for name, model in (("plain", original), ("equalized", rewritten)):
    quantized = by_onnxruntime(model, f"{name}.onnx", images)
    outputs = runtimes.outputs(runtimes.session(quantized), [test])[0]
    print(f"{name}: SQNR {measure.sqnr(reference, outputs):.1f} dB")
