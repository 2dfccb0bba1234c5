"""The default solver (law L4): whatever the passes left open gets a scale and codes, so that any pass may be left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Layer
from onnxq_plugins.layers.float_inputs import keep_inputs_float
from onnxq_plugins.layers.recurrent import recurrent_codes
from onnxq_plugins.plan.grids import natural_grids
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import bias_values
from onnxq_plugins.spec import (
    Array,
    QuantSpec,
    block_shape,
    encode,
    expand,
    from_range,
    reduce_blocks,
    solve_minmax,
    weight_codes,
)
from onnxq_plugins.targets import channel_multipliers

if TYPE_CHECKING:
    from onnxq_plugins.job import Job

_NORMAL, _LARGEST = 2.0**-14, 2.0**15  # float16 with all its digits


def complete(job: Job) -> None:
    """Law L4: solve whatever the passes left open."""
    complete_ranges(job)
    job.plan |= natural_grids(job.graph, job.target, job.plan)
    complete_constants(job)
    job.plan |= keep_inputs_float(job, job.plan)
    solved = {}
    mapped = job.graph.mapped
    for layer in Planned.of(job).layers:
        with mapped.reading():
            spec = complete_weight(job, layer, job.plan[layer.weight])
            if layer.weight in mapped.arrays and spec.codes is not None:
                spec = replace(spec, codes=mapped.keep(spec.codes))
        solved[layer.weight] = spec
    job.plan |= solved


def complete_constants(job: Job) -> None:
    """Solve the constants outside layers: the smallest scales without clipping, and the nearest codes; those of recurrent
    operators by what these read."""
    mapped, graph = job.graph.mapped, job.graph
    specs = {name: spec for name, spec in Planned.of(job).constants.items() if spec.codes is None}
    for name, spec in specs.items():
        if not spec.solved:
            with mapped.reading():
                spec = solve_minmax(graph.constant(name), spec)
            table = any(node.op == "Gather" for node in graph.consumers(name))  # its codes may be a layer's, too
            specs[name] = spec if table else _half(spec)
    solved = recurrent_codes(job, specs)
    for name, spec in specs.items():
        with mapped.reading():
            codes = solved[name] if name in solved else weight_codes(graph.constant(name), spec)
            specs[name] = replace(spec, codes=mapped.keep(codes) if name in mapped.arrays else codes)
    job.plan |= specs


def _half(spec: QuantSpec) -> QuantSpec:
    """An entry whose scales float16 holds, rounded up by 0.1 % at most: a file stores those of constants that are decoded in
    half the bytes. As it is where they are too small or too large for that."""
    scale = np.asarray(spec.scale, np.float32)
    if not ((scale >= _NORMAL) & (scale < _LARGEST)).all():
        return spec
    half = scale.astype(np.float16)
    up = np.nextafter(half, np.float16(np.inf))
    return replace(spec, scale=np.where(half.astype(np.float32) < scale, up, half).astype(np.float32))


def complete_ranges(job: Job) -> None:
    """Solve activations that are still open by their extremes over the data."""
    open_ranges = [n for n in Planned.of(job).activations if not job.plan[n].solved]
    if open_ranges:
        ranges = job.calibration.ranges(open_ranges)
        job.plan |= {n: activation_spec(ranges[n], job.plan[n]) for n in open_ranges}


def complete_weight(job: Job, layer: Layer, spec: QuantSpec) -> QuantSpec:
    """The entry of one weight with what is missing: the smallest scale without clipping, then the nearest codes. A scale so
    fine that the layer's bias would overflow int32 is widened (channels whose weights are nearly zero). The layer's input
    must be solved. Raises OnnxqError if the weight is not finite."""
    weight = job.graph.constant(layer.weight)
    if not np.isfinite(weight).all():
        raise OnnxqError(f"layer '{layer.name}': its weight has NaN or Inf; the float model is broken.")
    if not spec.solved:
        spec = _half(solve_minmax(weight, spec)) if spec.decoded else solve_minmax(weight, spec)
    spec = _lower_shifts(job, layer, spec, weight)
    spec = replace(spec, codes=weight_codes(weight, spec) if spec.codes is None else spec.codes)
    codes, scale, floor = spec.codes, np.asarray(spec.scale), scale_floor(job, layer, spec)
    assert codes is not None
    empty = np.asarray(reduce_blocks(np.abs(codes), spec.block, np.maximum) == 0)
    coarse = empty & (floor > 0) & (scale > np.max(scale, initial=0.0, where=~empty))
    if coarse.any():  # any scale serves weights of 0: one that is fine enough for the bias
        scale = np.where(coarse, floor, scale).astype(np.float32)
        spec = replace(spec, scale=scale)
    over = floor > scale
    if over.any():
        widened = job.report.widened
        widened[layer.name] = widened.get(layer.name, 0) + int(over.sum())
        spec = replace(spec, scale=np.maximum(scale, floor).astype(np.float32))
        again = weight_codes(weight, replace(spec, codes=None))
        codes = np.where(expand(over, weight.shape, spec.block), again, codes)
    return replace(spec, codes=codes)


def scale_floor(job: Job, layer: Layer, spec: QuantSpec) -> Array:
    """Smallest weight scales (powers of two where the scales are) at which |bias| / (s_x s_w) is 2^30 at most: float32, in
    the shape of the scale; 0 where nothing limits them."""
    shape = block_shape(layer.shape, spec.block)
    needed = _least_steps(job, layer, spec)
    if needed is None:
        return np.zeros(shape)
    if channel_multipliers(layer, spec):
        multiplier = spec.multipliers[-1:] if spec.multiplier is None else spec.multiplier.reshape(-1)
        needed = (needed if needed.size == multiplier.size else needed.max()) / multiplier
    each = needed.reshape(shape) if shape and needed.size == np.prod(shape) else np.full(shape, needed.max())
    if spec.pow2 and spec.sub_block is None:
        each = np.where(each > 0, np.exp2(np.ceil(np.log2(np.maximum(each, 1e-30)))), 0.0)
    return np.asarray(each, np.float32)


def _least_steps(job: Job, layer: Layer, spec: QuantSpec) -> Array | None:
    """Weight steps [outputs] at which |bias| / (s_x s_w) is 2^30; None where nothing limits them: beside 16-bit inputs,
    whose scales are 256 times finer, export writes such a bias at a scale of its own."""
    key, bias = Planned.of(job).input(layer), bias_values(job.graph, layer, spec)
    if not key or bias is None or job.plan[key].bits > 8:
        return None
    return np.asarray(np.abs(bias) / (float(job.plan[key].scale or 1) * 2.0**30))


def _lower_shifts(job: Job, layer: Layer, spec: QuantSpec, weight: Array) -> QuantSpec:
    """An entry with a multiplier per channel, with those raised (their channels shifted up by less) at which the bias would
    overflow int32."""
    needed = _least_steps(job, layer, spec)
    if needed is None or spec.multiplier is None or not channel_multipliers(layer, spec):
        return spec
    values = spec.multipliers
    needed = needed if needed.size == spec.multiplier.size else np.full(spec.multiplier.size, needed.max())
    at = np.minimum(np.searchsorted(values, needed / np.asarray(spec.scale)), len(values) - 1)
    multiplier = np.maximum(spec.multiplier.reshape(-1), values[at]).reshape(spec.multiplier.shape)
    raised = replace(spec, multiplier=multiplier)
    if spec.codes is None:
        return raised
    over = np.broadcast_to(multiplier > spec.multiplier, weight.shape)
    return replace(raised, codes=np.where(over, encode(weight, replace(raised, codes=None)), spec.codes))


def activation_spec(ends: tuple[float, float], spec: QuantSpec) -> QuantSpec:
    """The solution of an activation for a range. One that was always 0 gets [0, 1]: with the usual scale 1 for empty ranges
    its grid would reach beyond a Clip's maximum, which keeps the layer before it in float."""
    low, high = ends
    return from_range(*(ends if high > low or low else (0.0, 1.0)), spec.request())
