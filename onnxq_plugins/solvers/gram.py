"""The layer objective in Gram form, shared by the solvers.

A layer computes y = W x. With H = E[x x^T] the mean squared error of rounded weights is a quadratic form and separates by
rows (output channels):

    L = E|W x - Wq x|^2 = sum_o d_o H d_o^T,   d = W - Wq

Arrays are batches over groups: w [g, O, D], h [g, D, D]; dense layers have g = 1, depthwise ones g = channels, O = 1.
`step` broadcasts to w, so one scale a row, one per block and two-level scales are the same to every solver; a weight is
`step * code` with lo <= code <= hi. Source: AdaRound (arXiv 2004.10568, equation 21), GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq_plugins.spec import Array

Grid = tuple[int, int]
_LARGE = 256  # inputs from which on a Cholesky factorization of its own for each group pays
_SINGLE = 512  # inputs from which on moments and solvers are in single precision
_FEW, _SAFE = 4, 1.0  # times fewer patches than inputs; a ridge beside which rounding errors of a factor do not matter


def precision(inputs: int) -> type[np.floating[Any]]:
    """Of moments of so many inputs: single where they are large matrices, which a ridge keeps well conditioned."""
    return np.float32 if inputs >= _SINGLE else np.float64


def row_loss(error: Array, h: Array) -> Array:
    """d H d^T of each row: error [g, O, D], h [g, D, D] -> [g, O]."""
    weighted = error @ h
    weighted *= error
    return np.asarray(np.maximum(weighted.sum(axis=2), 0.0))


def nearest(w: Array, step: Array, grid: Grid) -> Array:
    """Codes rounded to the nearest (half to even) [g, O, D], as floats."""
    codes: Array = np.clip(np.rint(w / step), *grid)
    return codes


def better(w: Array, h: Array, step: Array, codes: Array, other: Array) -> Array:
    """True for each row [g, O] in which `codes` have less loss than `other`."""
    return np.asarray(row_loss(w - step * codes, h) < row_loss(w - step * other, h))


def ridge(h: Array, amount: float) -> Array:
    """h [g, D, D] with its diagonal times 1 + amount: correlations shrink, whatever the inputs' units. An input that is
    always 0 gets a 1, and a small floor outweighs rounding errors of h, so that the result can be inverted."""
    diagonal = np.einsum("gdd->gd", h)
    floor = 1e-7 * diagonal.mean(axis=1, keepdims=True)
    ridged = h.copy()
    np.einsum("gdd->gd", ridged)[...] = np.where(diagonal > 0, (1 + amount) * diagonal + floor, 1.0)
    return ridged


def regress(w: Array, h: Array, cross: Array, amount: float) -> Array:
    """Weights for the inputs a layer really sees: the minimum over W' of E|y - W' x|^2 plus a ridge that pulls it to w.

    w       float weights [g, O, D]
    h       E[x x^T] of the inputs in the quantized network [g, D, D]
    cross   E[y x^T] with y the float layer's output [g, O, D]
    amount  the ridge, relative to the diagonal of h

    Every Gram solver handles this asymmetric objective (float target, quantized input) by rounding the result in place of
    w, since L(Wq) = (Wq - W') h (Wq - W')^T + const.
    """
    return w + refit(h, cross - w @ h, amount)


def refit(h: Array, left: Array, amount: float, count: int | None = None) -> Array:
    """W' - W of `regress` [g, O, D], from what W leaves of the outputs: left = E[(y - W x) x^T] [g, O, D].

    count   patches that h is a mean of; where they are a fraction of D, h has their rank, and the solution takes D r (r + O)
            multiplications in place of D^2 (D / 3 + 2 O)
    """
    if count is not None and h.shape[1] >= _LARGE and _FEW * count <= h.shape[1] and amount >= _SAFE:
        return np.stack([_refit_few(one, rest, amount) for one, rest in zip(h, left, strict=True)])
    solved: Array = _solve(ridge(h, amount), left.swapaxes(1, 2))
    return solved.swapaxes(1, 2)


def _refit_few(h: Array, left: Array, amount: float) -> Array:
    """`refit` of one group: with S the root mean squares and h = S F F^T S by pivoted Cholesky,
    left (h + a S^2)^-1 = left S^-1 (1 - F (a + F^T F)^-1 F^T) S^-1 / a (Woodbury)."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.linalg.lapack import get_lapack_funcs

    size = np.sqrt(np.where(np.diagonal(h) > 0, np.diagonal(h), 1)).astype(h.dtype)
    (factor,) = get_lapack_funcs(("pstrf",), (h,))
    scaled = h / size
    scaled /= size[:, None]
    lower, order, rank, _ = factor(scaled.T, lower=1, overwrite_a=1)  # symmetric, and in the order that LAPACK overwrites
    f = np.empty((len(h), rank), h.dtype)
    f[order - 1] = np.tril(lower[:, :rank])
    del scaled, lower
    small = f.T @ f
    small[np.diag_indices(rank)] += h.dtype.type(amount)
    right = left / size
    moved: Array = (right - cho_solve(cho_factor(small, lower=True), (right @ f).T).T @ f.T) / size / h.dtype.type(amount)
    return moved


