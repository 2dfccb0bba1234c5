"""split-outliers: compute the few input channels that widen a grid in float, beside the integer kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from onnxq_plugins.calibration import Calibration, Moments
from onnxq_plugins.data import open_data
from onnxq_plugins.errors import Reason
from onnxq_plugins.graph import Layer, split_off_inputs
from onnxq_plugins.graph.flow import readers
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.layers.complete import activation_spec
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.outliers import Step, cheapest, noise, widest_first
from onnxq_plugins.spec import Array

_SAMPLES = 8  # for the sizes of inputs and outputs
_SUM = 8  # multiply-adds that an addition in float, with its reads and writes, counts as
_OPERATOR = 100_000  # and that one more operator counts as, whatever its size
_SHARE = 8  # one channel of so many at most
_KEEPS_LAST_AXIS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Compute the few input channels that widen a grid in float, beside the integer kernel.

    A few channels behind a GELU, a SiLU or a LayerNormalization can be ten times larger than all others, and on the 8-bit
    grid that covers them the others are lost. Here the integer kernel does without them:

        W x = W' x + V x[outliers]        W': W with 0 for the outliers;  V: their part of W, in float

    The grid of x covers the other channels alone. The outliers saturate there, which nothing needs to mask, as their weights
    are 0. A Gather and a small MatMul or convolution compute the rest, and an Add joins both.

    channels   float channels of a tensor at most; never more than one of eight
    gain       dB by which the noise of all layers, each relative to its outputs, must fall in all; else nothing is split
    worth      dB that the last channels must gain for each percent of the network's multiply-adds that they cost

    Errors of rounding are predicted at the outputs of the layers, from the ranges of channels and the weights
    (`solvers.outliers`). The channels that lower their sum most for their cost are taken, one step after another. A sum in
    float counts as eight multiply-adds for each of its elements, and each of the new operators as 100,000 more.

    The tensor must be written in float: where an integer kernel writes it, its codes are all there is. All its integer
    readers must be dense layers. Behind a Conv the sum is in float, even if the next operator is an integer one.

    Source: the decomposition of LLM.int8() (arXiv 2208.07339), with channels that are chosen once instead of for each input,
    by predicted noise instead of a threshold of 6.
    Cost: none where integer kernels write all activations; otherwise the run over the data that `ranges` needs, which it
    repeats if something was split, and one over 8 samples.
    """

    name: ClassVar[str] = "split-outliers"
    stage: ClassVar[Stage] = "rewrite"  # it belongs in front of what chooses ranges
    channels: int = 16
    gain: float = 2.0
    worth: float = 0.6

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels = {self.channels} must be at least 1")
        if not (self.gain > 0 and self.worth > 0):
            raise ValueError(f"gain = {self.gain} and worth = {self.worth} must be positive")

    def apply(self, job: Job) -> dict[str, Any]:
        tensors = _tensors(job)
        if not tensors or not job.calibration.ready:
            return {"layers": {}}
        # what `ranges` asks for: one run over the data serves both
        job.calibration.ranges([name for name in Planned.of(job).activations if not job.plan[name].solved])
        sizes, gain = _Sizes(job), 0.0
        while True:
            options, rest = self._options(sizes, tensors)
            steps = cheapest([o.noise for o in options], [o.cost for o in options], rest, self.worth)
            before = rest + float(sum(o.noise[0] for o in options))
            gain = 10 * np.log10(before / steps[-1].noise) if steps and steps[-1].noise > 0 else 0.0
            if gain < self.gain:
                return {"layers": {}, "gain": round(float(gain), 1)}
            if sizes.measured:
                break
            sizes.measure()
        rows = _split(job, options, steps)
        count = len(rows)
        job.note(
            f"{count} layer{'s' * (count > 1)} compute{'s' * (count == 1)} a few channels that would widen the grid of all "
            f"others in float: {gain:.1f} dB less noise by prediction for {steps[-1].cost:.1f} % more work"
        )
        return {"layers": rows, "gain": round(float(gain), 1), "cost_percent": round(steps[-1].cost, 2)}

    def _options(self, sizes: _Sizes, tensors: dict[str, list[Layer]]) -> tuple[list[_Option], float]:
        """What may become of each tensor, and the noise of all other layers."""
        total = max(sum(sizes.work.values()), 1.0)
        options, others = [], {layer.name: layer for layer in sizes.layers}
        for name, group in tensors.items():
            low, high = sizes.ranges[group[0].input]
            if any(sizes.ranges[y.input][0].size != y.shape[y.in_axis] for y in group):
                continue  # its channels are unknown
            order = widest_first(low, high, min(self.channels, len(low) // _SHARE))
            count = np.arange(len(order) + 1)
            each = [sizes.work[y.name] * (count + _SUM / np.prod(y.shape[2:])) / y.shape[y.in_axis] for y in group]
            operators = _OPERATOR * (2 * len(group) + len({y.input for y in group}))
            cost = 100 / total * (np.sum(each, axis=0) + operators) * (count > 0)
            noises = np.sum([sizes.noise(y, order) for y in group], axis=0)
            options.append(_Option(name, tuple(group), order, noises, cost, low, high))
            for layer in group:
                del others[layer.name]
        return options, float(sum(sizes.noise(layer)[0] for layer in others.values()))


class _Option(NamedTuple):
    """A tensor whose outliers may be computed in float: its readers, its channels in the order in which they go, noise and
    cost (percent of the network's multiply-adds) with 0, 1, ... of them in float, and its ranges [C]."""

    tensor: str
    layers: tuple[Layer, ...]
    order: Array
    noise: Array
    cost: Array
    low: Array
    high: Array


class _Sizes:
    """How large values are that integer layers of known rank read and write: by the ranges of inputs, with a range of six
    standard deviations, until they are measured.

    ranges   of the channels of each input
    work     multiply-adds of each layer in one sample
    """

    def __init__(self, job: Job) -> None:
        view, graph, calibration = Planned.of(job), job.graph, job.calibration
        self.job, self.inputs, self.moments = job, {y.name: view.input(y) for y in view.layers}, dict[str, Moments]()
        read = [y for y in view.layers if self.inputs[y.name] and y.op != "ConvTranspose"]
        self.layers = [y for y in read if graph.shape(y.input) is not None and graph.shape(y.output) is not None]
        inputs = [y.input for y in self.layers]
        self.ranges, self.means = calibration.channel_ranges(inputs), calibration.means(inputs)
        positions, data = calibration.positions(inputs), calibration.data
        assert data is not None
        count = data.size if data.size is not None else sum(1 for _ in data)
        self.work = {}
        for y in self.layers:
            values = positions[y.input] * self.means[y.input].size / count
            spread = y.shape[y.in_axis] * y.groups * float(np.prod(y.attrs.get("strides") or [1]))
            self.work[y.name] = values * float(np.prod(y.shape)) / spread

    @property
    def measured(self) -> bool:
        """True once they are."""
        return bool(self.moments)

    def measure(self) -> None:
        """Measure them on a few samples."""
        data = self.job.calibration.data
        assert data is not None
        few = Calibration(self.job.graph, open_data(data.spread(_SAMPLES), data.inputs), workers=self.job.workers)
        self.moments = few.moments([name for y in self.layers for name in (y.input, y.output)])

    def noise(self, layer: Layer, order: Array | None = None) -> Array:
        """Noise of a layer relative to the variance of its outputs, with 0, 1, ... channels of an order in float."""
        channels = layer.shape[layer.in_axis] * layer.groups
        low, high = self.ranges[layer.input]
        matrix = layer.matrix(self.job.graph.constant(layer.weight))
        if self.moments:
            power, outputs = self.moments[layer.input].square, self.moments[layer.output]
            signal = float((outputs.square - outputs.mean**2).sum())
        else:
            variance = np.square(high - low) / 36
            power = self.means[layer.input] ** 2 + variance
            energy = np.square(matrix).sum(axis=1).reshape(channels, -1).sum(axis=1)
            signal = float(energy @ (variance if variance.size == channels else np.full(channels, variance.mean())))
        if low.size != channels:
            low, high, power = np.full(channels, low.min()), np.full(channels, high.max()), np.full(channels, power.mean())
        plan = self.job.plan
        errors = noise(low, high, power, matrix, plan[self.inputs[layer.name]], plan[layer.weight], order)
        return errors / signal if signal > 0 else np.zeros(len(errors))


def _tensors(job: Job) -> dict[str, list[Layer]]:
    """Activations that are written in float, and whose integer readers are dense layers, with these."""
    graph, view = job.graph, Planned.of(job)
    layers = {layer.name: layer for layer in view.layers}
    found: dict[str, list[Layer]] = {}
    for name in view.activations:
        nodes = [n for n in sorted(readers(graph, name) & view.integer) if n in layers]
        group = [layers[n] for n in nodes]
        if (
            group
            and name not in view.coded
            and not job.plan[name].solved
            and len(group) == len(readers(graph, name) & view.integer)
            and all(_fits(job, name, layer) for layer in group)
            and all(layer.shape[layer.in_axis] >= 2 * _SHARE for layer in group)
        ):
            found[name] = group
    return found


def _fits(job: Job, name: str, layer: Layer) -> bool:
    """True if a dense layer reads the channels of a planned tensor in their order, on their way through operators that keep
    the last axis as it is."""
    graph, tensor = job.graph, layer.input
    if layer.groups > 1 or layer.op == "ConvTranspose" or job.plan[layer.weight].solved:
        return False
    while tensor != name:
        node = graph.producer(tensor)
        if node is None or node.op not in _KEEPS_LAST_AXIS or layer.op == "Conv":
            return False
        last = [(graph.shape(t.name) or (None,))[-1] for t in (node.inputs[0], node.outputs[0])]
        if last != [layer.shape[layer.in_axis]] * 2:
            return False
        tensor = node.inputs[0].name
    return True


def _split(job: Job, options: Sequence[_Option], steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """Split the layers, plan them, and solve the ranges of what they read. Returns the rows of the report."""
    digest, integer = job.graph.digest(), Planned.of(job).integer
    counts = {step.tensor: step.channels for step in steps}
    rows: dict[str, dict[str, Any]] = {}
    for number, count in sorted(counts.items()):
        option = options[number]
        channels, rest = option.order[:count], np.setdiff1d(np.arange(len(option.low)), option.order[:count])
        by_input: dict[str, list[Layer]] = defaultdict(list)
        for layer in option.layers:
            by_input[layer.input].append(layer)
            rows[layer.name] = {"channels": np.sort(channels).tolist()}
        for group in by_input.values():
            for layer, part in zip(group, split_off_inputs(job.graph, group, channels), strict=True):
                _plan(job, layer, part, bool(readers(job.graph, layer.result) & integer))
        ends = float(option.low[rest].min()), float(option.high[rest].max())
        job.plan |= {option.tensor: activation_spec(ends, job.plan[option.tensor])}
    job.calibration.carry(digest)
    return rows


def _plan(job: Job, layer: Layer, part: Layer, read: bool) -> None:
    """Plan what became of a layer.

    read   by an integer operator is its result, which is now a sum in float
    """
    count = part.shape[part.in_axis]
    job.report.floats[part.name] = Reason("outliers", f"it computes {count} outlier channels for '{layer.name}'")
    if layer.op in job.target.output_scale:
        job.plan |= {job.graph.layer(layer.name).output: job.plan[layer.result].request()}
    if layer.result in job.plan and not read:
        job.plan = job.plan.without(layer.result)
