"""Layers whose input becomes a sum of two orders: one layer for each, with the same weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from onnxq_plugins.graph import Layer, split_input, split_values
from onnxq_plugins.graph.flow import activation_inputs, maker_of
from onnxq_plugins.job import Job
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.expansion import halves
from onnxq_plugins.spec import QuantSpec


def expand_inputs(job: Job) -> dict[str, Any]:
    """Two orders for every input of 4 bits or fewer that only layers read. Returns entries of the report: tensors with the
    largest error within their range, and why others are unchanged."""
    graph, readers, rows, left = job.graph, dict[str, list[Layer]](), dict[str, dict[str, Any]](), dict[str, str]()
    planned = Planned.of(job)
    for layer in planned.layers:
        if key := planned.input(layer):
            readers.setdefault(key, []).append(layer)
    reasons = {key: _whole(job, key, layers) for key, layers in readers.items()}
    divisible = [key for key, reason in reasons.items() if not reason]
    exact = job.calibration.ranges(divisible) if divisible else {}
    for key in readers:
        if reasons[key]:
            left[key] = reasons[key]
            continue
        first, second, shift = halves(*_span(job.plan[key], exact[key]), job.plan[key].bits)
        assert first.scale is not None and second.scale is not None and first.zero_point is not None
        low, high = (int(code - first.zero_point) for code in first.grid)
        for name in dict.fromkeys(layer.input for layer in readers[key]):
            parts = split_values(graph, name, float(first.scale), shift, low, high)
            job.plan |= dict(zip(parts, (first, second), strict=True))
            for layer in [reader for reader in readers[key] if reader.input == name]:
                spec = job.plan[layer.weight]
                coarse, fine = split_input(graph, layer, parts)
                job.plan = job.plan.without(layer.weight) | {coarse.weight: replace(spec, shift=None), fine.weight: spec}
                job.keep([layer.output, layer.result])
        job.plan = job.plan.without(key)
        rows[key] = {"layers": len(readers[key]), "step": float(first.scale), "error_bound": float(second.scale) / 2}
    return {"inputs": rows, "inputs_left_alone": left}


def _whole(job: Job, key: str, layers: list[Layer]) -> str:
    """Why an activation keeps one order; "" if it can have two."""
    graph, target, bits, planned = job.graph, job.target, job.plan[key].bits, Planned.of(job)
    if bits > 4:
        return f"it has {bits} bits: two orders are for 4 bits or fewer"
    maker = maker_of(graph, key)
    ops = [*(layer.op for layer in layers), *([maker.op] if maker is not None else [])]
    if coded := next((op for op in ops if op in target.output_scale), ""):
        return f"target '{target.name}' rounds what a {coded} writes to one code"
    names = {layer.name for layer in layers}
    other = next(
        (
            n
            for n in graph.nodes
            if n.name in planned.integer - names and key in [planned.source(name) for name in activation_inputs(graph, n)]
        ),
        None,
    )
    return f"{other.op} '{other.name}' also reads it, and takes one code" if other is not None else ""


def _span(spec: QuantSpec, exact: tuple[float, float]) -> tuple[float, float]:
    """The range of an activation: the end of its grid where values are clipped, else the extreme, which a coarse grid misses
    by up to half a step."""
    if not spec.solved:
        return exact
    half = 0.501 * float(np.asarray(spec.scale))
    low, high = (e if abs(e - end) <= half else end for e, end in zip(exact, spec.value_range, strict=True))
    return low, high
