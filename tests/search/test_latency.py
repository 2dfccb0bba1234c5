"""What groups take, measured: whose time each kernel's is, sums, the cache; no test looks at a clock."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, quantize, runtimes
from onnxq_plugins.search import latency
from onnxq_plugins.search.quantizers import Width, parse_widths
from onnxq_plugins.search.widths import Widths
from tests.jobs import make_job
from tests.search.searches import make_widths, recipe_of, search
from tests.zoo import ZOO, Net, feeds, mlp, mobilenet, transformer

CANDIDATES = ("W4A8", "W8A8", "float")
FLOAT, EIGHT = Width(32, 32), Width(8, 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No more rounds than needed."""
    turns, profile = latency.interleaved, latency.profile
    monkeypatch.setattr(latency, "interleaved", lambda runners, feed, seconds, most=100: turns(runners, feed, 0.0, most))
    monkeypatch.setattr(latency, "profile", lambda models, feed, seconds: profile(models, feed, 0.0))


def fake(taken):
    """A profile in which the time of each node is told by a function of (node, number of its network), in milliseconds, with
    nothing added by profiling."""

    def profile(models, feed, seconds):
        made = []
        for k, model in enumerate(models):
            graph = optimized(model)
            nodes = np.array([taken(node, k) for node in graph.node])
            made.append(latency.Profile(float(nodes.sum()), graph, nodes, ["t"] * len(nodes)))
        return made, 7

    return profile


def optimized(model: onnx.ModelProto) -> onnx.GraphProto:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        runtimes.session(model, dump=Path(folder) / "made.onnx")
        return onnx.load(str(Path(folder) / "made.onnx")).graph


def by_operator(node, k):
    """Integer kernels are four times as fast as float ones."""
    return {
        "QGemm": 1.0,
        "QLinearConv": 1.0,
        "QLinearMatMul": 1.0,
        "MatMulIntegerToFloat": 1.0,
        "Gemm": 4.0,
        "MatMul": 4.0,
        "FusedGemm": 4.0,
        "Conv": 4.0,
        "FusedConv": 4.0,
        "QuantizeLinear": 0.25,
    }.get(node.op_type, 0.125)


# ---- what profiling adds ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 20)), min_size=1, max_size=30), st.floats(0.01, 1))
def test_overhead_makes_the_sum_what_it_should_be(parts, share):
    durations, ports = (np.array(side, float) for side in zip(*parts, strict=True))
    total = share * durations.sum()
    extra = latency.overhead(durations, ports, total)
    assert extra >= 0
    assert np.maximum(durations - extra * ports, 0).sum() == pytest.approx(total, rel=1e-6, abs=1e-9)


def test_nothing_is_taken_off_where_nothing_was_added():
    assert latency.overhead(np.array([1.0, 2.0]), np.ones(2), 5.0) == 0
    assert latency.overhead(np.zeros(3), np.ones(3), 0.0) == 0
    assert latency.overhead(np.array([5e-324]), np.ones(1), 0.0) >= 0


def test_typical_is_not_moved_by_disturbed_runs():
    quiet = np.full(50, 2.0)
    assert latency.typical(np.r_[quiet, np.full(100, 9.0)]) == 2.0
    assert latency.typical(np.array([3.0])) == 3.0


