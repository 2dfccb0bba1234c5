"""GPTQ: round one input after another and compensate the error in those that follow."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.gram import Grid, cholesky
from onnxq_plugins.spec import Array

BLOCK = 32  # columns between two updates of the rest of the matrix: the rest then is one BLAS call


def gptq(w: Array, h: Array, step: Array, grid: Grid, *, damping: float = 0.01, order: bool = True) -> Array:
    """Codes [g, O, D] by GPTQ.

    w        weights [g, O, D]
    h        Gram matrix of the inputs [g, D, D]
    step     size of a code, broadcastable to w
    grid     smallest and largest code
    damping  share of the mean diagonal that is added to the diagonal
    order    take the inputs with the largest mean square first

    With L the lower Cholesky factor of the damped Gram matrix, inputs in reverse order, the damped loss of a row is
    |(w - q) L|^2. Column i is rounded to q_i = round(w_i + sum_j (w_j - q_j) L_ji / L_ii) over the columns j rounded before
    it: term i vanishes but for the rounding, and later columns can do the same for theirs. This is GPTQ without the inverse
    of the Gram matrix, whose upper Cholesky factor U is L^-1 in reverse order. Inputs that are always 0 get code 0.

    Source: GPTQ (arXiv 2210.17323), algorithm 1, blocked; in the form of Babai's nearest plane (arXiv 2507.18553).
    Cost: one Cholesky factorization, and half a product of w with h.
    """
    size = w.shape[-1]
    diagonal = np.einsum("gdd->gd", h)
    order_of = Order(diagonal if order else np.zeros_like(diagonal), last=True)
    live = np.where(diagonal[:, None, :] > 0, w, 0.0) if (diagonal <= 0).any() else w
    work, steps = order_of.columns(live), order_of.steps(step, w.shape)
    lower = cholesky(damp(order_of.gram(h), damping))
    root = np.einsum("gdd->gd", lower)
    codes, error = np.empty_like(work), np.zeros_like(work)
    for last in range(size, 0, -BLOCK):
        first = max(last - BLOCK, 0)
        centre = lower[:, last:, first:last].swapaxes(1, 2) @ error[:, last:]
        centre /= root[:, first:last, None]
        centre += work[:, first:last]
        factors = np.ascontiguousarray((lower[:, first:last, first:last] / root[:, None, first:last]).swapaxes(1, 2))
        for i in range(last - 1, first - 1, -1):
            own = centre[:, i - first]
            if i + 1 < last:
                own += (factors[:, i - first, None, i + 1 - first :] @ error[:, i + 1 : last])[:, 0]
            np.clip(np.rint(own / steps[:, i]), *grid, out=codes[:, i])
            np.subtract(work[:, i], codes[:, i] * steps[:, i], out=error[:, i])
    return order_of.restore(codes)


class Order:
    """The inputs of each group by descending key [g, D], or from the last to the first of these, and weights in that order
    with the inputs first: [g, D, O], so that the weights of one input are contiguous in memory."""

    def __init__(self, key: Array, last: bool = False) -> None:
        self.at = np.argsort(-key, axis=1, kind="stable")[:, :: -1 if last else 1]

    def columns(self, w: Array) -> Array:
        """[g, O, D] -> ordered copy [g, D, O]."""
        return np.ascontiguousarray(np.take_along_axis(w.swapaxes(1, 2), self.at[:, :, None], axis=1))

    def steps(self, step: Array, shape: tuple[int, ...]) -> Array:
        """An array that broadcasts to [g, O, D] = shape -> ordered [g, D, O], not copied if equal for all inputs."""
        wide = np.broadcast_to(step, shape)
        same = np.ndim(step) == 0 or np.shape(step)[-1] == 1
        return wide.swapaxes(1, 2) if same else self.columns(wide)

    def gram(self, h: Array) -> Array:
        """[g, D, D] -> ordered copy."""
        return h[np.arange(len(h))[:, None, None], self.at[:, :, None], self.at[:, None]]

    def restore(self, columns: Array) -> Array:
        """Ordered [g, D, O] -> [g, O, D]."""
        restored = np.empty_like(columns)
        np.put_along_axis(restored, self.at[:, :, None], columns, axis=1)
        return np.ascontiguousarray(restored.swapaxes(1, 2))


def damp(h: Array, damping: float) -> Array:
    """Add `damping` times the mean of its diagonal to the diagonal of h, in place; an input that is always 0 gets a 1."""
    diagonal = np.einsum("gdd->gd", h)
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += np.where(diagonal > 0, damping * mean, 1.0).astype(h.dtype)
    return h
