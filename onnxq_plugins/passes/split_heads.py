"""split-heads: give output channels that only float operators read grids of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from onnxq_plugins.graph import Layer, split_outputs
from onnxq_plugins.graph.rewrites import splittable
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.grids import group_sqnr, runs, split_channels
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class SplitHeads(Pass):
    """Give output channels that only float operators read grids of their own.

    The head of a detector is often one convolution whose channels hold unlike things, such as boxes in pixels around 300
    and logits of scores around -2: on the one 8-bit grid of its output the scores are lost. Where no integer operator
    follows in the network, the layer is split by output channels into parts, each an integer kernel with a grid of its
    own, and a float Concat joins them.

    gain    a part is split off if its SQNR gains at least so many dB
    below   and is below so many dB on the shared grid
    parts   per layer at most

        lost_c = N / (N + V_c),   N = step^2 / 12,   V_c = (high_c - low_c)^2 / 36,   SQNR = (1 - lost) / lost

    lost_c is the share of a channel's variance V_c that the rounding noise N of a grid hides, with a range of six standard
    deviations; the SQNR of a part is that of the mean of lost_c over its channels. A mean carries no information and does
    not count, nor do channels that hardly vary (by less than 1e-4 of the range of the tensor). The cut with the least sum of
    lost_c is made, then perhaps another: between neighbouring channels if that is nearly as good as between channels sorted
    by range, whose parts may need a Gather behind the Concat.

    Layers that write float anyway (Gemm and MatMul on most targets), ConvTranspose, grouped convolutions, and layers that a
    rule of the recipe matches by name, which would not match their parts, stay whole.

    Source: our own; the usual remedy by hand is a head for each kind of output.
    Cost: none where no convolution ends the network; otherwise the run over the data that `ranges` needs, and one for the
    parts if a layer was split. At run time the same multiply-adds in two or three operators, and a Concat in float.
    """

    name: ClassVar[str] = "split-heads"
    stage: ClassVar[Stage] = "rewrite"
    gain: float = 6.0
    below: float = 25.0
    parts: int = 3

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"gain = {self.gain} must be positive")
        if self.parts < 2:
            raise ValueError(f"parts = {self.parts} must be at least 2")

    def apply(self, job: Job) -> dict[str, Any]:
        heads = _heads(job)
        if not heads:
            return {"layers": {}}
        # what `ranges` asks for: one run over the data serves both
        job.calibration.ranges([name for name in Planned.of(job).activations if not job.plan[name].solved])
        ranges = job.calibration.channel_ranges([layer.result for layer in heads])
        rows: dict[str, list[dict[str, Any]]] = {}
        digest = job.graph.digest()
        for layer in heads:
            spec, ends = job.plan[layer.result], ranges[layer.result]
            if ends[0].size != layer.channels:
                continue  # of unknown rank
            parts = split_channels(*ends, spec, self.gain, self.below, self.parts)
            parts = neighbours if len(neighbours := runs(parts)) <= self.parts else parts
            if len(parts) > 1:
                both = (group_sqnr(*ends, spec, part) for part in parts)
                rows[layer.name] = [
                    {"channels": len(part), "sqnr_before": round(before, 1), "sqnr_after": round(after, 1)}
                    for part, (before, after) in zip(parts, both, strict=True)
                ]
                _split(job, layer, parts)
        job.calibration.carry(digest)
        return {"layers": rows}


def _heads(job: Job) -> list[Layer]:
    """Layers whose integer kernel has to write codes though no integer operator follows. Where a target quantizes as a
    whole, what joins the parts would write codes on one grid again."""
    if job.target.whole:
        return []
    view = Planned.of(job)
    rules = [rule for rule in job.recipe.layers if not rule.everywhere]
    before = _before_integer(job)
    return [
        layer
        for layer in view.layers
        if layer.op in job.target.output_scale
        and splittable(layer)
        and layer.channels > 1
        and view.input(layer)
        and layer.name not in before
        and not (job.plan[layer.result].solved or job.plan[layer.weight].solved)
        and not any(rule.names(layer.name) for rule in rules)
    ]


def _before_integer(job: Job) -> set[str]:
    """Names of the operators that some integer operator follows in the network."""
    integer, before = Planned.of(job).integer, set[str]()
    for node in reversed(job.graph.nodes):
        behind = {reader.name for output in node.outputs for reader in output.outputs}
        if behind & (integer | before):
            before.add(node.name)
    return before


def _split(job: Job, layer: Layer, parts: list[Array]) -> None:
    """Split a layer and plan its parts like it; what joins them is float."""
    weight, result = job.plan[layer.weight], job.plan[layer.result]
    layers = split_outputs(job.graph, layer, parts)
    job.plan = job.plan.without(layer.weight, layer.result)
    job.plan |= {part.weight: weight.request() for part in layers} | {part.result: replace(result) for part in layers}
