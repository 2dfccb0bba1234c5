"""bias-correct: take back the mean error that rounding the weights adds to each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.complete import complete
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.qdq import weight_values


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """Empirical bias correction: b += (W - Wq) E[x], with E[x] the mean of the layer's input per channel, over the
    calibration data.

    A channel with few weights (depthwise: 9) cannot average its rounding errors out; their sum, times the mean of an
    input that a ReLU made positive, shifts the whole channel. Weights must have their codes before, so what is still
    open is solved first. MatMul has no bias, hence no correction.

    Source: Data-Free Quantization (arXiv 1906.04721); the bias that minimises the layer's squared output error has this
    closed form.
    Cost: one run over the data.
    """

    name: ClassVar[str] = "bias-correct"
    exact: ClassVar[bool] = False

    def apply(self, job: Job) -> dict[str, Any]:
        if job.calibration.data is None and all(job.graph.is_constant(name) for name in job.plan):
            job.report["notes"].append("bias-correct was left out: without --data there are no means to correct by")
            return {"layers": 0}
        complete(job)
        layers = [y for y in job.graph.layers if y.weight in job.plan and y.bias is not None and y.op in ("Conv", "Gemm")]
        means = job.calibration.means([y.input for y in layers])
        largest = 0.0
        for layer in layers:
            weight, bias = job.graph.constant(layer.weight), job.graph.constant(layer.bias or "")
            error = layer.matrix(weight.astype(np.float64) - weight_values(layer, job.plan[layer.weight]))
            taps = int(np.prod(layer.shape[2:])) if layer.op == "Conv" else 1
            summed = error.reshape(*error.shape[:2], -1, taps).sum(axis=3)  # [groups, outputs, inputs]
            mean = means[layer.input].reshape(layer.groups, -1)
            shift = np.einsum("goi,gi->go", summed, mean).reshape(-1)
            largest = max(largest, float(np.abs(shift).max() / max(float(np.abs(bias).max()), 1e-30)))
            job.graph.set_constant(layer.bias or "", (bias + shift).astype(np.float32))
        return {"layers": len(layers), "largest_shift_relative_to_bias": round(largest, 6)}