def share_of(move: Array, h: Array, left: Array) -> tuple[float, float]:
    """Slope and curvature of the error along W + a move, E|y - (W + a move) x|^2 = const - 2 a slope + a^2 curvature, over
    patches with these moments (as for `refit`): a = slope / curvature is best there.

    Source: the damping of QEP (arXiv 2504.09629), with a chosen by patches that were not fitted.
    """
    return float(np.vdot(move, left)), float(np.vdot(move @ h, move))


def cholesky(h: Array) -> Array:
    """Lower triangular L [g, D, D] with L L^T = h, in the precision of h; computed in double precision where rounding errors
    of single precision make it indefinite."""
    if h.shape[1] < _LARGE:
        return np.asarray(np.linalg.cholesky(h.astype(np.float64, copy=False)).astype(h.dtype, copy=False))
    from scipy.linalg import LinAlgError  # late: slow to import, and only large layers need it
    from scipy.linalg import cholesky as factor  # several times faster than numpy's, which copies

    lower = np.empty_like(h)
    for one, matrix in zip(lower, h, strict=True):
        one[...] = matrix
        try:
            one[...] = factor(one.T, overwrite_a=True, check_finite=False).T  # in the order of memory that LAPACK wants
        except LinAlgError:
            one[...] = factor(matrix.astype(np.float64), lower=True, check_finite=False)
    return lower


def _solve(h: Array, right: Array) -> Array:
    """h^-1 right for positive definite h [g, D, D] and right [g, D, n]."""
    if h.shape[1] < _LARGE:
        return np.asarray(np.linalg.solve(h, right))
    from scipy.linalg import cho_solve

    factors = ((lower, True) for lower in cholesky(h))
    return np.stack([cho_solve(one, columns, check_finite=False) for one, columns in zip(factors, right, strict=True)])


def narrow(a: Array, like: Array, fill: float = 0.0) -> Array:
    """Weights [g, O, D] in the groups of a block-diagonal Gram matrix `like` [g * n, B, B]: [g * n, O, B], padded with
    `fill`. An array that broadcasts along D is repeated, once per group."""
    groups, width = like.shape[:2]
    if a.shape[0] == groups and a.shape[2] in (1, width):
        return a
    g, rows, size = a.shape
    pieces = groups // g
    if size == 1:
        return np.repeat(a, pieces, axis=0)
    wide = np.full((g, rows, pieces * width), fill, a.dtype)
    wide[:, :, :size] = a
    return wide.reshape(g, rows, pieces, width).swapaxes(1, 2).reshape(groups, rows, width)


def widen(a: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `narrow`: back to [g, O, D] = shape."""
    g, rows, size = shape
    if a.shape == shape:
        return a
    return a.reshape(g, -1, rows, a.shape[2]).swapaxes(1, 2).reshape(g, rows, -1)[:, :, :size]
