"""equalize: factors between layers that give channels ranges which one scale can serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.graph import ChannelGroup, Graph, Member, channel_groups, clip_maximum, rescale
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.search.preview import Preview
from onnxq_plugins.solvers.equalize import Place, equalize
from onnxq_plugins.spec import Array

_FACTOR = 2.0**12  # factors beyond this, or its inverse, only make biases too large for int32 and weights vanish
_LEAST = 0.1  # dB by which an exponent must lower the measured error: what a few samples can tell
_BIAS = 64.0  # how far beyond a layer's largest bias a factor may bring another one

Bounds = tuple[Array, Array]  # least and largest factor per channel


@dataclass(frozen=True)
class Equalize(Pass):
    """Cross-layer equalization: multiply a channel by a factor where it is made and divide by it where it is read. The float
    function stays; what one scale for all channels costs does not.

    by         ``weights``: a channel's range in the weights that make it becomes equal to its range in those that read it,
               which serves scales per tensor. ``activations``: channel c is divided by (r_c / max r)^e, with r_c its largest
               |value| over the activations of the group, relative to each one's largest; e is chosen per group by the
               measured error of the quantized network's outputs. This serves the scale that an activation has for all its
               channels
    gain       ``weights``: least ratio of a group's predicted rounding noise before and after for which it is equalized
    pow2       factors are powers of two: the float model stays the same to the last bit
    exponents  e to try
    samples    of the data that errors are measured on (``activations``)
    margin     how far a channel may go beyond its calibrated range, in parts of that range, before a Clip counts as idle

        W1 <- F W1,  b1 <- F b1,  W2 <- W2 F^-1;   f_c = sqrt(r2_c / r1_c) makes both ranges equal   (``weights``)
                                                   f_c = (r_c / max r)^-e                            (``activations``)

    Groups are sets of channels that must scale together: layer to layer, through a depthwise layer (whose rows take up a
    factor on either side), a whole residual stream, LayerNormalization to MatMul (SmoothQuant's case).

    A Clip (ReLU6) has one maximum for all channels, so an equalized one would need a Min per channel, which no integer
    kernel absorbs. Hence a channel that reaches the maximum keeps factor 1, and one that stays below gets no larger factor
    than leaves it below; the data tell which is which. Without data such groups are left alone, and told. Where
    statistics are told along another axis (positions of a 1-D convolution behind an Add, attention heads), Clips hold all
    channels, and ``activations`` leaves the group alone.

    Source: ``weights``: Data-Free Quantization (arXiv 1906.04721), section 4.1. ``activations``: SmoothQuant (arXiv
    2211.10438), without its weight term, on any group. The treatment of Clip is ours.
    Cost: ``weights``: a fraction of a second; one run over the data where there are Clips. ``activations``: one run, and for
    each group and exponent an export and `samples` runs of the quantized network.
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = "rewrite"
    by: Literal["weights", "activations"] = "weights"
    gain: float = 2.0
    pow2: bool = False
    exponents: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    samples: int = 32
    margin: float = 0.25

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples} must be at least 1")
        if self.margin < 0:
            raise ValueError(f"margin = {self.margin} must not be negative")
        if not self.exponents or not all(0 < e <= 1 for e in self.exponents):
            raise ValueError(f"exponents = {list(self.exponents)} must lie in (0, 1]")

    def apply(self, job: Job) -> dict[str, Any]:
        if self.by == "activations" and not job.calibration.ready:
            job.note("equalize by activations was left out: without data there are no ranges to even out")
            return {"groups": 0}
        groups = channel_groups(job.graph, "rescale", clips=job.calibration.ready)
        bounds = self._bounds(job, groups)
        told: dict[str, Any] = {}
        if not job.calibration.ready and (stopped := _stopped(job.graph)):
            job.note(f"equalize went through no Clip, since there are no data that tell where it is idle ({stopped} Clips)")
            told["clips_not_passed"] = stopped
        found = self._by_weights(job, groups, bounds) if self.by == "weights" else self._by_activations(job, groups, bounds)
        held = sum(int((low == high).sum()) for low, high in bounds)
        return {"groups": len(groups), "channels_held_by_clips": held, **told, **found}

    def _by_weights(self, job: Job, groups: list[ChannelGroup], bounds: list[Bounds]) -> dict[str, Any]:
        weights = _reduced(job.graph)
        places = [
            [_place(weights[m.tensor], m) for m in g.weights if m.tensor in weights and m.role != "fixed"] for g in groups
        ]
        used, largest = 0, 1.0
        for group, factors, bound in zip(groups, equalize(places, bounds, self.gain), bounds, strict=True):
            made = self._rounded(factors, bound)
            if (made != 1).any():
                rescale(job.graph, group, made)
                used, largest = used + 1, max(largest, float(made.max() / made.min()))
        return {"equalized": used, "largest_ratio_of_factors": round(largest, 1)}

    def _by_activations(self, job: Job, groups: list[ChannelGroup], bounds: list[Bounds]) -> dict[str, Any]:
        """Try the exponents group by group, those with the most uneven channels first, and keep what lowers the error."""
        preview = Preview(job, self.samples)
        spreads = {
            i: spread
            for i, group in enumerate(groups)
            if (bounds[i][0] < bounds[i][1]).any() and (spread := _spread(preview, group)) is not None
        }
        before = best = preview.sqnr()
        kept = {}
        for i in job.track(sorted(spreads, key=lambda i: float(np.median(spreads[i]))), "equalizing", len(spreads)):
            group, chosen = groups[i], None
            for e in self.exponents:
                factors = self._rounded(np.clip(spreads[i] ** -e, *bounds[i]), bounds[i])
                attempt = preview.fork()
                with _rescaled(job.graph, group, factors):
                    attempt.rescaled(group, factors)
                    found = attempt.sqnr()
                if found > best + _LEAST:
                    best, chosen = found, (e, factors, attempt)
            if chosen is not None:
                kept[group.tensors[0]], factors, preview = chosen
                rescale(job.graph, group, factors)
        return {"equalized": len(kept), "exponents": kept, "sqnr_before_and_after": [round(before, 2), round(best, 2)]}

    def _rounded(self, factors: Array, bounds: Bounds) -> Array:
        """Factors as they are, or the nearest powers of two within the bounds."""
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
        made = []
        for group in groups:
            low, high = np.full(group.size, 1 / _FACTOR), np.full(group.size, _FACTOR)
            for member in group.members:
                if member.tensor in clips and member.axis != channel_axis(graph, sources[member.tensor]):
                    low, high = np.ones(group.size), np.ones(group.size)  # its ranges are those of another axis
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
            made.append((np.minimum(low, high), high))
        return made


