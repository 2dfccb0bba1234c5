"""Weight-only layers whose float inputs a kernel must not round.

Blocked weights run in onnxruntime's MatMulNBits, which by default rounds each block of a row of its input to int8, by the
largest value of the block (accuracy level 4; session option ``session.qdq_matmulnbits_accuracy_level`` sets another, a file
cannot). Beside a channel that is hundreds of times larger, as large language models have them (massive activations, arXiv
2402.17762), little is left of the others.

Let x be a row of the input and d its rounding errors, W the weight and E the errors of its codes. The output then has the
errors d W and x E, and as errors of codes are independent, the square of the latter is sum_k x_k^2 |E_k|^2 on average. Where
the former are too large beside them, the weight is decoded to float at load. Accuracy level 1 is float, too, but its kernel
is not faster than a float MatMul (docs/runtime.md), and a file could only have it as an operator of onnxruntime's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan, QuantSpec, fake, solve_minmax

# By bits of the weights: noise of rounded inputs that is tolerated, relative to that of the rounded weights. In MiniLM it is
# 0.01 beside 4-bit weights, and 1 to 3 beside 8-bit ones, which differ as little from float as the inputs do.
_TOLERANCE = {4: 1.0, 8: 4.0}


def keep_inputs_float(job: Job, specs: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
    """Entries of a plan, with those of weights marked as decoded, or no longer so, by what the job's data show. Without data
    they stay as they are."""
    if job.calibration.data is None:
        return dict(specs)
    planned = Planned(job.graph, job.plan | Plan(specs), job.target)
    groups: dict[int, list[Layer]] = defaultdict(list)  # by block
    for layer in planned.layers:
        spec = specs.get(layer.weight)
        rule = None if spec is None else planned.rule(layer, replace(spec, decoded=False))
        if spec is not None and spec.block is not None and rule is not None and rule.storage == "blocked":
            groups[spec.block[layer.in_axis]].append(layer)
    marked = dict(specs)
    for block, layers in groups.items():
        rounding = job.calibration.input_rounding(layers, block)
        for layer in layers:
            spec = specs[layer.weight]
            with job.graph.mapped.reading():
                decoded = _hurts(layer, job.graph.constant(layer.weight), spec, *rounding[layer.name])
            if decoded != spec.decoded:
                marked[layer.weight] = replace(spec, decoded=decoded)
    return marked


def _hurts(layer: Layer, weight: Array, spec: QuantSpec, power: Array, noise: float) -> bool:
    """True if errors of a layer's outputs by rounded inputs (`Calibration.input_rounding`) are too large beside those by
    its weight, rounded to the nearest."""
    errors = np.square(weight - fake(weight, solve_minmax(weight, spec)), dtype=np.float64)
    return noise > _TOLERANCE.get(spec.bits, 1.0) * float(power @ errors.sum(axis=layer.out_axis))
