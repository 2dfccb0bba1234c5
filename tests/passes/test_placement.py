"""Operators run in float where that is faster: the cut is the cheapest of all choices, the plan obeys it, files stay
small."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq_plugins import load, quantize, runtimes
from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.passes.placement import chosen
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.runtimes.costs import Costs, Kernel, tables
from onnxq_plugins.runtimes.speed import Speed
from onnxq_plugins.search.placement import Energy, Placer
from tests.zoo import Net, feeds

TABLE = tables()["avx512-vnni"]


def network(channels=12, size=96):
    """Depthwise layers of few channels, which are slow as integers, between dense ones, which are fast."""
    net = Net([1, 3, size, size])
    x = net.op("Relu", net.conv("x", 3, channels))
    for _ in range(3):
        x = net.op("Relu", net.conv(x, channels, channels, groups=channels))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    for _ in range(3):
        x = net.op("Relu", net.conv(x, channels, 128 if channels < 128 else channels))
        channels = 128
    return net.model(net.head(x, channels))


def made(model, *passes, **settings_):
    steps = [{"use": "placement", "check": False, "table": TABLE.name}] if not passes else list(passes)
    return quantize(model, {"pass": [*steps, {"use": "ranges"}], **settings_}, feeds(model, 4), workers=1)


def integer_layers(result):
    return {row["name"] for row in result.report.layers if "why_float" not in row}


def test_slow_kernels_run_in_float_and_fast_ones_as_integers():
    model = network()
    result, plain = made(model), made(model, {"use": "ranges"})
    depthwise = {y.name for y in result.graph.layers if y.kind == "depthwise"}
    dense = {y.name for y in result.graph.layers if y.op == "Conv" and y.kind == "dense" and y.shape[1] == 128}
    assert depthwise and not depthwise & integer_layers(result)
    assert dense and dense <= integer_layers(result)
    told = {row["name"]: row["why_float_kind"] for row in result.report.layers if "why_float" in row}
    assert {told[name] for name in depthwise} == {"slower"}
    assert any("run in float, where that is faster" in note for note in result.report.notes)
    order = [y.name for y in result.graph.layers]
    assert list(result.report.floats) == sorted(result.report.floats, key=order.index)
    assert integer_layers(plain) == {y.name for y in plain.graph.layers}


def test_weights_in_float_layers_stay_codes():
    model = network()
    result, plain = made(model), made(model, {"use": "ranges"})
    assert result.report.size("quantized") < plain.report.size("quantized") + 400
    for feed in feeds(model, 3, seed=1):
        y, z = (runtimes.session(m).run(None, dict(feed))[0] for m in (model, result.model))
        assert np.square(y - z).sum() < 1e-2 * np.square(y).sum()


def test_codes_are_learned_for_layers_in_float_that_read_codes():
    """Behind an integer layer that other integer layers read, too."""
    net = Net([1, 8, 32, 32])
    x = net.op("Relu", net.conv("x", 8, 64))
    wide, slow = net.conv(x, 64, 64), net.conv(x, 64, 4, 1)
    for _ in range(3):
        slow = net.op("Relu", net.conv(slow, 4, 4, groups=4))
    model = net.model(net.op("Concat", wide, slow, axis=1))
    placement = {"use": "placement", "check": False, "table": TABLE.name, "least": 0.0}
    result = made(model, placement, {"use": "ranges"}, {"use": "round"})
    floats = {row["name"] for row in result.report.layers if row.get("why_float_kind") == "slower"}
    assert floats and floats != {y.name for y in result.graph.layers}
    for feed in feeds(model, 2, seed=1):
        y, z = (runtimes.session(m).run(None, dict(feed))[0] for m in (model, result.model))
        assert np.square(y - z).sum() < 1e-2 * np.square(y).sum()


def test_a_pooling_between_floats_and_integers_works_on_floats(tmp_path):
    """onnxruntime moves Quantize in front of a MaxPool, which is slow on codes in plain order."""
    runtimes.session(made(network()).model, dump=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    (pool,) = [node for node in nodes if node.op_type == "MaxPool"]
    assert makers[pool.input[0]] != "QuantizeLinear"


def test_the_table_decides_alike_every_time():
    model = network()
    one, other = (made(model) for _ in range(2))
    assert one.model.SerializeToString() == other.model.SerializeToString()


def test_what_the_recipe_says_of_layers_is_kept():
    model = network()
    names = {y.name for y in load(model).layers if y.kind == "depthwise"}
    result = made(model, layer=[{"match": name, "quantize": True} for name in sorted(names)])
    assert names <= integer_layers(result)


def test_short_networks_and_other_targets_stay_as_they_are():
    small = network(size=12)
    assert made(small).report.steps[0]["result"] == {}
    assert made(network(), target="openvino").report.steps[0]["result"] == {}


def speed(ratio, low=None):
    return Speed(10.0, 10.0 / ratio, ratio, ratio - 0.01 if low is None else low, ratio + 0.01, 20)


def test_the_fastest_network_is_taken_and_of_equals_the_one_with_most_in_float():
    floats = {"integer": (), "placed": "ab", "float": "abcd"}
    assert chosen({"placed": speed(1.0), "integer": speed(0.8), "float": speed(0.9)}, floats) == "placed"
    assert chosen({"placed": speed(1.0), "integer": speed(0.8), "float": speed(0.98)}, floats) == "float"
    assert chosen({"placed": speed(1.0), "integer": speed(0.8), "float": speed(1.2)}, floats) == "float"
    assert chosen({"placed": speed(1.0), "integer": speed(1.2), "float": speed(0.9)}, floats) == "integer"
    assert chosen({"placed": speed(1.0), "integer": speed(1.2, 0.9), "float": speed(0.9)}, floats) == "placed"  # in doubt


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 7), st.integers(0, 10_000))
def test_a_cut_is_the_cheapest_of_all_choices(count, seed):
    rng = np.random.default_rng(seed)
    energy = Energy()
    for _ in range(count):
        energy.variable(*rng.integers(0, 20, 2).astype(float))
    for a, b in itertools.permutations(range(count), 2):
        if rng.random() < 0.4:
            energy.pairs[a, b] += float(rng.integers(0, 20))
    energy.rules = {(a, b) for a, b in itertools.combinations(range(count), 2) if rng.random() < 0.1}
    fixed = {0: int(rng.integers(2))} if rng.random() < 0.5 else {}
    allowed = [
        np.array(values)
        for values in itertools.product((0, 1), repeat=count)
        if all(values[v] == value for v, value in fixed.items())
        and not any(values[a] == 0 and values[b] == 1 for a, b in energy.rules)
    ]
    best = min(energy.of(values) for values in allowed)
    found = energy.minimize(fixed)
    assert any((found == values).all() for values in allowed)
    assert energy.of(found) == pytest.approx(best, abs=1e-3 * max(best, 1))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_no_other_choice_of_layers_is_cheaper(seed):
    """Against all choices for the layers of a small network, by the same energy."""
    rng = np.random.default_rng(seed)
    net = Net([1, 8, 32, 32])
    x = y = net.op("Relu", net.conv("x", 8, 16))
    for _ in range(3):
        groups = int(rng.choice([1, 16]))
        y = net.op("Relu", net.conv(y, 16, 16, groups=groups))
    model = net.model(net.op("Add", x, y))
    result = quantize(model, {"pass": [{"use": "ranges"}]}, feeds(model, 2), workers=1)
    placer = Placer(Planned(result.graph, result.plan, result.target), shapes_of(result.graph, feeds(model, 1)[0]), TABLE)
    layers = [placer.floats[y.name] for y in result.graph.layers]
    energies = []
    for choice in itertools.product((0, 1), repeat=len(layers)):
        values = placer.energy.minimize(dict(zip(layers, choice, strict=True)) | placer.fixed)
        energies.append(placer.energy.of(values))
    assert placer.place().predicted["placed"] == pytest.approx(min(energies), rel=1e-3)


def test_costs_are_positive_and_grow_with_size():
    for channels in (12, 16, 64):
        for groups, kind in ((1, "dense"), (channels, "depthwise")):
            weight = (channels, channels // groups, 3, 3)
            small, large = (Kernel("Conv", ((1, channels, n, n),), (1, channels, n, n), weight, groups) for n in (16, 64))
            for integer in (False, True):
                assert kind in small.kind(integer)
                assert 0 < TABLE.of(small, integer) < TABLE.of(large, integer)


def test_an_unknown_kernel_costs_what_an_addition_does():
    costs = Costs("mine", "", {"Add float": [1.0, 0, 0.5, 0, 0, 0, 0, 0], "Add int": [2.0, 0, 0, 0, 0, 0, 0, 0]})
    kernel = Kernel("Celu", ((1, 1000),), (1, 1000))
    assert costs.of(kernel) == pytest.approx(1.5) and costs.of(kernel, True) == pytest.approx(2.0)
