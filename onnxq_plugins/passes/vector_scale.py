"""vector-scale: give each vector of weights an integer scale of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layers.blocks import search
from onnxq_plugins.layers.problem import solvable
from onnxq_plugins.spec import solve_minmax


@dataclass(frozen=True)
class VectorScale(Pass):
    """Give each vector of weights an integer scale of its own.

    VS-Quant: every vector of V weights along the inputs gets a scale of its own, an M-bit integer times a coarse float scale
    per output channel. Codes stay open.

    method   ``minmax``: each vector's integer is the smallest without clipping. ``mse``: integers and coarse scales with the
             least squared error of the weights

        w = s[channel] m[vector] q,   m in 1 .. 2^M - 1

    The recipe sets V and M: ``weights.sub_block = [1, V]`` and ``weights.max_multiplier = 2^M - 1``; the codes times their
    integers must fit int8, so integers reach at most 127 / (2^(bits - 1) - 1): 18 at 4 bits, 42 at 3, 127 at 2.
    ``weights.block = [1, V]`` gives each vector a float scale instead (M without limit). No data are needed; if there are
    some, `sub-layer` measures the error at the layer's output.

    Source: VS-Quant (Dai et al., arXiv 2102.04503), two-level scales of weights; its scales of activations per vector, which
    need reductions at run time, are left out. The codes are rounded with the final scales.
    Cost: ``mse`` rounds every weight some 80 times.
    """

    name: ClassVar[str] = "vector-scale"
    method: Literal["minmax", "mse"] = "mse"

    def apply(self, job: Job) -> dict[str, Any]:
        layers = [
            layer
            for layer in solvable(job)
            if not (spec := job.plan[layer.weight]).solved and (spec.sub_block or spec.block)
        ]
        vectors = 0
        for layer in layers:
            weight = job.graph.constant(layer.weight)
            spec = solve_minmax(weight, job.plan[layer.weight])
            if self.method == "mse":
                spec = search(layer, spec, layer.matrix(weight), None)
            job.plan |= {layer.weight: spec}
            vectors += np.asarray(spec.scale if spec.multiplier is None else spec.multiplier).size
        return {"layers": len(layers), "vectors": vectors}
