"""Solvers on arrays against naive loops, the data form, brute force and the properties that their papers claim."""

from __future__ import annotations

import tracemalloc
from functools import partial
from itertools import pairwise, product
from math import erf, erfc
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.graph import patches
from onnxq_plugins.solvers.adam import Adam
from onnxq_plugins.solvers.adaround import adaround
from onnxq_plugins.solvers.attention import attention
from onnxq_plugins.solvers.descent import descent
from onnxq_plugins.solvers.gpfq import gpfq
from onnxq_plugins.solvers.gptq import damp, gptq
from onnxq_plugins.solvers.gram import better, cholesky, narrow, nearest, refit, regress, ridge, row_loss, widen
from onnxq_plugins.solvers.rounding import Effort, solve
from onnxq_plugins.solvers.scales import COARSE, FINE, scale_losses, search_scales
from tests.zoo import examples

few = examples(30)
seeds = st.integers(0, 2**32 - 1)
METHODS = ("nearest", "gptq", "gpfq", "descent", "adaround", "attention", "auto")
QUICK = Effort(steps=40)


class Case(NamedTuple):
    """A layer: weights [g, O, D], Gram matrices [g, D, D], steps, grid and its input data [g, D, N]."""

    w: np.ndarray
    h: np.ndarray
    step: np.ndarray
    grid: tuple[int, int]
    x: np.ndarray

    def loss(self, codes):
        return row_loss(self.w - self.step * codes, self.h)

    @property
    def nearest(self):
        return nearest(self.w, self.step, self.grid)

    def random(self, seed=0):
        return np.random.default_rng(seed).integers(self.grid[0], self.grid[1] + 1, self.w.shape).astype(float)

    def groups(self, part):
        return Case(self.w[part], self.h[part], self.step[part], self.grid, self.x[part])

    def rows(self, part):
        return Case(self.w[:, part], self.h, self.step[:, part], self.grid, self.x)

    def inputs(self, order):
        step = self.step[:, :, order] if self.step.shape[2] > 1 else self.step
        return Case(self.w[:, :, order], self.h[:, order][:, :, order], step, self.grid, self.x[:, order])

    def with_gram(self, h):
        return self._replace(h=h)


def layer(seed, groups=1, rows=4, size=12, bits=4, two_level=False, cover=0.9, dead=(), rank=None):
    """Correlated non-negative inputs of different sizes; a scale that clips the largest weight of a row if cover < 1."""
    rng = np.random.default_rng(seed)
    rank, count = rank or size // 2 + 1, 6 * size + 4
    x = rng.normal(size=(groups, size, rank)) @ rng.normal(size=(groups, rank, count)) / np.sqrt(rank)
    x = np.maximum(x + 0.2 * rng.normal(size=x.shape) + 0.3, 0) * rng.uniform(0.3, 3, (groups, size, 1))
    x[:, list(dead)] = 0
    w = rng.normal(size=(groups, rows, size))
    high = 2 ** (bits - 1) - 1
    step = np.abs(w).max(axis=2, keepdims=True) * cover / high
    if two_level:
        step = step / 4 * rng.integers(2, 6, w.shape)
    return Case(w, x @ x.swapaxes(1, 2) / count, step, (-high, high), x)


layers = st.builds(
    layer,
    seeds,
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    bits=st.integers(2, 5),
    size=st.integers(1, 12) | st.sampled_from([31, 32, 33, 40]),
    two_level=st.booleans(),
)
small = st.builds(
    layer,
    seeds,
    groups=st.integers(1, 2),
    rows=st.integers(1, 4),
    bits=st.integers(2, 5),
    size=st.integers(1, 10),
    two_level=st.booleans(),
)
wide = st.builds(
    layer,
    seeds,
    groups=st.integers(1, 2),
    rows=st.integers(1, 3),
    bits=st.integers(2, 4),
    size=st.sampled_from([33, 64, 70]),
    two_level=st.booleans(),
)

SOLVERS = {
    "gptq": gptq,
    "gptq in given order": partial(gptq, order=False),
    "gpfq": gpfq,
    "gpfq in given order": partial(gpfq, order=False),
    "descent": descent,
    "adaround": partial(adaround, steps=40),
    "attention": partial(attention, steps=40),
}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
# Attention Round and AdaRound weigh all rows together, descent stops for all rows together: one sweep does not.
SEPARABLE = {name: solver for name, solver in SOLVERS.items() if name.startswith("gp")}
SEPARABLE["descent"] = partial(descent, sweeps=1)
separable = pytest.mark.parametrize("solver", SEPARABLE.values(), ids=SEPARABLE)


def run(solver, case, **kwargs):
    return solver(case.w, case.h, case.step, case.grid, **kwargs)


def valid(codes, case):
    return (
        codes.shape == case.w.shape
        and np.array_equal(codes, np.rint(codes))
        and codes.min() >= case.grid[0]
        and codes.max() <= case.grid[1]
    )


def not_above(loss, other, slack=1e-9):
    """Row by row, up to rounding errors."""
    return np.all(loss <= other * (1 + slack) + 1e-12)


def falling(diagonal, order):
    return np.argsort(-diagonal, kind="stable") if order else np.arange(len(diagonal))


def spread(case):
    """Steps [g, O, D]."""
    return np.broadcast_to(case.step, case.w.shape)


