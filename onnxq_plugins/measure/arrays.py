"""How far two values of an output are apart, whatever kind of value that is.

An output is one array, or a list with one value per feed, as `runtimes.per_feed` returns: values of unlike feeds may differ
in shape, and sequences, maps and optionals are no arrays at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxq_plugins.spec import Array

IDENTICAL = 200.0  # dB that stand for equality: larger ratios are cut to it
_WORST = 0.05  # share of the feeds that `worst_decibels` is about
_DRAWS, _TAIL = 400, 0.05  # of `lower_decibels`


def leaves(value: Any) -> list[Array]:
    """The arrays in an output's value for one feed: itself; those of a sequence one after the other; the values of a map in
    the order of its keys, and of several maps with the same keys as one array [maps, keys]; none for an empty optional."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [np.asarray([value[key] for key in sorted(value)])]
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, Mapping) and item.keys() == value[0].keys() for item in value):
            return [np.asarray([[item[key] for key in sorted(item)] for item in value])]
        if all(isinstance(item, (str, bytes, bool, int, float)) for item in value):
            return [np.asarray(value)] if value else []
        return [leaf for item in value for leaf in leaves(item)]
    return [np.asarray(value)]


def values_of(output: Any) -> Sequence[Any]:
    """The values of an output per feed; an array is the value of a single one."""
    return output if isinstance(output, list) else [output]


def is_float(output: Any) -> bool:
    """True if all that is in an output are floats, so that it is judged by its noise."""
    kinds = {leaf.dtype.kind for value in values_of(output) for leaf in leaves(value)}
    return kinds == {"f"}


def alike(y: Any, z: Any) -> bool:
    """True if the arrays of two values have the same shapes."""
    return [a.shape for a in leaves(y)] == [a.shape for a in leaves(z)]


def pairs(reference: Any, other: Any) -> Iterator[list[tuple[Array, Array | None]]]:
    """For each feed, each array of the reference with the one beside it; with None where their shapes differ."""
    for y, z in zip(values_of(reference), values_of(other), strict=True):
        yield list(zip(leaves(y), leaves(z), strict=True)) if alike(y, z) else [(a, None) for a in leaves(y)]


def energies(reference: Any, other: Any) -> Array:
    """Signal and noise of each feed, float64 [feeds, 2]: sum y^2 and sum (y - z)^2.

    Where y is NaN or infinite nothing is compared: the reference itself overflows there. Where z alone is, the noise is
    infinite. Of a feed whose shapes differ nothing is left: its noise is its signal.
    """
    rows = []
    for feed in pairs(reference, other):
        signal = noise = 0.0
        for y, z in feed:
            kept = np.isfinite(y)
            whole = bool(kept.all())  # nearly always, and then no copies are needed
            exact = (y if whole else np.where(kept, y, 0)).astype(np.float64)
            energy = float(np.square(exact).sum())
            signal += energy
            if z is None:
                noise += energy
            elif not np.isfinite(z if whole else z[kept]).all():
                noise = float("inf")
            else:
                noise += float(np.square(exact - (z if whole else np.where(kept, z, 0))).sum())
        rows.append((signal, noise))
    return np.array(rows, np.float64).reshape(-1, 2)


def errors(reference: Any, other: Any) -> list[Array]:
    """z - y of each array of an output, float64; for integers, booleans and strings 1 where they differ. What is NaN or
    infinite in z counts as lost, as 0 in its place; so does all of an array whose shape differs. Where y is, nothing is
    compared."""
    found = []
    for feed in pairs(reference, other):
        for y, z in feed:
            if y.dtype.kind != "f":
                found.append(np.ones(y.shape) if z is None else (y != z).astype(np.float64))
                continue
            kept = np.isfinite(y)
            exact = np.where(kept, y, 0).astype(np.float64)
            lost = np.zeros_like(exact) if z is None else np.where(kept & np.isfinite(z), z, 0)
            found.append(lost - exact)
    return found


def decibels(energy: Array) -> float:
    """10 log10(all signal / all noise) of rows of signal and noise, between -`IDENTICAL` and `IDENTICAL`; the latter without
    any signal, of which nothing can be lost."""
    signal, noise = (float(total) for total in np.reshape(energy, (-1, 2)).sum(axis=0))
    if signal <= 0:
        return IDENTICAL
    if not np.isfinite(noise):
        return -IDENTICAL
    return float(np.clip(10 * np.log10(signal / max(noise, signal * 10 ** (-IDENTICAL / 10))), -IDENTICAL, IDENTICAL))


def worst_decibels(energy: Array) -> float:
    """`decibels` of the worst 5 % of the feeds, one at least."""
    ratio = np.array([decibels(row) for row in energy])
    return decibels(energy[np.argsort(ratio, kind="stable")[: -int(-len(ratio) * _WORST // 1)]])


def lower_decibels(energy: Array) -> float:
    """SQNR in dB that other samples have with a probability of 95 %, by the bootstrap (Efron, Ann. Statist. 7, 1979): the
    5 % quantile of what is pooled over samples drawn anew with replacement. Where one sample holds most of the signal, as a
    single face among pictures does, that is what the others have without it.

    energy   signal and noise of each sample, [samples, 2]
    """
    draws = np.random.default_rng(0).integers(len(energy), size=(_DRAWS, len(energy)))
    return float(np.quantile([decibels(row) for row in energy[draws].sum(axis=1)], _TAIL))


def sqnr(reference: Any, other: Any) -> float:
    """Signal to quantization noise of an output in dB, pooled over all values of all feeds:
    10 log10(sum y^2 / sum (y - z)^2).

    A mean of decibels per sample would let a few samples without any noise, at `IDENTICAL` dB each, hide all others.
    """
    return decibels(energies(reference, other))


def agreement(reference: Any, other: Any, axis: int | None = -1) -> float:
    """Share (0..1) of the positions whose largest value along an axis is at the same index; with None of equal elements, for
    integers, booleans and strings. Arrays whose shapes differ share nothing."""
    same = total = 0
    for feed in pairs(reference, other):
        for y, z in feed:
            answers = y if axis is None else np.argmax(y, axis=axis)
            total += answers.size
            if z is not None:
                same += int(np.sum(answers == (z if axis is None else np.argmax(z, axis=axis))))
    return same / total if total else 1.0


def drift(reference: Sequence[Any], other: Sequence[Any]) -> float:
    """Largest difference over all outputs, relative to each output's largest magnitude; infinite if one is not finite where
    the reference is, if a shape differs, or a string."""
    return max((_drift(a, b) for a, b in zip(reference, other, strict=True)), default=0.0)


def _drift(reference: Any, other: Any) -> float:
    largest, difference = 1e-30, 0.0
    for feed in pairs(reference, other):
        for y, z in feed:
            if z is None:
                return float("inf")
            if y.dtype.kind not in "fiub":
                difference = difference if (y == z).all() else float("inf")
                continue
            kept = np.isfinite(y)
            exact = np.where(kept, y, 0).astype(np.float64)
            largest = max(largest, float(np.max(np.abs(exact), initial=0.0)))
            apart = float(np.max(np.abs(exact - np.where(kept, z, 0)), initial=0.0))
            difference = max(difference, apart if np.isfinite(apart) else float("inf"))
    return difference / largest
