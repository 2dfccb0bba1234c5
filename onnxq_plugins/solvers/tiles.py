"""Scales of tiles: one step per tile of rows and inputs, chosen by the output error it causes.

The inputs of a weight [g, O, D] are divided into n runs of `width` (the last may be shorter), its rows into bands; a tile is
one run of one band. The step of a row in a tile is the row's `unit` times one of a few `choices`: factors for free scales,
integers or powers of two for integer multipliers. So one search serves all kinds of scales.

The Gram matrix couples the runs of a row. Without that coupling each tile can be optimized alone (`alone`); coordinate
descent on the whole matrix (`descend`) starts from there and never increases the loss.

Descent assumes rounding to the nearest: it gains much there, and costs learned codes a little, so `round` leaves it out for
them. Units are chosen on losses looked up at steps a tenth of an octave apart, multipliers then exactly. The largest
multiplier is 15 by default, not 18, which halves their size on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxq_plugins.solvers.gram import Grid, row_loss
from onnxq_plugins.spec import Array

FREE = np.r_[np.linspace(0.3, 1.0, 29), 1.025, 1.05]  # factors on the step that covers a tile's largest weight
UNITS = np.linspace(0.45, 1.05, 13)  # factors on the unit whose largest multiplier covers a row's largest weight
_OCTAVE = 10
_AT_ONCE = 2**16  # weights in a piece
_WIDE = 512  # inputs from which on runs are not coupled before descent
_KNOWN = np.arange(-24, 41)  # tenths of an octave from the covering step at which losses are computed


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of a weight [g, O, D].

    bands   number of the band of each row [g, O], from 0 on
    width   inputs in a run
    grid    smallest and largest code
    """

    bands: Array
    width: int
    grid: Grid

    @property
    def count(self) -> int:
        """Number of bands."""
        return int(self.bands.max()) + 1

    @cached_property
    def _order(self) -> tuple[Array, Array]:
        """The rows band by band, and where each band begins."""
        flat = self.bands.reshape(-1)
        order = np.argsort(flat, kind="stable")
        return order, np.searchsorted(flat[order], np.arange(self.count))

    def runs(self, w: Array) -> Array:
        """[g, O, D] -> [g, n, O, width] float32, zeros at the end."""
        g, rows, size = w.shape
        wide = np.zeros((g, rows, -(-size // self.width) * self.width), np.float32)
        wide[:, :, :size] = w
        return np.ascontiguousarray(wide.reshape(g, rows, -1, self.width).swapaxes(1, 2))

    def summed(self, rows: Array) -> Array:
        """Sums over the rows of each band: [g, O, n] -> [bands, n]."""
        order, first = self._order
        return np.asarray(np.add.reduceat(rows.reshape(self.bands.size, -1)[order], first, axis=0))

    def covering(self, need: Array, choices: Array) -> Array:
        """Number of the smallest choice [bands, n] not below the need of any row [g, O, n]; the last if all are below."""
        order, first = self._order
        most = np.maximum.reduceat(need.reshape(self.bands.size, -1)[order], first, axis=0)
        return np.minimum(np.searchsorted(choices, most * (1 - 1e-6)), len(choices) - 1)

    def quantized(self, w: Array, step: Array) -> Array:
        """Weights rounded to the nearest multiple of `step`, which broadcasts to them, within the grid."""
        return np.asarray(step * np.clip(np.rint(w / step), *self.grid))

    def steps(self, unit: Array, size: int) -> Array:
        """One value per run [g, O, n] as one per input [g, O, D]."""
        return np.repeat(unit, self.width, axis=2)[:, :, :size]


def search_free(
    w: Array, h: Array | None, blocks: Array | None, tiles: Tiles, cover: Array, factors: Array, rounds: int
) -> Array:
    """Step of each tile [bands, n] with the least output error, out of `cover` times each factor.

    w        weights [g, O, D]
    h        Gram matrix [g, D, D]; one with other groups (diagonal blocks of a wide layer) is not used
    blocks   its diagonal blocks [g, n, width, width]; None for the identity: the error of the weights themselves
    cover    steps that cover each tile's largest weight [bands, n]
    factors  [F], 1 among them
    rounds   of coordinate descent at most

    No band of rows ends with more loss than with `cover`. Without descent that is said of each run alone where inputs are
    many: rounding errors of many weights hardly correlate, and each comparison would be a large product. Source: PTQ-SL
    (arXiv 2110.07809) in Gram form.
    """
    unit = cover[tiles.bands]
    pick = np.stack([tiles.summed(one) for one in alone(w, blocks, unit, factors, tiles)]).argmin(axis=0)
    if h is not None and len(h) == len(w) and (rounds or w.shape[2] <= _WIDE):
        covering = np.full(pick.shape, int(np.abs(factors - 1).argmin()))
        pick = _better(w, h, unit, factors, pick, covering, tiles)
        pick = descend(w, h, unit, factors, pick, tiles, rounds)
    return np.asarray(cover * factors[pick])


def search_multipliers(
    w: Array, h: Array | None, blocks: Array | None, tiles: Tiles, unit: Array, choices: Array, share: Array, rounds: int
) -> tuple[Array, Array]:
    """Factor on each row's unit [g, O] and multiplier of each tile [bands, n] with the least output error.

    unit      step of multiplier 1 [g, O] whose largest multiplier covers the row
    choices   multipliers, ascending
    share     equal numbers [g, O] for rows that must have the same factor; those of a band do

    The others as for `search_free`. Units are compared by losses that are looked up at the nearest known step; the
    multipliers of the best unit are then searched exactly. With the whole `h`, and descent or few inputs, rows that share a
    factor end with no more loss than with factor 1 and the smallest multipliers that cover each tile.
    """
    own = np.zeros(tiles.count, np.int64)  # share of each band
    own[tiles.bands.reshape(-1)] = share.reshape(-1)
    factor = _unit_factors(w, blocks, tiles, unit, choices, own)
    plain = np.repeat(unit[..., None], -(-w.shape[2] // tiles.width), axis=2)
    scaled = plain * factor[share][..., None]
    pick = np.stack([tiles.summed(one) for one in alone(w, blocks, scaled, choices, tiles)]).argmin(axis=0)
    if h is not None and len(h) == len(w) and (rounds or w.shape[2] <= _WIDE):
        covering = tiles.covering(_largest(w, tiles) / plain, choices)
        losses = [np.bincount(own, _losses(w, h, u, choices, one, tiles)) for u, one in ((scaled, pick), (plain, covering))]
        worse = losses[0] > losses[1]
        factor, pick = np.where(worse, 1.0, factor), np.where(worse[own][:, None], covering, pick)
        pick = descend(w, h, plain * factor[share][..., None], choices, pick, tiles, rounds)
    return factor[share], choices[pick]


def _unit_factors(w: Array, blocks: Array | None, tiles: Tiles, unit: Array, choices: Array, own: Array) -> Array:
    """Factor on the unit of each share of rows [shares], with the best multiplier for each tile. Losses are computed at
    steps a tenth of an octave apart; each pair of unit and multiplier looks up the nearest of them."""
    cover = np.maximum(_largest(w, tiles), 1e-3 * unit[..., None])
    known = alone(w, blocks, cover, 2.0 ** (_KNOWN / _OCTAVE), tiles)
    start = np.log2(unit[..., None] / cover) * _OCTAVE - _KNOWN[0]  # position of multiplier 1 among the known
    shares = int(own.max()) + 1
    least, factor = np.full(shares, np.inf), np.ones(shares)
    for u in UNITS[::-1]:
        best = np.full((tiles.count, cover.shape[2]), np.inf)
        for m in choices:
            at = np.clip(np.rint(start + _OCTAVE * np.log2(u * m)), 0, len(_KNOWN) - 1).astype(np.intp)
            best = np.minimum(best, tiles.summed(np.take_along_axis(known, at[None], axis=0)[0]))
        loss = np.bincount(own, best.sum(axis=1), shares)
        factor, least = np.where(loss < least, u, factor), np.minimum(loss, least)
    return factor


def alone(w: Array, blocks: Array | None, unit: Array, choices: Array, tiles: Tiles) -> Array:
    """For each choice the loss of each run alone, with the step unit [g, O, n] times the choice: [F, g, O, n]."""
    runs, h = tiles.runs(w), None if blocks is None else blocks.astype(np.float32)
    step = np.ascontiguousarray(unit.swapaxes(1, 2))[..., None].astype(np.float32)
    losses = np.empty((len(choices), *unit.shape), np.float32)
    count = max(1, _AT_ONCE // runs[:, 0].size)
    for at in (slice(first, first + count) for first in range(0, runs.shape[1], count)):  # few at once: they stay in cache
        part, own, block = runs[:, at], step[:, at], None if h is None else h[:, at]
        for loss, choice in zip(losses, np.asarray(choices, np.float32), strict=True):
            error = part - tiles.quantized(part, own * choice)
            each = np.einsum("gnow,gnow->gno", error if block is None else error @ block, error)
            loss[:, :, at] = each.swapaxes(1, 2)
    return losses


def descend(w: Array, h: Array, unit: Array, choices: Array, pick: Array, tiles: Tiles, rounds: int) -> Array:
    """Better choices [bands, n] than `pick` by coordinate descent on the loss of whole rows, rounded to the nearest.

    With the other tiles fixed, and E the change of a tile's rounded weights, the loss changes by -2 E G + E H E with
    G = (w - q) H. The tiles of one run are chosen together, since rows do not interact.
    """
    if not rounds:
        return pick
    pick, size = pick.copy(), w.shape[2]
    w, h, factors = w.astype(np.float32), h.astype(np.float32), np.asarray(choices, np.float32)
    unit = unit.astype(np.float32)
    q = tiles.quantized(w, tiles.steps(unit * factors[pick[tiles.bands]], size))
    slope = (w - q) @ h
    bands = np.arange(tiles.count)
    for _ in range(rounds):
        before = pick.copy()
        for run in range(pick.shape[1]):
            at = slice(run * tiles.width, min((run + 1) * tiles.width, size))
            part, block, old, lean = w[:, :, at], h[:, at, at], q[:, :, at], 2 * slope[:, :, at]
            step = unit[:, :, run, None]
            gain = np.empty((len(factors), tiles.count))
            for change_of_loss, factor in zip(gain, factors, strict=True):
                change = tiles.quantized(part, step * factor) - old
                change_of_loss[...] = tiles.summed(np.einsum("gow,gow->go", change @ block - lean, change)[..., None])[:, 0]
            now, best = gain[pick[:, run], bands], gain.argmin(axis=0)
            wins = gain[best, bands] < now - 1e-6 * np.abs(gain).max(axis=0)
            if wins.any():
                pick[wins, run] = best[wins]
                change = tiles.quantized(part, step * factors[pick[:, run]][tiles.bands][..., None]) - old
                q[:, :, at] += change
                slope -= change @ h[:, at, :]
        if np.array_equal(pick, before):
            break
    return pick


def diagonal_runs(h: Array, groups: int, size: int, width: int) -> Array:
    """Blocks of `width` on the diagonal of Gram matrices, [g, n, width, width], padded with 0.

    h   [groups, size, size], or its own diagonal blocks [groups * pieces, B, B] (see `Gram`), with 0 outside of them
    """
    pieces, inner = len(h) // groups, h.shape[1]
    n = -(-size // width)
    runs = np.zeros((groups, n, width, width))
    whole = h.reshape(groups, pieces, inner, inner)
    for run in range(n):
        first, last = run * width, min((run + 1) * width, size)
        for piece in range(first // inner, (last - 1) // inner + 1):
            a, b = max(first, piece * inner), min(last, (piece + 1) * inner)
            here, there = slice(a - first, b - first), slice(a - piece * inner, b - piece * inner)
            runs[:, run, here, here] = whole[:, piece, there, there]
    return runs


def _better(w: Array, h: Array, unit: Array, choices: Array, pick: Array, other: Array, tiles: Tiles) -> Array:
    """`pick` [bands, n], with `other` in the bands whose rows have less loss with it."""
    losses = [_losses(w, h, unit, choices, one, tiles) for one in (pick, other)]
    return np.where((losses[0] <= losses[1])[:, None], pick, other)


def _losses(w: Array, h: Array, unit: Array, choices: Array, pick: Array, tiles: Tiles) -> Array:
    """Loss of each band [bands]."""
    step = tiles.steps(unit * choices[pick[tiles.bands]], w.shape[2])
    return tiles.summed(row_loss(w - tiles.quantized(w, step), h)[..., None])[:, 0]


def _largest(w: Array, tiles: Tiles) -> Array:
    """Step that covers each row's run [g, O, n]."""
    return np.asarray(np.abs(tiles.runs(w)).max(axis=3).swapaxes(1, 2) / tiles.grid[1])
