"""acme-aciq: ranges of activations by analytical clipping."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from onnxq_plugins import Histogram, Job, Pass, hookimpl
from onnxq_plugins.job import Service
from onnxq_plugins.spec import from_range

from acme_aciq.clipping import gauss_clip, laplace_clip

# E|x - mean| / std of a Laplace and of a normal distribution
_LAPLACE, _GAUSS = np.sqrt(1 / 2), np.sqrt(2 / np.pi)


@dataclass(frozen=True)
class Aciq(Pass):
    """Clip activations where the expected squared error of clipping and rounding together is
    least, if values follow a Laplace or a normal distribution (see `acme_aciq.clipping`):

        range = mean +- clip(bits) * spread,  or  0 .. clip(bits + 1) * spread  without negatives

    with spread E|x - mean| (Laplace) or the standard deviation (normal). A range never reaches
    beyond the values that were seen. In 8 bits it clips little but long tails.

    prior   the distribution; "nearest" takes the one whose E|x - mean| / std is nearer

    Source: Banner, Nahshan, Soudry, "Post-training 4-bit quantization of convolution networks
    for rapid-deployment", arXiv 1810.05723. Cost: two runs over the data, for histograms.
    """

    name: ClassVar[str] = "acme.aciq"
    provides: ClassVar[frozenset[Service]] = frozenset({"ranges"})
    prior: Literal["nearest", "laplace", "gauss"] = "nearest"

    def apply(self, job: Job) -> dict[str, Any]:
        names = [
            name
            for name, spec in job.plan.items()
            if not job.graph.is_constant(name) and not spec.solved
        ]
        kept = {}
        for name, seen in job.calibration.histograms(names).items():
            if not seen.low < seen.high:
                continue  # it is constant; the engine plans it
            low, high = self.clipped(seen, job.plan[name].bits)
            job.plan |= {name: from_range(low, high, job.plan[name])}
            kept[name] = round((high - low) / (seen.high - seen.low), 4)
        return {"kept_share_of_range": {name: share for name, share in kept.items() if share < 1}}

    def clipped(self, seen: Histogram, bits: int) -> tuple[float, float]:
        """The ends of the range, within what was seen."""
        values, weights = seen.centers, seen.counts.astype(np.float64)
        one_sided = seen.low >= 0
        if one_sided:  # half of a distribution around 0; zeros are what a Relu has cut off
            weights = np.where(values > seen.high / len(values), weights, 0)
        if not weights.any():
            return seen.low, seen.high
        centre = 0.0 if one_sided else float(np.average(values, weights=weights))
        mean = float(np.average(np.abs(values - centre), weights=weights))
        std = float(np.sqrt(np.average((values - centre) ** 2, weights=weights)))
        laplace = self.prior == "laplace" or (
            self.prior == "nearest" and abs(mean / std - _LAPLACE) < abs(mean / std - _GAUSS)
        )
        reach = (
            laplace_clip(bits + one_sided) * mean if laplace else gauss_clip(bits + one_sided) * std
        )
        return max(seen.low, centre - reach), min(seen.high, centre + reach)


@hookimpl
def onnxq_passes() -> list[type[Pass]]:
    return [Aciq]
