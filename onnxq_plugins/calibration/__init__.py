"""Statistics of activations: of samples, of folded BatchNormalizations, of synthetic samples."""

from onnxq_plugins.calibration.statistics import Calibration
from onnxq_plugins.calibration.values import Gram, Histogram, InputRounding, Moments, NotFinite
from onnxq_plugins.graph import channel_axis, channels
from onnxq_plugins.parallel import Track, silent

__all__ = [
    "Calibration",
    "Gram",
    "Histogram",
    "InputRounding",
    "Moments",
    "NotFinite",
    "Track",
    "channel_axis",
    "channels",
    "silent",
]
