"""One option for each of several groups, with the least total noise within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import fsum

import numpy as np

from onnxq_plugins.spec import Array

_TOLERANCE = 1e-6  # of the solver: on constraints, and on an objective of size 1
_BANNED = 16  # choices that exceed the budget by less than the tolerance and are ruled out one by one


def allocate(noise: Sequence[Array], cost: Sequence[Array], limit: float) -> list[int] | None:
    """Number of the option chosen for each group: least sum of `noise` with the sum of `cost` at most `limit`; None if even
    the cheapest options cost more.

    noise, cost   one array [options] per group

    A multiple-choice knapsack, solved as an integer linear program by scipy's HiGHS. Its tolerances are absolute. So options
    noisier than a choice in hand are left out and the others measured against it, until the noise found is of the size that
    the tolerance is meant for; and what exceeds the budget by less than the tolerance is ruled out.
    """
    def total(values: Sequence[Array], choice: Sequence[int]) -> float:
        return fsum(float(v[k]) for v, k in zip(values, choice, strict=True))

    above = [n - n.min() for n in noise]
    best = [int(np.argmin(c)) for c in cost]
    allowed = limit + 1e-12 * abs(limit)
    if total(cost, best) > allowed:
        return None
    room, banned = limit, list[list[int]]()
    while (bound := total(above, best)) > 0:
        found = _solve([np.where(a <= bound, a / bound, np.inf) for a in above], cost, room, banned)
        if found is None:
            return best
        if total(cost, found) > allowed:
            banned.append(found)
            if len(banned) == _BANNED:
                room -= 2 * _TOLERANCE * max(float(np.ptp(c)) for c in cost)
            if len(banned) > 2 * _BANNED:
                return best
            continue
        reached = total(above, found)
        best = found if reached < bound else best
        if reached > bound / 2:
            return best
    return best


def _solve(noise: Sequence[Array], cost: Sequence[Array], limit: float, banned: Sequence[Sequence[int]]) -> list[int] | None:
    """The choice of least noise, as far as tolerances tell; options of infinite noise are out.

    banned   choices that are out as a whole
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(n) for n in noise]
    ends = np.cumsum([0, *sizes])
    total = int(ends[-1])
    group = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(total), (group, np.arange(total))), shape=(len(sizes), total))
    weights = np.concatenate(noise)
    prices = np.concatenate([c - c.min() for c in cost])
    scale = max(float(prices.max()), 1e-30)
    room = limit - fsum(float(c.min()) for c in cost)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(prices[None] / scale, -np.inf, room / scale)]
    for choice in banned:
        row = np.zeros((1, total))
        row[0, ends[:-1] + choice] = 1
        constraints.append(LinearConstraint(row, -np.inf, len(choice) - 1))
    usable = np.isfinite(weights)
    found = milp(np.where(usable, weights, 0.0), integrality=np.ones(total), bounds=Bounds(0, usable.astype(float)),
                 constraints=constraints, options={"mip_rel_gap": 0.0})
    return None if found.x is None else [int(np.argmax(found.x[a:b])) for a, b in pairwise(ends)]
