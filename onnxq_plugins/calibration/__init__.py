"""Statistics of activations: of samples, of folded BatchNormalizations, of synthetic samples."""

from onnxq_plugins.calibration.statistics import Calibration, Gram, Histogram, Moments, Track, silent
from onnxq_plugins.graph import channel_axis, channels

__all__ = ["Calibration", "Gram", "Histogram", "Moments", "Track", "channel_axis", "channels", "silent"]
