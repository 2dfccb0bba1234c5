"""Orders of channels: costs equal slow loops, swaps never lose, the pass keeps the function and gains at wide ranges."""

from __future__ import annotations

import itertools
import json
from functools import lru_cache

import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.graph import channel_groups
from onnxq_plugins.job import Report
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import Reorder
from onnxq_plugins.passes.reorder import _tile, _view
from onnxq_plugins.search.judge import Judge
from tests.jobs import distance, make_job
from tests.zoo import ZOO, Net, cnn, feeds, kinds, mlp, mobilenet, resnet20, run, slowly, some

TWO_LEVEL = {"weights": {"bits": 4, "block": "tensor", "sub_block": [4, 4]}}
MOVING = ["mobilenet", "resnet20", "grouped", "inception", "cnn", "transformer", "conv1d", "odd_channels", "mlp"]
TILES = {"target": "storage", "weights": {"bits": 4, "block": [4, 4]}}
SUB = [{"use": "sub-layer"}]
ORDERED = {**TWO_LEVEL, "pass": [{"use": "reorder"}]}


@pytest.fixture(autouse=True)
def unjudged(request, monkeypatch):
    """Orders as they are found: whole networks decide only where a test is about that."""
    if "judge" not in request.node.name:
        monkeypatch.setattr(Judge, "of", lambda *args, **more: None)


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


@pytest.mark.parametrize("name", kinds(ZOO, "resnet20", "no_layer"))
def test_the_engine_finds_no_drift(name):
    _, result = reordered(name)
    entry = result.report["steps"][0]
    assert entry["drift"] < 1e-5
    report = entry["result"]
    assert json.loads(json.dumps(result.report)) and (report["groups"] > 0) == (name != "no_layer")
    if report["groups"]:
        assert 0 < report["cost_of_tiles"] <= 1


@pytest.mark.parametrize("name", kinds(ZOO, "odd_channels", "resnet20", "no_layer"))
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


@pytest.mark.parametrize(
    ("form", "solver"),
    some(itertools.product([TILES, TWO_LEVEL], [[], SUB]), (TILES, []), (TWO_LEVEL, SUB)),
)
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
    result = quantize(model, {**TWO_LEVEL, "pass": [{"use": name} for name in (*before, "reorder")]}, feeds(model, 2))
    assert any("put it before those passes" in note for note in result.report["notes"]) == noted


@pytest.mark.parametrize("name", ["cnn", "transformer", *slowly("mobilenet", "resnet20")])
def test_ranges_chosen_before_stay(name):
    """A range per tensor does not depend on the order of its channels."""
    model, steps = ZOO[name](), [{"use": "ranges", "method": "percentile", "percentile": 90.0}, {"use": "reorder"}]
    first, both = (quantize(model, {**TWO_LEVEL, "pass": passes}, feeds(model, 4)) for passes in (steps[:1], steps))
    ranges = [
        {n: s.scale.item() for n, s in made.plan.items() if s.block is None and s.codes is None} for made in (first, both)
    ]
    assert ranges[0] == ranges[1] and ranges[0]


@pytest.mark.parametrize("better", [True, False])
def test_the_judge_decides_whether_the_new_order_stays(better, monkeypatch):
    model = mobilenet()
    answers = iter([20.0, 25.0] if better else [25.0, 20.0])
    monkeypatch.setattr(Judge, "each", lambda *args: np.full(4, next(answers)))
    result, plain = (quantize(model, recipe, feeds(model, 6), workers=1) for recipe in (ORDERED, TWO_LEVEL))
    moved = any(
        not np.array_equal(result.graph.constant(y.weight), plain.graph.constant(y.weight)) for y in plain.graph.layers
    )
    assert moved == better == (not any("reorder lowers the outputs" in note for note in result.report.notes))
    assert set(result.report.steps[0]["result"]["sqnr"].values()) == {20.0, 25.0}
