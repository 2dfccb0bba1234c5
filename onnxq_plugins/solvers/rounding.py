"""Rounding one layer by the name of the method, never worse than a start."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxq_plugins.solvers.adaround import adaround
from onnxq_plugins.solvers.attention import attention
from onnxq_plugins.solvers.descent import descent
from onnxq_plugins.solvers.gpfq import gpfq
from onnxq_plugins.solvers.gptq import gptq
from onnxq_plugins.solvers.gram import Grid, better, nearest
from onnxq_plugins.spec import Array

Method = Literal["nearest", "gptq", "gpfq", "descent", "adaround", "attention", "auto"]
_TRIAL = 10  # steps by which AdaRound's speed is measured


@dataclass(frozen=True)
class Effort:
    """How hard the solvers try.

    damping   share of the mean diagonal of the Gram matrix that GPTQ adds to it
    steps     of AdaRound and Attention Round
    seconds   what `auto` may spend on AdaRound for this layer
    seed      of Attention Round's offsets
    """

    damping: float = 0.01
    steps: int = 1000
    seconds: float = 1.0
    seed: int = 0


def solve(method: Method, w: Array, h: Array, step: Array, grid: Grid, effort: Effort, start: Array) -> Array:
    """Codes [g, O, D] of the wanted method; row by row those of `start` where it does not beat them.

    w, h, step, grid   see `solvers.gram`
    start              codes to fall back on [g, O, D]

    ``auto``: GPTQ, coordinate descent from there, AdaRound with as many steps as the time allows and descent from there:
    the best of each row.
    """
    if method == "gptq":
        codes = gptq(w, h, step, grid, damping=effort.damping)
    elif method == "gpfq":
        codes = gpfq(w, h, step, grid)
    elif method == "descent":
        codes = descent(w, h, step, grid, start=start)
    elif method == "adaround":
        codes = adaround(w, h, step, grid, steps=effort.steps)
    elif method == "attention":
        codes = attention(w, h, step, grid, rng=np.random.default_rng(effort.seed), steps=effort.steps)
    elif method == "auto":
        codes = _auto(w, h, step, grid, effort)
    else:
        codes = nearest(w, step, grid)
    return np.where(better(w, h, step, codes, start)[..., None], codes, start)


def _auto(w: Array, h: Array, step: Array, grid: Grid, effort: Effort) -> Array:
    codes = descent(w, h, step, grid, start=gptq(w, h, step, grid, damping=effort.damping))
    if effort.seconds <= 0:
        return codes
    begun = time.perf_counter()
    adaround(w, h, step, grid, steps=_TRIAL)
    possible = effort.seconds * _TRIAL / max(time.perf_counter() - begun, 1e-9)
    steps = next((n for n in (effort.steps, effort.steps // 2, effort.steps // 4) if 100 <= n <= possible), 0)
    if not steps:
        return codes
    learned = descent(w, h, step, grid, start=adaround(w, h, step, grid, steps=steps))
    return np.where(better(w, h, step, learned, codes)[..., None], learned, codes)