# ---- whose time it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "inception", "mlp", "transformer", "resnet20"])
@pytest.mark.parametrize("rank", [0, 1])
def test_kernels_of_layers_belong_to_the_groups_of_the_layers(name, rank):
    widths = make_widths(ZOO[name](), CANDIDATES)
    model = widths.exported(tuple(options[min(rank, len(options) - 1)] for options in widths.options))
    graph = optimized(model)
    found = latency.owners(widths.groups, widths.coded, model.graph, graph)
    assert len(found) == len(graph.node)
    of = {node.name: owner for node, owner in zip(graph.node, found, strict=True)}
    ran = latency.kernels(model.graph, graph)
    for i, group in enumerate(widths.groups):
        for layer in group.layers:
            assert of[ran[layer].name] == i
    heavy = {"Conv", "FusedConv", "QLinearConv", "Gemm", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul"}
    assert all(owner is not None for node, owner in zip(graph.node, found, strict=True) if node.op_type in heavy)
    # whatever onnxruntime made of it, a Quantize leads to the first kernel that reads its codes, which is of its group
    readers = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, node)
    for node, owner in zip(graph.node, found, strict=True):
        if node.op_type == "QuantizeLinear" and name in ("mlp", "transformer"):
            while node.op_type in ("QuantizeLinear", "Reshape", "Transpose"):
                node = readers[node.output[0]]
            assert of[node.name] == owner


def test_a_quantize_behind_a_float_layer_is_that_layers():
    """Its integer kernel would have written codes itself."""
    net = Net(["N", 4, 8, 8])
    model = net.model(net.conv(net.conv("x", 4, 6), 6, 5))
    widths = make_widths(model, CANDIDATES)
    assert widths.options[0][0] == FLOAT and FLOAT not in widths.options[1]
    exported = widths.exported((FLOAT, EIGHT, *(options[0] for options in widths.options[2:])))
    graph = optimized(exported)
    found = latency.owners(widths.groups, widths.coded, exported.graph, graph)
    assert [o for node, o in zip(graph.node, found, strict=True) if node.op_type == "QuantizeLinear"][:1] == [0]


# ---- sums ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "inception", "mlp", "transformer", "resnet20"])
def test_groups_add_up_to_the_networks_they_were_learned_from(name, monkeypatch):
    """Also where kernels of groups that kept their width became slower, or kernels belong to no group."""
    widths = make_widths(ZOO[name](), CANDIDATES)
    monkeypatch.setattr(latency, "profile", fake(by_operator))
    times = widths.time(next(iter(widths.job.calibration.data)))
    assert times.rounds == 7
    for measured, predicted in times.networks:
        assert predicted == pytest.approx(measured)
    for own, options in zip(times.groups, widths.options, strict=True):
        assert set(options) <= set(own) and all(value >= 0 for value in own.values())
    assert widths.eight.latency == pytest.approx(times.networks[0][0])
    price = widths.prices("latency")
    for choice in itertools.islice(itertools.product(*widths.options), 20):
        expected = sum(p[options.index(w)] for p, options, w in zip(price, widths.options, choice, strict=True))
        assert widths.cost(choice).latency == pytest.approx(expected)
        assert widths.shares(choice)["latency"] == pytest.approx(expected / times.networks[0][0])


def test_widths_that_run_the_same_kernels_cost_the_same(monkeypatch):
    """Clocks that tell otherwise are noise."""
    rng = np.random.default_rng(0)
    widths = make_widths(mlp(), ("W4A8", "W6A8", "W8A8"))
    monkeypatch.setattr(latency, "profile", fake(lambda node, k: by_operator(node, k) * rng.uniform(0.5, 2)))
    times = widths.time(next(iter(widths.job.calibration.data)))
    for own in times.groups:
        assert len(own) == 3
        assert np.ptp(list(own.values())) < 1e-9


def test_more_than_kernels_account_for_is_counted(monkeypatch):
    widths = make_widths(mlp(), CANDIDATES)
    whole = fake(by_operator)

    def slow(models, feed, seconds):
        ran, rounds = whole(models, feed, seconds)
        return [latency.Profile(one.milliseconds + 3, one.optimized, one.nodes, one.types) for one in ran], rounds

    monkeypatch.setattr(latency, "profile", whole)
    feed = next(iter(widths.job.calibration.data))
    before = widths.time(feed)
    monkeypatch.setattr(latency, "profile", slow)
    after = widths.time(feed)
    assert [b - a for (a, _), (b, _) in zip(before.networks, after.networks, strict=True)] == pytest.approx([3, 3, 3])
    assert [p for _, p in after.networks] == pytest.approx([m for m, _ in after.networks])


