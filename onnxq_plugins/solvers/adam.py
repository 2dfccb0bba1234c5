"""Adam, for the solvers that follow gradients."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.spec import Array


class Adam:
    """Adam's step for one float32 array, with its usual constants. Source: Kingma and Ba (arXiv 1412.6980)."""

    def __init__(self, shape: tuple[int, ...], rate: float) -> None:
        self.rate, self.count = rate, 0
        self.mean, self.square = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def move(self, slope: Array, fade: float = 1.0) -> Array:
        """The step to subtract for a gradient, at the rate times `fade`."""
        self.count += 1
        self.mean += np.float32(0.1) * (slope - self.mean)
        self.square += np.float32(0.001) * (slope * slope - self.square)
        first, second = 1 - 0.9**self.count, 1 - 0.999**self.count
        size: Array = np.float32(self.rate * fade / first) * self.mean
        size /= np.sqrt(self.square / np.float32(second)) + np.float32(1e-8)
        return size
