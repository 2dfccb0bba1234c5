"""How much information of a layer others lack: OMPQ's orthogonality metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq_plugins.spec import Array


def likeness(features: Sequence[Array]) -> Array:
    """Similarity [layers, layers], 0..1, of features [samples, size] each: linear centred kernel alignment,
    <K_i, K_j> / (|K_i| |K_j|) with K = F F^T centred. 1 on the diagonal; rotating or scaling the features of a layer changes
    nothing. Source: OMPQ (arXiv 2109.07865), equation of ORM."""
    kernels = []
    for f in features:
        x = f.astype(np.float64) - f.mean(axis=0, dtype=np.float64)
        kernel = (x @ x.T).ravel()
        kernels.append(kernel / max(float(np.linalg.norm(kernel)), 1e-30))
    k = np.stack(kernels)
    return np.asarray(np.clip(k @ k.T, 0.0, 1.0))


def importance(alike: Array, beta: float) -> Array:
    """Weight [layers] of each layer's bits: exp(-beta * similarity to all others), averaged over it and all layers after it.

    Source: OMPQ (arXiv 2109.07865), section 3.3; similarity is divided by the number of others here, so that beta means the
    same for networks of any depth.
    """
    others = max(len(alike) - 1, 1)
    theta = np.exp(-beta * (alike.sum(axis=1) - np.diag(alike)) / others)
    behind = np.cumsum(theta[::-1])[::-1] / np.arange(len(theta), 0, -1)
    return np.asarray(behind)
