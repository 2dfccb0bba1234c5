"""Scales of tiles: nothing is clipped by two-level scales, searches are optimal where they say so, passes gain on graphs."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise, product

import numpy as np
import pytest

from onnxq_plugins import measure, quantize
from onnxq_plugins.export import qdq
from onnxq_plugins.graph import load
from onnxq_plugins.layers.blocks import _by_row, _by_tile, row_steps, search
from onnxq_plugins.layers.complete import complete, complete_ranges, complete_weight
from onnxq_plugins.layers.problem import Problem, float_inputs, solvable
from onnxq_plugins.passes import Round, SubLayer, VectorScale
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.solvers.gram import narrow, row_loss
from onnxq_plugins.solvers.scales import search_scales
from onnxq_plugins.spec import QuantSpec, fake, solve_minmax
from tests.jobs import distance, make_job
from tests.zoo import ZOO, Net, cnn, dead_channels, feeds, grouped, mobilenet, run, slowly, some

TILES = {"target": "storage", "weights": {"bits": 4, "block": [4, 4]}}
TWO_LEVEL = {"weights": {"bits": 4, "block": "tensor", "sub_block": [4, 4]}}
VECTORS = {"weights": {"bits": 4, "block": "channel", "sub_block": [1, 4]}}
FORMS = {"tiles": TILES, "two-level": TWO_LEVEL, "vectors": VECTORS}
NAMES = ["cnn", "mobilenet", "grouped", "mlp", "transformer", "conv1d", "dead_channels", "odd_channels"]
SUB = {"use": "sub-layer"}


@pytest.fixture(autouse=True)
def unjudged(request, monkeypatch):
    """Scales as they are found: whole networks decide only where a test is about that."""
    if "judge" not in request.node.name:
        monkeypatch.setattr(Judge, "of", lambda *args, **more: None)


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


@pytest.mark.parametrize(
    ("name", "form"),
    some(
        itertools.product(NAMES, FORMS),
        *itertools.product(("mlp", "odd_channels"), FORMS),
        *[("mobilenet", "tiles"), ("grouped", "two-level"), ("transformer", "vectors"), ("dead_channels", "tiles")],
    ),
)
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


@pytest.mark.parametrize("form", ["two-level", *slowly("tiles", "vectors")])
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


@pytest.mark.parametrize(
    ("name", "form"),
    some(
        itertools.product(["cnn", "grouped", "mlp", "transformer", "odd_channels"], FORMS),
        *(("odd_channels", form) for form in FORMS),
        *[("grouped", "two-level"), ("mlp", "tiles"), ("transformer", "vectors")],
    ),
)
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
        report = result.report["steps"][0]["result"]
        assert report["layers"] and bool(report["multipliers"]) == (form != "tiles")


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


@pytest.mark.parametrize("better", [True, False])
def test_the_judge_decides_whether_the_scales_stay(better, monkeypatch):
    model = mobilenet()
    answers = iter([25.0, 20.0] if better else [20.0, 25.0])
    monkeypatch.setattr(Judge, "each", lambda *args: np.full(4, next(answers)))
    job = make_job(model, TILES)
    result = SubLayer().apply(job)
    assert result["sqnr"].keys() == {"searched", "covering"}
    assert any(spec.solved for name, spec in job.plan.items() if job.graph.is_constant(name)) == better
    assert bool(job.report.notes) != better
