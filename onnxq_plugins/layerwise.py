"""One layer as an optimization problem: its weight, what it sees, and how that becomes a solved entry of the plan.

The bridge between graph and solvers. A `Problem` holds plain values, so it can be sent to another process or machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxq_plugins.calibration import Gram
from onnxq_plugins.complete import scale_floor
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job
from onnxq_plugins.patches import blocks
from onnxq_plugins.solvers.gram import narrow, nearest, regress, ridge, row_loss, widen
from onnxq_plugins.solvers.rounding import Effort, Method, solve
from onnxq_plugins.solvers.scales import POWERS, search_scales
from onnxq_plugins.solvers.tiles import FREE, Tiles, diagonal_runs, search_free, search_multipliers
from onnxq_plugins.spec import Array, Block, QuantSpec, block_shape, expand, reduce_blocks, solve_minmax, step
from onnxq_plugins.sweep import Seen

# Ridges in units of D / patches: the fewer patches for D weights, the less their correlations are worth. Rounding needs
# little; the regression on the quantized inputs fits noise sooner, also because patches of one sample resemble each other.
SHRINK_ROUNDING, SHRINK_REGRESSION = 1.0, 20.0
DESCENT = 2  # rounds of coordinate descent over tiles
_AT_ONCE = 2**22  # numbers per array that the solvers get at once: wide layers go block by block
_GRAMS = 2**29  # bytes of Gram matrices held at once


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer to solve.

    weight   float32, in the layer's shape
    spec     its entry in the plan; a scale that is there is kept
    floor    smallest scales allowed (`complete.scale_floor`)
    seen     what the layer sees: of the quantized network, or of the float one (a Gram)
    shift    solve the bias along with the codes; the objective then leaves mean errors out
    """

    layer: Layer
    weight: Array
    spec: QuantSpec
    floor: Array
    seen: Seen | Gram
    shift: bool

    def solve(self, method: Method, effort: Effort, search: bool = True) -> tuple[QuantSpec, float]:
        """The entry with scale (searched if it was open and `search`), codes and shift, and its loss relative to that of
        rounding to the nearest with the same scale."""
        spec, loss, base = self.spec, 0.0, 0.0
        w, h = self._target()
        if not spec.solved:
            rounds = DESCENT if method == "nearest" else 0
            spec = self.scaled(w, h, rounds) if search else self._widened(solve_minmax(self.weight, spec))
        size = narrow(_steps(self.layer, spec), h, 1.0)
        given = narrow(self.layer.matrix(self.weight), h)
        codes = np.empty(w.shape, np.int8 if spec.bits <= 8 else np.int32)
        for part in _parts(w, h):
            one = size[part] if len(size) > 1 else size
            target = w[part].astype(np.float64)
            start = nearest(given[part].astype(np.float64), one, spec.grid)
            found = solve(method, target, h[part], one, spec.grid, effort, start)
            loss += float(row_loss(target - one * found, h[part]).sum())
            base += float(row_loss(target - one * start, h[part]).sum())
            codes[part] = found
        whole = widen(codes, self._shape)
        shift = None
        if self.shift:
            values = (_steps(self.layer, spec) * whole).astype(np.float32)
            expected = np.einsum("god,gd->go", values, self._mean())
            shift = (self._output() - expected).reshape(-1).astype(np.float32)
        return replace(spec, codes=self.layer.from_matrix(whole), shift=shift), loss / base if base > 0 else 1.0

    def scaled(self, w: Array | None = None, h: Array | None = None, rounds: int = DESCENT) -> QuantSpec:
        """The entry with scales, and multipliers, of least output error; codes left open. The plain ones where blocks do
        not lie in a row, as those that divide a kernel.

        rounds   of coordinate descent over tiles; it counts on codes rounded to the nearest, so none serves others best
        """
        if w is None or h is None:
            w, h = self._target()
        spec = solve_minmax(self.weight, self.spec)
        width = _width(self._numbers(spec.sub_block or spec.block))
        if width == self._shape[2] and spec.sub_block is None:
            return self._widened(self._by_row(spec, w, h))
        return self._widened(self._by_tile(spec, w, h, width, rounds) if width else spec)

    def _by_row(self, spec: QuantSpec, w: Array, h: Array) -> QuantSpec:
        """One scale for a row, or for several."""
        size, share = _steps(self.layer, spec), self._numbers(spec.block)
        factors = search_scales(w, h, narrow(size, h, 1.0), spec.grid, narrow(share, h, -1)[:, :, 0],
                                POWERS if spec.pow2 else None)
        factors = factors.reshape(len(size), -1, size.shape[1])[:, 0]  # the pieces of a wide row have the same
        return replace(spec, scale=self._blocks(size * factors[..., None], spec.block))

    def _by_tile(self, spec: QuantSpec, w: Array, h: Array, width: int, rounds: int) -> QuantSpec:
        """One scale, or multiplier, for a run of `width` columns in a band of rows."""
        fine = self._numbers(spec.sub_block or spec.block)[:, :, 0]
        tiles = Tiles(np.unique(fine, return_inverse=True)[1].reshape(fine.shape), width, spec.grid)
        wide = widen(w, self._shape)
        blocks = diagonal_runs(h, self._shape[0], self._shape[2], width)
        scale = np.asarray(self._matrix(np.asarray(spec.scale, np.float64), spec.block))
        if spec.sub_block is None:
            cover = np.empty((tiles.count, blocks.shape[1]))
            cover[tiles.bands] = scale[:, :, ::width]
            step = search_free(wide, h, blocks, tiles, cover, POWERS if spec.pow2 else FREE, rounds)
            return replace(spec, scale=self._blocks(tiles.steps(step[tiles.bands], self._shape[2]), spec.block))
        coarse, unit = self._numbers(spec.block)[:, :, 0], scale[:, :, 0]
        share = coarse if coarse.max() < tiles.count else tiles.bands  # the coarser of the two
        factor, multiplier = search_multipliers(wide, h, blocks, tiles, unit, spec.multipliers, share, rounds)
        full = tiles.steps(multiplier[tiles.bands], self._shape[2])
        return replace(spec, scale=self._blocks(np.broadcast_to((unit * factor)[..., None], self._shape), spec.block),
                       multiplier=self._blocks(full, spec.sub_block).astype(np.int64))

    def _numbers(self, block: Block | None) -> Array:
        """The number of the block that each weight lies in [groups, outputs, D]."""
        shape = block_shape(self.layer.shape, block)
        return self._matrix(np.arange(int(np.prod(shape))).reshape(shape), block)

    def _matrix(self, values: Array, block: Block | None) -> Array:
        """One value per block as one per weight [groups, outputs, D]."""
        return self.layer.matrix(np.broadcast_to(expand(np.asarray(values), self.layer.shape, block), self.layer.shape))

    def _blocks(self, matrix: Array, block: Block | None) -> Array:
        """The inverse of `_matrix`: values that are equal within each block [groups, outputs, D] as one per block."""
        whole = self.layer.from_matrix(np.broadcast_to(matrix, self._shape))
        return np.asarray(reduce_blocks(whole, block, np.maximum), np.float32)

    def _target(self) -> tuple[Array, Array]:
        """Weights to round (float32) and Gram matrix, in its groups: centred if the bias takes mean errors, with a ridge.
        The weights are fitted to the inputs of the quantized network where the whole Gram matrix is there: its diagonal
        blocks alone would make up for the same error once each."""
        seen, h = self.seen, self.seen.h.copy()
        w = narrow(self.layer.matrix(self.weight), h).copy()
        share = h.shape[1] / max(seen.count, 1)
        for part in _parts(w, h):
            mean = seen.mean[part, None, :] if self.shift else 0.0
            h[part] -= seen.mean[part, :, None] * mean
            if isinstance(seen, Seen) and len(h) == self.layer.groups:
                cross = seen.cross[part] - seen.output[part, :, None] * mean
                w[part] = regress(w[part].astype(np.float64), h[part], cross, SHRINK_REGRESSION * share)
            h[part] = ridge(h[part], SHRINK_ROUNDING * share)
        return w, h

    @property
    def _shape(self) -> tuple[int, ...]:
        """[groups, outputs, D] of the layer."""
        return (self.layer.groups, self.layer.channels // self.layer.groups,
                int(np.prod(self.layer.shape)) // self.layer.channels)

    def _mean(self) -> Array:
        """E[x] [groups, D] in the layer's own groups."""
        return widen(self.seen.mean[:, None], (self._shape[0], 1, self._shape[2]))[:, 0]

    def _output(self) -> Array:
        """E[y] [groups, outputs]."""
        if isinstance(self.seen, Seen):
            return self.seen.output
        found: Array = np.einsum("god,gd->go", self.layer.matrix(self.weight), self._mean())
        return found

    def _widened(self, spec: QuantSpec) -> QuantSpec:
        return replace(spec, scale=np.maximum(np.asarray(spec.scale), self.floor).astype(np.float32))


def problem(job: Job, layer: Layer, seen: Seen | Gram, shift: bool) -> Problem:
    """The problem of a planned layer. Raises OnnxqError if its weight is not finite."""
    weight = job.graph.constant(layer.weight)
    if not np.isfinite(weight).all():
        raise OnnxqError(f"layer '{layer.name}': its weight has NaN or Inf; the float model is broken.")
    spec = replace(job.plan[layer.weight], codes=None, shift=None)
    return Problem(layer, weight, spec, scale_floor(job, layer, spec), seen, shift and layer.takes_bias)


def solvable(job: Job) -> list[Layer]:
    """Planned layers that have a matrix form."""
    return [y for y in job.graph.layers if y.weight in job.plan and y.op != "ConvTranspose"]


def float_inputs(job: Job, layers: Sequence[Layer], positions: int, limit: int) -> Iterator[list[tuple[Layer, Gram]]]:
    """What layers see in the float network, a batch of layers at a time: as many as fit half a gigabyte of Gram matrices,
    each batch one run over the data."""
    batch: list[Layer] = []
    held = 0
    for layer in [*layers, None]:
        size = 0
        if layer is not None:
            width = int(np.prod(layer.shape)) // layer.channels
            size = 8 * layer.groups * width * width // blocks(width, limit)
        if batch and (layer is None or held + size > _GRAMS):
            grams = job.calibration.grams(batch, positions, limit)
            yield [(one, grams.pop(one.name)) for one in batch]
            batch, held = [], 0
        if layer is not None:
            batch.append(layer)
            held += size


def _parts(w: Array, h: Array) -> list[slice]:
    """The groups in runs that keep the solvers' arrays small."""
    count = max(1, _AT_ONCE // max(w[0].size, h[0].size))
    return [slice(first, first + count) for first in range(0, len(w), count)]


def _steps(layer: Layer, spec: QuantSpec) -> Array:
    """Size of a code [groups, outputs, D], or [groups, outputs, 1] where it does not vary along D."""
    size = np.asarray(step(spec, layer.shape), np.float64)
    outputs = layer.channels // layer.groups
    varies = size.ndim and any(n > 1 for axis, n in enumerate(size.shape) if axis != layer.out_axis)
    if varies:
        return layer.matrix(np.broadcast_to(size, layer.shape))
    made: Array = np.broadcast_to(size.reshape(-1), layer.channels).reshape(layer.groups, outputs, 1)
    return made


def _width(share: Array) -> int:
    """Length of the runs of equal numbers along the last axis, if all rows have them at the same places; else 0."""
    change = np.flatnonzero((share[:, :, 1:] != share[:, :, :-1]).any(axis=(0, 1))) + 1
    width = int(change[0]) if len(change) else share.shape[2]
    even = np.array_equal(change, np.arange(width, share.shape[2], width))
    return width if even and (share[:, :, :1] == share[:, :, :width]).all() else 0
