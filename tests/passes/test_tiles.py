"""Scales of tiles: nothing is clipped by two-level scales, searches are optimal where they say so, passes gain on graphs."""

from __future__ import annotations

import json
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, measure, quantize
from onnxq_plugins.export import qdq
from onnxq_plugins.graph import load
from onnxq_plugins.layers.blocks import _by_row, _by_tile, row_steps, search
from onnxq_plugins.layers.complete import complete, complete_ranges, complete_weight
from onnxq_plugins.layers.problem import Problem, float_inputs, solvable
from onnxq_plugins.passes import Round, SubLayer, VectorScale
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.solvers.gram import narrow, row_loss
from onnxq_plugins.solvers.scales import search_scales
from onnxq_plugins.solvers.tiles import (
    FREE,
    UNITS,
    Tiles,
    alone,
    descend,
    diagonal_runs,
    search_free,
    search_multipliers,
)
from onnxq_plugins.spec import QuantSpec, block_shape, expand, fake, reduce_blocks, solve_minmax, step
from tests.passes.test_round import distance, make_job
from tests.zoo import ZOO, Net, cnn, dead_channels, examples, feeds, grouped, mlp, mobilenet, run

seeds = st.integers(0, 2**32 - 1)
BLOCKS = {"tensor": None, "channel": (1, 0)}
TILES = {"target": "storage", "weights": {"bits": 4, "block": [4, 4]}}
TWO_LEVEL = {"weights": {"bits": 4, "block": "tensor", "sub_block": [4, 4]}}
VECTORS = {"weights": {"bits": 4, "block": "channel", "sub_block": [1, 4]}}
FORMS = {"tiles": TILES, "two-level": TWO_LEVEL, "vectors": VECTORS}
NAMES = ["cnn", "mobilenet", "grouped", "mlp", "transformer", "conv1d", "dead_channels", "odd_channels"]
SUB = {"use": "sub-layer"}


