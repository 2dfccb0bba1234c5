"""Gram-weighted scales: the scale of each row by the output error it causes."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.gram import Grid, row_loss
from onnxq_plugins.spec import Array

# Factors on the scale that just covers the largest weight: 27 in all, the whole range among them.
COARSE = np.linspace(0.36, 1.0, 9)
FINE = np.linspace(-0.07, 0.07, 18)  # around the best coarse one
_WIDE = 512  # inputs from which on the diagonal chooses
_AT_ONCE = 2**18  # weights in a piece
POWERS = np.array([0.125, 0.25, 0.5, 1.0])  # keep a power of two one


def scale_losses(w: Array, h: Array, step: Array, grid: Grid, factors: Array) -> Array:
    """Loss of each row, rounded to the nearest, with its step times each factor.

    w, h, step, grid   as for `gptq`; h may be the diagonal of the Gram matrix alone [g, 1, D]
    factors            [F], or one for each row [F, g, O]

    Returns [F, g, O].
    """
    w32, h32 = w.astype(np.float32, copy=False), h.astype(np.float32, copy=False)
    size = np.broadcast_to(np.asarray(step, np.float32), (*w.shape[:2], np.shape(step)[-1] if np.ndim(step) else 1))
    losses = np.empty((len(factors), *w.shape[:2]))
    rows = max(1, _AT_ONCE // w[:, 0].size)
    for at in (slice(first, first + rows) for first in range(0, w.shape[1], rows)):  # few rows at once: they stay in cache
        for loss, factor in zip(losses, np.asarray(factors, np.float32), strict=True):
            own = size[:, at] * (factor[:, at, None] if factor.ndim else factor)
            error = w32[:, at] / own
            np.clip(np.rint(error, out=error), *grid, out=error)
            error *= own
            np.subtract(w32[:, at], error, out=error)
            if h.shape[1] == w.shape[2]:
                loss[:, at] = row_loss(error, h32)
            else:
                loss[:, at] = (np.square(error, out=error) @ h32.swapaxes(1, 2))[:, :, 0]
    return losses


def search_scales(w: Array, h: Array, step: Array, grid: Grid, share: Array, factors: Array | None = None) -> Array:
    """Factor on the step of each row [g, O] with the least output error, out of 27 in [0.29, 1.07]: nine coarse ones, then
    eighteen around the best. The factor 1 is among them, so the loss does not rise.

    share     equal numbers [g, O], from 0 on, for rows that must have the same factor; h is one matrix per group of w
    factors   other candidates [F], 1 among them

    Exact for one scale a row, since the loss separates by rows. Of many inputs, where each candidate would be a large
    product, the diagonal of h decides: rounding errors of many weights hardly correlate, and codes that GPTQ finds end with
    the same loss. Source: the mean squared error grid in Gram form (AIMET's sequential MSE does the same on data).
    """
    count = int(share.max()) + 1
    h = np.einsum("gdd->gd", h)[:, None] if h.shape[1] > _WIDE else h

    def best(factors: Array) -> tuple[Array, Array]:
        losses = scale_losses(w, h, step, grid, factors)
        total = np.stack([np.bincount(share.reshape(-1), row.reshape(-1), count) for row in losses])
        at = total.argmin(axis=0)
        each = np.broadcast_to(factors.reshape(len(factors), *(1,) * (3 - factors.ndim), *factors.shape[1:]), losses.shape)
        return np.take_along_axis(each, at[share][None], axis=0)[0], total.min(axis=0)[share]

    if factors is not None:
        return best(factors)[0]
    coarse, least = best(COARSE)
    fine, less = best(coarse[None] + FINE[:, None, None])
    return np.where(less < least, fine, coarse)
