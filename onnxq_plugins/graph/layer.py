"""A layer: one linear operator with a constant weight, and the statistics of a BatchNormalization folded into it.

Every layer is y = W x over columns x of input patches, W [groups, outputs, D] (`Layer.matrix`), so that solvers on arrays
need no graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxq_plugins.spec import Array

LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class BatchNorm:
    """Statistics of a BatchNormalization that was folded into the layer before it; arrays [C]."""

    gamma: Array
    beta: Array
    mean: Array
    variance: Array


@dataclass(frozen=True)
class Layer:
    """One linear operator with a constant weight.

    weight, bias   names of its constants (each owned by this layer alone, law L7); bias is None if it has none
    output         the operator's own output; `result` is the output of the Relu or Clip behind it, if that is the
                   only consumer, else `output`
    shape          shape of the weight: Conv [OC, IC/groups, *kernel], ConvTranspose [IC, OC/groups, *kernel],
                   Gemm [K, N] or, with transB, [N, K]; MatMul [K, N]
    out_axis, in_axis   axes of the weight that hold output and input channels
    attrs          the operator's attributes
    """

    name: str
    op: str
    input: str
    output: str
    result: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    out_axis: int
    in_axis: int
    groups: int = 1
    attrs: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def kind(self) -> str:
        """``depthwise`` (one input channel per group), ``grouped`` or ``dense``."""
        if self.groups == 1:
            return "dense"
        per_group = self.shape[1] if self.op == "Conv" else self.shape[0] // self.groups
        return "depthwise" if per_group == 1 else "grouped"

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.out_axis] * (self.groups if self.op == "ConvTranspose" else 1)

    @property
    def takes_bias(self) -> bool:
        """True if the operator can have a bias, to which a correction can be added."""
        return self.op != "MatMul"

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """[groups, outputs per group, D] of the matrix form, D = weights per output."""
        return self.groups, self.channels // self.groups, int(np.prod(self.shape)) // self.channels

    def matrix(self, weight: Array) -> Array:
        """The weight as a batch of matrices [groups, outputs per group, D], with D = inputs per group * kernel taps (inputs
        vary slowest). Matrix form of all solvers: y = W x over columns x of input patches."""
        if self.op == "ConvTranspose":
            raise ValueError(f"layer '{self.name}': ConvTranspose has no matrix form over input patches")
        rows = weight if self.out_axis == 0 else weight.T
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1)

    def from_matrix(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        rows = matrix.reshape(-1, matrix.shape[-1])
        return rows.reshape(self.shape) if self.out_axis == 0 else np.ascontiguousarray(rows.T)

    def geometry(self, sizes: Sequence[int]) -> tuple[Sequence[int], list[int], list[int], list[tuple[int, int]]]:
        """Kernel, strides, dilations and pads (before, after) of a Conv whose input has these spatial sizes. With explicit
        pads, or at stride 1, they do not depend on the sizes."""
        rank, kernel = len(self.shape) - 2, self.shape[2:]
        strides = list(self.attrs.get("strides") or [1] * rank)
        dilations = list(self.attrs.get("dilations") or [1] * rank)
        auto = self.attrs.get("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            pads = []
            for n, s, d, k in zip(sizes, strides, dilations, kernel, strict=True):
                total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
                small, large = total // 2, total - total // 2
                pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
            return kernel, strides, dilations, pads
        flat = (self.attrs.get("pads") or [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return kernel, strides, dilations, list(zip(flat[:rank], flat[rank:], strict=True))

    def coverage(self, sizes: Sequence[int]) -> Array:
        """The part of a Conv's outputs (0..1) for which each tap of its kernel [taps] lies inside an input of these spatial
        sizes; elsewhere it reads padding."""
        parts = []
        for n, k, s, d, (before, after) in zip(sizes, *self.geometry(sizes), strict=True):
            outputs = max((n + before + after - d * (k - 1) - 1) // s + 1, 1)
            at = np.arange(outputs) * s - before + d * np.arange(k)[:, None]
            parts.append(((at >= 0) & (at < n)).mean(axis=1))
        whole = parts[0]
        for part in parts[1:]:
            whole = np.multiply.outer(whole, part)
        return np.asarray(whole.reshape(-1))
