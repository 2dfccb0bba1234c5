"""split-weights: split off the dominant centre taps of convolutions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.graph import Layer, replace_with_sum
from onnxq_plugins.graph.rewrites import centre_of, centre_problem
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layers.sums import narrow_ranges
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, QuantSpec, decode, encode, fake, solve_minmax
from onnxq_plugins.targets import channel_block


@dataclass(frozen=True)
class SplitWeights(Pass):
    """Split off the dominant centre taps of convolutions.

    Coarse and fine weight splitting, for re-parameterised networks such as RepVGG: folding 1x1 and identity branches into a
    3x3 kernel leaves a centre tap that dwarfs the others, and the scale that covers it is too coarse for them. The layer
    becomes the sum of two that read the same input:

        coarse = g round(centre / g),  g = max |centre| / n       n: largest code; g per output channel, or per tensor
        fine = W - coarse                                         open, as the recipe asks for

    The coarse part is exactly on its grid, so it adds no error, and is a pointwise convolution. What it leaves of the centre
    is at most g / 2.

    gain    a layer is split if that lowers the mean squared error of its rounded weights by at least so many dB
    below   and, beside quantized activations, if the SQNR of the weights, rounded as they are, is below so many dB

    Both parts write 8-bit outputs with ranges of their own, and an integer Add joins them on the scale of the layer's old
    output: two more roundings of activations, though their ranges leave out what that of the result clips. Where the weights
    are fine enough as they are, these cost more than the split gains. The default of `below` is about where gain and loss
    cancel in `python -m benchmarks.split_weights`, for dense and depthwise layers alike. Layers without an odd kernel, with
    pads below half of it, with solved scales or, beside quantized activations, on a target without an integer Add stay
    unchanged and are reported. Put this pass before all that solve scales.

    The bias goes to the fine part, whose scales, and with them the steps of the bias, are smaller. Only where a channel of
    that part is empty, and hence has the scale 1, does it go to the coarse one.

    Source: Coarse & Fine Weight Splitting (arXiv 2312.10588); the coarse part as a pointwise convolution, and the rule which
    layers to split, are our own.
    Cost: milliseconds per layer, and one run over the data. At run time one pointwise convolution (1 / kernel taps of the
    multiply-adds; the same for a depthwise convolution, which gains least) and one Add for each layer that is split.
    """

    name: ClassVar[str] = "split-weights"
    gain: float = 6.0
    below: float = 33.0

    def __post_init__(self) -> None:
        if not self.gain >= 0:
            raise ValueError(f"gain = {self.gain} must be at least 0")
        if not self.below > 0:
            raise ValueError(f"below = {self.below} must be positive")

    def apply(self, job: Job) -> dict[str, Any]:
        rows: dict[str, dict[str, float]] = {}
        left: dict[str, str] = {}
        sums: list[list[str]] = []
        for layer in Planned.of(job).layers:
            reason = _unfit(job, layer)
            if not reason:
                weight, spec = job.graph.constant(layer.weight), job.plan[layer.weight]
                coarse, fine = split(layer, weight, spec)
                before, after = error(weight, spec), error(fine, spec)
                gain, fits = decibel(before, after), decibel(float(np.mean(weight.astype(np.float64) ** 2)), before)
                reason = self._worthless(gain, fits, bool(Planned.of(job).input(layer)))
                if not reason:
                    _replace(job, layer, coarse, fine, sums)
                    rows[layer.name] = {
                        "gain_db": round(gain, 2),
                        "weights_db_before": round(fits, 2),
                        "more_multiply_adds": round(1 / float(np.prod(layer.shape[2:])), 4),
                    }
                    continue
            left[layer.name] = reason
        narrow_ranges(job, sums)
        return {"layers": rows, "left_alone": left}

    def _worthless(self, gain: float, fits: float, quantized: bool) -> str:
        """Why a split would not be worth it; "" if it is."""
        if gain <= 0 or gain < self.gain:
            return f"the error of its weights would fall by only {gain:.1f} dB"
        if quantized and fits >= self.below:
            return f"its weights have {fits:.1f} dB as they are: rounding two more activations would cost more than it gains"
        return ""


def split(layer: Layer, weight: Array, spec: QuantSpec) -> tuple[QuantSpec, Array]:
    """The entry, with scale and codes, of the coarse part [OC, IC/groups, 1, ...] of a convolution, and the fine part in the
    weight's shape, float32: their sum is the weight to the last bit.

    weight   [OC, IC/groups, *kernel] with odd kernel sizes, float32
    spec     the request of the weight: bits, and whether scales are per tensor or finer
    """
    at = centre_of(weight.shape)
    block = None if spec.block is None else channel_block(layer)
    request = replace(spec.request(), block=block, sub_block=None, pow2=spec.pow2 and spec.sub_block is None)
    coarse = solve_minmax(weight[at], request)
    coarse = replace(coarse, codes=encode(weight[at], coarse))
    assert coarse.codes is not None
    fine = weight.copy()
    fine[at] -= decode(coarse.codes, coarse)  # of like size, or one is 0: the difference has no rounding error
    return coarse, fine


def error(weight: Array, spec: QuantSpec) -> float:
    """Mean squared error of a weight that is rounded as requested, without clipping."""
    return float(np.mean((weight - fake(weight, solve_minmax(weight, spec)).astype(np.float64)) ** 2))


def decibel(power: float, noise: float) -> float:
    """The ratio of two powers in dB, at most `IDENTICAL`; 0 where both are 0."""
    if noise == 0:
        return IDENTICAL if power else 0.0
    return min(IDENTICAL, float(10 * np.log10(max(power, 1e-300) / noise)))


def _unfit(job: Job, layer: Layer) -> str:
    """Why a planned layer cannot be split; "" if it can."""
    spec, target = job.plan[layer.weight], job.target
    if layer.op != "Conv" or int(np.prod(layer.shape[2:])) == 1:
        return "only convolutions with a kernel larger than 1 have a centre among other taps"
    if problem := centre_problem(job.graph, layer):
        return problem
    if spec.solved:
        return "its scales are solved"
    weight = job.graph.constant(layer.weight)
    if not np.isfinite(weight).all():
        return "its weights are not finite"
    planned = Planned.of(job)
    if planned.input(layer) and "Add" not in target.integer_ops:
        return f"target '{target.name}' has no integer Add that would join its parts"
    coarse, _ = split(layer, weight, spec)
    if planned.rule(layer, coarse) is None:
        return f"target '{target.name}' cannot run its coarse part as {coarse.describe()}"
    return ""


def _replace(job: Job, layer: Layer, coarse: QuantSpec, fine: Array, sums: list[list[str]]) -> None:
    """Split a layer and plan its parts. The result keeps its entry: the sum is the same tensor. Where it is quantized, the
    outputs of both parts and the result are appended to `sums`."""
    assert coarse.codes is not None
    spec, whole = job.plan[layer.weight], job.plan.get(layer.result)
    quantized = bool(Planned.of(job).input(layer))
    parts = {"fine": fine, "coarse": decode(coarse.codes, coarse)}
    if not fine.reshape(len(fine), -1).any(axis=1).all():
        parts = dict(reversed(parts.items()))  # the first part gets the bias
    layers = dict(zip(parts, replace_with_sum(job.graph, layer, list(parts.values())), strict=True))
    job.plan = job.plan.without(layer.weight) | {layers["fine"].weight: spec.request(), layers["coarse"].weight: coarse}
    if whole is not None:
        job.keep([layer.result])
        if quantized:
            outputs = [part.output for part in layers.values()]
            job.plan |= {output: whole.request() for output in outputs}
            sums.append([*outputs, layer.result])
