"""reorder: reorder channels so that tiles hold weights of like size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.errors import counted
from onnxq_plugins.graph import ChannelGroup, Graph, Layer, Member, channel_groups
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.judge import Judge, ahead
from onnxq_plugins.solvers.order import View, sort_channels, swap_channels, total_cost
from onnxq_plugins.spec import Array, Block


@dataclass(frozen=True)
class Reorder(Pass):
    """Reorder channels so that tiles hold weights of like size.

    PTQ-SL's channel reordering, for the tiles on both sides of every channel group of the network: a layer's outputs with
    the inputs of all that read them, residual streams, depthwise layers, segments of a Concat, channels within the groups of
    grouped convolutions. The float function stays.

    sweeps    of the local search over swaps; 0 only sorts
    data      weight each tile by the mean squares of the inputs it meets, where there are data: the diagonal of the Gram
              matrix; False counts all inputs alike

        cost = sum over tiles of max |w|^2 sum of E[x^2] over its inputs

    Every group is sorted by range (by the one of its weights, or their mean, that works best), then improved by swaps that
    lower sum over tiles of max |w|^2 sum E[x^2], the rounding noise of all weights of the group; twice over all groups,
    since every weight belongs to two. It considers layers whose tiles (`block` or `sub_block` in the recipe) hold several
    channels but not all. Put it before passes that solve weights: solutions for the old order are dropped. In the end the
    network runs in the old order and in the new one on some samples, with the nearest codes, and keeps the better.

    Source: PTQ-SL (Yuan et al., arXiv 2110.07809), which moves channels so that sub-layer scales fit; the cost and the
    search are ours.
    Cost: some seconds for a network of a few million weights, growing with the square of the number of channels for wider
    ones, where ``sweeps = 0`` only sorts; none at run time.
    """

    name: ClassVar[str] = "reorder"
    stage: ClassVar[Stage] = "rewrite"
    sweeps: int = 2
    data: bool = True

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise ValueError(f"sweeps = {self.sweeps} must be at least 0")

    def apply(self, job: Job) -> dict[str, Any]:
        graph = job.graph
        planned = Planned.of(job).layers
        tiled = {layer.weight: (layer, block) for layer in planned if (block := _tile(job, layer)) is not None}
        groups = [
            g
            for g in channel_groups(graph, "permute")
            if any(_parts(m, *tiled[m.tensor]) for m in g.weights if m.tensor in tiled)
        ]
        if not groups:
            job.note(
                "reorder found nothing to do: no planned weight has tiles of several channels; set weights.sub_block or "
                "weights.block"
            )
            return {"groups": 0}
        if solved := sum(job.plan[layer.weight].solved for layer in planned):
            job.note(
                f"reorder moves channels: solutions that earlier passes found for {counted(solved, 'weight')} are dropped "
                "where it moves their channels; put it before those passes"
            )
        power = self._power(job, [layer for layer, _ in tiled.values()])
        judge = Judge.of(job, apart=False)
        scores = {} if judge is None else {"in the old order": judge.each(job.plan)}
        moved: list[tuple[ChannelGroup, Array]] = []
        costs: list[tuple[float, float]] = []
        for turn in range(2):
            for group in job.track(groups, "reordering", len(groups)):
                views = [
                    view
                    for m in group.weights
                    if m.tensor in tiled and (view := _view(graph, m, *tiled[m.tensor], power[m.tensor])) is not None
                ]
                before = total_cost(views, np.arange(group.size))
                start = sort_channels(views) if turn == 0 else np.arange(group.size)
                order = swap_channels(views, start, job.rng, self.sweeps)
                after = total_cost(views, order)
                if after < before:
                    job.permute(group, order)
                    moved.append((group, order))
                    _move(power, tiled, group, order)
                if turn == 0:
                    costs.append((before, after))
        share = float(np.mean([min(after, before) / max(before, 1e-300) for before, after in costs]))
        result: dict[str, Any] = {"groups": len(groups), "cost_of_tiles": round(share, 4)}
        if judge is None or not moved:
            return result
        scores = {"in the new order": judge.each(job.plan), **scores}
        if ahead(scores) == "in the old order":
            for group, order in moved[::-1]:
                job.permute(group, np.argsort(order))
            new, old = (float(each.mean()) for each in scores.values())
            job.note(f"reorder lowers the outputs from {old:.1f} to {new:.1f} dB on calibration samples, and was undone")
        return result | {"sqnr": {name: round(float(each.mean()), 2) for name, each in scores.items()}}

    def _power(self, job: Job, layers: Sequence[Layer]) -> dict[str, Array]:
        """E[x^2] of the inputs of each tiled weight [groups, inputs per group]."""
        power = {layer.weight: np.ones((layer.groups, layer.shape[layer.in_axis])) for layer in layers}
        if self.data and job.calibration.data is not None:
            moments = job.calibration.moments(list(dict.fromkeys(layer.input for layer in layers)))
            for layer in layers:
                square, ones = moments[layer.input].square, power[layer.weight]
                if square.size == ones.size:
                    power[layer.weight] = np.maximum(square, 1e-6 * square.mean()).reshape(ones.shape)
        return power


def _tile(job: Job, layer: Layer) -> Block | None:
    """The tile of a planned weight that has a matrix form."""
    spec = job.plan[layer.weight]
    return None if layer.op == "ConvTranspose" else spec.sub_block or spec.block


def _parts(member: Member, layer: Layer, block: Block) -> bool:
    """True if the order of a member's channels decides which of them share tiles."""
    width = block[member.axis]
    return 1 < width < layer.shape[member.axis] and member.index.shape[1] == 1


