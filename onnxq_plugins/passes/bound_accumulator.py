"""bound-accumulator: choose codes that cannot overflow a narrow accumulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Gram
from onnxq_plugins.errors import counted
from onnxq_plugins.export.weights import int8_codes
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import Problem, float_inputs, white_inputs
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.accumulator import limit_of, within
from onnxq_plugins.solvers.accumulator import width as widths
from onnxq_plugins.targets import channel_multipliers


@dataclass(frozen=True)
class BoundAccumulator(Pass):
    """Choose codes that cannot overflow a narrow accumulator.

    No input can then overflow a signed accumulator of `bits` bits, for kernels and hardware that have narrow ones. x86 and
    arm kernels accumulate in 32 bits and do not need this.

    bits        width of the accumulator, without the bias; at least 9
    positions   patches per sample at most
    limit       largest D with a full Gram matrix (8 D^2 bytes); above it, diagonal blocks that take a quarter of that

        sum of the positive codes of an output, and of the negative ones  <=  (2^(bits-1) - 1) / (2^N - 1)

    With N-bit unsigned inputs the positive codes of an output, and the negative ones, may each sum to
    (2^(bits-1) - 1) / (2^N - 1): 128 for 16 bits. Scales stay; outputs within the bound keep their codes; the others are
    projected and rounded toward zero, and the remaining budget is spent where it lowers the error of the layer's output most
    (of the weights, without data). The bias takes the mean error. What is open is solved first, so put this pass last: a
    pass after it that chooses codes ignores the bound. Layers with multipliers (`sub_block`), ConvTranspose and layers that
    run in float are left unchanged and reported.

    Far below the width that a layer needs, most of its weight is lost, and accuracy with it; `onnxq audit` shows that width.

    Source: A2Q (arXiv 2308.13504) and A2Q+ (arXiv 2401.10432), which train under this bound; `solvers.accumulator` projects.
    Cost: one run of the float network over the data; then BLAS.
    """

    name: ClassVar[str] = "bound-accumulator"
    stage: ClassVar[Stage] = "finish"
    bits: int = 16
    positions: int = 256
    limit: int = 4608

    def __post_init__(self) -> None:
        for key, least, most in (("bits", 9, 32), ("positions", 1, 2**31), ("limit", 16, 2**31)):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key} = {getattr(self, key)} must be {least} to {most}")

    def apply(self, job: Job) -> dict[str, Any]:
        complete(job)
        left: dict[str, str] = {}
        needs: dict[str, int] = {}
        planned = Planned.of(job)
        for layer in planned.layers:
            if reason := self._unfit(job, planned, layer):
                left[layer.name] = reason
            else:
                needs[layer.name] = _need(job, layer)
        for reason in dict.fromkeys(left.values()):
            names = [name for name, why in left.items() if why == reason]
            job.note(
                f"bound-accumulator left {counted(len(names), 'layer')} unchanged, since {reason} "
                f"({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"
            )
        wide = [layer for layer in planned.layers if needs.get(layer.name, 0) > self.bits]
        bounded: dict[str, dict[str, Any]] = {}
        for layer, gram in job.track(self._grams(job, wide), "bounding", len(wide)):
            with runtimes.blas(1):
                bounded[layer.name] = self._bound(job, layer, gram)
            bounded[layer.name] = {"before": needs[layer.name], "after": _need(job, layer), **bounded[layer.name]}
        if bounded:
            worst = max(bounded, key=lambda name: bounded[name]["loss_relative_to_nearest"])
            times = bounded[worst]["loss_relative_to_nearest"]
            job.note(
                f"bound-accumulator bounded {counted(len(bounded), 'layer')}; squared errors are up to {times:.3g} "
                f"times those of nearest rounding, in '{worst}' (see onnxq compare)"
            )
        return {"bits": self.bits, "bounded": bounded, "fit": len(needs) - len(wide), "left_alone": left}

    def _grams(self, job: Job, layers: list[Layer]) -> Iterator[tuple[Layer, Gram]]:
        """The Gram matrix of each layer's inputs in the float network."""
        if job.calibration.data is None:
            yield from ((layer, white_inputs(layer, self.limit)) for layer in layers)
        else:
            for batch in float_inputs(job, layers, self.positions, self.limit):
                yield from batch

    def _bound(self, job: Job, layer: Layer, gram: Gram) -> dict[str, Any]:
        """Plan bounded codes for one layer. An output that keeps its codes keeps its shift."""
        spec, limit = job.plan[layer.weight], limit_of(self.bits, _largest_input(job, layer))
        assert spec.codes is not None
        kept = within(layer.matrix(spec.codes), limit).reshape(-1)
        bounded, loss, rows = Problem.of(job, layer, gram, job.calibration.data is not None).bound(spec.codes, limit)
        if spec.shift is not None:
            new = 0.0 if bounded.shift is None else bounded.shift
            bounded = replace(bounded, shift=np.where(kept, spec.shift, new).astype(np.float32))
        job.plan |= {layer.weight: bounded}
        return {"outputs": rows, "loss_relative_to_nearest": round(loss, 4)}

    def _unfit(self, job: Job, planned: Planned, layer: Layer) -> str:
        """Why a planned layer cannot be bounded; "" if it can, or need not be."""
        spec, rule = job.plan[layer.weight], planned.rule(layer)
        if not planned.input(layer) or rule is None:
            return "they read float inputs: no integers are accumulated"
        if rule.storage == "float":
            return f"target '{job.target.name}' runs them in float: no integers are accumulated"
        if layer.op == "ConvTranspose":
            return "which codes of a ConvTranspose meet in an output depends on its strides"
        if spec.sub_block is not None and not channel_multipliers(layer, spec) and _need(job, layer) > self.bits:
            return f"they need more than {self.bits} bits and have multipliers; leave weights.sub_block out"
        return ""


def _need(job: Job, layer: Layer) -> int:
    """Bits that the accumulators of a layer need."""
    spec = job.plan[layer.weight]
    return int(widths(layer.matrix(int8_codes(layer, spec)), (0, _largest_input(job, layer))).max(initial=1))


def _largest_input(job: Job, layer: Layer) -> int:
    """The largest code of a layer's unsigned input."""
    return job.plan[Planned.of(job).input(layer)].grid[1]
