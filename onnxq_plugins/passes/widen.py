"""widen: more bits where few gain nothing, or cost the outputs too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.export.weights import stored_bits
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.layers.complete import complete_weight
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import weight_request
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.spec import Plan, QuantSpec

_OPERATORS = 160  # bytes of the operators that decode a weight of few bits


@dataclass(frozen=True)
class Widen(Pass):
    """More bits where few gain nothing, or cost the outputs too much.

    bits   of the wider codes
    loss   dB that the last layer's codes may cost the outputs on samples that no solution saw. Its errors are the outputs'
           own: no later layer averages them out

        widened if  n b / 8 + multipliers + 400 bytes >= n,   or, the last layer, if  SQNR(8 bits) > SQNR(b bits) + loss

    A layer's codes are widened where the operators that decode them, with their multipliers, take more bytes than the codes
    save; those of the last layer also where a network with wider ones is more than `loss` ahead. Wider codes are the nearest
    ones, with a bias that takes back their mean error where a pass of the recipe does so. Without samples to judge by, the
    last layer is widened.

    Source: common practice keeps first and last layers in 8 bits (for example arXiv 1606.06160); that the network is asked
    is ours.
    Cost: two runs over up to 32 samples.
    """

    name: ClassVar[str] = "widen"
    stage: ClassVar[Stage] = "finish"
    bits: int = 8
    loss: float = 1.0

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits} must be from 3 to 8")
        if self.loss < 0:
            raise ValueError(f"loss = {self.loss} must not be negative")

    def apply(self, job: Job) -> dict[str, Any]:
        narrow = [layer for layer in Planned.of(job).layers if job.plan[layer.weight].bits < self.bits]
        wide = {layer.name: spec for layer in narrow if (spec := self._wider(job, layer)) is not None}
        idle = [layer for layer in narrow if layer.name in wide and not _saves(job, layer, wide[layer.name])]
        judge = Judge.of(job) if wide else None
        job.plan = _widened(job, judge, idle, wide)
        result: dict[str, Any] = {"without_gain": [layer.name for layer in idle], "costly": []}
        last = next((layer for layer in job.graph.layers[-1:] if layer.name in wide and layer not in idle), None)
        if last is None:
            return result
        plan = _widened(job, judge, [last], wide)
        if judge is not None:
            few, many = (round(judge.sqnr(one), 2) for one in (job.plan, plan))
            result["sqnr_of_few_and_more_bits"] = [few, many]
            if many <= few + self.loss:
                return result
        job.plan = plan
        return {**result, "costly": [last.name]}

    def _wider(self, job: Job, layer: Layer) -> QuantSpec | None:
        """The request of a layer's weight with more bits; None where the target does not run them."""
        spec = weight_request(job.graph, job.recipe, job.target, layer, self.bits)
        return spec if Planned.of(job).rule(layer, spec) is not None else None


def _widened(job: Job, judge: Judge | None, layers: list[Layer], wide: Mapping[str, QuantSpec]) -> Plan:
    """The plan with wider entries for some layers: the nearest codes, and corrected biases where there are samples and the
    recipe corrects biases."""
    plan = job.plan | {layer.weight: wide[layer.name] for layer in layers}
    if judge is not None:
        return judge.completed(plan)
    return plan | {layer.weight: complete_weight(job, layer, wide[layer.name]) for layer in layers}


def _saves(job: Job, layer: Layer, wide: QuantSpec) -> bool:
    """True if a layer is smaller in the file than with wider codes."""
    sizes = []
    for spec in (job.plan[layer.weight], wide):
        spec = spec if spec.codes is not None else complete_weight(job, layer, spec)
        rule = Planned.of(job).rule(layer, spec)
        assert rule is not None  # both are what the target runs
        sizes.append(stored_bits(layer, spec, rule) * float(np.prod(layer.shape)) / 8)
    return sizes[0] + _OPERATORS < sizes[1]
