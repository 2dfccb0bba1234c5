"""scale-inputs: scale the channels of model inputs to comparable ranges.

One 8-bit scale cannot serve input channels of very different size, such as cepstra or tabular features. `python -m
benchmarks.passes` shows the gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.calibration import channel_axis, channels
from onnxq_plugins.graph import ChannelGroup, channel_groups, rescale
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class ScaleInputs(Pass):
    """Scale the channels of model inputs to comparable ranges.

    Multiplies each channel of a model input by a constant and undoes it in the weights that read it, where the channels are
    so unequal that one 8-bit scale cannot serve them all: cepstra (the first coefficient is 100 times the others), tabular
    features, sensor fusion. Images are not changed.

    With a = the largest |value| of a channel and w = the norm of the weights that read it, the factors (w / a)^0.5 minimize
    the noise that one step for all channels adds to the layer's output, sum_c step^2 w_c^2 / 12.

        x_c <- f_c x_c,   W_c <- W_c / f_c,   f_c = sqrt(w_c / a_c)

    gain   least ratio of that noise before and after for which the extra operator is inserted

    Source: SmoothQuant (arXiv 2211.10438), with alpha = 0.5, at the model's input instead of behind a LayerNorm.
    Cost: one pass over the data, one Mul at run time.
    """

    name: ClassVar[str] = "scale-inputs"
    stage: ClassVar[Stage] = "rewrite"
    gain: float = 2.0

    def apply(self, job: Job) -> dict[str, Any]:
        if job.target.coded_ports:  # inputs arrive as codes of one scale: what stands behind them is too late
            return {}
        graph, scaled = job.graph, {}
        planned = Planned.of(job)
        roots = {graph.root(key) for layer in graph.layers if (key := planned.source(layer.input))}
        inputs = [n for n in graph.inputs if n in roots and channels(graph, n)]
        ranges = job.calibration.channel_ranges(inputs) if inputs else {}
        for name, (low, high) in ranges.items():
            size = np.maximum(np.abs(low), np.abs(high))
            if size.max() <= 2 * np.median(size) or not np.median(size):
                continue  # nothing to gain: do not search the graph
            factors, gain = self._scale(job, name, np.maximum(size, size.max() * 1e-6))
            if gain:
                scaled[name] = {
                    "noise_reduced_by": round(gain, 2),
                    "factors": [round(float(factors.min()), 6), round(float(factors.max()), 6)],
                }
        return scaled

    def _scale(self, job: Job, name: str, size: Array) -> tuple[Array, float]:
        """Insert the Mul; remove it and return a gain of 0 if that is not possible or not worth it."""
        graph = job.graph
        axis, rank = channel_axis(graph, name), len(graph.shape(name) or ())
        x = graph.tensor(name)
        scaled = graph.add_variable(f"{name}_scaled", like=x)
        readers = [n for n in graph.consumers(name) if n.op != "Shape"]
        ones = graph.add_constant(f"{name}_factors", np.ones([len(size)] + [1] * (rank - axis - 1), np.float32))
        for reader in readers:
            for i, tensor in enumerate(reader.inputs):
                if tensor is x:
                    reader.inputs[i] = scaled
        node = graph.add_node("Mul", f"{name}_scale", [x, ones], [scaled], before=graph.nodes[0])
        graph.tidy()
        group = next((g for g in channel_groups(graph, "rescale") if scaled.name in g.tensors and g.size == len(size)), None)
        weight = _weight_norms(job, group) if group is not None else np.zeros(1)
        if group is not None and weight.all():
            factors = np.sqrt(weight / size)
            factors /= np.exp(np.mean(np.log(factors)))
            before = size.max() ** 2 * np.sum(weight**2)
            after = np.max(size * factors) ** 2 * np.sum((weight / factors) ** 2)
            if before / after >= self.gain:
                rescale(graph, group, factors)
                if name in job.plan:
                    job.plan = job.plan.without(name) | {scaled.name: job.plan[name].request()}
                return factors, float(before / after)
        graph.bypass(node, x)
        graph.tidy()
        return size, 0.0


def _weight_norms(job: Job, group: ChannelGroup) -> Array:
    """Norm of the weights that read each channel of the group [channels]."""
    total = np.zeros(group.size)
    for member in group.weights:
        if member.role == "input":
            values = np.moveaxis(job.graph.constant(member.tensor), member.axis, 0).astype(np.float64)
            if member.rows:
                continue  # a grouped convolution at the input: no simple sum over its rows
            squares = np.sum(values.reshape(len(values), -1) ** 2, axis=1)
            total += squares[member.index].sum(axis=1)
    return np.sqrt(total)
