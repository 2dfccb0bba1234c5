"""equalize: even out channel ranges by factors between layers.

A Clip is passed, not replaced: ReLU in place of ReLU6 would change the function, and a maximum per channel breaks fusion.
Channels that reach the maximum keep factor 1 and the others stay below it; calibration says which are which. The level of
the free channels against the held ones is the one with the least rounding noise at the readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.calibration import channel_axis, channels
from onnxq_plugins.graph import ChannelGroup, Graph, Member, channel_groups, clip_maximum, rescale
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.layers.shared import shared_weights
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.gains import Taken, seen_by
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.solvers.equalize import Place, equalize
from onnxq_plugins.solvers.spread import noise, spread
from onnxq_plugins.spec import Array

_FACTOR = 2.0**12  # factors beyond this, or its inverse, only make biases too large for int32 and weights vanish
_WORTH = 0.9  # predicted noise after a change relative to that before, above which it is not made
_TRIED = 5e8  # multiply-adds over all samples up to which the whole network is tried
_BIAS = 64.0  # a factor may enlarge a bias to so many times the layer's largest one

Bounds = tuple[Array, Array]  # least and largest factor per channel


@dataclass(frozen=True)
class Equalize(Pass):
    """Even out channel ranges by factors between layers.

    Cross-layer equalization: multiply a channel by a factor where it is computed and divide by it where it is read. The
    float function stays; what one scale for all channels costs does not.

    by         ``weights``: a channel's range in the weights that compute it becomes equal to its range in those that read
               it, which suits scales per tensor. ``activations``: channel c is divided by (r_c / max r)^e, with r_c its
               largest |value| over the activations of the group, relative to each one's largest; e is chosen per group by
               the noise that rounding is predicted to cause at the layers that read it. This suits the scale that an
               activation has for all its channels
    gain       ``weights``: least ratio of a group's predicted rounding noise before and after for which it is equalized
    pow2       factors are powers of two: the float model stays the same to the last bit
    exponents  values of e to try
    margin     how far a channel may exceed its calibrated range, as a fraction of it, before a Clip counts as active

        W1 <- F W1,  b1 <- F b1,  W2 <- W2 F^-1;   f_c = sqrt(r2_c / r1_c) makes both ranges equal   (``weights``)
                                                   f_c = l (r_c / max r)^-e w_c^d, d = 0 or 1 - e    (``activations``)

    Groups are sets of channels that must be scaled together: layer to layer, through a depthwise layer (whose rows absorb a
    factor on either side), a whole residual stream, LayerNormalization to MatMul (the case of SmoothQuant).

    A Clip (ReLU6) has one maximum for all channels, so that an equalized one would need a Min per channel, which no integer
    kernel absorbs. Hence a channel that reaches the maximum keeps factor 1, and one that stays below gets no factor that
    would take it there; the data show which is which. Without data such groups are left unchanged and reported. Where
    statistics belong to another axis (positions of a 1-D convolution after an Add, attention heads), Clips hold all
    channels. ``activations`` stops at Clips, since samples that were not seen may reach a maximum that calibration did not,
    and leaves groups with statistics along another axis unchanged, and those with a weight that layers share: it would
    no longer be one.

    The prediction adds up what the grid of each activation costs through the weights that read it, what wider weights cost
    their own grid through the variance of their inputs, and what samples other than those of calibration may lose beyond the
    grid (`solvers/spread.py`); layers count relative to their signal. A Concat joins channels of several groups, and of
    none, on one grid: each group is weighed with the others as they are by then, and a branch of another range gets a common
    factor towards theirs.

    Source: ``weights``: Data-Free Quantization (arXiv 1906.04721), section 4.1. ``activations``: SmoothQuant (arXiv
    2211.10438) on any group, with its exponent by prediction, which is ours, as is the treatment of Clip.
    Cost: ``weights``: a fraction of a second; one run over the data where there are Clips. ``activations``: the run over the
    data that `ranges` needs, which it does not repeat, and a few passes over the weights. Networks of few multiply-adds are
    run with and without the factors on up to 32 samples, and keep what gives the better outputs.
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = "rewrite"
    by: Literal["weights", "activations"] = "weights"
    gain: float = 2.0
    pow2: bool = False
    exponents: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    margin: float = 0.25

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin = {self.margin} must not be negative")
        if not self.exponents or not all(0 < e <= 1 for e in self.exponents):
            raise ValueError(f"exponents = {list(self.exponents)} must lie in (0, 1]")

    def apply(self, job: Job) -> dict[str, Any]:
        if self.by == "activations" and not job.calibration.ready:
            job.note("equalize by activations was skipped: without data there are no ranges to even out")
            return {"groups": 0}
        if self.by == "activations" and not Planned.of(job).activations:
            return {"groups": 0}  # all run in float
        groups = channel_groups(job.graph, "rescale", clips=job.calibration.ready and self.by == "weights")
        if self.by == "activations":
            planned = [layer for layer in job.graph.layers if layer.weight in job.plan]
            shared = {layer.weight for layers in shared_weights(job, planned) for layer in layers}
            groups = [group for group in groups if shared.isdisjoint(member.tensor for member in group.weights)]
        bounds = self._bounds(job, groups)
        held = sum(int((low == high).sum()) for low, high in bounds)
        result: dict[str, Any] = {"groups": len(groups), "channels_held_by_clips": held}
        if not job.calibration.ready and (clips := _clips(job.graph)):
            job.note(f"equalize did not pass any Clip, since there are no data to show where it is inactive ({clips} Clips)")
            result["clips_not_passed"] = clips
        by = self._by_weights if self.by == "weights" else self._by_activations
        return result | by(job, groups, bounds)

    def _by_weights(self, job: Job, groups: list[ChannelGroup], bounds: list[Bounds]) -> dict[str, Any]:
        weights = _reduced(job.graph)
        places = [
            [_place(weights[m.tensor], m) for m in g.weights if m.tensor in weights and m.role != "fixed"] for g in groups
        ]
        used, largest = 0, 1.0
        for group, factors, bound in zip(groups, equalize(places, bounds, self.gain), bounds, strict=True):
            rounded = self._rounded(factors, bound)
            if (rounded != 1).any():
                rescale(job.graph, group, rounded)
                used, largest = used + 1, max(largest, float(rounded.max() / rounded.min()))
        return {"equalized": used, "largest_ratio_of_factors": round(largest, 1)}

    def _by_activations(self, job: Job, groups: list[ChannelGroup], bounds: list[Bounds]) -> dict[str, Any]:
        """Choose the exponent of each group by predicted noise, and try all together where that is cheap."""
        chosen: list[tuple[ChannelGroup, Array]] = []
        told: dict[str, Any] = {}
        taken = Taken()
        for group, (reads, readers), bound in zip(groups, seen_by(job, groups, taken), bounds, strict=True):
            if not reads:
                continue
            factors, exponent, _ = spread(reads, readers, self.exponents, *bound)
            factors = self._rounded(factors, bound)
            ratio = noise(factors, reads, readers) / max(noise(np.ones(group.size), reads, readers), 1e-300)
            if (factors != 1).any() and ratio < _WORTH:
                chosen.append((group, factors))
                taken.add(job.graph, group, factors)
                told[group.tensors[0]] = {"exponent": exponent, "noise": round(ratio, 4)}
        result: dict[str, Any] = {"equalized": len(chosen), "exponents": told}
        if not chosen:
            return result
        judge = Judge.of(job, apart=False, work=_TRIED)
        before = judge.sqnr(job.plan) if judge else 0.0
        with _undoable(job, chosen) as undo:
            _rescale(job, chosen)
            if judge:
                stale = {name: spec.request() for name, spec in job.plan.items() if name in job.graph.touched}
                after = judge.sqnr(job.plan | stale)
                result["sqnr_before_and_after"] = [round(before, 2), round(after, 2)]
                if after < before:
                    undo()
                    job.note(
                        f"equalize lowers the outputs from {before:.1f} to {after:.1f} dB on calibration samples, and was "
                        "undone"
                    )
                    result |= {"equalized": 0}
        return result

    def _rounded(self, factors: Array, bounds: Bounds) -> Array:
        """The factors, or with `pow2` the nearest powers of two within the bounds."""
        if not self.pow2:
            return factors
        near = np.exp2(np.rint(np.log2(factors)))
        near = np.where(near > bounds[1], near / 2, near)
        return np.where(near < bounds[0], near * 2, near)

    def _bounds(self, job: Job, groups: list[ChannelGroup]) -> list[Bounds]:
        """Least and largest factors of each group's channels."""
        graph = job.graph
        clips = {
            n: node
            for g in groups
            for n in g.tensors
            if (node := graph.producer(n)) is not None and clip_maximum(node) is not None
        }
        sources = {n: node.inputs[0].name for n, node in clips.items()}
        ranges = job.calibration.channel_ranges(list(sources.values())) if sources else {}
        bounds = []
        for group in groups:
            low, high = np.full(group.size, 1 / _FACTOR), np.full(group.size, _FACTOR)
            for member in group.members:
                if member.tensor in clips and member.axis != channel_axis(graph, sources[member.tensor]):
                    low, high = np.ones(group.size), np.ones(group.size)  # its ranges belong to another axis
                elif member.tensor in clips:
                    first, last = ranges[sources[member.tensor]]
                    top = np.maximum((last + self.margin * (last - first))[member.index].max(axis=1), 1e-30)
                    limit = clip_maximum(clips[member.tensor])
                    assert limit is not None
                    low, high = np.where(top < limit, low, 1.0), np.where(top < limit, np.minimum(high, limit / top), 1.0)
                elif member.constant and member.role == "output" and graph.constant(member.tensor).ndim == 1:
                    bias = np.abs(graph.constant(member.tensor).astype(np.float64))[member.index].max(axis=1)
                    most = np.divide(_BIAS * bias.max(), bias, out=np.full(group.size, np.inf), where=bias > 0)
                    high = np.minimum(high, np.maximum(most, 1.0))
            bounds.append((np.minimum(low, high), high))
        return bounds


