"""Ranges of least squared error: what is clipped against how finely the rest is rounded, seen from who reads a tensor.

Where an activation alone reads it, the error of its output counts: beyond what saturates a Sigmoid or a Tanh nothing is
lost."""

from __future__ import annotations

from collections.abc import Iterable

from onnxq_plugins.graph.activations import activation_of
from onnxq_plugins.job import Job
from onnxq_plugins.solvers.ranges import mse_range

Range = tuple[float, float]


def least_squares(job: Job, names: Iterable[str], bins: int = 2048) -> dict[str, Range]:
    """The range of least mean squared error of each tensor, or of what an activation that alone reads it makes of it. Those
    whose grid has more codes than the histogram has bins, or that are constant, are left out.

    Cost: a run over the data, after that for the extremes.
    """
    ranges: dict[str, Range] = {}
    for name, h in job.calibration.histograms(list(names), bins).items():
        levels = 2 ** job.plan[name].bits
        if h.high > h.low and levels <= bins:
            ranges[name] = mse_range(h.counts, h.low, h.high, levels, through=activation_of(job.graph, name))
    return ranges
