"""Gram-weighted scales: the scale of each row by the output error it causes."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.gram import Grid, row_loss
from onnxq_plugins.spec import Array

# Factors on the scale that just covers the largest weight: 27 in all, the whole range among them.
COARSE = np.linspace(0.36, 1.0, 9)
FINE = np.linspace(-0.07, 0.07, 18)  # around the best coarse one
POWERS = np.array([0.125, 0.25, 0.5, 1.0])  # keep a power of two one


def scale_losses(w: Array, h: Array, step: Array, grid: Grid, factors: Array) -> Array:
    """Loss of each row, rounded to the nearest, with its step times each factor.

    w, h, step, grid   as for `gptq`
    factors            [F], or one for each row [F, g, O]

    Returns [F, g, O].
    """
    w32, h32 = w.astype(np.float32), h.astype(np.float32)
    s32 = np.asarray(step, np.float32)
    losses = np.empty((len(factors), *w.shape[:2]))
    for loss, factor in zip(losses, np.asarray(factors, np.float32), strict=True):
        size = s32 * (factor[..., None] if factor.ndim else factor)
        loss[...] = row_loss(w32 - size * np.clip(np.rint(w32 / size), *grid), h32)
    return losses


def search_scales(w: Array, h: Array, step: Array, grid: Grid, share: Array, factors: Array | None = None) -> Array:
    """Factor on the step of each row [g, O] with the least output error, out of 27 in [0.29, 1.07]: nine coarse ones, then
    eighteen around the best. The factor 1 is among them, so the loss does not rise.

    share     equal numbers [g, O], from 0 on, for rows that must have the same factor; h is one matrix per group of w
    factors   other candidates [F], 1 among them

    Exact for one scale a row, since the loss separates by rows. Source: the mean squared error grid in Gram form
    (AIMET's sequential MSE does the same on data).
    """
    count = int(share.max()) + 1

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