def _rescale(job: Job, chosen: list[tuple[ChannelGroup, Array]]) -> None:
    """Rescale groups by factors; what calibration knows of their activations follows."""
    before = job.graph.digest()
    for group, factors in chosen:
        rescale(job.graph, group, factors)
    job.calibration.moved(before, _changes(job.graph, chosen))


def _changes(graph: Graph, chosen: list[tuple[ChannelGroup, Array]]) -> dict[str, tuple[int, Array, float]]:
    """What rescaling does to activations, as `Calibration.moved` takes it."""
    changes: dict[str, tuple[int, Array, float]] = {}
    for group, factors in chosen:
        for m in group.members:
            if not m.constant:
                count = channels(graph, m.tensor) if m.axis == channel_axis(graph, m.tensor) else None
                spread = changes.setdefault(m.tensor, (m.axis, np.ones(count or 0), 0.0))[1]
                if count:
                    spread[m.index.ravel()] = np.repeat(factors, m.index.shape[1])
    return changes


@contextmanager
def _undoable(job: Job, chosen: list[tuple[ChannelGroup, Array]]) -> Iterator[Callable[[], None]]:
    """A function that takes back, within the block, that groups were rescaled by factors."""
    graph = job.graph
    values = {m.tensor: graph.constant(m.tensor) for group, _ in chosen for m in group.weights}
    batchnorms, touched = dict(graph.batchnorms), set(graph.touched)

    def undo() -> None:
        now = graph.digest()
        for name, before in values.items():
            graph.set_constant(name, before)
        graph.batchnorms, graph.touched = batchnorms, touched
        job.calibration.moved(now, _changes(graph, [(group, 1 / factors) for group, factors in chosen]))

    yield undo


def _reduced(graph: Graph) -> dict[str, Array]:
    """Every layer's weight as its largest |value| over all axes but the first two [rows, columns]."""
    return {
        layer.weight: np.abs(graph.constant(layer.weight)).reshape(*layer.shape[:2], -1).max(axis=2).astype(np.float64)
        for layer in graph.layers
    }


def _place(size: Array, member: Member) -> Place:
    """The part of a weight that belongs to a group."""
    return Place(size, member.axis, member.index, member.role == "output", member.rows)


def _clips(graph: Graph) -> int:
    """Number of Clips with a maximum."""
    return sum(clip_maximum(node) is not None for node in graph.nodes)
