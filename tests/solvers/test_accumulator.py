"""Widths that sums need, and codes whose sums fit into one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.solvers.accumulator import (
    bounded,
    limit_of,
    project,
    saturates,
    sums,
    width,
    within,
    worst_inputs,
)
from onnxq_plugins.solvers.descent import descent
from onnxq_plugins.solvers.gram import row_loss
from tests.zoo import examples

CODES = st.lists(st.one_of(st.integers(-127, 127), st.sampled_from([-128, -64, 0, 64, 127])), min_size=1, max_size=12)
RANGES = st.sampled_from([(0, 255), (-128, 127), (0, 15), (-127, 127)])


def fits(total: object, bits: int) -> bool:
    return -(2 ** (bits - 1)) <= total <= 2 ** (bits - 1) - 1


def problem(seed, groups=1, outputs=3, size=9, bits=8):
    """Weights, a Gram matrix of correlated inputs, covering steps and the grid."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(groups, outputs, size)) * np.exp(rng.normal(size=(groups, outputs, 1)))
    x = np.maximum(rng.normal(size=(groups, size, size)) @ rng.normal(size=(groups, size, 4 * size)), 0)
    top = 2 ** (bits - 1) - 1
    return w, x @ x.swapaxes(1, 2) / x.shape[2], np.abs(w).max(axis=2, keepdims=True) / top, (-top, top)


# ---- widths ---------------------------------------------------------------------------------------------------------


@examples(300)
@given(codes=CODES, inputs=RANGES)
def test_the_worst_input_just_fits(codes, inputs):
    q = np.array(codes)
    bits = int(width(q, inputs))
    ends = [int(x @ q) for x in worst_inputs(q, inputs)]
    assert all(fits(total, bits) for total in ends)
    assert bits == 1 or not all(fits(total, bits - 1) for total in ends)


@examples(150)
@given(codes=CODES, inputs=RANGES, seed=st.integers(0, 999))
def test_no_partial_sum_in_any_order_overflows(codes, inputs, seed):
    rng, q = np.random.default_rng(seed), np.array(codes)
    bits = int(width(q, inputs))
    low, high = (int(x @ q) for x in worst_inputs(q, inputs))
    for x in (rng.integers(inputs[0], inputs[1] + 1, (20, len(q))), rng.choice(inputs, (20, len(q)))):
        for one in x:
            partial = np.cumsum(rng.permutation(one * q))
            assert fits(partial.min(), bits) and fits(partial.max(), bits)
            assert low <= partial.min() and partial.max() <= high


def test_widths_of_many_rows_and_of_large_ones():
    np.testing.assert_array_equal(width(np.array([[0, 0], [1, 0], [0, -1], [127, 127]])), [1, 9, 9, 17])
    assert width(np.full(5000, 127, np.int8)) == 29  # 5000 * 127 * 255 = 161 925 000 < 2^28
    assert width(np.full(7, -128, np.int8), (-128, 127)) == 18  # 7 * 2^14 = 114 688
    assert width(np.full(8, -128, np.int8), (-128, 127)) == 19  # 2^17 itself needs one more


@examples(200)
@given(codes=st.lists(st.integers(-128, 127), min_size=1, max_size=6))
def test_pairs_saturate_where_int16_does(codes):
    pairs = itertools.combinations(codes, 2)
    over = any(not fits(np.dot(x, pair), 16) for pair in pairs for x in itertools.product((0, 255), repeat=2))
    assert bool(saturates(np.array(codes, np.int8))) == over


def test_codes_within_64_never_saturate_and_rows_count_apart():
    assert not saturates(np.array([[64, 64, 64], [-64, -64, 3]], np.int8)).any()
    np.testing.assert_array_equal(
        saturates(np.array([[65, 0, 64], [65, 63, -128], [-65, 0, -64]], np.int8)), [True, False, True]
    )
    assert not saturates(np.array([[-128], [127]], np.int8)).any()


@pytest.mark.parametrize("bits", range(9, 33))
def test_the_limit_is_exact(bits):
    limit = limit_of(bits)
    assert fits(255 * limit, bits) and not fits(255 * (limit + 1), bits)
    assert fits(-255 * limit, bits) and not fits(-255 * (limit + 1), bits)


# ---- bounded codes --------------------------------------------------------------------------------------------------


