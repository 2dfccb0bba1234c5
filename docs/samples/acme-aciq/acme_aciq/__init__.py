"""acme-aciq: analytic clipping of weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from onnxq_plugins import Job, Pass, hookimpl
from onnxq_plugins.spec import from_range, reduce_blocks
from scipy.special import lambertw


@dataclass(frozen=True)
class Aciq(Pass):
    """Clip the weights of each block at the a that makes clipping and rounding them err least.

    For values of a Laplace distribution with mean magnitude b, in M bits between -a and a,

        error(a) = 2 b^2 exp(-a / b) + a^2 / (3 * 4^M)

    is least at a = b W(3 * 4^M), W being Lambert's function: 5.0 b at 4 bits, 9.9 b at 8.
    Where no weight lies beyond a, nothing is clipped. Codes stay open.

    bits   weights of at most so many bits are clipped; wider ones have room for outliers

    Weights with zero points or multipliers (sub_block) and solved ones stay as they are.

    Source: ACIQ (Banner et al., arXiv 1810.05723), section 3.
    Cost: one look at each weight.
    """

    name: ClassVar[str] = "acme.aciq"
    bits: int = 5

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits} must be 2 to 8")

    def apply(self, job: Job) -> dict[str, Any]:
        clipped = {}
        for layer in job.graph.layers:
            spec = job.plan.get(layer.weight)
            if spec is None or spec.solved or not spec.symmetric or spec.sub_block:
                continue
            if spec.bits > self.bits:
                continue
            size = np.abs(job.graph.constant(layer.weight))
            count = reduce_blocks(np.ones_like(size), spec.block, np.add)
            mean = reduce_blocks(size, spec.block, np.add) / count
            top = reduce_blocks(size, spec.block, np.maximum)
            ends = np.minimum(top, mean * lambertw(3 * 4**spec.bits).real)
            job.plan |= {layer.weight: from_range(-ends, ends, spec)}
            clipped[layer.name] = round(float(np.mean(ends < top)), 3)
        return {"clipped_share_of_blocks": clipped}


@hookimpl
def onnxq_passes() -> list[type[Pass]]:
    return [Aciq]
