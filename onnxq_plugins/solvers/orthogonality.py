"""How much layers say that others do not: OMPQ's orthogonality metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq_plugins.spec import Array


def likeness(features: Sequence[Array]) -> Array:
    """Likeness [layers, layers], 0..1, of features [samples, size] each: linear centred kernel alignment,
    <K_i, K_j> / (|K_i| |K_j|) with K = F F^T centred. 1 on the diagonal; turning or scaling the features of a layer changes
    nothing. Source: OMPQ (arXiv 2109.07865), equation of ORM."""
    kernels = []
    for f in features:
        x = f.astype(np.float64) - f.mean(axis=0, dtype=np.float64)
        kernel = (x @ x.T).ravel()
        kernels.append(kernel / max(float(np.linalg.norm(kernel)), 1e-30))
    k = np.stack(kernels)
    found: Array = np.clip(k @ k.T, 0.0, 1.0)
    return found


def importance(alike: Array, beta: float) -> Array:
    """Weight [layers] of each layer's bits: exp(-beta * likeness to all others), averaged over it and the layers behind it.

    Source: OMPQ (arXiv 2109.07865), section 3.3; likeness is divided by the number of others here, so that beta means the
    same for networks of any depth.
    """
    others = max(len(alike) - 1, 1)
    theta = np.exp(-beta * (alike.sum(axis=1) - np.diag(alike)) / others)
    behind = np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)
    return np.asarray(behind)
