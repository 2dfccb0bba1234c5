"""Orders of channels: costs equal slow loops, swaps never lose, the pass keeps the function and gains at wide ranges."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import quantize
from onnxq_plugins.graph import channel_groups
from onnxq_plugins.job import Report
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import Reorder
from onnxq_plugins.passes.reorder import _tile, _view
from onnxq_plugins.solvers.order import View, _State, sort_channels, swap_channels, total_cost
from onnxq_plugins.spec import QuantSpec, fake, solve_minmax
from tests.passes.test_round import distance, make_job
from tests.zoo import ZOO, Net, cnn, examples, feeds, mlp, mobilenet, resnet20, run

seeds = st.integers(0, 2**32 - 1)
TWO_LEVEL = {"weights": {"bits": 4, "block": "tensor", "sub_block": [4, 4]}}
MOVING = ["mobilenet", "resnet20", "grouped", "inception", "cnn", "transformer", "conv1d", "odd_channels", "mlp"]
ORDERED = {**TWO_LEVEL, "pass": [{"use": "reorder"}]}


# ---- the solver -----------------------------------------------------------------------------------------------------


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


# ---- views of a graph ----------------------------------------------------------------------------------------------------


def tiled(job):
    return {y.weight: (y, block) for y in job.graph.layers if y.weight in job.plan and (block := _tile(job, y)) is not None}


def slow_tiles(job, layer, block, power, only=None):
    """Sum over tiles of a weight, or of some of its rows, of max |w|^2 times the mean squares that each output meets."""
    w = np.abs(job.graph.constant(layer.weight).astype(np.float64))
    w = np.moveaxis(w, (layer.out_axis, layer.in_axis), (0, 1)).reshape(w.shape[layer.out_axis], w.shape[layer.in_axis], -1)
    rows, columns = (block[axis] or n for axis, n in ((layer.out_axis, w.shape[0]), (layer.in_axis, w.shape[1])))
    per_group, total = w.shape[0] // layer.groups, 0.0
    start, stop = only or (0, w.shape[0])
    for o in range(start // rows * rows, stop, rows):
        for i in range(0, w.shape[1], columns):
            within = range(max(o, start), min(o + rows, stop))
            part = w[within.start : within.stop, i : i + columns]
            met = sum(power[r // per_group, i : i + columns].sum() for r in within)
            total += part.max() ** 2 * met
    return total


@pytest.mark.parametrize("tile", [[4, 4], [2, 3]])
@pytest.mark.parametrize("name", MOVING)
def test_views_cost_what_their_tiles_do(name, tile):
    """Every view of a weight, from either side, counts the whole weight; from the inputs of one group its rows."""
    job = make_job(ZOO[name](), {"weights": {**TWO_LEVEL["weights"], "sub_block": tile}})
    known, seen = tiled(job), 0
    power = Reorder()._power(job, [y for y, _ in known.values()])
    for group in channel_groups(job.graph, "permute"):
        for member in group.weights:
            made = member.tensor in known and _view(job.graph, member, *known[member.tensor], power[member.tensor])
            if made:
                wanted = slow_tiles(
                    job, *known[member.tensor], power[member.tensor], member.rows if member.role == "input" else None
                )
                assert made.cost(np.arange(group.size)) == pytest.approx(wanted, rel=1e-9)
                seen += 1
    assert seen


# ---- the pass ----------------------------------------------------------------------------------------------------------


@lru_cache
def reordered(name):
    model = ZOO[name]()
    return model, quantize(model, {**ORDERED, "pass": [{"use": "reorder"}]}, feeds(model, 3), workers=1, verify=True)


@pytest.mark.parametrize("name", ZOO)
def test_the_engine_finds_no_drift(name):
    _, result = reordered(name)
    entry = result.report["steps"][0]
    assert entry["drift"] < 1e-5
    told = entry["result"]
    assert json.loads(json.dumps(result.report)) and (told["groups"] > 0) == (name != "no_layer")
    if told["groups"]:
        assert 0 < told["cost_of_tiles"] <= 1


@pytest.mark.parametrize("name", ZOO)
def test_the_float_function_stays_for_any_seed(name):
    model = ZOO[name]()
    feed = feeds(model, 1, seed=5)[0]
    for seed in range(3):
        job = make_job(model, TWO_LEVEL, n=2)
        job.rng, job.report = np.random.default_rng(seed), Report(notes=[])
        wanted = run(job.graph, feed)
        Reorder(sweeps=3).apply(job)
        assert drift(wanted, run(job.graph, feed)) < 1e-5


@pytest.mark.parametrize("name", MOVING)
def test_weights_move_and_their_tiles_cost_less(name, monkeypatch):
    """The sum over all tiles, with the mean squares of the data, falls; and the mean squares that were carried along are
    those that the rewritten graph has."""
    carried = []
    power_of = Reorder._power
    monkeypatch.setattr(Reorder, "_power", lambda *a: carried.append(power_of(*a)) or carried[-1])
    job = make_job(ZOO[name](), TWO_LEVEL)
    known = tiled(job)
    layers = [y for y, _ in known.values()]
    before = sum(slow_tiles(job, *known[n], power) for n, power in power_of(Reorder(), job, layers).items())
    old = {n: job.graph.constant(n).copy() for n in known}
    Reorder().apply(job)
    assert any(not np.array_equal(job.graph.constant(n), w) for n, w in old.items())
    assert all(np.array_equal(np.sort(job.graph.constant(n), axis=None), np.sort(w, axis=None)) for n, w in old.items())
    fresh = power_of(Reorder(), job, layers)
    for n in known:
        np.testing.assert_allclose(carried[0][n], fresh[n], rtol=1e-3)
    assert sum(slow_tiles(job, *known[n], fresh[n]) for n in known) < before


@pytest.mark.parametrize("data", [True, False])
def test_without_data_all_inputs_count_alike(data):
    recipe = {"target": "storage", "activations": {"bits": 32}, **ORDERED, "pass": [{"use": "reorder", "data": data}]}
    result = quantize(cnn(), recipe, None, workers=1, verify=True)
    job = make_job(cnn(), {k: v for k, v in recipe.items() if k != "pass"})
    Reorder(data=False).apply(job)
    moved = quantize(job.graph, {k: v for k, v in recipe.items() if k != "pass"}, None, workers=1)
    assert result.report["steps"][0]["drift"] < 1e-5 and result.report["steps"][0]["result"]["groups"]
    for name, spec in result.plan.items():
        np.testing.assert_array_equal(spec.codes, moved.plan[name].codes)


@pytest.mark.parametrize("weights", [{"bits": 8}, {"bits": 4, "block": "channel", "sub_block": [1, 500]}, {"bits": 4}])
def test_nothing_to_do_is_told_and_leaves_the_graph(weights):
    job = make_job(mobilenet(), {"weights": weights})
    digest, job.report = job.graph.digest(), Report(notes=[])
    assert Reorder().apply(job) == {"groups": 0} and job.graph.digest() == digest and not job.graph.touched
    assert len(job.report["notes"]) == 1 and "nothing to do" in job.report["notes"][0]
    result = quantize(mobilenet(), {"weights": weights, "pass": [{"use": "reorder"}]}, feeds(mobilenet(), 2), workers=1)
    assert any("nothing to do" in note for note in result.report["notes"])


def test_what_was_solved_for_the_old_order_is_dropped():
    """Law L5: scales found before the channels moved belong to other channels."""
    model = resnet20()
    results = [
        quantize(model, {**TWO_LEVEL, "pass": steps}, feeds(model, 4), workers=1, seed=3)
        for steps in ([{"use": "sub-layer"}, {"use": "reorder"}], [{"use": "reorder"}])
    ]
    moved = [
        name
        for name, spec in results[0].plan.items()
        if spec.sub_block and not np.array_equal(spec.multiplier, results[1].plan[name].multiplier)
    ]
    kept = [name for name, spec in results[0].plan.items() if spec.sub_block]
    assert len(moved) < len(kept)  # those are the default's scales again; a layer that did not move may keep its own


def test_sorting_alone_moves_less_than_swapping_gains():
    costs = []
    for sweeps in (0, 3):
        job = make_job(resnet20(), TWO_LEVEL)
        costs.append(Reorder(sweeps=sweeps).apply(job)["cost_of_tiles"])
    assert costs[1] < costs[0] <= 1
    with pytest.raises(ValueError, match="sweeps"):
        Reorder(sweeps=-1)


def test_the_same_seed_gives_the_same_order():
    digests = set()
    for seed in (0, 0):
        job = make_job(mlp(), TWO_LEVEL)
        job.rng = np.random.default_rng(seed)
        Reorder().apply(job)
        digests.add(job.graph.digest())
    assert len(digests) == 1


def spread_out(seed, spread):
    """Three convolutions whose channels have wide log-normal ranges, each undone by the next layer."""
    rng = np.random.default_rng(seed)
    net = Net(["N", 4, 8, 8], seed)
    sizes = [(24, 4), (24, 24), (8, 24)]
    factors = [np.exp(spread * rng.normal(size=24)) for _ in range(2)]
    x = "x"
    for n, (cout, cin) in enumerate(sizes):
        weight, bias = net.rng.normal(size=(cout, cin, 3, 3)) / np.sqrt(9 * cin), net.rng.normal(size=cout) / 4
        if n < 2:
            weight, bias = weight * factors[n][:, None, None, None], bias * factors[n]
        if n > 0:
            weight = weight / factors[n - 1][:, None, None]
        x = net.op("Conv", x, net.constant(weight), net.constant(bias), pads=[1] * 4)
        x = net.op("Relu", x) if n < 2 else x
    return net.model(x)


@pytest.mark.parametrize("solver", [[], [{"use": "sub-layer"}]])
@pytest.mark.parametrize("form", [{"target": "storage", "weights": {"bits": 4, "block": [4, 4]}}, TWO_LEVEL])
def test_reordering_gains_where_ranges_are_wide(form, solver):
    gains = []
    for seed in range(4):
        model = spread_out(seed, 1.5)
        recipe = {**form, "target": "storage", "activations": {"bits": 32}}
        results = [
            quantize(model, {**recipe, "pass": steps + solver}, feeds(model, 6), workers=1)
            for steps in ([], [{"use": "reorder"}])
        ]
        before, after = (distance(model, result, feeds(model, 6, seed=1)) for result in results)
        gains.append(after - before)
    assert min(gains) > 0 and np.mean(gains) > (2 if form is not TWO_LEVEL else 0.2)  # multipliers span a factor of 15


@pytest.mark.parametrize(("before", "noted"), [([], False), (["ranges"], False), (["sub-layer"], True)])
def test_what_was_solved_for_weights_before_is_told(before, noted):
    model = ZOO["cnn"]()
    made = quantize(model, {**TWO_LEVEL, "pass": [{"use": name} for name in (*before, "reorder")]}, feeds(model, 2))
    assert any("put it before those passes" in note for note in made.report["notes"]) == noted


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "resnet20", "transformer"])
def test_ranges_chosen_before_stay(name):
    """A range per tensor does not depend on the order of its channels."""
    model, steps = ZOO[name](), [{"use": "ranges", "method": "percentile", "percentile": 90.0}, {"use": "reorder"}]
    first, both = (quantize(model, {**TWO_LEVEL, "pass": passes}, feeds(model, 4)) for passes in (steps[:1], steps))
    ranges = [
        {n: s.scale.item() for n, s in made.plan.items() if s.block is None and s.codes is None} for made in (first, both)
    ]
    assert ranges[0] == ranges[1] and ranges[0]
