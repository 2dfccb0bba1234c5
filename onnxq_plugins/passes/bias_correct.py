"""bias-correct: take back the mean error that rounding the weights adds to each output channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.calibration.propagation import propagate
from onnxq_plugins.job import Job, Pass, Service, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import bias_shift


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """Bias correction: plan for each layer the shift (W - Wq) E[x] of its bias, with E[x] the mean of its input per
    channel.

    method   ``empirical``: means over the calibration data. ``analytic``: from the statistics of the BatchNormalizations
             that were folded into the layers before (a model exported without folding them), as means of clipped normal
             distributions; no data needed

        b <- b + (W - Wq) E[x];    E[max(x, 0)] = mu Phi(mu / sigma) + sigma phi(mu / sigma)   (``analytic``)

    A channel with few weights (depthwise: 9) cannot average its rounding errors out; their sum, times the mean of an
    input that a ReLU made positive, shifts the whole channel. Weights must have their codes before, so what is still
    open is solved first. MatMul has no bias, hence no correction. The pass `round` solves biases itself: this one behind
    it would replace them.

    Source: Data-Free Quantization (arXiv 1906.04721), section 4.2; the bias that minimises the layer's squared output
    error has this closed form.
    Cost: one run over the data (``empirical``).
    """

    name: ClassVar[str] = "bias-correct"
    stage: ClassVar[Stage] = "finish"
    provides: ClassVar[frozenset[Service]] = frozenset({"bias"})
    method: Literal["empirical", "analytic"] = "empirical"

    def apply(self, job: Job) -> dict[str, Any]:
        graph = job.graph
        layers = [y for y in graph.layers if y.weight in job.plan and y.op in ("Conv", "Gemm")]
        if self.method == "analytic":
            told = propagate(graph, {}, through=False)
            means_of = {
                y.name: told[y.input].mean
                for y in layers
                if y.input in told and told[y.input].mean.size == y.shape[y.in_axis] * y.groups
            }
        elif not job.calibration.ready and all(graph.is_constant(name) for name in job.plan):
            job.note("bias-correct was left out: without --data there are no means to correct by")
            return {"layers": 0}
        else:
            means = job.calibration.means([y.input for y in layers])
            means_of = {y.name: means[y.input] for y in layers}
        complete(job)
        left = [y.name for y in layers if y.name not in means_of]
        if left:
            job.note(
                f"bias-correct left {len(left)} of {len(layers)} layers out, since no BatchNorm "
                f"statistics tell the mean of their inputs ({', '.join(left[:4])}"
                f'{" ..." if len(left) > 4 else ""}); method = "empirical" needs only data'
            )
        largest = 0.0
        for layer in layers:
            if layer.name in means_of:
                shift = bias_shift(graph, layer, job.plan[layer.weight], means_of[layer.name])
                bias = graph.constant(layer.bias) if layer.bias is not None else np.zeros(1)
                largest = max(largest, float(np.abs(shift).max() / max(float(np.abs(bias).max()), 1e-30)))
                job.plan |= {layer.weight: replace(job.plan[layer.weight], shift=shift.astype(np.float32))}
        return {
            "layers": len(means_of),
            "largest_shift_relative_to_bias": round(largest, 6),
            **({"left_out": left} if left else {}),
        }
