"""mixed-precision: budgets are kept, and what they cost is found."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, audit_model, load, quantize, runtimes
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.metrics import metric, worst_sqnr
from onnxq_plugins.measure.networks import Measure
from onnxq_plugins.passes.mixed_precision import MixedPrecision
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.quantizers import Width, multiply_adds, parse_widths
from onnxq_plugins.search.widths import ALONE, Widths
from tests.jobs import make_job
from tests.search.searches import SMALL, make_widths, recipe_of, search
from tests.zoo import ZOO, Net, cnn, feeds, mlp, mobilenet, slowly, some

FLOAT = Width(32, 32)


def outputs(model, samples, optimize=True):
    return runtimes.outputs(runtimes.session(model, optimize=optimize), samples)


def activations(graph: Graph, plan) -> set[str]:
    return {name for name in plan if not graph.is_constant(name)}


def plan_cost(job: Job, plan) -> tuple[float, float]:
    """Size and bit operations of a plan, relative to 8 bits everywhere, from its entries alone."""
    work = multiply_adds(job.graph, next(iter(job.calibration.data)))
    size = bops = base_size = base = 0.0
    for layer in job.graph.layers:
        spec = plan[layer.weight]
        key = Planned(job.graph, plan, job.target).input(layer)
        size, base_size = size + spec.bits * spec.codes.size, base_size + 8 * spec.codes.size
        bops, base = bops + spec.bits * plan[key].bits * work[layer.name], base + 64 * work[layer.name]
    return size / base_size, bops / base


def way_down(points, key):
    """True if along a curve, widest first, the cost never rises."""
    return all(a[key] >= b[key] for a, b in pairwise(points))


@pytest.mark.parametrize(
    ("name", "budget"),
    some(
        itertools.product(SMALL, ("size", "bops")),
        *[("mobilenet", "size"), ("mlp", "size"), ("transformer", "bops"), ("inception", "bops")],
    ),
)
def test_budgets_on_cost_hold_for_the_plan(name, budget):
    job = make_job(ZOO[name](), {"target": "npu"})
    limit = 0.7
    told = search(job, candidates=("W3A8", "W4A8", "W6A8", "W8A8", "W8A16"), budget=budget, limit=limit, curve=4)
    found = dict(zip(("size", "bops"), plan_cost(job, job.plan), strict=True))
    assert found[budget] <= limit * (1 + 1e-9)
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    assert {key: pytest.approx(chosen[key], abs=1e-4) for key in found} == found
    assert way_down(told["curve"], budget)
    assert all(len(p["widths"]) == told["groups"] for p in told["curve"])
    json.dumps(told)


@pytest.mark.parametrize("name", ["mobilenet", "mlp"])
def test_the_int8_budget_is_never_below_int8(name):
    """Smaller, or at least more accurate, than the nearest codes of 8 bits; those themselves where nothing is."""
    job = make_job(ZOO[name](), {})
    told = search(job, candidates=("W4A8", "W8A8"), budget="int8", limit=0.0, cost="size")
    plain = max(told["nearest"].values())
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    kept = any("which was kept" in note for note in job.report.notes)
    assert kept or chosen["sqnr"] >= plain - 0.01
    assert chosen["stored"] <= 1 and plan_cost(job, job.plan)[0] <= 1 + 1e-9
    beyond = make_job(ZOO[name](), {})
    told = search(beyond, candidates=("W4A8", "W8A8"), budget="int8", limit=60.0, cost="size")
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    assert chosen["size"] == 1 and any("not 60 more" in note for note in beyond.report.notes)


@pytest.mark.parametrize("name", ["mobilenet", "mlp", "transformer", *slowly("cnn", "inception", "resnet20")])
def test_budgets_on_accuracy_hold_on_the_measured_samples(name):
    job = make_job(ZOO[name](), {"target": "npu"})
    told = search(job, candidates=("W3A8", "W8A8", "W8A16"), budget="sqnr", limit=38.0)
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    assert chosen["sqnr"] >= 38
    # fewer than 16 samples: rounded and measured on the same ones, so the final plan is the measured one
    measure = Measure(job.graph, job.target, list(job.calibration.data))
    assert measure.score(job.plan) == pytest.approx(chosen["sqnr"], abs=2e-3)
    assert chosen["bops"] < max(p["bops"] for p in told["curve"])


@pytest.mark.parametrize("order", ["noise", "sqnr"])
def test_the_way_down_never_rises_in_any_cost(order):
    job = make_job(mobilenet(), {"target": "npu"})
    from onnxq_plugins.passes.mixed_precision import _Search

    parameters = {"candidates": ("W4A8", "W8A8", "W4A16", "W8A16", "float"), "method": "nearest", "order": order}
    found = _Search(MixedPrecision(**parameters), job, worst_sqnr)
    found.widths.round("nearest", job.calibration.data)
    ranked = found.sensitivities()
    assert [s for s, _, _ in ranked] == sorted((s for s, _, _ in ranked), reverse=True)
    path = found.path(ranked)
    prices = [found.widths.cost(choice) for choice in path]
    for a, b in pairwise(prices):
        assert b.size <= a.size and b.bops <= a.bops and a != b
    for a, b in pairwise(path):
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1
    ends = [found.widths.cost(tuple(min(o, key=lambda w: w.weights * w.activations) for o in found.widths.options))]
    assert prices[-1] == ends[0]
    if order == "noise":  # the first change is the cheapest in noise for what it saves
        noise = {(i, w): 10 ** (-db / 10) for db, i, w in ranked}
        rates = {}
        for (i, w), value in noise.items():
            price = found.widths.cost((*path[0][:i], w, *path[0][i + 1 :]))
            if price.size <= prices[0].size and price.bops < prices[0].bops:
                rates[i, w] = (value - noise[i, path[0][i]]) / (prices[0].bops - price.bops)
        (first,) = ((i, w) for i, w in enumerate(path[1]) if w != path[0][i])
        assert rates[first] == min(rates.values())
    else:  # the list is worked off from its front
        changed = [next((i, w) for i, (old, w) in enumerate(zip(a, b, strict=True)) if w != old) for a, b in pairwise(path)]
        at = [[(i, w) for _, i, w in ranked].index(change) for change in changed]
        assert at == sorted(at)


def test_one_candidate_is_a_homogeneous_plan():
    model, samples = mobilenet(), feeds(mobilenet(), 6)
    mixed = quantize(model, recipe_of(candidates=["W4A8"], limit=1.0), samples, workers=1)
    plain = quantize(
        model,
        {"weights": {"bits": 4}, "pass": [{"use": "round", "method": "nearest", "sequential": False, "seconds": 0}]},
        samples,
        workers=1,
    )
    assert set(mixed.plan) == set(plain.plan)
    for name, spec in plain.plan.items():
        assert spec.bits == mixed.plan[name].bits
        assert np.array_equal(spec.scale, mixed.plan[name].scale)
        if spec.codes is not None:
            assert np.array_equal(spec.codes, mixed.plan[name].codes)
    report = mixed.report["steps"][0]["result"]
    assert report["sensitivities"] == [] and len(report["curve"]) == 1


@pytest.mark.parametrize("method", ["gptq", *slowly("attention")])
def test_one_seed_one_plan(method):
    recipe = recipe_of("npu", candidates=["W3A8", "W8A8", "W8A16"], budget="sqnr", limit=35.0, method=method)
    one, two = (quantize(mlp(), recipe, feeds(mlp(), 20), workers=n, seed=3) for n in (1, 2))
    assert one.model.SerializeToString() == two.model.SerializeToString()
    assert one.report["steps"][0]["result"] == two.report["steps"][0]["result"]


@pytest.mark.parametrize("name", ["mobilenet", "mlp", "transformer", *slowly("cnn", "inception", "resnet20")])
def test_the_whole_way_on_an_npu(name):
    model = ZOO[name]()
    result = quantize(
        model,
        recipe_of("npu", candidates=["W4A8", "W8A8", "W8A16"], budget="sqnr", limit=40.0),
        feeds(model, 6),
        workers=1,
        verify=True,
    )
    onnx.checker.check_model(result.model, full_check=True)
    json.dumps(result.report)
    samples = feeds(model, 6)
    assert worst_sqnr(outputs(model, samples), outputs(result.model, samples)) > 38
    assert worst_sqnr(outputs(result.model, samples, False), outputs(result.model, samples)) > 60


def test_candidates_that_the_target_cannot_run_are_left_out():
    widths = make_widths(mobilenet(), ("W4A8", "W8A16", "W8A8"))  # one of its groups has no layer
    expected = {True: (Width(8, 8), Width(4, 8)), False: (Width(8, 8),)}
    assert all(options == expected[bool(group.layers)] for group, options in zip(widths.groups, widths.options, strict=True))
    assert {w.activations for o in make_widths(cnn(), ("W8A16", "W8A8"), {"target": "npu"}).options for w in o} == {8, 16}
    with pytest.raises(OnnxqError, match="runs none of W8A16") as error:
        quantize(cnn(), recipe_of(candidates=["W8A16"]), feeds(cnn(), 4))
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["ort-cpu", "storage"])
def test_weight_only_layers_are_searched(target):
    net = Net(["N", 4, 64])
    model = net.model(net.linear(net.op("Relu", net.linear("x", 64, 32)), 32, 32))
    recipe = {
        "weights": {"bits": 4, "block": 16},
        "activations": {"bits": 32},
        **recipe_of(target, candidates=["W4A8", "W8A8"]),
    }
    result = quantize(model, recipe, feeds(model, 6), workers=1)
    assert sorted(spec.bits for spec in result.plan.values()) == [4, 8]
    widths = make_widths(model, ("W4A8", "W8A8"), {key: recipe[key] for key in ("target", "weights", "activations")})
    assert widths.cost((Width(8, 8),) * 2).bops == 4 * (64 * 32 + 32 * 32) * 8 * 32  # inputs are float


def test_a_budget_out_of_reach_names_the_least():
    with pytest.raises(OnnxqError, match=r"size cannot fall to 0\.3 .* have 0\.500"):
        quantize(cnn(), recipe_of(limit=0.3), feeds(cnn(), 4))


def test_without_data_is_one_sentence():
    with pytest.raises(OnnxqError, match="--data"):
        quantize(mlp(), {"activations": {"bits": 32}, "weights": {"bits": 4, "block": 16}, **recipe_of()})


@pytest.mark.parametrize("source", ["fractals", *slowly("statistics", "noise")])
def test_behind_data_free(source):
    recipe = recipe_of(limit=0.75)
    recipe["pass"].insert(0, {"use": "data-free", "source": source, "samples": 8})
    result = quantize(mobilenet(), recipe, workers=1)
    bits = [s.bits for s in result.plan.values() if s.codes is not None for _ in range(s.codes.size)]
    assert 4 <= np.mean(bits) <= 6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("candidates", ["W8"]),
        ("candidates", []),
        ("metric", "top1"),
        ("samples", 0),
        ("curve", -1),
        ("strategy", "best"),
        ("budget", "time"),
    ],
)
def test_parameters_are_checked(key, value):
    with pytest.raises(OnnxqError):
        quantize(mlp(), recipe_of(**{key: value}), feeds(mlp(), 2))
    with pytest.raises(ValueError, match="unknown"):
        metric("os.system")


def test_a_drop_from_a_perfect_sqnr_is_no_budget():
    with pytest.raises(OnnxqError, match="agreement"):
        quantize(mlp(), recipe_of(budget="metric", metric="sqnr"), feeds(mlp(), 2))


def test_nothing_to_search_is_no_error():
    model = ZOO["no_layer"]()
    for budget in ("size", "bops", "sqnr", "metric"):
        quantize(model, recipe_of(budget=budget, metric="agreement", limit=20.0), feeds(model, 4))


@pytest.mark.parametrize("size", range(2, 9))
def test_a_budget_that_is_just_met_is_met(size):
    """A share of the bits, times the bits, may be a little less in floats."""
    net = Net(["N", 10])
    model = net.model(net.gemm(net.gemm("x", 10, size), size, size, trans_b=0))
    job = make_job(model, {"layer": [{"position": "last", "weights": {"bits": 8}}]}, n=1)
    limit = (10 * 4 + size * 8) / (10 * 8 + size * 8)
    search(job, candidates=("W4A8",), limit=limit, curve=0)
    assert plan_cost(job, job.plan)[0] == pytest.approx(limit)


def test_biases_fit_beside_8_bit_inputs_where_the_recipe_has_wider_ones():
    net = Net(["N", 16])
    weight = net.rng.normal(size=(12, 16))
    weight[3] *= 1e-9
    model = net.model(net.op("Gemm", "x", net.constant(weight), net.constant(np.full(12, 5.0)), transB=1))
    job = make_job(model, {"target": "npu", "activations": {"bits": 16}})
    search(job, candidates=("W8A8",), limit=1.0)
    chosen = job.plan
    complete(job)
    assert all(np.array_equal(job.plan[name].scale, chosen[name].scale) for name in chosen)


def test_widened_scales_are_counted_once():
    model = ZOO["conv_transpose"]()
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.shape == (8, 6, 2, 2):
            values[:, 1] *= 1e-12
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    told = []
    for candidates in (["W8A8"], ["W4A8", "W6A8", "W8A8"]):
        job = make_job(model, {"target": "storage"})
        search(job, candidates=tuple(candidates), limit=1.0)
        complete(job)
        told.append(job.report.get("widened", {}))
    assert told[0] == told[1] != {}


@pytest.mark.parametrize("name", ["mobilenet", "mlp", "transformer", *slowly("cnn", "resnet20")])
def test_float_is_taken_where_kernels_allow_it(name):
    model = ZOO[name]()
    job = make_job(model)
    widths = Widths(job, parse_widths(["float", "W8A8"]), feeds(model, 1)[0])
    free = [FLOAT in options for options in widths.options]
    assert free[0]  # the input of the network is always free
    for group, options in zip(widths.groups, widths.options, strict=True):
        convs = [a for a in group.activations if (m := maker_of(job.graph, a)) is not None and m.op == "Conv"]
        assert FLOAT not in options or not convs
    result = quantize(model, recipe_of(candidates=["float", "W8A8"], budget="sqnr", limit=150.0), feeds(model, 6), workers=1)
    layers = {y for group, f in zip(widths.groups, free, strict=True) if f for y in group.layers}
    assert set(result.report["floats"]) == layers
    kernels = {entry.name: entry for entry in audit_model(result.model).layers}
    for layer in job.graph.layers:
        assert kernels[layer.name].quantized == (layer.name not in layers), layer.name
        assert (layer.weight in result.plan) == (layer.name not in layers)
    samples = feeds(model, 3, seed=1)
    assert worst_sqnr(outputs(result.model, samples, False), outputs(result.model, samples)) > 60


@pytest.mark.parametrize("budget", ["sqnr", "metric"])
def test_strategies_agree_where_scores_fall_steadily(budget):
    found = {}
    for strategy in ("brute", "binary", "interpolation", "hybrid"):
        job = make_job(mlp())
        told = search(
            job,
            candidates=("W2A8", "W4A8", "W8A8"),
            budget=budget,
            limit=28.0 if budget == "sqnr" else 60.0,
            strategy=strategy,
            metric="sqnr" if budget == "sqnr" else "agreement",
            curve=0,
        )
        (chosen,) = (p for p in told["curve"] if p.get("chosen"))
        found[strategy] = chosen["widths"], len(told["curve"])
    assert len({json.dumps(widths) for widths, _ in found.values()}) == 1
    assert found["brute"][1] == 7  # the widest, and two steps for each of three groups
    assert found["binary"][1] < 7 and found["hybrid"][1] < 7


def test_an_accuracy_budget_is_not_met_by_rounding_numbers_for_the_report():
    job = make_job(mlp())
    first = search(job, candidates=("W8A8", "W4A8"), budget="sqnr", limit=0.0, strategy="brute")
    exact = Measure(job.graph, job.target, list(job.calibration.data)).score(job.plan)
    (chosen,) = (p for p in first["curve"] if p.get("chosen"))
    for limit in (exact + 1e-5, exact + 4e-4):
        again = search(make_job(mlp()), candidates=("W8A8", "W4A8"), budget="sqnr", limit=limit, strategy="brute")
        (other,) = (p for p in again["curve"] if p.get("chosen"))
        assert other["widths"] != chosen["widths"]


def test_an_accuracy_that_none_reaches_is_told():
    job = make_job(mlp())
    told = search(job, candidates=("W4A8", "W8A8"), budget="sqnr", limit=190.0)
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    assert set(chosen["widths"].values()) == {"W8A8"}
    assert any("even the widest" in note for note in job.report["notes"])


def test_shifts_of_a_pass_before_are_kept():
    recipe = {"weights": {"block": "tensor"}, **recipe_of("per-tensor", candidates=["W4A8", "W8A8"])}
    recipe["pass"].insert(0, {"use": "shift-equalize"})
    shifted = quantize(mobilenet(), recipe, feeds(mobilenet(), 6), workers=1)
    assert {s.bits for s in shifted.plan.values() if s.codes is not None} == {4, 8}
    assert all((s.multiplier is not None) == (s.codes is not None) for s in shifted.plan.values())


@pytest.mark.parametrize("behind", [[], [{"use": "bias-correct"}]])
def test_what_comes_behind_keeps_the_widths(behind):
    result = quantize(mobilenet(), recipe_of(behind=behind, limit=0.7), feeds(mobilenet(), 6), workers=1, verify=True)
    (chosen,) = (p for p in result.report["steps"][0]["result"]["curve"] if p.get("chosen"))
    layers = {y.name: y for y in load(mobilenet()).layers}
    for name, width in chosen["widths"].items():
        if name in layers:
            assert result.plan[layers[name].weight].bits == Width.parse(width).weights


def test_the_search_rounds_on_half_and_the_result_on_all(monkeypatch):
    seen, measured = [], []
    whole = Widths.round

    def spy(self, method, data, only=None):
        seen.append([feed["x"].tobytes() for feed in data])
        whole(self, method, data, only)

    monkeypatch.setattr(Widths, "round", spy)
    start = Measure.__init__
    monkeypatch.setattr(
        Measure,
        "__init__",
        lambda self, graph, target, samples, *rest, **more: (
            measured.append([feed["x"].tobytes() for feed in samples.feeds]),
            start(self, graph, target, samples, *rest, **more),
        )[1],
    )
    samples = feeds(mlp(), 40)
    job = make_job(mlp(), n=40)
    search(job, samples=32)
    half, everything = seen
    assert len(half) == 16 and len(measured[0]) == 16 and not set(half) & set(measured[0])
    assert everything == [feed["x"].tobytes() for feed in samples]
    taken = {feed["x"].tobytes() for feed in job.calibration.data.spread(32)}
    assert {*half, *measured[0]} == taken


def test_a_mixed_network_is_no_worse_than_a_homogeneous_one_of_its_cost():
    job = make_job(ZOO["resnet20"](), n=32)
    told = search(job, candidates=("W4A8", "W6A8", "W8A8"), budget="bops", limit=0.75, method="gptq")
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    alone = search(make_job(ZOO["resnet20"](), n=32), candidates=("W6A8",), budget="bops", limit=0.75, method="gptq")
    assert chosen["sqnr"] >= alone["curve"][0]["sqnr"]


def test_a_bit_of_one_groups_weights_is_worth_6_db():
    widths = make_widths(cnn(), tuple(f"W{n}A16" for n in range(3, 9)), {"target": "npu"})
    measure = Measure(widths.job.graph, ALONE, list(widths.job.calibration.data), coded=widths.coded)
    for number in range(len(widths.groups)):
        db = [measure.score(widths.plan({number: Width(n, 16)})) for n in range(3, 9)]
        assert np.all(np.diff(db) > 2) and 4.5 < np.diff(db).mean() < 7.5


def test_a_model_that_insists_on_its_batch_size_is_searched():
    """Samples are put into batches once: not those that are batches already."""
    net = Net([4, 13])
    model = net.model(net.gemm(net.op("Relu", net.gemm("x", 13, 24)), 24, 7))
    result = quantize(model, {"pass": [{"use": "mixed-precision", "limit": 0.8}]}, feeds(model, 9), workers=1)
    report = result.report["steps"][0]["result"]
    assert report["groups"] == 2 and min(point["size"] for point in report["curve"]) <= 0.8