@examples(100)
@given(seed=st.integers(0, 9999), limit=st.floats(0, 40))
def test_projection_is_the_nearest_point(seed, limit):
    x = np.random.default_rng(seed).normal(size=(4, 7)) * 5
    y = project(x, limit)
    assert (np.maximum(y, 0).sum(axis=1) <= limit + 1e-9).all() and (np.maximum(-y, 0).sum(axis=1) <= limit + 1e-9).all()
    for other in np.random.default_rng(seed + 1).normal(size=(50, 4, 7)) * 5:
        largest = np.maximum(np.maximum(other, 0).sum(axis=1), np.maximum(-other, 0).sum(axis=1))
        inside = other * np.minimum(1, limit / largest)[:, None]
        assert (((x - y) * (inside - y)).sum(axis=1) <= 1e-8).all()  # a convex set: the angle is never acute


@examples(150)
@given(
    seed=st.integers(0, 9999),
    bits=st.sampled_from([2, 3, 4, 8]),
    limit=st.integers(0, 300),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    size=st.integers(1, 14),
)
def test_bounds_always_hold(seed, bits, limit, groups, outputs, size):
    w, h, step, grid = problem(seed, groups, outputs, size, bits)
    codes = bounded(w, h, step, grid, limit)
    assert codes.shape == w.shape and (codes == np.rint(codes)).all()
    assert codes.min(initial=0) >= grid[0] and codes.max(initial=0) <= grid[1]
    assert max(part.max() for part in sums(codes)) <= limit and within(codes, limit).all()
    start = np.trunc(project(np.clip(w / step, *grid), limit))
    assert (row_loss(w - step * codes, h) <= row_loss(w - step * start, h) * (1 + 1e-9) + 1e-12).all()


@examples(60)
@given(seed=st.integers(0, 9999), pieces=st.integers(2, 4), limit=st.integers(0, 400), size=st.integers(5, 17))
def test_bounds_hold_over_blocks_of_a_wide_layer(seed, pieces, limit, size):
    w, _, step, grid = problem(seed, 2, 3, size)
    width_of_piece = -(-size // pieces)
    h = problem(seed + 1, 2 * pieces, 1, width_of_piece)[1]
    assert within(bounded(w, h, step, grid, limit), limit).all()


@examples(40)
@given(seed=st.integers(0, 9999), bits=st.sampled_from([3, 4, 8]))
def test_a_limit_that_does_not_bind_is_descent_from_truncation(seed, bits):
    w, h, step, grid = problem(seed, 2, 3, 11, bits)
    plain = descent(w, h, step, grid, start=np.trunc(w / step))
    np.testing.assert_array_equal(bounded(w, h, step, grid, 11 * grid[1]), plain)


@examples(60)
@given(seed=st.integers(0, 9999), limit=st.integers(0, 9), size=st.integers(1, 5))
def test_without_correlations_no_codes_are_better(seed, limit, size):
    w, _, step, grid = problem(seed, 1, 1, size, 3)
    h = np.eye(size)[None]
    everything = np.array(
        [q for q in itertools.product(range(grid[0], grid[1] + 1), repeat=size) if within(np.array(q), limit)]
    )
    best = ((w[0] - step[0] * everything) ** 2).sum(axis=1).min()
    assert row_loss(w - step * bounded(w, h, step, grid, limit), h).item() == pytest.approx(best, rel=1e-9, abs=1e-12)


@examples(60)
@given(seed=st.integers(0, 9999), limit=st.integers(1, 200))
def test_descent_within_limits_never_raises_the_loss(seed, limit):
    w, h, step, grid = problem(seed, 2, 3, 10)
    codes = np.trunc(project(w / step, limit))
    limits = (np.full(w.shape[:2], float(limit)), np.full(w.shape[:2], float(limit)))
    for _ in range(4):
        made = descent(w, h, step, grid, start=codes, sweeps=1, limits=limits)
        assert within(made, limit).all()
        assert (row_loss(w - step * made, h) <= row_loss(w - step * codes, h) * (1 + 1e-9) + 1e-12).all()
        codes = made


def test_spending_pays_with_correlated_inputs():
    w, h, step, grid = problem(0, 1, 16, 64, 4)
    limit = 20
    start = np.trunc(project(w / step, limit))
    losses = [row_loss(w - step * q, h).sum() for q in (start, bounded(w, h, step, grid, limit))]
    assert losses[1] < 0.8 * losses[0]


def test_dead_inputs_get_no_codes_of_their_own():
    w, h, step, grid = problem(3, 1, 4, 8)
    h[:, 2], h[:, :, 2] = 0, 0
    assert within(bounded(w, h, step, grid, 30), 30).all()
