"""Factors per channel that trade rounding noise of activations for that of the weights that read them, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.spec import Array


@dataclass(frozen=True, eq=False)
class Read:
    """An activation with one grid for all its channels.

    low, high   range of each channel [channels]
    gain        noise at its readers per unit of noise variance on each channel [channels]
    levels      number of steps of the grid
    count       number of values that each channel's range was taken from
    beside      what other channels on the grid have, as a Concat joins them: lowest and highest value, sum of their gains
    """

    low: Array
    high: Array
    gain: Array
    levels: int
    count: int
    beside: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def ends(self, factors: Array) -> tuple[float, float]:
        """The ends of the grid, which has 0 on it, once the channels were multiplied by factors."""
        low, high, _ = self.beside
        return min(float((self.low * factors).min()), low, 0.0), max(float((self.high * factors).max()), high, 0.0)


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads the channels.

    peak    largest |value| in each row for each channel [rows, channels]
    power   sum of the mean squares, or variances where mean errors are taken back, of the inputs it meets [channels]
    gain    weight of a unit of noise variance in each row [rows]
    top     largest code
    whole   one scale for all rows
    beside  of the columns that read other channels: peak in each row [rows], and the sum of their power
    """

    peak: Array
    power: Array
    gain: Array
    top: int
    whole: bool = False
    beside: tuple[Array, float] | None = None


def noise(factors: Array, reads: Sequence[Read], readers: Sequence[Reader]) -> float:
    """Rounding noise at the readers once the channels were multiplied by factors [channels]:

    sum_t sum_c gain_tc (step_t^2 / 12 / f_c^2 + clipped_tc)   +   sum_r sum_o gain_o step_ro^2 / 12 * sum_c f_c^2 E[x_c^2]

    with step_t = (max_c f_c high_c - min_c f_c low_c) / levels and step_ro = max_c (|W_oc| / f_c) / top. What samples other
    than those of calibration lose beyond the grid is that of an exponential tail of scale b whose largest of n values is the
    range: clipped = (b^2 / n) exp(-room / b) at either end of the grid, b = range / log n. A channel far below the largest
    one has room; without this term factors would leave none to any channel.
    """
    total = 0.0
    for x in reads:
        bottom, top = x.ends(factors)
        tail = np.maximum(np.maximum(np.abs(x.low), np.abs(x.high)) / np.log(max(x.count, 3)), 1e-30)
        room = np.stack([top / factors - x.high, x.low - bottom / factors])
        clipped = (tail**2 / x.count) * np.exp(-np.maximum(room, 0.0) / tail).sum(axis=0)
        rounded = ((top - bottom) / x.levels) ** 2 / 12
        total += float(x.gain @ (rounded / factors**2 + clipped)) + rounded * x.beside[2]
    for w in readers:
        step, power = (w.peak / factors).max(axis=1) / w.top, float(w.power @ factors**2)
        if w.beside is not None:
            step, power = np.maximum(step, w.beside[0] / w.top), power + w.beside[1]
        step = np.full_like(step, step.max()) if w.whole else step
        total += float(w.gain @ step**2) * power / 12
    return total


def spread(
    reads: Sequence[Read], readers: Sequence[Reader], exponents: Sequence[float], low: Array, high: Array
) -> tuple[Array, float, float]:
    """The factors of least `noise` among f_c = l r_c^-e w_c^d with d = 0, (1 - e) / 2 or 1 - e; their exponent e (0: none is
    better than a level alone), and the ratio of the noise with them to that without.

    The level l is 1; where other channels are on a grid also what brings these to the range of those, or half way. r_c is
    the largest range of channel c relative to the largest of all channels, over the activations; w_c the largest weight that
    reads it relative to that of its row. low, high: bounds of the factors [channels].

    Source: SmoothQuant (arXiv 2211.10438), equation 4, with its exponent chosen by predicted noise.
    """
    sizes = [np.maximum(np.abs(x.low), np.abs(x.high)) for x in reads]
    size = np.maximum(np.max([s / max(float(s.max()), 1e-30) for s in sizes], axis=0), 1e-6)
    rows = [w.peak / np.maximum(w.peak.max(axis=1, keepdims=True), 1e-30) for w in readers]
    weight = np.maximum(np.max([r.max(axis=0) for r in rows], axis=0), 1e-6) if rows else np.ones(len(size))
    plain = noise(np.ones(len(size)), reads, readers)
    best, chosen, least = np.ones(len(size)), 0.0, plain
    levels = _levels(reads)
    pairs = [(e, d) for e in exponents for d in (0.0, (1 - e) / 2, 1 - e)[: 1 if e == 1 else 3]]
    for e, d in [(0.0, 0.0), *pairs] if len(levels) > 1 else pairs:
        for level in levels:
            factors = np.clip(level * size**-e * weight**d, low, high)
            if (found := noise(factors, reads, readers)) < least:
                best, chosen, least = factors, e, found
    return best, chosen, least / plain if plain > 0 else 1.0


def _levels(reads: Sequence[Read]) -> list[float]:
    """Common factors to try."""
    levels = [1.0]
    for x in reads:
        own, others = max(float(x.high.max()), 0.0) - min(float(x.low.min()), 0.0), x.beside[1] - x.beside[0]
        if own > 0 and others > 0:
            levels += [others / own, (others / own) ** 0.5]
    return levels
