"""One option for each of several groups, with the least total noise within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from onnxq_plugins.spec import Array


def allocate(noise: Sequence[Array], cost: Sequence[Array], limit: float) -> list[int] | None:
    """Number of the option chosen for each group: least sum of `noise` with the sum of `cost` at most `limit`; None if even
    the cheapest options cost more.

    noise, cost   one array [options] per group

    A multiple-choice knapsack, solved exactly as an integer linear program by scipy's HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if sum(float(c.min()) for c in cost) > limit + 1e-12 * abs(limit):
        return None
    sizes = [len(n) for n in noise]
    ends = np.cumsum([0, *sizes])
    total = int(ends[-1])
    group = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(total), (group, np.arange(total))), shape=(len(sizes), total))
    weights, prices = np.concatenate(noise), np.concatenate(cost)
    scale = max(float(np.abs(prices).max()), 1e-30)
    found = milp(weights / max(float(weights.max()), 1e-30), integrality=np.ones(total), bounds=Bounds(0, 1),
                 constraints=[LinearConstraint(one_each, 1, 1),
                              LinearConstraint(prices[None] / scale, -np.inf, limit / scale)],
                 options={"mip_rel_gap": 0.0})
    return None if found.x is None else [int(np.argmax(found.x[a:b])) for a, b in pairwise(ends)]
