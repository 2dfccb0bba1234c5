"""The values that a planned layer computes with.

A corrected bias is part of the plan: `QuantSpec.shift` is what the mean error of the codes adds to the layer's bias. So
bias correction is exact in the sense of law L1, correcting twice is correcting once, a shift goes stale with its codes, and
a layer without a bias gets one."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.spec import Array, QuantSpec, step


def weight_values(layer: Layer, spec: QuantSpec) -> Array:
    """The float32 weight that the exported model computes with."""
    assert spec.codes is not None
    values: Array = (spec.codes * np.broadcast_to(step(spec, layer.shape), layer.shape)).astype(np.float32)
    return values


def bias_values(graph: Graph, layer: Layer, spec: QuantSpec) -> Array | None:
    """The layer's bias and the shift that its weight's entry adds, in float64; None if there is neither."""
    if layer.bias is None and spec.shift is None:
        return None
    bias = graph.constant(layer.bias).astype(np.float64) if layer.bias is not None else np.zeros(1)
    return np.asarray(bias if spec.shift is None else bias.reshape(-1) + spec.shift)


def bias_scale(layer: Layer, weight: QuantSpec, activation: QuantSpec) -> Array:
    """s_x * s_w as float32: [OC], or a scalar where the weight has one scale. Never 0, even where both are nearly 0."""
    assert weight.scale is not None and activation.scale is not None
    product = np.asarray(weight.scale, np.float32) * np.float32(activation.scale)
    product = np.maximum(product, np.finfo(np.float32).tiny)
    return np.asarray(product if product.ndim == 0 else product.reshape(-1))
