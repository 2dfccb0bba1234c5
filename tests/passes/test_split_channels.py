"""Unlike channels get grids of their own up to the next operator that mixes them, exactly and in integer kernels."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import audit_model, quantize
from onnxq_plugins.graph import load
from onnxq_plugins.graph.channelwise import channelwise, split_through
from onnxq_plugins.measure import drift, sqnr
from onnxq_plugins.solvers.chains import Grid, best_cut
from onnxq_plugins.spec import QuantSpec
from tests.zoo import Net, feeds, run

CHANNELS = 12


def silu(net, x):
    return net.op("Mul", x, net.op("Sigmoid", x))


def hardswish(net, x):
    return net.op("HardSwish", x)


def relu(net, x):
    return net.op("Relu", x)


def prelu(net, x):
    return net.op("PRelu", x, net.constant(net.rng.uniform(0.1, 0.3, (CHANNELS, 1, 1))))


def pooled(net, x):
    return net.op("AveragePool", silu(net, x), kernel_shape=[2, 2])


def stem(activation, wide=(3,), after=None, factor=60.0):
    """A convolution with wide channels, an activation, a depthwise layer that evens them out, and a dense one."""
    net = Net([1, 3, 16, 16])
    factors = np.ones(CHANNELS)
    factors[list(wide)] = factor
    weight = net.rng.normal(size=(CHANNELS, 3, 3, 3)) * factors[:, None, None, None] / 5
    y = activation(net, net.op("Conv", "x", net.constant(weight), net.weight(CHANNELS), pads=[1] * 4))
    if after is not None:
        return net.model(after(net, y))
    weight = net.rng.normal(size=(CHANNELS, 1, 3, 3)) / factors[:, None, None, None] / 3
    y = net.op("Conv", y, net.constant(weight), net.weight(CHANNELS), pads=[1] * 4, group=CHANNELS)
    return net.model(net.conv(activation(net, y), CHANNELS, 8, 1))


def recipe(*first):
    return {"pass": [*({"use": use} for use in first), {"use": "ranges"}]}


def quality(model, result, samples):
    return sqnr(*(np.concatenate([run(m, x, optimize=False)[0] for x in samples]) for m in (model, result.model)))


@pytest.mark.parametrize("wide", [(3,), (0, 1, 2), (4, 9)])
@pytest.mark.parametrize("activation", [silu, relu])
def test_channels_beside_wide_ones_keep_their_values(activation, wide):
    model = stem(activation, wide)
    samples, fresh = feeds(model, 8), feeds(model, 4, seed=1)
    plain, split = (quantize(model, recipe(*use), samples, verify=True, workers=1) for use in ((), ("split-channels",)))
    before, after = (quality(model, result, fresh) for result in (plain, split))
    assert after > before + 6, (before, after)
    ((name, row),) = split.report.steps[0]["result"]["layers"].items()
    assert name == "conv0" and sum(row["channels"]) == CHANNELS and row["sqnr_after"] > row["sqnr_before"] + 6
    audit = audit_model(split.model)
    assert all(layer.quantized for layer in audit.layers) and "Gather" not in audit.other
    assert not {"Sigmoid", "Mul"} & set(audit.other)
    assert sum("_part" in layer.name for layer in audit.layers) == 2 * len(row["channels"])


@pytest.mark.parametrize("activation", [silu, hardswish, relu, prelu, pooled])
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11]], [[11, 2, 5], [0, 1, 3, 4], [6, 7, 8, 9, 10]]])
def test_rewrite_is_exact(activation, parts):
    model = stem(activation)
    graph = load(model)
    layer = graph.layers[0]
    nodes, ends = channelwise(graph, layer.result, {node.name for node in graph.nodes})
    assert len(ends) == 1 and any(node.op == "Conv" for node in nodes)
    layers, pieces = split_through(graph, layer, parts, nodes)
    assert len(layers) == 2 * len(parts) and all(len(names) == len(parts) for names in pieces.values())
    assert sum(node.op == "Concat" for node in graph.nodes) == 1 and all(node.op != "Gather" for node in graph.nodes)
    for feed in feeds(model, 2):
        assert drift(run(model, feed), run(graph, feed)) < 1e-5


def test_rewrite_restores_the_order_for_other_readers():
    model = stem(silu, after=lambda net, y: net.op("Softmax", y, axis=1))
    graph = load(model)
    nodes, _ = channelwise(graph, graph.layers[0].result, {node.name for node in graph.nodes})
    split_through(graph, graph.layers[0], [[0, 2, 4], [1, 3, *range(5, 12)]], nodes)
    assert any(node.op == "Gather" for node in graph.nodes)
    feed = feeds(model, 1)[0]
    assert drift(run(model, feed), run(graph, feed)) < 1e-5


def left_alone():
    yield "channels alike", stem(silu, factor=1.0)
    yield "a dense layer reads them", stem(relu, after=lambda net, y: net.conv(y, CHANNELS, 4))
    yield "they stay wide", stem(silu, after=lambda net, y: net.conv(silu(net, y), CHANNELS, 4))


@pytest.mark.parametrize("model", [pytest.param(model, id=name) for name, model in left_alone()])
def test_others_stay_as_they_are(model):
    samples = feeds(model, 4)
    plain, split = (quantize(model, recipe(*use), samples, workers=1) for use in ((), ("split-channels",)))
    assert split.report.steps[0]["result"] == {"layers": {}} and split.model.graph == plain.model.graph


def test_a_rule_about_a_layer_keeps_it_whole():
    model = stem(silu)
    rules = {"layer": [{"match": "conv0", "weights": {"bits": 8}}]}
    result = quantize(model, {**recipe("split-channels"), **rules}, feeds(model, 4), workers=1)
    assert result.report.steps[0]["result"] == {"layers": {}}


# ---- prediction -----------------------------------------------------------------------------------------------------------

GRID = QuantSpec(symmetric=False)


def test_groups_follow_the_sizes_of_channels():
    size = np.array([1, 100, 1.1, 90, 1000, 0.9])
    cut = best_cut([Grid(-size, size, GRID)], [], np.full(6, 1 / 6), 3.0, 3)
    assert sorted(map(list, cut.groups)) == [[0, 2, 5], [1, 3], [4]] and cut.after > cut.before + 30
    np.testing.assert_array_equal(np.sort(np.concatenate(cut.groups)), np.arange(6))
    assert len(best_cut([Grid(-size, size, GRID)], [], np.full(6, 1 / 6), 3.0, 2).groups) == 2


def test_what_readers_do_not_weigh_or_stays_shared_is_not_split():
    size = np.array([1, 1, 1, 100.0])
    assert len(best_cut([Grid(-size, size, GRID)], [], np.array([0, 0, 0, 1.0]), 3.0, 3).groups) == 1
    grid = Grid(-size, size, GRID)
    assert len(best_cut([grid], [grid], np.full(4, 0.25), 6.0, 3).groups) == 1
    assert len(best_cut([grid], [], np.full(4, 0.25), 6.0, 3).groups) == 2
    assert len(best_cut([Grid(size[:1], size[:1], GRID)], [], np.ones(1), 6.0, 3).groups) == 1


@pytest.mark.parametrize("wrong", [{"gain": 0}, {"parts": 1}])
def test_parameters(wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        quantize(stem(relu), {"pass": [{"use": "split-channels", **wrong}]}, feeds(stem(relu), 1))
