"""Statistics of activations: of samples, of BatchNormalizations, of samples that are made up."""

from onnxq_plugins.calibration.statistics import (
    Calibration,
    Gram,
    Histogram,
    Moments,
    channel_axis,
    channels,
)

__all__ = ["Calibration", "Gram", "Histogram", "Moments", "Track", "channel_axis", "channels", "silent"]
