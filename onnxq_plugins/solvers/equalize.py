"""Factors per channel that even out the ranges of the weights on both sides of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.spec import Array

_LEVELS = np.exp2(np.arange(-10.0, 10.5, 0.5))[:, None]  # candidates for the level of the free channels beside bound ones


@dataclass(frozen=True, eq=False)
class Place:
    """Where the channels of a group lie in one weight.

    size    [rows, columns], float64: the weight's largest |value| over all other axes; scaled in place, and shared by all
            places of the same weight
    axis    0 or 1: along which the channels lie
    index   [channels, positions]: the positions of each
    writes  True if the weight makes the channels (multiplied by a factor), False if it reads them (divided by it)
    """

    size: Array
    axis: int
    index: Array
    writes: bool

    def ranges(self) -> Array:
        """Largest value of each channel, relative to that of the whole weight [channels]."""
        along = self.size.max(axis=1 - self.axis)
        top = along.max()
        relative: Array = along[self.index].max(axis=1) / (top if top > 0 else 1.0)
        return relative

    def scale(self, factors: Array) -> None:
        """Multiply (or divide) the channels by factors [channels]."""
        spread = np.ones(self.size.shape[self.axis])
        spread[self.index] = (factors if self.writes else 1 / factors)[:, None]
        np.multiply(self.size, spread[:, None] if self.axis == 0 else spread, out=self.size)


def balance(before: Array, after: Array, low: Array, high: Array) -> Array:
    """Factors f [channels] that even out the ranges f * before and after / f.

    before, after   ranges [channels] of the weights that make and read each channel, relative to their largest
    low, high       bounds of f [channels]; a channel with low = high is fixed

    Without bounds f = sqrt(after / before), which makes both ranges equal. With bounds the free channels also need a level
    against the bound ones: the one with the least rounding noise relative to each channel's own range, summed over channels
    and both sides. A channel that is 0 on a side keeps factor 1 as far as the bounds allow.
    """
    alive = (before > 0) & (after > 0)
    ratio = np.sqrt(np.where(alive, after, 1.0) / np.where(alive, before, 1.0))
    if not (np.isfinite(high).any() or low.any()):
        return ratio
    tried = np.where(alive, np.clip(_LEVELS * ratio, low, high), np.clip(1.0, low, high))
    one, two = np.where(alive, before, 0.0) * tried, np.where(alive, after, 0.0) / tried
    noise = one.max(axis=1) ** 2 * np.sum(two**2, axis=1) + two.max(axis=1) ** 2 * np.sum(one**2, axis=1)
    best: Array = tried[int(noise.argmin())]
    return best


def equalize(groups: Sequence[Sequence[Place]], bounds: Sequence[tuple[Array, Array]], sweeps: int = 40,
             tolerance: float = 1e-3) -> list[Array]:
    """Balance all groups in turn until no factor changes by more than `tolerance` (relative); returns each group's factors.

    bounds   (low, high) of each group's factors

    Source: cross-layer equalization of Data-Free Quantization (arXiv 1906.04721), section 4.1. Layers with both sides in a
    group (depthwise) come to its closed form for three layers by the sweeps. Ours: several weights on a side, as in residual
    streams, count by the largest relative range; bounds.
    """
    factors = [np.ones(len(low)) for low, _ in bounds]
    for _ in range(sweeps):
        change = 0.0
        for places, (low, high), total in zip(groups, bounds, factors, strict=True):
            sides = [[p.ranges() for p in places if p.writes is writes] for writes in (True, False)]
            if not all(sides):
                continue
            f = balance(np.max(sides[0], axis=0), np.max(sides[1], axis=0), low / total, high / total)
            for place in places:
                place.scale(f)
            total *= f
            level = f / np.exp(np.mean(np.log(f)))
            change = max(change, float(np.abs(np.log(level)).max()))
        if change < tolerance:
            break
    return factors
