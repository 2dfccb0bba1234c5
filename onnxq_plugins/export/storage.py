"""How a planned weight lies in the file: types, divided axes, size. The operators that read it are written by `qdq`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from onnxq_plugins.graph import Layer
from onnxq_plugins.spec import Array, Block, QuantSpec, expand
from onnxq_plugins.targets import Rule, channel_multipliers, granularity_of


@dataclass(frozen=True)
class Layout:
    """A weight whose axes blocks divide, so that one factor a block broadcasts against it.

    whole    its shape, each divided axis filled up to whole blocks
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
    return ml_dtypes.int4 if spec.bits <= 4 else np.int8


def multiplier_type(values: Array) -> Any:
    """The smallest integer type that holds multipliers."""
    return ml_dtypes.uint4 if values.max(initial=1) <= 15 else np.uint8


def int8_codes(layer: Layer, spec: QuantSpec) -> Array:
    """Codes times their multipliers: what the integer kernel computes with. Multipliers of whole channels are none of it."""
    assert spec.codes is not None
    if spec.multiplier is None or channel_multipliers(layer, spec):
        return spec.codes.astype(np.int8)
    folded: Array = (spec.codes * expand(spec.multiplier, layer.shape, spec.sub_block)).astype(np.int8)
    return folded


def settle(layer: Layer, spec: QuantSpec, rule: Rule) -> tuple[QuantSpec, Array | None]:
    """The entry of a weight as it is written, and the factor per output channel [outputs] that the layer's results are
    multiplied with, if any.

    Only multipliers of whole channels need settling (the weight equalizing shift, arXiv 2008.05767). They join the scales
    where the rule takes one per channel. Elsewhere the weight's channels are written enlarged, for one scale, and made
    smaller again behind the layer.
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
    """By how many bits each output channel is shifted up before the layer is quantized with one scale [outputs]; None if
    its entry has no such shifts."""
    if spec.multiplier is None or not spec.pow2 or not channel_multipliers(layer, spec):
        return None
    return np.asarray(np.log2(spec.multiplier.max() / spec.multiplier.reshape(-1))).astype(int)


def narrow_channels(layer: Layer, spec: QuantSpec, rule: Rule) -> Array | None:
    """Which output channels [outputs] of a weight with int8 codes are stored in 4 bits, as their codes fit; None if the rule
    does not store them so, or these are less than a quarter: channels that a residual expansion left with one order. Scales
    per tensor are left out, where it would be chance."""
    if not rule.narrow or spec.codes is None or spec.multiplier is not None or granularity_of(layer, spec) != "channel":
        return None
    fits = np.abs(np.moveaxis(spec.codes, layer.out_axis, 0)).reshape(layer.shape[layer.out_axis], -1).max(axis=1) <= 7
    return np.asarray(fits) if 4 * fits.sum() >= fits.size else None


def code_bits(bits: int, rule: Rule) -> float:
    """Bits that a code of some width takes on disk under a rule: files know 4 and 8."""
    return 4.0 if bits <= 4 and rule.storage != "int8" else 8.0


def stored_bits(layer: Layer, spec: QuantSpec, rule: Rule) -> float:
    """Bits per weight on disk under a rule: codes (filled up to whole blocks where they are divided), multipliers and
    scales."""
    spec, factor = settle(layer, spec, rule)
    storage = rule.storage
    assert spec.scale is not None
    shape, bits = layer.shape, 32.0 * (spec.scale.size + (factor.size if factor is not None else 0))
    if storage in ("int4", "float") and spec.multiplier is not None:
        shape = Layout.of(shape, spec.sub_block).whole
        bits += (4 if multiplier_type(spec.multiplier) is ml_dtypes.uint4 else 8) * spec.multiplier.size
    elif storage == "float":
        shape = Layout.of(shape, spec.block).whole
    width = code_bits(spec.bits, rule)
    if (narrow := narrow_channels(layer, spec, rule)) is not None:
        width -= 4.0 * float(narrow.mean())
    return float((width * np.prod(shape) + bits) / np.prod(layer.shape))
