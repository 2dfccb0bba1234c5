"""How a planned weight is stored: types, divided axes, size, and the operators that decode it.

Above 4 bits multipliers are folded at export: codes times multipliers take no more room in int8 than the codes. A weight
equalizing shift is a multiplier per output channel, a power of two, so that the plan has no second notion of it; `settle`
writes it into the scales where a rule takes one per channel, else as a Mul after the layer. A width per channel is a matter
of storage (`narrow_channels`): the plan knows one width per weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from onnxq_plugins.export.builder import Builder
from onnxq_plugins.graph import Layer
from onnxq_plugins.spec import Array, Block, QuantSpec, expand
from onnxq_plugins.targets import Rule, channel_multipliers, granularity_of

_FEW = 16  # scales, for which a Cast takes more bytes than it saves


@dataclass(frozen=True)
class Layout:
    """A weight whose axes are divided into blocks, so that one factor per block broadcasts against it.

    whole    its shape, each divided axis padded to whole blocks
    split    the same with each divided axis as two: blocks, size of a block
    counts   shape of the factors that broadcasts against `split`

    [40, 20, 3, 3] in blocks (1, 16, 0, 0): whole [40, 32, 3, 3], split [40, 2, 16, 3, 3], counts [40, 2, 1, 1, 1].
    """

    whole: tuple[int, ...]
    split: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(shape: tuple[int, ...], block: Block | None) -> Layout:
        """The layout of a shape; a block that covers an axis does not divide it."""
        whole, split, counts = [], [], []
        for size, b in zip(shape, block or (0,) * len(shape), strict=True):
            blocks = -(-size // b) if b else 1
            divided = 1 < b < size
            whole.append(blocks * b if divided else size)
            split += [blocks, b] if divided else [size]
            counts += [blocks, 1] if divided else [blocks]
        return Layout(tuple(whole), tuple(split), tuple(counts))


def codes_type(spec: QuantSpec) -> Any:
    """The integer type that holds a weight's codes."""
    return ml_dtypes.int4 if spec.bits <= 4 else np.int8 if spec.bits <= 8 else np.int16


def multiplier_type(values: Array) -> Any:
    """The smallest integer type that holds multipliers."""
    return ml_dtypes.uint4 if values.max(initial=1) <= 15 else np.uint8


def int8_codes(layer: Layer, spec: QuantSpec) -> Array:
    """Codes times their multipliers: what the integer kernel computes with. Multipliers of whole channels are not
    included."""
    assert spec.codes is not None
    if spec.multiplier is None or channel_multipliers(layer, spec):
        return spec.codes.astype(np.int8)
    folded: Array = (spec.codes * expand(spec.multiplier, layer.shape, spec.sub_block)).astype(np.int8)
    return folded


def stored_form(layer: Layer, spec: QuantSpec, rule: Rule) -> tuple[QuantSpec, Array | None]:
    """The entry of a weight as it is stored, and the factor per output channel [outputs] that multiplies the layer's
    results, if any.

    Only multipliers of whole channels change form (the weight equalizing shift, arXiv 2008.05767). They join the scales
    where the rule takes one per channel. Elsewhere the channels are stored enlarged, with one scale, and the factors scale
    the results back.
    """
    if spec.multiplier is None or not channel_multipliers(layer, spec):
        return spec, None
    assert spec.scale is not None
    if "channel" in rule.granularity:
        scale = np.asarray(spec.scale * spec.multiplier, np.float32)
        return replace(
            spec,
            block=spec.sub_block,
            sub_block=None,
            multiplier=None,
            scale=scale,
            zero_point=np.zeros(scale.shape, np.int64),
        ), None
    top = spec.multiplier.max()
    factor = (spec.multiplier / top).reshape(-1).astype(np.float32)
    whole = replace(spec, sub_block=None, multiplier=None, scale=np.asarray(spec.scale * top, np.float32))
    return whole, None if (factor == 1).all() else factor


