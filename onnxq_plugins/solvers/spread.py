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
    """

    low: Array
    high: Array
    gain: Array
    levels: int
    count: int


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads the channels.

    peak    largest |value| in each row for each channel [rows, channels]
    power   sum of the mean squares, or variances where mean errors are taken back, of the inputs it meets [channels]
    gain    weight of a unit of noise variance in each row [rows]
    top     largest code
    whole   one scale for all rows
    """

    peak: Array
    power: Array
    gain: Array
    top: int
    whole: bool = False


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
        top, bottom = max(float((x.high * factors).max()), 0.0), min(float((x.low * factors).min()), 0.0)
        tail = np.maximum(np.maximum(np.abs(x.low), np.abs(x.high)) / np.log(max(x.count, 3)), 1e-30)
        room = np.stack([top / factors - x.high, x.low - bottom / factors])
        clipped = (tail**2 / x.count) * np.exp(-np.maximum(room, 0.0) / tail).sum(axis=0)
        total += float(x.gain @ (((top - bottom) / x.levels) ** 2 / 12 / factors**2 + clipped))
    for w in readers:
        step = (w.peak / factors).max(axis=1) / w.top
        step = np.full_like(step, step.max()) if w.whole else step
        total += float(w.gain @ step**2) * float(w.power @ factors**2) / 12
    return total


def spread(
    reads: Sequence[Read], readers: Sequence[Reader], exponents: Sequence[float], low: Array, high: Array
) -> tuple[Array, float, float]:
    """The factors of least `noise` among f_c = r_c^-e w_c^d with d = 0, (1 - e) / 2 or 1 - e; their exponent e (0: none is
    better than 1), and the ratio of the noise with them to that without.

    r_c is the largest range of channel c relative to the largest of all channels, over the activations; w_c the largest
    weight that reads it relative to that of its row. low, high: bounds of the factors [channels].

    Source: SmoothQuant (arXiv 2211.10438), equation 4, with its exponent chosen by predicted noise.
    """
    sizes = [np.maximum(np.abs(x.low), np.abs(x.high)) for x in reads]
    size = np.maximum(np.max([s / max(float(s.max()), 1e-30) for s in sizes], axis=0), 1e-6)
    rows = [w.peak / np.maximum(w.peak.max(axis=1, keepdims=True), 1e-30) for w in readers]
    weight = np.maximum(np.max([r.max(axis=0) for r in rows], axis=0), 1e-6) if rows else np.ones(len(size))
    plain = noise(np.ones(len(size)), reads, readers)
    best, chosen, least = np.ones(len(size)), 0.0, plain
    for e in exponents:
        for d in (0.0, (1 - e) / 2, 1 - e)[: 1 if e == 1 else 3]:
            factors = np.clip(size**-e * weight**d, low, high)
            if (found := noise(factors, reads, readers)) < least:
                best, chosen, least = factors, e, found
    return best, chosen, least / plain if plain > 0 else 1.0
