"""One option for each of several groups, with the least total noise within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq_plugins.spec import Array

_STATES = 16384  # partial choices in memory; beyond, of those within 1/16384 of the budget the least noisy remains


def allocate(noise: Sequence[Array], cost: Sequence[Array], limit: float) -> list[int] | None:
    """Number of the option for each group: least sum of `noise` with the sum of `cost` at most `limit`; None if even the
    cheapest options cost more.

    noise, cost   one array [options] per group

    A multiple-choice knapsack by dynamic programming: group after group, the partial choices that no other one beats in both
    cost and noise. Exact while there are few of these. (An integer program is not simpler: noise of 0 and of -100 dB occur
    together, which the absolute tolerances of such solvers do not distinguish.)
    """
    room = limit - sum(float(c.min()) for c in cost) + 1e-12 * abs(limit)
    if room < 0:
        return None
    spent, total = np.zeros(1), np.zeros(1)
    steps: list[tuple[Array, Array]] = []  # per group: number of the partial choice before, option added
    for n, c in zip(noise, cost, strict=True):
        price, error = ((side[:, None] + (v - v.min())).ravel() for side, v in ((spent, c), (total, n)))
        fits = np.flatnonzero(price <= room)
        order = fits[np.lexsort((error[fits], price[fits]))]
        least = np.minimum.accumulate(error[order])
        order = order[np.r_[True, error[order][1:] < least[:-1]]]
        if len(order) > _STATES:  # error falls along the order: the last of each interval of cost is its least noisy
            interval = (price[order] * (_STATES / room)).astype(np.int64)
            order = order[np.r_[interval[1:] != interval[:-1], True]]
        spent, total = price[order], error[order]
        steps.append((order // len(n), order % len(n)))
    at, options = len(spent) - 1, []
    for before, option in reversed(steps):
        options.append(int(option[at]))
        at = int(before[at])
    return options[::-1]
