"""Codes of the weights of LSTM, GRU and RNN: rounded by what these operators read, as the error of a step goes on through
all later ones.

W multiplies the input X, R the hidden state of the step before. The hidden states are the operator's own outputs, or its
initial state where it runs one step at a time; both directions share their Gram matrix. Source of the rounding: GPTQ (arXiv
2210.17323).

DynamicQuantizeLSTM of onnxruntime, which computes in integers, is not used. On a CPU without VNNI it took 0.7 to 0.9 of the
time of LSTM with up to 128 hidden units, 0.25 to 0.4 with 256 and 512; but it rounds input and state at every step, which
left 37 to 40 dB with codes within [-63, 63], and saturates with wider ones (14 to 18 dB)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq_plugins.graph import Layer
from onnxq_plugins.solvers.gptq import gptq
from onnxq_plugins.solvers.gram import nearest
from onnxq_plugins.spec import Array, QuantSpec, step

if TYPE_CHECKING:
    from onnxq_plugins.job import Job

RECURRENT = ("LSTM", "GRU", "RNN")
_WIDEST = 2048  # inputs of a weight: beyond, Gram matrices are large


def recurrent_codes(job: Job, specs: dict[str, QuantSpec]) -> dict[str, Array]:
    """Codes [directions, gates * hidden, inputs] of the weights among `specs` (name -> entry with a scale per row) whose
    inputs the calibration can show."""
    if job.calibration.data is None:
        return {}
    reads: dict[str, Layer] = {}  # a weight -> the product that it is a factor of
    for node in job.graph.nodes:
        if node.op not in RECURRENT or node.domain or node.attrs.get("layout", 0):
            continue
        for at, source in ((1, _shown(job, node.inputs[0])), (2, _hidden(job, node))):
            weight = node.inputs[at].name
            if source and weight in specs and weight not in reads and job.graph.constant(weight).shape[2] <= _WIDEST:
                shape = job.graph.constant(weight).shape[1:]
                reads[weight] = Layer(weight, "MatMul", source, source, source, weight, None, shape[::-1], 1, 0)
    grams = job.calibration.grams(list(reads.values())) if reads else {}
    codes = {}
    for name in reads:
        values, spec = job.graph.constant(name).astype(np.float64), specs[name]
        h = np.broadcast_to(grams[name].h, (len(values), *grams[name].h.shape[1:]))
        size = step(spec, values.shape)
        unseen = np.einsum("gdd->gd", h)[:, None] == 0  # it may be read in use
        codes[name] = np.where(unseen, nearest(values, size, spec.grid), gptq(values, h, size, spec.grid)).astype(np.int8)
    return codes


def _shown(job: Job, tensor: Any) -> str:
    """The name of an activation; "" for what is none."""
    return "" if tensor.is_empty() or job.graph.is_constant(tensor.name) else str(tensor.name)


def _hidden(job: Job, node: Any) -> str:
    """The activation that holds the hidden states which R multiplies."""
    start = _shown(job, node.inputs[5]) if len(node.inputs) > 5 else ""
    steps = node.inputs[0].shape[0] if node.inputs[0].shape else None
    if start and steps == 1:
        return start
    return next((str(t.name) for t in node.outputs[:2] if not t.is_empty()), start)
