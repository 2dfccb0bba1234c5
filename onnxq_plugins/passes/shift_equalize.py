"""shift-equalize: shift output channels into the range of one scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.errors import counted
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, QuantSpec, solve_minmax, step
from onnxq_plugins.targets import channel_block


@dataclass(frozen=True)
class ShiftEqualize(Pass):
    """Shift output channels into the range of one scale.

    Weight equalizing shift: output channel c of a layer is enlarged by 2^n_c before the layer is quantized with one scale,
    and the shift is undone after the multiply-adds, where integer hardware shifts anyway.

        r_c = max |W_c|,  n_c = min(floor(log2(max r / r_c)), 2^bits - 1),  W_c = 2^-n_c s q_c

    Up to the largest shift, the step of a channel is then at most twice the one it would have with a scale of its own.
    Shifts are exact; only the rounding differs from one scale per layer. Layers with multipliers, blocks of inputs, scales
    that must be powers of two or scales that are solved are left unchanged.

    bits   of the shifts, 1..4: a channel is shifted by at most 2^bits - 1
    gain   least ratio of the layer's rounding noise without and with shifts, sum_c step_c^2, for which it gets any. Where a
           target takes only one scale per layer, shifts cost a Mul at run time

    Where a target takes a scale per channel the shifts are folded into that vector, s 2^-n_c. Elsewhere (target
    ``per-tensor``) the enlarged weight has one scale and a Mul by 2^-n_c follows the layer, before its activation. The
    model's metadata, key ``onnxq.shifts``, list each layer's shifts, one hexadecimal digit per channel, for compilers that
    have an instruction for them. Run `equalize` before it: afterwards that would undo the shifts.

    Source: Oh et al., Weight Equalizing Shift Scaler-Coupled Post-training Quantization (arXiv 2008.05767). Rounding n_c
    down is ours: rounding up or to the nearest would leave the range. Shifts at which the bias would overflow int32 are
    reduced.
    Cost: one look at each weight; no data.
    """

    name: ClassVar[str] = "shift-equalize"
    bits: int = 4
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise ValueError(f"bits = {self.bits} must be 1..4")

    def apply(self, job: Job) -> dict[str, Any]:
        done, largest, left, behind = 0, 0, [], 0
        for layer in Planned.of(job).layers:
            spec = self._shifted(job, layer, job.plan[layer.weight])
            if spec is None:
                left.append(layer.name)
                continue
            job.plan |= {layer.weight: spec}
            if spec.multiplier is not None:
                done, largest = done + 1, max(largest, int(np.log2(spec.multiplier.max() / spec.multiplier.min())))
                behind += "channel" not in job.target.granularities(layer.op)
        if behind:
            job.note(
                f"shifts became a Mul behind {counted(behind, 'layer')}, which OpenVINO fuses, as NPU "
                "compilers may; onnxruntime does not, and runs such convolutions in float (target "
                "ort-cpu has them in the scales instead)"
            )
        return {"layers": done, "largest_shift": largest, **({"left_out": left} if left else {})}

    def _shifted(self, job: Job, layer: Layer, spec: QuantSpec) -> QuantSpec | None:
        """The solved entry, codes left open, without multipliers if shifts are not worth it; None if the layer has scales
        that shifts cannot make, or a kernel that takes none."""
        if spec.solved or not spec.symmetric or spec.pow2:
            return None
        if spec.sub_block is not None or spec.block not in (None, channel_block(layer)):
            return None
        if layer.op == "ConvTranspose":  # its outputs are spread over two axes of the weight
            return None
        plain = replace(spec, block=None)
        shifted = replace(plain, sub_block=channel_block(layer), pow2=True, max_multiplier=2 ** (2**self.bits - 1))
        if Planned.of(job).rule(layer, shifted) is None:
            return None
        weight = job.graph.constant(layer.weight)
        shifted, plain = solve_minmax(weight, shifted), solve_minmax(weight, plain)
        assert shifted.multiplier is not None
        multiplier = np.where(_dead(weight, layer), shifted.multiplier.max(), shifted.multiplier)
        shifted = replace(shifted, multiplier=multiplier)
        before, after = (np.mean(step(spec, layer.shape).astype(np.float64) ** 2) for spec in (plain, shifted))
        return shifted if weight.any() and before > after and before >= self.gain * after else plain


def _dead(weight: Array, layer: Layer) -> Array:
    """True for output channels whose weights are all 0, shaped as their multipliers."""
    others = tuple(axis for axis in range(weight.ndim) if axis != layer.out_axis)
    return np.asarray(~weight.any(axis=others, keepdims=True))
