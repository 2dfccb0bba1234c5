"""How accurate the network would be, quantized as the plan stands: a measurement that is kept up to date while a pass
rescales channel groups, without another run over the calibration data.

Ranges and means scale with their channels, so that a trial costs an export and some runs, never a calibration."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from onnxq_plugins.calibration import channel_axis, channels
from onnxq_plugins.calibration.shapes import spatial_sizes
from onnxq_plugins.graph import ChannelGroup, Layer
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.complete import activation_spec, complete_weight
from onnxq_plugins.layers.problem import bias_shift
from onnxq_plugins.measure.networks import Measure
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan, QuantSpec

ChannelRange = tuple[Array, Array]  # lowest and highest value per channel [C], or of the tensor as a whole ()


class Preview:
    """The quantized network for the job's current graph and plan: open activations take their extremes, open weights the
    nearest codes, and a corrected bias where the recipe has a pass that corrects biases. The job is not changed.

    samples   number of calibration samples that errors are measured on, evenly spaced
    """

    def __init__(self, job: Job, samples: int = 32) -> None:
        assert job.calibration.data is not None
        graph, self.job, planned = job.graph, job, Planned.of(job)
        self.measure = Measure(graph, job.target, job.calibration.data.spread(samples))
        per_channel = [n for n in planned.activations if channels(graph, n)]
        self.ranges: dict[str, ChannelRange] = dict(job.calibration.channel_ranges(per_channel))
        whole = job.calibration.ranges([n for n in planned.activations if n not in self.ranges])
        self.ranges |= {n: (np.array(low), np.array(high)) for n, (low, high) in whole.items()}
        corrects = job.recipe.provides("bias")
        corrected = [layer for layer in planned.layers if corrects and layer.op in ("Conv", "Gemm")]
        inputs = [layer.input for layer in corrected]
        self.sizes = spatial_sizes(graph, corrected, next(iter(job.calibration.data)))
        self.means = dict(job.calibration.means([n for n in inputs if channels(graph, n)]))
        self.stale: set[str] = set()  # tensors whose solution in the plan is no longer valid
        self.weights: Plan = Plan({})

    def fork(self) -> Preview:
        """An independent copy, for a rescaling that may be undone."""
        fork = copy.copy(self)
        fork.ranges, fork.means, fork.stale = dict(self.ranges), dict(self.means), set(self.stale)
        return fork

    def follows(self, group: ChannelGroup) -> bool:
        """True if the statistics of the group's activations are per channel, so that `rescaled` can keep them up to date.
        The channels of attention heads, for example, lie along another axis."""
        return all(
            m.axis == channel_axis(self.job.graph, m.tensor) and channels(self.job.graph, m.tensor)
            for m in group.members
            if not m.constant and (m.tensor in self.ranges or m.tensor in self.means)
        )

    def rescaled(self, group: ChannelGroup, factors: Array) -> None:
        """Update the statistics after a group that it `follows` was rescaled in the graph."""
        for member in group.members:
            spread = np.repeat(factors, member.index.shape[1])
            at = member.index.ravel()
            if not member.constant and member.tensor in self.ranges:
                low, high = (side.copy() for side in self.ranges[member.tensor])
                low[at], high[at] = low[at] * spread, high[at] * spread
                self.ranges[member.tensor] = low, high
            if not member.constant and member.tensor in self.means:
                self.means[member.tensor] = self.means[member.tensor].copy()
                self.means[member.tensor][at] *= spread
        touched = {m.tensor for m in group.members}
        self.stale |= touched
        self.weights = self.weights.without(
            *(layer.weight for layer in self.job.graph.layers if touched & {layer.weight, layer.bias, layer.input})
        )

    def sqnr(self) -> float:
        """Signal to noise ratio of the worst output in dB, pooled over the samples."""
        ranges = {n: (float(low.min()), float(high.max())) for n, (low, high) in self.ranges.items()}
        plan = self.job.plan | {n: spec.request() for n, spec in self.job.plan.items() if n in self.stale}
        plan |= {n: activation_spec(ranges[n], plan[n]) for n in ranges if not plan[n].solved}
        job = replace(self.job, plan=plan | self.weights, report=Report())
        layers = [layer for layer in Planned.of(job).layers if layer.weight not in self.weights]
        self.weights |= {layer.weight: self._weight(job, layer) for layer in layers}
        return self.measure.score(job.plan | self.weights)

    def _weight(self, job: Job, layer: Layer) -> QuantSpec:
        """The solved entry of a layer's weight; the shift of its bias takes back the mean error."""
        spec = job.plan[layer.weight]
        if spec.codes is not None:
            return spec
        spec = complete_weight(job, layer, spec)
        if layer.op not in ("Conv", "Gemm") or layer.input not in self.means or not Planned.of(job).input(layer):
            return spec
        sizes = self.sizes.get(layer.name, ())
        return replace(spec, shift=bias_shift(job.graph, layer, spec, self.means[layer.input], sizes))
