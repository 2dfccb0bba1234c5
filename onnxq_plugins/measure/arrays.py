"""How far two arrays are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq_plugins.spec import Array

IDENTICAL = 200.0  # dB that stand for equality: larger ratios are cut to it


def sqnr(reference: Array, other: Array) -> float:
    """Signal to quantization noise in dB: 10 log10(sum y^2 / sum (y - z)^2) per sample (first axis), averaged.

    Samples whose signal is zero are left out; each sample has at most `IDENTICAL` dB.
    """
    y = np.asarray(reference, np.float64).reshape(len(reference), -1)
    noise = np.sum((y - np.asarray(other, np.float64).reshape(y.shape)) ** 2, axis=1)
    signal = np.sum(y**2, axis=1)
    kept = signal > 0
    if not kept.any():
        return IDENTICAL
    ratio = signal[kept] / np.maximum(noise[kept], signal[kept] * 10 ** (-IDENTICAL / 10))
    return float(np.mean(10 * np.log10(ratio)))


def agreement(reference: Array, other: Array) -> float:
    """Share of samples (0..1) whose largest value over the last axis is at the same index."""
    return float(np.mean(np.argmax(reference, axis=-1) == np.argmax(other, axis=-1)))


def drift(reference: Sequence[Array], other: Sequence[Array]) -> float:
    """Largest difference over all outputs, relative to each output's largest magnitude; infinite if one is not finite."""
    drifts = [
        float(np.max(np.abs(a - b), initial=0.0) / max(float(np.max(np.abs(a), initial=0.0)), 1e-30))
        for a, b in zip(reference, other, strict=True)
    ]
    return max(drifts, default=0.0) if np.isfinite(drifts).all() else float("inf")
