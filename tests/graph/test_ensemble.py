"""Sums of networks as one graph."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import measure
from onnxq_plugins.graph import load
from onnxq_plugins.graph.ensemble import side_by_side, unfit
from tests.zoo import ZOO, Net, feeds, kinds, run

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


def thirds(graph, seed=0):
    """Each weight in three random parts."""
    rng, made = np.random.default_rng(seed), {}
    for layer in graph.layers:
        weight = graph.constant(layer.weight)
        first, second = ((weight * rng.random(weight.shape) / n).astype(np.float32) for n in (1, 4))
        made[layer.name] = [first, second, weight - first - second]
    return made


@pytest.mark.parametrize("name", kinds(FIT, "mlp", "prelu"))
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


@pytest.mark.parametrize("name", kinds(FIT, "mlp", "prelu"))
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
        "with other tensors": lambda: net.op("Concat", y, "x", axis=1),
        "another shape": lambda: net.op("Add", net.op("GlobalAveragePool", y), net.weight(1, 4, 6, 6)),
        "move values": lambda: net.op("Pad", y, net.constant([0, 0, 1, 1] * 2, np.int64), net.constant(1.0)),
        "body": lambda: None,
    }[what]()
    return net.model(y)


@pytest.mark.parametrize(
    "what",
    [
        "Sqrt",
        "product of two",
        "divides by",
        "Divs",
        "map 0 to 0",
        "with other tensors",
        "another shape",
        "move values",
        "body",
    ],
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
