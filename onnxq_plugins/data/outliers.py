"""Samples that are unlike all others: a broken sensor, a picture that was not normalized, a bit that flipped.

One value a thousand times as large as any other takes all codes of an 8-bit grid, wherever it goes in the network; it rules
means and Gram matrices, too. Such samples are left out of calibration as a whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxq_plugins.data.samples import Data
from onnxq_plugins.spec import Array

_GAP = 2.0  # times the largest magnitude in any other sample: a bit that these would lose
_TAIL = 12  # samples whose peaks show how far others may be; of fewer samples
_WILD = 8.0  # one must reach so many times as far
_SHARE = 16  # one in so many samples may be wild, one at least
_FEWEST = 4  # samples that show what is usual


def usual(data: Data) -> Data:
    """The samples without those that are wild, with a note on these. Of a few samples none is: nobody knows which are usual.
    Nor of pictures, whose values have bounds, nor where samples are steps of streams, each of which leads to the next. Reads
    all samples once."""
    if data.bounded or data.state:
        return data
    peaks = [_peaks(feed) for feed in data]
    found: dict[int, tuple[str, float]] = {}  # sample -> input, times
    for name in dict.fromkeys(name for each in peaks for name in each):
        for sample, times in _wild(np.array([each.get(name, 0.0) for each in peaks])):
            found.setdefault(sample, (name, times))
    if not found:
        return data
    rest = data.without(found)
    first = min(found)
    name, times = found[first]
    more = f", and so do {len(found) - 1} others" if len(found) > 1 else ""
    rest.notes += (
        f"sample {first} reaches {times:.3g} times as far as any usual one in input '{name}'{more}: left out; if it is as "
        "it should be, keep it by --set data.outliers=true",
    )
    return rest


def _peaks(feed: Mapping[str, Array]) -> dict[str, float]:
    """The largest magnitude in each input of floats."""
    floats = {name: x for name, x in feed.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.size}
    return {name: float(max(-x.min(), x.max(), 0)) for name, x in floats.items()}


def _wild(peaks: Array) -> list[tuple[int, float]]:
    """Numbers of the wild samples, and how much further they reach than the furthest of the others.

    Samples of unlike loudness have gaps between their peaks, too. Where these have a Pareto tail P(peak > x) ~ x^-a, the
    furthest of n is about (n / 2)^(1 / a) times their median, and the gap before one more is wider than the 1.5th power of
    that once in (n / 2)^1.5 times, whatever a is. What is beyond such a gap, and of at least a factor of two, is no tail.
    """
    order = np.argsort(-peaks, kind="stable")
    ranked = peaks[order]
    for count in range(max(1, len(peaks) // _SHARE), 0, -1):
        others = ranked[count:]
        if len(others) < _FEWEST - 1 or not np.median(others) > 0:
            continue
        gap = max(_GAP if len(others) >= _TAIL else _WILD, float(others[0] / np.median(others)) ** 1.5)
        if ranked[count - 1] >= gap * others[0]:
            return [(int(n), float(peaks[n] / others[0])) for n in order[:count]]
    return []
