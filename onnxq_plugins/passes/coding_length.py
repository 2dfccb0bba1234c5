"""coding-length: choose bit widths by the coding length of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.job import Job, Pass
from onnxq_plugins.search.quantizers import parse_widths
from onnxq_plugins.search.widths import Widths, sample
from onnxq_plugins.solvers.coding_length import coding_length, widths_of
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class CodingLength(Pass):
    """Choose bit widths by the coding length of the weights.

    Each group of quantizers gets a width by the lossy coding length of its weights: bits per weight up to one distortion for
    all; longer codes, more bits. Plans requests, which later passes solve; needs no data.

    candidates   as in `mixed-precision`
    budget       ``size`` (bits of weights) or ``bops`` (bit operations), at most `limit` times those of 8 bits everywhere
    limit        see budget
    distortion   mean squared error per weight, as a fraction of the weights' variance

        L(W) = (m + n) / 2 log2 det(I + n / (m eps^2) W W^T),   n outputs, m inputs, eps^2 the distortion

    Weights are taken relative to the largest of their output channel, as a scale per channel represents them. A heuristic:
    it ignores what a layer does to the output. `mixed-precision` measures that.

    Source: Attention Round (Diao et al., arXiv 2207.03088), section on mixed precision; relative weights and the adjustment
    to the budget are our own.
    Cost: eigenvalues of each weight's smaller side.
    """

    name: ClassVar[str] = "coding-length"
    candidates: tuple[str, ...] = ("W4A8", "W6A8", "W8A8")
    budget: Literal["size", "bops"] = "size"
    limit: float = 0.75
    distortion: float = 2.0**-8

    def __post_init__(self) -> None:
        parse_widths(self.candidates)
        if self.distortion <= 0:
            raise ValueError(f"distortion = {self.distortion} must be positive")

    def apply(self, job: Job) -> dict[str, Any]:
        widths = Widths(job, parse_widths(self.candidates), sample(job))
        weights = [
            [
                _relative(layer.matrix(job.graph.constant(layer.weight)))
                for layer in map(job.graph.layer, group.layers)
                if layer.op != "ConvTranspose"
            ]
            for group in widths.groups
        ]
        common = self.distortion * float(np.median([w.var() for part in weights for w in part] or [1.0]))
        scores = np.array(
            [sum(coding_length(w, common) for w in part) / max(sum(w.size for w in part), 1) for part in weights]
        )
        prices = widths.prices(self.budget)
        free = [i for i, options in enumerate(widths.options) if len(options) == len(self.candidates) and weights[i]]
        room = self.limit * getattr(widths.eight, self.budget) - sum(p[0] for i, p in enumerate(prices) if i not in free)
        levels = widths_of(scores[free], np.array([prices[i][::-1] for i in free]), room) if free else []
        if levels is None:
            raise widths.too_expensive(self.budget, self.limit)
        choice = [options[0] for options in widths.options]
        for i, level in zip(free, levels, strict=True):
            choice[i] = widths.options[i][::-1][level]
        job.plan |= widths.requests(tuple(choice))
        return {
            "bits_per_weight": {g.name: round(float(s), 3) for g, s in zip(widths.groups, scores, strict=True)},
            "widths": {g.name: str(w) for g, w in zip(widths.groups, choice, strict=True)},
        }


def _relative(w: Array) -> Array:
    """Weights [groups, outputs, D] as fractions of the largest of each output."""
    return np.asarray(w / np.maximum(np.abs(w).max(axis=2, keepdims=True), 1e-30))