def naive_gptq(case, damping, order):
    """Algorithm 1 of GPTQ without blocks, with an explicit inverse. Returns codes, the errors e [g, O, D] and the factors U
    in the order of `falling`."""
    codes, errors, factors = np.zeros_like(case.w), np.zeros_like(case.w), np.zeros_like(case.h)
    for g, h in enumerate(case.h):
        live = np.diag(h) > 0
        at = falling(np.diag(h), order)
        damped = h + np.diag(np.where(live, damping * np.diag(h).mean(), 1))
        factors[g] = np.linalg.cholesky(np.linalg.inv(damped[at][:, at])).T
        for row, step in enumerate(spread(case)[g]):
            work = np.where(live, case.w[g, row], 0)[at]
            for i, col in enumerate(at):
                codes[g, row, col] = np.clip(np.rint(work[i] / step[col]), *case.grid)
                errors[g, row, i] = (work[i] - codes[g, row, col] * step[col]) / factors[g, i, i]
                work[i:] -= errors[g, row, i] * factors[g, i, i:]
    return codes, errors, factors


def naive_gpfq(case, order):
    """Equation 3 of GPFQ on the data."""
    codes = np.zeros_like(case.w)
    for g, x in enumerate(case.x):
        at = falling((x**2).mean(axis=1), order)
        for row, step in enumerate(spread(case)[g]):
            u = np.zeros(x.shape[1])
            for t in at:
                u += case.w[g, row, t] * x[t]
                if x[t].any():
                    codes[g, row, t] = np.clip(np.rint(u @ x[t] / (x[t] @ x[t]) / step[t]), *case.grid)
                u -= codes[g, row, t] * step[t] * x[t]
    return codes


def naive_descent(case, codes, sweeps):
    """One code at a time, with the error computed again each time."""
    codes, least = codes.copy(), np.inf
    for _ in range(sweeps):
        loss = case.loss(codes).sum()
        if loss >= 0.998 * least:
            break
        least = loss
        for g, row, i in np.ndindex(case.w.shape):
            h, step = case.h[g], spread(case)[g, row]
            if h[i, i] > 0:
                pull = (case.w[g, row] - step * codes[g, row]) @ h[i] / h[i, i]
                codes[g, row, i] = np.clip(np.rint(codes[g, row, i] + pull / step[i]), *case.grid)
    return codes


# The objective


@few
@given(small, seeds)
def test_row_loss_is_the_mean_squared_output_error_on_data(case, seed):
    codes = case.random(seed)
    output = (case.w - case.step * codes) @ case.x
    np.testing.assert_allclose(case.loss(codes), (output**2).mean(axis=2), rtol=1e-9, atol=1e-12)


@few
@given(small, seeds)
def test_better_is_strict_and_row_by_row(case, seed):
    a, b = case.random(seed), case.random(seed + 1)
    b[:, 0] = a[:, 0]
    wins = better(case.w, case.h, case.step, a, b)
    assert wins.shape == case.w.shape[:2] and not wins[:, 0].any()
    np.testing.assert_array_equal(wins[:, 1:], (case.loss(a) < case.loss(b))[:, 1:])


def test_nearest_rounds_half_to_even_and_clips():
    w = np.array([[[0.25, 0.75, -0.25, 1.25, 9.0, -9.0]]])
    assert nearest(w, np.float64(0.5), (-4, 3)).tolist() == [[[0, 2, 0, 2, 3, -4]]]


@few
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 17), st.integers(1, 17))
def test_widen_undoes_narrow_also_where_blocks_do_not_divide(seed, groups, rows, size, limit):
    rng = np.random.default_rng(seed)
    columns, w = rng.normal(size=(groups, size, 5)), rng.normal(size=(groups, rows, size))
    h = patches.gram(patches.split(columns, limit))
    assert h.shape[1] <= limit
    parts = narrow(w, h, 7.0)
    assert parts.shape == (len(h), rows, h.shape[1])
    assert (parts == 7).sum() == parts.size - w.size
    np.testing.assert_array_equal(widen(parts, w.shape), w)
    scale = rng.normal(size=(groups, rows, 1))
    one = narrow(scale, h)
    np.testing.assert_array_equal(widen(np.broadcast_to(one, parts.shape), w.shape), np.broadcast_to(scale, w.shape))


@few
@given(seeds, st.integers(1, 3), st.integers(1, 17), st.integers(1, 17))
def test_narrow_groups_keep_the_blocks_on_the_diagonal(seed, groups, size, limit):
    rng = np.random.default_rng(seed)
    columns, w = rng.normal(size=(groups, size, 9)), rng.normal(size=(groups, 2, size))
    blocks = patches.gram(patches.split(columns, limit))
    whole = patches.gram(columns)
    np.testing.assert_allclose(whole, columns @ columns.swapaxes(1, 2))
    at = np.arange(size) // blocks.shape[1]
    kept = whole * (at[:, None] == at)
    losses = row_loss(narrow(w, blocks), blocks).reshape(groups, -1, 2).sum(axis=1)
    np.testing.assert_allclose(losses, row_loss(w, kept), rtol=1e-9)


@few
@given(seeds, st.integers(2, 12), st.integers(0, 3), st.sampled_from([0.0, 1e-3, 1.0]))
def test_ridge_makes_singular_and_dead_matrices_invertible(seed, size, dead, amount):
    x = np.random.default_rng(seed).normal(size=(2, size, 1))
    x[:, : min(dead, size - 1)] = 0
    h = x @ x.swapaxes(1, 2)
    before = h.copy()
    ridged = ridge(h, amount)
    assert np.isfinite(np.linalg.cholesky(ridged)).all()
    np.testing.assert_array_equal(h, before)
    alive = x[:, :, 0] != 0
    old, new = np.einsum("gdd->gd", h), np.einsum("gdd->gd", ridged)
    assert np.all(new[~alive] == 1)
    np.testing.assert_allclose(new[alive], (1 + amount) * old[alive], rtol=1e-9, atol=2e-7 * h.max())
    np.testing.assert_array_equal(ridged - new[:, None] * np.eye(size), h - old[:, None] * np.eye(size))


