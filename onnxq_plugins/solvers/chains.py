"""Where to cut the channels of several tensors that follow from one another channel by channel, so that two groups of them
have grids of their own.

Let V_tc be the variance of channel c in tensor t, and p_c the part of the signal at the readers that channel c carries. What
rounding adds to a channel stays beside its signal all the way, so that noise and signal at the readers are as

    noise = sum_t sum_c p_c N_t(c) / V_tc,   N = s^2 / 12 of the grid of c's group

with V from ranges of six standard deviations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onnxq_plugins.spec import Array, QuantSpec, from_range

_DEAD = 1e-4  # a channel that spans less of the whole range counts as one that spans so much


class Grid(NamedTuple):
    """A tensor: range of each channel [C], and its bits and symmetry."""

    low: Array
    high: Array
    spec: QuantSpec


class Cut(NamedTuple):
    """Groups of channels, each ascending, and the SQNR at the readers in dB with one grid and with one for each group."""

    groups: list[Array]
    before: float
    after: float


def variance(low: Array, high: Array) -> Array:
    """Variance of each channel [C]."""
    least = _DEAD * float(np.ptp([0.0, low.min(), high.max()]))
    return np.asarray(np.square(np.maximum(high - low, max(least, 1e-30)) / 6))


def best_cut(apart: Sequence[Grid], shared: Sequence[Grid], parts: Array, gain: float, most: int) -> Cut:
    """The groups of least noise. Groups are cut in two one after another, in the order of the ranges of their channels in
    one of the tensors.

    apart    tensors whose groups get grids of their own, at least one
    shared   others, whose grids stay those of all channels
    parts    p_c [C], adding up to 1
    gain     dB that each cut must gain
    most     number of groups
    """
    weights = [parts / variance(grid.low, grid.high) for grid in (*apart, *shared)]
    rest = sum(_noise(grid, weight) for grid, weight in zip(shared, weights[len(apart) :], strict=True))
    groups = [np.arange(len(parts))]
    noises = [sum(_noise(grid, weight) for grid, weight in zip(apart, weights, strict=False))]
    before = rest + noises[0]
    while len(groups) < most:
        total = rest + sum(noises)
        cuts = [_cut(apart, weights, group) for group in groups]
        k = min(range(len(groups)), key=lambda i: sum(cuts[i][1]) - noises[i])
        if not _decibel(total - noises[k] + sum(cuts[k][1])) - _decibel(total) >= gain:
            break
        groups[k : k + 1], noises[k : k + 1] = cuts[k]
    return Cut(groups, _decibel(before), _decibel(rest + sum(noises)))


def _cut(apart: Sequence[Grid], weights: Sequence[Array], group: Array) -> tuple[list[Array], list[float]]:
    """The best cut of a group of channels in two, and the noise of both; the noise is infinite for a single channel."""
    best: tuple[list[Array], list[float]] = [group], [np.inf]
    for leading in apart:
        order = group[np.argsort((np.maximum(leading.high, 0) - np.minimum(leading.low, 0))[group], kind="stable")]
        sides = []
        for some in (order, order[::-1]):
            noise = np.zeros(len(some))
            for grid, weight in zip(apart, weights, strict=False):
                low, high = np.minimum.accumulate(grid.low[some]), np.maximum.accumulate(grid.high[some])
                step = np.asarray(from_range(low, high, grid.spec).scale, np.float64)
                noise += np.square(step) / 12 * np.cumsum(weight[some])
            sides.append(noise)
        left, right = sides[0][:-1], sides[1][:-1][::-1]
        at = int(np.argmin(left + right)) if len(left) else 0
        if len(left) and left[at] + right[at] < sum(best[1]):
            best = [np.sort(order[: at + 1]), np.sort(order[at + 1 :])], [float(left[at]), float(right[at])]
    return best


def _noise(grid: Grid, weight: Array) -> float:
    """Noise at the readers of the rounding of a tensor with one grid for all channels."""
    scale = float(np.asarray(from_range(grid.low.min(), grid.high.max(), grid.spec).scale))
    return scale**2 / 12 * float(weight.sum())


def _decibel(noise: float) -> float:
    return float(-10 * np.log10(max(noise, 1e-30)))
