"""Orders of channels: cost, swaps, and how near they come to the best."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.solvers.order import View, _State, sort_channels, swap_channels, total_cost
from onnxq_plugins.spec import QuantSpec, fake, solve_minmax
from tests.zoo import examples

seeds = st.integers(0, 2**32 - 1)


def view(seed, channels, rows, width, extra=0, spread=1.0, dead=0):
    """A view whose channels lie anywhere on an axis with `extra` positions of others."""
    rng = np.random.default_rng(seed)
    size = np.exp(spread * rng.normal(size=(1, channels + extra))) * rng.uniform(0.3, 1, (rows, channels + extra))
    at = rng.permutation(channels + extra)[:channels] if extra else np.arange(channels)
    size[:, at[:dead]] = 0
    return View(size, rng.uniform(0.1, 3, size.shape), at, width)


@st.composite
def views(draw, most=12):
    channels = draw(st.integers(2, most))
    made = [
        view(
            draw(seeds),
            channels,
            draw(st.sampled_from([1, 3, 60])),
            draw(st.integers(2, 5)),
            draw(st.integers(0, 5)),
            draw(st.sampled_from([0.0, 1.0])),
            draw(st.sampled_from([0, 0, 1, channels])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    return made, np.random.default_rng(draw(seeds)).permutation(channels)


def slow_cost(one, order):
    """The documented sum, place by place."""
    holds = {int(position): int(position) for position in range(one.size.shape[1])}
    for slot, channel in enumerate(order):
        holds[int(one.at[slot])] = int(one.at[channel])
    total = 0.0
    for row in range(len(one.size)):
        for first in range(0, one.size.shape[1], one.width):
            tile = [holds[p] for p in range(first, min(first + one.width, one.size.shape[1]))]
            total += max(one.size[row, c] for c in tile) ** 2 * sum(one.power[row, c] for c in tile)
    return total


@examples(60)
@given(views())
def test_cost_equals_a_slow_loop(case):
    made, order = case
    for one in made:
        kept = one.size.copy(), one.power.copy()
        assert one.cost(order) == pytest.approx(slow_cost(one, order), rel=1e-9)
        assert np.array_equal(one.size, kept[0]) and np.array_equal(one.power, kept[1])
    assert total_cost(made, order) == pytest.approx(sum(slow_cost(one, order) for one in made), rel=1e-9)


@examples(60)
@given(views())
def test_sorting_is_never_costlier_than_leaving_or_the_order_of_one_view(case):
    made, _ = case
    order = sort_channels(made)
    count = len(order)
    assert sorted(order) == list(range(count))
    assert total_cost(made, order) <= total_cost(made, np.arange(count)) * (1 + 1e-12)
    for one in made:
        norm = np.linalg.norm(one.size[:, one.at], axis=0)
        if (norm > 0).all():
            assert total_cost(made, order) <= total_cost(made, np.argsort(-norm, kind="stable")) * (1 + 1e-9)


@examples(60)
@given(views(), seeds, st.integers(0, 3))
def test_swapping_never_raises_the_cost_and_depends_on_its_seed_only(case, seed, sweeps):
    made, start = case
    kept = start.copy()
    found, again = (swap_channels(made, start, np.random.default_rng(seed), sweeps) for _ in range(2))
    assert np.array_equal(start, kept) and np.array_equal(found, again)
    assert sorted(found) == list(range(len(start)))
    assert total_cost(made, found) <= total_cost(made, start) * (1 + 1e-9)
    assert sweeps or np.array_equal(found, start)


@examples(60)
@given(views(), seeds)
def test_gains_equal_differences_of_the_cost_also_after_many_swaps(case, seed):
    made, order = case
    rng = np.random.default_rng(seed)
    states = [_State(one, order, rng) for one in made]
    for _ in range(25):
        a, b = rng.choice(len(order), 2, replace=False)
        other = order.copy()
        other[[a, b]] = other[[b, a]]
        for one, state in zip(made, states, strict=True):
            scale = max(one.cost(order), one.cost(other), 1e-12)
            assert state.gain(a, b) == pytest.approx(one.cost(other) - one.cost(order), rel=1e-9, abs=1e-9 * scale)
            assert state.cost.sum() <= one.cost(order) * (1 + 1e-9) + 1e-12  # tiles without channels of the group count 0
            state.swap(a, b)
        order = other


@examples(40)
@given(views(), seeds)
def test_offers_are_the_gains_of_all_swaps(case, seed):
    made, order = case
    rng = np.random.default_rng(seed)
    for one in made:
        if len(one.size) > 48:
            continue  # offers look at some rows only
        state = _State(one, order, rng)
        for _ in range(3):
            slot, other = rng.choice(len(order), 2, replace=False)
            wanted = [state.gain(slot, to) if to != slot else 0.0 for to in range(len(order))]
            np.testing.assert_allclose(state.offers(slot), wanted, rtol=1e-4, atol=1e-5 * max(one.cost(order), 1e-9))
            state.swap(slot, other)


def test_swaps_come_close_to_the_best_of_all_orders():
    ratios, sorted_only = [], []
    for seed in range(25):
        made = [view(seed, 6, 3, 2), view(seed + 100, 6, 4, 2)]
        start = sort_channels(made)
        costs = [total_cost(made, found) for found in (start, swap_channels(made, start, np.random.default_rng(seed), 20))]
        best = min(total_cost(made, np.array(order)) for order in permutations(range(6)) if order[0] < order[1])
        sorted_only.append(costs[0] / best)
        ratios.append(costs[1] / best)
    assert min(ratios) >= 1 - 1e-9 and np.mean(ratios) < 1.05 and np.mean(ratios) < np.mean(sorted_only)


def test_swaps_are_proposed_on_some_rows_and_decided_on_all():
    """More rows than are looked at: still no rise, and most of the gain of looking at all of them."""
    made = [view(0, 40, 400, 4), view(1, 40, 300, 8)]
    found = swap_channels(made, np.arange(40), np.random.default_rng(0), 3)
    assert total_cost(made, found) < 0.9 * total_cost(made, np.arange(40))
    for seed in range(4):  # one row, mostly not looked at, holds nearly all of the cost and is in its best order
        one = view(seed, 24, 400, 4)
        one.size[200] = 1e3 * np.sort(one.size[200])
        found = swap_channels([one], np.arange(24), np.random.default_rng(seed), 3)
        assert one.cost(found) <= one.cost(np.arange(24)) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1.5, 0.0), (0.0, 1.5), (1.5, 1.5)])
def test_sorted_channels_have_less_error_in_tiles(rows, columns, bits):
    """Log-normal ranges of outputs and inputs, the inputs small where their weights are large: tiles of 16 x 16 have less
    min-max error at the outputs, relative to each. (In all it may rise at few bits, while the cost falls: what is far below
    the step errs by its own size, not by max^2 / 12.)"""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        factors = np.exp(columns * rng.normal(size=64))
        w = rng.normal(size=(128, 64)) * np.exp(rows * rng.normal(size=(128, 1))) * factors
        power = factors**-2.0

        def error(values, power, relative=True):
            made = fake(values, solve_minmax(values, QuantSpec(bits, True, (16, 16))))
            return float(((values - made) ** 2 @ power / (values**2 @ power if relative else 1)).sum())

        def sides(values, power):
            by_row = np.maximum.reduceat(np.abs(values), np.arange(0, 64, 16), axis=1).T
            by_column = np.maximum.reduceat(np.abs(values), np.arange(0, 128, 16), axis=0)
            met = np.repeat(np.add.reduceat(power, np.arange(0, 64, 16))[:, None], 128, axis=1)
            return (
                View(by_row, met, np.arange(128), 16),
                View(by_column, np.repeat(16 * power[None], 8, axis=0), np.arange(64), 16),
            )

        made = w[sort_channels(sides(w, power)[:1])]
        order = sort_channels(sides(made, power)[1:])
        made, moved = made[:, order], power[order]
        costs = [sides(*case)[0].cost(np.arange(128)) for case in ((w, power), (made, moved))]
        assert costs[1] < costs[0] and error(made, moved) < error(w, power)
        assert bits < 8 or error(made, moved, False) < error(w, power, False)
        swapped = made[swap_channels(sides(made, moved)[:1], np.arange(128), rng, 2)]
        assert sides(swapped, moved)[0].cost(np.arange(128)) <= costs[1] and error(swapped, moved) < error(w, power)
