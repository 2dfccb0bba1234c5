"""One layer as an optimization problem: its weight, what it sees, and how that becomes a solved entry of the plan.

The bridge between graph and solvers. A `Problem` holds plain values, so that it can be sent to another process or machine.

Why it is posed this way:

- The target is regressed, the data are not kept. With y the float layer's output and x the quantized input, E[(y - W x) x^T]
  and E[x x^T] turn "float target, quantized input" into an ordinary rounding problem for W' = W + E[(y - W x) x^T] H^-1. Its
  ridge is 20 D / patches of the diagonal, that of the rounding 1 D / patches: relative to the power of each input, so that
  units do not matter, and in proportion to how little the patches say. Both were chosen on held-out calibration samples of
  three networks. Inputs that never vary get nothing.
- What fits the patches must fit others. A part of them is held out: W' is solved on the rest, and the target becomes
  W + a (W' - W) with the a in [0, 1] of least error on the part, in closed form (QEP's damping, arXiv 2504.09629; to first
  order the same as a Gram matrix mixed of float and quantized inputs, as in QDrop, arXiv 2203.05740, with a share a of the
  latter). One a a layer: one a row fits the part. If rounding the target has more error there than plain codes, the layer
  gets these. What was chosen is then solved on all patches: with a quarter left out, it lost half a dB.
- Where there is a bias, the problem is centred: the bias absorbs the mean of any error, so the codes need not.
- Above a limit the Gram matrix keeps blocks on its diagonal, which to every solver is a grouped layer: W [g, O, D] becomes
  [g n, O, D / n].
- Each product runs on one thread, layers run in parallel: threads inside a small matrix product wait for each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from onnxq_plugins.calibration import Gram
from onnxq_plugins.calibration.shapes import spatial_sizes
from onnxq_plugins.data.samples import spread
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
from onnxq_plugins.solvers.gram import narrow, nearest, precision, refit, ridge, row_loss, share_of, widen
from onnxq_plugins.solvers.rounding import Effort, Method, solve
from onnxq_plugins.spec import Array, QuantSpec, solve_minmax

# Ridges in units of D / patches: the fewer patches for D weights, the less reliable their correlations. Rounding needs
# little; the regression on the quantized inputs overfits sooner, also because patches of one sample resemble each other.
SHRINK_ROUNDING, SHRINK_REGRESSION = 1.0, 20.0
DESCENT = 2  # rounds of coordinate descent over tiles
_AT_ONCE = 2**22  # numbers per array that a solver is called with: wide layers are solved block by block
_MANY = 4  # patches an input from which on those that are held out may be solved on in the end
_ROWS = 256  # of a layer on which solutions are compared
_TRIED = 2048  # inputs up to which they are: one more Cholesky factorization
_GRAMS = 2**29  # bytes of Gram matrices in memory at once


class Solution(NamedTuple):
    """The solved entry of a layer's weight; its loss on all patches relative to that of the nearest codes with the same
    scale; and the share of the way from W to the weights that fit the quantized inputs best."""

    spec: QuantSpec
    loss: float
    share: float


class _Sides(NamedTuple):
    """Some groups of a layer, on the patches that are seen and on those that are held out."""

    part: slice
    h: Array  # seen, with a ridge
    move: Array | None  # of the weights towards a fit of what is seen
    judged: Array  # E[x x^T] there
    left: Array | None  # E[(y - W x) x^T] there


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

    def solve(self, method: Method, effort: Effort, search: bool = True) -> Solution:
        """The entry with scale (searched if it was open and `search` is set), codes and shift, on all patches. Those that
        are held out say how far the weights go towards a fit of the quantized inputs, and whether plain codes do better."""
        share, learned, sides = self._trial(method, effort)
        share, method = (share, method) if learned else (0.0, "nearest")
        seen = self.statistics
        # few patches can be fitted so well that the network could not be judged on them: those that are held out stay apart,
        # but for the means that the bias takes
        few = bool(sides) and isinstance(seen, LayerStatistics) and seen.count < _MANY * seen.h.shape[1]
        target = self._between(sides, share) if few else self._target(share)
        del sides  # large matrices
        found = self._solved(method, effort, search, share, *target)
        if learned:
            return found
        plain = self._plain()
        return found if self._judged(found.spec) < self._judged(plain) else Solution(plain, 1.0, 0.0)

    def _solved(self, method: Method, effort: Effort, search: bool, share: float, w: Array, h: Array) -> Solution:
        """The solution for weights that went a share of the way towards a fit, and a Gram matrix, as `_target` has them."""
        spec, loss, base = self.spec, 0.0, 0.0
        if not spec.solved:
            rounds = DESCENT if method == "nearest" else 0
            spec = self.scaled(w, h, rounds) if search else self._unsearched()
        size = narrow(row_steps(self.layer, spec), h, 1.0).astype(h.dtype)
        exact = narrow(self.layer.matrix(self.weight), h)
        codes = np.empty(w.shape, _code_type(spec))
        for part in _parts(w, h):
            one = size[part] if len(size) > 1 else size
            target = w[part].astype(h.dtype, copy=False)
            found = solve(method, target, h[part], one, spec.grid, effort, nearest(exact[part], one, spec.grid))
            codes[part] = found.codes
            loss, base = loss + float(found.loss.sum()), base + float(found.base.sum())
        return Solution(self._entry(spec, widen(codes, self.layer.matrix_shape)), loss / base if base > 0 else 1.0, share)

    def _judged(self, entry: QuantSpec) -> float:
        """The error of an entry on the patches that are held out, less that of W itself, see `_excess`."""
        assert (
            isinstance(self.statistics, LayerStatistics) and self.statistics.judged is not None and entry.codes is not None
        )
        seen, held, excess = self.statistics.others(), self.statistics.judged, 0.0
        w = narrow(self.layer.matrix(self.weight), seen.h)
        error = narrow(row_steps(self.layer, entry) * self.layer.matrix(entry.codes), seen.h) - w
        for part in _parts(w, seen.h):
            excess += _excess(error[part], *self._moments(held, w, part, seen))
        return excess

    def _trial(self, method: Method, effort: Effort) -> tuple[float, bool, list[_Sides]]:
        """What a solution on the other patches is worth on those that are held out: the share a in [0, 1] of the way from W
        to the weights W' that fit the quantized inputs with the least error there, and whether the codes of W + a (W' - W)
        have less error there than plain ones. With the matrices that this took."""
        statistics = self.statistics
        held = statistics.judged if isinstance(statistics, LayerStatistics) else None
        if held is None or not isinstance(statistics, LayerStatistics):
            return 1.0, True, []
        seen, slope, curve = statistics.others(), 0.0, 0.0
        w = narrow(self.layer.matrix(self.weight), seen.h)
        sides = [self._sides(part, w, seen, held) for part in _parts(w, seen.h)]
        for one in sides:
            if one.move is not None and one.left is not None:
                up, down = share_of(one.move, one.judged, one.left)
                slope, curve = slope + up, curve + down
        share = min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0
        learned = seen.h.shape[1] > _TRIED or self._gain(sides, w, share, method, effort) > 0
        return share, learned, sides

    def _sides(self, part: slice, w: Array, seen: LayerStatistics, held: LayerStatistics) -> _Sides:
        """Some groups of the layer on both kinds of patches, and the fit of those that are seen."""
        amount = seen.h.shape[1] / max(seen.count, 1)
        h, left = self._moments(seen, w, part, seen)
        move = None if left is None else refit(h, left, SHRINK_REGRESSION * amount, seen.count)
        return _Sides(part, ridge(h, SHRINK_ROUNDING * amount), move, *self._moments(held, w, part, seen))

    def _between(self, sides: Sequence[_Sides], share: float) -> tuple[Array, Array]:
        """`_target` on the patches that are not held out."""
        w = narrow(self.layer.matrix(self.weight), self.statistics.h).copy()
        for one in sides:
            w[one.part] += 0.0 if one.move is None else share * one.move
        return w, sides[0].h if len(sides) == 1 else np.concatenate([one.h for one in sides])

    def _gain(self, sides: Sequence[_Sides], w: Array, share: float, method: Method, effort: Effort) -> float:
        """By how much less error learned codes have than plain ones on the patches that are held out, on some of the rows
        and at the scale of the plain ones."""
        spec = self._unsearched()
        size = narrow(row_steps(self.layer, spec), sides[0].h, 1.0)
        method = method if method in ("nearest", "gpfq", "descent") else "gptq"  # what learns for longer overfits no less
        rows, gain = np.asarray(spread(w.shape[1], _ROWS)), 0.0
        for part, h, move, judged, left in sides:
            exact = w[part][:, rows].astype(h.dtype)
            one = (size[part] if len(size) > 1 else size)[:, rows].astype(h.dtype)
            target = exact if move is None else exact + h.dtype.type(share) * move[:, rows]
            plain = nearest(exact, one, spec.grid)
            there = None if left is None else left[:, rows]
            learned = solve(method, target, h, one, spec.grid, effort, plain).codes
            gain += _excess(one * plain - exact, judged, there) - _excess(one * learned - exact, judged, there)
        return gain

    def _plain(self) -> QuantSpec:
        """The entry with the nearest codes, at the scale it has or one that clips nothing, and a corrected bias."""
        spec = self._unsearched()
        exact = self.layer.matrix(self.weight).astype(np.float64)
        return self._entry(spec, nearest(exact, row_steps(self.layer, spec), spec.grid).astype(_code_type(spec)))

    def _unsearched(self) -> QuantSpec:
        return self.spec if self.spec.solved else self._widened(solve_minmax(self.weight, self.spec))

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

    def _target(self, share: float = 1.0) -> tuple[Array, Array]:
        """Weights to round (float32) and Gram matrix, in its groups: centred if the bias takes mean errors, with a ridge.
        The weights are fitted to the inputs of the quantized network, to a share, where the whole Gram matrix is known: with
        diagonal blocks alone each block would compensate for the same error."""
        statistics = self.statistics
        w = narrow(self.layer.matrix(self.weight), statistics.h).copy()
        amount = statistics.h.shape[1] / max(statistics.count, 1)
        grams = []
        for part in _parts(w, statistics.h):
            h, left = self._moments(statistics, w, part, statistics)
            if left is not None and share:
                w[part] += share * refit(h, left, SHRINK_REGRESSION * amount, statistics.count)
            grams.append(ridge(h, SHRINK_ROUNDING * amount))
        return w, grams[0] if len(grams) == 1 else np.concatenate(grams)

    def _moments(
        self, of: LayerStatistics | Gram, w: Array, part: slice, about: LayerStatistics | Gram
    ) -> tuple[Array, Array | None]:
        """Of some groups, to be read only: E[x x^T], and E[(y - W x) x^T] where the float outputs y and the whole Gram
        matrix are known. If the bias takes mean errors, they are moments about the means of the patches `about`."""
        kind, mean, middle = precision(of.h.shape[1]), of.mean[part], about.mean[part]
        h = of.h[part].astype(kind, copy=self.shift)
        left = None
        if isinstance(of, LayerStatistics) and len(of.h) == self.layer.groups:
            left = of.left[part].astype(h.dtype, copy=self.shift)
        if not self.shift:
            return h, left
        _subtract(h, mean, middle)
        if of is not about:
            _subtract(h, middle, mean - middle)
        if left is not None and isinstance(of, LayerStatistics) and isinstance(about, LayerStatistics):
            off, usual = (one.output[part] - np.einsum("god,gd->go", w[part], one.mean[part]) for one in (of, about))
            left -= (off[:, :, None] * middle[:, None] + usual[:, :, None] * (mean - middle)[:, None]).astype(h.dtype)
        return h, left

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


def _excess(error: Array, h: Array, left: Array | None) -> float:
    """E|y - (W + d) x|^2 - E|y - W x|^2 = d H d^T - 2 d R^T with the moments H = E[x x^T] and R = E[(y - W x) x^T], for
    errors d of weights [g, O, D]; R counts as 0 if it is unknown."""
    excess = float(np.vdot(error @ h, error))
    return excess if left is None else excess - 2 * float(np.vdot(error, left))


def _code_type(spec: QuantSpec) -> type[np.signedinteger[Any]]:
    return np.int8 if spec.bits <= 8 else np.int32


def _subtract(h: Array, a: Array, b: Array) -> None:
    """Subtract a b^T from h, for each group, in place: a [g, D], b [g, D]; some rows at a time, as h may be large."""
    rows = max(1, _AT_ONCE // (h[0, 0].size * len(h)))
    for at in (slice(first, first + rows) for first in range(0, h.shape[1], rows)):
        h[:, at] -= (a[:, at, None] * b[:, None]).astype(h.dtype)


def _parts(w: Array, h: Array) -> list[slice]:
    """The groups in slices that keep the solvers' arrays small."""
    count = max(1, _AT_ONCE // max(w[0].size, h[0].size))
    return [slice(first, first + count) for first in range(0, len(w), count)]
