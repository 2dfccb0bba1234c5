"""AdaRound: learn for every weight whether to round it down or up."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.adam import Adam
from onnxq_plugins.solvers.gram import Grid, better, nearest, row_loss
from onnxq_plugins.spec import Array

ZETA, GAMMA = 1.1, -0.1  # the stretch of the sigmoid


def adaround(
    w: Array,
    h: Array,
    step: Array,
    grid: Grid,
    *,
    steps: int = 1000,
    rate: float = 3e-2,
    weight: float = 5.0,
    beta: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
) -> Array:
    """Codes [g, O, D], each the floor of w / step or one more; never worse than the nearest, row by row.

    w, h, step, grid   as for `gptq`
    steps, rate        of Adam, on the whole Gram matrix at once
    weight             of the term that drives each h(V) to 0 or 1
    beta               its exponent, from the end of the warm-up to the last step
    warmup             share of the steps without that term

    Minimise E|W x - Wq x|^2 + weight * sum(1 - |2 h(V) - 1|^beta) with Wq = step * clip(floor(w / step) + h(V)) and
    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1). The first term is divided by the loss of rounding to the nearest per weight:
    otherwise the weight of the second would mean something different in every layer, and most h(V) would stay undecided.

    Source: Nagel et al. (arXiv 2004.10568), equations 21 to 25; the gradient is written out, with H in place of data.
    """
    lo, hi = grid
    w32, h32 = w.astype(np.float32), h.astype(np.float32)
    s32 = np.broadcast_to(step, w.shape).astype(np.float32)
    floor = np.floor(w32 / s32)
    rest = np.clip(w32 / s32 - floor, 0.01, 0.99)
    v = np.log((rest - GAMMA) / (ZETA - rest))  # h(V) = rest
    base = nearest(w, step, grid)
    loss = float(row_loss(w - step * base, h).sum())
    if loss <= 1e-20 * float(row_loss(w, h).sum()):
        return base  # nothing to gain, and no loss to normalize by
    scale = np.float32(w.size / loss)
    adam = Adam(v.shape, rate)
    start = int(warmup * steps)
    for t in range(steps):
        sigmoid = 1 / (1 + np.exp(-v))
        soft = sigmoid * np.float32(ZETA - GAMMA) + np.float32(GAMMA)
        live = (soft > 0) & (soft < 1)
        soft = np.clip(soft, 0, 1)
        code = floor + soft
        inside = (code > lo) & (code < hi)
        error = s32 * np.clip(code, lo, hi) - w32
        slope = (error @ h32) * (2 * scale) * s32 * inside
        if t >= start:
            now = beta[0] + (beta[1] - beta[0]) * (t - start) / max(steps - start, 1)
            far = 2 * soft - 1
            slope -= np.float32(weight * 2 * now) * np.abs(far) ** np.float32(now - 1) * np.sign(far)
        v -= adam.move(slope * np.float32(ZETA - GAMMA) * sigmoid * (1 - sigmoid) * live)
    soft = 1 / (1 + np.exp(-v)) * np.float32(ZETA - GAMMA) + np.float32(GAMMA)
    codes = np.clip(floor + (soft >= 0.5), lo, hi).astype(w.dtype)
    return np.where(better(w, h, step, codes, base)[..., None], codes, base)
