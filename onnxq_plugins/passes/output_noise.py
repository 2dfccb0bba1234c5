"""output-noise: spend a few more bytes on the layers whose rounding is predicted to cost most per byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.calibration import channels
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import pinned, weight_request
from onnxq_plugins.search.gains import Gains
from onnxq_plugins.solvers.allocate import allocate
from onnxq_plugins.spec import Array, QuantSpec, fake, solve_minmax


@dataclass(frozen=True)
class OutputNoise(Pass):
    """Spend a few more bytes on the layers whose rounding is predicted to cost most per byte.

    bits    of the wider codes
    share   what they may add to the codes of the network, as a fraction of what all would take with `bits`

        noise of a layer = sum_o g_o sum_d (w_od - q_od)^2 var x_d,   least sum over layers within the bytes

    Plans requests, which later passes solve. The noise of a layer is that of its nearest codes on uncorrelated inputs,
    relative to its signal, each output weighed by what its readers make of it (`search/gains.py`). In networks whose early
    layers are narrow these take few bytes and most of the noise. Layers whose bits a [[layer]] rule sets keep them; without
    data nothing is widened.

    Source: ours; noise that adds up over layers as in mixed precision by sensitivities (arXiv 2302.05397), without its runs.
    Cost: one run over the data for moments, two passes over the weights.
    """

    name: ClassVar[str] = "output-noise"
    bits: int = 8
    share: float = 0.03

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits} must be from 3 to 8")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share = {self.share} must lie in [0, 1]")

    def apply(self, job: Job) -> dict[str, Any]:
        if not job.calibration.ready:
            job.note("output-noise was skipped: without data there are no inputs to predict noise from")
            return {"widened": []}
        wide, planned = self._wider(job), Planned.of(job).layers
        inputs = dict.fromkeys(y.input for y in planned if channels(job.graph, y.input))
        moments = job.calibration.moments(list(inputs)) if wide else {}
        gains = Gains(job.graph, moments)
        layers = [y for y in planned if y.name in wide and y.name in gains.rows]
        noise, cost = [], []
        for layer in layers:
            known, options = moments[layer.input], (job.plan[layer.weight], wide[layer.name])
            variance = np.maximum(known.square - known.mean**2, 0.0)
            noise.append(np.array([_noise(job, layer, one, variance, gains.rows[layer.name]) for one in options]))
            cost.append(np.array([float(np.prod(layer.shape)) * one.bits for one in options]))
        whole = self.bits * sum(float(np.prod(layer.shape)) for layer in planned)
        chosen = allocate(noise, cost, sum(float(one[0]) for one in cost) + self.share * whole) if layers else []
        assert chosen is not None  # those of few bits fit
        taken = [layer for layer, number in zip(layers, chosen, strict=True) if number]
        job.plan |= {layer.weight: wide[layer.name] for layer in taken}
        before, after = (sum(float(n[k]) for n, k in zip(noise, at, strict=True)) for at in ([0] * len(noise), chosen))
        return {"widened": [layer.name for layer in taken], "predicted_noise": round(after / max(before, 1e-300), 4)}

    def _wider(self, job: Job) -> dict[str, QuantSpec]:
        """Layer -> the request of its weight with more bits, where that is open and its inputs are channels."""
        graph, planned, fixed = job.graph, Planned.of(job), pinned(job.graph, job.recipe)
        wider = {}
        for layer in planned.layers:
            spec, more = job.plan[layer.weight], weight_request(graph, job.recipe, job.target, layer, self.bits)
            known = channels(graph, layer.input) == layer.shape[layer.in_axis] * layer.groups
            narrow = not spec.solved and spec.bits < self.bits and layer.name not in fixed
            if known and narrow and layer.op != "ConvTranspose" and planned.rule(layer, more) is not None:
                wider[layer.name] = more
        return wider


def _noise(job: Job, layer: Layer, spec: QuantSpec, variance: Array, gain: Array) -> float:
    """Noise of the nearest codes at a layer's readers, relative to its signal.

    variance   of its inputs [channels]
    gain       weight of a unit of noise variance on each output [outputs]
    """
    with job.graph.mapped.reading():
        weight = job.graph.constant(layer.weight)
        error = np.square(layer.matrix(weight - fake(weight, solve_minmax(weight, spec))))
    each = error.reshape(*error.shape[:2], -1, max(int(np.prod(layer.shape[2:])), 1)).sum(axis=3)
    return float(np.einsum("goi,gi,go->", each, variance.reshape(layer.groups, -1), gain.reshape(layer.groups, -1)))
