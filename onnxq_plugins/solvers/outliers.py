"""Which channels of a layer's input should be computed in float, beside the integer kernel of all others.

A layer y = W x with D channels of inputs and outputs o loses on 8-bit grids, as rounding errors are independent,

    noise = s^2 / 12 sum_oc W_oc^2  +  sum_o t_o^2 / 12 sum_c E[x_c^2],    t_o = max_c |W_oc| / n

s is the step of the input, which the span of its channels sets, t_o that of the weights of output o, n their largest code. A
channel that is taken out stands in neither sum, nor in the maxima."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onnxq_plugins.spec import Array, QuantSpec, from_range


class Step(NamedTuple):
    """More float channels: of which tensor, how many it then has, the noise of all tensors, and what all channels cost."""

    tensor: int
    channels: int
    noise: float
    cost: float


def widest_first(low: Array, high: Array, count: int) -> Array:
    """Numbers of the `count` channels, one after another, without which the others span least [count].

    low, high   range of each channel [C]
    """
    low, high = np.minimum(low, 0.0).astype(np.float64), np.maximum(high, 0.0).astype(np.float64)
    left = np.ones(len(low), bool)
    chosen = []
    for _ in range(count):
        names = np.flatnonzero(left)
        ends = {int(names[np.argmin(low[names])]), int(names[np.argmax(high[names])])}
        rest = {c: names[names != c] for c in sorted(ends)}
        best = min(rest, key=lambda c: float(np.ptp([*_ends(low, high, rest[c])])))
        chosen.append(best)
        left[best] = False
    return np.array(chosen, np.int64)


def _ends(low: Array, high: Array, some: Array) -> tuple[float, float]:
    return float(low[some].min(initial=0.0)), float(high[some].max(initial=0.0))


def noise(
    low: Array, high: Array, power: Array, matrix: Array, spec: QuantSpec, weight: QuantSpec, order: Array | None = None
) -> Array:
    """Variance of the rounding errors of a layer, summed over its outputs, with the first 0, 1, ... channels of `order` in
    float [1 + channels in `order`].

    low, high   range of each channel of the input [C]
    power       its mean square [C]
    matrix      the weight [groups, outputs, D], D = channels per group * taps
    spec        the grid of the input: bits and symmetry; `weight` that of the weight, with a scale per output unless its
                block is None
    """
    order = np.zeros(0, np.int64) if order is None else order
    groups, outputs, _ = matrix.shape
    taps = np.abs(matrix.reshape(groups, outputs, len(low) // groups, -1)).astype(np.float64)
    energy, power = np.square(taps).sum(axis=(1, 3)).reshape(-1), power.reshape(groups, -1).copy()
    top = taps.max(axis=3)  # [groups, outputs, channels per group]
    left, values = np.ones(len(low), bool), []
    for count in range(len(order) + 1):
        if count:
            left[order[count - 1]] = False
            group, at = divmod(int(order[count - 1]), power.shape[1])
            power[group, at], top[group, :, at] = 0.0, 0.0
        step = float(np.asarray(from_range(low[left].min(initial=0.0), high[left].max(initial=0.0), spec).scale))
        tops = top.max(axis=2) if weight.block is not None else np.full(top.shape[:2], top.max())
        steps = np.square(tops / weight.grid[1]).sum(axis=1)  # [groups]
        values.append(step**2 / 12 * energy[left].sum() + taps.shape[3] * float(steps @ power.sum(axis=1)) / 12)
    return np.array(values)


def cheapest(noises: Sequence[Array], costs: Sequence[Array], rest: float, worth: float) -> list[Step]:
    """Steps to more float channels, each the one that lowers the noise of the whole most for its cost, as long as that is
    `worth` the cost.

    noises   of each tensor with 0, 1, ... float channels
    costs    of as many
    rest     noise of what stays as it is
    worth    dB for each unit of cost
    """
    counts, total, spent = [0] * len(noises), rest + float(sum(n[0] for n in noises)), 0.0
    steps: list[Step] = []
    while True:
        options = [
            (10 * np.log10(total / max(total - saved, 1e-300)) / max(price, 1e-12), -k, count)
            for k, (n, c) in enumerate(zip(noises, costs, strict=True))
            for count in range(counts[k] + 1, len(n))
            if (saved := float(n[counts[k]] - n[count])) > 0 and (price := float(c[count] - c[counts[k]])) >= 0
        ]
        rate, k, count = max(options, default=(0.0, 0, 0))
        if rate <= 0 or rate < worth:
            return steps
        total -= float(noises[-k][counts[-k]] - noises[-k][count])
        spent += float(costs[-k][count] - costs[-k][counts[-k]])
        counts[-k] = count
        steps.append(Step(-k, count, total, spent))
