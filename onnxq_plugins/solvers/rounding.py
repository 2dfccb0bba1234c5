"""Rounding one layer by a named method, never worse than given codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxq_plugins.solvers.adaround import adaround
from onnxq_plugins.solvers.attention import attention
from onnxq_plugins.solvers.descent import descent
from onnxq_plugins.solvers.gpfq import gpfq
from onnxq_plugins.solvers.gptq import gptq
from onnxq_plugins.solvers.gram import Grid, better, nearest, row_loss
from onnxq_plugins.spec import Array

Method = Literal["nearest", "gptq", "gpfq", "descent", "adaround", "attention", "auto"]


@dataclass(frozen=True)
class Effort:
    """Parameters that trade time for accuracy.

    damping   share of the mean diagonal of the Gram matrix that GPTQ adds to it
    steps     of AdaRound and Attention Round
    learned   steps of AdaRound that `auto` may take for this layer; 0 leaves it out
    seed      of Attention Round's offsets
    """

    damping: float = 0.01
    steps: int = 1000
    learned: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes [g, O, D], the loss of each row [g, O], and what it is with the codes to fall back on."""

    codes: Array
    loss: Array
    base: Array


def solve(method: Method, w: Array, h: Array, step: Array, grid: Grid, effort: Effort, start: Array) -> Rounded:
    """Codes by a method; for each row those of `start` unless it beats them.

    w, h, step, grid   see `solvers.gram`
    start              codes to fall back on [g, O, D]

    ``auto``: the best, for each row, of GPTQ followed by coordinate descent and of AdaRound with `effort.learned` steps
    followed by coordinate descent.
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
    loss, base = (row_loss(w - step * one, h) for one in (codes, start))
    return Rounded(np.where((loss < base)[..., None], codes, start), np.minimum(loss, base), base)


def _auto(w: Array, h: Array, step: Array, grid: Grid, effort: Effort) -> Array:
    codes = descent(w, h, step, grid, start=gptq(w, h, step, grid, damping=effort.damping))
    if not effort.learned:
        return codes
    learned = descent(w, h, step, grid, start=adaround(w, h, step, grid, steps=effort.learned))
    return np.where(better(w, h, step, learned, codes)[..., None], learned, codes)
