"""What statistics return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array


@dataclass(frozen=True, eq=False)
class Moments:
    """Per channel: mean [C] and mean of squares [C] over samples and positions."""

    mean: Array
    square: Array


@dataclass(frozen=True, eq=False)
class Histogram:
    """counts [bins] between the exact extremes low and high of a tensor. Counted on an even subsample of at most
    16384 values per sample, so that a shifted grid is scored on what the tensor looks like, at any size."""

    counts: Array
    low: float
    high: float

    @property
    def centers(self) -> Array:
        """Middle of each bin [bins]."""
        width = (self.high - self.low) / len(self.counts)
        return self.low + (np.arange(len(self.counts)) + 0.5) * width


class NotFinite(OnnxqError):
    """Activations are NaN or infinite on the data: the float model's own, such as a mask of -inf."""

    def __init__(self, names: Sequence[str]) -> None:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        super().__init__(
            f"activation '{names[0]}'{more} is not finite (NaN or Inf) on the given data: the float model itself overflows, "
            "so check its weights and the data's normalization."
        )
        self.names = tuple(names)


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moments of a layer's input patches x over `count` of them, float64: h = E[x x^T] [groups, D, D] and mean
    E[x] [groups, D], with D = inputs per group * kernel taps. A layer with D above `limit` (see `Calibration.grams`) counts
    as several groups of equal width, the last one padded with zeros: the blocks on the diagonal of h."""

    h: Array
    mean: Array
    count: int


@dataclass(frozen=True, eq=False)
class InputRounding:
    """Sums of squares over rows of a layer's input: of each input [K], of the outputs without a bias, and of the errors that
    rounded inputs cause in these."""

    power: Array
    signal: float
    noise: float
