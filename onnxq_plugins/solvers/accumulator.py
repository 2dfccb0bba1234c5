"""Accumulators of integer kernels: how wide they must be for given codes, and codes that fit a given width.

An integer kernel adds products of weight codes and input codes, q_i x_i, in any order. With x_i anywhere in [low, high],
low <= 0 <= high, no partial sum of a row is outside

    [low * positive - high * negative, high * positive - low * negative]

where `positive` is the sum of the row's positive codes and `negative` that of the magnitudes of its negative ones; both ends
are reached by an input (`worst_inputs`). The bias is not counted: kernels add it, and zero points, after the sum.

Arrays are rows of codes: [..., D], reduced along the last axis. Source: A2Q (arXiv 2308.13504), A2Q+ (arXiv 2401.10432).
"""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.descent import Room, descent
from onnxq_plugins.solvers.gram import Grid, narrow, widen
from onnxq_plugins.spec import Array

PAIR = 128  # two codes whose sum is larger saturate int16 when both inputs are 255: 255 * 129 > 2^15 - 1


def sums(codes: Array) -> tuple[Array, Array]:
    """Sum of the positive codes, and of the magnitudes of the negative ones, of each row: int64 [...]."""
    positive = np.maximum(codes, 0).sum(axis=-1, dtype=np.int64)
    return positive, positive - codes.sum(axis=-1, dtype=np.int64)


def width(codes: Array, inputs: Grid = (0, 255)) -> Array:
    """Bits of the smallest signed accumulator in which no partial sum of a row overflows, for any order and input [...].

    codes    integer codes [..., D] as the kernel sees them: times their multipliers
    inputs   smallest and largest input code, with 0 between them: (0, 255) or (-128, 127)

    Exact: one bit less overflows for `worst_inputs`. The bias is not counted. Cost: two passes over the codes.
    """
    low, high = inputs
    positive, negative = sums(codes)
    top, bottom = high * positive - low * negative, high * negative - low * positive
    return 1 + np.maximum(_bit_length(top), _bit_length(np.maximum(bottom - 1, 0)))


def worst_inputs(codes: Array, inputs: Grid = (0, 255)) -> tuple[Array, Array]:
    """Input codes [..., D] that give the smallest and the largest sum of each row."""
    low, high = inputs
    return np.where(codes > 0, low, high), np.where(codes > 0, high, low)


def saturates(codes: Array) -> Array:
    """True for each row in which two codes can saturate the 16-bit sums of AVX2's vpmaddubsw (u8 * s8, two adjacent codes at
    a time). Which codes are adjacent depends on the kernel, so any two of the row count."""
    if codes.shape[-1] < 2:
        return np.zeros(codes.shape[:-1], bool)
    ends = np.partition(codes, (1, -2) if codes.shape[-1] > 2 else 1, axis=-1).astype(np.int64)
    lowest, highest = np.minimum(ends[..., :2], 0).sum(axis=-1), np.maximum(ends[..., -2:], 0).sum(axis=-1)
    return np.asarray((highest > PAIR) | (lowest < -PAIR))


def limit_of(bits: int, high: int = 255) -> int:
    """Largest sum of a row's positive, and of its negative, codes in a signed accumulator of `bits`, with unsigned inputs up
    to `high`: (2^(bits-1) - 1) / high, rounded down. Exact for both, since high = 2^N - 1 does not divide 2^(bits-1)."""
    return int(2 ** (bits - 1) - 1) // high


def within(codes: Array, limit: int) -> Array:
    """True for each row [...] whose positive and whose negative codes sum to `limit` at most."""
    positive, negative = sums(codes)
    return np.asarray(np.maximum(positive, negative) <= limit)


def project(x: Array, limit: float) -> Array:
    """The nearest rows [..., D] whose positive and whose negative entries sum to `limit` at most, in the Euclidean sense.

    Both halves of a row are projected on the simplex separately: a threshold, found by sorting, is subtracted from every
    entry above it. Cost: two sorts.
    """
    return _on_simplex(np.maximum(x, 0.0), limit) - _on_simplex(np.maximum(-x, 0.0), limit)


