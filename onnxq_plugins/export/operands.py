"""Constants that an integer operator other than a layer computes with, such as the addend of an Add: codes, too, derived at
export as biases are. The grid covers the values, which are known, so that nothing is clipped and nothing is calibrated."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto

from onnxq_plugins.export.builder import Builder
from onnxq_plugins.graph import Graph
from onnxq_plugins.spec import Array, QuantSpec, encode, from_range
from onnxq_plugins.targets import Target
from onnxq_plugins.targets.reading import operands

_NORMALIZATIONS = ("LayerNormalization", "InstanceNormalization")
_BYTE = 8


def write_operands(builder: Builder, graph: Graph, target: Target, node: NodeProto, beside: QuantSpec) -> dict[str, str]:
    """Write the float constants of an operator as codes. Returns their names -> those of their dequantized forms.

    beside   the entry of an activation that it reads: codes have its bits
    """
    found: dict[str, str] = {}
    factor: QuantSpec | None = None  # the grid of a normalization's scale
    for name in operands(graph, graph.producer(node.output[0])):
        values = graph.constant(name)
        if factor is not None:  # the other constant of a normalization is its bias
            found[name] = _int32(builder, name, values, np.float32(beside.scale) * np.float32(factor.scale))
            continue
        normalization = node.op_type in _NORMALIZATIONS
        signed = normalization and beside.bits > _BYTE  # a weight: the HTP takes no uint16 there beside an int32 bias
        spec = QuantSpec(beside.bits, signed or target.centred(beside.bits))
        spec = from_range(values.min(initial=0.0), values.max(initial=0.0), spec)
        factor = spec if normalization else None
        if signed:
            codes = encode(values, spec).astype(np.int16)
            found[name] = _decoded(builder, name, codes, np.asarray(spec.scale), np.zeros((), np.int16))
            continue
        codes = (encode(values, spec) + target.offset(spec)).astype(code_type(spec, target))
        found[name] = _decoded(builder, name, codes, np.asarray(spec.scale), zero_point(spec, target))
    return found


def code_type(spec: QuantSpec, target: Target) -> type[np.generic]:
    """The type of an activation's codes as the target stores them."""
    types = (np.int8, np.int16) if target.stores_signed(spec) else (np.uint8, np.uint16)
    return types[spec.bits > 8]


def zero_point(spec: QuantSpec, target: Target) -> Array:
    """The zero point of an activation as the target stores it; its type is that of the codes."""
    return np.asarray(np.asarray(spec.zero_point) + target.offset(spec)).astype(code_type(spec, target))


def _int32(builder: Builder, name: str, values: Array, scale: Any) -> str:
    """A bias at the scale of the products, or at a coarser one where its codes would overflow."""
    scale = np.maximum(scale, np.float32(np.abs(values).max(initial=0.0) / 2.0**30))
    scale = np.asarray(np.maximum(scale, np.finfo(np.float32).tiny), np.float32)
    return _decoded(builder, name, np.rint(values / scale).astype(np.int32), scale, None)


def _decoded(builder: Builder, name: str, codes: Array, scale: Array, zero: Array | None) -> str:
    inputs = [builder.constant(f"{name}_codes", codes), builder.constant(f"{name}_scale", np.asarray(scale, np.float32))]
    inputs += [] if zero is None else [builder.constant(f"{name}_zero_point", zero)]
    values = builder.fresh(f"{name}_dequantized")
    builder.add("DequantizeLinear", inputs, [values])
    return values
