"""bound-accumulator: codes whose products with any input fit a narrow accumulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Gram
from onnxq_plugins.export.weights import int8_codes
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import Problem, float_inputs, white_inputs
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.accumulator import limit_of, within
from onnxq_plugins.solvers.accumulator import width as widths
from onnxq_plugins.spec import QuantSpec
from onnxq_plugins.targets import channel_multipliers


@dataclass(frozen=True)
class BoundAccumulator(Pass):
    """Choose codes with which no input can overflow a signed accumulator of `bits` bits, for kernels and hardware with
    narrow ones. x86 and arm kernels add in 32 bits and need none of this.

    bits        width of the accumulator, without the bias; from 9 on
    positions   patches per sample at most
    limit       largest D with a full Gram matrix (8 D^2 bytes); above it, blocks of a quarter of that on its diagonal

        sum of the positive codes of an output, and of the negative ones  <=  (2^(bits-1) - 1) / (2^N - 1)

    With N-bit unsigned inputs the positive codes of an output, and the negative ones, may each sum to
    (2^(bits-1) - 1) / (2^N - 1): 128 for 16 bits. Scales stay; outputs that fit keep their codes; the others are projected,
    rounded toward zero, and what is left over is spent where it lowers the error of the layer's output most (of the weights,
    without data). The bias takes the mean error. What is open is solved first, so put this pass last: one that chooses codes
    behind it forgets the bound. Layers with multipliers (`sub_block`), ConvTranspose and what runs in float are left alone
    and reported.

    Far below the width that a layer needs, most of the weight is lost, and accuracy with it; `onnxq audit` tells the width.

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
        planned = [y for y in job.graph.layers if y.weight in job.plan]
        for layer in planned:
            if reason := self._unfit(job, layer):
                left[layer.name] = reason
            else:
                needs[layer.name] = _need(job, layer)
        for reason in dict.fromkeys(left.values()):
            names = [name for name, why in left.items() if why == reason]
            job.note(
                f"bound-accumulator left {len(names)} layers alone, since {reason} "
                f"({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"
            )
        wide = [y for y in planned if needs.get(y.name, 0) > self.bits]
        told: dict[str, dict[str, Any]] = {}
        for layer, seen in job.track(self._seen(job, wide), "bounding", len(wide)):
            with runtimes.blas(1):
                told[layer.name] = self._bound(job, layer, seen)
            told[layer.name] = {"before": needs[layer.name], "after": _need(job, layer), **told[layer.name]}
        if told:
            worst = max(told, key=lambda name: told[name]["loss_relative_to_nearest"])
            times = told[worst]["loss_relative_to_nearest"]
            job.note(
                f"bound-accumulator bounded {len(told)} layers; squared errors are up to {times:.3g} "
                f"times those of nearest rounding, in '{worst}' (see onnxq compare)"
            )
        return {"bits": self.bits, "bounded": told, "fit": len(needs) - len(wide), "left_alone": left}

    def _seen(self, job: Job, layers: list[Layer]) -> Iterator[tuple[Layer, Gram]]:
        """What each layer sees in the float network."""
        if job.calibration.data is None:
            yield from ((layer, white_inputs(layer, self.limit)) for layer in layers)
        else:
            for batch in float_inputs(job, layers, self.positions, self.limit):
                yield from batch

    def _bound(self, job: Job, layer: Layer, seen: Gram) -> dict[str, Any]:
        """Plan bounded codes for one layer. An output that keeps its codes keeps its shift."""
        spec, limit = job.plan[layer.weight], limit_of(self.bits, _largest_input(job, layer))
        assert spec.codes is not None
        kept = within(layer.matrix(spec.codes), limit).reshape(-1)
        found, loss, rows = Problem.of(job, layer, seen, job.calibration.data is not None).bound(spec.codes, limit)
        if spec.shift is not None:
            new = 0.0 if found.shift is None else found.shift
            found = replace(found, shift=np.where(kept, spec.shift, new).astype(np.float32))
        job.plan |= {layer.weight: found}
        return {"outputs": rows, "loss_relative_to_nearest": round(loss, 4)}

    def _unfit(self, job: Job, layer: Layer) -> str:
        """Why a planned layer cannot be bounded; "" if it can, or need not be."""
        spec, planned = job.plan[layer.weight], Planned.of(job)
        rule = planned.rule(layer)
        if not planned.input(layer) or rule is None:
            return "they read float inputs: no integers are added"
        if rule.storage == "float":
            return f"target '{job.target.name}' runs them in float: no integers are added"
        if layer.op == "ConvTranspose":
            return "which codes of a ConvTranspose meet in an output depends on its strides"
        if spec.sub_block is not None and not channel_multipliers(layer, spec) and _need(job, layer) > self.bits:
            return f"they need more than {self.bits} bits and have multipliers; leave weights.sub_block out"
        return ""


def _need(job: Job, layer: Layer) -> int:
    """Bits that the accumulators of a layer need."""
    spec: QuantSpec = job.plan[layer.weight]
    return int(widths(layer.matrix(int8_codes(layer, spec)), (0, _largest_input(job, layer))).max(initial=1))


def _largest_input(job: Job, layer: Layer) -> int:
    """The largest code of a layer's unsigned input."""
    return job.plan[Planned.of(job).input(layer)].grid[1]
