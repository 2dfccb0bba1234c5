"""One layer as an optimization problem: its weight, what it sees, and how that becomes a solved entry of the plan.

The bridge between graph and solvers. A `Problem` holds plain values, so that it can be sent to another process or machine.

Why it is posed this way:

- The target is regressed, the data are not kept. With y the float layer's output and x the quantized input, E[y x^T] and
  E[x x^T] turn "float target, quantized input" into an ordinary rounding problem for W' = W + E[(y - W x) x^T] H^-1. Its
  ridge is 20 D / patches of the diagonal, that of the rounding 1 D / patches: relative to the power of each input, so that
  units do not matter, and in proportion to how little the patches say. Both were chosen on held-out calibration samples of
  three networks.
- Where there is a bias, the problem is centred: the bias absorbs the mean of any error, so the codes need not.
- Above a limit the Gram matrix keeps blocks on its diagonal, which to every solver is a grouped layer: W [g, O, D] becomes
  [g n, O, D / n].
- Each product runs on one thread, layers run in parallel: threads inside a small matrix product wait for each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxq_plugins.calibration import Gram
from onnxq_plugins.calibration.shapes import spatial_sizes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.patches import blocks
from onnxq_plugins.job import Job
from onnxq_plugins.layers.blocks import row_steps
from onnxq_plugins.layers.blocks import search as search_scales
from onnxq_plugins.layers.complete import scale_floor
from onnxq_plugins.layers.sweep import LayerStatistics
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.solvers.accumulator import bounded, within
from onnxq_plugins.solvers.gram import narrow, nearest, regress, ridge, row_loss, widen
from onnxq_plugins.solvers.rounding import Effort, Method, solve
from onnxq_plugins.spec import Array, QuantSpec, solve_minmax

# Ridges in units of D / patches: the fewer patches for D weights, the less reliable their correlations. Rounding needs
# little; the regression on the quantized inputs overfits sooner, also because patches of one sample resemble each other.
SHRINK_ROUNDING, SHRINK_REGRESSION = 1.0, 20.0
DESCENT = 2  # rounds of coordinate descent over tiles
_AT_ONCE = 2**22  # numbers per array that a solver is called with: wide layers are solved block by block
_GRAMS = 2**29  # bytes of Gram matrices in memory at once


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer to solve.

    weight       float32, in the layer's shape
    spec         its entry in the plan; a solved scale is kept
    floor        smallest scales allowed (`complete.scale_floor`)
    statistics   of what the layer reads in the quantized network, or in the float one (a Gram)
    shift        solve the bias along with the codes; the objective then ignores mean errors
    """

    layer: Layer
    weight: Array
    spec: QuantSpec
    floor: Array
    statistics: LayerStatistics | Gram
    shift: bool

    @staticmethod
    def of(job: Job, layer: Layer, statistics: LayerStatistics | Gram, shift: bool) -> Problem:
        """The problem of a planned layer. Raises OnnxqError if its weight is not finite."""
        weight = job.graph.constant(layer.weight)
        if not np.isfinite(weight).all():
            raise OnnxqError(f"layer '{layer.name}': its weight has NaN or Inf; the float model is broken.")
        spec = replace(job.plan[layer.weight], codes=None, shift=None)
        return Problem(layer, weight, spec, scale_floor(job, layer, spec), statistics, shift and layer.takes_bias)

    def solve(self, method: Method, effort: Effort, search: bool = True) -> tuple[QuantSpec, float]:
        """The entry with scale (searched if it was open and `search` is set), codes and shift, and its loss relative to that
        of rounding to the nearest with the same scale."""
        spec, loss, base = self.spec, 0.0, 0.0
        w, h = self._target()
        if not spec.solved:
            rounds = DESCENT if method == "nearest" else 0
            spec = self.scaled(w, h, rounds) if search else self._widened(solve_minmax(self.weight, spec))
        size = narrow(row_steps(self.layer, spec), h, 1.0)
        exact = narrow(self.layer.matrix(self.weight), h)
        codes = np.empty(w.shape, np.int8 if spec.bits <= 8 else np.int32)
        for part in _parts(w, h):
            one = size[part] if len(size) > 1 else size
            target = w[part].astype(np.float64)
            start = nearest(exact[part].astype(np.float64), one, spec.grid)
            codes[part] = solve(method, target, h[part], one, spec.grid, effort, start)
            loss += float(row_loss(target - one * codes[part], h[part]).sum())
            base += float(row_loss(target - one * start, h[part]).sum())
        return self._entry(spec, widen(codes, self.layer.matrix_shape)), loss / base if base > 0 else 1.0

    def bound(self, codes: Array, limit: int) -> tuple[QuantSpec, float, int]:
        """The entry with codes whose positive and whose negative sum stay within `limit` in every row
        (`solvers.accumulator`), its loss relative to that of the nearest codes, and the number of rows that had to change;
        the others keep their codes.

        codes   the current ones, in the layer's shape; the scale must be solved
        """
        _, h = self._target()
        old, exact = self.layer.matrix(codes), self.layer.matrix(self.weight).astype(np.float64)
        size = np.broadcast_to(row_steps(self.layer, self.spec), old.shape)
        wide = ~within(old, limit)
        rows = np.flatnonzero(wide.any(axis=0))  # wide in some group
        new = old.copy()
        solved = bounded(exact[:, rows], h, size[:, rows], self.spec.grid, limit)
        new[:, rows] = np.where(wide[:, rows, None], solved, old[:, rows])
        loss, base = (
            float(row_loss(narrow(exact - size * one, h), h).sum()) for one in (new, nearest(exact, size, self.spec.grid))
        )
        return self._entry(self.spec, new), loss / base if base > 0 else 1.0, int(wide.sum())

    def _entry(self, spec: QuantSpec, codes: Array) -> QuantSpec:
        """An entry with codes [groups, outputs, D], and with the shift that cancels their mean error."""
        shift = None
        if self.shift:
            values = (row_steps(self.layer, spec) * codes).astype(np.float32)
            expected = np.einsum("god,gd->go", values, self._mean())
            shift = (self._output() - expected).reshape(-1).astype(np.float32)
        return replace(spec, codes=self.layer.from_matrix(codes), shift=shift)

    def scaled(self, w: Array | None = None, h: Array | None = None, rounds: int = DESCENT) -> QuantSpec:
        """The entry with scales, and multipliers, of least output error; codes are left open. The covering scales where
        blocks are not runs of a row, such as those that divide a kernel.

        rounds   of coordinate descent over tiles; it assumes codes rounded to the nearest, so 0 is best for other methods
        """
        if w is None or h is None:
            w, h = self._target()
        return self._widened(search_scales(self.layer, solve_minmax(self.weight, self.spec), w, h, rounds))

    def _target(self) -> tuple[Array, Array]:
        """Weights to round (float32) and Gram matrix, in its groups: centred if the bias takes mean errors, with a ridge.
        The weights are fitted to the inputs of the quantized network where the whole Gram matrix is known: with diagonal
        blocks alone each block would compensate for the same error."""
        statistics, h = self.statistics, self.statistics.h.copy()
        w = narrow(self.layer.matrix(self.weight), h).copy()
        share = h.shape[1] / max(statistics.count, 1)
        for part in _parts(w, h):
            mean = statistics.mean[part, None, :] if self.shift else 0.0
            h[part] -= statistics.mean[part, :, None] * mean
            if isinstance(statistics, LayerStatistics) and len(h) == self.layer.groups:
                cross = statistics.cross[part] - statistics.output[part, :, None] * mean
                w[part] = regress(w[part].astype(np.float64), h[part], cross, SHRINK_REGRESSION * share)
            h[part] = ridge(h[part], SHRINK_ROUNDING * share)
        return w, h

    def _mean(self) -> Array:
        """E[x] [groups, D] in the layer's own groups."""
        return widen(self.statistics.mean[:, None], (self.layer.matrix_shape[0], 1, self.layer.matrix_shape[2]))[:, 0]

    def _output(self) -> Array:
        """E[y] [groups, outputs]."""
        if isinstance(self.statistics, LayerStatistics):
            return self.statistics.output
        output: Array = np.einsum("god,gd->go", self.layer.matrix(self.weight), self._mean())
        return output

    def _widened(self, spec: QuantSpec) -> QuantSpec:
        return replace(spec, scale=np.maximum(np.asarray(spec.scale), self.floor).astype(np.float32))