def shifts(layer: Layer, spec: QuantSpec) -> Array | None:
    """Bits by which each output channel is shifted up before the layer is quantized with one scale [outputs]; None if its
    entry has no such shifts."""
    if spec.multiplier is None or not spec.pow2 or not channel_multipliers(layer, spec):
        return None
    return np.asarray(np.log2(spec.multiplier.max() / spec.multiplier.reshape(-1))).astype(int)


def narrow_channels(layer: Layer, spec: QuantSpec, rule: Rule) -> Array | None:
    """Which output channels [outputs] of a weight with int8 codes are stored in 4 bits, because their codes fit: channels
    that a residual expansion left with one order. None if the rule does not allow it, if they are less than a quarter, or
    for one scale per tensor, where small codes are a coincidence."""
    if not rule.narrow or spec.codes is None or spec.multiplier is not None or granularity_of(layer, spec) != "channel":
        return None
    fits = np.abs(np.moveaxis(spec.codes, layer.out_axis, 0)).reshape(layer.shape[layer.out_axis], -1).max(axis=1) <= 7
    return np.asarray(fits) if 4 * fits.sum() >= fits.size else None


def code_bits(bits: int, rule: Rule) -> float:
    """Bits on disk for a code of some width under a rule: files know 4, 8 and 16."""
    return 4.0 if bits <= 4 and rule.storage != "int8" else 8.0 if bits <= 8 else 16.0


def stored_bits(layer: Layer, spec: QuantSpec, rule: Rule) -> float:
    """Bits per weight on disk under a rule: codes (padded to whole blocks where axes are divided), multipliers and
    scales."""
    spec, factor = stored_form(layer, spec, rule)
    storage = rule.storage
    assert spec.scale is not None
    scales = in_few_bytes(np.asarray(spec.scale, np.float32)) if storage == "float" else np.asarray(spec.scale, np.float32)
    shape, bits = layer.shape, 8.0 * scales.nbytes + 32.0 * (factor.size if factor is not None else 0)
    if storage in ("int4", "float") and spec.multiplier is not None:
        shape = Layout.of(shape, spec.sub_block).whole
        bits += (4 if multiplier_type(spec.multiplier) is ml_dtypes.uint4 else 8) * spec.multiplier.size
    elif storage == "float":
        shape = Layout.of(shape, spec.block).whole
    width = code_bits(spec.bits, rule)
    if (narrow := narrow_channels(layer, spec, rule)) is not None:
        width -= 4.0 * float(narrow.mean())
    return float((width * np.prod(shape) + bits) / np.prod(layer.shape))


# ---- operators that decode a weight ---------------------------------------------------------------------------------------


def write_quantized(builder: Builder, layer: Layer, spec: QuantSpec, rule: Rule) -> str:
    """INT8 -> DequantizeLinear, or a chain from INT4 to DequantizeLinear, which the runtime folds at load. Returns the name
    of the weight, as do the other two."""
    assert spec.codes is not None and spec.scale is not None
    name = layer.weight
    if rule.storage == "int4":
        codes = _int4_codes(builder, layer, spec)
    elif (narrow := narrow_channels(layer, spec, rule)) is not None:
        codes = _mixed_codes(builder, layer, spec, narrow)
    else:
        codes = builder.matrix(f"{name}_codes", int8_codes(layer, spec))
    scales = np.asarray(spec.scale, np.float32)
    attrs: dict[str, Any] = {}
    if granularity_of(layer, spec) == "channel":
        scales, attrs = scales.reshape(-1), {"axis": layer.out_axis}
    if rule.activations > 8 and layer.op != "Conv":
        # Otherwise onnxruntime turns it into a MatMulNBits, which silently rounds the 16-bit input to 8 bits. It does not do
        # so for scales of shape [1] and axes counted from the end, which mean the same.
        scales = scales.reshape(-1)
        attrs = {"axis": layer.out_axis - len(layer.shape)}
    scale = builder.constant(f"{name}_scale", scales)
    zero = builder.constant(f"{name}_zero_point", np.zeros(scales.shape, np.int8))
    values = builder.fresh(f"{name}_dequantized")
    builder.add("DequantizeLinear", [codes, scale, zero], [values], **attrs)
    return values


