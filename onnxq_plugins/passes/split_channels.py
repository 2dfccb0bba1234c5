"""split-channels: give unlike channels grids of their own up to the next operator that mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from onnxq_plugins.graph import Layer
from onnxq_plugins.graph.channelwise import ACTIVATIONS, channelwise, split_through
from onnxq_plugins.graph.flow import readers
from onnxq_plugins.graph.rewrites import splittable
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.chains import Cut, Grid, best_cut, variance
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class SplitChannels(Pass):
    """Give unlike channels grids of their own up to the next operator that mixes them.

    One channel of a convolution that reaches 100 leaves few codes for the others, which end at 5; behind a SiLU, and in the
    depthwise layer that follows, it is still so. The convolution is split by output channels into parts, and so are the
    operators behind it that treat each channel apart: activations, depthwise layers, pooling. A Concat joins the parts in
    front of the next operator that mixes channels. All of it stays integer.

    gain    a group of channels is cut in two if that gains at least so many dB at the readers of the last tensor
    below   and SQNR there is below so many dB with one grid
    parts   groups at most

        noise = sum_c g_c s_p(c)^2 / 12    s_p(c): step of the grid of the part that holds channel c

    The noise of each tensor, relative to the variance of each channel, is weighed by what the channel contributes to the
    operators that read the Concat (g_c, see `solvers.chains`). The grid of the Concat, which all channels share, counts
    before and after: where that is as bad, nothing is gained, and nothing is split.

    Layers whose channels the next operator mixes stay whole, as do ConvTranspose, grouped convolutions, and layers that a
    rule of the recipe matches by name, which would not match their parts.

    Source: our own; splitting channels with outliers is that of OCS (arXiv 1901.09504), which halves them instead.
    Cost: the run over the data that `ranges` needs, and one for the parts if a layer was split. At run time the same
    multiply-adds in twice the operators, and an integer Concat.
    """

    name: ClassVar[str] = "split-channels"
    stage: ClassVar[Stage] = "rewrite"
    gain: float = 6.0
    below: float = 20.0
    parts: int = 3

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"gain = {self.gain} must be positive")
        if self.parts < 2:
            raise ValueError(f"parts = {self.parts} must be at least 2")

    def apply(self, job: Job) -> dict[str, Any]:
        chains = _chains(job)
        if not chains or not job.calibration.ready:
            return {"layers": {}}
        # what `ranges` asks for: one run over the data serves both
        job.calibration.ranges([name for name in Planned.of(job).activations if not job.plan[name].solved])
        ranges = job.calibration.channel_ranges([name for chain in chains for name in chain.tensors])
        rows: dict[str, dict[str, Any]] = {}
        digest, split = job.graph.digest(), set[str]()
        for chain in chains:
            grids = {name: Grid(*ranges[name], job.plan[name]) for name in chain.tensors if name in job.plan}
            known = all(grid.low.size == chain.layer.channels for grid in grids.values())
            if len(grids) < len(chain.tensors) or not known or not split.isdisjoint(chain.tensors):
                continue
            cut = best_cut(
                [grid for name, grid in grids.items() if name not in chain.ends and not _gate(job, name)],
                [grids[name] for name in chain.ends],
                _parts(job, chain, grids),
                self.gain,
                self.parts,
            )
            if cut.before < self.below and len(cut.groups) > 1:
                rows[chain.layer.name] = {
                    "channels": [len(group) for group in cut.groups],
                    "sqnr_before": round(cut.before, 1),
                    "sqnr_after": round(cut.after, 1),
                }
                _split(job, chain, cut)
                split.update(chain.tensors)
        job.calibration.carry(digest)
        return {"layers": rows}


def _gate(job: Job, name: str) -> bool:
    """True for the output of a Sigmoid: it is between 0 and 1 in every channel, and what it varies by says little."""
    node = job.graph.producer(name)
    return node is not None and node.op in ("Sigmoid", "HardSigmoid")


def _parts(job: Job, chain: _Chain, grids: dict[str, Grid]) -> Array:
    """The part of the signal at the readers of a chain that each channel carries [C]."""
    total = np.zeros(chain.layer.channels)
    for name in chain.ends:
        read = {node.name for node in job.graph.consumers(name)}
        layers = [y for y in job.graph.layers if y.name in read and y.groups == 1 and y.op == "Conv"]
        sizes = variance(grids[name].low, grids[name].high)
        for layer in layers:
            energy = np.square(layer.matrix(job.graph.constant(layer.weight))).sum(axis=(0, 1))
            own = energy.reshape(len(sizes), -1).sum(axis=1) * sizes
            total += own / max(float(own.sum()), 1e-30)
        if len(layers) < len(read):
            total += sizes / float(sizes.sum())
    return np.asarray(total / max(float(total.sum()), 1e-30))


class _Chain(NamedTuple):
    """A layer, the operators behind it that treat channels apart, the planned tensors from it on, and which of them other
    operators read."""

    layer: Layer
    nodes: list[Any]
    tensors: list[str]
    ends: list[str]


def _chains(job: Job) -> list[_Chain]:
    """The chains that can be split: from integer convolutions whose results only chains of integer operators read, with
    activations between them, float or not."""
    graph, view = job.graph, Planned.of(job)
    rules = [rule for rule in job.recipe.layers if not rule.everywhere]
    depthwise = {y.name for y in view.layers if y.kind == "depthwise" and not job.plan[y.weight].solved}
    through = {n for n in view.integer if n in depthwise or n not in {y.name for y in graph.layers}}
    outputs = {y.output for y in view.layers}
    through |= {str(after.name) for name in outputs if (after := graph.elided_activation(name)) is not None}
    through |= {str(node.name) for node in graph.nodes if node.op in ACTIVATIONS and not node.domain}
    chains = []
    for layer in view.layers:
        if (
            "Concat" not in job.target.integer_ops
            or layer.op != "Conv"
            or not splittable(layer)
            or layer.channels < 2
            or not view.input(layer)
            or layer.result not in job.plan
            or job.plan[layer.result].solved
            or job.plan[layer.weight].solved
            or any(rule.names(layer.name) for rule in rules)
        ):
            continue
        nodes, ends = channelwise(graph, layer.result, through)
        written = [layer.result, *(node.outputs[0].name for node in nodes)]
        tensors = [name for name in written if name in job.plan]
        if nodes and layer.result not in ends and set(ends) <= set(tensors) and _integer(job, view, ends):
            chains.append(_Chain(layer, nodes, tensors, ends))
    return chains


def _integer(job: Job, view: Planned, ends: Sequence[str]) -> bool:
    """True if integer operators read the tensors at which a chain ends."""
    return all(readers(job.graph, name) & view.integer for name in ends) and bool(ends)


def _split(job: Job, chain: _Chain, cut: Cut) -> None:
    """Split a chain and plan its parts like the whole."""
    plan = job.plan
    weights = {chain.layer.name: plan[chain.layer.weight]}
    weights |= {y.name: plan[y.weight] for y in job.graph.layers if y.name in {node.name for node in chain.nodes}}
    specs = {name: plan[name] for name in chain.tensors}
    layers, pieces = split_through(job.graph, chain.layer, cut.groups, chain.nodes)
    plan = plan.without(chain.layer.weight, *(name for name in chain.tensors if name not in chain.ends))
    plan |= {y.weight: weights[y.name.rpartition("_part")[0]].request() for y in layers}
    plan |= {piece: specs[name].request() for name, names in pieces.items() if name in specs for piece in names}
    gone = [name for name in plan if name not in job.graph]
    job.plan = plan.without(*gone)