@few
@given(small, st.floats(1e-6, 1e6), st.floats(0, 2))
def test_ridge_does_not_depend_on_the_unit_of_the_inputs(case, unit, amount):
    np.testing.assert_allclose(ridge(case.h * unit, amount), ridge(case.h, amount) * unit, rtol=1e-12)


@few
@given(small, st.floats(0, 100))
def test_regression_on_float_inputs_returns_the_weights(case, amount):
    np.testing.assert_allclose(regress(case.w, case.h, case.w @ case.h, amount), case.w, atol=1e-8)


def quantized_inputs(seed, size=8, rows=3):
    """Weights, outputs y of the float network, inputs of the quantized one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, size, size)) @ rng.normal(size=(2, size, 400)) + 0.5
    w = rng.normal(size=(2, rows, size))
    noisy = x + 0.4 * rng.normal(size=x.shape) + 0.2 * x[:, ::-1]
    return w, w @ x, noisy


def mean_gram(a, b):
    return a @ b.swapaxes(1, 2) / a.shape[2]


@few
@given(seeds)
def test_regression_reduces_the_error_on_quantized_inputs_to_its_minimum(seed):
    w, y, x = quantized_inputs(seed)
    h, cross = mean_gram(x, x), mean_gram(y, x)
    solution = regress(w, h, cross, 1e-4)
    least = np.stack([np.linalg.lstsq(a.T, b.T, rcond=None)[0].T for a, b in zip(x, y, strict=True)])
    loss = {name: ((y - v @ x) ** 2).sum() for name, v in (("float", w), ("solution", solution), ("least", least))}
    assert loss["solution"] < 0.9 * loss["float"]
    assert loss["solution"] <= 1.02 * loss["least"]


@few
@given(seeds, st.floats(0.01, 5))
def test_regression_minimises_the_error_plus_its_ridge(seed, amount):
    w, y, x = quantized_inputs(seed)
    h, cross = mean_gram(x, x), mean_gram(y, x)
    solution = regress(w, h, cross, amount)
    pull = (solution - w) * amount * np.einsum("gdd->gd", h)[:, None]
    gradient = solution @ h - cross + pull
    assert np.abs(gradient).max() <= 1e-5 * np.abs(cross).max()


@few
@given(seeds, st.floats(5, 100))
def test_regression_on_few_patches_is_that_of_their_rank(seed, amount):
    rng, count = np.random.default_rng(seed), 40
    size = np.exp(rng.normal(size=(300, 1))) * (np.arange(300) > 3)[:, None]  # dead inputs and unlike units
    x = size * rng.normal(size=(2, 300, count))
    h, left = mean_gram(x, x), rng.normal(size=(2, 5, count)) @ x.swapaxes(1, 2) / count
    whole, quick = refit(h, left, amount), refit(h, left, amount, count)
    assert np.abs((whole - quick) * size.T).max() <= 1e-4 * np.abs(whole * size.T).max()
    assert not quick[:, :, :4].any()


@few
@given(seeds, seeds)
def test_asymmetric_loss_is_the_gram_loss_around_the_regression_plus_a_constant(seed, other):
    w, y, x = quantized_inputs(seed)
    h = mean_gram(x, x)
    target = regress(w, h, mean_gram(y, x), 0)
    tries = np.random.default_rng(other).normal(size=(3, *w.shape))
    rest = [((y - wq @ x) ** 2).mean(axis=2) - row_loss(wq - target, h) for wq in tries]
    size = (y**2).mean()
    np.testing.assert_allclose(rest[1], rest[0], atol=1e-6 * size)
    np.testing.assert_allclose(rest[2], rest[0], atol=1e-6 * size)


def test_regression_with_a_huge_ridge_keeps_the_weights():
    w, y, x = quantized_inputs(0)
    h, cross = mean_gram(x, x), mean_gram(y, x)
    assert np.abs(regress(w, h, cross, 1e-3) - w).max() > 0.05
    np.testing.assert_allclose(regress(w, h, cross, 1e9), w, atol=1e-6)


def test_regression_leaves_weights_of_dead_inputs_alone():
    w, y, x = quantized_inputs(0)
    x[:, 2] = 0
    solution = regress(w, mean_gram(x, x), mean_gram(y, x), 0.01)
    np.testing.assert_array_equal(solution[:, :, 2], w[:, :, 2])
    assert np.isfinite(solution).all()


# All solvers


@solvers
@examples(15)
@given(case=layers)
def test_codes_are_integers_on_the_grid(solver, case):
    assert valid(run(solver, case), case)


@solvers
@examples(10)
@given(case=small, seed=seeds)
def test_diagonal_gram_matrix_gives_the_nearest_codes(solver, case, seed):
    diagonal = np.random.default_rng(seed).uniform(0.1, 5, case.h.shape[:2])
    apart = case.with_gram(diagonal[:, None] * np.eye(case.h.shape[1]))
    np.testing.assert_array_equal(run(solver, apart), apart.nearest)


@solvers
@pytest.mark.parametrize("two_level", [False, True])
def test_depthwise_layers_are_solved_group_by_group(solver, two_level):
    case = layer(1, groups=40, rows=1, size=9, bits=4, two_level=two_level)
    codes = run(solver, case)
    assert valid(codes, case)
    assert case.loss(codes).sum() < 0.95 * case.loss(case.nearest).sum()


@solvers
@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("dead", [(0,), (2, 5, 11), range(11), range(12)])
def test_dead_inputs_do_not_change_the_codes_of_the_others(solver, two_level, dead):
    case = layer(3, groups=2, size=12, two_level=two_level, dead=dead)
    codes = run(solver, case)
    assert valid(codes, case)
    alive = [i for i in range(12) if i not in dead]
    if alive and solver in SEPARABLE.values():
        alone = run(solver, case.inputs(alive), **({"damping": 0.01 * len(alive) / 12} if "gptq" in str(solver) else {}))
        np.testing.assert_array_equal(codes[:, :, alive], alone)


@pytest.mark.parametrize("name", ["gptq", "gptq in given order", "gpfq", "gpfq in given order"])
def test_dead_inputs_get_code_zero(name):
    case = layer(3, groups=2, size=12, dead=(2, 5))
    assert case.nearest[:, :, [2, 5]].any()
    assert not run(SOLVERS[name], case)[:, :, [2, 5]].any()


@solvers
def test_one_dead_group_does_not_disturb_its_neighbours(solver):
    case = layer(4, groups=3, size=8)
    case.h[1] = 0
    codes = run(solver, case)
    assert valid(codes, case)
    assert case.loss(codes).sum() <= case.loss(case.nearest).sum()


@solvers
@pytest.mark.parametrize("shape", [(1, 4, 12), (5, 1, 9), (3, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("two_level", [False, True])
def test_inputs_are_not_modified(solver, shape, two_level):
    groups, rows, size = shape
    case = layer(0, groups, rows, size, two_level=two_level)
    before = [a.copy() for a in case[:3]]
    run(solver, case)
    assert all(np.array_equal(a, b) for a, b in zip(case[:3], before, strict=True))


@separable
@examples(10)
@given(
    case=st.builds(
        layer,
        seeds,
        groups=st.integers(2, 4),
        rows=st.integers(1, 3),
        size=st.sampled_from([1, 5, 9, 40]),
        two_level=st.booleans(),
    )
)
def test_groups_at_once_equal_groups_alone(solver, case):
    alone = [run(solver, case.groups(slice(g, g + 1))) for g in range(len(case.w))]
    np.testing.assert_array_equal(run(solver, case), np.concatenate(alone))


@examples(10)
@given(case=st.builds(layer, seeds, groups=st.integers(2, 4), rows=st.integers(1, 3), size=st.sampled_from([1, 5, 9])))
def test_attention_without_noise_treats_groups_alike(case):
    once = partial(attention, rng=None, steps=30)
    alone = [run(once, case.groups(slice(g, g + 1))) for g in range(len(case.w))]
    np.testing.assert_array_equal(run(once, case), np.concatenate(alone))


@separable
@examples(10)
@given(
    case=st.builds(
        layer, seeds, groups=st.integers(1, 2), rows=st.just(5), size=st.sampled_from([3, 9, 40]), two_level=st.booleans()
    )
)
def test_rows_do_not_influence_each_other(solver, case):
    part = [4, 0, 1]
    np.testing.assert_array_equal(run(solver, case)[:, part], run(solver, case.rows(part)))


@pytest.mark.parametrize("solver", [gptq, gpfq])
@examples(15)
@given(case=layers, seed=seeds)
def test_permuted_inputs_give_permuted_codes(solver, case, seed):
    order = np.random.default_rng(seed).permutation(case.w.shape[2])
    np.testing.assert_array_equal(run(solver, case.inputs(order)), run(solver, case)[:, :, order])


@solvers
@examples(10)
@given(case=small)
def test_sign_of_the_weights_is_the_sign_of_the_codes(solver, case):
    np.testing.assert_array_equal(run(solver, case._replace(w=-case.w)), -run(solver, case))


@solvers
@examples(10)
@given(case=small, power=st.integers(-20, 20))
def test_units_of_weights_and_inputs_do_not_matter(solver, case, power):
    unit = 2.0**power
    codes = run(solver, case)
    other = case._replace(w=case.w * unit, step=case.step * unit)
    np.testing.assert_array_equal(run(solver, other), codes)
    np.testing.assert_array_equal(run(solver, case.with_gram(case.h * unit)), codes)


@pytest.mark.parametrize("name", ["gpfq in given order", "descent", "adaround", "attention"])
@examples(10)
@given(case=small, seed=seeds)
def test_every_input_may_have_its_own_unit(name, case, seed):
    unit = 2.0 ** np.random.default_rng(seed).integers(-3, 4, case.w.shape[2])
    other = case._replace(w=case.w / unit, step=case.step / unit, h=case.h * unit * unit[:, None])
    np.testing.assert_array_equal(run(SOLVERS[name], other), run(SOLVERS[name], case))


@pytest.mark.parametrize("solver", [gptq, gpfq])
def test_steps_that_broadcast_to_the_weights_equal_full_ones(solver):
    case = layer(0)
    step = np.random.default_rng(0).uniform(0.1, 0.4, 12)
    full = case._replace(step=np.broadcast_to(step, case.w.shape).copy())
    np.testing.assert_array_equal(run(solver, case._replace(step=step)), run(solver, full))


def total(solver, bits, repeats=3, rank=None, **kwargs):
    """Loss relative to that of rounding to the nearest, on correlated inputs."""
    cases = [layer(seed, rows=16, size=48, bits=bits, cover=0.95, rank=rank) for seed in range(repeats)]
    return sum(c.loss(run(solver, c, **kwargs)).sum() for c in cases) / sum(c.loss(c.nearest).sum() for c in cases)


@pytest.mark.parametrize(
    "name, bound",
    [("gptq", 0.35), ("gptq in given order", 0.5), ("gpfq", 0.55), ("gpfq in given order", 0.7), ("descent", 0.5)],
)
def test_solvers_beat_nearest_clearly_on_correlated_inputs(name, bound):
    assert total(SOLVERS[name], 4) < bound


def test_ordered_inputs_help():
    assert total(gptq, 4) < total(partial(gptq, order=False), 4)
    assert total(gpfq, 4) < total(partial(gpfq, order=False), 4)


# GPTQ


@pytest.mark.parametrize("size", [20, 300])
def test_the_factor_is_lower_triangular_in_the_precision_of_its_matrix(size):
    x = np.random.default_rng(0).normal(size=(2, size, 3))
    h = x @ x.swapaxes(1, 2) + 1e-3 * np.eye(size)  # nearly singular
    for matrix in (h, h.astype(np.float32)):
        lower = cholesky(matrix)
        assert lower.dtype == matrix.dtype and not np.triu(lower, 1).any()
        np.testing.assert_allclose(lower @ lower.swapaxes(1, 2), h, atol=1e-5 * np.abs(h).max())


def test_a_matrix_that_single_precision_makes_indefinite_is_factored_in_double():
    x = np.random.default_rng(0).normal(size=(1, 300, 3))
    h = (x @ x.swapaxes(1, 2) + 1e-7 * np.eye(300)).astype(np.float32)
    with pytest.raises(scipy.linalg.LinAlgError):
        scipy.linalg.cholesky(h[0], lower=True)
    h += 2e-5 * np.eye(300, dtype=np.float32)  # more than its own rounding errors, less than those of its factor
    lower = cholesky(h)
    np.testing.assert_allclose(lower @ lower.swapaxes(1, 2), h, atol=1e-4)


@few
@given(small, st.floats(0, 1))
def test_damping_adds_a_share_of_the_mean_diagonal(case, damping):
    case.h[:, 0] = case.h[:, :, 0] = 0
    before = case.h.copy()
    mean = np.einsum("gdd->g", case.h) / case.h.shape[1]
    added = damp(case.h, damping) - before
    for g in range(len(case.h)):
        np.testing.assert_allclose(added[g], np.diag([1.0] + [damping * mean[g]] * (case.h.shape[1] - 1)), atol=1e-12)


def test_large_gram_matrices_are_not_copied_more_than_needed():
    """They are what a large layer needs memory for. Counted in matrices, beside the one that is given."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1024, 128), dtype=np.float32)
    h, left = x @ x.swapaxes(1, 2), rng.standard_normal((1, 8, 1024), dtype=np.float32)
    before = h.copy()
    step = np.full((1, 8, 1), np.float32(0.1))
    calls = (partial(refit, h, left, 1.0, 128), 2), (partial(gptq, left, h, step, (-7, 7), damping=1.0), 2)
    for call, matrices in calls:
        call()  # what is imported late
        tracemalloc.start()
        try:
            call()
            assert tracemalloc.get_traced_memory()[1] < (matrices + 0.5) * h.nbytes
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(h, before)


