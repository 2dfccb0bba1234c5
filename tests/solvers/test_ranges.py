"""Ranges from histograms."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins.solvers import ranges
from onnxq_plugins.solvers.ranges import kl_range, mse_range, percentile_range
from onnxq_plugins.spec import QuantSpec, fake, from_range


def histogram(x, bins=2048):
    return np.histogram(x, bins)[0].astype(np.float64), float(x.min()), float(x.max())


def error(x, low, high, bits):
    """Mean squared error with the exported scale."""
    return float(np.mean((fake(x, from_range(low, high, QuantSpec(bits, symmetric=False))) - x) ** 2))


def sample(kind, seed=0, n=20000):
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.normal(size=n),
        "laplace": lambda: rng.laplace(size=n),
        "relu": lambda: np.maximum(rng.normal(size=n), 0),
        "uniform": lambda: rng.uniform(-1, 2, n),
        "heavy": lambda: rng.standard_t(2.5, n),
        "negative": lambda: -rng.exponential(size=n),
        "offset": lambda: rng.normal(size=n) + 20,
        "outlier": lambda: np.append(rng.normal(size=n), 300.0),
    }[kind]()
    return x.astype(np.float32)


KINDS = ["normal", "laplace", "relu", "uniform", "heavy", "negative", "offset", "outlier"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_never_worse_than_minmax(kind, bits):
    x = sample(kind)
    counts, low, high = histogram(x)
    kept = mse_range(counts, low, high, 2**bits)
    assert min(low, 0) <= kept[0] <= kept[1] <= max(high, 0)
    assert error(x, *kept, bits) <= error(x, low, high, bits) * 1.005 + ((high - low) / 2048) ** 2 / 3


@pytest.mark.parametrize(
    "kind, bits", [("heavy", 8), ("heavy", 4), ("laplace", 4), ("normal", 4), ("relu", 4), ("negative", 4), ("offset", 4)]
)
def test_mse_cut_is_nearly_the_best(kind, bits):
    """Against every pair of ends on a grid of 5 percent."""
    x = sample(kind, n=5000)
    low, high = min(x.min(), 0), max(x.max(), 0)
    kept = mse_range(*histogram(x), 2**bits)
    assert kept[1] - kept[0] < 0.99 * (high - low) and error(x, *kept, bits) < error(x, low, high, bits)
    shares = np.linspace(0.05, 1, 20)
    best = min(error(x, low * a, high * b, bits) for a in (shares if low else [0]) for b in (shares if high else [0]))
    assert error(x, *kept, bits) <= 1.05 * best


def test_mse_keeps_ranges_without_tails():
    kept = mse_range(*histogram(sample("uniform")), 256)
    assert kept == pytest.approx((-1, 2), abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_100_is_minmax(kind):
    counts, low, high = histogram(sample(kind))
    assert percentile_range(counts, low, high, 100.0) == pytest.approx((low, high))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [99.0, 99.9])
def test_percentile_leaves_out_its_share(kind, percent):
    x = sample(kind)
    counts, low, high = histogram(x, 65536)
    kept = percentile_range(counts, low, high, percent)
    share = 1 - percent / 100
    left, right = (low < 0) * share, (high > 0) * share
    if low < 0 < high:
        left, right = left / 2, right / 2
    assert np.mean(x < kept[0]) == pytest.approx(left, abs=share / 10)
    assert np.mean(x > kept[1]) == pytest.approx(right, abs=share / 10)


def test_percentile_cuts_heavy_tails():
    x = sample("heavy")
    kept = percentile_range(*histogram(x), 99.9)
    assert kept[1] - kept[0] < 0.6 * (x.max() - x.min())


def test_kl_cuts_outliers_but_not_always():
    for kind in ("outlier", "heavy"):
        x = sample(kind)
        low, high = kl_range(*histogram(x), 256)
        assert high < 0.8 * x.max() and low >= x.min()
    for kind in ("uniform", "relu"):
        x = sample(kind)
        assert kl_range(*histogram(x), 256) == pytest.approx((x.min(), x.max()), rel=0.1, abs=1e-3)


@pytest.mark.parametrize(
    "choose", [lambda h: mse_range(*h, 256), lambda h: kl_range(*h, 256), lambda h: percentile_range(*h, 99.9)]
)
@pytest.mark.parametrize("x", [np.zeros(9), np.append(np.zeros(1000), 5.0), np.full(100, 3.0), np.array([-1.0, 1.0])])
def test_degenerate_histograms(choose, x):
    low, high = choose(histogram(x))
    assert np.isfinite([low, high]).all() and min(x.min(), 0) - 1 <= low <= high <= max(x.max(), 0) + 1


@pytest.mark.parametrize(("bits", "bins"), [(4, 2048), (8, 2048), (8, 256), (8, 100), (16, 2048)])
def test_a_function_of_codes_is_evaluated_once_for_each(bits, bins):
    counts, low, high = np.histogram(np.random.default_rng(0).normal(size=4096), bins)[0].astype(float), -3.0, 4.0
    values, grids = ranges._values(counts, low, high), np.array([[low, high], [-1.0, 2.0], [0.0, 4.0]])
    asked = []

    def function(x):
        asked.append(x.size)
        return x / (1 + np.exp(-x))

    found = ranges._mse(counts, values, grids, 2**bits, function)
    for error, (start, end) in zip(found, grids, strict=True):
        size = (end - start) / (2**bits - 1)
        zero = np.clip(np.rint(-start / size), 0, 2**bits - 1)
        rounded = (np.clip(np.rint(values / size) + zero, 0, 2**bits - 1) - zero) * size
        assert error == pytest.approx(((function(rounded) - function(values)) ** 2 * counts).sum() / counts.sum(), rel=1e-12)
    assert asked[0] <= len(grids) * min(2**bits, bins)
