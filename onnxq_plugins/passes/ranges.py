"""ranges: choose the range of every activation from the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnxq_plugins.job import Job, Pass, Service
from onnxq_plugins.layers.complete import activation_spec
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.ranges import kl_range, mse_range, percentile_range


@dataclass(frozen=True)
class Ranges(Pass):
    """Choose the range of every activation from the data.

    method       ``minmax``: the extremes; nothing is clipped.
                 ``percentile``: leave out (100 - percentile) percent of the values.
                 ``mse``: least mean squared error of the quantized values.
                 ``kl``: least Kullback-Leibler divergence between the values before and after.
                 The last two keep the extremes where a grid has more codes than `bins`: clipping gains nothing there.
    percentile   for ``percentile``, in percent
    bins         of the histograms for all methods but ``minmax``

        s = (max(high, 0) - min(low, 0)) / (2^bits - 1),   z = round(-min(low, 0) / s)

    Source: common practice; ``kl`` with the joint-non-zero metric of Coarse & Fine Weight Splitting (arXiv 2312.10588).
    Cost: one run over the data for ``minmax``, two for the others.
    """

    name: ClassVar[str] = "ranges"
    provides: ClassVar[frozenset[Service]] = frozenset({"ranges"})
    method: Literal["minmax", "percentile", "mse", "kl"] = "minmax"
    percentile: float = 99.99
    bins: int = 2048

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile = {self.percentile} must lie in (50, 100]")
        if self.bins < 256:
            raise ValueError(f"bins = {self.bins} must be at least 256")

    def apply(self, job: Job) -> dict[str, Any]:
        names = [name for name in Planned.of(job).activations if not job.plan[name].solved]
        exact = job.calibration.ranges(names)
        ranges = dict(exact)
        if self.method != "minmax":
            for name, h in job.calibration.histograms(names, self.bins).items():
                levels = 2 ** job.plan[name].bits
                if h.high <= h.low or (levels > self.bins and self.method != "percentile"):
                    continue  # a histogram coarser than the grid does not show what the grid costs
                if self.method == "percentile":
                    ranges[name] = percentile_range(h.counts, h.low, h.high, self.percentile)
                elif self.method == "mse":
                    ranges[name] = mse_range(h.counts, h.low, h.high, levels)
                else:
                    ranges[name] = kl_range(h.counts, h.low, h.high, levels)
        job.plan |= {name: activation_spec(ranges[name], job.plan[name]) for name in names}
        cut = {
            n: round((ranges[n][1] - ranges[n][0]) / (exact[n][1] - exact[n][0]), 4)
            for n in names
            if exact[n][1] > exact[n][0] and ranges[n] != exact[n]
        }
        return {"method": self.method, "activations": len(names), "kept_share_of_range": cut}