@examples(15)
@given(layers | wide, st.sampled_from([0.01, 0.3]), st.booleans())
def test_gptq_equals_the_plain_algorithm(case, damping, order):
    codes, *_ = naive_gptq(case, damping, order)
    np.testing.assert_array_equal(run(gptq, case, damping=damping, order=order), codes)


@few
@given(
    st.builds(
        layer,
        seeds,
        groups=st.integers(1, 2),
        rows=st.integers(1, 3),
        bits=st.integers(2, 4),
        size=st.integers(1, 40),
        two_level=st.booleans(),
        cover=st.sampled_from([0.3, 1.0]),
    ),
    st.booleans(),
)
def test_gptq_error_identity_holds_with_clipping(case, order):
    codes = run(gptq, case, order=order)
    _, errors, factors = naive_gptq(case, 0.01, order)
    wrong = case.w - case.step * codes
    for g, h in enumerate(case.h):
        at = falling(np.diag(h), order)
        damped = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
        left = wrong[g][:, at]
        np.testing.assert_allclose(errors[g] @ factors[g], left, atol=1e-9)
        loss = np.einsum("oi,ij,oj->o", wrong[g], damped, wrong[g])
        np.testing.assert_allclose((errors[g] ** 2).sum(axis=1), loss, rtol=1e-7)


