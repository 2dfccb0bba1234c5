"""centre: bring channels of linear tensors to the middle of their grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.graph import shift, shifts
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.centre import centre
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class Centre(Pass):
    """Bring channels of linear tensors to the middle of their grid.

    One 8-bit grid must span from the lowest to the highest channel of an activation. Where nothing but linear operators
    write and read it, a constant c per channel can be taken off, and made up for in the biases behind: residual streams of
    linear bottlenecks, LayerNormalization in front of MatMul, a convolution in front of one without padding, chains of Gemm.
    No operator is added.

        x' = x - c,   b_1' = b_1 - c,   b_2' = b_2 + W_2 c,   c = (max x + min x) / 2 over the calibration data

    The middle of a channel's range, not its mean, lets the grid shrink: every channel then spans from -r_c to r_c, and the
    grid the largest r_c. The shift of a sum z = x + y is that of x plus that of y; what branches of a residual stream and
    their sums want differs in general, and those shifts are taken for which the squared widths of all these grids add up to
    least. Activation functions, products, padded convolutions (their border would have to be c), inputs and outputs of the
    model keep c at 0.

    positions   values that a channel must have had in the calibration data. Where few were seen, others will lie beyond;
                before, most channels had room for them on the grid of the largest

    Without data nothing is known of the channels, and the pass is skipped with a note; behind `data-free` it takes the spans
    that BatchNormalizations tell.

    Source: the channel-wise shift of Outlier Suppression+ (arXiv 2304.09145), section 4.1, there behind LayerNormalization;
    here for every linear tensor, residual sums included. It complements the factors of `equalize` (Data-Free Quantization,
    arXiv 1906.04721, and SmoothQuant, arXiv 2211.10438), to which it is best put in front.
    Cost: the run over the data that `ranges` needs, which it does not repeat, and one product of each weight with a vector.
    """

    name: ClassVar[str] = "centre"
    stage: ClassVar[Stage] = "rewrite"
    positions: int = 256

    def __post_init__(self) -> None:
        if self.positions < 1:
            raise ValueError(f"positions = {self.positions} must be at least 1")

    def apply(self, job: Job) -> dict[str, Any]:
        graph, calibration = job.graph, job.calibration
        if not calibration.ready:
            job.note("centre was skipped: without data there are no ranges to bring to the middle")
            return {"tensors": 0}
        allowed, planned = shifts(graph), Planned.of(job).activations
        numbers = {n: allowed.places[n, axis] for n in planned if (n, axis := channel_axis(graph, n)) in allowed.places}
        numbers = {n: at for n, at in numbers.items() if (at >= 0).any()}
        if not numbers:
            return {"tensors": 0}
        calibration.ranges([n for n in planned if not job.plan[n].solved])  # one run with what `ranges` asks for
        counts = calibration.positions(list(numbers))
        numbers = {n: at for n, at in numbers.items() if counts[n] >= self.positions}
        if not numbers:
            return {"tensors": 0}
        ranges = calibration.channel_ranges(list(numbers))
        tensors = [(at, *ranges[n]) for n, at in numbers.items() if ranges[n][0].shape == at.shape]
        values = centre(allowed.count, allowed.sums, tensors)
        before = graph.digest()
        taken = shift(graph, allowed, values)
        calibration.moved(before, {name: (axis, 1.0, off) for (name, axis), off in taken.items()})
        kept = {n: _kept(*ranges[n], taken[n, axis]) for n in numbers if (n, axis := channel_axis(graph, n)) in taken}
        return {"tensors": len(taken), "kept_share_of_range": kept}


def _kept(low: Array, high: Array, off: Array) -> float:
    """Width of a tensor's grid after it was centred, relative to that before."""
    old, new = (max(float(b.max()), 0.0) - min(float(a.min()), 0.0) for a, b in ((low, high), (low - off, high - off)))
    return round(new / old, 4) if old > 0 else 1.0
