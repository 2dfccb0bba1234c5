"""Channels with similar ranges: the cheapest partition into a few clusters, one scale each."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.spec import Array


def clusters(top: Array, k: int, weight: Array | None = None) -> Array:
    """Labels [channels] in 0..k-1, ascending with the range, of at most k clusters that minimise `cost`.

    top      largest |value| of each channel [channels]
    k        clusters at most
    weight   of an error in each channel [channels], default 1

    Channels with equal `top` have the same label, and channels of zeros that of the smallest others: they cost nothing
    anywhere. Exact: the clusters of an optimal partition are runs of the sorted channels, which dynamic programming over
    their ends finds. Raises ValueError if `k` < 1, or for ranges or weights that are negative or not finite.
    """
    top = np.asarray(top, np.float64)
    weight = np.ones(top.shape) if weight is None else np.asarray(weight, np.float64)
    if (
        k < 1
        or top.ndim != 1
        or weight.shape != top.shape
        or not all((np.isfinite(v) & (v >= 0)).all() for v in (top, weight))
    ):
        raise ValueError("clusters needs k >= 1 and, per channel, one finite range and one finite weight of at least 0")
    labels = np.zeros(top.shape, np.int64)
    alive = top > 0
    if not alive.any():
        return labels
    size, at = np.unique(top[alive], return_inverse=True)
    weights = np.bincount(at, weight[alive], len(size))
    starts = _starts(size / size[-1], weights, min(k, len(size)))
    labels[alive] = np.searchsorted(starts, at, side="right") - 1
    return labels


def cost(top: Array, labels: Array, weight: Array | None = None) -> float:
    """Sum over clusters of (sum of weights) * max(top)^2: proportional to the expected squared rounding error, step^2 / 12
    per value, with a step that just covers each cluster. Channels of zeros do not count."""
    top = np.asarray(top, np.float64)
    weights = np.where(top > 0, 1.0 if weight is None else weight, 0.0)
    largest = np.zeros(int(labels.max(initial=0)) + 1)
    np.maximum.at(largest, labels, top)
    return float(np.sum(weights * largest[labels] ** 2))


def _starts(size: Array, weight: Array, k: int) -> Array:
    """First element of each of k runs of the ascending `size` with the least sum of (weights in the run) * (its last)^2."""
    count = len(size)
    before = np.r_[0.0, np.cumsum(weight)]  # weight in front of each element
    square = size**2
    least = np.r_[0.0, before[1:] * square]  # least[j]: the first j elements as one run
    begins = np.zeros((k, count + 1), np.int64)
    for run in range(1, k):
        least, begins[run] = _extend(least, before, square, run)
    starts, end = np.zeros(k, np.int64), count
    for run in range(k - 1, 0, -1):
        starts[run] = end = begins[run, end]
    return starts


def _extend(least: Array, before: Array, square: Array, run: int) -> tuple[Array, Array]:
    """The best cost of the first j elements with one more run, and the beginning of that run, for all j; at least `run`
    elements precede it.

    The cost of beginning at i is a line over x = square[j - 1], least[i] - before[i] x, with slopes that fall in i: the best
    i rises with j. So a block of j only searches between the best i of its two ends, in n^1.5 steps in place of n^2.
    """
    count = len(square)
    best, begin = np.full(count + 1, np.inf), np.zeros(count + 1, np.int64)
    block, low = max(int(np.sqrt(count)), 16), run
    for first in range(run + 1, count + 1, block):
        last = min(first + block, count + 1) - 1
        high = low + int(np.argmin(least[low:last] - before[low:last] * square[last - 1]))
        i, j = np.arange(low, high + 1), np.arange(first, last + 1)
        lines = least[i] - before[i] * square[j - 1, None]
        lines[i >= j[:, None]] = np.inf  # a run holds at least one element
        at = np.argmin(lines, axis=1)
        best[j] = lines[np.arange(len(j)), at] + before[j] * square[j - 1]
        begin[j] = i[at]
        low = high
    return best, begin
