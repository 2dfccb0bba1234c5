"""Lossy coding length of weights: the bits needed to encode them up to a distortion."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.spec import Array


def coding_length(w: Array, distortion: float) -> float:
    """Bits for the rows of w [groups, outputs, D] up to a mean squared error of `distortion` per weight, summed over groups:

        L(W) = (m + n) / 2 * log2 det(I + n / (m eps^2) W W^T),   n outputs, m = D

    Zero weights take no bits; an orthogonal transform of inputs or outputs changes nothing. Source: Ma, Derksen, Hong
    and Wright (2007), used for bit widths by Attention Round (arXiv 2207.03088). Cost: eigenvalues of the smaller side.
    """
    _, n, m = w.shape
    x = w.astype(np.float64)
    gram = x @ x.transpose(0, 2, 1) if n <= m else x.transpose(0, 2, 1) @ x
    power = np.maximum(np.linalg.eigvalsh(gram), 0.0)
    return float((m + n) / 2 * np.log2(1 + n / (m * distortion) * power).sum())


def widths_of(score: Array, cost: Array, limit: float) -> list[int] | None:
    """A level for each item, higher for larger scores, with a total cost of at most `limit`; None if even the lowest levels
    cost more.

    score   [items]
    cost    [items, levels], rising along the levels

    One-dimensional k-means splits the scores into as many clusters as there are levels. Items then move down, those nearest
    to the border below them first, until the cost fits, and up again as far as possible. Source: k-means as in Attention
    Round; the repair is our own.
    """
    from sklearn.cluster import KMeans

    items, levels = cost.shape
    if cost[:, 0].sum() > limit:
        return None
    kinds = min(levels, len(np.unique(score)))
    means = KMeans(kinds, n_init=10, random_state=0).fit(score[:, None])
    centres = np.sort(means.cluster_centers_.ravel())
    borders = (centres[1:] + centres[:-1]) / 2
    borders = np.concatenate([borders, np.full(levels - 1 - len(borders), np.inf)])
    level = np.searchsorted(borders, score)
    every = np.arange(items)
    while cost[every, level].sum() > limit:
        down = np.where(level > 0, np.abs(score - borders[np.maximum(level - 1, 0)]), np.inf)
        level[int(np.argmin(down))] -= 1
    while True:
        up = np.minimum(level + 1, levels - 1)
        fits = (level < levels - 1) & (cost[every, level].sum() - cost[every, level] + cost[every, up] <= limit)
        if not fits.any():
            return [int(n) for n in level]
        above = borders[np.minimum(level, levels - 2)]
        gap = np.where(np.isfinite(above), above, 1e30) - score
        level[int(np.argmin(np.where(fits, gap, np.inf)))] += 1
