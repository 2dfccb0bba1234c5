"""Clusters of channels are optimal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.solvers.clusters import clusters, cost
from tests.zoo import examples

TOPS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.sampled_from([1.0, 2.0, 4.0])), min_size=1, max_size=7)


@examples(150)
@given(top=TOPS, k=st.integers(1, 4), seed=st.one_of(st.none(), st.integers(0, 99)))
def test_no_partition_is_cheaper(top, k, seed):
    weight = None if seed is None else np.random.default_rng(seed).integers(0, 4, len(top)) / 2
    labels = clusters(np.array(top), k, weight)
    best = min(cost(np.array(top), np.array(other), weight) for other in itertools.product(range(k), repeat=len(top)))
    assert cost(np.array(top), labels, weight) <= best * (1 + 1e-9)
    assert labels.shape == (len(top),) and set(labels) == set(range(labels.max() + 1)) and labels.max() < k


@examples(60)
@given(n=st.integers(1, 200), spread=st.floats(0, 5), seed=st.integers(0, 99))
def test_clusters_are_runs_and_more_of_them_never_cost_more(n, spread, seed):
    top = np.exp(spread * np.random.default_rng(seed).normal(size=n))
    costs = []
    for k in (1, 2, 3, 5, 8, n, n + 1):
        labels = clusters(top, k)
        assert (np.diff(labels[np.argsort(top)]) >= 0).all() and labels.max() + 1 == min(k, len(np.unique(top)))
        costs.append((k, cost(top, labels)))
    costs.sort()
    assert all(b <= a * (1 + 1e-9) for (_, a), (_, b) in itertools.pairwise(costs))
    assert costs[0][1] == pytest.approx(n * top.max() ** 2) and costs[-1][1] == pytest.approx(np.sum(top**2))


@pytest.mark.parametrize("n", [400, 1200])
@pytest.mark.parametrize("k", [2, 9])
def test_narrow_search_finds_what_the_full_one_does(n, k):
    top = np.exp(2 * np.random.default_rng(n).normal(size=n))
    size, before = np.sort(top) ** 2, np.arange(n + 1.0)
    least = np.r_[0, before[1:] * size]
    for _ in range(k - 1):
        table = np.where(np.tri(n, dtype=bool), least[:-1] + (before[1:, None] - before[:-1]) * size[:, None], np.inf)
        least = np.r_[0, table.min(axis=1)]
    assert cost(top, clusters(top, k)) == pytest.approx(least[-1])


def test_dead_channels_join_the_smallest_and_equal_ones_stay_together():
    np.testing.assert_array_equal(clusters(np.array([0, 5, 1, 0, 5, 9]), 3), [0, 1, 0, 0, 1, 2])
    np.testing.assert_array_equal(clusters(np.array([3.0, 3, 3]), 3), [0, 0, 0])
    np.testing.assert_array_equal(clusters(np.zeros(3), 2), [0, 0, 0])
    assert clusters(np.zeros(0), 2).shape == (0,)


def test_weights_count():
    top = np.array([1.0, 2, 4])
    np.testing.assert_array_equal(clusters(top, 2, np.array([1.0, 1, 1])), [0, 0, 1])
    np.testing.assert_array_equal(clusters(top, 2, np.array([9.0, 1, 1])), [0, 1, 1])


@pytest.mark.parametrize(
    "top, k, weight",
    [
        ([1.0], 0, None),
        ([-1.0], 1, None),
        ([np.nan], 1, None),
        ([[1.0]], 1, None),
        ([1.0], 1, [-1.0]),
        ([1.0], 1, [1.0, 2.0]),
        ([1.0], 1, [np.inf]),
    ],
)
def test_what_is_no_range_is_refused(top, k, weight):
    with pytest.raises(ValueError, match="clusters needs"):
        clusters(np.array(top), k, None if weight is None else np.array(weight))
