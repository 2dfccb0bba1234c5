"""The longest prefix of a list of changes whose score still meets a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

Strategy = Literal["hybrid", "binary", "interpolation", "brute"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


def longest(score: Callable[[int], float], count: int, target: float, strategy: Strategy = "hybrid") -> int:
    """The largest number k of changes, 0 <= k <= count, with score(k) >= target; -1 if even score(0) is below.

    score      of the first k changes; called at most once for each k. All strategies but ``brute`` assume it never rises
    strategy   ``brute`` tries every k; ``binary`` halves; ``interpolation`` tries where a straight line between the ends
               meets the target; ``hybrid`` alternates between the two, with at most about twice the calls of ``binary``

    Source: Practical Mixed Precision (arXiv 2302.05397), figure 1; the alternation of hybrid is our own.
    """
    known: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in known:
            known[k] = score(k)
        return known[k]

    if strategy == "brute":
        return max((k for k in range(count + 1) if at(k) >= target), default=-1)
    if at(0) < target:
        return -1
    if at(count) >= target:
        return count
    low, high, turn = 0, count, 0
    while high - low > 1:
        turn += 1
        straight = strategy == "interpolation" or (strategy == "hybrid" and turn % 2)
        if straight:
            share = (at(low) - target) / max(at(low) - at(high), 1e-12)
            middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        else:
            middle = (low + high) // 2
        if at(middle) >= target:
            low = middle
        else:
            high = middle
    return low
