"""Ranges of activations from histograms.

Each function takes counts [bins] over the interval [low, high] and returns the interval that is kept. A narrower range clips
rare large values and has finer steps for all others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq_plugins.spec import Array


def percentile_range(counts: Array, low: float, high: float, percent: float) -> tuple[float, float]:
    """Leave out (100 - percent) / 2 percent of the values at each end, or all of it at one end if the tensor does not cross
    0."""
    edges = np.linspace(low, high, len(counts) + 1)
    share = np.concatenate([[0.0], np.cumsum(counts) / max(counts.sum(), 1.0)])
    out = 1 - percent / 100
    below = 0.0 if low >= 0 else out if high <= 0 else out / 2
    above = out - below
    return (
        float(np.interp(below, share, edges)) if below else low,
        float(np.interp(1 - above, share, edges)) if above else high,
    )


def mse_range(
    counts: Array,
    low: float,
    high: float,
    levels: int,
    candidates: int = 60,
    through: Callable[[Array], Array] | None = None,
) -> tuple[float, float]:
    """The range with the least mean squared quantization error by line search: both ends together,
    then each end alone, then both again finely. The whole range is always among the candidates.

    levels   number of codes, 2^bits
    through  a function whose values count, in place of the tensor's own: where it saturates, clipping costs nothing
    """
    values = _values(counts, low, high)
    ends = np.array([min(low, 0.0), max(high, 0.0)])
    best, least = ends, _mse(counts, values, ends[None], levels, through)[0]
    for both, scales in (
        (True, np.linspace(0.1, 1.0, candidates)),
        *([(False, np.geomspace(0.02, 1.0, candidates))] if through is not None else []),
        (False, np.linspace(0.5, 1.2, candidates)),
        (True, np.linspace(0.9, 1.1, candidates)),
    ):
        masks = [np.array([1.0, 1.0])] if both else [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
        for mask in masks:
            ranges = best * (1 + (scales[:, None] - 1) * mask)
            ranges = np.stack([np.maximum(ranges[:, 0], ends[0]), np.minimum(ranges[:, 1], ends[1])], axis=1)
            errors = _mse(counts, values, ranges, levels, through)
            if errors.min() < least:
                best, least = ranges[errors.argmin()], errors.min()
    return float(best[0]), float(best[1])


def kl_range(counts: Array, low: float, high: float, levels: int) -> tuple[float, float]:
    """The symmetric cut |x| <= T with the least Kullback-Leibler divergence over bins where both distributions have
    mass, plus the divergence of clipped mass: p log(1 + excess in levels) per clipped bin. Without that term it would always
    cut. A cut with a hundred times the mean squared error of the whole range is rejected: on few or spiky values the
    divergence alone can lead to one."""
    centers = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    top = max(abs(low), abs(high))
    bins = len(counts)
    folded = np.bincount(np.minimum((np.abs(centers) / (top or 1.0) * bins).astype(int), bins - 1), counts, bins)
    folded[0] = 0.0 if folded[1:].any() else folded[0]  # exact zeros cost nothing at any scale
    total = folded.sum()
    used = levels // 2 if low < 0 < high else levels
    if total == 0 or top == 0:
        return low, high
    best, least = bins, np.inf
    for cut in range(used, bins + 1, max(bins // 128, 1)):
        p = folded[:cut].copy()
        outside = folded[cut:]
        p[-1] += outside.sum()
        level = np.arange(cut) * used // cut
        nonzero = folded[:cut] > 0
        mass, slots = np.bincount(level, folded[:cut], used), np.bincount(level, nonzero, used)
        q = np.where(nonzero, (mass / np.maximum(slots, 1))[level], 0.0)
        both = (p > 0) & (q > 0)
        divergence = np.sum(p[both] / total * np.log(p[both] / total / (q[both] / max(q.sum(), 1e-30))))
        excess = (np.arange(cut, bins) - cut + 1) * used / cut
        score = divergence + np.sum(outside / total * np.log1p(excess))
        if score < least:
            best, least = cut, score
    limit = top * best / bins
    whole, cut_range = (min(low, 0.0), max(high, 0.0)), (max(low, -limit), min(high, limit))
    errors = _mse(counts, _values(counts, low, high), np.array([whole, cut_range]), levels)
    return cut_range if errors[1] <= 100 * errors[0] else (low, high)


def _values(counts: Array, low: float, high: float) -> Array:
    """The value of each bin: its middle, but exactly 0 for the bin that contains 0 (ReLU outputs)."""
    width = (high - low) / len(counts)
    values = low + (np.arange(len(counts)) + 0.5) * width
    if low <= 0 <= high and width > 0:
        values[min(int(-low / width), len(counts) - 1)] = 0.0
    return values


def _mse(counts: Array, values: Array, ranges: Array, levels: int, through: Callable[[Array], Array] | None = None) -> Array:
    """Mean squared error of the affine grid on each range [candidates, 2] -> [candidates]."""
    low, high = ranges[:, :1], ranges[:, 1:]
    size = np.maximum((high - low) / (levels - 1), 1e-30)
    zero = np.clip(np.rint(-low / size), 0, levels - 1)
    used = counts > 0
    x = values[used][None]
    codes = np.clip(np.rint(x / size) + zero, 0, levels - 1)
    rounded = (codes - zero) * size if through is None else _through(codes, zero, size, levels, through)
    error: Array = (rounded - (x if through is None else through(x))) ** 2 @ counts[used] / counts.sum()
    return error


def _through(codes: Array, zero: Array, size: Array, levels: int, function: Callable[[Array], Array]) -> Array:
    """A function's values for codes of grids, a row for each; it is evaluated once for each code where these are fewer."""
    if levels >= codes.shape[1]:
        return function((codes - zero) * size)
    return np.take_along_axis(function((np.arange(levels) - zero) * size), codes.astype(np.intp), axis=1)