def test_gptq_with_huge_damping_gives_the_nearest():
    case = layer(0, size=40)
    assert (run(gptq, case) != case.nearest).any()
    np.testing.assert_array_equal(run(gptq, case, damping=1e9), case.nearest)


# GPFQ


@examples(15)
@given(layers | wide, st.booleans())
def test_gpfq_equals_its_data_form(case, order):
    np.testing.assert_array_equal(run(gpfq, case, order=order), naive_gpfq(case, order))


@pytest.mark.parametrize("order", [True, False])
def test_gpfq_equals_its_data_form_with_dead_inputs(order):
    case = layer(0, groups=2, size=40, dead=(0, 7, 35))
    np.testing.assert_array_equal(run(gpfq, case, order=order), naive_gpfq(case, order))


# Coordinate descent


@examples(15)
@given(layers | wide, seeds, st.integers(1, 3))
def test_descent_equals_plain_loops(case, seed, sweeps):
    start = case.random(seed)
    np.testing.assert_array_equal(run(descent, case, start=start.copy(), sweeps=sweeps), naive_descent(case, start, sweeps))


@pytest.mark.parametrize("seed", range(4))
def test_descent_ends_when_a_sweep_gains_less_than_a_five_hundredth(seed):
    case = layer(seed, rows=3, size=40)
    start = case.random(seed)
    codes = run(descent, case, start=start.copy())
    np.testing.assert_array_equal(codes, naive_descent(case, start, 10))
    assert (codes != naive_descent(case, start, 1)).any()