def bias_shift(graph: Graph, layer: Layer, spec: QuantSpec, mean: Array, sizes: Sequence[int] = ()) -> Array:
    """(W - Wq) E[x], the mean error of a layer's outputs [outputs] that its codes cause, from the mean of its input per
    channel [inputs].

    sizes   of the input of a Conv along its spatial axes, as padding has a mean of 0; () if unknown, which ignores padding
    """
    weight = graph.constant(layer.weight).astype(np.float64)
    error = layer.matrix(weight - weight_values(layer, spec))
    taps = int(np.prod(layer.shape[2:])) if layer.op == "Conv" else 1
    inside = layer.coverage(sizes) if sizes else np.ones(taps)
    summed = error.reshape(*error.shape[:2], -1, taps) @ inside  # [groups, outputs, inputs]
    shift: Array = np.einsum("goi,gi->go", summed, mean.reshape(layer.groups, -1)).reshape(-1)
    return shift


def correct_biases(job: Job, layers: Sequence[Layer], means: Mapping[str, Array] | None = None) -> None:
    """Plan for each solved Conv and Gemm the shift of its bias that takes back the mean error of its codes.

    means   of the inputs per channel, by layer name, of those that are to be corrected; None: over the calibration data
    """
    layers = [y for y in layers if y.op in ("Conv", "Gemm") and (y.name in means if means is not None else True)]
    if means is None:
        layers = [y for y in layers if job.graph.shape(y.input) is not None]
        by_input = job.calibration.means([y.input for y in layers]) if layers else {}
        means = {y.name: by_input[y.input] for y in layers}
    data = job.calibration.data
    sizes = spatial_sizes(job.graph, layers, None if data is None else next(iter(data)))
    for layer in layers:
        spec = job.plan[layer.weight]
        shift = bias_shift(job.graph, layer, spec, means[layer.name], sizes.get(layer.name, ()))
        job.plan |= {layer.weight: replace(spec, shift=shift.astype(np.float32))}


