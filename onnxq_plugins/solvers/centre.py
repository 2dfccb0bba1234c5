"""Constants per channel that let the grids of tensors shrink, where the tensors add up to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxq_plugins.solvers.connected import connected
from onnxq_plugins.spec import Array

Sum = tuple[Array, Array, Array, float]  # (z, x, y, sign), numbers of variables [channels] each: z = x + sign * y
Span = tuple[Array, Array, Array]  # numbers of variables, low and high [channels] of a tensor

_IDLE = 1e-6  # weight of variables without a tensor to centre, which stay near 0
_LOOSE = 1e-12  # a sum may be off by this much, relative: sums that follow from others leave the system singular
_POWER = 8  # of the norm that stands for a maximum over channels
_STEPS = 8


def centre(count: int, sums: Sequence[Sum], tensors: Sequence[Span]) -> Array:
    """Shifts s [count] that make sum_t R_t^2 small while the shifts of sums add up, with R_t the width of a grid with 0 on
    it that holds all channels of tensor t:

        R_t = max(max_c (high_tc - s_c), 0) - min(min_c (low_tc - s_c), 0)

    sums      numbers of variables, -1 for one that is 0
    tensors   numbers of -1 have no shift

    A tensor alone gets the middle of each channel. A branch and the sum that it closes want different shifts in general;
    least squares split the difference, and Newton steps on the 8-norm over channels then spare those that set a width, at
    the cost of those with room to spare. Tensors that are tied by sums keep 0 where nothing better is found.

    Cost: at most 9 sparse systems that fall apart by channels, linear in `count`.
    """
    if not count:
        return np.zeros(0)
    joined, tied = _matrix(count, sums), _clusters(count, sums, tensors)
    middles = [(low + high) / 2 for _, low, high in tensors]
    best, least = np.zeros(count), _cost(np.zeros(count), tensors, tied)
    values = _solve(joined, [(at, m, np.ones(len(m))) for (at, _, _), m in zip(tensors, middles, strict=True)], count)
    for step in range(_STEPS + 1):
        cost = _cost(values, tensors, tied)
        better = cost < least * (1 - 1e-9)
        best, least = np.where(better[tied[:count]], values, best), np.where(better, cost, least)
        if step == _STEPS or not sums:
            break
        wanted = []
        for (at, low, high), middle in zip(tensors, middles, strict=True):
            off = np.append(values, 0.0)[at] - middle
            size = np.abs(off) + (high - low) / 2
            top = max(float(size.max()), 1e-30)
            part = size / top
            norm = np.sum(part**_POWER) ** (2 / _POWER - 1)
            ahead = np.minimum(np.abs(off), size / (_POWER - 1)) * np.sign(off)
            wanted.append((at, middle + off - ahead, norm * (_POWER - 1) * part ** (_POWER - 2) + 1e-9))
        values = _solve(joined, wanted, count)
    largest = max((float(np.abs(m).max(initial=0.0)) for m in middles), default=0.0)
    return np.where(np.abs(best) > 1e-9 * largest, best, 0.0)


def _cost(values: Array, tensors: Sequence[Span], tied: Array) -> Array:
    """sum_t R_t^2 of each cluster."""
    cost, known = np.zeros(int(tied.max()) + 1), np.append(values, 0.0)
    for n, (at, low, high) in enumerate(tensors):
        width = max(float((high - known[at]).max()), 0.0) - min(float((low - known[at]).min()), 0.0)
        cost[tied[len(values) + n]] += width**2
    return cost


def _matrix(count: int, sums: Sequence[Sum]) -> Any:
    """One row of coefficients per sum of single channels, sparse [sums, count]: z - x - sign * y; None without sums."""
    if not sums:
        return None
    from scipy.sparse import csr_array  # late: slow to import

    rows, columns, values, total = [np.arange(0)], [np.arange(0)], [np.zeros(0)], 0
    for *ends, sign in sums:
        row = np.arange(total, total + len(ends[0]))
        total += len(row)
        for numbers, factor in zip(ends, (1.0, -1.0, -sign), strict=True):
            free = numbers >= 0
            rows, columns = [*rows, row[free]], [*columns, numbers[free]]
            values.append(np.full(int(free.sum()), factor))
    return csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(total, count))


def _clusters(count: int, sums: Sequence[Sum], tensors: Sequence[Span]) -> Array:
    """The cluster of each variable and of each tensor [count + tensors]: those that share variables or sums."""
    pairs = [(at[at >= 0], np.full(int((at >= 0).sum()), count + n)) for n, (at, _, _) in enumerate(tensors)]
    for *ends, _ in sums:
        for a, b in ((ends[0], ends[1]), (ends[0], ends[2]), (ends[1], ends[2])):
            both = (a >= 0) & (b >= 0)
            pairs.append((a[both], b[both]))
    a, b = (np.concatenate([np.arange(0), *side]) for side in zip(*pairs, strict=True)) if pairs else (np.arange(0),) * 2
    return connected(count + len(tensors), a, b)


def _solve(joined: Any, wanted: Sequence[tuple[Array, Array, Array]], count: int) -> Array:
    """Least squares: values near what tensors want of them, by weights, on the plane of the sums."""
    weight, target = np.full(count, _IDLE), np.zeros(count)
    for numbers, value, much in wanted:
        free = numbers >= 0
        np.add.at(weight, numbers[free], much[free])
        np.add.at(target, numbers[free], (much * value)[free])
    if joined is None or not joined.shape[0]:
        return np.asarray(target / weight)
    from scipy.sparse import block_array, diags_array
    from scipy.sparse.linalg import splu

    rows = joined.shape[0]
    system = block_array([[diags_array(weight), joined.T], [joined, -_LOOSE * diags_array(np.ones(rows))]])
    return np.asarray(splu(system.tocsc()).solve(np.concatenate([target, np.zeros(rows)]))[:count])