@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer", "mobilenet"])
def test_a_real_profile_covers_the_network(name):
    widths = make_widths(ZOO[name](), CANDIDATES)
    feed = next(iter(widths.job.calibration.data))
    choices = [tuple(options[k if k < len(options) else 0] for options in widths.options) for k in range(2)]
    models = [widths.exported(choice) for choice in choices]
    ran, rounds = latency.profile(models, feed, 0.0)
    assert rounds >= 5
    for one in ran:
        assert one.milliseconds > 0 and len(one.nodes) == len(one.types) == len(one.optimized.node)
        assert not np.isnan(one.nodes).any() and (one.nodes >= 0).all() and all(one.types)
    times = widths.time(feed)
    assert all(value >= 0 for own in times.groups for value in own.values())
    assert sum(own[w] for own, w in zip(times.groups, widths.eight_bits, strict=True)) == pytest.approx(times.networks[0][1])
    assert times.networks[0][1] > 0


# ---- the cache -----------------------------------------------------------------------------------------------------------


def test_times_are_kept_on_this_machine(tmp_path, monkeypatch):
    sessions = []
    profile = latency.profile
    monkeypatch.setattr(
        latency, "profile", lambda models, feed, seconds: (sessions.append(len(models)), profile(models, feed, seconds))[1]
    )

    def timed():
        job = make_job(mlp())
        job.calibration.cache = tmp_path / "cache"
        widths = Widths(job, parse_widths(CANDIDATES), next(iter(job.calibration.data)))
        widths.round("nearest", job.calibration.data)
        return widths.time(next(iter(job.calibration.data)))

    first = timed()
    assert timed() == first and sessions == [3]
    (file,) = (tmp_path / "cache").glob("latency-*.json")
    good = json.loads(file.read_text())
    bad = [
        "",
        "{",
        "[]",
        "null",
        json.dumps({**good, "groups": good["groups"][1:]}),
        json.dumps({**good, "groups": [{**g, "W8A8": -1.0} for g in good["groups"]]}),
        json.dumps({**good, "groups": [{**g, "W8A8": float("nan")} for g in good["groups"]]}),
        json.dumps({**good, "groups": [{"W8A8": 1.0} for _ in good["groups"]]}),
        json.dumps({"groups": good["groups"]}),
    ]
    for n, text in enumerate(bad):
        file.write_text(text)
        timed()
        assert len(sessions) == n + 2
    file.write_bytes(b"\xff\xfe\x00")
    timed()
    assert len(sessions) == len(bad) + 2
    monkeypatch.setattr(latency, "machine_name", lambda: "another one")
    timed()
    assert len(sessions) == len(bad) + 3 and len(list((tmp_path / "cache").glob("latency-*"))) == 2


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OnnxqError, match="--cache"):
        latency._save(tmp_path / "file" / "x.json", latency.Times((), (), 1))


# ---- the pass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.99, 1.0, 1.3, 1.7, 9.0])
def test_a_budget_on_latency_is_kept(limit, monkeypatch):
    monkeypatch.setattr(latency, "profile", fake(by_operator))
    job = make_job(transformer())
    told = search(job, candidates=CANDIDATES, budget="latency", limit=max(limit, 1.0))
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    assert chosen["latency"] <= max(limit, 1.0) + 1e-4
    assert told["latency"]["predicted"] == pytest.approx(chosen["latency"], abs=1e-4)
    assert {"measured", "error_percent", "ms", "ms_of_8_bits", "machine", "rounds"} <= set(told["latency"])
    json.dumps(told)
    assert "W4A8" not in chosen["widths"].values()  # no faster than W8A8, only worse
    if limit == 9.0:
        assert set(chosen["widths"].values()) == {"float"}
    latencies = [p["latency"] for p in told["curve"]]
    assert latencies == sorted(latencies, reverse=True)


