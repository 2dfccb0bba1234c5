"""Components are those of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxq_plugins.solvers.connected import connected
from tests.zoo import examples


@examples(200)
@given(st.data())
def test_as_scipy_has_them(data):
    count = data.draw(st.integers(1, 40))
    links = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=60))
    a, b = np.array(links, np.int64).reshape(-1, 2).T
    expected = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(count, count)), directed=False)[1]
    np.testing.assert_array_equal(connected(count, a, b), expected)


@pytest.mark.parametrize("seed", range(3))
def test_long_chains_in_any_order(seed):
    order = np.random.default_rng(seed).permutation(20_000)
    assert not connected(20_000, order[:-1], order[1:]).any()
