"""Coordinate descent: move one code after another to its best level."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.gptq import BLOCK
from onnxq_plugins.solvers.gram import Grid, nearest
from onnxq_plugins.spec import Array


class Room:
    """The amounts by which the sums of each row's positive and negative codes may still grow: up, down [g, O].

    codes    [g, D, O], inputs first
    limits   of both sums [g, O]
    """

    def __init__(self, codes: Array, limits: tuple[Array, Array]) -> None:
        self.up = limits[0] - np.maximum(codes, 0).sum(axis=1)
        self.down = limits[1] - np.maximum(-codes, 0).sum(axis=1)

    def ends(self, code: Array, grid: Grid) -> tuple[Array, Array]:
        """Smallest and largest value that one code of each row may take."""
        return (np.maximum(grid[0], -self.down - np.maximum(-code, 0)), np.minimum(grid[1], self.up + np.maximum(code, 0)))

    def move(self, old: Array, new: Array) -> None:
        """Account for a change of one code of each row."""
        self.up += np.maximum(old, 0) - np.maximum(new, 0)
        self.down += np.maximum(-old, 0) - np.maximum(-new, 0)


def descent(
    w: Array,
    h: Array,
    step: Array,
    grid: Grid,
    *,
    start: Array | None = None,
    sweeps: int = 10,
    limits: tuple[Array, Array] | None = None,
) -> Array:
    """Codes [g, O, D] by coordinate descent on the layer loss, which never rises.

    w, h, step, grid   as for `gptq`
    start              codes to begin with; None: the nearest
    sweeps             at most this many passes over all inputs; ends early when one gains less than 0.2 %
    limits             largest sums of a row's positive codes, and of the magnitudes of its negative codes [g, O]; `start`
                       must satisfy them

    With the others fixed, the loss is a parabola in code i with its minimum at q_i + ((w - q) H)_i / H_ii; the level nearest
    to it is optimal. All rows move at once; the update of the rest is one BLAS call per block of columns.

    Source: COMQ (arXiv 2403.07134) in Gram form.
    """
    size = w.shape[-1]
    diagonal = np.einsum("gdd->gd", h)
    inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
    steps = np.broadcast_to(step, w.shape).swapaxes(1, 2)
    target = np.ascontiguousarray(w.swapaxes(1, 2))  # inputs first, as in `gptq.Order`
    begin = nearest(w, step, grid) if start is None else start
    codes = np.array(begin.swapaxes(1, 2), dtype=w.dtype, order="C")
    room = Room(codes, limits) if limits is not None else None
    least = np.inf
    for _ in range(sweeps):
        error = target - steps * codes
        slope = h @ error  # half the negative gradient
        loss = float(np.vdot(error, slope))
        if loss >= 0.998 * least:
            break
        least = loss
        for first in range(0, size, BLOCK):
            last = min(first + BLOCK, size)
            local, change = slope[:, first:last], np.zeros_like(slope[:, first:last])
            for i in range(first, last):
                best = codes[:, i] + local[:, i - first] * inverse[:, i, None] / steps[:, i]
                ends = room.ends(codes[:, i], grid) if room is not None else grid
                new = np.where(inverse[:, i, None] > 0, np.clip(np.rint(best), *ends), codes[:, i])
                delta = (new - codes[:, i]) * steps[:, i]
                if delta.any():
                    if room is not None:
                        room.move(codes[:, i], new)
                    codes[:, i] = new
                    local -= h[:, i, first:last, None] * delta[:, None]
                    change[:, i - first] = delta
            if last < size:
                slope[:, last:] -= h[:, last:, first:last] @ change
    return np.ascontiguousarray(codes.swapaxes(1, 2))