def write_decoded(builder: Builder, layer: Layer, spec: QuantSpec) -> str:
    """Codes -> Cast(FLOAT) -> Mul(scale): a float weight, decoded once at load."""
    assert spec.codes is not None
    codes: Array = spec.codes.astype(codes_type(spec))
    scale = np.asarray(spec.scale, np.float32)
    if spec.multiplier is None:
        return _product(builder, layer.weight, codes, scale, spec.block, TensorProto.FLOAT)
    factors = spec.multiplier.astype(multiplier_type(spec.multiplier))
    fine = _product(builder, layer.weight, codes, factors, spec.sub_block, TensorProto.FLOAT)
    weight, coarse = builder.fresh(f"{layer.weight}_decoded"), builder.constant(f"{layer.weight}_scale", scale)
    builder.add("Mul", [fine, coarse], [weight])  # one scale per tensor or channel: it broadcasts as it is
    return weight


def write_constant(builder: Builder, name: str, spec: QuantSpec, kind: int) -> None:
    """A constant outside layers, decoded once at load: codes -> Cast -> Mul(scale), under its own name, by which
    bodies of control flow may read it.

    kind   its type, FLOAT or DOUBLE
    """
    assert spec.codes is not None
    codes: Array = spec.codes.astype(codes_type(spec))
    product = _product(builder, name, codes, np.asarray(spec.scale, np.float32), spec.block, kind)
    last = next(node for node in reversed(builder.nodes) if product in node.output)
    last.output[0] = name


def in_few_bytes(scale: Array) -> Array:
    """Scales as one where they are all the same, and as float16 where that is exact and smaller, a Cast included; other
    values as they are."""
    if scale.size > 1 and (scale == scale.flat[0]).all():
        return scale.reshape(-1)[:1].reshape((1,) * scale.ndim)
    if scale.dtype != np.float32 or scale.size < _FEW:
        return scale
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scale) else scale


def write_rows(builder: Builder, name: str, spec: QuantSpec, node: onnx.NodeProto, kind: int) -> None:
    """A Gather on the first axis of a table [rows, ...] that has a scale per row: it reads codes and scales, so that no
    float table is in memory, Gather(codes) -> Cast -> Mul(Gather(scale)).

    node   the Gather, which is written anew
    """
    assert spec.codes is not None
    codes = builder.constant(f"{name}_codes", spec.codes.astype(np.int8))
    scale = builder.constant(f"{name}_scale", np.asarray(spec.scale, np.float32))
    output = node.output[0]
    rows, wide, scales, factors = (builder.fresh(f"{output}_{part}") for part in ("codes", "wide", "scale", "factor"))
    builder.add("Gather", [codes, node.input[1]], [rows], name=node.name)
    builder.add("Cast", [rows], [wide], to=kind)
    builder.add("Gather", [scale, node.input[1]], [scales])
    if kind != TensorProto.FLOAT:
        builder.add("Cast", [scales], [factors], to=kind)
        scales = factors
    builder.add("Mul", [wide, scales], [output])


def write_blocked(builder: Builder, layer: Layer, spec: QuantSpec) -> str:
    """DequantizeLinear with a block size along the inputs, [inputs, outputs]."""
    assert spec.codes is not None and spec.scale is not None and spec.block is not None
    codes, scales = spec.codes, np.asarray(spec.scale, np.float32)
    if layer.out_axis == 0:
        codes, scales = codes.T, scales.T
    codes = np.ascontiguousarray(codes)
    kind = ml_dtypes.int4 if spec.bits == 4 else np.int8
    stored = builder.constant(f"{layer.weight}_codes", codes.astype(kind))
    scale = builder.constant(f"{layer.weight}_scale", np.ascontiguousarray(scales))
    values = builder.fresh(f"{layer.weight}_dequantized")
    builder.add("DequantizeLinear", [stored, scale], [values], axis=0, block_size=spec.block[layer.in_axis])
    return values