def weights(seed, shape, spread=1.0):
    """Weights whose rows and columns are of different size."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * np.exp(spread * rng.normal(size=(*shape[:-1], 1)))
    return w * np.exp(spread * rng.normal(size=(*[1] * (len(shape) - 1), shape[-1])))


def gram(seed, groups, size):
    """Correlated inputs of different size."""
    rng = np.random.default_rng(seed)
    rank = size // 2 + 1
    x = np.maximum(rng.normal(size=(groups, size, rank)) @ rng.normal(size=(groups, rank, 4 * size)) + 0.3, 0)
    x *= rng.uniform(0.3, 3, (groups, size, 1))
    return x @ x.swapaxes(1, 2) / x.shape[2] + 1e-3 * np.eye(size)


def bands(groups, rows, height):
    """Bands of `height` rows that do not cross groups."""
    each = np.arange(rows) // height
    return each + (each[-1] + 1) * np.arange(groups)[:, None]


def covering(w, tiles):
    """Step that covers the largest weight of each tile [bands, n]."""
    most = np.abs(tiles.runs(w)).max(axis=3).swapaxes(1, 2)
    return np.stack([most[tiles.bands == band].max(axis=0) for band in range(tiles.count)]).astype(float) / tiles.grid[1]


def loss(w, h, tiles, each):
    """Loss of each band in float64, for one step per row and run [g, O, n], by rounding to the nearest."""
    size = np.repeat(np.asarray(each, np.float32), tiles.width, axis=2)[:, :, : w.shape[2]].astype(np.float64)
    error = w - size * np.clip(np.rint(w / size), *tiles.grid)
    return np.bincount(tiles.bands.reshape(-1), row_loss(error, h).reshape(-1), tiles.count)


def blockwise(h, width):
    """A Gram matrix without what couples runs of `width`."""
    at = np.arange(h.shape[1]) // width
    return h * (at[:, None] == at)


# ---- two-level scales that cover everything ------------------------------------------------------------------------------


def two_level(draw):
    rows, columns = draw(st.integers(1, 11)), draw(st.integers(1, 23))
    x = weights(draw(seeds), (rows, columns), draw(st.sampled_from([0.0, 1.0, 3.0]))).astype(np.float32)
    sub = (1, draw(st.integers(1, 9))) if draw(st.booleans()) else (draw(st.integers(1, 5)), draw(st.integers(1, 9)))
    for _ in range(draw(st.integers(0, 2))):  # dead rows and columns: sub-blocks of zeros
        x[draw(st.integers(0, rows - 1))] = 0
        x[:, draw(st.integers(0, columns - 1))] = 0
    spec = QuantSpec(
        draw(st.integers(2, 7)),
        True,
        BLOCKS[draw(st.sampled_from(list(BLOCKS)))],
        sub,
        draw(st.booleans()),
        draw(st.integers(1, 127)),
    )
    return x, spec


@examples(200)
@given(case=st.composite(two_level)())
def test_two_level_scales_clip_nothing_and_are_as_small_as_possible(case):
    x, asked = case
    spec = solve_minmax(x, asked)
    size = np.broadcast_to(step(spec, x.shape), x.shape)
    assert (np.abs(x - fake(x, spec)) <= size * (0.5 + 1e-4)).all()
    assert spec.scale.shape == block_shape(x.shape, spec.block) and (spec.scale > 0).all()
    assert spec.multiplier.shape == block_shape(x.shape, spec.sub_block) and np.isin(spec.multiplier, spec.multipliers).all()
    if spec.pow2:
        assert (np.log2(spec.multiplier) % 1 == 0).all()
    assert spec.multipliers[-1] <= spec.max_multiplier
    assert spec.multipliers[-1] * spec.grid[1] <= 127  # whatever the codes
    # the next smaller multiplier would clip the largest value of its sub-block
    smaller = np.concatenate([[0], spec.multipliers])[np.searchsorted(spec.multipliers, spec.multiplier)]
    room = expand(spec.scale, x.shape, spec.block) * expand(smaller, x.shape, spec.sub_block) * spec.grid[1]
    short = reduce_blocks((np.abs(x) > room * (1 - 1e-5)).astype(int), spec.sub_block, np.maximum)
    assert (short[smaller > 0] == 1).all()
    # the coarse scale is no larger than it must be: the largest multiplier is used in each block, or its values are 0
    most = reduce_blocks(np.abs(x), spec.block, np.maximum)
    used = reduce_blocks(np.broadcast_to(expand(spec.multiplier, x.shape, spec.sub_block), x.shape), spec.block, np.maximum)
    assert ((used == spec.multipliers[-1]) | (most == 0)).all()
    np.testing.assert_allclose((spec.scale * used * spec.grid[1])[most > 0], most[most > 0], rtol=1e-5)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("sub", [(1, 4), (3, 5)])
@pytest.mark.parametrize("block", BLOCKS.values())
def test_dead_tensors_stay_zero(block, sub, pow2):
    spec = solve_minmax(np.zeros((4, 10), np.float32), QuantSpec(4, True, block, sub, pow2))
    assert np.isfinite(spec.scale).all() and (spec.scale > 0).all() and (spec.multiplier == 1).all()
    assert not fake(np.zeros((4, 10), np.float32), spec).any()


@examples(60)
@given(seed=seeds, bits=st.integers(2, 7), pow2=st.booleans(), rows=st.sampled_from([1, 2]))
def test_halving_vectors_never_raises_the_error_bound(seed, bits, pow2, rows):
    x = weights(seed, (6, 24)).astype(np.float32)
    tiles = [(rows, width) for width in (16, 8, 4, 2, 1)]  # of 24 columns: 16 does not divide
    free = [QuantSpec(bits, True, tile) for tile in tiles]
    for requests in (free, [QuantSpec(bits, True, None, tile, pow2) for tile in tiles]):
        sizes = [np.broadcast_to(step(solve_minmax(x, one), x.shape), x.shape) for one in requests]
        assert all((b <= a * (1 + 1e-6)).all() for a, b in pairwise(sizes))


@pytest.mark.parametrize("pow2", [False, True])
def test_more_multipliers_never_raise_the_bound_where_they_contain_the_fewer(pow2):
    """Multipliers 1..M of unit c / M: those of 2 M hold all of M's steps."""
    x = weights(0, (8, 32)).astype(np.float32)
    sizes = [
        np.broadcast_to(step(solve_minmax(x, QuantSpec(2, True, (1, 0), (1, 4), pow2, m)), x.shape), x.shape)
        for m in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert all((b <= a * (1 + 1e-6)).all() for a, b in pairwise(sizes)) and sizes[-1].sum() < sizes[0].sum()


# ---- search on arrays ---------------------------------------------------------------------------------------------------


@st.composite
def problems(draw, groups=2, rows=6, size=20):
    g, o, d = draw(st.integers(1, groups)), draw(st.integers(1, rows)), draw(st.integers(2, size))
    seed, bits = draw(seeds), draw(st.integers(2, 5))
    w, h = weights(seed, (g, o, d), 0.7), gram(seed, g, d)
    top = 2 ** (bits - 1) - 1
    return w, h, Tiles(bands(g, o, draw(st.integers(1, o))), draw(st.integers(1, d)), (-top, top))


@examples(60)
@given(problems(), seeds)
def test_tiles_hold_runs_of_bands(case, seed):
    w, _, tiles = case
    runs = tiles.runs(w)
    n = -(-w.shape[2] // tiles.width)
    assert runs.shape == (len(w), n, w.shape[1], tiles.width)
    each = np.random.default_rng(seed).normal(size=(*w.shape[:2], n))
    full = tiles.steps(each, w.shape[2])
    summed = tiles.summed(each)
    for g, o, d in np.ndindex(*w.shape):
        assert runs[g, d // tiles.width, o, d % tiles.width] == np.float32(w[g, o, d])
        assert full[g, o, d] == each[g, o, d // tiles.width]
    assert runs.size - np.count_nonzero(runs) >= (n * tiles.width - w.shape[2]) * w.shape[0] * w.shape[1]
    for band in range(tiles.count):
        np.testing.assert_allclose(summed[band], each[tiles.bands == band].sum(axis=0), atol=1e-12)


@examples(60)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.data())
def test_diagonal_runs_equal_a_slow_loop(seed, groups, pieces, inner, width, data):
    size = pieces * inner - data.draw(st.integers(0, min(inner - 1, pieces - 1)))  # the last piece may be filled up
    h = np.random.default_rng(seed).normal(size=(groups * pieces, inner, inner))
    found = diagonal_runs(h, groups, size, width)
    wanted = np.zeros((groups, -(-size // width), width, width))
    for g, a, b in product(range(groups), range(size), range(size)):
        if a // width == b // width and a // inner == b // inner:
            wanted[g, a // width, a % width, b % width] = h[g * pieces + a // inner, a % inner, b % inner]
    np.testing.assert_array_equal(found, wanted)


@examples(40)
@given(problems())
def test_alone_is_the_loss_of_a_run_without_the_others(case):
    w, h, tiles = case
    cover = covering(w, tiles)[tiles.bands]
    blocks = diagonal_runs(h, len(w), w.shape[2], tiles.width)
    for matrix, given_blocks in ((h, blocks), (np.broadcast_to(np.eye(w.shape[2]), h.shape), None)):
        found = list(alone(w, given_blocks, cover, np.array([0.5, 1.0]), tiles))
        for losses, choice in zip(found, (0.5, 1.0), strict=True):
            for run_ in range(cover.shape[2]):
                at = slice(run_ * tiles.width, (run_ + 1) * tiles.width)
                size = (cover[:, :, run_, None] * choice).astype(np.float32)
                error = w[:, :, at] - size * np.clip(np.rint(w[:, :, at].astype(np.float32) / size), *tiles.grid)
                whole, wanted = (row_loss(a, matrix[:, at, at]) for a in (w[:, :, at], error))
                np.testing.assert_allclose(losses[:, :, run_], wanted, rtol=1e-3, atol=1e-5 * whole.max())


@examples(80)
@given(problems(), seeds)
def test_descent_never_raises_the_loss(case, seed):
    w, h, tiles = case
    unit, choices = covering(w, tiles)[tiles.bands], np.array([0.4, 0.6, 0.8, 1.0, 1.3])
    start = np.random.default_rng(seed).integers(0, 5, (tiles.count, unit.shape[2]))
    kept, before = start.copy(), loss(w, h, tiles, unit * choices[start[tiles.bands]])
    for rounds in range(4):
        pick = descend(w, h, unit, choices, start, tiles, rounds)
        after = loss(w, h, tiles, unit * choices[pick[tiles.bands]])
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert (descend(w, h, unit, choices, start, tiles, 0) == kept).all() and (start == kept).all()


@examples(60)
@given(seeds, st.integers(2, 4), st.booleans())
def test_descent_rests_where_no_single_tile_improves(seed, bits, together):
    """All choices of tiny layers; descent is no global optimum, but is seldom far from it."""
    w, h, top = weights(seed, (1, 2, 6), 0.5), gram(seed, 1, 6), 2 ** (bits - 1) - 1
    tiles = Tiles(np.array([[0, 0 if together else 1]]), 3, (-top, top))
    unit, choices = covering(w, tiles)[tiles.bands], np.array([0.5, 0.7, 0.85, 1.0])

    def total(pick):
        return loss(w, h, tiles, unit * choices[pick[tiles.bands]])

    pick = descend(w, h, unit, choices, np.full((tiles.count, 2), 3), tiles, 50)
    here = total(pick)
    for band, at, choice in product(range(tiles.count), range(2), range(4)):
        other = pick.copy()
        other[band, at] = choice
        assert total(other)[band] >= here[band] * (1 - 1e-4)
    best = np.min([total(np.tile(each, (tiles.count, 1))) for each in product(range(4), repeat=2)], axis=0)
    assert (here >= best * (1 - 1e-6)).all()


def test_descent_comes_close_to_the_best_of_all_choices_and_beats_tiles_alone():
    ratios, alone_ratios = [], []
    choices = np.array([0.5, 0.7, 0.85, 1.0])
    for seed in range(40):
        w, h = weights(seed, (1, 2, 9), 0.5), gram(seed, 1, 9)
        tiles = Tiles(np.array([[0, 1]]), 3, (-3, 3))
        cover = covering(w, tiles)
        every = np.array([loss(w, h, tiles, (cover * choices[list(p)])[tiles.bands]) for p in product(range(4), repeat=3)])
        blocks = diagonal_runs(h, 1, 9, 3)
        for rounds, kept in ((0, alone_ratios), (10, ratios)):
            found = search_free(w, h, blocks, tiles, cover, choices, rounds)
            kept.extend(loss(w, h, tiles, found[tiles.bands]) / every.min(axis=0))
    assert min(ratios) >= 1 - 1e-6 and np.mean(ratios) < 1.15 and np.mean(ratios) < np.mean(alone_ratios)


@examples(40)
@given(problems(), st.integers(0, 3))
def test_searched_steps_never_lose_against_covering_ones(case, rounds):
    w, h, tiles = case
    cover, blocks = covering(w, tiles), diagonal_runs(h, len(w), w.shape[2], tiles.width)
    found = search_free(w, h, blocks, tiles, cover, FREE, rounds)
    assert np.isin(np.round(found / cover, 9), np.round(FREE, 9)).all()
    assert (loss(w, h, tiles, found[tiles.bands]) <= loss(w, h, tiles, cover[tiles.bands]) * (1 + 1e-4)).all()


@examples(40)
@given(problems())
def test_without_data_each_tile_has_its_own_best_step(case):
    w, _, tiles = case
    cover, same = covering(w, tiles), np.broadcast_to(np.eye(w.shape[2]), (len(w), w.shape[2], w.shape[2]))
    found = search_free(w, None, None, tiles, cover, FREE, 2)
    best = np.full(cover.shape, np.inf)
    for factor in FREE:
        error = w - tiles.quantized(w, tiles.steps((cover * factor)[tiles.bands], w.shape[2]))
        best = np.minimum(best, tiles.summed((tiles.runs(error).astype(np.float64) ** 2).sum(axis=3).swapaxes(1, 2)))
    reached = loss(w, same, tiles, found[tiles.bands])
    np.testing.assert_allclose(reached, best.sum(axis=1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_tiles_alone_are_optimal_where_nothing_couples_them(seed):
    w, h = weights(seed, (1, 4, 9), 0.5), blockwise(gram(seed, 1, 9), 3)
    tiles = Tiles(np.array([[0, 1, 0, 1]]), 3, (-3, 3))
    cover, choices, blocks = covering(w, tiles), np.array([0.45, 0.6, 0.8, 1.0]), diagonal_runs(h, 1, 9, 3)
    every = np.array([loss(w, h, tiles, (cover * choices[list(p)])[tiles.bands]) for p in product(range(4), repeat=3)])
    for rounds in (0, 3):
        found = search_free(w, h, blocks, tiles, cover, choices, rounds)
        np.testing.assert_allclose(loss(w, h, tiles, found[tiles.bands]), every.min(axis=0), rtol=1e-5)


@pytest.mark.parametrize("width", [2, 4, 5])
def test_wide_layers_are_searched_by_their_diagonal_blocks(width):
    """The same steps as with the whole matrix, where the runs are the blocks; still good ones where they are not."""
    groups, pieces, inner = 2, 3, 4
    h = gram(0, groups * pieces, inner)
    whole = np.zeros((groups, pieces * inner, pieces * inner))
    for g, p in product(range(groups), range(pieces)):
        at = slice(p * inner, (p + 1) * inner)
        whole[g, at, at] = h[g * pieces + p]
    w = weights(1, (groups, 5, pieces * inner - 1), 0.5)
    whole = whole[:, : w.shape[2], : w.shape[2]]
    tiles = Tiles(bands(groups, 5, 2), width, (-3, 3))
    cover = covering(w, tiles)
    found = search_free(w, h, diagonal_runs(h, groups, w.shape[2], width), tiles, cover, FREE, 2)
    if inner == width:
        other = search_free(w, whole, diagonal_runs(whole, groups, w.shape[2], width), tiles, cover, FREE, 2)
        np.testing.assert_array_equal(found, other)
    assert loss(w, whole, tiles, found[tiles.bands]).sum() < loss(w, whole, tiles, cover[tiles.bands]).sum()


@examples(25)
@given(seeds, st.integers(2, 3), st.integers(1, 5), st.integers(2, 12), st.data())
def test_groups_at_once_equal_groups_alone(seed, groups, rows, size, data):
    w, h = weights(seed, (groups, rows, size), 0.7), gram(seed, groups, size)
    height, width = data.draw(st.integers(1, rows)), data.draw(st.integers(1, size))
    one, many = Tiles(bands(1, rows, height), width, (-7, 7)), Tiles(bands(groups, rows, height), width, (-7, 7))
    cover, blocks = covering(w, many), diagonal_runs(h, groups, size, width)
    unit = np.abs(w).max(axis=2) / 7 / 15
    at_once = search_free(w, h, blocks, many, cover, FREE, 2)
    factor, multiplier = search_multipliers(w, h, blocks, many, unit, np.arange(1, 16), many.bands, 2)
    for g in range(groups):
        part, mine = slice(g, g + 1), slice(g * one.count, (g + 1) * one.count)
        np.testing.assert_allclose(search_free(w[part], h[part], blocks[part], one, cover[mine], FREE, 2), at_once[mine])
        found = search_multipliers(w[part], h[part], blocks[part], one, unit[part], np.arange(1, 16), one.bands, 2)
        np.testing.assert_array_equal(found[0], factor[part])
        np.testing.assert_array_equal(found[1], multiplier[mine])


@examples(25)
@given(problems(), st.integers(-12, 12))
def test_units_and_signs_do_not_matter(case, power):
    w, h, tiles = case
    cover, blocks = covering(w, tiles), diagonal_runs(h, len(w), w.shape[2], tiles.width)
    found = search_free(w, h, blocks, tiles, cover, FREE, 2)
    np.testing.assert_array_equal(search_free(-w, h, blocks, tiles, cover, FREE, 2), found)
    big = 2.0**power
    np.testing.assert_array_equal(search_free(w * big, h, blocks, tiles, cover * big, FREE, 2), found * big)
    np.testing.assert_array_equal(search_free(w, h * big, blocks * big, tiles, cover, FREE, 2), found)


@examples(30)
@given(problems(), st.sampled_from(["int", "pow2"]), st.booleans())
def test_multipliers_are_the_best_of_their_unit(case, kind, one_unit):
    """Without data: no single multiplier can be better, the units are shared as asked, and all is out of the lists."""
    w, _, tiles = case
    choices = np.arange(1, 16) if kind == "int" else 2 ** np.arange(4)
    share = np.zeros_like(tiles.bands) if one_unit else tiles.bands
    most = np.array([np.abs(w)[share == s].max() for s in range(share.max() + 1)])
    unit = most[share] / tiles.grid[1] / choices[-1]
    factor, multiplier = search_multipliers(w, None, None, tiles, unit, choices, share, 2)
    assert np.isin(multiplier, choices).all() and np.isin(factor, [*UNITS, 1.0]).all()
    assert all(len(set(factor[share == s])) == 1 for s in range(share.max() + 1))
    losses = []
    for choice in choices:
        each = np.broadcast_to((unit * factor * choice)[..., None], (*unit.shape, multiplier.shape[1]))
        error = w - tiles.quantized(w, tiles.steps(each, w.shape[2]))
        losses.append(tiles.summed((tiles.runs(error).astype(np.float64) ** 2).sum(axis=3).swapaxes(1, 2)))
    found = np.take_along_axis(np.stack(losses), np.searchsorted(choices, multiplier)[None], axis=0)[0]
    assert (found <= np.min(losses, axis=0) * (1 + 1e-3) + 1e-9).all()


@examples(60)
@given(problems(), st.sampled_from([3, 15]), st.booleans(), st.integers(0, 2))
def test_multipliers_never_lose_against_covering_ones(case, most, one_unit, rounds):
    """By the whole Gram matrix, over the rows that share a unit; bands that share it may pay for each other."""
    w, h, tiles = case
    choices, share = np.arange(1, most + 1), np.zeros_like(tiles.bands) if one_unit else tiles.bands
    top = np.array([np.abs(w)[share == s].max() for s in range(share.max() + 1)])
    unit = top[share] / tiles.grid[1] / most
    own = np.array([unit[tiles.bands == band][0] for band in range(tiles.count)])
    covers = np.clip(np.ceil(covering(w, tiles) / own[:, None] - 1e-6), 1, most)
    blocks = diagonal_runs(h, len(w), w.shape[2], tiles.width)
    factor, multiplier = search_multipliers(w, h, blocks, tiles, unit, choices, share, rounds)
    shared = np.array([share[tiles.bands == band][0] for band in range(tiles.count)])
    found, plain = (
        np.bincount(shared, loss(w, h, tiles, u[..., None] * m[tiles.bands]))
        for u, m in ((unit * factor, multiplier), (unit, covers))
    )
    assert (found <= plain * (1 + 1e-4)).all()


def test_the_unit_that_is_looked_up_is_nearly_the_best():
    ratios, covered = [], []
    for seed in range(15):
        w, h = weights(seed, (1, 8, 32), 0.7), gram(seed, 1, 32)
        tiles, choices = Tiles(bands(1, 8, 4), 8, (-7, 7)), np.arange(1, 16)
        unit, blocks = np.full((1, 8), np.abs(w).max() / 7 / 15), diagonal_runs(blockwise(h, 8), 1, 32, 8)
        tried = []
        for u in UNITS:
            each = np.broadcast_to(unit[..., None] * u, (1, 8, 4))
            tried.append(np.min([tiles.summed(one) for one in alone(w, blocks, each, choices, tiles)], axis=0).sum())
        factor, multiplier = search_multipliers(w, None, blocks, tiles, unit, choices, np.zeros((1, 8), int), 0)
        each = (unit * factor)[..., None] * multiplier[tiles.bands]
        reached = loss(w, blockwise(h, 8), tiles, each).sum()
        ratios.append(reached / min(tried))
        covered.append(
            reached
            / loss(
                w,
                blockwise(h, 8),
                tiles,
                unit[..., None] * np.clip(np.ceil(covering(w, tiles) / unit[0, 0] - 1e-6), 1, 15)[tiles.bands],
            ).sum()
        )
    assert min(ratios) >= 1 - 1e-4 and np.mean(ratios) < 1.06 and max(covered) < 1


# ---- blocks of a layer ---------------------------------------------------------------------------------------------------


def layer_of(kind):
    """A layer and its float32 weight."""
    net = Net(["N", 8, 6, 6] if "conv" in kind else ["N", 12], seed=3)
    made = {
        "conv": lambda: net.conv("x", 8, 6),
        "grouped conv": lambda: net.conv("x", 8, 6, groups=2),
        "depthwise conv": lambda: net.conv("x", 8, 8, groups=8),
        "gemm": lambda: net.gemm("x", 12, 10),
        "gemm [K, N]": lambda: net.gemm("x", 12, 10, trans_b=0),
        "matmul": lambda: net.linear("x", 12, 10, bias=False),
    }
    graph = load(net.model(made[kind]()))
    (layer,) = graph.layers
    return layer, graph.constant(layer.weight) * np.float32(weights(5, layer.shape, 0.4) / weights(5, layer.shape, 0.0))


def block_of(layer, outputs, inputs):
    return tuple(outputs if a == layer.out_axis else inputs if a == layer.in_axis else 0 for a in range(len(layer.shape)))


KINDS = ["conv", "grouped conv", "depthwise conv", "gemm", "gemm [K, N]", "matmul"]
LARGE = 1000


def searched(layer, w, block, h, rounds=2, **request):
    spec = solve_minmax(w, QuantSpec(3, True, block, **request))
    return search(layer, spec, layer.matrix(w), h, rounds)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_that_hold_all_equal_rows_and_the_tensor(kind, pow2):
    layer, w = layer_of(kind)
    groups, _, size = layer.matrix_shape
    rows = size // int(np.prod(layer.shape[2:]))
    h = gram(0, groups, size)
    for inputs in (rows, LARGE):
        row, tile = (searched(layer, w, block_of(layer, 1, n), h, pow2=pow2) for n in (0, inputs))
        np.testing.assert_array_equal(tile.scale, row.scale)
        tensor, tile = (searched(layer, w, block, h, pow2=pow2) for block in (None, block_of(layer, LARGE, inputs)))
        assert tile.scale.size == 1 and tile.scale.item() == tensor.scale.item()
        row, tile = (searched(layer, w, block_of(layer, 1, n), None, pow2=pow2) for n in (0, inputs))
        np.testing.assert_array_equal(tile.scale, row.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_per_row_is_that_of_the_scale_search(kind):
    layer, w = layer_of(kind)
    groups, rows, size = layer.matrix_shape
    h, spec = gram(0, groups, size), solve_minmax(w, QuantSpec(3, True, block_of(layer, 1, 0)))
    share = np.arange(groups * rows).reshape(groups, rows)
    factors = search_scales(layer.matrix(w), h, row_steps(layer, spec), spec.grid, share)
    wanted = (row_steps(layer, spec) * factors[..., None]).reshape(-1)
    np.testing.assert_allclose(search(layer, spec, layer.matrix(w), h).scale.reshape(-1), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_tiles_of_whole_rows_agree_on_the_same_candidates(kind):
    layer, w = layer_of(kind)
    size = layer.matrix_shape[2]
    h, spec = gram(0, layer.groups, size), solve_minmax(w, QuantSpec(3, True, block_of(layer, 1, 0), pow2=True))
    np.testing.assert_array_equal(
        _by_tile(layer, spec, layer.matrix(w), h, size, 2).scale, _by_row(layer, spec, layer.matrix(w), h).scale
    )


@pytest.mark.parametrize("sub", [(1, 2), (1, 3), (4, 4), (3, 5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("two_levels", [False, True])
def test_found_scales_fit_their_blocks_and_are_no_worse_than_covering_ones(kind, sub, two_levels):
    layer, w = layer_of(kind)
    groups, _, size = layer.matrix_shape
    tile = block_of(layer, *sub)
    block = (None if sub[0] > 1 else block_of(layer, 1, 0)) if two_levels else tile
    spec = solve_minmax(w, QuantSpec(3, True, block, tile if two_levels else None))
    for h in (gram(0, groups, size), None):
        found = search(layer, spec, layer.matrix(w), h, 2)
        assert found.scale.dtype == np.float32 and found.scale.shape == spec.scale.shape and (found.scale > 0).all()
        if two_levels:
            assert found.multiplier.shape == spec.multiplier.shape and np.isin(found.multiplier, spec.multipliers).all()
        matrix = np.broadcast_to(np.eye(size), (groups, size, size)) if h is None else h
        losses = [row_loss(layer.matrix(w.astype(np.float64) - fake(w, one)), matrix).sum() for one in (found, spec)]
        assert losses[0] <= losses[1] * (1 + 1e-4)


@pytest.mark.parametrize("tile", [(1, 4, 3, 1), (1, 4, 1, 0), (2, 0, 0, 1), (1, 0, 2, 0), (1, 4, 2, 2)])
@pytest.mark.parametrize("two_levels", [False, True])
def test_blocks_that_divide_a_kernel_keep_covering_scales(tile, two_levels):
    layer, w = layer_of("conv")
    spec = solve_minmax(w, QuantSpec(4, True, None if two_levels else tile, tile if two_levels else None))
    for h in (gram(0, 1, layer.matrix_shape[2]), None):
        assert search(layer, spec, layer.matrix(w), h) is spec


@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul"])
def test_channels_under_the_multipliers_of_a_band_share_their_factor(kind):
    """A scale per channel and multipliers of tiles of three channels: the unit is searched for the three together."""
    layer, w = layer_of(kind)
    spec = solve_minmax(w, QuantSpec(3, True, block_of(layer, 1, 0), block_of(layer, 3, 4)))
    found = search(layer, spec, layer.matrix(w), gram(0, 1, layer.matrix_shape[2]), 2)
    factors = (found.scale / spec.scale).reshape(-1)
    for first in range(0, len(factors), 3):
        np.testing.assert_allclose(factors[first : first + 3], factors[first], rtol=1e-5)
    assert np.ptp(factors) > 0.01


def test_blocks_of_single_taps_are_runs():
    layer, w = layer_of("conv")
    spec = solve_minmax(w, QuantSpec(3, True, (2, 1, 1, 1)))
    h = gram(0, 1, layer.matrix_shape[2])
    found = search(layer, spec, layer.matrix(w), h, 2)
    losses = [row_loss(layer.matrix(w.astype(np.float64) - fake(w, one)), h).sum() for one in (found, spec)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("kind", ["conv", "grouped conv", "matmul"])
def test_blocks_on_the_diagonal_serve_wide_layers(kind):
    """With a Gram matrix of blocks as wide as the tiles, these are those of the whole matrix with the rest 0."""
    layer, w = layer_of(kind)
    groups, _, size = layer.matrix_shape
    pieces, inner = 2, size // 2
    h = gram(0, groups * pieces, inner)
    whole = np.zeros((groups, size, size))
    for g, p in product(range(groups), range(pieces)):
        whole[g, p * inner : (p + 1) * inner, p * inner : (p + 1) * inner] = h[g * pieces + p]
    half = inner // int(np.prod(layer.shape[2:]))
    for request in (
        QuantSpec(3, True, block_of(layer, 2, half)),
        QuantSpec(3, True, block_of(layer, 1, 0)),
        QuantSpec(3, True, None, block_of(layer, 2, half)),
    ):
        spec = solve_minmax(w, request)
        matrix = layer.matrix(w)
        wide, full = (search(layer, spec, narrow(matrix, one), one, 0) for one in (h, whole))
        np.testing.assert_allclose(wide.scale, full.scale, rtol=1e-6)
        if spec.multiplier is not None:
            np.testing.assert_array_equal(wide.multiplier, full.multiplier)


def test_multipliers_approach_free_scales():
    """At 2 bits up to 127 steps: the loss falls with M to that of a float scale for each vector."""
    tops, found, free = (1, 3, 7, 15, 31, 127), [], []
    for seed in range(8):
        layer, _ = layer_of("matmul")
        w = weights(seed, layer.shape, 0.8).astype(np.float32)
        h, vectors, matrix = gram(seed, 1, 12), block_of(layer, 1, 3), layer.matrix(w).astype(np.float64)

        def reached(spec, h=h, w=w, layer=layer, matrix=matrix):
            made = search(layer, solve_minmax(w, spec), layer.matrix(w), h, 2)
            return row_loss(matrix - layer.matrix(fake(w, made)), h).sum() / row_loss(matrix, h).sum()

        found.append([reached(QuantSpec(2, True, block_of(layer, 1, 0), vectors, max_multiplier=m)) for m in tops])
        free.append(reached(QuantSpec(2, True, vectors)))
    mean = np.mean(found, axis=0)
    assert all(b <= a * 1.02 for a, b in pairwise(mean)) and mean[-1] < 0.9 * mean[0]
    assert mean[-1] <= np.mean(free) * 1.03


# ---- requests ------------------------------------------------------------------------------------------------------------


def asked(model, recipe):
    """The requests of all planned layers by their operator and number."""
    job = make_job(model, recipe, n=1)
    return job, {y.name: job.plan[y.weight] for y in job.graph.layers if y.weight in job.plan}


def test_eight_bit_layers_have_no_multipliers():
    job, found = asked(cnn(), {**TWO_LEVEL, "layer": [{"position": "first", "weights": {"bits": 8}}]})
    first, *rest = (found[y.name] for y in job.graph.layers)
    assert first.sub_block is None and not first.pow2 and all(spec.sub_block for spec in rest) and rest


@pytest.mark.parametrize("pow2", [False, True])
def test_layers_that_are_no_finer_divided_have_no_multipliers(pow2):
    for recipe, kept in ((VECTORS, False), (TWO_LEVEL, True)):
        job, found = asked(mobilenet(), {"weights": {**recipe["weights"], "pow2": pow2}})
        depthwise = [found[y.name] for y in job.graph.layers if y.kind == "depthwise"]
        assert depthwise and all(bool(spec.sub_block) == kept and spec.pow2 == (kept and pow2) for spec in depthwise)
        assert any(found[y.name].sub_block for y in job.graph.layers if y.kind == "dense")


def test_one_number_is_a_vector_of_inputs():
    plans = [asked(wide_mlp(), {"weights": {"bits": 4, "sub_block": sub}})[1] for sub in (16, [16], [1, 16])]
    assert all({n: s.sub_block for n, s in plan.items()} == {n: s.sub_block for n, s in plans[0].items()} for plan in plans)
    assert any(spec.sub_block and 16 in spec.sub_block for spec in plans[0].values())


def wide_mlp():
    net = Net(["N", 40])
    return net.model(net.gemm(net.op("Relu", net.gemm("x", 40, 33, trans_b=0)), 33, 7))


def test_none_in_a_rule_takes_multipliers_away():
    _, whole = asked(cnn(), TWO_LEVEL)
    _, ruled = asked(cnn(), {**TWO_LEVEL, "layer": [{"op": "Gemm", "weights": {"sub_block": "none"}}]})
    lost = {name for name in whole if whole[name].sub_block and not ruled[name].sub_block}
    assert len(lost) == 1 and "gemm" in lost.pop() and any(spec.sub_block for spec in ruled.values())


@pytest.mark.parametrize(
    ("target", "bits", "top"), [("ort-cpu-avx2", 4, 9), ("ort-cpu-avx2", 3, 21), ("ort-cpu", 4, 15), ("ort-cpu", 3, 15)]
)
def test_codes_times_multipliers_stay_within_the_target(target, bits, top):
    recipe = {"target": target, "weights": {"bits": bits, "block": "tensor", "sub_block": [4, 4], "max_multiplier": 15}}
    wide = {**recipe, "weights": {**recipe["weights"], "max_multiplier": 127}}
    for table, wanted in ((recipe, min(top, 15)), (wide, (64 if "avx2" in target else 127) // (2 ** (bits - 1) - 1))):
        job, found = asked(mlp(), table)
        assert {spec.max_multiplier for spec in found.values()} == {wanted}
        SubLayer().apply(job)
        complete(job)
        model = qdq.export(job.graph, job.plan, job.target)
        assert model.graph.node
        for layer in job.graph.layers:
            spec = job.plan[layer.weight]
            assert spec.multiplier.max() <= wanted
            assert np.abs(spec.codes * expand(spec.multiplier, layer.shape, spec.sub_block)).max() <= job.target.max_code


@pytest.mark.parametrize("top", [0, 128, -3])
@pytest.mark.parametrize("in_rule", [False, True])
def test_multipliers_out_of_range_are_refused_with_the_range(top, in_rule):
    weights_ = {"max_multiplier": top}
    with pytest.raises(OnnxqError, match=r"max_multiplier = -?\d+ is out of range; use 1\.\.127"):
        make_job(mlp(), {"layer": [{"weights": weights_}]} if in_rule else {"weights": weights_}, n=1)


# ---- the passes on graphs -------------------------------------------------------------------------------------------------


def losses_of(job, plans):
    """Loss of each layer [plans][layers] by the measure of sub-layer."""
    found = []
    for batch in float_inputs(job, solvable(job), 256, 4608):
        for layer, seen in batch:
            w, h = Problem.of(job, layer, seen, False)._target()
            w = w.astype(np.float64)
            found.append(
                [
                    row_loss(
                        w - narrow(layer.matrix(weight_values(layer, complete_weight(job, layer, plan[layer.weight]))), h),
                        h,
                    ).sum()
                    for plan in plans
                ]
            )
    return np.array(found).T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_no_layer_loses_against_the_default_solver(name, form):
    job = make_job(ZOO[name](), FORMS[form])
    complete_ranges(job)
    open_plan = job.plan
    told = SubLayer().apply(job)
    found, default = losses_of(job, (job.plan, open_plan))
    assert (found <= default * (1 + 1e-4)).all() and found.sum() < default.sum()
    specs = [job.plan[y.weight] for y in solvable(job)]
    assert all(spec.codes is None and spec.solved for spec in specs)
    assert told == {
        "layers": len(specs),
        "scales": sum(spec.scale.size for spec in specs),
        "multipliers": sum(spec.multiplier.size for spec in specs if spec.multiplier is not None),
    }


def test_more_rounds_never_lose():
    for name in ("cnn", "transformer"):
        losses = []
        for rounds in (0, 1, 3):
            job = make_job(ZOO[name](), TILES)
            complete_ranges(job)
            SubLayer(rounds=rounds).apply(job)
            losses.append(losses_of(job, (job.plan,))[0])
        assert all((b <= a * (1 + 1e-4)).all() for a, b in pairwise(losses)) and losses[-1].sum() < losses[0].sum()


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_closer_on_average(form):
    gains = []
    for name in ("cnn", "mobilenet", "mlp", "transformer", "odd_channels"):
        model = ZOO[name]()
        weight_only = {**FORMS[form], "activations": {"bits": 32}, "target": "storage"}  # activations' noise would hide it
        results = [quantize(model, {**weight_only, "pass": steps}, feeds(model, 8), workers=1) for steps in ([], [SUB])]
        before, after = (distance(model, result, feeds(model, 8, seed=1)) for result in results)
        gains.append(after - before)
    assert np.mean(gains) > 0.5


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("weights_", [{"block": "channel", "sub_block": [1, 4]}, {"block": [1, 4]}, {"block": "channel"}])
def test_vector_scale_needs_no_data(method, weights_):
    recipe = {"target": "storage", "activations": {"bits": 32}, "weights": {"bits": 3, **weights_}}
    for name in ("mobilenet", "mlp", "dead_channels"):
        model = ZOO[name]()
        result = quantize(model, {**recipe, "pass": [{"use": "vector-scale", "method": method}]}, None, workers=1)
        plain = quantize(model, recipe, None, workers=1)
        errors = []
        for made in (result, plain):
            graph = load(model, flatten=False)
            errors.append(
                sum(
                    float(((graph.constant(y.weight) - weight_values(y, made.plan[y.weight])) ** 2).sum())
                    for y in graph.layers
                )
            )
        if method == "minmax":
            assert errors[0] == errors[1]
        else:
            assert errors[0] < errors[1]
        json.dumps(result.report)
        assert result.report["steps"][0]["result"]["vectors"] > 0


def test_vectors_that_hold_a_row_equal_a_scale_per_channel():
    for extra in ({"block": [1, 500]}, {"block": "channel", "sub_block": [1, 500]}):
        plans = [
            quantize(
                cnn(),
                {
                    "target": "storage",
                    "activations": {"bits": 32},
                    "weights": {"bits": 4, **weights_},
                    "pass": [{"use": "vector-scale"}],
                },
                None,
                workers=1,
            ).plan
            for weights_ in ({"block": "channel"}, extra)
        ]
        assert set(plans[0]) == set(plans[1])
        for name, spec in plans[0].items():
            np.testing.assert_array_equal(spec.scale, plans[1][name].scale)
            np.testing.assert_array_equal(spec.codes, plans[1][name].codes)


def test_finer_vectors_have_less_error():
    errors = []
    for width in (64, 16, 4, 2):
        job = make_job(cnn(), {"target": "storage", "weights": {"bits": 3, "block": [1, width]}}, n=1)
        VectorScale().apply(job)
        complete(job)
        errors.append(
            sum(
                float(((job.graph.constant(y.weight) - weight_values(y, job.plan[y.weight])) ** 2).sum())
                for y in job.graph.layers
            )
        )
    assert all(b < a for a, b in pairwise(errors))


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_workers(form):
    model = mobilenet()
    plans = [quantize(model, {**FORMS[form], "pass": [SUB]}, feeds(model, 6), workers=n).plan for n in (1, 2)]
    assert set(plans[0]) == set(plans[1])
    for name, spec in plans[0].items():
        for key in ("scale", "multiplier", "codes"):
            np.testing.assert_array_equal(getattr(spec, key), getattr(plans[1][name], key))


@pytest.mark.parametrize("step_", [SubLayer(), VectorScale()])
@pytest.mark.parametrize("form", FORMS)
def test_solved_entries_are_left_alone(form, step_):
    job = make_job(cnn(), FORMS[form], n=2)
    complete_ranges(job)
    first, *rest = job.graph.layers
    kept = complete_weight(job, first, job.plan[first.weight])
    job.plan |= {first.weight: kept}
    told = step_.apply(job)
    assert job.plan[first.weight] is kept and told["layers"] == len(rest)
    before = job.plan
    assert step_.apply(job)["layers"] == 0 and all(job.plan[n] is before[n] for n in before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "sequential"), [("mobilenet", True), ("mlp", False)])
def test_rounding_keeps_scales_and_multipliers(name, form, sequential):
    job = make_job(ZOO[name](), FORMS[form])
    complete_ranges(job)
    SubLayer(rounds=0).apply(job)
    before = job.plan
    Round(seconds=0, sequential=sequential).apply(job)
    complete(job)
    for layer in solvable(job):
        old, new = before[layer.weight], job.plan[layer.weight]
        np.testing.assert_array_equal(new.scale, old.scale)
        np.testing.assert_array_equal(new.multiplier, old.multiplier)
        assert new.codes is not None and new.codes.min() >= new.grid[0] and new.codes.max() <= new.grid[1]


def faint():
    """Channels of all but zero weights with a bias of ordinary size: int32 biases widen their scales."""
    net = Net(["N", 6])
    weight = net.rng.normal(size=(8, 6))
    weight[[1, 4]] *= 1e-9
    weight[6] *= 3e-10
    x = net.op("Relu", net.op("Gemm", "x", net.constant(weight), net.constant(net.rng.uniform(1, 3, 8)), transB=1))
    return net.model(net.gemm(x, 8, 5))


@pytest.mark.parametrize(
    "steps",
    [
        [SubLayer()],
        [Round(seconds=0)],
        [SubLayer(), Round(seconds=0)],
        [VectorScale()],
        [Round(seconds=0, sequential=False, search=False)],
        [],
    ],
    ids=str,
)
@pytest.mark.parametrize("weights_", [{"block": "channel"}, {"block": "tensor"}, {"block": [4, 4]}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "faint"])
def test_powers_of_two_stay_powers_of_two(name, weights_, steps):
    tile = isinstance(weights_["block"], list)
    recipe = {"weights": {"bits": 4, "pow2": True, **weights_}, **({"target": "storage"} if tile else {})}
    job = make_job(faint() if name == "faint" else ZOO[name](), recipe)
    complete_ranges(job)
    for one in steps:
        one.apply(job)
        for layer in solvable(job):
            spec = job.plan[layer.weight]
            assert not spec.solved or (np.log2(spec.scale) % 1 == 0).all()
    complete(job)
    assert all((np.log2(job.plan[y.weight].scale) % 1 == 0).all() for y in solvable(job))


@pytest.mark.parametrize("pow2", [False, True])
def test_widened_scales_are_not_widened_again(pow2):
    """What a pass solved under the bias' floor is final: the default solver finds nothing to widen."""
    job = make_job(faint(), {"weights": {"bits": 4, "pow2": pow2}})
    complete_ranges(job)
    SubLayer().apply(job)
    before = job.plan
    Round(seconds=0, shift=False).apply(job)
    codes = {y.weight: job.plan[y.weight].codes for y in solvable(job)}
    complete(job)
    for weight, kept in codes.items():
        np.testing.assert_array_equal(job.plan[weight].scale, before[weight].scale)
        np.testing.assert_array_equal(job.plan[weight].codes, kept)
    assert not job.report.get("widened")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["cnn", "grouped", "mlp", "transformer", "odd_channels"])
def test_exported_weights_are_those_of_the_plan_and_run_the_same_optimized(name, form):
    model = ZOO[name]()
    steps = [{"use": "vector-scale"}] if form == "vectors" else [SUB]
    job = make_job(model, FORMS[form], n=4)
    (VectorScale() if steps[0]["use"] == "vector-scale" else SubLayer()).apply(job)
    complete(job)
    exported = qdq.export(job.graph, job.plan, job.target)
    nodes = {node.name: node for node in exported.graph.node}
    probe = type(exported).FromString(exported.SerializeToString())
    planned = [y for y in job.graph.layers if y.weight in job.plan]
    del probe.graph.output[:]
    for layer in planned:
        made = probe.graph.output.add()
        made.name = nodes[layer.name].input[1]
    feed = feeds(model, 1, seed=7)[0]
    for layer, value in zip(planned, run(probe, feed, optimize=False), strict=True):
        np.testing.assert_array_equal(value, weight_values(layer, job.plan[layer.weight]))
    sqnr = [measure.sqnr(a, b) for a, b in zip(run(exported, feed), run(exported, feed, optimize=False), strict=True)]
    assert min(sqnr) > 25  # a few codes of activations fall on the other side


@pytest.mark.parametrize("form", FORMS)
def test_engine_reports_and_runs_all_forms(form):
    for make in (grouped, dead_channels):
        model = make()
        result = quantize(
            model, {**FORMS[form], "pass": [SUB, {"use": "round", "seconds": 0}]}, feeds(model, 5), workers=1, verify=True
        )
        json.dumps(result.report)
        assert distance(model, result, feeds(model, 5, seed=1)) > 8
        told = result.report["steps"][0]["result"]
        assert told["layers"] and bool(told["multipliers"]) == (form != "tiles")


@pytest.mark.parametrize(("key", "value"), [("rounds", -1), ("positions", 0), ("limit", 15)])
def test_parameters_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        SubLayer(**{key: value})


def test_wide_layers_are_searched_on_their_blocks():
    """A limit below D: diagonal blocks alone serve; still no worse than the default by the whole measure, on average."""
    gains = []
    for seed in range(5):
        net = Net(["N", 64], seed)
        model = net.model(net.gemm(net.op("Relu", net.gemm("x", 64, 40)), 40, 12))
        job = make_job(model, {"target": "storage", "weights": {"bits": 3, "block": [4, 8]}}, n=40)
        complete_ranges(job)
        open_plan = job.plan
        SubLayer(limit=32).apply(job)
        found, default = losses_of(job, (job.plan, open_plan))
        gains += list(np.log(found / default))
    assert np.mean(gains) < -0.05