@few
@given(layers, seeds)
def test_descent_never_raises_the_loss_of_any_start(case, seed):
    start = case.random(seed)
    losses = [case.loss(start)]
    losses += [case.loss(run(descent, case, start=start.copy(), sweeps=n)) for n in (0, 1, 2, 4, 10)]
    assert all(not_above(after, before) for before, after in pairwise(losses))
    again = run(descent, case, start=run(descent, case, start=start.copy()))
    assert not_above(case.loss(again), losses[-1])


@few
@given(small)
def test_descent_starts_from_the_nearest_by_default(case):
    codes = run(descent, case)
    np.testing.assert_array_equal(codes, run(descent, case, start=case.nearest))
    assert not_above(case.loss(codes), case.loss(case.nearest))
    np.testing.assert_array_equal(run(descent, case, sweeps=0), case.nearest)


@examples(15)
@given(small, seeds)
def test_no_single_code_can_lower_the_loss_after_descent(case, seed):
    codes = case.random(seed)
    for _ in range(100):
        after = run(descent, case, start=codes.copy(), sweeps=1)
        if np.array_equal(after, codes):
            break
        codes = after
    else:
        pytest.fail("descent does not come to rest")
    least = case.loss(codes)
    for i, code in product(range(case.w.shape[2]), range(case.grid[0], case.grid[1] + 1)):
        other = codes.copy()
        other[:, :, i] = code
        assert not_above(least, case.loss(other))


def test_descent_leaves_the_codes_of_dead_inputs():
    case = layer(0, groups=2, size=12, dead=(4, 9))
    start = case.random()
    np.testing.assert_array_equal(run(descent, case, start=start.copy())[:, :, [4, 9]], start[:, :, [4, 9]])


def test_descent_takes_integer_codes_as_a_start():
    case = layer(0, size=12)
    np.testing.assert_array_equal(
        run(descent, case, start=case.random().astype(np.int8)), run(descent, case, start=case.random())
    )


@pytest.mark.parametrize("shape", [(1, 4, 12), (5, 1, 9)])
def test_descent_does_not_modify_its_start(shape):
    case = layer(0, *shape)
    start = case.random()
    run(descent, case, start=start)
    np.testing.assert_array_equal(start, case.random())


# Adam and AdaRound


@few
@given(seeds, st.floats(1e-4, 1), st.floats(0.1, 1))
def test_adam_equals_its_paper(seed, rate, fade):
    slopes = np.random.default_rng(seed).normal(size=(6, 5)).astype(np.float32)
    adam, mean, square = Adam((5,), rate), np.zeros(5), np.zeros(5)
    for t, slope in enumerate(slopes, 1):
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope.astype(float) ** 2
        expected = rate * fade * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(adam.move(slope, fade), expected, rtol=2e-3, atol=1e-6 * rate)


@examples(15)
@given(layers)
def test_adaround_rounds_down_or_up(case):
    codes = run(adaround, case, steps=60)
    floor = np.floor(case.w / case.step)
    down, up = np.clip(floor, *case.grid), np.clip(floor + 1, *case.grid)
    assert np.all((codes == down) | (codes == up))


@examples(15)
@given(layers, st.sampled_from([1, 20, 60]))
def test_adaround_is_never_above_nearest(case, steps):
    assert not_above(case.loss(run(adaround, case, steps=steps)), case.loss(case.nearest))


def test_adaround_comes_close_to_the_best_of_all_roundings():
    cases = [layer(seed, rows=4, size=8, bits=3, cover=1.0, rank=16) for seed in range(6)]
    learned = best = base = 0.0
    for case in cases:
        floor = np.floor(case.w / case.step)
        tried = [case.loss(np.clip(floor + up, *case.grid)) for up in product((0, 1), repeat=8)]
        learned += case.loss(run(adaround, case, steps=300)).sum()
        best += np.min(tried, axis=0).sum()
        base += case.loss(case.nearest).sum()
    assert base > 1.5 * best
    assert base - learned > 0.65 * (base - best)


def test_adaround_beats_nearest_clearly_and_descent_given_time():
    assert total(adaround, 4, steps=400) < 0.55
    assert total(adaround, 3, rank=48, steps=1000) < total(descent, 3, rank=48)


def test_regulariser_decides_what_the_loss_leaves_open():
    case = layer(0, rows=16, size=48, bits=3)
    with_it = case.loss(run(adaround, case, steps=300)).sum()
    without = case.loss(run(adaround, case, steps=300, weight=0.0)).sum()
    assert with_it < 0.9 * without


def test_adaround_of_weights_on_the_grid_keeps_them():
    case = layer(0)
    codes = case.random()
    exact = case._replace(w=codes * 0.25, step=np.full((1, 4, 1), 0.25))
    for solver in (partial(adaround, steps=30), partial(attention, steps=30)):
        with np.errstate(over="raise", invalid="raise"):
            np.testing.assert_array_equal(run(solver, exact), codes)


@pytest.mark.parametrize(
    "solver", [partial(adaround, steps=5), partial(attention, steps=5, rng=np.random.default_rng(0), tau=2.0)]
)
def test_zero_weights_do_not_overflow(solver):
    case = layer(0)._replace(w=np.zeros((1, 4, 12)), step=np.ones((1, 4, 1)))
    with np.errstate(over="raise", invalid="raise"):
        assert not run(solver, case).any()


# Attention Round


@examples(15)
@given(layers, seeds | st.none(), st.sampled_from([0.1, 0.5, 1.0]), st.booleans())
def test_attention_is_never_above_nearest(case, seed, tau, attenuate):
    rng = None if seed is None else np.random.default_rng(seed)
    codes = run(attention, case, rng=rng, tau=tau, steps=40, attenuate=attenuate)
    assert valid(codes, case)
    assert not_above(case.loss(codes), case.loss(case.nearest), 1e-4)


