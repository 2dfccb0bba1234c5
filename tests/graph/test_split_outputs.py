"""Splitting a layer by its output channels is exact."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins.graph import channel_groups, load, permute, split_outputs
from onnxq_plugins.graph.rewrites import splittable
from onnxq_plugins.measure import drift
from tests.zoo import ZOO, Net, batch, conv_transpose, feeds, grouped, kinds, mobilenet, run, slowly


def random_parts(channels, rng):
    """A partition into up to four parts, in any order."""
    labels = rng.integers(0, rng.integers(1, 5), channels)
    return [rng.permutation(np.flatnonzero(labels == c)) for c in rng.permutation(4) if (labels == c).any()]


@pytest.mark.parametrize("seed", [0, *slowly(1, 2)])
@pytest.mark.parametrize("name", kinds(ZOO, "mlp", "conv1d", "control_flow"))
def test_function_stays_when_layers_are_split(name, seed):
    model = ZOO[name]()
    graph, rng = load(model), np.random.default_rng(seed)
    for layer in [y for y in graph.layers if splittable(y)]:
        weight, parts = graph.constant(layer.weight), random_parts(layer.channels, rng)
        graph.touched.clear()
        made = split_outputs(graph, layer, parts)
        assert layer.weight in graph.touched and (layer.bias is None or layer.bias in graph.touched)
        assert layer.weight not in graph and layer.name not in {y.name for y in graph.layers}
        assert [y.name for y in made] == [f"{layer.name}_part{i + 1}" for i in range(len(parts))]
        for y, part in zip(made, parts, strict=True):
            assert (y.op, y.channels, y.out_axis) == (layer.op, len(part), layer.out_axis)
            assert y.groups == (1 if layer.groups == 1 else len(part)) and (y.bias is None) == (layer.bias is None)
            assert (y.result == y.output) == (layer.result == layer.output)
            np.testing.assert_array_equal(graph.constant(y.weight), weight.take(part, layer.out_axis))
    assert graph.outputs == load(model).outputs
    samples = feeds(model, 2)
    for feed in (*samples, *([batch(samples)] if model.graph.input[0].type.tensor_type.shape.dim[0].dim_param else [])):
        assert drift(run(model, feed), run(graph, feed)) < 1e-5
    for group in channel_groups(graph, "permute"):  # what a split leaves can still be moved
        permute(graph, group, rng.permutation(group.size))
    assert drift(run(model, samples[0]), run(graph, samples[0])) < 1e-4


def test_depth_multiplier_is_split():
    net = Net(["N", 3, 8, 8])
    model = net.model(net.conv(net.op("Relu", net.conv(net.op("Relu", net.conv("x", 3, 4)), 4, 12, groups=4)), 12, 3))
    graph = load(model)
    split_outputs(graph, graph.layers[1], [[11, 0, 3], [1, 2, 4, 5, 6], [7, 8, 9, 10]])
    feed = feeds(model, 1)[0]
    assert drift(run(model, feed), run(graph, feed)) < 1e-5


def ops(graph):
    return [node.op for node in graph.nodes]


def test_runs_need_no_gather():
    graph = load(mobilenet())
    depthwise = next(y for y in graph.layers if y.kind == "depthwise")
    before = ops(graph)
    split_outputs(graph, depthwise, np.split(np.arange(24), [5, 11]))
    assert ops(graph).count("Slice") == 3 and "Gather" not in ops(graph)
    assert ops(graph).count("Clip") == before.count("Clip") + 2  # the activation went into the parts
    dense = next(y for y in graph.layers if y.kind == "dense")
    split_outputs(graph, dense, [np.arange(3, 8), np.arange(3)])
    assert ops(graph).count("Gather") == 1


def test_statistics_follow_channels():
    """What `bias-correct` reads of folded BatchNormalizations, after a split and a permutation."""
    graph = load(mobilenet())
    layer = next(y for y in graph.layers if y.kind == "depthwise")
    group = next(g for g in channel_groups(graph, "permute") if layer.output in g.tensors)
    index = next(m.index.ravel() for m in group.members if m.tensor == layer.output)
    before, order = graph.batchnorms[layer.output].beta, np.random.default_rng(0).permutation(group.size)
    permute(graph, group, order)
    after = graph.batchnorms[layer.output].beta
    np.testing.assert_array_equal(after[index], before[index[order]])
    a, b = split_outputs(graph, graph.layer(layer.name), [np.arange(10, 24), np.arange(10)])
    np.testing.assert_array_equal(graph.batchnorms[a.output].beta, after[10:])
    np.testing.assert_array_equal(graph.batchnorms[b.output].beta, after[:10])
    assert layer.output not in graph.batchnorms


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [[0, 1, 2]],
        [range(8), [8]],
        [range(8), []],
        [range(7)],
        [range(8), [0]],
        [[[0, 1], [2, 3]], [4, 5, 6, 7]],
        [[-1, *range(7)]],
    ],
)
def test_what_is_no_partition_is_refused(parts):
    graph = load(grouped())
    digest = graph.digest()
    with pytest.raises(ValueError, match=r"'conv0'.* once"):
        split_outputs(graph, graph.layers[0], parts)
    assert graph.digest() == digest and not graph.touched


@pytest.mark.parametrize("make, op", [(grouped, "Conv"), (conv_transpose, "ConvTranspose")])
def test_what_cannot_be_split_is_refused(make, op):
    graph = load(make())
    layer = next(y for y in graph.layers if not splittable(y))
    assert layer.op == op
    with pytest.raises(ValueError, match=f"'{layer.name}'.*{op} cannot be split"):
        split_outputs(graph, layer, [np.arange(layer.channels)])
