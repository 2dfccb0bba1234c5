"""sub-layer: choose scales of tiles by the error of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layers.problem import DESCENT, Problem, float_inputs, solvable
from onnxq_plugins.parallel import run_all
from onnxq_plugins.search.judge import Judge


@dataclass(frozen=True)
class SubLayer(Pass):
    """Choose scales of tiles by the error of the layer's output.

    PTQ-SL: the scale of every tile of a weight (so many output by so many input channels) is chosen by coordinate descent on
    the squared error of the layer's output. Codes stay open.

    rounds       visits to each tile; 0 ignores how tiles of a row affect each other, which suits a `round` after this pass
                 better than the rounding to the nearest that the visits assume
    shift        the bias will take mean errors (pass bias-correct after this one), so leave them out of the measure
    positions    patches per sample at most
    limit        largest D with a full Gram matrix, see `round`

        L = d H d^T,   d = w - wq,   H = E[x x^T];   a change E of a tile adds -2 E (d H)^T + E H E^T

    The recipe says which tiles: ``weights.block = [16, 16]`` asks for free scales (a target that stores them),
    ``weights.sub_block = [16, 16]`` for integer multipliers of a coarse scale per tensor or channel (targets with integer
    kernels), ``weights.pow2`` for powers of two. With the loss L = d H d^T of each row d = w - wq and E the change of a
    tile, a candidate changes L by -2 E (d H) + E H E. The covering (min-max) scale is always a candidate, and no band of
    rows (with multipliers: no rows that share a coarse scale) ends with more loss than with it, given its whole Gram matrix.
    One scale per tensor or channel is chosen from 27 candidates, exactly. In the end the network runs with these scales and
    with the covering ones on some samples, and keeps the better.

    Source: PTQ-SL (Yuan et al., arXiv 2110.07809): the granularity and the search over tiles; the Gram form, instead of
    running the layer for each candidate, is ours.
    Cost: one run over the data for each half gigabyte of Gram matrices, then some 30 matrix products per layer and round.
    """

    name: ClassVar[str] = "sub-layer"
    rounds: int = DESCENT
    shift: bool = False
    positions: int = 256
    limit: int = 4608

    def __post_init__(self) -> None:
        for key, least in (("rounds", 0), ("positions", 1), ("limit", 16)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least {least}")

    def apply(self, job: Job) -> dict[str, Any]:
        layers = [layer for layer in solvable(job) if not job.plan[layer.weight].solved]
        tiles, multipliers, plain = 0, 0, job.plan
        for batch in float_inputs(job, layers, self.positions, self.limit):
            problems = [Problem.of(job, layer, gram, self.shift) for layer, gram in batch]
            with runtimes.blas(1):
                specs = list(run_all((partial(one.scaled, rounds=self.rounds) for one in problems), job.workers))
            for one, spec in zip(problems, specs, strict=True):
                job.plan |= {one.layer.weight: spec}
                tiles += np.asarray(spec.scale).size
                multipliers += spec.multiplier.size if spec.multiplier is not None else 0
        result: dict[str, Any] = {"layers": len(layers), "scales": tiles, "multipliers": multipliers}
        judge = Judge.of(job) if layers else None
        if judge is not None:
            verdict = judge.best({"searched": job.plan, "covering": plain})
            result["sqnr"] = verdict.sqnr
            if verdict.name == "covering":
                job.plan = plain
                job.note(f"{verdict.undone('sub-layer', 'searched')}, and was undone")
        return result