def white_inputs(layer: Layer, limit: int) -> Gram:
    """The statistics of a layer without data: uncorrelated inputs of equal power, so that the error of the weights
    themselves counts.

    limit   largest D in one piece, as for `Calibration.grams`
    """
    groups, _, size = layer.matrix_shape
    pieces = blocks(size, limit)
    width = -(-size // pieces)
    each = np.zeros((groups * pieces, width))
    return Gram(np.broadcast_to(np.eye(width), (*each.shape, width)), each, 1)


def solvable(job: Job) -> list[Layer]:
    """Planned layers that have a matrix form."""
    return [layer for layer in Planned.of(job).layers if layer.op != "ConvTranspose"]


def float_inputs(job: Job, layers: Sequence[Layer], positions: int, limit: int) -> Iterator[list[tuple[Layer, Gram]]]:
    """What layers read in the float network, a batch of layers at a time: as many as fit into half a gigabyte of Gram
    matrices, each batch in one run over the data."""
    batch: list[Layer] = []
    size = 0  # bytes of its Gram matrices
    for layer in [*layers, None]:
        more = 0
        if layer is not None:
            width = int(np.prod(layer.shape)) // layer.channels
            more = 8 * layer.groups * width * width // blocks(width, limit)
        if batch and (layer is None or size + more > _GRAMS):
            grams = job.calibration.grams(batch, positions, limit)
            yield [(one, grams.pop(one.name)) for one in batch]
            batch, size = [], 0
        if layer is not None:
            batch.append(layer)
            size += more


def _parts(w: Array, h: Array) -> list[slice]:
    """The groups in slices that keep the solvers' arrays small."""
    count = max(1, _AT_ONCE // max(w[0].size, h[0].size))
    return [slice(first, first + count) for first in range(0, len(w), count)]