@few
@given(layers, seeds | st.none(), st.booleans())
def test_attention_without_width_is_nearest(case, seed, attenuate):
    rng = None if seed is None else np.random.default_rng(seed)
    with np.errstate(divide="raise", invalid="raise"):
        codes = run(attention, case, rng=rng, tau=0, steps=40, attenuate=attenuate)
    np.testing.assert_array_equal(codes, case.nearest)


def naive_attention(case, offset, tau, steps, rate):
    """Section 3 of Attention Round in float64, one weight at a time."""
    best, least = case.nearest, case.loss(case.nearest)
    adam = Adam(case.w.shape, rate)
    for t in range(steps):
        moved = case.w / case.step + offset
        codes = np.clip(np.rint(moved), *case.grid)
        loss = case.loss(codes)
        best[loss < least], least = codes[loss < least], np.minimum(loss, least)
        slope = -2 * ((case.w - case.step * codes) @ case.h) * case.step * case.w.size / case.loss(case.nearest).sum()
        for at in np.ndindex(slope.shape):
            further_out = (1 + erf(offset[at] / tau / 2**0.5)) / 2 if slope[at] > 0 else erfc(offset[at] / tau / 2**0.5) / 2
            slope[at] *= further_out * (case.grid[0] - 0.5 < moved[at] < case.grid[1] + 0.5)
        offset = offset - adam.move(slope.astype(np.float32), (1 + np.cos(np.pi * t / steps)) / 2)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.3, 0.8])
def test_attention_equals_plain_loops(seed, tau):
    case = layer(seed, rows=6, size=12, bits=2, cover=0.7, two_level=bool(seed % 2))
    offset = np.random.default_rng(seed).normal(0, tau, case.w.shape)
    codes = run(attention, case, rng=np.random.default_rng(seed), tau=tau, steps=30, rate=0.1)
    np.testing.assert_array_equal(codes, naive_attention(case, offset, tau, 30, 0.1))
    assert (codes != case.nearest).any()


def test_attention_depends_on_its_seed_only():
    case = layer(0, rows=8, size=24, bits=3)
    a, b, c = (run(attention, case, rng=np.random.default_rng(seed), steps=40) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


@pytest.mark.parametrize("seed", [None, 0])
def test_attention_moves_few_codes_and_seldom_far(seed):
    case = layer(0, rows=32, size=64, bits=3, cover=0.95)
    rng = None if seed is None else np.random.default_rng(seed)
    codes = run(attention, case, rng=rng, steps=300)
    moves = np.bincount(np.abs(codes - case.nearest).astype(int).ravel(), minlength=4)
    assert 0 < moves[1] < moves[0]
    assert moves[2] < 0.5 * moves[1] and moves[3:].sum() <= moves[2]


@pytest.mark.parametrize("bits", [2, 3])
def test_attention_beats_nearest_clearly_at_few_bits(bits):
    assert total(attention, bits, repeats=1, steps=400) < 0.6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_attention_factor_keeps_codes_near_their_weights(seed):
    case = layer(seed, rows=32, size=64, bits=3, cover=0.95)
    moved = {
        on: np.abs(run(attention, case, rng=np.random.default_rng(0), steps=300, attenuate=on) - case.nearest).sum()
        for on in (True, False)
    }
    assert moved[True] < 0.75 * moved[False]


# Rounding by name


def solved_by(method):
    return lambda *args, **more: solve(method, *args, **more).codes


@pytest.mark.parametrize("method", METHODS)
@examples(8)
@given(case=layers, seed=seeds)
def test_solve_is_never_above_its_start(method, case, seed):
    for start in (case.nearest, case.random(seed), run(descent, case)):
        kept = start.copy()
        codes = run(solved_by(method), case, effort=QUICK, start=start)
        assert valid(codes, case)
        assert not_above(case.loss(codes), case.loss(kept))


@pytest.mark.parametrize("method", METHODS)
@examples(8)
@given(case=small, seed=seeds)
def test_solve_gives_the_nearest_for_a_diagonal_gram_matrix(method, case, seed):
    diagonal = np.random.default_rng(seed).uniform(0.1, 5, case.h.shape[:2])
    apart = case.with_gram(diagonal[:, None] * np.eye(case.h.shape[1]))
    codes = run(solved_by(method), apart, effort=QUICK, start=apart.random(seed))
    np.testing.assert_array_equal(codes, apart.nearest)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 12), (20, 1, 9)])
@pytest.mark.parametrize("dead", [(), (1, 4), range(9)])
def test_solve_takes_every_method_with_dead_inputs(method, shape, dead):
    case = layer(0, *shape, dead=dead)
    start = case.nearest
    assert valid(run(solved_by(method), case, effort=QUICK, start=start), case)


@few
@given(small, seeds)
def test_solving_by_nearest_takes_the_better_of_start_and_nearest(case, seed):
    start = case.random(seed)
    start[:, ::2] = run(descent, case)[:, ::2]
    codes = run(solved_by("nearest"), case, effort=QUICK, start=start)
    np.testing.assert_array_equal(case.loss(codes), np.minimum(case.loss(start), case.loss(case.nearest)))


def test_solve_keeps_the_start_where_it_is_as_good():
    case = layer(0, dead=(3,))
    start = case.nearest
    start[:, :, 3] = 1
    np.testing.assert_array_equal(run(solved_by("nearest"), case, effort=QUICK, start=start), start)


