"""Attention Round: a weight may move to any level, with an attention that decays like a Gaussian with the distance."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.adam import Adam
from onnxq_plugins.solvers.gram import Grid, nearest, row_loss
from onnxq_plugins.spec import Array


def attention(
    w: Array,
    h: Array,
    step: Array,
    grid: Grid,
    *,
    rng: np.random.Generator | None = None,
    tau: float = 0.5,
    steps: int = 1000,
    rate: float = 1e-2,
    attenuate: bool = True,
) -> Array:
    """Codes [g, O, D]: for each row the best of all iterates and of the nearest codes.

    w, h, step, grid   as for `gptq`
    rng                draws the first offsets from N(0, tau^2); None starts at 0
    tau                width of the attention, in steps
    steps, rate        of Adam, with a cosine decay
    attenuate          False leaves the attention out: plain straight-through learning, for comparison

    Forward: codes = clip(rint(w / step + a)). Backward: the rounding passes the gradient through, which is then
    multiplied by the probability, under the Gaussian, of being further out than a: Phi(a / tau) for an offset about to
    fall, 1 - Phi(a / tau) for one about to rise. Moves back towards w count in full, moves away less and less. The iterate
    jumps between levels, so the best codes of each row are kept.

    Source: Diao et al., Attention Round (arXiv 2207.03088).
    """
    from scipy.special import ndtr

    w32, h32 = w.astype(np.float32), h.astype(np.float32)
    s32 = np.broadcast_to(step, w.shape).astype(np.float32)
    codes = nearest(w, step, grid)
    least = row_loss(w - step * codes, h)
    total = float(least.sum())
    if tau <= 0 or total <= 1e-20 * float(row_loss(w, h).sum()):
        return codes
    offset = np.zeros(w.shape, np.float32) if rng is None else rng.normal(0, tau, w.shape).astype(np.float32)
    scale = np.float32(w.size / total)
    ratio = w32 / s32
    adam = Adam(w.shape, rate)
    for t in range(steps):
        moved = ratio + offset
        q = np.clip(np.rint(moved), *grid)
        error = w32 - s32 * q
        slope = error @ h32
        loss = np.einsum("god,god->go", slope, error)
        wins = loss < least
        if wins.any():
            codes[wins], least[wins] = q[wins], loss[wins]
        slope *= -2 * scale * s32 * ((moved > grid[0] - 0.5) & (moved < grid[1] + 0.5))
        if attenuate:
            share = ndtr(offset / np.float32(tau))
            slope *= np.where(slope > 0, share, 1 - share)
        offset -= adam.move(slope, 0.5 + 0.5 * np.cos(np.pi * t / steps))
    return codes
