"""Scales of tiles on arrays: what covers everything, and what a search finds."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.solvers.gram import row_loss
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
from tests.zoo import examples

seeds = st.integers(0, 2**32 - 1)
BLOCKS = {"tensor": None, "channel": (1, 0)}


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
