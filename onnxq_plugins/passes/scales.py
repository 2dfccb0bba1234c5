"""scales: scales of weights by the error they cause in their layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtime
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layerwise import float_inputs, problem, solvable


@dataclass(frozen=True)
class Scales(Pass):
    """Choose every weight scale that is still open from 27 candidates below and just above the one that covers the largest
    weight: the one with the least squared error of the layer's output. Codes stay open.

    shift        the bias will take mean errors (pass bias-correct behind this one), so leave them out of the measure
    positions    patches per sample at most
    limit        largest D with a full Gram matrix, see `round`

    Few bits gain most: a scale that clips the largest weights leaves finer steps for the others. The pass `round` does the
    same search on the inputs that its layers see.

    Source: the mean squared error grid, weighted with the Gram matrix of the inputs (exact per output channel).
    Cost: one run over the data for each half gigabyte of Gram matrices, 27 matrix products per layer.
    """

    name: ClassVar[str] = "scales"
    shift: bool = False
    positions: int = 256
    limit: int = 4608

    def apply(self, job: Job) -> dict[str, Any]:
        from joblib import Parallel, delayed

        layers = [y for y in solvable(job) if not job.plan[y.weight].solved]
        told: dict[str, float] = {}
        for batch in float_inputs(job, layers, self.positions, self.limit):
            problems = [problem(job, layer, gram, self.shift) for layer, gram in batch]
            with runtime.blas(1):
                solved = Parallel(n_jobs=job.workers, prefer="threads")(delayed(one.scaled)() for one in problems)
            for one, spec in zip(problems, solved, strict=True):
                job.plan |= {one.layer.weight: spec}
                largest = np.abs(one.weight).max() / spec.grid[1]
                told[one.layer.name] = round(float(np.max(spec.scale) / max(largest, 1e-30)), 4)
        return {"largest_scale_relative_to_minmax": told}
