"""Channel groups and the exact rewrites on them: the function stays, and the groups are the expected ones."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from onnxq_plugins.graph import channel_groups, load, permute, replace_with_sum, rescale
from onnxq_plugins.measure import drift
from tests.zoo import (
    ZOO,
    Net,
    batch,
    examples,
    feeds,
    grouped,
    inception,
    kinds,
    mobilenet,
    resnet20,
    run,
    shared_weights,
    slowly,
)

KINDS = ["permute", "rescale"]


def shuffle(graph, kind, seed=0):
    """Apply a random permutation, or random factors, to every group; returns the number of groups."""
    rng = np.random.default_rng(seed)
    groups = channel_groups(graph, kind)
    for group in groups:
        if kind == "permute":
            permute(graph, group, rng.permutation(group.size))
        else:
            rescale(graph, group, np.exp(rng.uniform(-1.5, 1.5, group.size)))
    return len(groups)


def check(model, kind, seed=0):
    """`shuffle`, and check that the function stays; returns the graph and the number of groups."""
    graph = load(model)
    count = shuffle(graph, kind, seed)
    samples = feeds(model, 2)
    assert drift(run(model, samples[0]), run(graph, samples[0])) < 1e-4
    if model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        assert drift(run(model, batch(samples)), run(graph, batch(samples))) < 1e-4
    return graph, count


def names(model, kind):
    """The groups by the layers they include: sets of layer:role."""
    graph = load(model)
    owner = {c: layer for layer in graph.layers for c in (layer.weight, layer.bias) if c}
    return {
        frozenset(f"{owner[m.tensor].name}:{m.role}" for m in g.weights if m.tensor in owner): g
        for g in channel_groups(graph, kind)
    }


# ---- all models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", kinds(ZOO, "mlp", "resnet20", "control_flow", "no_layer"))
def test_function_stays(name, kind):
    graph, count = check(ZOO[name](), kind)
    assert bool(count) == (name != "no_layer" and (name, kind) != ("mobilenet", "rescale"))  # all behind Clip(0, 6)
    assert check(graph.model(), kind, seed=1)[1] == count  # groups do not depend on the values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_groups_are_well_formed(name, kind):
    """No place twice, no input or output, every index inside its axis."""
    graph = load(ZOO[name]())
    places = set()
    for group in channel_groups(graph, kind):
        assert group.kind == kind and group.size > 1 and group.weights and group.tensors
        assert not set(group.tensors) & {*graph.inputs, *graph.outputs}
        for m in group.members:
            assert m.index.shape[0] == group.size
            own = {(m.tensor, m.axis, m.role, m.rows, int(i)) for i in m.index.ravel()}
            assert len(own) == m.index.size and not own & places
            places |= own
            size = graph.shape(m.tensor)[m.axis] if m.rows is None or m.axis else m.rows[1] - m.rows[0]
            assert m.index.min() >= 0 and m.index.max() < size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "inception", "mlp", "conv1d", "resnet20", "prelu"])
def test_values_move_with_their_group(name, kind):
    """Not only the output stays: every activation of the group is permuted or scaled, channel by channel."""
    model = ZOO[name]()
    feed = feeds(model, 1)[0]
    graph = load(model)
    rng = np.random.default_rng(0)
    for group in channel_groups(graph, kind):
        before = fetch(graph, group.tensors, feed)
        if kind == "permute":
            order = rng.permutation(group.size)
            permute(graph, group, order)
        else:
            factors = np.exp(rng.uniform(-1, 1, group.size))
            rescale(graph, group, factors)
        after = fetch(graph, group.tensors, feed)
        for member in (m for m in group.members if not m.constant):
            old, new = (np.moveaxis(values[member.tensor], member.axis, 0) for values in (before, after))
            expected = old.copy()
            for c, at in enumerate(member.index):
                expected[at] = old[member.index[order[c]]] if kind == "permute" else old[at] * factors[c]
            np.testing.assert_allclose(new, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def fetch(graph, tensors, feed):
    """Values of some activations, by name."""
    model = graph.model()
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    return dict(zip(tensors, run(model, feed), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_touched_lists_every_change(kind):
    for make in ZOO.values():
        graph = load(make())
        tensors = {layer.weight for layer in graph.layers} | {y.bias for y in graph.layers if y.bias}
        before = {name: graph.constant(name).copy() for name in tensors}
        for group in channel_groups(graph, kind):
            graph.touched.clear()
            if kind == "permute":
                permute(graph, group, np.roll(np.arange(group.size), 1))
            else:
                rescale(graph, group, np.linspace(2, 3, group.size))
            assert set(group.tensors) <= graph.touched
            changed = {n for n in tensors if not np.array_equal(before[n], graph.constant(n))}
            assert changed <= graph.touched and changed
            before = {name: graph.constant(name).copy() for name in tensors}


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1], [0, 1, 3], [1, 2, 3], [0.0, 1.5, 2.0], [], [[0, 1, 2]]])
def test_orders_that_are_not_permutations_are_refused(order):
    net = Net(["N", 4])
    graph = load(net.model(net.gemm(net.op("Relu", net.gemm("x", 4, 3)), 3, 5)))
    digest = graph.digest()
    (group,) = channel_groups(graph, "permute")
    with pytest.raises(ValueError, match="permutation"):
        permute(graph, group, order)
    with pytest.raises(ValueError, match="rescale"):
        rescale(graph, group, [1, 2, 3])
    assert graph.digest() == digest and not graph.touched


@pytest.mark.parametrize("factors", [[1, 2], [1, 2, 0], [1, 2, -1], [1, 2, np.nan], [1, 2, np.inf], 2.0])
def test_factors_that_are_not_positive_are_refused(factors):
    net = Net(["N", 4])
    graph = load(net.model(net.gemm(net.op("Relu", net.gemm("x", 4, 3)), 3, 5)))
    (group,) = channel_groups(graph, "rescale")
    with pytest.raises(ValueError, match="factors"):
        rescale(graph, group, factors)
    with pytest.raises(ValueError, match="permutation"):
        permute(graph, group, [0, 1, 2])
    assert not graph.touched


# ---- expected groups -----------------------------------------------------------------------------------------


def test_residual_stream_ties_all_its_layers():
    groups = names(mobilenet(), "permute")
    stem, expand1, project1, expand2, project2, head = (y.name for y in load(mobilenet()).layers if y.kind == "dense")
    stream = groups[
        frozenset(
            {
                f"{stem}:output",
                f"{expand1}:input",
                f"{project1}:output",
                f"{expand2}:input",
                f"{project2}:output",
                f"{head}:input",
            }
        )
    ]
    assert stream.size == 8 and len(groups) == 3  # and two expansions


def test_depthwise_ties_permutations_but_not_factors():
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    x = net.op("Relu", net.conv(x, 8, 8, groups=8))
    model = net.model(net.conv(x, 8, 4))
    assert set(names(model, "permute")) == {frozenset({"conv0:output", "conv2:output", "conv4:input"})}
    assert set(names(model, "rescale")) == {
        frozenset({"conv0:output", "conv2:input"}),
        frozenset({"conv2:output", "conv4:input"}),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_grouped_conv_stay_in_their_group(kind):
    model = grouped()
    groups = channel_groups(load(model), kind)
    assert sorted(g.size for g in groups) == [4, 4, 6, 6, 9]
    for group in groups:
        for m in group.weights:
            if m.axis == 0 and m.role == "output" and m.rows is None and graph_rows(model, m) == 8:
                assert m.index.max() < 4 or m.index.min() >= 4


def graph_rows(model, member):
    return load(model).shape(member.tensor)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_concat_segments_are_separate(kind):
    graph = load(inception())
    after = next(n for n in graph.nodes if n.op == "Concat").outputs[0].name
    segments = [m.index.ravel() for g in channel_groups(graph, kind) for m in g.members if m.tensor == after]
    assert sorted((s.min(), s.max(), len(s)) for s in segments) == [(0, 5, 6), (6, 15, 10), (16, 22, 7)]


def test_residual_add_of_concats_ties_overlapping_segments():
    """Segments 6 + 10 added to segments 10 + 6: channels 6..9 are in the second of one and the first of the other."""
    net = Net(["N", 3, 8, 8])
    a = net.op("Concat", net.conv("x", 3, 6), net.conv("x", 3, 10), axis=1)
    b = net.op("Concat", net.conv("x", 3, 10), net.conv("x", 3, 6), axis=1)
    model = net.model(net.conv(net.op("Add", a, b), 16, 4))
    for kind in KINDS:
        graph, count = check(model, kind)
        assert count == 3 and sorted(g.size for g in channel_groups(graph, kind)) == [4, 6, 6]


def test_clip_at_six_stops_factors_alone():
    net = Net(["N", 3, 8, 8])
    x = net.clip(net.conv("x", 3, 8))
    model = net.model(net.conv(x, 8, 4))
    assert len(channel_groups(load(model), "permute")) == 1 and not channel_groups(load(model), "rescale")
    net = Net(["N", 3, 8, 8])
    x = net.op("Clip", net.conv("x", 3, 8), net.constant(0.0))
    assert len(channel_groups(load(net.model(net.conv(x, 8, 4))), "rescale")) == 1


@pytest.mark.parametrize(
    "op, count",
    [
        ("Relu", 1),
        ("LeakyRelu", 1),
        ("Abs", 1),
        ("Neg", 1),
        ("Sigmoid", 0),
        ("Tanh", 0),
        ("HardSwish", 0),
        ("Gelu", 0),
        ("Softplus", 0),
        ("Elu", 0),
    ],
)
def test_activations(op, count):
    net = Net(["N", 4, 6, 6])
    model = net.model(net.conv(net.op(op, net.conv("x", 4, 8)), 8, 4), opset=20)
    assert check(model, "permute")[1] == 1 and check(model, "rescale")[1] == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["Flatten", "Reshape"])
def test_flatten_gives_a_channel_all_its_positions(kind, how):
    net = Net(["N", 3, 4, 5])
    x = net.op("Relu", net.conv("x", 3, 8))
    flat = net.op("Flatten", x) if how == "Flatten" else net.op("Reshape", x, net.constant([0, -1], np.int64))
    model = net.model(net.gemm(flat, 160, 10))
    assert check(model, kind)[1] == 1
    (group,) = channel_groups(load(model), kind)
    index = next(m.index for m in group.members if m.tensor == flat)
    np.testing.assert_array_equal(index, np.arange(160).reshape(8, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_flatten_of_channels_last(kind):
    """Transposed before: the columns of a channel are not adjacent."""
    net = Net(["N", 3, 4, 5])
    x = net.op("Transpose", net.op("Relu", net.conv("x", 3, 8)), perm=[0, 2, 3, 1])
    flat = net.op("Flatten", x)
    model = net.model(net.gemm(flat, 160, 10))
    assert check(model, kind)[1] == 1
    (group,) = channel_groups(load(model), kind)
    index = next(m.index for m in group.members if m.tensor == flat)
    np.testing.assert_array_equal(index, np.arange(160).reshape(20, 8).T)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_are_pinned(kind):
    net = Net(["N", 3, 8, 8])
    hidden = net.op("Relu", net.conv("x", 3, 8))
    model = net.model(net.conv(hidden, 8, 4), hidden)
    assert not channel_groups(load(model), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_shortcut_of_resnet20(kind):
    """The 8 channels of the stream are added to channels 4..11 of the 16; the other 8 are free among themselves."""
    graph, _ = check(resnet20(), kind)
    add = [n for n in graph.nodes if n.op == "Add"][1].outputs[0].name
    places = [sorted(m.index.ravel().tolist()) for g in channel_groups(graph, kind) for m in g.members if m.tensor == add]
    assert sorted(places) == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]


def test_layernorm_ties_permutations_and_absorbs_factors_behind():
    net = Net(["N", 5, 8])
    x = net.linear("x", 8, 12)
    y = net.op("LayerNormalization", x, net.weight(12), net.weight(12), axis=-1)
    model = net.model(net.linear(y, 12, 6))
    graph, count = check(model, "permute")
    assert count == 1
    (group,) = channel_groups(graph, "permute")
    first, last = graph.layers
    assert {first.weight, last.weight} < {m.tensor for m in group.weights}
    graph, count = check(model, "rescale")
    assert count == 1 and first.weight not in {m.tensor for m in channel_groups(graph, "rescale")[0].weights}


def test_transformer_groups():
    """The stream; the channels that both heads share; the hidden channels of the feed-forward part."""
    sizes = sorted(g.size for g in channel_groups(load(ZOO["transformer"]()), "permute"))
    assert 16 in sizes and 24 in sizes


# ---- targeted graphs ------------------------------------------------------------------------------------------------


def split_uneven(net):
    x = net.op("Relu", net.conv("x", 4, 12))
    a = net.op("Split", x, net.constant([5, 7], np.int64), outputs=2, axis=1)
    return net.op("Add", net.conv(a, 5, 4), net.conv(f"{a}_1", 7, 4))


def split_tied(net):
    """Both halves are added, so that channels c and c + 6 move together."""
    x = net.op("Relu", net.conv("x", 4, 12))
    a = net.op("Split", x, outputs=2, axis=1, num_outputs=2)
    return net.conv(net.op("Add", a, f"{a}_1"), 6, 4)


def sliced(net):
    x = net.op("Relu", net.conv("x", 4, 12))
    at = [net.constant([v], np.int64) for v in (3, 9, 1)]
    return net.op("Add", net.conv(net.op("Slice", x, *at), 6, 4), net.conv(x, 12, 4))


def sliced_backwards(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    at = [net.constant([v], np.int64) for v in (-1, -(2**63), 1, -2)]
    return net.conv(net.op("Slice", x, *at), 4, 4)


def sliced_from_the_end(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    at = [net.constant([v], np.int64) for v in (-5, 2**63 - 1, -3)]
    return net.op("Add", net.conv(net.op("Slice", x, *at), 5, 4), net.conv(x, 8, 4))


def gathered(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    x = net.op("Add", x, net.op("Gather", x, net.constant([1, 0, 2, 3, 5, 4, 7, 6], np.int64), axis=1))
    return net.conv(x, 8, 4)


def gathered_twice(net):
    x = net.op("Relu", net.conv("x", 4, 4))
    return net.conv(net.op("Gather", x, net.constant([0, 0, 1, 3, 2, 3], np.int64), axis=1), 6, 4)


def gathered_after_flatten(net):
    """The positions of the second half of the channels are reversed."""
    x = net.op("Flatten", net.op("Relu", net.conv("x", 4, 6, strides=[4, 4])))
    order = np.arange(24).reshape(6, 4)
    order[3:] = order[3:, ::-1]
    y = net.op("Gather", x, net.constant(order.ravel(), np.int64), axis=1)
    y = net.op("Relu", net.op("Add", net.gemm(x, 24, 9), net.gemm(y, 24, 9)))
    return net.gemm(y, 9, 5)


def one_channel(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    mask = net.op("Gather", x, net.constant(2, np.int64), axis=1)
    return net.conv(net.op("Mul", x, net.op("Unsqueeze", mask, net.constant([1], np.int64))), 8, 4)


def channel_shuffle(net):
    """ShuffleNet: [8] -> [2, 4] -> transposed -> [8]"""
    x = net.op("Relu", net.conv("x", 4, 8))
    x = net.op("Reshape", x, net.constant([0, 2, 4, 8, 8], np.int64))
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), net.constant([0, 8, 8, 8], np.int64))
    return net.conv(net.op("Relu", net.conv(x, 8, 8, groups=2)), 8, 4)


def squeeze_excite(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    s = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), 8, 6, 1))
    return net.conv(net.op("Mul", x, net.op("Sigmoid", net.conv(s, 6, 8, 1))), 8, 4)


def scaled(net):
    """Functions stand behind the constants, which would be part of the layer otherwise."""
    x = net.op("Mul", net.op("Relu", net.conv("x", 4, 8)), net.weight(8, 1, 1))
    return net.conv(net.op("LeakyRelu", net.op("Mul", net.op("LeakyRelu", x), net.constant(0.5))), 8, 4)


def shifted(net):
    """A constant per channel follows; a scalar stops factors."""
    x = net.op("Add", net.op("Relu", net.conv("x", 4, 8)), net.weight(8, 1, 1))
    x = net.op("Relu", net.conv(x, 8, 8))
    return net.conv(net.op("Sub", net.constant(1.0), x), 8, 4)


def reciprocal(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    return net.conv(net.op("Div", net.weight(1, 8, 1, 1), net.op("Add", x, net.constant(1.0))), 8, 4)


def divided(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    return net.conv(net.op("Div", x, net.constant(np.linspace(1, 2, 8).reshape(8, 1, 1))), 8, 4)


def preactivation(net):
    """BatchNormalization that cannot be folded, as in ResNet v2 and DenseNet."""
    x = net.conv("x", 4, 8)
    y = net.op("Relu", net.batchnorm(x, 8))
    x = net.op("Add", x, net.conv(y, 8, 8))
    return net.conv(net.op("Relu", net.batchnorm(x, 8)), 8, 4)


def densenet(net):
    x = net.conv("x", 4, 6)
    for n in (6, 11):
        y = net.conv(net.op("Relu", net.batchnorm(x, n)), n, 5)
        x = net.op("Concat", x, y, axis=1)
    return net.conv(x, 16, 4)


def depth_multiplier(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    return net.conv(net.op("Relu", net.conv(x, 8, 16, groups=8)), 16, 4)


def grouped_chain(net):
    """3 groups of 4 meet 4 groups of 3: no two channels are in the same two groups but in threes and fours."""
    x = net.op("Relu", net.conv("x", 4, 12))
    x = net.op("Relu", net.conv(x, 12, 12, groups=3))
    return net.conv(net.op("Relu", net.conv(x, 12, 8, groups=4)), 8, 4)


def grouped_residual(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    return net.conv(net.op("Add", x, net.conv(x, 8, 8, groups=2)), 8, 4)


def grouped_transposed(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    x = net.op("Relu", net.op("ConvTranspose", x, net.weight(8, 3, 2, 2), net.weight(6), group=2))
    return net.conv(x, 6, 4)


def depthwise_transposed(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    x = net.op("Relu", net.op("ConvTranspose", x, net.weight(8, 1, 2, 2), net.weight(8), group=8))
    return net.conv(x, 8, 4)


def padded(net):
    x = net.op("Relu", net.conv("x", 4, 6))
    return net.conv(net.op("Pad", x, net.constant([0, 2, 1, 0, 0, 3, 1, 0], np.int64)), 11, 4)


def padded_with_ones(net):
    x = net.op("Relu", net.conv("x", 4, 6))
    return net.conv(net.op("Pad", x, net.constant([0, 0, 1, 1] * 2, np.int64), net.constant(1.0)), 6, 4)


def padded_by_reflection(net):
    x = net.op("Relu", net.conv("x", 4, 6))
    return net.conv(net.op("Pad", x, net.constant([0, 2, 0, 0] * 2, np.int64), mode="reflect"), 10, 4)


def cropped(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    return net.conv(net.op("Pad", x, net.constant([0, -2, 0, 0, 0, -1, 0, 0], np.int64)), 5, 4)


def resized(net):
    x = net.op("Resize", net.op("Relu", net.conv("x", 4, 8)), "", net.constant([1, 1, 2, 2]), mode="linear")
    return net.conv(x, 8, 4)


def channel_softmax(net):
    return net.conv(net.op("Softmax", net.conv("x", 4, 8), axis=1), 8, 4)


def spatial_softmax(net):
    return net.conv(net.op("Softmax", net.conv("x", 4, 8), axis=3), 8, 4)


def depth_to_space(net):
    return net.conv(net.op("DepthToSpace", net.op("Relu", net.conv("x", 4, 8)), blocksize=2), 2, 4)


def instance_norm(net):
    return net.conv(net.op("InstanceNormalization", net.conv("x", 4, 8), net.weight(8), net.weight(8)), 8, 4)


def channel_mean(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    mean = net.op("ReduceMean", x, net.constant([1], np.int64))
    return net.conv(net.op("Sub", x, mean), 8, 4)


def spatial_norm(net):
    x = net.op("Relu", net.conv("x", 4, 8))
    norm = net.op("ReduceL2", x, net.constant([2, 3], np.int64), keepdims=0)
    return net.gemm(norm, 8, 4)


def expanded(net):
    x = net.op("GlobalAveragePool", net.op("Relu", net.conv("x", 4, 8)))
    return net.conv(net.op("Expand", x, net.constant([1, 8, 3, 3], np.int64)), 8, 4)


def expanded_channels(net):
    x = net.op("Relu", net.conv("x", 4, 1))
    x = net.op("Expand", x, net.constant([1, 8, 1, 1], np.int64))
    return net.conv(net.op("Add", x, net.conv("x", 4, 8)), 8, 4)


def broadcast_channel(net):
    """One channel added to all eight."""
    x = net.op("Add", net.op("Relu", net.conv("x", 4, 8)), net.conv("x", 4, 1))
    return net.conv(x, 8, 4)


def gram_matrix(net):
    """Activation times activation over channels, and over positions."""
    x = net.op("Reshape", net.op("Relu", net.conv("x", 4, 8)), net.constant([0, 8, 64], np.int64))
    y = net.op("Reshape", net.op("Relu", net.conv("x", 4, 8)), net.constant([0, 8, 64], np.int64))
    over_positions = net.op("MatMul", x, net.op("Transpose", y, perm=[0, 2, 1]))
    over_channels = net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 1]), y)
    return net.op(
        "Add",
        net.op("ReduceSum", over_positions, net.constant([1, 2], np.int64)),
        net.op("ReduceSum", over_channels, net.constant([1, 2], np.int64)),
    )


def same_twice(net):
    """x * x and x + x"""
    x = net.op("Relu", net.conv("x", 4, 8))
    return net.conv(net.op("Mul", net.op("Add", x, x), x), 8, 4)


def max_of_two(net):
    x, y = net.op("Relu", net.conv("x", 4, 8)), net.conv("x", 4, 8)
    return net.conv(net.op("Max", x, y), 8, 4)


def prelu_then_flatten(net):
    x = net.op("PRelu", net.conv("x", 4, 8), net.weight(8, 1, 1))
    return net.gemm(net.op("Flatten", x), 512, 5)


def slope_of_one_image(net):
    """PRelu whose slope varies over positions as well."""
    return net.conv(net.op("PRelu", net.conv("x", 4, 8), net.weight(8, 8, 8)), 8, 4)


def constant_image(net):
    x = net.op("Mul", net.op("Relu", net.conv("x", 4, 8)), net.weight(8, 8, 8))
    return net.conv(net.op("Add", x, net.weight(1, 8, 8, 8)), 8, 4)


def constant_row(net):
    """The constant is along the width, which equals the number of channels."""
    x = net.op("Mul", net.op("Relu", net.conv("x", 4, 8)), net.weight(8))
    return net.conv(net.op("Add", x, net.weight(8, 8)), 8, 4)


def loop_in_channels(net):
    """Two square layers with a residual."""
    x = net.op("Relu", net.conv("x", 4, 8))
    for _ in range(2):
        x = net.op("Relu", net.op("Add", x, net.conv(x, 8, 8)))
    return net.conv(x, 8, 4)


TARGETED = {
    f.__name__: f
    for f in (
        split_uneven,
        split_tied,
        sliced,
        sliced_backwards,
        sliced_from_the_end,
        gathered,
        gathered_twice,
        gathered_after_flatten,
        one_channel,
        channel_shuffle,
        squeeze_excite,
        scaled,
        shifted,
        reciprocal,
        divided,
        preactivation,
        densenet,
        depth_multiplier,
        grouped_chain,
        grouped_residual,
        grouped_transposed,
        depthwise_transposed,
        padded,
        padded_with_ones,
        padded_by_reflection,
        cropped,
        resized,
        channel_softmax,
        spatial_softmax,
        depth_to_space,
        instance_norm,
        channel_mean,
        spatial_norm,
        expanded,
        expanded_channels,
        broadcast_channel,
        gram_matrix,
        same_twice,
        max_of_two,
        prelu_then_flatten,
        slope_of_one_image,
        constant_image,
        constant_row,
        loop_in_channels,
    )
}


def targeted(name):
    net = Net(["N", 4, 8, 8])
    return net.model(TARGETED[name](net), opset=20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETED)
def test_function_stays_in_targeted_graphs(name, kind):
    check(targeted(name), kind)


@pytest.mark.parametrize(
    "name, permutations, factors",
    [
        ("split_uneven", 2, 2),
        ("split_tied", 1, 1),
        ("sliced", 2, 2),
        ("squeeze_excite", 2, 1),
        ("scaled", 1, 2),
        ("divided", 1, 1),
        ("preactivation", 1, 0),
        ("densenet", 3, 1),
        ("depth_multiplier", 1, 2),
        ("padded", 2, 2),
        ("grouped_residual", 2, 2),
        ("padded_with_ones", 1, 0),
        ("resized", 1, 1),
        ("spatial_softmax", 1, 0),
        ("prelu_then_flatten", 1, 1),
        ("spatial_norm", 1, 1),
        ("expanded", 1, 1),
        ("loop_in_channels", 1, 1),
    ],
)
def test_groups_are_found(name, permutations, factors):
    """All channels that can move do: pinning everything would keep the function too."""
    graph = load(targeted(name))
    assert (len(channel_groups(graph, "permute")), len(channel_groups(graph, "rescale"))) == (permutations, factors)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_followed_through_a_shuffle(kind):
    """Some channels are tied to each other, but not all."""
    graph = load(targeted("channel_shuffle"))
    first = graph.layers[0].weight
    assert any(first in {m.tensor for m in group.weights} for group in channel_groups(graph, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [(8, 8), (8, 1), (1, 8), (8,)])
def test_gemm_with_one_bias_per_sample(kind, bias):
    """A batch as large as the number of outputs: the first axis of the bias is not a channel axis."""
    net = Net([8, 5])
    x = net.op("Relu", net.op("Gemm", "x", net.weight(5, 8), net.weight(*bias)))
    check(net.model(net.gemm(x, 8, 3)), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_as_large_as_the_channels(kind):
    net = Net([8, 8, 8, 8])
    x = net.op("PRelu", net.conv("x", 8, 8), net.weight(8, 1, 1))
    x = net.op("Relu", net.op("Add", x, net.conv(x, 8, 8, groups=8)))
    _, count = check(net.model(net.gemm(net.op("Flatten", x), 512, 8)), kind)
    assert count


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("nt", "permute"), ("nt", "rescale"), ("tn", "permute"), *slowly(("tn", "rescale"))],
)
def test_tokens_from_patches(kind, layout):
    """A patch embedding: image -> [tokens, channels], position added, then layers on tokens."""
    net = Net(["N", 4, 8, 8])
    x = net.op("Reshape", net.conv("x", 4, 16, 2, strides=[2, 2], pads=[0] * 4), net.constant([0, 16, 16], np.int64))
    x = net.op("Transpose", x, perm=[0, 2, 1]) if layout == "nt" else x
    x = net.op("Add", x, net.weight(1, 16, 16))
    x = net.op("Relu", net.linear(x, 16, 16))
    _, count = check(net.model(net.linear(x, 16, 4)), kind)
    assert count == (2 if layout == "nt" else 1)


# ---- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, *slowly(1, 2)])
@pytest.mark.parametrize("name", kinds(ZOO, "mlp", "resnet20", "control_flow", "no_layer"))
def test_replace_with_sum(name, count):
    model = ZOO[name]()
    graph = load(model)
    rng = np.random.default_rng(0)
    for layer in list(graph.layers):
        weight = graph.constant(layer.weight)
        parts = [rng.normal(size=weight.shape).astype(np.float32) for _ in range(count - 1)]
        parts.append(weight - sum(parts))
        graph.touched.clear()
        layers = replace_with_sum(graph, layer, parts)
        assert len(layers) == count and layer.weight in graph.touched
        assert [y.bias for y in layers] == [layer.bias, *[None] * (count - 1)]
        for y, part in zip(layers, parts, strict=True):
            assert (y.op, y.attrs, y.groups, y.input) == (layer.op, layer.attrs, layer.groups, layer.input)
            np.testing.assert_array_equal(graph.constant(y.weight), part)
    assert graph.outputs == load(model).outputs
    for feed in feeds(model, 2):
        assert drift(run(model, feed), run(graph, feed)) < 1e-4
    for kind in KINDS:
        shuffle(graph, kind)
    assert drift(run(model, feed), run(graph, feed)) < 1e-4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: [w, w * 1e-3],
        lambda w: [w / 2],
        lambda w: [],
        lambda w: [w[:1]],
        lambda w: [w[..., None]],
        lambda w: [w * np.nan],
    ],
)
def test_wrong_sums_are_refused(spoil):
    graph = load(shared_weights())
    digest, layer = graph.digest(), graph.layers[1]
    with pytest.raises(ValueError, match="add up"):
        replace_with_sum(graph, layer, spoil(graph.constant(layer.weight)))
    assert graph.digest() == digest and not graph.touched


# ---- random graphs --------------------------------------------------------------------------------------------------


STEPS = ["conv", "conv1x1", "depthwise", "grouped", "relu", "clip", "prelu", "residual", "concat", "pool", "scale"]


@st.composite
def random_models(draw):
    net = Net(["N", 3, 8, 8], seed=draw(st.integers(0, 99)))
    channels = draw(st.sampled_from([4, 6, 8]))
    x, side, pools = net.conv("x", 3, channels), 8, 0
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7)):
        if step in ("conv", "conv1x1"):
            wider = draw(st.sampled_from([4, 5, 6, 8]))
            x, channels = net.conv(x, channels, wider, 3 if step == "conv" else 1, bias=draw(st.booleans())), wider
        elif step == "depthwise":
            times = draw(st.sampled_from([1, 2])) if channels < 16 else 1
            x, channels = net.conv(x, channels, channels * times, groups=channels), channels * times
        elif step == "grouped" and channels % 2 == 0:
            x, channels = net.conv(x, channels, 8, groups=2), 8
        elif step in ("relu", "clip"):
            x = net.op("Relu", x) if step == "relu" else net.clip(x)
        elif step == "prelu":
            x = net.op("PRelu", x, net.weight(channels, 1, 1))
        elif step == "residual":
            x = net.op("Add", x, net.conv(net.op("Relu", net.conv(x, channels, 6)), 6, channels))
        elif step == "concat" and channels < 16:
            x, channels = net.op("Concat", x, net.conv(x, channels, 5, 1), axis=1), channels + 5
        elif step == "pool" and pools < 2:
            op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
            x, side, pools = net.op(op, x, kernel_shape=[2, 2], strides=[2, 2]), side // 2, pools + 1
        elif step == "scale":
            x = net.op("Mul", x, net.weight(channels, 1, 1))
    return net.model(net.gemm(net.op("Flatten", x), channels * side**2, 5))


@pytest.mark.parametrize("kind", KINDS)
@examples(60)
@given(model=random_models(), seed=st.integers(0, 99))
def test_function_stays_in_random_graphs(kind, model, seed):
    check(model, kind, seed)


def test_channels_flattened_with_an_axis_of_unknown_size_take_no_memory():
    """The scores of an open number of steps become one row, as the last step of text recognition does."""
    net = Net(["N", 24])
    y = net.op("Reshape", net.gemm(net.op("Relu", net.gemm("x", 24, 16)), 16, 32), net.constant([1, -1], np.int64))
    graph = load(net.model(y))
    graph.tensor(graph.outputs[0]).shape = [1, None]  # as where the sizes are computed
    tracemalloc.start()
    try:
        assert {group.size for kind in KINDS for group in channel_groups(graph, kind)} == {16}
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
