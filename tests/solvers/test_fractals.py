"""Fractal calibration images: reproducible, never degenerate, with the statistics of photographs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.fractals import spectrum_slope, statistics_of
from onnxq_plugins.solvers import fractals as module
from onnxq_plugins.solvers.fractals import fractals
from tests.zoo import slowly


def images(count, height=32, width=32, channels=3, seed=0):
    return list(fractals(count, height, width, channels, np.random.default_rng(seed)))


def test_the_seed_determines_the_images():
    first = images(6)
    np.testing.assert_array_equal(first, images(6))
    assert not np.array_equal(first, images(6, seed=1))


def test_one_generator_gives_new_images_at_each_call_and_keeps_its_stream():
    rng, untouched = np.random.default_rng(3), np.random.default_rng(3)
    first, second = (list(fractals(2, 16, 16, 3, rng)) for _ in range(2))
    assert not np.array_equal(first, second)
    assert rng.random() == untouched.random()


@pytest.mark.parametrize("count", [0, 1, 5, 29])
def test_an_image_does_not_depend_on_how_many_follow(count):
    few = images(count, 16, 20)
    assert len(few) == count
    for one, other in zip(few, images(40, 16, 20), strict=False):
        np.testing.assert_array_equal(one, other)


def test_images_are_drawn_one_at_a_time():
    endless = fractals(10**12, 16, 16, 3, np.random.default_rng(0))
    np.testing.assert_array_equal([next(endless) for _ in range(3)], images(3, 16, 16))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), *slowly((32, 32), (64, 48))])
def test_every_image_is_unique_and_not_flat(height, width):
    drawn = images(200, height, width)
    for image in drawn:
        assert image.shape == (height, width, 3) and image.dtype == np.float32 and image.flags.c_contiguous
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
        assert image.std() > 0.05 and (image.std(axis=(0, 1)) > 0.05).all()
        assert 0.1 < image.mean() < 0.9
    assert len({image.tobytes() for image in drawn}) == len(drawn)
    flat = np.corrcoef([image.mean(axis=2).ravel() for image in drawn])
    assert np.mean([np.abs(flat[i, j]) > 0.98 for i, j in pairwise(range(200))]) < 0.02


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (40, 17), (9, 90), (1, 30), (512, 512)])
def test_any_shape_and_any_number_of_channels(channels, height, width):
    for image in images(2, height, width, channels):
        assert image.shape == (height, width, channels) and np.isfinite(image).all()
        assert image.min() >= 0 and image.max() <= 1 and (image.std(axis=(0, 1)) > 0.05).all()


def test_a_single_pixel():
    assert all(np.isfinite(image).all() for image in images(20, 1, 1))


def test_statistics_are_those_of_photographs():
    mean, std, correlation, slope = np.median([statistics_of(image) for image in images(60, 96, 96)], axis=0)
    assert 0.35 < mean < 0.55 and 0.15 < std < 0.3
    assert 0.8 < correlation < 0.98
    assert -1.8 < slope < -0.9


@pytest.mark.parametrize("size", [28, 32, 128])
def test_no_spectrum_is_white(size):
    slopes = [spectrum_slope(image) for image in images(60, size, size)]
    assert np.median(slopes) < -1 and max(slopes) < -0.1
    noise = np.random.default_rng(0).random((size, size, 3))
    assert abs(spectrum_slope(noise)) < 0.3


def test_other_numbers_of_channels_are_separate_mixtures():
    between = [np.abs(np.corrcoef(image.reshape(-1, 6).T)[np.triu_indices(6, 1)]) for image in images(20, channels=6)]
    assert np.median(between) < 0.9 and np.max([one.max() for one in between]) < 1


def test_systems_stay_bounded_and_cover_their_box():
    systems = module._systems(np.random.default_rng(0))
    for maps in (next(systems) for _ in range(200)):
        points, which = module._orbit(maps[None], 500, np.random.default_rng(1))
        assert np.isfinite(points).all() and np.abs(points).max() < 1e5
        assert len(np.unique(which)) >= 2
        assert 2 <= np.count_nonzero(maps.any(axis=1)) <= 7


def test_systems_that_diverge_or_collapse_are_rejected():
    rng = np.random.default_rng(0)
    growing, point = np.zeros((2, module._MAPS, 6))
    growing[:2], point[:2] = [1.5, 0, 0, 1.5, 1, 1], [0.5, 0, 0, 0.5, 1, 1]  # both of its maps are equal: one fixed point
    assert len(module._covering(np.stack([growing, point]), rng)) == 0
    square = np.zeros((module._MAPS, 6))
    square[:4] = [[0.5, 0, 0, 0.5, x, y] for x in (0, 1) for y in (0, 1)]  # four halves tile the square
    assert len(module._covering(square[None], rng)) == 1


def test_maps_are_drawn_in_proportion_to_their_area():
    maps = np.zeros((1, module._MAPS, 6))
    maps[0, :3, 0] = maps[0, :3, 3] = [0.2, 0.4, 0.6]
    _, which = module._orbit(maps, 2000, np.random.default_rng(0))
    share = np.bincount(which.ravel(), minlength=module._MAPS) / which.size
    np.testing.assert_allclose(share, np.array([4, 16, 36, 0, 0, 0, 0]) / 56, atol=0.01)


@pytest.mark.parametrize("sizes", [(-1, 8, 8, 3), (1, 0, 8, 3), (1, 8, 0, 3), (1, 8, 8, 0)])
def test_impossible_sizes_are_refused_at_once(sizes):
    with pytest.raises(ValueError, match="fractals needs"):
        fractals(*sizes, np.random.default_rng(0))