def bounded(w: Array, h: Array, step: Array, grid: Grid, limit: int, sweeps: int = 10) -> Array:
    """Codes [g, O, D] with a small loss whose positive and whose negative codes each sum to `limit` at most in every row.

    w, step, grid   as for `gptq`
    h               Gram matrices [g, D, D], or the blocks on their diagonals (see `narrow`)
    limit           see `limit_of`. For unsigned inputs this is the exact condition; it contains A2Q's bound on the sum of
                    all magnitudes and, for rows that sum to 0, A2Q+'s
    sweeps          of coordinate descent at most

    Rows are projected and rounded toward zero; the steps that this frees are spent one by one on the code that gains most,
    and coordinate descent within the limit follows. With h the identity and equal steps the result is optimal: projection
    keeps the largest gains, and the remaining ones are taken in order. Rows below the limit get coordinate descent alone.
    With diagonal blocks each block gets its own share of the limit.

    Source: A2Q with our own spending in place of training. Cost: at most O D^2 on top of `descent`, for limited rows.
    """
    size, exact = np.broadcast_to(step, w.shape), np.clip(w / step, *grid)
    near = project(exact, limit)
    pieces, parts = len(h) // len(w), narrow(near, h)
    limits = (_shares(np.maximum(parts, 0.0), pieces, limit), _shares(np.maximum(-parts, 0.0), pieces, limit))
    codes, target, steps = np.trunc(parts), narrow(w, h), narrow(size, h, 1.0)
    tight = np.repeat((near != exact).any(axis=2), pieces, axis=0)
    codes[tight] = _spend(target, h, steps, codes, limits, grid, tight)
    return widen(descent(target, h, steps, grid, start=codes, sweeps=sweeps, limits=limits), w.shape)


def _spend(w: Array, h: Array, step: Array, codes: Array, limits: tuple[Array, Array], grid: Grid, which: Array) -> Array:
    """Codes of the rows `which` after steps of one, each the one that lowers the row's loss most: [rows, D]."""
    group = np.nonzero(which)[0]
    size, rows = step[which], codes[which]
    slope = ((w - step * codes) @ h)[which]
    power = np.einsum("gdd->gd", h)[group] * size**2
    room = Room(rows[:, :, None], (limits[0][which][:, None], limits[1][which][:, None]))
    active = np.arange(len(rows))
    for _ in range(rows.shape[1]):
        toward, now = np.sign(slope[active]), rows[active]
        left = np.where(toward > 0, room.up[active], room.down[active])
        allowed = (toward * now < 0) | ((left >= 1) & (now + toward <= grid[1]) & (now + toward >= grid[0]))
        gain = np.where(allowed, 2 * np.abs(slope[active]) * size[active] - power[active], 0.0)
        at = gain.argmax(axis=1)
        gains = gain[np.arange(len(at)), at] > 0
        active, at, toward = active[gains], at[gains], toward[gains]
        if not len(active):
            break
        old, move = rows[active, at], toward[np.arange(len(at)), at]
        rows[active, at] = old + move
        room.up[active, 0] += np.maximum(old, 0) - np.maximum(old + move, 0)
        room.down[active, 0] += np.maximum(-old, 0) - np.maximum(-old - move, 0)
        slope[active] -= h[group[active], at] * (move * size[active, at])[:, None]
    return rows


def _shares(half: Array, pieces: int, limit: int) -> Array:
    """The limit of each block of a row [g * pieces, O]: what its projection [g * pieces, O, B] uses, plus an equal part of
    the rest."""
    used = half.sum(axis=2)
    whole = used.reshape(-1, pieces, used.shape[1])
    left = np.maximum(limit - whole.sum(axis=1, keepdims=True), 0.0)
    shares: Array = np.floor(whole + left / pieces + 1e-9).reshape(used.shape)
    return shares


def _on_simplex(x: Array, limit: float) -> Array:
    """Rows of non-negative numbers [..., D], projected on those that sum to `limit` at most."""
    ordered = -np.sort(-x, axis=-1)
    threshold = (np.cumsum(ordered, axis=-1) - limit) / np.arange(1, x.shape[-1] + 1)
    count = np.maximum((ordered > threshold).sum(axis=-1, keepdims=True), 1)
    cut = np.maximum(np.take_along_axis(threshold, count - 1, axis=-1), 0.0)
    return np.where(x.sum(axis=-1, keepdims=True) > limit, np.maximum(x - cut, 0.0), x)


def _bit_length(numbers: Array) -> Array:
    """Bits of non-negative integers below 2^53."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)
