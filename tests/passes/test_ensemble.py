"""Ensembles of an expansion: the networks are what their weights say, what is refused, what is told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, audit_model, measure, quantize
from onnxq_plugins.graph import load
from onnxq_plugins.graph.ensemble import side_by_side, unfit
from onnxq_plugins.passes import ResidualEnsemble
from onnxq_plugins.plan.values import bias_scale
from onnxq_plugins.solvers import expansion as solver
from onnxq_plugins.spec import QuantSpec
from tests.zoo import ZOO, Net, cnn, conv_transpose, feeds, mlp, resnet20, run, transformer

FIT = [
    "cnn",
    "mobilenet",
    "grouped",
    "inception",
    "mlp",
    "conv_transpose",
    "conv1d",
    "no_bias",
    "dead_channels",
    "odd_channels",
    "shared_weights",
    "prelu",
    "resnet20",
]


def recipe(groups=(2, 2), bits=4, **more):
    return {
        "weights": {"bits": bits},
        "pass": [{"use": "residual-ensemble", "groups": list(groups)}, {"use": "ranges"}],
        **more,
    }


def told(made):
    return next(step["result"] for step in made.report["steps"] if step["pass"] == "residual-ensemble")


def thirds(graph, seed=0):
    """Each weight in three random parts."""
    rng, made = np.random.default_rng(seed), {}
    for layer in graph.layers:
        weight = graph.constant(layer.weight)
        first, second = ((weight * rng.random(weight.shape) / n).astype(np.float32) for n in (1, 4))
        made[layer.name] = [first, second, weight - first - second]
    return made


# ---- the graph ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIT)
def test_the_sum_is_that_of_the_networks(name):
    """Each network, made by itself with its weights and, but for the first, without biases, and their sum."""
    model = ZOO[name]()
    graph = load(model)
    parts = thirds(graph)
    assert not unfit(graph, list(parts))
    maps, firsts = side_by_side(graph, parts)
    assert len(maps) == 2 and len(firsts) == len(graph.outputs)
    alone = []
    for m in range(3):
        one = load(model)
        for layer in one.layers:
            one.set_constant(layer.weight, parts[layer.name][m])
            if m and layer.bias is not None:
                one.set_constant(layer.bias, np.zeros_like(one.constant(layer.bias)))
        alone.append(one)
    for feed in feeds(model, 3):
        total = [np.sum(ys, axis=0) for ys in zip(*(run(one, feed) for one in alone), strict=True)]
        assert measure.drift(total, run(graph, feed)) < 1e-5
    weights = {y.weight for y in graph.layers}
    assert len(weights) == 3 * len(parts) and all(graph.layer(f"{n}_net2").bias is None for n in parts)


@pytest.mark.parametrize("name", FIT)
def test_networks_of_zeros_add_nothing(name):
    model = ZOO[name]()
    graph = load(model)
    weights = {y.name: graph.constant(y.weight) for y in graph.layers}
    side_by_side(graph, {n: [w, np.zeros_like(w)] for n, w in weights.items()})
    for feed in feeds(model, 3):
        assert measure.drift(run(model, feed), run(graph, feed)) < 1e-6


def test_one_layer_is_exact_whatever_its_parts():
    net = Net(["N", 12])
    y = net.op("Div", net.op("Mul", net.gemm("x", 12, 8), net.constant([[2.0] * 8])), net.constant(3.0))
    y = net.op("Concat", net.op("Add", y, net.weight(1, 8)), y, axis=1)
    model = net.model(net.op("Sub", net.weight(1, 16), y), net.op("Softmax", net.op("ReduceSum", y, keepdims=1)))
    graph = load(model)
    side_by_side(graph, thirds(graph, 1))
    for feed in feeds(model, 3):
        assert measure.drift(run(model, feed), run(graph, feed)) < 1e-5


def test_what_no_expanded_layer_reaches_is_computed_once():
    """Operators in front of the first expanded layer, whatever they are, and an input that is added behind it."""
    net = Net(["N", 12])
    x = net.op("Sigmoid", net.op("Sub", "x", net.weight(1, 12)))
    model = net.model(net.op("Add", net.gemm(x, 12, 12), x))
    graph = load(model)
    side_by_side(graph, thirds(graph))
    assert sum(node.op == "Sigmoid" for node in graph.nodes) == 1
    for feed in feeds(model, 3):
        assert measure.drift(run(model, feed), run(graph, feed)) < 1e-5


def test_layers_without_parts_have_their_weight_in_every_network():
    """Linear layers commute with sums: only the one with parts, which is the first, is taken apart."""
    net = Net(["N", 12])
    y = net.gemm(net.gemm("x", 12, 9), 9, 9)
    model = net.model(net.op("Identity", net.gemm(y, 9, 5)), y)  # an output that is read on
    graph = load(model)
    first = graph.layers[0].name
    side_by_side(graph, {first: thirds(graph)[first]})
    assert len(graph.layers) == 9
    for feed in feeds(model, 3):
        assert measure.drift(run(model, feed), run(graph, feed)) < 1e-5


def broken(what):
    net = Net(["N", 4, 6, 6])
    y = net.conv("x", 4, 4)
    y = {
        "Sqrt": lambda: net.op("Sqrt", net.op("Relu", y)),
        "product of two": lambda: net.op("Mul", y, y),
        "divides by": lambda: net.op("Div", y, net.op("Add", y, net.constant(9.0))),
        "Divs": lambda: net.op("Div", net.constant(1.0), y),
        "map 0 to 0": lambda: net.clip(y, 1.0, 2.0),
        "they do not": lambda: net.op("Concat", y, "x", axis=1),
        "another shape": lambda: net.op("Add", net.op("GlobalAveragePool", y), net.weight(1, 4, 6, 6)),
        "move values": lambda: net.op("Pad", y, net.constant([0, 0, 1, 1] * 2, np.int64), net.constant(1.0)),
        "body": lambda: None,
    }[what]()
    return net.model(y)


@pytest.mark.parametrize(
    "what",
    ["Sqrt", "product of two", "divides by", "Divs", "map 0 to 0", "they do not", "another shape", "move values", "body"],
)
def test_operators_in_the_way_are_named(what):
    model = ZOO["control_flow"]() if what == "body" else broken(what)
    graph = load(model)
    names = [y.name for y in graph.layers]
    assert what in unfit(graph, names)
    with pytest.raises(ValueError, match=what):
        side_by_side(graph, {n: [w, 0 * w] for n in names for w in [graph.constant(graph.layer(n).weight)]})
    for feed in feeds(model, 2):  # refused before anything is changed
        assert measure.drift(run(model, feed), run(graph, feed)) < 1e-6


# ---- the pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(2, 2), (1, 1, 1)])
@pytest.mark.parametrize("name", ["cnn", "mobilenet", "mlp", "inception", "resnet20", "prelu"])
def test_networks_run_as_integer_and_their_weights_are_orders(name, groups):
    model, samples = ZOO[name](), feeds(ZOO[name](), 4)
    made = quantize(model, recipe(groups), samples)
    json.dumps(made.report)
    count, graph = len(load(model).layers), load(model)
    assert told(made)["networks"] == len(groups) and told(made)["layers"] == count and not told(made)["left_alone"]
    kernels = [entry for entry in audit_model(made.model).layers if entry.constant_weight]
    assert len(kernels) == count * len(groups) and all(entry.quantized for entry in kernels)
    orders = 0
    for n, size in enumerate(groups):
        orders += size
        for layer in graph.layers:
            names = [layer.weight, *(f"{layer.weight}_net{m + 1}" for m in range(1, n + 1))]
            weight = graph.constant(layer.weight)
            left = np.abs(weight - solver.value([made.plan[name] for name in names]))
            bound = solver.bound(weight, [QuantSpec(4, block=made.plan[layer.weight].block)] * orders, np.array(orders))
            assert (left <= bound * (1 + 1e-4) + 1e-6 * np.abs(weight).max()).all()
    float_weights = {y.weight: made.graph.constant(y.weight) for y in made.graph.layers}
    for layer in graph.layers:
        parts = [float_weights[name] for name in float_weights if name.split("_net")[0] == layer.weight]
        np.testing.assert_allclose(np.sum(parts, axis=0), graph.constant(layer.weight), atol=1e-5)


def test_its_own_error_is_told():
    model, samples = resnet20(), feeds(resnet20(), 6)
    made = quantize(model, recipe((1, 1)), samples)
    own = np.mean([measure.sqnr(run(model, f)[0], run(made.float_model, f)[0]) for f in samples])
    assert told(made)["ensemble_db"] == pytest.approx(own, abs=0.01) and told(made)["samples"] == 6
    (note,) = [n for n in made.report["notes"] if "residual-ensemble" in n]
    assert f"reaches {own:.1f} dB" in note and made.report["steps"][0]["exact"] is False
    better = quantize(model, recipe((2, 2)), samples)
    assert told(better)["ensemble_db"] > own + 10
    blind = quantize(
        model,
        {"weights": {"bits": 4}, "target": "storage", "activations": {"bits": 32}, "pass": [{"use": "residual-ensemble"}]},
    )
    assert "ensemble_db" not in told(blind) and any(
        "its own error could not be measured" in n for n in blind.report["notes"]
    )


def test_scales_whose_product_underflows():
    """Each further network is so much smaller than the one before that products of its scales would be 0 in the end."""
    net = Net(["N", 16])
    graph = load(net.model(net.gemm("x", 16, 4)))
    tiny = QuantSpec(scale=np.array(1e-30, np.float32), zero_point=np.array(0))
    assert bias_scale(graph.layers[0], tiny, tiny) > 0


def test_layers_that_do_not_fold_are_the_same_in_every_network():
    model, samples = mlp(), feeds(mlp(), 4)
    made = quantize(model, recipe(layer=[{"position": "last", "weights": {"bits": 8}}]), samples)
    (reason,) = told(made)["left_alone"].values()
    assert "do not fold" in reason and told(made)["layers"] == 2
    last = made.graph.layers[-1].name.partition("_net")[0]
    same = [made.plan[y.weight] for y in made.graph.layers if y.name.startswith(last)]
    assert len(same) == 2 and np.array_equal(same[0].codes, same[1].codes)
    steps = [{"use": "vector-scale"}, {"use": "residual-ensemble"}]
    solved = quantize(model, {"weights": {"bits": 4}, "pass": steps}, samples)
    assert told(solved)["networks"] == 1 and all("solved" in why for why in told(solved)["left_alone"].values())
    assert any("still one network" in n for n in solved.report["notes"])


def test_a_softmax_at_the_end_stays_behind_the_sum():
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    model = net.model(net.op("Softmax", net.head(x, 8), axis=-1))
    made = quantize(model, recipe(), feeds(model, 4))
    ops = [n.op_type for n in made.model.graph.node]
    assert ops.count("Softmax") == 1
    for f in feeds(model, 2):
        assert run(made.model, f)[0].sum() == pytest.approx(1, abs=1e-5)


def test_further_passes_serve_every_network():
    model, samples = conv_transpose(), feeds(conv_transpose(), 4)
    steps = [{"use": "ranges"}, {"use": "residual-ensemble", "groups": [1, 1]}, {"use": "bias-correct"}]
    made = quantize(model, {"weights": {"bits": 4}, "pass": steps}, samples)
    shifted = {name for name, spec in made.plan.items() if spec.shift is not None and np.abs(spec.shift).max() > 1e-7}
    last = {y.weight for y in made.graph.layers if y.name.endswith("_net2") and y.weight in made.plan and y.op == "Conv"}
    assert shifted == last  # the first network lies on its grid


def test_other_operators_are_refused_in_one_sentence():
    model = transformer()
    with pytest.raises(OnnxqError, match=r"LayerNormalization '.*' of a sum.*use residual-expansion"):
        quantize(model, recipe(), feeds(model, 2))
    assert quantize(cnn(), recipe(), feeds(cnn(), 2)).model.graph.node


@pytest.mark.parametrize(
    ("given", "why"), [({"groups": (2,)}, "groups"), ({"groups": (1, 0)}, "groups"), ({"samples": -1}, "samples")]
)
def test_parameters_are_checked(given, why):
    with pytest.raises(ValueError, match=why):
        replace(ResidualEnsemble(), **given)
