"""Moments of normally distributed activations after a clip or another function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq_plugins.spec import Array


def clipped_moments(mean: Array, variance: Array, low: Array | float, high: Array | float) -> tuple[Array, Array]:
    """Mean and variance [C] of min(max(z, low), high) for normal z of the given mean and variance [C]; bounds scalar or [C].

    ReLU: low = 0, high = inf. A variance of 0 is allowed. Source: the rectified and the censored normal distribution, as in
    Data-Free Quantization (arXiv 1906.04721), appendix C.
    """
    from scipy.special import ndtr

    deviation = np.sqrt(np.maximum(variance, 1e-16))
    a, b = ((np.asarray(end) - mean) / deviation for end in (low, high))
    below, above = ndtr(a), ndtr(-b)
    inside = 1 - below - above
    density_a, density_b = (np.exp(-np.minimum(edge**2, 1e4) / 2) / np.sqrt(2 * np.pi) for edge in (a, b))
    lower, upper = (np.where(np.isfinite(end), end, 0.0) for end in (low, high))
    first = lower * below + upper * above + mean * inside + deviation * (density_a - density_b)
    a, b = np.clip(a, -1e2, 1e2), np.clip(b, -1e2, 1e2)
    square = (mean**2 + deviation**2) * inside + 2 * mean * deviation * (density_a - density_b)
    square += deviation**2 * (a * density_a - b * density_b) + lower**2 * below + upper**2 * above
    return first, np.maximum(square - first**2, 0.0)


def mapped_moments(
    mean: Array, variance: Array, function: Callable[[Array], Array], points: int = 32
) -> tuple[Array, Array]:
    """Mean and variance [C] of function(z) for normal z of the given mean and variance [C], by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    values = function(mean + np.sqrt(variance) * nodes[:, None])
    weights = weights / weights.sum()
    first = weights @ values
    return first, np.maximum(weights @ (values - first) ** 2, 0.0)
