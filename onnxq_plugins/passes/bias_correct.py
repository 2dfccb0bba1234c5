"""bias-correct: take back the mean error that rounding the weights adds to each output channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.complete import complete
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layerwise import bias_shift
from onnxq_plugins.solvers.gaussian import clipped_moments
from onnxq_plugins.spec import Array

Moments = tuple[Array, Array]  # mean and variance per channel


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """Bias correction: plan for each layer the shift (W - Wq) E[x] of its bias, with E[x] the mean of its input per
    channel.

    method   ``empirical``: means over the calibration data. ``analytic``: from the statistics of the BatchNormalizations
             that were folded into the layers before (a model exported without folding them), as means of clipped normal
             distributions; no data needed

    A channel with few weights (depthwise: 9) cannot average its rounding errors out; their sum, times the mean of an
    input that a ReLU made positive, shifts the whole channel. Weights must have their codes before, so what is still
    open is solved first. MatMul has no bias, hence no correction. The pass `round` solves biases itself: this one behind
    it would replace them.

    Source: Data-Free Quantization (arXiv 1906.04721), section 4.2; the bias that minimises the layer's squared output
    error has this closed form.
    Cost: one run over the data (``empirical``).
    """

    name: ClassVar[str] = "bias-correct"
    method: Literal["empirical", "analytic"] = "empirical"

    def apply(self, job: Job) -> dict[str, Any]:
        graph = job.graph
        layers = [y for y in graph.layers if y.weight in job.plan and y.op in ("Conv", "Gemm")]
        if self.method == "analytic":
            expected = {y.name: moments[0] for y in layers if (moments := expected_moments(graph, y.input)) is not None
                        and moments[0].size == y.shape[y.in_axis] * y.groups}
        elif job.calibration.data is None and all(graph.is_constant(name) for name in job.plan):
            job.report["notes"].append("bias-correct was left out: without --data there are no means to correct by")
            return {"layers": 0}
        else:
            means = job.calibration.means([y.input for y in layers])
            expected = {y.name: means[y.input] for y in layers}
        complete(job)
        left = [y.name for y in layers if y.name not in expected]
        if left:
            job.report["notes"].append(f"bias-correct left {len(left)} of {len(layers)} layers out, since no BatchNorm "
                                       f"statistics tell the mean of their inputs ({', '.join(left[:4])}"
                                       f"{' ...' if len(left) > 4 else ''}); method = \"empirical\" needs only data")
        largest = 0.0
        for layer in layers:
            if layer.name in expected:
                shift = bias_shift(graph, layer, job.plan[layer.weight], expected[layer.name])
                bias = graph.constant(layer.bias) if layer.bias is not None else np.zeros(1)
                largest = max(largest, float(np.abs(shift).max() / max(float(np.abs(bias).max()), 1e-30)))
                job.plan |= {layer.weight: replace(job.plan[layer.weight], shift=shift.astype(np.float32))}
        return {"layers": len(expected), "largest_shift_relative_to_bias": round(largest, 6),
                **({"left_out": left} if left else {})}


def expected_moments(graph: Graph, name: str) -> Moments | None:
    """Mean and variance per channel of an activation, from BatchNorm statistics; None if they do not tell.

    Sums of tensors count as independent; a clip sees a normal distribution. Padding is left out of account.
    """
    if name in graph.batchnorms:
        norm = graph.batchnorms[name]
        return norm.beta.astype(np.float64), norm.gamma.astype(np.float64) ** 2
    node = graph.producer(name)
    if node is None:
        return None
    inputs = [t.name for t in node.inputs if not t.is_empty() and not graph.is_constant(t.name)]
    if node.op in ("Relu", "Clip") and len(inputs) == 1:
        before = expected_moments(graph, inputs[0])
        ends = _clip(graph, node)
        return None if before is None or ends is None else clipped_moments(*before, *ends)
    if node.op in ("Identity", "Dropout", "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Squeeze"):
        return expected_moments(graph, inputs[0])  # who asks compares the number of channels
    if node.op in ("Add", "Concat") and len(inputs) == len(node.inputs):
        parts = [expected_moments(graph, one) for one in inputs]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or (node.op == "Concat" and node.attrs.get("axis") != 1):
            return None
        means, variances = zip(*known, strict=True)
        if node.op == "Concat":
            return np.concatenate(means), np.concatenate(variances)
        return np.sum(means, axis=0), np.sum(variances, axis=0)
    return None


def _clip(graph: Graph, node: Any) -> tuple[float, float] | None:
    """The ends of a Relu or Clip; None if they are computed."""
    if node.op == "Relu":
        return 0.0, np.inf
    ends = [-np.inf, np.inf]
    for i, bound in enumerate(node.inputs[1:3]):
        if not bound.is_empty():
            if not graph.is_constant(bound.name):
                return None
            ends[i] = float(graph.constant(bound.name).item())
    return ends[0], ends[1]