def test_more_latency_is_never_worse_by_the_noise_that_is_chosen_by(monkeypatch):
    monkeypatch.setattr(latency, "profile", fake(by_operator))
    floats = []
    for limit in (1.0, 1.2, 1.5, 2.0, 9.0):
        job = make_job(transformer())
        told = search(job, candidates=("W8A8", "float"), budget="latency", limit=limit, curve=0)
        noise = {(s["group"], s["width"]): 10 ** (-s["sqnr"] / 10) for s in told["sensitivities"]}
        (chosen,) = (p for p in told["curve"] if p.get("chosen"))
        floats.append(sum(noise.get(pair, 0.0) for pair in chosen["widths"].items()))
    assert floats == sorted(floats, reverse=True)


def test_latency_falls_until_the_network_is_just_accurate_enough(monkeypatch):
    monkeypatch.setattr(latency, "profile", fake(by_operator))
    settings = {"candidates": ("W8A8", "float"), "budget": "sqnr", "cost": "latency", "strategy": "brute"}
    fastest = search(make_job(transformer()), limit=0.0, **settings)["curve"][-1]
    assert fastest["chosen"] and fastest["latency"] == 1 and set(fastest["widths"].values()) == {"W8A8"}
    limit = fastest["sqnr"] + 1
    told = search(make_job(transformer()), limit=limit, **settings)
    (chosen,) = (p for p in told["curve"] if p.get("chosen"))
    assert chosen["sqnr"] >= limit and set(chosen["widths"].values()) == {"float", "W8A8"}
    assert all(p["sqnr"] < limit for p in told["curve"] if p["latency"] < chosen["latency"])


def test_a_latency_out_of_reach_names_the_least(monkeypatch):
    monkeypatch.setattr(latency, "profile", fake(by_operator))
    with pytest.raises(OnnxqError, match=r"latency cannot fall to 0\.5 .* fastest candidates have 1\.000"):
        quantize(mlp(), recipe_of(budget="latency", limit=0.5), feeds(mlp(), 4))


@pytest.mark.parametrize("target", ["openvino", "npu", "storage", "per-tensor"])
def test_other_runtimes_cannot_be_timed_here(target):
    recipe = {"weights": {"block": "tensor"}, **recipe_of(target, candidates=["W8A8"], budget="latency", limit=1.0)}
    with pytest.raises(OnnxqError, match=f"onnxruntime.*{target}.*bops") as error:
        quantize(mlp(), recipe, feeds(mlp(), 2))
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)


def test_without_a_candidate_of_8_bits(monkeypatch):
    monkeypatch.setattr(latency, "profile", fake(by_operator))
    told = search(make_job(mlp()), candidates=("W4A8",), budget="latency", limit=1.0)
    assert told["curve"][0]["latency"] == 1


def test_weight_only_layers_are_timed():
    net = Net(["N", 4, 64])
    model = net.model(net.linear(net.op("Relu", net.linear("x", 64, 32)), 32, 32))
    recipe = {
        "weights": {"bits": 4, "block": 16},
        "activations": {"bits": 32},
        **recipe_of(candidates=["W4A8", "W8A8", "float"], budget="latency", limit=100.0),
    }
    report = quantize(model, recipe, feeds(model, 6), workers=1).report["steps"][0]["result"]
    assert report["latency"]["measured"] > 0 and len(report["latency"]["networks"]) == 3


def test_nothing_to_time_is_no_error():
    model = ZOO["no_layer"]()
    quantize(model, recipe_of(budget="latency"), feeds(model, 4))


def test_without_that_budget_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(latency, "interleaved", None)
    told = search(make_job(mobilenet()), candidates=("W4A8", "W8A8"))
    assert "latency" not in told and all("latency" not in p for p in told["curve"])
