"""The CalibrationDataReader of an onnxruntime pipeline, as it is."""

from onnxruntime.quantization import CalibrationDataReader

import onnxq_plugins as onnxq
from onnxq_plugins.cli.digits import digits_model_path, digits_split


class Reader(CalibrationDataReader):
    """Feeds one by one; with `rewind` they are read anew for each pass over them, without it they are kept in memory."""

    def __init__(self, images):
        self.images = images
        self.rewind()

    def rewind(self):
        self.feeds = iter([{"image": image[None]} for image in self.images])

    def get_next(self):
        return next(self.feeds, None)


result = onnxq.quantize(digits_model_path(), "int8", Reader(digits_split()["calibration_images"]))
print(result.summary)
result.save("digits.int8.onnx")
