"""Which channels of a tensor should have grids of their own.

On a grid with steps s, rounding adds noise of variance N = s^2 / 12 to each channel. It hides the share

    lost_c = N / (N + V_c),   V_c = (high_c - low_c)^2 / 36

of a channel's variance V_c, estimated from a range of six standard deviations: what varies carries information, a mean does
not. The SQNR of several channels is (1 - lost) / lost with the mean of their shares.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from onnxq_plugins.spec import Array, QuantSpec, from_range

DEAD = 1e-4  # a channel that spans less of the whole range counts as constant
LEAST = (
    0.02  # a cut saves at least the variance of so many channels: not one channel out of hundreds that is a little coarse
)
MOVE = 1.25  # what a cut in the order of channels, which moves none of them, may lose more than another


class Cut(NamedTuple):
    """Two groups of channel numbers, and what the channels lose in all before and after."""

    groups: tuple[Array, Array]
    before: float
    after: float


def split_channels(low: Array, high: Array, spec: QuantSpec, gain: float, below: float, parts: int) -> list[Array]:
    """Channel numbers of up to `parts` groups, each ascending, the groups in the order of their first channel.

    low, high   range of each channel [C]
    spec        the grids of the groups: bits and symmetry
    gain        dB of SQNR that one of two groups gains where they are cut apart
    below       dB of SQNR that it has before, at most

    One cut after another: the one that saves most, between neighbouring channels or between channels sorted by range.
    """
    reach = np.maximum(high, 0) - np.minimum(low, 0)
    alive = _varies(low, high)
    groups = [np.arange(len(low))]
    while len(groups) < parts:
        cuts: dict[int, Cut] = {}
        for k, group in enumerate(groups):
            ordered = _cut(low, high, alive, group, spec, gain, below)
            cut = _cut(low, high, alive, group[np.argsort(reach[group], kind="stable")], spec, gain, below)
            if ordered is not None and (cut is None or ordered.after <= MOVE * cut.after):
                cut = ordered
            if cut is not None and cut.before - cut.after >= LEAST:
                cuts[k] = cut
        if not cuts:
            break
        k = max(cuts, key=lambda at: cuts[at].before - cuts[at].after)
        groups[k : k + 1] = cuts[k].groups
    return sorted((np.sort(group) for group in groups), key=lambda group: int(group[0]))


def runs(groups: list[Array]) -> list[Array]:
    """The runs of neighbouring channels of which groups consist, in the order of the channels."""
    several = [run for group in groups for run in np.split(group, np.flatnonzero(np.diff(group) > 1) + 1)]
    return sorted(several, key=lambda run: int(run[0]))


def group_sqnr(low: Array, high: Array, spec: QuantSpec, group: Array) -> tuple[float, float]:
    """SQNR in dB of a group of channels, of those that vary, on the grid of all channels and on one of its own."""
    shared, own = (from_range(low[some].min(), high[some].max(), spec).scale for some in (slice(None), group))
    some = group[_varies(low, high)[group]]
    some = some if len(some) else group
    before, after = (_decibel(_lost(low[some], high[some], scale)) for scale in (shared, own))
    return before, after


def _varies(low: Array, high: Array) -> Array:
    """Whether a channel is more than a constant [C]."""
    return np.asarray(high - low > DEAD * np.ptp([0.0, low.min(), high.max()]))


def _cut(low: Array, high: Array, alive: Array, order: Array, spec: QuantSpec, gain: float, below: float) -> Cut | None:
    """The cut of channels in some order that loses least, of those that pay; None if none does."""
    low, high, alive = low[order], high[order], alive[order]
    left, right = (
        np.asarray(from_range(np.minimum.accumulate(a), np.maximum.accumulate(b), spec).scale)
        for a, b in ((low, high), (low[::-1], high[::-1]))
    )
    whole = np.where(alive, _lost(low, high, left[-1]), 0.0)
    best: Cut | None = None
    for at in range(1, len(order)):
        after = np.where(
            alive, np.r_[_lost(low[:at], high[:at], left[at - 1]), _lost(low[at:], high[at:], right[-at - 1])], 0.0
        )
        if best is not None and after.sum() >= best.after:
            continue
        for side in (slice(at), slice(at, None)):
            if alive[side].any():
                old, new = (_decibel(lost[side][alive[side]]) for lost in (whole, after))
                if old < below and new - old >= gain:
                    best = Cut((order[:at], order[at:]), float(whole.sum()), float(after.sum()))
    return best


def _lost(low: Array, high: Array, scale: Array | None) -> Array:
    """The share of the variance of each channel [C] that rounding in steps of `scale` hides."""
    noise = np.asarray(scale, np.float64) ** 2 / 12
    return np.asarray(noise / (noise + (high - low) ** 2 / 36))


def _decibel(lost: Array) -> float:
    """The SQNR of channels that lose these shares, within 300 dB."""
    share = float(np.clip(lost.mean(), 1e-30, 1 - 1e-15))
    return float(10 * np.log10((1 - share) / share))