@contextmanager
def _rescaled(graph: Graph, group: ChannelGroup, factors: Array) -> Iterator[None]:
    """The graph with a group rescaled; behind the block all is as it was before."""
    values = {m.tensor: graph.constant(m.tensor) for m in group.weights}
    batchnorms, touched = dict(graph.batchnorms), set(graph.touched)
    rescale(graph, group, factors)
    yield
    for name, before in values.items():
        graph.set_constant(name, before)
    graph.batchnorms, graph.touched = batchnorms, touched


def _spread(preview: Preview, group: ChannelGroup) -> Array | None:
    """Largest |value| of each channel relative to the largest of all, over the group's planned activations [channels]; None
    where nothing is to be gained, or could not be measured."""
    if not preview.follows(group):
        return None
    sizes = []
    for member in group.members:
        if not member.constant and member.tensor in preview.ranges:
            low, high = preview.ranges[member.tensor]
            size = np.maximum(np.abs(low), np.abs(high))[member.index].max(axis=1)
            sizes.append(size / max(float(size.max()), 1e-30))
    if not sizes:
        return None
    spread = np.max(sizes, axis=0)
    spread = np.maximum(spread, 1 / _FACTOR)
    return spread if np.median(spread) < 0.9 else None


def _reduced(graph: Graph) -> dict[str, Array]:
    """Every layer's weight as its largest |value| over all axes but the first two [rows, columns]."""
    return {
        y.weight: np.abs(graph.constant(y.weight)).reshape(*y.shape[:2], -1).max(axis=2).astype(np.float64)
        for y in graph.layers
    }


def _place(size: Array, member: Member) -> Place:
    """Where a group lies in a weight."""
    return Place(size, member.axis, member.index, member.role == "output", member.rows)


def _stopped(graph: Graph) -> int:
    """How many Clips with a maximum the model has."""
    return sum(clip_maximum(node) is not None for node in graph.nodes)
