"""Orders of channels that make neighbours similar, so that tiles of neighbours need fewer different steps.

A tile's step follows its largest weight, so rounding costs about max^2 / 12 times the mean squares of its inputs:

    cost = sum over tiles of max |w|^2 * sum of E[x^2]

The channels of a group are on axes of several weights (`View`); one order serves all, and the sum of their costs counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxq_plugins.spec import Array

_SKETCH = 48  # rows of a view by which swaps are proposed; all rows decide on them


@dataclass(frozen=True, eq=False)
class View:
    """An axis of a weight with the channels of a group.

    size    largest |w| of a tile's weights across the axis [K, positions on the axis]
    power   sum of the mean squares of their inputs [K, positions]
    at      position of each channel [channels]
    width   positions in a tile
    """

    size: Array
    power: Array
    at: Array
    width: int

    def cost(self, order: Array) -> float:
        """The view's cost with channel order[s] in the place of channel s."""
        size, power = self.reordered(order)
        first = np.arange(0, size.shape[1], self.width)
        return float((np.maximum.reduceat(size, first, axis=1) ** 2 * np.add.reduceat(power, first, axis=1)).sum())

    def reordered(self, order: Array) -> tuple[Array, Array]:
        """`size` and `power` with channel order[s] in the place of channel s."""
        size, power = self.size.copy(), self.power.copy()
        size[:, self.at], power[:, self.at] = self.size[:, self.at[order]], self.power[:, self.at[order]]
        return size, power


def sort_channels(views: Sequence[View]) -> Array:
    """The cheapest [channels] of these orders: the present one, by size in each view, by the mean of their log sizes."""
    count = len(views[0].at)
    logs = []
    for view in views:
        norm = np.sqrt((view.size[:, view.at] ** 2).sum(axis=0))
        dead = norm <= 0
        norm[dead] = norm[~dead].min() if not dead.all() else 1.0  # a channel of zeros fits anywhere
        logs.append(np.log(norm) - np.log(norm).mean())
    keys = [np.arange(count, dtype=float), *(-one for one in logs), -np.mean(logs, axis=0)]
    orders = [np.argsort(key, kind="stable") for key in keys]
    return min(orders, key=lambda order: total_cost(views, order))


def swap_channels(views: Sequence[View], order: Array, rng: np.random.Generator, sweeps: int) -> Array:
    """A cheaper order by swapping pairs: each sweep offers every channel the best of all places, until a sweep changes
    nothing."""
    states = [_State(view, order, rng) for view in views]
    order = order.copy()
    for _ in range(sweeps):
        swapped = 0
        for slot in rng.permutation(len(order)):
            gains = np.sum([state.offers(slot) for state in states], axis=0)
            other = int(gains.argmin())
            if gains[other] < 0 and sum(state.gain(slot, other) for state in states) < 0:
                for state in states:
                    state.swap(slot, other)
                order[[slot, other]] = order[[other, slot]]
                swapped += 1
        if not swapped:
            break
    return order


def total_cost(views: Sequence[View], order: Array) -> float:
    """Sum of the views' costs."""
    return sum(view.cost(order) for view in views)


class _State:
    """A view in its present order. The terms that a swap changes are kept for every slot, on some rows, in float32."""

    def __init__(self, view: View, order: Array, rng: np.random.Generator) -> None:
        size, power = view.reordered(order)
        self.size, self.power = np.ascontiguousarray(size.T), np.ascontiguousarray(power.T)  # a tile is contiguous
        self.at, self.width, self.tile = view.at, view.width, view.at // view.width
        rows, slots, tiles = len(size), len(self.at), -(-len(self.size) // self.width)
        self.rows = np.sort(rng.choice(rows, _SKETCH, replace=False)) if rows > _SKETCH else np.arange(rows)
        self.own, self.weight, self.rest, self.load = (np.zeros((len(self.rows), slots), np.float32) for _ in range(4))
        self.before = np.zeros(slots, np.float32)
        self.total, self.cost = np.zeros((tiles, rows)), np.zeros(tiles)
        for tile in np.unique(self.tile):
            self._update(int(tile))

    def _update(self, tile: int) -> None:
        """Update one tile: its power and cost; for its slots the size and power of their channel and of the other ones."""
        first = tile * self.width
        size, power = (a[first : first + self.width] for a in (self.size, self.power))
        self.total[tile] = power.sum(axis=0)
        self.cost[tile] = size.max(axis=0) ** 2 @ self.total[tile]
        size, power, load = size[:, self.rows], power[:, self.rows], self.total[tile, self.rows]
        slots = np.flatnonzero(self.tile == tile)
        inside = self.at[slots] - first
        self.own[:, slots], self.weight[:, slots] = size[inside].T, power[inside].T
        self.rest[:, slots], self.load[:, slots] = _others(size.T)[:, inside], (load - power[inside]).T
        self.before[slots] = size.max(axis=0) ** 2 @ load

    def offers(self, slot: int) -> Array:
        """Change of the cost, on some rows, when the channel in a slot is swapped with each other one [channels]."""
        here = np.maximum(self.rest[:, slot, None], self.own)
        here *= here
        here *= self.weight + self.load[:, slot, None]
        there = np.maximum(self.rest, self.own[:, slot, None])
        there *= there
        there *= self.load + self.weight[:, slot, None]
        here += there
        change: Array = here.sum(axis=0) - self.before - self.before[slot]
        change[self.tile == self.tile[slot]] = 0.0
        return change

    def gain(self, slot: int, other: int) -> float:
        """Change of the whole cost when two slots are swapped."""
        if self.tile[slot] == self.tile[other]:
            return 0.0
        change = -self.cost[self.tile[slot]] - self.cost[self.tile[other]]
        for old, new in ((self.at[slot], self.at[other]), (self.at[other], self.at[slot])):
            tile = old // self.width
            size = self.size[tile * self.width : (tile + 1) * self.width].copy()
            size[old - tile * self.width] = self.size[new]
            change += size.max(axis=0) ** 2 @ (self.total[tile] - self.power[old] + self.power[new])
        return float(change)

    def swap(self, slot: int, other: int) -> None:
        """Swap the channels of two slots."""
        a, b = self.at[slot], self.at[other]
        for values in (self.size, self.power):
            values[[a, b]] = values[[b, a]]
        for tile in {self.tile[slot], self.tile[other]}:
            self._update(int(tile))


def _others(part: Array) -> Array:
    """For each element the largest of the other elements of its row; 0 if there are none."""
    if part.shape[1] == 1:
        return np.zeros_like(part)
    two = np.partition(part, -2, axis=1)[:, -2:]
    return np.where(part == two[:, 1:], two[:, :1], two[:, 1:])
