"""How accurate the network would be, quantized as graph and plan stand: the trial of passes that rewrite a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import channels
from onnxq_plugins.calibration.shapes import spatial_sizes
from onnxq_plugins.export.qdq import export
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.complete import activation_spec, complete_weight
from onnxq_plugins.layers.problem import bias_shift
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan, QuantSpec


class Preview:
    """The quantized network for a job's present graph and plan: open activations take their extremes, open weights the
    nearest codes, and a corrected bias where the recipe has a pass that corrects biases. The job is not changed.

    samples   number of calibration samples that errors are measured on, evenly spaced
    """

    def __init__(self, job: Job, samples: int = 32) -> None:
        assert job.calibration.data is not None
        self.job, self.samples = job, Samples.of(job.graph.model(), job.calibration.data.spread(samples))

    def sqnr(self) -> float:
        """Signal to noise ratio of the worst output in dB, pooled over the samples. Entries of what a pass has touched count
        as open, as they will when it ends (law L5)."""
        graph, calibration = self.job.graph, self.job.calibration
        stale = [n for n in self.job.plan if n in graph.touched]
        plan = self.job.plan | {n: self.job.plan[n].request() for n in stale}
        names = [n for n in plan if not graph.is_constant(n) and not plan[n].solved]
        ranges = calibration.ranges(names)
        plan |= {n: activation_spec(ranges[n], plan[n]) for n in names}
        job = replace(self.job, plan=plan, report=Report())
        layers = Planned.of(job).layers
        corrects = job.recipe.provides("bias")
        inputs = [y.input for y in layers if corrects and y.op in ("Conv", "Gemm") and channels(graph, y.input)]
        means = calibration.means(list(dict.fromkeys(inputs)))
        assert calibration.data is not None
        sizes = spatial_sizes(graph, layers, next(iter(calibration.data)))
        weights = {y.weight: _weight(job, y, means, sizes.get(y.name, ())) for y in layers}
        return sqnr(job, plan | weights, self.samples)


def sqnr(job: Job, plan: Plan, samples: Samples) -> float:
    """SQNR of the worst output in dB, of the model as it is written: the same on every machine."""
    session = runtimes.session(export(job.graph, plan, job.target), optimize=False)
    return samples.score(worst_sqnr, samples.outputs(session))


def multiply_adds(job: Job, layers: Sequence[Layer]) -> float:
    """Multiply-adds of layers over all calibration samples."""
    known = [layer for layer in layers if job.graph.shape(layer.input) is not None]
    positions = job.calibration.positions([layer.input for layer in known])
    strides = {layer.name: np.prod(layer.attrs.get("strides") or [1]) for layer in known}
    return float(sum(positions[y.input] * np.prod(y.shape) / strides[y.name] for y in known))


def _weight(job: Job, layer: Layer, means: dict[str, Array], sizes: Sequence[int]) -> QuantSpec:
    """The solved entry of a layer's weight; the shift of its bias takes back the mean error."""
    spec = job.plan[layer.weight]
    if spec.codes is not None:
        return spec
    spec = complete_weight(job, layer, spec)
    if layer.op not in ("Conv", "Gemm") or layer.input not in means or not Planned.of(job).input(layer):
        return spec
    return replace(spec, shift=bias_shift(job.graph, layer, spec, means[layer.input], sizes))
