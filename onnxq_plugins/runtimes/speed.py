"""Which of two models is faster, on a machine that does other work besides.

They run in turn, and what counts is the first decile of each one's times: what a run takes that nothing disturbed. Where
other processes want the same cores, medians of such runs are off by half from one third of a second to the next, and so are
medians of the ratios of neighbours; deciles by 2 %."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.runtimes.sessions import Feed, Session, wanted
from onnxq_plugins.spec import Array

EQUAL = 0.03  # of a ratio that is no difference
_DECILE = 0.1
_GROUPS = 3  # of pairs, each of which must say the same
_DOUBT = 1.1  # by which a few pairs may be off
_LEAST, _ENOUGH, _MOST = 3, 5, 60  # pairs
_ROUNDS, _LOOK = 1000, 9  # of several models; after how many one looks whether that is enough


@dataclass(frozen=True)
class Speed:
    """Two models run in turn on the same inputs, one thread.

    reference, quantized   milliseconds of a run that nothing disturbed
    ratio      of these: above 1, the second model is faster
    low, high  the lowest and the highest that it is among all pairs and each third of them: how sure it is
    pairs      of runs
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
        count = len(seconds)
        groups = _GROUPS if count >= 3 * _GROUPS else count
        ratio = _ratio(seconds)
        ratios = [ratio, *(_ratio(seconds[n::groups]) for n in range(groups))]
        doubt = 1.0 if count >= _ENOUGH else _DOUBT
        first, second = np.quantile(seconds, _DECILE, axis=0) * 1e3
        return cls(float(first), float(second), ratio, min(ratios) / doubt, max(ratios) * doubt, count)

    @property
    def slower(self) -> bool:
        """True if the second model is slower for sure."""
        return self.high < 1 and self.ratio < 1 - EQUAL

    @property
    def text(self) -> str:
        """The ratio in words."""
        if abs(self.ratio - 1) <= EQUAL:
            return "about the speed of float"
        sure = self.high < 1 or self.low > 1
        return f"{'' if sure else 'roughly '}{self.ratio:.2f}x the speed of float"


def _ratio(seconds: Array) -> float:
    first, second = np.quantile(seconds, _DECILE, axis=0)
    return float(first / second)


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
    while len(times) < _MOST and not _enough(len(times), time.perf_counter() - start, seconds, limit):
        pair = [0.0, 0.0]
        for which in (0, 1) if count % 2 else (1, 0):  # what comes second finds other caches
            began = time.perf_counter()
            runners[which].run(None, dict(feeds[count % len(feeds)][which]))
            pair[which] = time.perf_counter() - began
        times.append((pair[0], pair[1]))
        count += 1
    return Speed.of(times)


def against_first(runners: Sequence[Session], feed: Feed, seconds: float = 1.0, limit: float = 5.0) -> list[Speed]:
    """How fast each of several models is, compared with the first: all run in turn, so that ratios are of the same moments.

    seconds   to measure, if that gives five rounds; less where it is clear before which one is the fastest
    limit     seconds after which three are enough
    """
    feeds = [dict(wanted(runner, feed)) for runner in runners]
    rounds: list[list[float]] = []
    for runner, values in zip(runners, feeds, strict=True):
        runner.run(None, values)
    start = time.perf_counter()
    while len(rounds) < _ROUNDS and not _enough(len(rounds), time.perf_counter() - start, seconds, limit):
        taken = [0.0] * len(runners)
        for k in range(len(runners)):
            which = (k + len(rounds)) % len(runners)  # what comes after another finds its caches
            began = time.perf_counter()
            runners[which].run(None, feeds[which])
            taken[which] = time.perf_counter() - began
        rounds.append(taken)
        if len(rounds) % _LOOK == 0 and _clear(_speeds(rounds)):
            break
    return _speeds(rounds)


def _speeds(rounds: Sequence[Sequence[float]]) -> list[Speed]:
    """Of several models against the first, from the seconds of each in each round."""
    return [Speed.of([(taken[0], taken[k]) for taken in rounds]) for k in range(len(rounds[0]))]


def _clear(speeds: Sequence[Speed]) -> bool:
    """True if it is beyond doubt which of several models is the fastest."""
    faster = sum(speed.low > 1 + EQUAL for speed in speeds[1:])
    slower = sum(speed.high < 1 - EQUAL for speed in speeds[1:])
    return faster <= 1 and faster + slower == len(speeds) - 1


def _enough(pairs: int, passed: float, seconds: float, limit: float) -> bool:
    return (pairs >= _ENOUGH and passed >= seconds) or (pairs >= _LEAST and passed >= limit)
