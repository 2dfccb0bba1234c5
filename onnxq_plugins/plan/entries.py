"""Checks of an entry of a plan."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.graph import Graph, constants
from onnxq_plugins.spec import QuantSpec, block_shape


def entry_problem(graph: Graph, tensor: str, spec: QuantSpec) -> str:
    """What is wrong with one entry of a plan, as the end of a sentence about it; "" if nothing."""
    if tensor not in graph:
        return "names no tensor of the graph; take names from job.graph.layers"
    layer = next((layer for layer in graph.layers if layer.weight == tensor), None)
    constant = graph.is_constant(tensor)
    if layer is None and constant and not any(tensor == other.name for other in constants(graph)):
        return (
            "is about a constant that is not a weight of 1 kB or more; plan weights and activations, biases follow from them"
        )
    if not spec.solved:
        return ""
    if not constant and spec.block is not None:
        return f"has block {spec.block}; activations have one scale, block = None"
    shape = graph.constant(tensor).shape if constant else ()
    scale = np.asarray(spec.scale)
    if scale.shape != block_shape(shape, spec.block):
        return f"has scales of shape {scale.shape}, its block needs {block_shape(shape, spec.block)}; see QuantSpec"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "has scales that are not positive numbers; use scale 1 where all values are 0"
    if spec.multiplier is not None and not np.isin(spec.multiplier, spec.multipliers).all():
        return f"has multipliers other than {spec.multipliers.tolist()}; use only QuantSpec.multipliers"
    if spec.pow2 and spec.sub_block is None and not (np.frexp(scale)[0] == 0.5).all():
        return "has scales that are not powers of two, although pow2 is set; round them up to powers of two"
    low, high = spec.grid
    for what, codes, expected in (("codes", spec.codes, shape), ("zero points", spec.zero_point, scale.shape)):
        if codes is not None and not (
            codes.shape == expected
            and np.issubdtype(codes.dtype, np.integer)
            and low <= codes.min(initial=low)
            and codes.max(initial=low) <= high
        ):
            return f"has {what} that are not integers of shape {expected} in [{low}, {high}]; clip them to QuantSpec.grid"
    if spec.shift is not None and layer is not None and np.shape(spec.shift) != (layer.channels,):
        return f"has a shift of shape {np.shape(spec.shift)}; give one value per output channel, ({layer.channels},)"
    return ""
