"""Scales of one weight at any granularity: converts between blocks in the weight's own shape and the rows and runs of the
solvers.

Granularity is requested, passes solve it: `weights.block` and `weights.sub_block` alone say how many weights share a scale,
and `sub-layer`, `vector-scale` and `round` solve whatever they meet. A recipe without them still runs, since the default
solver covers every granularity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxq_plugins.graph import Layer
from onnxq_plugins.solvers.gram import narrow, widen
from onnxq_plugins.solvers.scales import POWERS, search_scales
from onnxq_plugins.solvers.tiles import FREE, Tiles, diagonal_runs, search_free, search_multipliers
from onnxq_plugins.spec import Array, Block, QuantSpec, block_shape, expand, reduce_blocks, step


def search(layer: Layer, spec: QuantSpec, w: Array, h: Array | None, rounds: int = 0) -> QuantSpec:
    """The entry with scales, and multipliers, of least output error; codes are left open.

    spec     solved with covering scales (`solve_minmax`), which are kept where blocks are not runs of a row, such as those
             that divide a kernel
    w        weights to round, in matrix form and in the groups of h
    h        Gram matrix of the inputs (see `solvers.gram`); None without data: the error of the weights themselves counts
    rounds   of coordinate descent over tiles
    """
    width = _width(_numbers(layer, spec.sub_block or spec.block))
    if not width:
        return spec
    if h is not None and spec.sub_block is None and width == layer.matrix_shape[2]:
        return _by_row(layer, spec, w, h)
    return _by_tile(layer, spec, w, h, width, rounds)


def row_steps(layer: Layer, spec: QuantSpec) -> Array:
    """The step of each weight [groups, outputs, D], or [groups, outputs, 1] where it does not vary along D."""
    size = np.asarray(step(spec, layer.shape), np.float64)
    varies = size.ndim and any(n > 1 for axis, n in enumerate(size.shape) if axis != layer.out_axis)
    if varies:
        return layer.matrix(np.broadcast_to(size, layer.shape))
    steps: Array = np.broadcast_to(size.reshape(-1), layer.channels).reshape(*layer.matrix_shape[:2], 1)
    return steps


def _by_row(layer: Layer, spec: QuantSpec, w: Array, h: Array) -> QuantSpec:
    """One scale per row, or for several rows."""
    size, share = row_steps(layer, spec), _numbers(layer, spec.block)
    factors = search_scales(
        w, h, narrow(size, h, 1.0), spec.grid, narrow(share, h, -1)[:, :, 0], POWERS if spec.pow2 else None
    )
    factors = factors.reshape(len(size), -1, size.shape[1])[:, 0]  # the pieces of a wide row have the same
    return replace(spec, scale=_blocks(layer, size * factors[..., None], spec.block))


def _by_tile(layer: Layer, spec: QuantSpec, w: Array, h: Array | None, width: int, rounds: int) -> QuantSpec:
    """One scale, or multiplier, per run of `width` columns in a band of rows."""
    fine = _numbers(layer, spec.sub_block or spec.block)[:, :, 0]
    tiles = Tiles(np.unique(fine, return_inverse=True)[1].reshape(fine.shape), width, spec.grid)
    groups, _, size = shape = layer.matrix_shape
    blocks = None if h is None else diagonal_runs(h, groups, size, width)
    w = w if h is None else widen(w, shape)
    scale = np.asarray(_matrix(layer, np.asarray(spec.scale, np.float64), spec.block))
    if spec.sub_block is None:
        cover = np.empty((tiles.count, -(-size // width)))
        cover[tiles.bands] = scale[:, :, ::width]
        scales = search_free(w, h, blocks, tiles, cover, POWERS if spec.pow2 else FREE, rounds)
        return replace(spec, scale=_blocks(layer, tiles.steps(scales[tiles.bands], size), spec.block))
    coarse, unit = _numbers(layer, spec.block)[:, :, 0], scale[:, :, 0]
    share = coarse if coarse.max() < tiles.count else tiles.bands  # one scale for all, or one per channel: a band's rows
    factor, multiplier = search_multipliers(w, h, blocks, tiles, unit, spec.multipliers, share, rounds)
    full = tiles.steps(multiplier[tiles.bands], size)
    return replace(
        spec,
        scale=_blocks(layer, (unit * factor)[..., None], spec.block),
        multiplier=_blocks(layer, full, spec.sub_block).astype(np.int64),
    )


def _numbers(layer: Layer, block: Block | None) -> Array:
    """The number of the block that holds each weight [groups, outputs, D]."""
    shape = block_shape(layer.shape, block)
    return _matrix(layer, np.arange(int(np.prod(shape))).reshape(shape), block)


def _matrix(layer: Layer, values: Array, block: Block | None) -> Array:
    """One value per block as one per weight [groups, outputs, D]."""
    return layer.matrix(np.broadcast_to(expand(np.asarray(values), layer.shape, block), layer.shape))


def _blocks(layer: Layer, matrix: Array, block: Block | None) -> Array:
    """The inverse of `_matrix`: values that are equal within each block, as one per block, float32."""
    whole = layer.from_matrix(np.broadcast_to(matrix, layer.matrix_shape))
    return np.asarray(reduce_blocks(whole, block, np.maximum), np.float32)


def _width(share: Array) -> int:
    """Length of the runs of equal numbers along the last axis, if all rows have them at the same places and no number occurs
    twice, as it does where a block divides a kernel; else 0."""
    change = np.flatnonzero((share[:, :, 1:] != share[:, :, :-1]).any(axis=(0, 1))) + 1
    width = int(change[0]) if len(change) else share.shape[2]
    even = np.array_equal(change, np.arange(width, share.shape[2], width))
    once = len(np.unique(share[0, 0])) == len(change) + 1
    return width if even and once else 0
