"""Outputs that hold two things: boxes beside scores, a state h beside a state c. Pooled over all of it, an SQNR is that of
the larger one, and the other may be lost unseen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxq_plugins.measure.arrays import energies, leaves
from onnxq_plugins.spec import Array

Part = tuple[slice, ...]
_APART = 12.0  # dB between the powers of two runs of channels
_SEVERAL = 4  # feeds
_NOTHING = 1e-12  # power of a part relative to the other one, below which it is none


def parts(values: Sequence[Any]) -> list[Part]:
    """Where the values of one output (one per feed) fall into two parts: along one axis, each part is a run of channels, and
    all channels of one are at least 12 dB stronger than all of the other. One part, of all, otherwise. The first axis counts
    where there are several feeds: what differs in all of them is no batch."""
    whole: list[Part] = [()]
    arrays = [leaf for value in values for leaf in leaves(value)]
    if len(arrays) != len(values) or not arrays or len({a.ndim for a in arrays}) > 1 or not all(a.size for a in arrays):
        return whole
    first = 0 if len(arrays) >= _SEVERAL else 1
    found = [cut for axis in range(first, arrays[0].ndim) if (cut := _cut(arrays, axis)) is not None]
    if not found:
        return whole
    _, axis, at = max(found)
    before = (slice(None),) * axis
    return [(*before, slice(None, at)), (*before, slice(at, None))]


def part_energies(reference: Sequence[Any], other: Sequence[Any], part: Part) -> Array:
    """`arrays.energies` of a part."""
    if not part:
        return energies(list(reference), list(other))
    cut = [np.asarray(y)[part] for y in reference], [np.asarray(z)[part] for z in other]
    return energies(*cut)


def part_name(output: str, part: Part) -> str:
    """A part in words, as numpy would index it."""
    ends = ", ".join(":" if s == slice(None) else f"{s.start or ''}:{'' if s.stop is None else s.stop}" for s in part)
    return f"{output}[{ends}]" if part else output


def _cut(arrays: Sequence[Array], axis: int) -> tuple[float, int, int] | None:
    """(gap in dB, axis, first channel of the second part), None if the channels along an axis are one thing."""
    if len({a.shape[axis] for a in arrays}) > 1 or arrays[0].shape[axis] < 2:
        return None
    power = np.zeros(arrays[0].shape[axis])
    for a in arrays:
        values = np.where(np.isfinite(a), a, 0).astype(np.float64)
        power += np.square(values).sum(axis=tuple(n for n in range(a.ndim) if n != axis))
    if not power.max() > 0:
        return None
    decibels = 10 * np.log10(np.maximum(power / power.max(), 1e-30))
    low, high = np.minimum.accumulate(decibels), np.maximum.accumulate(decibels)  # of the channels up to each
    after_low, after_high = np.minimum.accumulate(decibels[::-1])[::-1], np.maximum.accumulate(decibels[::-1])[::-1]
    gaps = np.maximum(low[:-1] - after_high[1:], after_low[1:] - high[:-1])
    at = int(gaps.argmax()) + 1
    weaker = min(power[:at].sum(), power[at:].sum())
    if gaps[at - 1] < _APART or weaker < _NOTHING * power.sum():
        return None
    return float(gaps[at - 1]), axis, at
