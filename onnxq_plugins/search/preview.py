"""How well a network would do, quantized as the plan stands: a measured answer that stays up to date while a pass rescales
channel groups, without reading the data again."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from onnxq_plugins.calibration import channel_axis, channels
from onnxq_plugins.graph import ChannelGroup, Layer
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.complete import activation_spec, complete_weight
from onnxq_plugins.layers.problem import bias_shift
from onnxq_plugins.measure.metrics import Measure
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan, QuantSpec

Range = tuple[Array, Array]  # lowest and highest value per channel [C], or of the tensor as a whole ()


class Trial:
    """The quantized network for the job's present graph and plan: open activations take their extremes, open weights the
    nearest codes, and a corrected bias where the recipe has a pass that corrects biases. The job is left alone.

    samples   of the calibration data that errors are measured on, spread evenly
    """

    def __init__(self, job: Job, samples: int = 32) -> None:
        assert job.calibration.data is not None
        graph, self.job = job.graph, job
        self.measure = Measure(graph, job.target, job.calibration.data.spread(samples))
        names = Planned.of(job).activations
        fine = [n for n in names if channels(graph, n)]
        self.ranges: dict[str, Range] = dict(job.calibration.channel_ranges(fine))
        whole = job.calibration.ranges([n for n in names if n not in self.ranges])
        self.ranges |= {n: (np.array(low), np.array(high)) for n, (low, high) in whole.items()}
        corrects = job.recipe.provides("bias")
        inputs = [y.input for y in graph.layers if corrects and y.weight in job.plan and y.op in ("Conv", "Gemm")]
        self.means = dict(job.calibration.means([n for n in inputs if channels(graph, n)]))
        self.stale: set[str] = set()  # tensors of which the plan's solution holds no longer
        self.weights: Plan = Plan({})

    def fork(self) -> Trial:
        """One that goes its own way from here, for a rescaling that may be taken back."""
        made = copy.copy(self)
        made.ranges, made.means, made.stale = dict(self.ranges), dict(self.means), set(self.stale)
        return made

    def follows(self, group: ChannelGroup) -> bool:
        """True if what is known of the group's activations is known channel by channel, so that `rescaled` can keep it up to
        date. The channels of attention heads, say, lie along another axis."""
        return all(
            m.axis == channel_axis(self.job.graph, m.tensor) and channels(self.job.graph, m.tensor)
            for m in group.members
            if not m.constant and (m.tensor in self.ranges or m.tensor in self.means)
        )

    def rescaled(self, group: ChannelGroup, factors: Array) -> None:
        """Take note that a group of the graph, one that it `follows`, was rescaled."""
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
            *(y.weight for y in self.job.graph.layers if touched & {y.weight, y.bias, y.input})
        )

    def sqnr(self) -> float:
        """Signal to noise ratio of the outputs in dB, averaged over samples and outputs."""
        job, graph = self.job, self.job.graph
        spans = {n: (float(low.min()), float(high.max())) for n, (low, high) in self.ranges.items()}
        opened = job.plan | {n: spec.request() for n, spec in job.plan.items() if n in self.stale}
        plan = opened | {n: activation_spec(spans[n], opened[n]) for n in spans if not opened[n].solved}
        trial = replace(job, plan=plan | self.weights, report=Report())
        layers = [y for y in graph.layers if y.weight in plan and y.weight not in self.weights]
        self.weights |= {y.weight: self._weight(trial, y) for y in layers}
        return self.measure.score(trial.plan | self.weights)

    def _weight(self, trial: Job, layer: Layer) -> QuantSpec:
        """The solved entry of a layer's weight; the mean error goes into the shift of its bias."""
        spec = trial.plan[layer.weight]
        if spec.codes is not None:
            return spec
        made = complete_weight(trial, layer, spec)
        if layer.op not in ("Conv", "Gemm") or layer.input not in self.means or not Planned.of(trial).input(layer):
            return made
        return replace(made, shift=bias_shift(trial.graph, layer, made, self.means[layer.input]))
