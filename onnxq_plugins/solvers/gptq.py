"""GPTQ: round one input after another and compensate the error in those that follow."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.solvers.gram import Grid
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

    With U the upper Cholesky factor of the inverse of the damped Gram matrix, column i is rounded, e = (w_i - q_i) / U_ii,
    and e U_i,: is subtracted from the columns behind it. For any rounding rule w - q = e U, so the damped loss is |e|^2.
    Inputs that are always 0 get code 0.

    Source: GPTQ (arXiv 2210.17323), algorithm 1, blocked.
    """
    size = w.shape[-1]
    diagonal = np.einsum("gdd->gd", h)
    order_of = Order(diagonal if order else np.zeros_like(diagonal))
    work, steps = order_of.columns(np.where(diagonal[:, None, :] > 0, w, 0.0)), order_of.steps(step, w.shape)
    upper = inverse_factor(order_of.gram(damp(h, damping)))
    codes = np.empty_like(work)
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        for i in range(first, last):
            column = work[:, i]
            codes[:, i] = np.clip(np.rint(column / steps[:, i]), *grid)
            column -= codes[:, i] * steps[:, i]
            column /= upper[:, i, i, None]  # now the error e, kept in place
            if i + 1 < last:
                work[:, i + 1 : last] -= upper[:, i, i + 1 : last, None] * column[:, None]
        if last < size:
            work[:, last:] -= upper[:, first:last, last:].swapaxes(1, 2) @ work[:, first:last]
    return order_of.restore(codes)


class Order:
    """The inputs of each group by descending key [g, D], and weights in that order with the inputs first: [g, D, O], so that
    the weights of one input are contiguous in memory."""

    def __init__(self, key: Array) -> None:
        self.at = np.argsort(-key, axis=1, kind="stable")

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
        return np.take_along_axis(np.take_along_axis(h, self.at[:, None, :], axis=2), self.at[:, :, None], axis=1)

    def restore(self, columns: Array) -> Array:
        """Ordered [g, D, O] -> [g, O, D]."""
        restored = np.empty_like(columns)
        np.put_along_axis(restored, self.at[:, :, None], columns, axis=1)
        return np.ascontiguousarray(restored.swapaxes(1, 2))


def damp(h: Array, damping: float) -> Array:
    """h plus `damping` times the mean of its diagonal on the diagonal; an input that is always 0 gets a 1."""
    diagonal = np.einsum("gdd->gd", h)
    mean = diagonal.mean(axis=1, keepdims=True)
    damped = h.copy()
    np.einsum("gdd->gd", damped)[...] += np.where(diagonal > 0, damping * mean, 1.0)
    return damped


def inverse_factor(h: Array) -> Array:
    """Upper triangular U [g, D, D] with U^T U = h^-1, from the Cholesky factor of h in reverse order: h = R R^T with R
    upper triangular, U = R^-1. No inverse of h is formed."""
    return _inverse(np.linalg.cholesky(h[:, ::-1, ::-1])[:, ::-1, ::-1])


def _inverse(upper: Array) -> Array:
    """Inverse of upper triangular matrices [g, D, D] by halves: two inverses and two products."""
    size = upper.shape[-1]
    if size <= 64:
        return np.linalg.inv(upper)
    half = size // 2
    inverse = np.zeros_like(upper)
    inverse[:, :half, :half] = _inverse(upper[:, :half, :half])
    inverse[:, half:, half:] = _inverse(upper[:, half:, half:])
    inverse[:, :half, half:] = -inverse[:, :half, :half] @ upper[:, :half, half:] @ inverse[:, half:, half:]
    return inverse
