"""Parts of the search for widths: the longest prefix that is good enough, and the best choice within a budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.solvers.allocate import allocate
from onnxq_plugins.solvers.pareto import STRATEGIES, longest
from tests.zoo import examples

# ---- longest ----------------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.integers(0, 4).map(float), st.floats(-100, 200), st.floats(40, 40.001))  # ties, spread, plateaus


def prefix(scores, target):
    """The definition: the largest number of changes that meets the target."""
    return max((k for k, score in enumerate(scores) if score >= target), default=-1)


def search(scores, target, strategy):
    """The result of `longest`, and the numbers of which it called the score."""
    calls = []
    result = longest(lambda k: calls.append(k) or scores[k], len(scores) - 1, target, strategy)
    return result, calls


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    st.lists(VALUES, min_size=1, max_size=40).map(lambda v: sorted(v, reverse=True)),
    st.one_of(VALUES, st.just(1e9)),
    st.data(),
)
@examples(150)
def test_strategies_find_the_longest_prefix(strategy, scores, target, data):
    if data.draw(st.booleans()):
        target = data.draw(st.sampled_from(scores))  # met exactly, perhaps by several
    result, calls = search(scores, target, strategy)
    assert result == prefix(scores, target)
    assert len(set(calls)) == len(calls) and set(calls) <= set(range(len(scores)))


@pytest.mark.parametrize("strategy", ["binary", "hybrid"])
@pytest.mark.parametrize("size", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("shape", ["line", "cliff at the front", "cliff at the back", "plateau", "steps", "hyperbola"])
def test_halving_needs_few_scores(strategy, size, shape):
    k = np.arange(size)
    scores = {
        "line": -1.0 * k,
        "cliff at the front": -1.0 * (k > 0),
        "cliff at the back": -1.0 * (k == size - 1),
        "plateau": -1.0 * (k > size // 3),
        "steps": -1.0 * (k // 7),
        "hyperbola": 1.0 / (k + 1),
    }[shape]
    for target in np.unique(np.concatenate([np.linspace(scores[-1], scores[0], 23), scores[:: max(1, size // 20)]])):
        result, calls = search(scores, target, strategy)
        assert result == prefix(scores, target)
        assert len(calls) <= 2 * math.log2(size) + 3


def test_interpolation_is_quick_on_a_line():
    scores = -np.arange(1001.0)
    assert len(search(scores, -617.5, "interpolation")[1]) <= 5


def test_brute_finds_prefixes_behind_a_dip():
    scores = [9, 8, 3, 7, 2]
    assert search(scores, 5, "brute")[0] == 3
    assert search(scores, 5, "brute")[1] == [0, 1, 2, 3, 4]


# ---- allocate -----------------------------------------------------------------------------------------------------------


def exhaustive(noise, cost, limit):
    """The least noise of all choices within the budget; None if there is none."""
    best = None
    for choice in itertools.product(*(range(len(n)) for n in noise)):
        spent = math.fsum(c[k] for c, k in zip(cost, choice, strict=True))
        if spent <= limit + 1e-9:
            total = math.fsum(n[k] for n, k in zip(noise, choice, strict=True))
            best = total if best is None else min(best, total)
    return best


def check(noise, cost, limit):
    noise, cost = ([np.array(part, float) for part in side] for side in (noise, cost))
    result, best = allocate(noise, cost, limit), exhaustive(noise, cost, limit)
    assert (result is None) == (best is None)
    if result is not None:
        assert math.fsum(c[k] for c, k in zip(cost, result, strict=True)) <= limit + 1e-9
        total, least = (math.fsum(n[k] for n, k in zip(noise, result, strict=True)), math.fsum(n.min() for n in noise))
        assert total <= best + 1e-5 * (best - least) + 1e-15


NOISE = st.one_of(st.just(0.0), st.floats(1e-3, 10), st.integers(-120, 10).map(lambda db: 10 ** (db / 10)))
GROUPS = st.lists(st.lists(st.tuples(NOISE, st.integers(-20, 20)), min_size=1, max_size=4), min_size=1, max_size=5)


@given(GROUPS, st.integers(-60, 60))
@examples(250)
def test_allocation_is_the_best_of_all(groups, limit):
    check([[n for n, _ in group] for group in groups], [[c for _, c in group] for group in groups], limit)


def test_allocation_distinguishes_small_noise_beside_large():
    """2-bit noise of 0 dB among the options must not hide differences between -50 and -70 dB."""
    check([[1.0, 1e-5, 1e-7], [1.0, 3e-5, 2e-7], [1.0, 2e-6, 1e-7]], [[2, 8, 16]] * 3, 40)
    check([[1.0, 1e-9, 1e-11], [1.0, 3e-9, 2e-11], [1.0, 2e-9, 1e-12]], [[2, 8, 16]] * 3, 32)


@pytest.mark.parametrize("size", [10**6, 10**9])
def test_allocation_never_exceeds_its_budget_by_a_hair(size):
    """The last bits count, in a budget of millions too."""
    for over in (1, 2, 5):
        check([[1.0, 0.0], [0.25, 0.0]], [[0, size + over], [0, size]], size)
        check([[1.0, 0.0], [0.25, 0.0]], [[-size, over], [0, size]], size)


def test_nothing_to_allocate():
    assert allocate([], [], 0.0) == []
    assert allocate([], [], -1.0) is None