@pytest.mark.parametrize(
    "method, solver",
    [
        ("gptq", partial(gptq, damping=0.2)),
        ("gpfq", gpfq),
        ("descent", descent),
        ("adaround", partial(adaround, steps=30)),
        ("attention", lambda *problem: attention(*problem, rng=np.random.default_rng(7), steps=30)),
        ("auto", lambda *problem: descent(*problem, start=gptq(*problem, damping=0.2))),
    ],
)
def test_solve_passes_its_effort_to_the_method(method, solver):
    case = layer(5, rows=8, size=40, bits=3)
    effort = Effort(damping=0.2, steps=30, seed=7)
    start = case.random()
    expected = run(solver, case, **({"start": start.copy()} if method == "descent" else {}))
    expected = np.where(better(case.w, case.h, case.step, expected, start)[..., None], expected, start)
    np.testing.assert_array_equal(run(solved_by(method), case, effort=effort, start=start.copy()), expected)


@examples(10)
@given(layers)
def test_auto_is_at_least_as_good_as_gptq_and_descent_from_there(case):
    start = case.random()
    codes = run(solved_by("auto"), case, effort=QUICK, start=start)
    path = run(gptq, case)
    assert case.loss(codes).sum() <= case.loss(path).sum() * (1 + 1e-9) + 1e-12
    assert not_above(case.loss(codes), case.loss(run(descent, case, start=path)))


def test_auto_uses_adaround_where_it_may():
    case = layer(0, rows=8, size=24, bits=3)
    start = case.nearest
    losses = {
        steps: case.loss(run(solved_by("auto"), case, effort=Effort(learned=steps), start=start)) for steps in (0, 100)
    }
    assert not_above(losses[100], losses[0])
    assert losses[100].sum() < losses[0].sum()


# Scales


def own(case):
    """Every row has its own scale."""
    return np.arange(case.w[:, :, 0].size).reshape(case.w.shape[:2])


@few
@given(layers, seeds)
def test_scale_losses_equal_the_loss_of_rounding_with_that_step(case, seed):
    rng = np.random.default_rng(seed)
    for factors in (rng.uniform(0.3, 1.2, 4), rng.uniform(0.3, 1.2, (4, *case.w.shape[:2]))):
        losses = scale_losses(case.w, case.h, case.step, case.grid, factors)
        assert losses.shape == (4, *case.w.shape[:2])
        for factor, loss in zip(factors, losses, strict=True):
            scaled = case._replace(step=case.step * np.broadcast_to(factor, case.w.shape[:2])[..., None])
            np.testing.assert_allclose(loss, scaled.loss(scaled.nearest), rtol=1e-3, atol=1e-5)


@few
@given(layers, seeds, st.integers(1, 4))
def test_searched_scales_are_the_best_coarse_and_then_the_best_fine_factor(case, seed, count):
    share = np.random.default_rng(seed).integers(0, count, case.w.shape[:2])
    factors = search_scales(case.w, case.h, case.step, case.grid, share)
    assert factors.shape == share.shape
    for number in np.unique(share):
        mine = share == number
        assert np.ptp(factors[mine]) == 0

        def loss(factor, mine=mine):
            return scale_losses(case.w, case.h, case.step, case.grid, np.array([factor]))[0][mine].sum()

        coarse = min(COARSE, key=loss)
        best = min([coarse, *(coarse + FINE)], key=loss)
        assert loss(factors[mine][0]) == pytest.approx(loss(best), rel=1e-5, abs=1e-9)


@few
@given(layers, st.booleans())
def test_searched_scales_are_never_worse_than_the_start(case, shared):
    share = np.zeros(case.w.shape[:2], int) if shared else own(case)
    factor = search_scales(case.w, case.h, case.step, case.grid, share)
    scaled = case._replace(step=case.step * factor[..., None])
    searched, start = scaled.loss(scaled.nearest), case.loss(case.nearest)
    if shared:
        searched, start = searched.sum(), start.sum()
    assert not_above(searched, start, 1e-4)


@few
@given(
    st.builds(
        layer, seeds, groups=st.integers(1, 3), rows=st.integers(1, 4), size=st.integers(2, 10), bits=st.integers(2, 4)
    )
)
def test_rows_with_a_scale_of_their_own_are_searched_on_their_own(case):
    together = search_scales(case.w, case.h, case.step, case.grid, own(case))
    for g, row in np.ndindex(together.shape):
        alone = case.groups(slice(g, g + 1)).rows(slice(row, row + 1))
        loss = {
            f: scale_losses(alone.w, alone.h, alone.step, alone.grid, np.array([f]))[0, 0, 0]
            for f in (together[g, row], search_scales(*alone[:4], np.zeros((1, 1), int))[0, 0])
        }
        assert np.ptp(list(loss.values())) <= 1e-5 * max(loss.values()) + 1e-9


def test_scales_that_cover_everything_are_found_again():
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (1, 6, 40))
    codes[:, :, 0] = 7
    factors = rng.choice(COARSE, 6)
    h = layer(0, size=40).h
    searched = search_scales(codes * factors[:, None], h, np.ones((1, 6, 1)), (-7, 7), np.arange(6)[None])
    np.testing.assert_allclose(searched[0], factors)


def test_outliers_at_few_bits_lead_to_smaller_scales():
    case = layer(0, rows=8, size=64, bits=3, cover=1.0)
    case.w[:, :, 0] = 6
    step = np.full((1, 8, 1), 6 / 3)
    factor = search_scales(case.w, np.eye(64)[None], step, case.grid, own(case))
    assert np.all(factor < 0.8)
    assert np.all(search_scales(case.w[:, :, :1], np.eye(1)[None], step, case.grid, own(case)) == 1)