def _view(graph: Graph, member: Member, layer: Layer, block: Block, power: Array) -> View | None:
    """A weight as the solver sees it; None if the order of the member's channels does not matter."""
    if not _parts(member, layer, block):
        return None
    values = np.abs(graph.constant(member.tensor).astype(np.float64))
    taps = tuple(a for a in range(values.ndim) if a not in (layer.out_axis, layer.in_axis))
    size = values.max(axis=taps) if taps else values  # [outputs, inputs] or [inputs, outputs]
    load = np.repeat(power, layer.channels // layer.groups, axis=0)  # [outputs, inputs per group]
    load = load if layer.out_axis == 0 else load.T
    across = 1 - member.axis
    step = block[across] or size.shape[across]
    first = np.arange(0, size.shape[across], step)
    at = member.index[:, 0]
    if member.rows and member.axis == layer.out_axis:  # outputs of one group of a convolution: the others stay
        at = at + member.rows[0]
    elif member.rows:  # inputs of one group: only its outputs, whose tiles are counted from the first output of all groups
        start, stop = member.rows
        size, load = size[start:stop], load[start:stop]
        first = np.unique(np.maximum(first[first < stop], start)) - start
    size, load = np.maximum.reduceat(size, first, axis=across), np.add.reduceat(load, first, axis=across)
    if member.axis == 0:
        size, load = size.T, load.T
    return View(size, load, at, block[member.axis])


def _move(power: dict[str, Array], tiled: dict[str, tuple[Layer, Block]], group: ChannelGroup, order: Array) -> None:
    """Permute the mean squares along with their channels."""
    for member in group.weights:
        if member.tensor not in tiled:
            continue
        values, layer = power[member.tensor], tiled[member.tensor][0]
        if layer.kind == "depthwise":  # its inputs are numbered as its outputs
            at = member.index // (layer.channels // layer.groups)
            values[at.ravel()] = values[at[order].ravel()].copy()
        elif member.role == "input":
            rows = slice(None)
            if member.rows:
                per_group = member.rows[1] - member.rows[0]
                rows = slice(member.rows[0] // per_group, member.rows[0] // per_group + 1)
            part = values[rows]
            part[:, member.index.ravel()] = part[:, member.index[order].ravel()].copy()
