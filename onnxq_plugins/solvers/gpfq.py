"""GPFQ: greedy path following, in Gram form."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.gptq import BLOCK, Order
from onnxq_plugins.solvers.gram import Grid
from onnxq_plugins.spec import Array


def gpfq(w: Array, h: Array, step: Array, grid: Grid, *, order: bool = True) -> Array:
    """Codes [g, O, D] by greedy path following.

    w, h, step, grid   as for `gptq`; order: take the inputs with the largest mean square first

    Inputs are visited in order; u is the output error so far. Input t gets the level nearest to the projection of
    u + w_t x_t on x_t. In Gram form the projection is w_t + sum_{j<t} (w_j - q_j) H_jt / H_tt, so the data are not needed.
    Unlike GPTQ it only looks back; it needs no inverse and no damping.

    Source: Zhang, Zhou, Saab (arXiv 2201.11113), equation 3.
    """
    size = w.shape[-1]
    diagonal = np.einsum("gdd->gd", h)
    order_of = Order(diagonal if order else np.zeros_like(diagonal))
    target, steps, gram = order_of.columns(w), order_of.steps(step, w.shape), order_of.gram(h)
    own = np.einsum("gdd->gd", gram)
    scaled = np.divide(gram, own[:, :, None], out=np.zeros_like(gram), where=own[:, :, None] > 0)  # H_tj / H_tt
    codes, error = np.empty_like(target), np.zeros_like(target)
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        ideal = target[:, first:last] + scaled[:, first:last, :first] @ error[:, :first]
        for i in range(first, last):
            near = (scaled[:, i, None, first:i] @ error[:, first:i])[:, 0]
            codes[:, i] = np.clip(np.rint((ideal[:, i - first] + near) / steps[:, i]), *grid)
            error[:, i] = target[:, i] - codes[:, i] * steps[:, i]
    return order_of.restore(np.where((own > 0)[:, :, None], codes, 0.0))
