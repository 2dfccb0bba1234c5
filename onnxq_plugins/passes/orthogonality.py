"""orthogonality: choose bit widths by how unlike layers' outputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.search.quantizers import parse_widths
from onnxq_plugins.search.widths import Widths, sample
from onnxq_plugins.solvers.orthogonality import importance, likeness
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class Orthogonality(Pass):
    """Choose bit widths by how unlike layers' outputs are.

    Layers whose outputs are unlike those of all other layers get more bits (OMPQ): what many layers express may be coarse.
    The sum of bits times importance is maximized within the budget. Plans requests, which later passes solve.

    candidates   as in `mixed-precision`
    budget       ``size`` (bits of weights) or ``bops`` (bit operations), at most `limit` times those of 8 bits everywhere
    limit        see budget
    beta         how steeply likeness lowers importance
    samples      number of samples, evenly spaced
    features     values kept of each layer's output and sample, evenly spaced

        alike(i, j) = <K_i, K_j> / (|K_i| |K_j|),   K = F F^T of the centred outputs F [samples, values]
        importance_i = mean over j >= i of exp(-beta mean over k != j of alike(j, k))

    A heuristic: it ignores what rounding does to the output. `mixed-precision` measures that.

    Source: OMPQ (arXiv 2109.07865). Dynamic programming replaces its linear program and rounding.
    Cost: one run over the samples.
    """

    name: ClassVar[str] = "orthogonality"
    candidates: tuple[str, ...] = ("W4A8", "W6A8", "W8A8")
    budget: Literal["size", "bops"] = "size"
    limit: float = 0.75
    beta: float = 10.0
    samples: int = 64
    features: int = 4096

    def __post_init__(self) -> None:
        parse_widths(self.candidates)
        if self.samples < 2 or self.features < 1 or self.beta <= 0:
            raise ValueError("samples must be at least 2, features 1, and beta positive")

    def apply(self, job: Job) -> dict[str, Any]:
        if job.calibration.data is None:
            raise OnnxqError(
                "orthogonality compares outputs of layers on sample inputs, and there are none; give --data "
                "PATH, or put the pass data-free before it."
            )
        widths = Widths(job, parse_widths(self.candidates), sample(job))
        ranked = [i for i, group in enumerate(widths.groups) if group.layers]
        names = [job.graph.layer(widths.groups[i].layers[0]).output for i in ranked]
        scores = importance(likeness(self._features(job, names)), self.beta) if ranked else np.zeros(0)
        weight = dict(zip(ranked, scores, strict=True))
        # the largest bits times importance: the smallest loss of it
        loss = [
            weight.get(i, 0.0) * np.array([options[0].weights - w.weights for w in options], float)
            for i, options in enumerate(widths.options)
        ]
        choice = widths.within(loss, self.budget, self.limit)
        job.plan |= widths.requests(choice)
        return {
            "importance": {widths.groups[i].name: round(float(w), 6) for i, w in weight.items()},
            "widths": {g.name: str(w) for g, w in zip(widths.groups, choice, strict=True)},
        }

    def _features(self, job: Job, names: list[str]) -> list[Array]:
        """Some values of each tensor for every sample [samples, size]."""
        weights: dict[str, Array] = {}
        model = job.graph.model(weights)
        del model.graph.output[:]
        for name in names:
            model.graph.output.add().name = name
        runner = runtimes.session(model, weights=weights)
        assert job.calibration.data is not None
        rows = [
            [output.reshape(-1)[:: max(output.size // self.features, 1)] for output in runner.run(names, feed)]
            for feed in job.calibration.data.spread(self.samples)
        ]
        sizes = [min(len(row[k]) for row in rows) for k in range(len(names))]
        return [np.stack([row[k][:size] for row in rows]) for k, size in enumerate(sizes)]
