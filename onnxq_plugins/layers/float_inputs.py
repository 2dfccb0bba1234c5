"""Weight-only layers whose float inputs a kernel must not round.

Blocked weights run in onnxruntime's MatMulNBits, which by default rounds each block of a row of its input to int8, by the
largest value of the block (accuracy level 4; session option ``session.qdq_matmulnbits_accuracy_level`` sets another, a file
cannot). Beside a channel that is hundreds of times larger, as large language models have them (massive activations, arXiv
2402.17762), little is left of the others.

Let x be a row of the input and d its rounding errors, W the weight and E the errors of its codes. The output then has the
errors d W and x E, and as errors of codes are independent, the square of the latter is sum_k x_k^2 |E_k|^2 on average. Where
the former are too large beside them, the weight is decoded to float at load. Accuracy level 1 is float, too, but its kernel
is not faster than a float MatMul (docs/runtime.md), and a file could only have it as an operator of onnxruntime's own.

A weight that several layers share, such as that of an unrolled recurrence, is decoded, too: onnxruntime makes no MatMulNBits
of a DequantizeLinear whose codes or scales another one reads, and would decode them in every run, once a layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxq_plugins.calibration import InputRounding, NotFinite
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan, QuantSpec, fake, solve_minmax

# Noise of rounded inputs that is tolerated whatever the weight, relative to the outputs: -37 dB. In MiniLM's layers it is at
# most -41 dB, much like that of weights rounded to 8 bits.
_TOLERANCE = 10**-3.7
_READERS = {"MatMul", "Gemm"}


def keep_inputs_float(job: Job, specs: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
    """Entries of a plan, with those of weights marked as decoded, or no longer so, by what the job's data show. Without data
    only shared ones are marked. An entry's solution does not matter, so that a search gets what ships."""
    planned = Planned(job.graph, job.plan | Plan(specs), job.target)
    blocked: list[Layer] = []
    for layer in planned.layers:
        spec = specs.get(layer.weight)
        rule = None if spec is None else planned.rule(layer, replace(spec, decoded=False))
        if spec is not None and spec.block is not None and rule is not None and rule.storage == "blocked":
            blocked.append(layer)
    shared = shared_codes(job, blocked)
    marked, groups = dict(specs), defaultdict[int, list[Layer]](list)  # by block
    for layer in blocked:
        spec = specs[layer.weight]
        assert spec.block is not None
        if layer.weight in shared:
            marked[layer.weight] = replace(spec, decoded=True)
        elif job.calibration.data is not None:
            groups[spec.block[layer.in_axis]].append(layer)
    for block, layers in groups.items():
        rounding = _input_rounding(job, layers, block)
        for layer in layers:
            spec = specs[layer.weight]
            with job.graph.mapped.reading():
                weight, known = job.graph.constant(layer.weight), rounding.get(layer.name)
                decoded = known is not None and _hurts(layer, weight, spec, known)
            if decoded != spec.decoded:
                marked[layer.weight] = replace(spec, decoded=decoded)
    return marked


def shared_codes(job: Job, layers: Sequence[Layer]) -> set[str]:
    """The weights of these layers of which onnxruntime would make no MatMulNBits, as another layer has equal ones."""
    layers = [layer for layer in layers if layer.op in _READERS]
    if not layers or not any(rule.kernel == "MatMulNBits" for rule in job.target.rules):
        return set()
    content = {layer.weight: job.graph.content(layer.weight) for layer in job.graph.layers if layer.op in _READERS}
    uses = Counter(content.values())
    return {layer.weight for layer in layers if uses[content[layer.weight]] > 1}


def _input_rounding(job: Job, layers: list[Layer], block: int) -> dict[str, InputRounding]:
    """`Calibration.input_rounding` of the layers whose inputs are finite: of the others nothing can be said."""
    try:
        return job.calibration.input_rounding(layers, block)
    except NotFinite as error:
        return _input_rounding(job, [layer for layer in layers if layer.input not in error.names], block)


def _hurts(layer: Layer, weight: Array, spec: QuantSpec, rounding: InputRounding) -> bool:
    """True if errors of a layer's outputs by rounded inputs are large, and larger than those by its weight, rounded to the
    nearest."""
    if rounding.noise <= _TOLERANCE * rounding.signal:
        return False
    errors = weight - fake(weight, solve_minmax(weight, spec))
    noise = float(rounding.power @ np.square(errors, out=errors).sum(axis=layer.out_axis, dtype=np.float64))
    return rounding.noise > noise
