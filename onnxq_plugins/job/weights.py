"""What a recipe's request makes of one layer's weight: its block on the axes of the layer, as wide as the target's codes may
be; and of an activation."""

from __future__ import annotations

from dataclasses import replace

from onnxq_plugins.graph import Layer
from onnxq_plugins.job.tables import BlockRequest, TensorRequest
from onnxq_plugins.spec import Block, QuantSpec, block_shape
from onnxq_plugins.targets import Target, channel_block, channel_multipliers


def activation_request(request: TensorRequest, target: Target) -> QuantSpec:
    """The entry of an activation: on a symmetric grid where the target knows no other."""
    return QuantSpec(request.bits, request.symmetric or target.centred(request.bits), None, None, request.pow2)


def one_scale(layer: Layer, request: TensorRequest, target: Target) -> bool:
    """True if a weight gets one scale although its channels are to have their own: the target has no others, or, for a
    grouped transposed convolution in integers, the file: those of one group are not along an axis."""
    known = target.granularities(layer.op)
    if (
        layer.op == "ConvTranspose"
        and layer.groups > 1
        and any(r.storage == "int8" for r in target.rules if r.op == layer.op)
    ):
        known = known - {"channel"}
    return request.block == "channel" and request.sub_block == "none" and "channel" not in known and "tensor" in known


def narrowed(bits: int, target: Target) -> int:
    """The width of a weight beside quantized activations: 8 bits are fewer where the target's codes are narrower."""
    return target.code_bits if target.code_bits < bits <= 8 else bits


def weight_spec(layer: Layer, request: TensorRequest, target: Target, problems: list[str]) -> QuantSpec:
    """The request of one weight. Multipliers are left out where they could only be 1 (8-bit codes leave no room in an int8)
    or are not finer than the scale (depthwise layers have one input per output)."""
    block = None if one_scale(layer, request, target) else _block(layer, request.block, problems)
    spec = QuantSpec(request.bits, request.symmetric, block, None, request.pow2, request.max_multiplier, full=request.full)
    if request.sub_block == "none":
        return spec
    sub_block = _block(layer, request.sub_block, problems)
    top = min(request.max_multiplier, target.max_code // spec.top)
    if sub_block is not None and channel_multipliers(layer, replace(spec, sub_block=sub_block)):
        top = request.max_multiplier
    if top <= 1 or sub_block is None or not _finer(layer, sub_block, block):
        return replace(spec, pow2=False)
    return replace(spec, sub_block=sub_block, max_multiplier=top)


def _finer(layer: Layer, block: Block, other: Block | None) -> bool:
    """True if a block divides some axis of the weight into more parts than another does."""
    parts = block_shape(layer.shape, other) or (1,) * len(layer.shape)
    return any(a > b for a, b in zip(block_shape(layer.shape, block), parts, strict=True))


def _block(layer: Layer, request: BlockRequest, problems: list[str]) -> Block | None:
    """A block of the recipe, for the axes of this layer's weight."""
    if request == "tensor":
        return None
    if request == "channel":
        return channel_block(layer)
    sizes = (request,) if isinstance(request, int) else tuple(int(n) for n in request)
    sizes = (1, *sizes) if len(sizes) == 1 else sizes
    if len(sizes) == 2:
        return tuple(
            sizes[0] if a == layer.out_axis else sizes[1] if a == layer.in_axis else 0 for a in range(len(layer.shape))
        )
    if len(sizes) != len(layer.shape):
        problem = (
            f"block {list(sizes)} has {len(sizes)} sizes, the weight of a {layer.op} with {len(layer.shape)} axes "
            "takes [outputs, inputs], or one size per axis."
        )
        problems += [problem] if problem not in problems else []
        return None
    return sizes