def _int4_codes(builder: Builder, layer: Layer, spec: QuantSpec) -> str:
    """INT4 -> Cast(INT8), or with multipliers INT4 -> Cast(INT32) -> Mul(multiplier) -> Cast(INT8): int8 codes."""
    assert spec.codes is not None
    name = layer.weight
    codes = builder.fresh(f"{name}_int8")
    if spec.multiplier is None:
        stored = builder.constant(f"{name}_codes", spec.codes.astype(ml_dtypes.int4))
        builder.add("Cast", [stored], [codes], to=TensorProto.INT8)
        return codes
    factors = spec.multiplier.astype(multiplier_type(spec.multiplier))
    narrow = spec.codes.astype(ml_dtypes.int4)
    product = _product(builder, name, narrow, factors, spec.sub_block, TensorProto.INT32)
    builder.add("Cast", [product], [codes], to=TensorProto.INT8)
    return codes


def _mixed_codes(builder: Builder, layer: Layer, spec: QuantSpec, narrow: Array) -> str:
    """int8 codes of which some output channels are stored in 4 bits: Concat and, where the two kinds alternate, Gather."""
    assert spec.codes is not None
    name, axis, parts = layer.weight, layer.out_axis, []
    for channels, kind in ((~narrow, np.int8), (narrow, ml_dtypes.int4)):
        if channels.any():
            stored = builder.constant(f"{name}_codes", np.compress(channels, spec.codes, axis=axis).astype(kind))
            parts.append(stored)
            if kind is not np.int8:
                parts[-1] = builder.fresh(f"{name}_int8")
                builder.add("Cast", [stored], [parts[-1]], to=TensorProto.INT8)
    if len(parts) == 1:
        return parts[0]
    joined, order = builder.fresh(f"{name}_joined"), np.argsort(narrow, kind="stable")  # channel at each place
    builder.add("Concat", parts, [joined], axis=axis)
    if (np.diff(order) >= 0).all():
        return joined
    ordered = builder.fresh(f"{name}_ordered")
    builder.add("Gather", [joined, builder.constant(f"{name}_order", np.argsort(order))], [ordered], axis=axis)
    return ordered


def _product(builder: Builder, name: str, codes: Array, factors: Array, block: Block | None, kind: int) -> str:
    """Codes times one factor per block, as `kind`. Each divided axis is stored as two, [blocks, size of a block] against
    [blocks, 1], so that nothing is repeated on disk; padded where the blocks do not divide it."""
    shape = codes.shape
    layout = Layout.of(shape, block)
    padded = np.zeros(layout.whole, codes.dtype)
    padded[tuple(slice(n) for n in shape)] = codes
    stored = builder.constant(f"{name}_codes", padded.reshape(layout.split))
    factors = in_few_bytes(factors.reshape(layout.counts) if factors.ndim else factors)
    fine, wide = builder.constant(f"{name}_factor", factors), builder.fresh(f"{name}_wide")
    builder.add("Cast", [stored], [wide], to=kind)
    if kind != TensorProto.FLOAT or factors.dtype != np.float32:
        factor, fine = fine, builder.fresh(f"{name}_fine")
        builder.add("Cast", [factor], [fine], to=kind)
    product = builder.fresh(f"{name}_product")
    builder.add("Mul", [wide, fine], [product])
    if layout.split != shape:
        joined = builder.fresh(f"{name}_joined")
        sizes = builder.constant(f"{name}_shape", np.array(layout.whole, np.int64))
        builder.add("Reshape", [product, sizes], [joined])
        product = joined
    if layout.whole != shape:
        cut, axes = builder.fresh(f"{name}_cut"), np.arange(len(shape))
        ends = [builder.constant(f"{name}_cut", np.array(v, np.int64)) for v in (0 * axes, shape, axes)]
        builder.add("Slice", [product, *ends], [cut])
        product = cut
    return product
