"""ranges: choose the range of every activation from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnxq_plugins.job import Job, Pass, Service
from onnxq_plugins.layers.clipping import Range, least_squares
from onnxq_plugins.layers.complete import activation_spec
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.solvers.ranges import kl_range, percentile_range
from onnxq_plugins.spec import Plan

_WORK = 4e9  # multiply-adds over the samples for which two choices are judged by the whole network


@dataclass(frozen=True)
class Ranges(Pass):
    """Choose the range of every activation from the data.

    method       ``minmax``: the extremes; nothing is clipped.
                 ``percentile``: leave out (100 - percentile) percent of the values.
                 ``mse``: least mean squared error of the quantized values; of what a Sigmoid, Tanh, SiLU or the like
                 reads alone, of the values behind that, as nothing is lost where it saturates.
                 ``kl``: least Kullback-Leibler divergence between the values before and after.
                 The last two keep the extremes where a grid has more codes than `bins`: clipping gains nothing there.
    percentile   for ``percentile``, in percent
    bins         of the histograms for all methods but ``minmax``
    judged       compare the network with these ranges to that with the extremes, and keep what gives the better outputs;
                 left out where that is too much work

        s = (max(high, 0) - min(low, 0)) / (2^bits - 1),   z = round(-min(low, 0) / s)

    A range of least squared error for its tensor can cost the network much: clipped values all err to one side, and such
    errors add up in the sums of the next layer, where rounding errors average out.

    Source: common practice; ``kl`` with the joint-non-zero metric of Coarse & Fine Weight Splitting (arXiv 2312.10588).
    Cost: one run over the data for ``minmax``, two for the others; `judged` two of the network and one of the float network
    over up to 32 samples.
    """

    name: ClassVar[str] = "ranges"
    provides: ClassVar[frozenset[Service]] = frozenset({"ranges"})
    method: Literal["minmax", "percentile", "mse", "kl"] = "minmax"
    percentile: float = 99.99
    bins: int = 2048
    judged: bool = True

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile = {self.percentile} must lie in (50, 100]")
        if self.bins < 256:
            raise ValueError(f"bins = {self.bins} must be at least 256")

    def apply(self, job: Job) -> dict[str, Any]:
        names = [name for name in Planned.of(job).activations if not job.plan[name].solved]
        exact = job.calibration.ranges(names)
        ranges = exact | self._narrower(job, names)
        chosen, scores = self._judged(job, {"minmax": exact, self.method: ranges})
        job.plan |= _entries(job, chosen)
        cut = {
            n: round((chosen[n][1] - chosen[n][0]) / (exact[n][1] - exact[n][0]), 4)
            for n in names
            if exact[n][1] > exact[n][0] and chosen[n] != exact[n]
        }
        return {"method": self.method, "activations": len(names), "kept_share_of_range": cut} | scores

    def _narrower(self, job: Job, names: list[str]) -> dict[str, Range]:
        """The ranges that are chosen by histograms."""
        ranges: dict[str, Range] = {}
        if self.method in ("minmax", "mse"):
            return least_squares(job, names, self.bins) if self.method == "mse" else ranges
        for name, h in job.calibration.histograms(names, self.bins).items():
            levels = 2 ** job.plan[name].bits
            if h.high > h.low and self.method == "percentile":
                ranges[name] = percentile_range(h.counts, h.low, h.high, self.percentile)
            elif h.high > h.low and levels <= self.bins:  # a coarser histogram does not show what the grid costs
                ranges[name] = kl_range(h.counts, h.low, h.high, levels)
        return ranges

    def _judged(self, job: Job, choices: Mapping[str, Mapping[str, Range]]) -> tuple[Mapping[str, Range], dict[str, Any]]:
        """The choice whose network is better, the method's unless that is judged, and what goes into the report."""
        asked = choices[self.method]
        if not self.judged or all(asked == other for other in choices.values()):
            return asked, {}
        judge = Judge.of(job, apart=False, work=_WORK)  # a choice of two can hardly fit the samples
        if judge is None:
            return asked, {}
        verdict = judge.best({name: job.plan | _entries(job, ranges) for name, ranges in choices.items()})
        if verdict.name != self.method:
            job.note(f"{verdict.undone(f'ranges.method = {self.method}', self.method)}, and was replaced by the extremes")
        return choices[verdict.name], {"sqnr": verdict.sqnr, "kept": verdict.name}


def _entries(job: Job, ranges: Mapping[str, Range]) -> Plan:
    return Plan({name: activation_spec(ends, job.plan[name]) for name, ends in ranges.items()})
