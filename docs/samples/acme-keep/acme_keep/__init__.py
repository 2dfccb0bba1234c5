"""acme-keep: the layers that lose most keep 8 bits."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from onnxq_plugins import Job, Pass, hookimpl
from onnxq_plugins.spec import fake, solve_minmax


@dataclass(frozen=True)
class KeepWorst(Pass):
    """Keep the layers that lose most at 8 bits (or what the target's codes allow). The loss is

        |w - q|^2 / |w|^2

    with q its weights w rounded to nearest as the recipe asks. The worst layer is kept first, and
    so on, as long as the weights of all kept layers are at most `share` of all weights; a layer
    that is too large is left out, and smaller ones behind it may follow.

    share   of the weights of all planned layers, 0 to 1

    Layers that are solved, or have 8 bits anyway, count as weights but stay as they are.

    Cost: every weight is rounded once. No data needed.
    """

    name: ClassVar[str] = "acme.keep-worst"
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share = {self.share} must be 0 to 1")

    def apply(self, job: Job) -> dict[str, Any]:
        bits = min(8, job.target.code_bits)
        planned = {y.name: y.weight for y in job.graph.layers if y.weight in job.plan}
        sizes = {name: job.graph.constant(weight).size for name, weight in planned.items()}
        losses = {}
        for name, weight in planned.items():
            spec, values = job.plan[weight], job.graph.constant(weight)
            if spec.bits < bits and not spec.solved:
                losses[name] = _loss(values, solve_minmax(values, spec))
        room = self.share * sum(sizes.values())
        kept = {}
        for name in sorted(losses, key=lambda name: -losses[name]):
            if sizes[name] <= room:
                room -= sizes[name]
                kept[name] = round(losses[name], 6)
                # codes of 8 bits leave no room for multipliers in an int8
                wide = replace(job.plan[planned[name]], bits=bits, sub_block=None)
                job.plan |= {planned[name]: wide}
        return {"bits": bits, "kept": kept}


def _loss(weight: np.ndarray, spec: Any) -> float:
    power = float((weight**2).sum())
    return float(((weight - fake(weight, spec)) ** 2).sum()) / power if power else 0.0


@hookimpl
def onnxq_passes() -> list[type[Pass]]:
    return [KeepWorst]
