"""subtensor: share a few scales among channels of like range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.errors import counted
from onnxq_plugins.graph import Layer, channel_groups, split_outputs
from onnxq_plugins.graph.rewrites import splittable
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers import clusters as solver
from onnxq_plugins.spec import Array, QuantSpec, block_shape, from_range, reduce_blocks
from onnxq_plugins.targets import channel_block


@dataclass(frozen=True)
class Subtensor(Pass):
    """Share a few scales among channels of like range.

    Where the recipe asks for one scale per tensor, the output channels of each layer are clustered by their largest |weight|
    into a few subtensors with one scale each. Codes stay open.

    clusters   subtensors per layer at most
    split      True: make each subtensor a layer of its own, for backends with one scale per tensor; the parts read the same
               input and a Concat joins them. False: scales per channel with so few values, for backends that take those
    gain       a layer is clustered if that divides the cost by this much at least; the others keep what the recipe asks for
    balance    a channel counts range^-balance: 0 minimizes the squared error of the weights, 2 that relative to each channel

        cost = sum_c r_c^-balance R_k(c)^2,   R_k = max r_c over cluster k

    The cost is the sum over channels of their weight in the count times (largest |weight| of their cluster)^2: proportional
    to the expected squared error of rounding, step^2 / 12 a weight. Clusters are runs of the channels sorted by range;
    dynamic programming finds the best. Often the inputs of a channel with small weights are large, or its output is scaled
    up later: hence the balance. A channel below a hundredth of the median is nearly dead, and counts as one at the median.

    If split, parts and Concat write on the scale of the layer's output, so that the Concat copies codes: put this pass after
    `ranges`, or each of them gets a range of its own. Where channels can be moved (`permute`), those of a cluster are made
    adjacent first; elsewhere a Gather restores their order. Grouped convolutions other than depthwise ones, and
    ConvTranspose, are not split.

    Source: Subtensor Quantization for Mobilenets (Dinh et al., arXiv 2011.08009), whose abstract reports 8-bit top-1 within
    0.7% of float without scales per channel; the mechanism here is our own reading of it.
    Cost: below a second for a hundred layers. Scales per channel cost nothing at run time; split layers do: each part is an
    operator of its own between others that cut and join channels, which in onnxruntime is often slower than float.
    """

    name: ClassVar[str] = "subtensor"
    clusters: int = 4
    split: bool = False
    gain: float = 2.0
    balance: float = 1.0

    def __post_init__(self) -> None:
        for key, least in (("clusters", 1), ("gain", 1), ("balance", 0)):
            if not getattr(self, key) >= least:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least {least}")

    def apply(self, job: Job) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        left: dict[str, str] = {}
        labels: dict[str, Array] = {}
        for layer in Planned.of(job).layers:
            reason = self._unfit(job, layer)
            if not reason:
                top = _ranges(job, layer)
                label, share = self._labels(top), self._share(top)
                gain = solver.cost(top, 0 * label, share) / solver.cost(top, label, share)
                labels[layer.name] = label
                if gain >= self.gain:
                    rows[layer.name] = {"clusters": int(label.max()) + 1, "cost_reduced_by": round(gain, 3)}
                    continue
                reason = f"the cost would fall only by a factor of {gain:.3g}"
            left[layer.name] = reason
        layers = [layer for layer in job.graph.layers if layer.name in rows]
        if not self.split:
            for layer in layers:
                top = _ranges(job, layer)
                job.plan |= {layer.weight: _clustered(layer, job.plan[layer.weight], top, labels[layer.name])}
            return {"layers": rows, "left_alone": left}
        several = [layer for layer in layers if rows[layer.name]["clusters"] > 1]
        moved = self._gather_clusters(job, several, labels)
        if count := sum(layer.result in job.plan and not job.plan[layer.result].solved for layer in several):
            job.note(
                f"subtensor split {counted(count, 'layer')} whose output ranges are open: each part gets a range of its own "
                "and is requantized afterwards; put the pass ranges before it"
            )
        for layer in several:
            label = self._labels(_ranges(job, layer))  # in the order that the channels have now
            parts = [np.flatnonzero(label == c) for c in range(label.max() + 1)]
            _split(job, layer, sorted(parts, key=lambda part: int(part[0])))
        return {"layers": rows, "left_alone": left, "channel_groups_reordered": moved}

    def _labels(self, top: Array) -> Array:
        return solver.clusters(top, self.clusters, self._share(top))

    def _share(self, top: Array) -> Array:
        """What each channel counts; with range^-balance a nearly dead one would get a cluster of its own."""
        typical = float(np.median(top[top > 0]))
        share: Array = (np.where(top < typical / 100, typical, top) / typical) ** -self.balance
        return share

    def _unfit(self, job: Job, layer: Layer) -> str:
        """Why a planned layer cannot be clustered; "" if it can."""
        spec, channels, target = job.plan[layer.weight], channel_block(layer), job.target
        if spec.solved:
            return "its scales are solved"
        if not spec.symmetric or spec.pow2 or spec.sub_block is not None:
            return f"clusters are not defined for {spec.describe()}{' of powers of two' * spec.pow2}"
        if spec.block is not None:  # finer already
            form = spec.describe((layer.out_axis, layer.in_axis))
            return f'the recipe asks for {form}; set weights.block = "tensor"'
        top = _ranges(job, layer)
        if not np.isfinite(top).all() or not top.any():
            return "its weights are all 0" if np.isfinite(top).all() else "its weights are not finite"
        if not self.split:
            fits = Planned.of(job).rule(layer, replace(spec, block=channels))
            return "" if fits else f"target '{target.name}' has no scales per channel for it"
        if not splittable(layer):
            return f"a {layer.kind} {layer.op} cannot be split by output channels"
        if layer.result in job.plan and "Concat" not in target.integer_ops:
            return f"target '{target.name}' has no integer Concat that would join its parts"
        return ""

    @staticmethod
    def _gather_clusters(job: Job, layers: list[Layer], labels: Mapping[str, Array]) -> int:
        """Reorder channel groups so that the clusters of one layer each become runs: of a depthwise convolution if there is
        one, which would otherwise need a Gather on either side. Returns the number of groups that moved."""
        moved = 0
        if not layers:
            return moved
        for group in channel_groups(job.graph, "permute"):
            if any(m.tensor in job.plan and job.plan[m.tensor].solved for m in group.weights):
                continue  # moving solved weights would drop their solution
            for layer in sorted(layers, key=lambda one: one.kind != "depthwise"):
                label = labels[layer.name]
                order = group.order_by(layer.output, channel_axis(job.graph, layer.output), np.argsort(label, kind="stable"))
                if order is not None:
                    if (np.diff(label) < 0).any():
                        moved += 1
                        job.permute(group, order)
                    break
        return moved


def _ranges(job: Job, layer: Layer) -> Array:
    """Largest |weight| of each output channel."""
    return reduce_blocks(np.abs(job.graph.constant(layer.weight)), channel_block(layer), np.maximum).reshape(-1)


def _clustered(layer: Layer, spec: QuantSpec, top: Array, labels: Array) -> QuantSpec:
    """Scales per channel, equal within each cluster."""
    largest = np.zeros(labels.max() + 1, top.dtype)
    np.maximum.at(largest, labels, top)
    spec = replace(spec, block=channel_block(layer))
    each = largest[labels].reshape(block_shape(layer.shape, spec.block))
    return from_range(-each, each, spec)


def _split(job: Job, layer: Layer, parts: list[Array]) -> None:
    """Split a layer and plan its parts: weights with one scale each, results like the layer's result."""
    spec, whole = job.plan[layer.weight], job.plan.get(layer.result)
    layers = split_outputs(job.graph, layer, parts)
    job.plan = job.plan.without(layer.weight, layer.result) | {part.weight: spec.request() for part in layers}
    if whole is not None:
        (concat,) = job.graph.consumers(layers[0].result)
        results = [*(part.result for part in layers), concat.outputs[0].name]  # a Gather behind the Concat carries its codes
        job.plan |= {name: replace(whole) for name in results}
