"""The matrix form of a layer's input and output: columns of input patches and of outputs, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq_plugins.graph.layer import Layer
from onnxq_plugins.spec import Array


def patches(layer: Layer, x: Array, positions: int, sample: int = 0, zero: int = 0) -> Array:
    """Columns of the layer's input matrix for one sample [groups, D, positions], evenly spread over its output.

    x        Conv [N, C, *spatial]; Gemm, MatMul [..., K]; values or codes
    sample   number of the sample: shifts the positions, so that samples use different ones
    zero     value of padding (codes: their zero point)
    """
    if layer.op != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        return rows[_spread(len(rows), positions, sample)].T[None]
    kernel, strides, dilations, pads = layer.geometry(x.shape[2:])
    sizes = _output_sizes(layer, x.shape[2:])
    at = _spread(len(x) * int(np.prod(sizes)), positions, sample)
    if any(map(any, pads)):
        x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=zero)
    batch, *corner = np.unravel_index(at, (len(x), *sizes))
    offsets = np.zeros((1, len(at)), np.intp)  # in the flattened spatial axes [taps, positions]
    for axis, length in enumerate(x.shape[2:]):
        along = corner[axis] * strides[axis] + (np.arange(kernel[axis]) * dilations[axis])[:, None]
        offsets = (offsets[:, None] * length + along[None]).reshape(-1, len(at))
    flat = x.reshape(len(x), x.shape[1], -1)
    if len(x) == 1:
        columns: Array = flat[0].take(offsets, axis=1)  # [C, taps, positions]
    else:
        columns = flat.swapaxes(0, 1)[:, batch[None], offsets]
    return columns.reshape(layer.groups, -1, len(at))


def output_columns(layer: Layer, y: Array, positions: int, sample: int = 0) -> Array:
    """Columns of the layer's output [groups, outputs per group, positions] that belong to those of `patches`."""
    if layer.op != "Conv":
        rows = y.reshape(-1, y.shape[-1])
        return rows[_spread(len(rows), positions, sample)].T[None]
    at = _spread(len(y) * int(np.prod(y.shape[2:])), positions, sample)
    flat = y.swapaxes(0, 1).reshape(y.shape[1], -1)
    columns: Array = flat.take(at, axis=1)
    return columns.reshape(layer.groups, -1, len(at))


def split(columns: Array, limit: int) -> Array:
    """Columns [g, D, P] with D above `limit` as [g * n, B, P], padded with zeros, B at most a quarter of it: their
    Gram matrices are the n blocks on the diagonal of the whole ones."""
    groups, size, count = columns.shape
    pieces = blocks(size, limit)
    if pieces == 1:
        return columns
    width = -(-size // pieces)
    padded = np.zeros((groups, pieces * width, count), columns.dtype)
    padded[:, :size] = columns
    return padded.reshape(groups * pieces, width, count)


def blocks(size: int, limit: int) -> int:
    """Number of blocks on the diagonal of a Gram matrix of `size` inputs."""
    return 1 if size <= limit else -(-size // max(limit // 4, 1))


def gram_shape(columns: Array) -> tuple[int, int, int]:
    """Shape [g, D, D] of the Gram matrices of columns [g, D, P]."""
    return (columns.shape[0], columns.shape[1], columns.shape[1])


def gram(columns: Array) -> Array:
    """Sum of x x^T over columns [g, D, P] -> [g, D, D], in the precision of the columns: pass at most a few thousand float32
    columns at a time."""
    if len(columns) > 1:
        return np.asarray(columns @ columns.swapaxes(1, 2))
    return np.asarray(columns[0] @ columns[0].T)[None]  # BLAS recognises it as symmetric: half the work


def add_gram(h: Array, columns: Array) -> Array:
    """h [g, D, D] float64 plus the Gram matrices of columns [g, D, P], in place."""
    h += gram(columns)
    return h


def _output_sizes(layer: Layer, sizes: Sequence[int]) -> list[int]:
    kernel, strides, dilations, pads = layer.geometry(sizes)
    return [
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, pad, d, k, s in zip(sizes, pads, dilations, kernel, strides, strict=True)
    ]


def _spread(total: int, count: int, sample: int) -> Array:
    """`count` of `total` positions, evenly spread."""
    if total <= count:
        return np.arange(total)
    return (np.arange(count) * total // count + sample * 7919) % total  # a prime: samples see different positions
