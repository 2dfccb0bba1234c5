"""Outputs that hold two things."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.measure.arrays import decibels
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.measure.unlike import part_energies, part_name, parts


def detections(seed=0):
    rng = np.random.default_rng(seed)
    boxes, scores = rng.uniform(50, 300, (1, 20, 4)), rng.uniform(0, 1, (1, 20, 6))
    return np.concatenate([boxes, scores], axis=2).astype(np.float32)


def test_boxes_and_scores_are_two_things():
    values = [detections(n) for n in range(3)]
    found = parts(values)
    assert [part_name("y", part) for part in found] == ["y[:, :, :4]", "y[:, :, 4:]"]
    noisy = [v + np.float32(0.5) * np.random.default_rng(9).standard_normal(v.shape).astype(np.float32) for v in values]
    boxes, scores = (decibels(part_energies(values, noisy, part)) for part in found)
    assert boxes > 45 and scores < 5


def test_one_thing_stays_whole():
    rng = np.random.default_rng(0)
    even = [rng.standard_normal((1, 20, 10)) for _ in range(3)]
    ragged = [rng.standard_normal((1, n, 1)) for n in (3, 5)]
    scattered = [v[..., np.random.default_rng(1).permutation(10)] for v in map(detections, range(3))]
    batch = [np.concatenate([np.full((1, 4), 100.0), np.ones((1, 4))])]  # samples are no channels
    silent = [np.zeros((1, 4, 4))]
    for values in (even, ragged, scattered, batch, silent, [[np.ones(3), np.ones(2)]]):
        assert parts(values) == [()]
    assert part_name("y", ()) == "y"


def test_a_part_that_is_next_to_nothing_is_none():
    values = [np.concatenate([np.ones((1, 3, 2)), np.full((1, 3, 2), 1e-9)], axis=2)]
    assert parts(values) == [()]


def test_few_samples_are_judged_by_the_parts_of_all():
    """One frame of a few is weak by chance: then it is no other thing."""
    values = [np.ones((1, 4)) * 10.0 ** np.roll([0, 0, 0, -3], n) for n in range(8)]
    samples = Samples([{"x": np.zeros(1)}] * 8, ["y"], [values], None, [None])
    assert samples.parts == [[()]] and parts(values[:1]) != [()]
    assert samples.few(1).parts == samples.parts
