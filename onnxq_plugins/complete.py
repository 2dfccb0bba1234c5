"""The default solver (law L4): whatever the passes left open gets a scale and codes, so any pass may be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.planning import layer_input
from onnxq_plugins.spec import Array, QuantSpec, encode, from_range, solve_minmax

if TYPE_CHECKING:
    from onnxq_plugins.job import Job


def complete(job: Job) -> None:
    """Law L4: solve whatever the passes left open. Activations take their extremes, weights their smallest scale
    without clipping; then codes are rounded to the nearest, and a scale so fine that the layer's bias would overflow
    int32 is widened (channels whose weights are all but zero)."""
    open_ranges = [n for n, spec in job.plan.items() if not spec.solved and not job.graph.is_constant(n)]
    if open_ranges:
        ranges = job.calibration.ranges(open_ranges)
        job.plan |= {n: activation_spec(ranges[n], job.plan[n]) for n in open_ranges}
    solved: dict[str, QuantSpec] = {}
    widened: dict[str, int] = {}
    for layer in job.graph.layers:
        spec = job.plan.get(layer.weight)
        if spec is None:
            continue
        weight = job.graph.constant(layer.weight)
        if not np.isfinite(weight).all():
            raise OnnxqError(f"layer '{layer.name}': its weight has NaN or Inf; the float model is broken.")
        if not spec.solved:
            spec = solve_minmax(weight, spec)
        key = layer_input(job.graph, job.plan, job.target, layer)
        if key and layer.bias is not None:
            floor = _bias_floor(job.graph.constant(layer.bias), np.asarray(spec.scale), float(job.plan[key].scale or 1))
            if floor is not None:
                widened[layer.name] = int(np.sum(floor > np.asarray(spec.scale)))
                spec = replace(spec, scale=np.maximum(np.asarray(spec.scale), floor).astype(np.float32), codes=None)
        if spec.codes is None:
            spec = replace(spec, codes=encode(weight, spec))
        solved[layer.weight] = spec
    job.plan |= solved
    if widened:
        job.report["widened"] = widened | job.report.get("widened", {})


def activation_spec(kept: tuple[float, float], spec: QuantSpec) -> QuantSpec:
    """The solution of an activation for a range. One that was always 0 gets [0, 1]: with the usual scale 1 for empty
    ranges its grid would reach beyond a Clip's maximum, which keeps the layer before it in float."""
    return from_range(*(kept if kept[1] > kept[0] or kept[0] else (0.0, 1.0)), spec.request())


def _bias_floor(bias: Array, scale: Array, activation: float) -> Array | None:
    """Smallest weight scales at which |bias| / (s_x s_w) stays below 2^30; None if all are above."""
    needed = np.abs(bias.astype(np.float64)) / (activation * 2.0**30)
    needed = needed.max() if scale.ndim == 0 else needed.reshape(scale.shape) if scale.size == needed.size else needed.max()
    return np.asarray(needed) if np.any(needed > scale) else None
