"""bias-correct: correct biases by the mean error of rounded weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.calibration.propagation import propagate
from onnxq_plugins.errors import counted
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass, Service, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import correct_biases
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.judge import Judge

_WORK = 1e9  # multiply-adds over the samples up to which the whole network is judged


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """Correct biases by the mean error of rounded weights.

    Plans for each layer the shift (W - Wq) E[x] of its bias, with E[x] the mean of its input per channel.

    method   ``empirical``: means over the calibration data. ``analytic``: from the statistics of the BatchNormalizations
             that were folded into the layers before (for a model exported without folding them), as means of clipped normal
             distributions; needs no data

    Taps of a kernel that read padding for a part of the outputs count by the other part.

        b <- b + (W - Wq) E[x];    E[max(x, 0)] = mu Phi(mu / sigma) + sigma phi(mu / sigma)   (``analytic``)

    In a channel with few weights (depthwise: 9) rounding errors do not average out; their sum, times the mean of an input
    that a ReLU made positive, shifts the whole channel. The correction needs codes, so what is still open is solved first.
    MatMul has no bias, hence no correction. The pass `round` solves biases itself: running this one after it replaces them.

    Each layer gains by it, on the average over its inputs; a small network as a whole may lose, as errors that cancelled no
    longer do. Networks of few multiply-adds, for which that is cheap, are therefore run with and without it on up to 32
    samples, and keep what gives the better outputs.

    Source: Data-Free Quantization (arXiv 1906.04721), section 4.2; the bias that minimizes the layer's squared output error
    has this closed form.
    Cost: one run over the data (``empirical``); small networks three more over 32 samples.
    """

    name: ClassVar[str] = "bias-correct"
    stage: ClassVar[Stage] = "finish"
    provides: ClassVar[frozenset[Service]] = frozenset({"bias"})
    method: Literal["empirical", "analytic"] = "empirical"

    def apply(self, job: Job) -> dict[str, Any]:
        graph, planned = job.graph, Planned.of(job)
        layers = [layer for layer in planned.layers if layer.op in ("Conv", "Gemm")]
        if self.method == "analytic":
            expected = propagate(graph, {}, through=False)
            means = {
                layer.name: expected[layer.input].mean
                for layer in layers
                if layer.input in expected and expected[layer.input].mean.size == layer.shape[layer.in_axis] * layer.groups
            }
        elif not job.calibration.ready and not planned.activations:
            job.note("bias-correct was skipped: without --data there are no means to correct by")
            return {"layers": 0}
        else:
            known = [layer for layer in layers if graph.shape(layer.input) is not None]
            by_input = job.calibration.means([layer.input for layer in known])
            means = {layer.name: by_input[layer.input] for layer in known}
        complete(job)
        left = [layer.name for layer in layers if layer.name not in means]
        if left:
            job.note(
                f"bias-correct left {len(left)} of {counted(len(layers), 'layer')} unchanged, since no BatchNorm statistics "
                f"give the mean of their inputs ({', '.join(left[:4])}{' ...' if len(left) > 4 else ''}); "
                'method = "empirical" needs only data'
            )
        plain = job.plan
        correct_biases(job, layers, means)
        moved = [_moved(job, layer) for layer in layers if layer.name in means]
        result: dict[str, Any] = {"largest_shift_relative_to_bias": round(max(moved, default=0.0), 6)}
        result |= {"left_out": left} if left else {}
        judge = Judge.of(job, apart=False, work=_WORK) if means else None
        if judge is not None:
            verdict = judge.best({"corrected": job.plan, "plain": plain})
            result |= {"sqnr": verdict.sqnr}
            if verdict.name == "plain":
                job.plan = plain
                job.note(f"{verdict.undone('bias-correct', 'corrected')}, and was undone")
                return {"layers": 0, **result}
        return {"layers": len(means), **result}


def _moved(job: Job, layer: Layer) -> float:
    """The largest shift of a layer's bias relative to its largest bias; 0 where it had none."""
    shift = job.plan[layer.weight].shift
    bias = np.abs(job.graph.constant(layer.bias)).max() if layer.bias is not None else 0.0
    return float(np.abs(shift).max() / bias) if bias and shift is not None else 0.0
