"""Samples unlike all others."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.data import DataOptions, Input, open_data
from onnxq_plugins.data.outliers import usual
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.testing import models
from onnxq_plugins.testing.exact import exact_session

X = Input("x", np.dtype(np.float32), (1, 6))


def samples(peaks, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-1, 1, (len(peaks), 1, 6)) * np.minimum(np.abs(peaks), 1)[:, None, None]
    rows[:, 0, 2] = peaks
    return [{"x": row} for row in rows.astype(np.float32)]


def left_out(peaks, **options):
    data = open_data(samples(peaks), [X], DataOptions(**options))
    return (data.size or 0) - (usual(data).size or 0)


def test_one_wild_sample_is_left_out_and_named():
    peaks = np.random.default_rng(0).uniform(1, 2, 32)
    peaks[5] = -400.0
    data = open_data(samples(peaks), [X], None, np.arange(32))
    rest = usual(data)
    assert rest.size == 31 and len(list(rest)) == 31
    assert all(np.abs(feed["x"]).max() < 3 for feed in rest)
    assert np.array_equal(np.concatenate(rest.spread_labels(0)), np.delete(np.arange(32), 5))
    assert "sample 5" in rest.notes[0] and "'x'" in rest.notes[0] and "data.outliers=true" in rest.notes[0]


@pytest.mark.parametrize(
    "peaks",
    [
        np.geomspace(1, 1000, 32),  # recordings of unlike loudness
        np.random.default_rng(1).pareto(2.0, 64) + 1,  # a heavy tail
        np.r_[np.zeros(31), 5.0],  # all the others are silent
        [1.0, 1.0, 900.0],  # too few to say
    ],
)
def test_rare_samples_are_not_wild(peaks):
    assert left_out(np.float32(peaks)) == 0


def test_several_are_wild_only_if_few_are():
    peaks = np.ones(64)
    peaks[[3, 40]] = 50, 70
    assert left_out(peaks) == 2
    peaks[10:30] = 50
    assert left_out(peaks) == 0


def test_heavy_tails_lose_a_sample_rarely():
    for exponent in (2.0, 4.0, 8.0):
        rng = np.random.default_rng(int(exponent))
        dropped = [left_out(rng.pareto(exponent, 64) + 1) for _ in range(100)]
        assert np.mean(np.array(dropped) > 0) <= 0.04


def test_a_wild_value_costs_next_to_nothing():
    """At most 1 dB on clean samples, and `data.outliers` keeps it."""
    model = models.cnn()
    feeds = models.feeds(model, 24)
    clean = Samples.of(model, feeds[16:])

    def decibels(data, settings=()):
        result = quantize(model, "int8", data, settings=["quality.below=-99", *settings])
        return clean.table(clean.outputs(exact_session(result.model)))[0].sqnr

    wild = [{name: x.copy() for name, x in feed.items()} for feed in feeds[:16]]
    next(iter(wild[3].values())).flat[7] = 1e4
    assert decibels(wild) > decibels(feeds[:16]) - 1
    assert decibels(wild, ["data.outliers=true"]) < decibels(feeds[:16]) - 10
