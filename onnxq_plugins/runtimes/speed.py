"""Which of two models is faster, on a machine that does other work besides: runs in turn, and how sure their ratio is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.runtimes.sessions import Feed, Session

EQUAL = 0.03  # of a ratio that is no difference
_SURE = 0.05  # chance that the true ratio lies outside the interval
_FEW = 5  # pairs whose extremes are an interval
_DOUBT = 0.1  # by which the interval of fewer pairs is wider
_LEAST, _MOST = 3, 60  # pairs


@dataclass(frozen=True)
class Speed:
    """Two models run in turn on the same inputs, one thread.

    reference, quantized   median milliseconds of a run
    ratio     of their times, the median over pairs of runs side by side: above 1, the second model is faster
    low, high between which the ratio is at 95 %, whatever the noise is like: ranks of the pairs
    pairs     of runs
    """

    reference: float
    quantized: float
    ratio: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, times: Sequence[tuple[float, float]]) -> Speed:
        """From pairs of seconds."""
        seconds = np.array(times, np.float64)
        ratios = np.sort(seconds[:, 0] / seconds[:, 1])
        n, rank = len(ratios), _rank(len(ratios))
        doubt = 1.0 if n >= _FEW else 1 + _DOUBT
        middle = np.median(seconds, axis=0) * 1e3
        low, high = ratios[rank] / doubt, ratios[n - 1 - rank] * doubt
        return cls(float(middle[0]), float(middle[1]), float(np.median(ratios)), float(low), float(high), n)

    @property
    def slower(self) -> bool:
        """True if the second model is slower for sure."""
        return self.high < 1 and self.ratio < 1 - EQUAL

    @property
    def faster(self) -> bool:
        """True if it is faster for sure."""
        return self.low > 1 and self.ratio > 1 + EQUAL


def _rank(count: int) -> int:
    """Number of the order statistic from either end between which the median is, but for a chance of `_SURE`."""
    outside, rank = 0.0, 0
    while (outside := outside + 2 * math.comb(count, rank) / 2**count) <= _SURE and rank < (count - 1) // 2:
        rank += 1
    return max(rank - 1, 0)


def side_by_side(
    runners: tuple[Session, Session],
    feeds: Sequence[tuple[Feed, Feed]],
    known: Sequence[tuple[float, float]] = (),
    seconds: float = 0.3,
    limit: float = 1.0,
) -> Speed:
    """How fast the second of two models that are warm is, compared with the first.

    feeds     pairs of inputs, one for each model, taken in turn
    known     pairs of seconds that were measured already
    seconds   to measure, if that gives five pairs
    limit     seconds after which three are enough
    """
    times, start, count = list(known), time.perf_counter(), 0
    while len(times) < _MOST and not (times and _enough(len(times), time.perf_counter() - start, seconds, limit)):
        pair = [0.0, 0.0]
        for which in (0, 1) if count % 2 else (1, 0):  # what comes second finds other caches
            began = time.perf_counter()
            runners[which].run(None, dict(feeds[count % len(feeds)][which]))
            pair[which] = time.perf_counter() - began
        times.append((pair[0], pair[1]))
        count += 1
    return Speed.of(times)


def _enough(pairs: int, passed: float, seconds: float, limit: float) -> bool:
    return (pairs >= _FEW and passed >= seconds) or (pairs >= _LEAST and passed >= limit)
