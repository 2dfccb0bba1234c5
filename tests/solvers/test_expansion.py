"""Residual expansion of arrays: bounds, folding, shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.solvers import expansion as solver
from onnxq_plugins.spec import QuantSpec, decode
from tests.zoo import examples

BLOCKS = st.sampled_from([None, (1, 0, 0), (1, 2, 0)])
BITS = st.lists(st.integers(2, 8), min_size=1, max_size=4)


def weights(seed, size=1.0, outputs=5):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(outputs, 4, 3)) * np.exp(2 * rng.normal(size=(outputs, 1, 1))) * size
    w[rng.random(outputs) < 0.15] = 0
    return w.astype(np.float32)


def depths(seed, orders, outputs=5):
    return np.random.default_rng(seed + 1).integers(1, orders + 1, (outputs, 1, 1))


@examples(200)
@given(bits=BITS, block=BLOCKS, size=st.floats(1e-6, 1e6), seed=st.integers(0, 999))
def test_bound_holds_for_every_channel_and_order(bits, block, size, seed):
    w, asked, depth = weights(seed, size), [QuantSpec(n, block=block) for n in bits], depths(seed, len(bits))
    made = solver.orders(w, asked, depth)
    before = np.full(len(w), np.inf)
    for k in range(len(made)):
        left = np.abs(w - solver.value(made[: k + 1]))
        assert (left <= solver.bound(w, asked[: k + 1], np.minimum(depth, k + 1)) * (1 + 1e-5)).all()
        now = left.reshape(len(w), -1).max(axis=1)
        assert (now <= before).all()
        before = now
    for k, spec in enumerate(made):
        assert np.abs(spec.codes).max() <= spec.grid[1] and not spec.codes[depth[:, 0, 0] <= k].any()


@examples(200)
@given(bits=BITS, into=st.sampled_from([7, 8]), block=BLOCKS, size=st.floats(1e-6, 1e6), seed=st.integers(0, 999))
def test_folded_codes_are_the_sum_of_orders(bits, into, block, size, seed):
    """A folded weight fits its grid, keeps the bound, is as near as its scale allows, and has small codes where there is one
    order."""
    w, asked, depth = weights(seed, size), [QuantSpec(n, block=block) for n in bits], depths(seed, len(bits))
    if not solver.foldable(bits, into):
        with pytest.raises(ValueError, match="do not add up"):
            solver.folded(w, asked, depth, into)
        return
    made = solver.folded(w, asked, depth, into)
    left = np.abs(w - decode(made.codes, made).astype(np.float64))
    assert np.abs(made.codes).max() <= made.grid[1] == 2 ** (into - 1) - 1
    assert (left <= solver.bound(w, asked, depth) * (1 + 1e-4) + np.abs(w) * 1e-6).all()
    if block == (1, 0, 0):
        assert (np.abs(made.codes[depth[:, 0, 0] == 1]) <= asked[0].grid[1]).all()
        assert (left <= np.asarray(made.scale) / 2 * (1 + 1e-4) + np.abs(w) * 1e-6).all()


def test_what_folds_into_eight_bits():
    assert all(solver.foldable(bits, 8) for bits in ([8], [4, 4], [3, 3, 3], [2] * 7, [4, 2, 2, 2], [5, 3]))
    assert not any(solver.foldable(bits, 8) for bits in ([5, 4], [4, 4, 2], [3, 3, 3, 2], [2] * 8, [8, 2]))
    assert solver.foldable([4, 3], 7) and not solver.foldable([4, 4], 7)


@examples(50)
@given(orders=st.integers(1, 4), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_share_counts_channels(orders, share, seed):
    losses = np.sort(np.random.default_rng(seed).random((orders, 9)), axis=0)[::-1]
    depth = solver.by_share(losses, share)
    assert depth.min() >= 1 and depth.max() <= orders
    assert (depth - 1).sum() == (orders - 1) * int(np.ceil(share * 9 - 1e-9))
    if orders == 2:
        assert losses[0][depth == 2].min(initial=np.inf) >= losses[0][depth == 1].max(initial=0)
    error = [losses[solver.by_share(losses, s) - 1, np.arange(9)].sum() for s in (0, 0.25, 0.5, 0.75, 1)]
    assert np.all(np.diff(error) <= 1e-12) and error[0] == losses[0].sum() and error[-1] == pytest.approx(losses[-1].sum())


@examples(50)
@given(limit=st.floats(0, 1.5), seed=st.integers(0, 999))
def test_budget_is_kept_and_spent_on_what_gains_most(limit, seed):
    rng = np.random.default_rng(seed)
    losses = [np.sort(rng.random((3, n)), axis=0)[::-1] for n in (4, 7)]
    costs = [rng.uniform(1, 3) * np.array([4.0, 4.0, 2.0]) for _ in range(2)]
    full = sum(c[1:].sum() * y.shape[1] for y, c in zip(losses, costs, strict=True))
    depth = solver.by_budget(losses, costs, limit * full)
    assert sum(c[1:d].sum() for c, row in zip(costs, depth, strict=True) for d in row) <= limit * full * (1 + 1e-9)
    if limit >= 1.001:
        assert all((d == 3).all() for d in depth)
    if limit == 0:
        assert all((d == 1).all() for d in depth)
