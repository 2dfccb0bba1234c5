"""Factors per channel that equalize the ranges of the weights on both sides of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.spec import Array

# Candidates for the level of free channels relative to bounded ones, the smallest change first.
_LEVELS = np.exp2(sorted(np.arange(-10.0, 10.5, 0.5), key=abs))[:, None]


@dataclass(frozen=True, eq=False)
class Place:
    """The channels of a group in one weight.

    size    [rows, columns], float64: the weight's largest |value| over all other axes; scaled in place, and shared by all
            places of the same weight
    axis    0 or 1, the axis of the channels
    index   [channels, positions]: the positions of each
    writes  True if the weight writes the channels (multiplied by a factor), False if it reads them (divided by it)
    rows    (first, last + 1) of the rows that belong to it: one group of a grouped convolution; None: all
    """

    size: Array
    axis: int
    index: Array
    writes: bool
    rows: tuple[int, int] | None = None

    def ranges(self) -> Array:
        """Largest value of each channel, relative to that of the whole weight [channels]."""
        top = self.size.max()
        along = self._part().max(axis=1 - self.axis)
        return np.asarray(along[self.index].max(axis=1) / (top if top > 0 else 1.0))

    def scale(self, factors: Array) -> None:
        """Multiply (or divide) the channels by factors [channels]."""
        part = self._part()
        spread = np.ones(part.shape[self.axis])
        spread[self.index] = (factors if self.writes else 1 / factors)[:, None]
        part *= spread[:, None] if self.axis == 0 else spread

    def _part(self) -> Array:
        return self.size[slice(*self.rows)] if self.rows else self.size


def balance(before: Array, after: Array, low: Array, high: Array) -> Array:
    """Factors f [channels] that equalize the ranges f * before and after / f.

    before, after   ranges [channels] of the weights that write and read each channel, relative to their largest
    low, high       bounds of f [channels]; a channel with low = high is fixed

    Without bounds f = sqrt(after / before), which makes both ranges equal. With bounds the free channels also need a level
    relative to the bounded ones: the one with the least `noise`, of several the one nearest to 1. A channel that is 0 on one
    side keeps factor 1 as far as the bounds allow.
    """
    alive = (before > 0) & (after > 0)
    ratio = np.sqrt(np.where(alive, after, 1.0) / np.where(alive, before, 1.0))
    if not (np.isfinite(high).any() or low.any()):
        return ratio
    candidates = np.where(alive, np.clip(_LEVELS * ratio, low, high), np.clip(1.0, low, high))
    cost = noise(before * candidates, after / candidates)
    # where no bound is active all levels cost the same
    best: Array = candidates[int(np.argmax(cost <= cost.min() * (1 + 1e-9)))]
    return best


def noise(before: Array, after: Array) -> Array:
    """Rounding noise that reaches the readers' outputs, up to a factor, from ranges [..., channels] on both sides: the step
    of each side is its largest range, and noise of one side passes through the other. Weights of 0 are free of it."""
    left, right = np.where(after > 0, before, 0.0), np.where(before > 0, after, 0.0)
    total: Array = before.max(axis=-1) ** 2 * np.sum(right**2, axis=-1) + after.max(axis=-1) ** 2 * np.sum(left**2, axis=-1)
    return total


def equalize(
    groups: Sequence[Sequence[Place]],
    bounds: Sequence[tuple[Array, Array]],
    gain: float = 1.0,
    sweeps: int = 40,
    tolerance: float = 1e-3,
) -> list[Array]:
    """Balance all groups in turn until no factor changes by more than `tolerance` (relative); returns each group's factors.

    bounds   (low, high) of each group's factors
    gain     groups whose `noise` would not fall by this ratio in the first sweep are left alone

    Source: cross-layer equalization of Data-Free Quantization (arXiv 1906.04721), section 4.1. For layers with both sides in
    a group (depthwise) the sweeps converge to its closed form for three layers. Ours: several weights on one side, as in
    residual streams, count by the largest relative range; bounds; gain.
    """
    factors = [np.ones(len(low)) for low, _ in bounds]
    active = list(range(len(groups)))
    for sweep in range(sweeps):
        change = 0.0
        for i in list(active):
            total = factors[i]
            if not sweep and not _worth(groups[i], bounds[i], gain):
                active.remove(i)
                continue
            f = balance(*_sides(groups[i]), bounds[i][0] / total, bounds[i][1] / total)
            for place in groups[i]:
                place.scale(f)
            total *= f
            change = max(change, float(np.ptp(np.log(f))))  # a common factor changes nothing
        if change < tolerance:
            break
    return factors


def _sides(places: Sequence[Place]) -> tuple[Array, Array]:
    """Relative ranges of a group's channels in the weights that write them and in those that read them."""
    before, after = (np.max([p.ranges() for p in places if p.writes is writes], axis=0) for writes in (True, False))
    return before, after


def _worth(places: Sequence[Place], bounds: tuple[Array, Array], gain: float) -> bool:
    """True if a group has two sides and balancing it pays."""
    if len({p.writes for p in places}) < 2:
        return False
    before, after = _sides(places)
    f = balance(before, after, *bounds)
    return bool(noise(before, after) >= gain * noise(before * f, after / f))
