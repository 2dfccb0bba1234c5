"""Propagated distributions against runs of onnxruntime on normal inputs, and the Calibration that is based on them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxq_plugins.calibration import Calibration, channel_axis, channels
from onnxq_plugins.calibration.expected import Expected
from onnxq_plugins.calibration.propagation import Distribution, propagate
from onnxq_plugins.data import Data, graph_inputs
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import channel_groups, load, permute, replace_with_sum, rescale, split_outputs
from onnxq_plugins.solvers.gaussian import clipped_moments, mapped_moments
from tests.zoo import ZOO, Net, feeds, mobilenet, run

SAMPLES = 3000


def normal_input(size, seed=1, spread=1.0):
    """The distribution of an input with a different mean and deviation per channel."""
    rng = np.random.default_rng(seed)
    mean, deviation = rng.normal(size=size) * spread, rng.uniform(0.5, 1.5, size)
    return Distribution(mean, deviation**2, mean - 6 * deviation, mean + 6 * deviation)


def simulate(graph, moments, axis, names, samples=SAMPLES):
    """The named activations for independent normal inputs with these moments along an axis."""
    rng = np.random.default_rng(2)
    shape = [n if isinstance(n, int) else 1 for n in graph.shape("x")]
    shape[0] *= samples
    spread = [-1 if a == axis % len(shape) else 1 for a in range(len(shape))]
    x = rng.normal(size=shape) * np.sqrt(moments.variance).reshape(spread) + moments.mean.reshape(spread)
    model = graph.model()
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    return dict(zip(names, run(model, {"x": x.astype(np.float32)}), strict=True))


def per_channel(graph, name, values):
    axis = channel_axis(graph, name)
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).astype(np.float64)
    return rows.mean(axis=1), rows.var(axis=1)


def check(net, output, *, variance=0.1, mean=0.04, spread=1.0, by_channel=True, samples=SAMPLES):
    """Check the last activation's moments against a simulation: means relative to the deviation, variances relative to
    themselves (None: not checked). `by_channel`: False compares all channels together."""
    graph = load(net.model(output))
    axis = channel_axis(graph, "x")
    moments = normal_input(graph.shape("x")[axis], spread=spread)
    distributions = propagate(graph, {"x": moments})
    (name,) = graph.outputs
    values = simulate(graph, moments, axis, [name], samples)[name]
    expected_mean, expected_variance = per_channel(graph, name, values)
    distribution = distributions[name]
    assert len(distribution.mean) == channels(graph, name) or not by_channel
    if not by_channel:
        distribution = distribution.pooled()
        expected_mean, expected_variance = np.array([values.mean()]), np.array([values.var()])
    deviation = np.sqrt(expected_variance) + 1e-3
    assert np.abs(distribution.mean - expected_mean).max() < mean * deviation.max()
    if variance is not None:
        np.testing.assert_allclose(
            distribution.variance, expected_variance, rtol=variance, atol=1e-3 * expected_variance.max()
        )
    check_sane(distribution)
    outside = np.mean((values < distribution.low.min() - 1e-5) | (values > distribution.high.max() + 1e-5))
    assert outside < 1e-3
    return distribution


def check_sane(distribution):
    assert all(
        np.isfinite(part).all() for part in (distribution.mean, distribution.variance, distribution.low, distribution.high)
    )
    assert len(distribution.mean) == len(distribution.variance) == len(distribution.low) == len(distribution.high)
    slack = 1e-6 * (1 + np.abs(distribution.mean))
    assert (
        (distribution.low <= distribution.mean + slack).all()
        and (distribution.mean <= distribution.high + slack).all()
        and (distribution.variance >= 0).all()
    )


# ---- the normal distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0, np.inf), (0, 6), (-1, 1), (-np.inf, 0.5), (2, 3), (-np.inf, np.inf)])
def test_clipped_moments_by_integration(low, high):
    mean, deviation = (v.ravel() for v in np.meshgrid([-5, -1, 0, 0.3, 4], [0.2, 1, 3]))
    z = np.linspace(-9, 9, 200_001)
    density = np.exp(-(z**2) / 2)
    values = np.clip(mean[:, None] + deviation[:, None] * z, low, high)
    expected = values @ density / density.sum()
    expected_variance = ((values - expected[:, None]) ** 2) @ density / density.sum()
    first, variance = clipped_moments(mean, deviation**2, low, high)
    np.testing.assert_allclose(first, expected, atol=1e-6)
    np.testing.assert_allclose(variance, expected_variance, atol=1e-5)


def test_clipped_moments_without_spread_are_a_clip():
    mean = np.array([-2.0, 0.5, 7.0])
    first, variance = clipped_moments(mean, np.zeros(3), 0, 6)
    np.testing.assert_allclose(first, [0, 0.5, 6], atol=1e-7)
    assert variance.max() < 1e-10


def test_mapped_moments_of_a_square():
    mean, variance = np.array([0.0, 2.0]), np.array([1.0, 0.25])
    first, spread = mapped_moments(mean, variance, np.square)
    np.testing.assert_allclose(first, mean**2 + variance)
    np.testing.assert_allclose(spread, 2 * variance**2 + 4 * mean**2 * variance)


# ---- one operator at a time -----------------------------------------------------------------------------------------


def test_pointwise_convolution():
    net = Net(["N", 6, 2, 2])
    check(net, net.conv("x", 6, 9, 1))


@pytest.mark.parametrize("groups", [2, 3])
def test_grouped_pointwise_convolution(groups):
    net = Net(["N", 6, 2, 2])
    check(net, net.conv("x", 6, 12, 1, groups=groups))


@pytest.mark.parametrize("groups", [1, 6])
def test_wider_convolutions_assume_correlated_neighbours(groups):
    """Means are exact without padding; variances are between those of equal and of independent neighbours."""
    net = Net(["N", 6, 3, 3])
    graph = load(net.model(net.conv("x", 6, 12, groups=groups, pads=[0] * 4)))
    (layer,) = graph.layers
    moments = normal_input(6)
    distribution = propagate(graph, {"x": moments})[layer.output]
    mean, independent = per_channel(graph, layer.output, simulate(graph, moments, 1, [layer.output])[layer.output])
    assert np.abs(distribution.mean - mean).max() < 0.08 * np.sqrt(independent.max())
    weight = graph.constant(layer.weight).astype(np.float64)
    reads = np.repeat(np.arange(6), 2)[:, None] if groups > 1 else np.tile(np.arange(6), (12, 1))
    equal = (weight.sum(axis=(2, 3)) ** 2 * moments.variance[reads]).sum(axis=1)
    np.testing.assert_allclose(distribution.variance, (independent + equal) / 2, rtol=0.15)


def test_convolution_in_one_dimension():
    net = Net(["N", 5, 4])
    check(net, net.conv("x", 5, 7, 1, rank=1))


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_b):
    net = Net(["N", 8])
    check(net, net.gemm("x", 8, 11, trans_b=trans_b, alpha=0.5, beta=2.0))


@pytest.mark.parametrize("shape", [["N", 8], ["N", 3, 8]])
@pytest.mark.parametrize("bias", [True, False])
def test_matmul(shape, bias):
    net = Net(shape)
    check(net, net.linear("x", 8, 11, bias))


@pytest.mark.parametrize("ends", [None, (0.0, 6.0), (-1.0, 1.0), (0.0, 0.7)])
def test_relu_and_clip(ends):
    net = Net(["N", 8, 2, 2])
    distribution = check(net, net.op("Relu", "x") if ends is None else net.clip("x", *ends))
    low, high = ends or (0, np.inf)
    assert distribution.low.min() >= low and distribution.high.max() <= high


def test_clip_with_one_end():
    net = Net(["N", 8, 2, 2])
    assert check(net, net.op("Clip", "x", "", net.constant(0.5))).high.max() == 0.5


def test_almost_closed_relu_stays_in_its_span():
    net = Net(["N", 3, 2, 2])
    graph = load(net.model(net.op("Relu", "x")))
    start = Distribution(np.array([-7.0, -100, 1e3]), np.ones(3), np.array([-13.0, -106, 994]), np.array([-1.0, -94, 1006]))
    check_sane(propagate(graph, {"x": start})[graph.outputs[0]])


@pytest.mark.parametrize(
    "op, attrs",
    [
        ("LeakyRelu", {"alpha": 0.2}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("Gelu", {}),
        ("Gelu", {"approximate": "tanh"}),
        ("HardSwish", {}),
        ("Elu", {}),
        ("Softplus", {}),
        ("HardSigmoid", {"alpha": 0.25}),
        ("Exp", {}),
        ("Abs", {}),
        ("Neg", {}),
    ],
)
def test_functions_of_one_variable(op, attrs):
    net = Net(["N", 8, 3, 3])
    graph = load(net.model(net.op(op, "x", **attrs), opset=20))
    moments = normal_input(8, spread=0.5)
    (name,) = graph.outputs
    values = simulate(graph, moments, 1, [name])[name]
    mean, variance = per_channel(graph, name, values)
    distribution = propagate(graph, {"x": moments})[name]
    np.testing.assert_allclose(distribution.mean, mean, atol=0.05 * np.sqrt(variance.max()))
    np.testing.assert_allclose(distribution.variance, variance, rtol=0.3 if op == "Exp" else 0.1)
    check_sane(distribution)
    assert (values.min(axis=(0, 2, 3)) >= distribution.low - 1e-3).all() and (
        values.max(axis=(0, 2, 3)) <= distribution.high + 1e-3
    ).all()


@pytest.mark.parametrize("swapped", [False, True])
def test_gated_variable_counts_once(swapped):
    """SiLU: never below -0.28, which the product of two spans would miss by far."""
    net = Net(["N", 8, 2, 2])
    pair = ["x", net.op("Sigmoid", "x")]
    distribution = check(net, net.op("Mul", *(pair[::-1] if swapped else pair)))
    assert -0.3 < distribution.low.min() < -0.2


@pytest.mark.parametrize("op", ["Gelu", "HardSwish"])
def test_the_dip_of_a_curve_is_found_within_a_wide_span(op):
    net = Net(["N", 2])
    graph = load(net.model(net.op(op, "x"), opset=20))
    wide = Distribution(np.zeros(2), np.full(2, 100.0), np.full(2, -60.0), np.full(2, 60.0))
    grid = run(graph, {"x": np.linspace(-4, 4, 2000, dtype=np.float32).reshape(-1, 2)})[0]
    assert propagate(graph, {"x": wide})[graph.outputs[0]].low.max() < 0.5 * grid.min()


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("values", ["channel", "scalar", "vector"])
@pytest.mark.parametrize("first", [False, True])
def test_constants(op, values, first):
    net = Net(["N", 5, 2, 2] if values != "vector" else ["N", 5])
    shape = {"channel": (5, 1, 1), "scalar": (), "vector": (5,)}[values]
    constant = net.constant(net.rng.uniform(0.5, 2, shape) * net.rng.choice([-1, 1], shape))
    output = net.op(op, *([constant, "x"] if first else ["x", constant]))
    if op == "Div" and first:  # one over a normal variable has no moments
        assert load(net.model(output)).outputs[0] not in propagate(load(net.model(output)), {"x": normal_input(5)})
    else:
        check(net, output)


def test_a_constant_that_differs_by_position():
    net = Net(["N", 4, 6])
    check(net, net.op("Add", "x", net.weight(1, 4, 6)), samples=2000)


def test_quotients_by_zero_or_by_an_activation_are_unknown():
    for divisor in (lambda net: net.constant([0.0, 1, 2]), lambda net: net.op("Softmax", "x", axis=-1)):
        net = Net(["N", 3])
        graph = load(net.model(net.op("Div", "x", divisor(net))))
        assert graph.outputs[0] not in propagate(graph, {"x": normal_input(3)})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_two_activations(op):
    net = Net(["N", 6, 2, 2])
    weights = [np.zeros((4, 6, 1, 1)) for _ in range(2)]
    weights[0][:, :3], weights[1][:, 3:] = net.rng.normal(size=(2, 4, 3, 1, 1))  # they read different channels
    check(net, net.op(op, *(net.op("Conv", "x", net.constant(w)) for w in weights)), mean=0.08, variance=0.15)


@pytest.mark.parametrize("shape, axis", [(["N", 4, 2, 2], 1), (["N", 4], 1), (["N", 2, 4], 2)])
def test_concat_of_channels(shape, axis):
    net = Net(shape)
    check(net, net.op("Concat", "x", net.op("Relu", "x"), axis=axis))


def test_concat_along_another_axis_is_a_mixture():
    net = Net(["N", 4, 3, 2])
    shifted = net.op("Add", "x", net.constant(np.arange(4).reshape(4, 1, 1) * 2.0))
    check(net, net.op("Concat", "x", net.op("Slice", shifted, *(net.constant([n], np.int64) for n in (0, 1, 2))), axis=2))


def test_concat_of_tensors_with_channels_on_different_axes():
    """A convolution writes its channels to axis 1; an Add behind no convolution has them on its last axis."""
    net = Net(["N", 4, 4])
    joined = net.op("Concat", "x", net.op("Add", "x", net.op("Tanh", "x")), axis=1)
    graph = load(net.model(net.conv(joined, 8, 3, 1, rank=1)))
    distributions = propagate(graph, {"x": normal_input(4)})
    for name, distribution in distributions.items():
        assert len(distribution.mean) in (1, channels(graph, name))


def test_channels_are_not_taken_for_positions_of_the_same_size():
    """Conv1d and Sigmoid, [N, 4, 4]: the channels on axis 1 are not those on the last axis of the next tensor."""
    net = Net(["N", 4, 4])
    y = net.op("Tanh", net.op("Sigmoid", net.conv("x", 4, 4, 1, rank=1)))
    graph = load(net.model(y))
    assert channel_axis(graph, graph.layers[0].output) != channel_axis(graph, graph.outputs[0])
    assert len(propagate(graph, {"x": normal_input(4)})[graph.outputs[0]].mean) == 1


@pytest.mark.parametrize("how", ["Flatten", "Reshape"])
def test_flatten_repeats_channels(how):
    net = Net(["N", 4, 3, 2])
    y = net.op("Flatten", "x") if how == "Flatten" else net.op("Reshape", "x", net.constant([0, -1], np.int64))
    check(net, y, mean=0.1)


@pytest.mark.parametrize(
    "op, attrs",
    [
        ("GlobalAveragePool", {}),
        ("AveragePool", {"kernel_shape": [2, 2]}),
        ("ReduceMean", {"axes": [2, 3]}),
        ("ReduceMean", {"axes": [-1, -2], "keepdims": 0}),
    ],
)
def test_averages_keep_the_mean_and_lose_variance(op, attrs):
    net = Net(["N", 5, 4, 4])
    distribution = check(net, net.op(op, "x", **attrs), variance=None, mean=0.2)
    start = normal_input(5).variance
    n = 4 if op == "AveragePool" else 16
    assert (distribution.variance < start / np.sqrt(n) * 1.001).all() and (distribution.variance > start / n).all()


@pytest.mark.parametrize("axes, keepdims, by_channel", [([1], 0, True), ([2], 1, False), ([1, 2], 1, False)])
def test_averages_over_tokens_and_features(axes, keepdims, by_channel):
    net = Net(["N", 4, 6])
    check(net, net.op("ReduceMean", "x", axes=axes, keepdims=keepdims), variance=None, mean=0.2, by_channel=by_channel)


@pytest.mark.parametrize("written_out", [False, True])
def test_layer_normalization(written_out):
    net = Net(["N", 3, 48])
    y = net.layernorm("x", 48) if written_out else net.op("LayerNormalization", "x", net.weight(48), net.weight(48))
    graph = load(net.model(y))
    start = Distribution(np.zeros(48), np.ones(48), np.full(48, -6.0), np.full(48, 6.0))
    (name,) = graph.outputs
    values = simulate(graph, start, 2, [name])[name]
    mean, variance = per_channel(graph, name, values)
    distribution = propagate(graph, {"x": start})[name]
    np.testing.assert_allclose(distribution.mean, mean, atol=0.05)
    np.testing.assert_allclose(distribution.variance, variance, rtol=0.1)
    assert (values.min(axis=(0, 1)) >= distribution.low - 1e-5).all() and (
        values.max(axis=(0, 1)) <= distribution.high + 1e-5
    ).all()


def test_layer_normalization_of_few_features_is_bounded():
    net = Net(["N", 5])
    graph = load(net.model(net.op("LayerNormalization", "x", net.constant(np.ones(5)))))
    distribution = propagate(graph, {})[graph.outputs[0]]
    np.testing.assert_allclose([distribution.low, distribution.high], [[-2] * 5, [2] * 5])
    assert np.abs(run(graph, {"x": np.float32([[9, 0, 0, 0, 0]])})[0]).max() == pytest.approx(2, rel=1e-3)


def test_layer_normalization_over_two_axes_is_pooled():
    net = Net(["N", 3, 4])
    graph = load(net.model(net.op("LayerNormalization", "x", net.weight(3, 4), net.weight(3, 4), axis=1)))
    check_sane(propagate(graph, {})[graph.outputs[0]])
    assert len(propagate(graph, {})[graph.outputs[0]].mean) == 1


def test_layer_normalization_without_bias_or_with_computed_scale():
    net = Net(["N", 6])
    graph = load(net.model(net.op("LayerNormalization", "x", net.weight(6), "")))
    np.testing.assert_array_equal(propagate(graph, {})[graph.outputs[0]].mean, 0)
    net = Net([6])
    graph = load(net.model(net.op("LayerNormalization", "x", net.op("Exp", "x"))))
    assert graph.outputs[0] not in propagate(graph, {})


def test_softmax_averages_what_it_multiplies():
    net = Net(["N", 6, 6])
    weights = net.op("Softmax", net.linear("x", 6, 6, bias=False), axis=2)
    graph = load(net.model(net.op("MatMul", weights, "x")))
    moments = normal_input(6)
    (name,) = graph.outputs
    mean, _ = per_channel(graph, name, simulate(graph, moments, 2, [name])[name])
    distribution = propagate(graph, {"x": moments})[name]
    assert (np.abs(distribution.mean - mean) < np.sqrt(moments.variance)).all() and (
        distribution.variance < moments.variance
    ).all()
    soft = propagate(graph, {"x": moments})[next(n.outputs[0].name for n in graph.nodes if n.op == "Softmax")]
    assert soft.mean == pytest.approx(1 / 6) and (soft.low, soft.high) == (0, 1)


def test_softmax_over_another_axis():
    net = Net(["N", 3, 8])
    graph = load(net.model(net.op("Softmax", "x", axis=1)))
    assert propagate(graph, {})[graph.outputs[0]].mean == pytest.approx(1 / 3)


def test_product_of_two_activations():
    net = Net(["N", 12, 12])
    y = net.op("MatMul", "x", net.op("Transpose", net.op("Tanh", "x"), perm=[0, 2, 1]))
    graph = load(net.model(y))
    check_sane(propagate(graph, {"x": normal_input(12)})[graph.outputs[0]])


@pytest.mark.parametrize("how", ["Slice", "Gather", "Split", "Pad", "shuffle", "NHWC and back", "DepthToSpace", "reverse"])
def test_channels_are_followed_through_moves(how):
    net = Net(["N", 8, 2, 2])

    def integers(*values):
        return net.constant(values, np.int64)

    y = {
        "Slice": lambda: net.op("Slice", "x", integers(1), integers(6), integers(1), integers(2)),
        "reverse": lambda: net.op("Slice", "x", integers(7), integers(-9), integers(1), integers(-1)),
        "Gather": lambda: net.op("Gather", "x", integers(7, 0, 3, 3, 1, 2, 5, 4), axis=1),
        "Split": lambda: [net.op("Split", "x", integers(3, 5), outputs=2, axis=1), net.nodes[-1].output[1]][1],
        "Pad": lambda: net.op("Pad", "x", integers(0, 1, 0, 0, 0, 2, 0, 0)),
        "shuffle": lambda: net.op(
            "Reshape",
            net.op("Transpose", net.op("Reshape", "x", integers(0, 2, 4, 2, 2)), perm=[0, 2, 1, 3, 4]),
            integers(0, 8, 2, 2),
        ),
        "NHWC and back": lambda: net.op(
            "Transpose", net.op("Identity", net.op("Transpose", "x", perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]
        ),
        "DepthToSpace": lambda: net.op("DepthToSpace", "x", blocksize=2),
    }[how]()
    distribution = check(net, net.op("Identity", y), by_channel=how not in ("NHWC and back", "shuffle"))
    assert how != "Gather" or distribution.mean[0] == normal_input(8).mean[7]


def test_padded_positions_are_zero():
    net = Net(["N", 3, 5, 5])
    distribution = check(net, net.op("Pad", "x", net.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)), spread=3)
    assert (distribution.low <= 0).all() and (distribution.high >= 0).all()


def test_further_outputs_are_unknown():
    """The indices of a MaxPool, the mean of a LayerNormalization."""
    net = Net(["N", 3, 4, 4])
    y = net.op("MaxPool", "x", outputs=2, kernel_shape=[2, 2])
    graph = load(net.model(y, f"{y}_1"))
    assert graph.outputs[1] not in propagate(graph, {"x": normal_input(3)})
    net = Net(["N", 3])
    y = net.op("LayerNormalization", "x", net.weight(3), net.weight(3), outputs=3)
    graph = load(net.model(y, f"{y}_1"))
    assert graph.outputs[1] not in propagate(graph, {})


def test_integers_are_unknown():
    net = Net(["N", 3])
    graph = load(net.model(net.op("Cast", "x", to=TensorProto.INT64), net.op("Cast", "x", to=TensorProto.DOUBLE)))
    distributions = propagate(graph, {"x": normal_input(3)})
    assert graph.outputs[0] not in distributions and graph.outputs[1] in distributions


# ---- whole graphs ---------------------------------------------------------------------------------------------------

VARIANTS = {
    **ZOO,
    **{
        f"{n}, opset {o}": lambda n=n, o=o: ZOO[n](opset=o)
        for n in ("cnn", "mobilenet", "mlp", "resnet20")
        for o in (13, 18)
    },
}


def start_of(graph):
    return {n: normal_input(channels(graph, n) or 1) for n in graph.inputs}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_distributions_of_every_network_are_consistent(name, dynamic):
    model = VARIANTS[name]()
    if dynamic and len(model.graph.input[0].type.tensor_type.shape.dim) != 4:
        pytest.skip("no image")
    if dynamic:
        for at in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[at].dim_param = "HW"[at - 2]
        del model.graph.output[0].type.tensor_type.shape.dim[:]
    try:
        graph = load(model)
    except OnnxqError:
        pytest.skip("cannot have dynamic sizes")
    distributions = propagate(graph, start_of(graph))
    assert set(graph.inputs) < set(distributions)
    for tensor, distribution in distributions.items():
        check_sane(distribution)
        assert len(distribution.mean) in (1, channels(graph, tensor))
        maker = graph.producer(tensor)
        if maker is not None and maker.op in ("Relu", "Sigmoid"):
            assert distribution.low.min() >= 0
    assert set(propagate(graph, {}, through=False)) <= set(distributions)


@pytest.mark.parametrize("name", ["cnn", "inception", "mlp", "transformer", "odd_channels"])
def test_every_activation_of_ordinary_networks_is_known(name):
    graph = load(ZOO[name]())
    distributions = propagate(graph, start_of(graph))
    assert not [t.name for node in graph.nodes for t in node.outputs if t.name not in distributions]


def test_statistics_win_over_propagation():
    graph = load(mobilenet())
    distributions = propagate(graph, start_of(graph))
    assert len(graph.batchnorms) == 7
    for name, norm in graph.batchnorms.items():
        np.testing.assert_allclose(distributions[name].mean, norm.beta, rtol=1e-6)
        np.testing.assert_allclose(distributions[name].variance, norm.gamma**2, rtol=1e-6)
        np.testing.assert_allclose(distributions[name].high, norm.beta + 6 * np.abs(norm.gamma), rtol=1e-6)


def test_a_constant_added_behind_a_batch_normalization_moves_its_mean():
    net = Net(["N", 3, 6, 6])
    x = net.batchnorm(net.conv("x", 3, 5), 5)
    shift = net.constant(np.arange(5).reshape(5, 1, 1) * 3.0)
    plain, moved = load(net.model(x)), load(net.model(net.op("Relu", net.op("Add", x, shift))))
    assert len(moved.nodes) == 2  # the constant became part of the bias
    a, b = (propagate(g, {})[g.layers[0].output].mean for g in (plain, moved))
    np.testing.assert_allclose(b - a, np.arange(5) * 3.0, atol=1e-6)


@pytest.mark.parametrize("rewrite", ["sum", "split"])
def test_statistics_stay_with_a_layer_in_parts(rewrite):
    graph = load(mobilenet())
    layer = graph.layers[3]  # pointwise, no activation behind
    before = propagate(graph, {}, through=False)
    if rewrite == "sum":
        weight = graph.constant(layer.weight)
        replace_with_sum(graph, layer, [weight * np.float32(0.75), weight * np.float32(0.25)])
    else:
        split_outputs(graph, layer, [np.array([5, 0, 2]), np.array([1, 3, 4, 6, 7])])
    after = propagate(graph, {}, through=False)
    np.testing.assert_allclose(after[layer.output].mean, before[layer.output].mean)
    np.testing.assert_allclose(after[layer.output].variance, before[layer.output].variance)


def true_statistics(seed=3):
    """A network whose BatchNormalizations have the true statistics of its activations on normal inputs, and such inputs."""
    net = Net(["N", 3, 10, 10], seed)
    x = net.op("Relu", net.batchnorm(net.conv("x", 3, 8, bias=False, pads=[0] * 4), 8))
    x = net.op("Relu", net.batchnorm(net.conv(x, 8, 12, 1, bias=False), 12))
    model = net.model(net.head(net.batchnorm(net.conv(x, 12, 6, 1, bias=False), 6), 6))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3, 10, 10)).astype(np.float32)
    values = {t.name: t for t in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "BatchNormalization"]:
        probe = type(model)()
        probe.CopyFrom(model)
        del probe.graph.output[:]
        probe.graph.output.append(helper.make_empty_tensor_value_info(node.input[0]))
        y = run(probe, {"x": x}, optimize=False)[0]
        for name, what in zip(node.input[3:5], (y.mean(axis=(0, 2, 3)), y.var(axis=(0, 2, 3))), strict=True):
            values[name].raw_data = what.astype(np.float32).tobytes()
    return model, [{"x": one[None]} for one in x]


def check_agreement(graph, samples, share=0.1):
    """Compare the statistics of a graph with those of runs, where they are known per channel."""
    distributions = propagate(graph, {}, through=False)
    outputs = [y.output for y in graph.layers if y.output in graph.batchnorms]
    calibration = Calibration(graph, Data(graph_inputs(graph), lambda: iter(samples)))
    for name, real in calibration.moments(outputs).items():
        deviation = np.sqrt(real.square - real.mean**2)
        np.testing.assert_allclose(distributions[name].mean, real.mean, atol=share * deviation.max())
        np.testing.assert_allclose(np.sqrt(distributions[name].variance), deviation, rtol=share)
    return len(outputs)


@pytest.mark.parametrize("kind", ["permute", "rescale"])
def test_statistics_follow_the_channels(kind):
    model, samples = true_statistics()
    graph = load(model)
    assert check_agreement(graph, samples) == 3
    before = {name: norm.gamma for name, norm in graph.batchnorms.items()}
    rng = np.random.default_rng(5)
    groups = [g for g in channel_groups(graph, kind) if any(t in graph.batchnorms for t in g.tensors)]
    assert len(groups) == 3 or kind == "rescale"
    for group in groups:
        if kind == "permute":
            permute(graph, group, rng.permutation(group.size))
        else:
            rescale(graph, group, rng.uniform(0.3, 3, group.size))
    assert any(not np.array_equal(graph.batchnorms[n].gamma, gamma) for n, gamma in before.items())
    assert check_agreement(graph, samples) == 3


def test_analytic_means_of_layer_inputs():
    """For bias correction: means of clipped normal values behind true statistics."""
    model, samples = true_statistics()
    graph = load(model)
    distributions = propagate(graph, {}, through=False)
    inputs = [y.input for y in graph.layers[1:]]
    real = Calibration(graph, Data(graph_inputs(graph), lambda: iter(samples))).means(inputs)
    for name in inputs:
        assert np.abs(distributions[name].mean - real[name]).max() < 0.15 * max(np.abs(real[name]).max(), 0.3)


# ---- the calibration that is based on them -------------------------------------------------------------------------


def both(model, n=6, inputs=None, **options):
    """An Expected and a Calibration on the same samples, and their graph."""
    graph, samples = load(model), feeds(model, n)
    data = Data(graph_inputs(graph), lambda: iter(samples))
    starts = start_of(graph) if inputs is None else inputs
    return Expected(graph, data, starts, 6.0, **options), Calibration(graph, data, **options), graph


def named(graph):
    return [
        *graph.inputs,
        *(t.name for node in graph.nodes for t in node.outputs if t.dtype == np.float32 and len(t.shape or ()) > 1),
    ]


@pytest.mark.parametrize("name", ZOO)
def test_results_have_the_form_of_a_calibration(name):
    ours, theirs, graph = both(ZOO[name]())
    names = named(graph)
    for statistic in ("ranges", "channel_ranges", "means", "moments"):
        a, b = (getattr(c, statistic)(names) for c in (ours, theirs))
        assert list(a) == list(b) == names
        for tensor in names:
            x, y = (list(vars(v[tensor]).values()) if statistic == "moments" else v[tensor] for v in (a, b))
            for left, right in zip(
                np.atleast_1d(x) if statistic == "means" else x, np.atleast_1d(y) if statistic == "means" else y, strict=True
            ):
                left, right = np.asarray(left), np.asarray(right)
                assert left.shape == right.shape and left.dtype == right.dtype, (statistic, tensor)
        assert all(isinstance(v, float) for pair in ours.ranges(names[:1]).values() for v in pair)


def test_unknown_channels_come_from_samples():
    net = Net(["N", "C"])
    graph = load(net.model(net.op("Relu", "x")))
    sample = {"x": np.arange(-2, 5, dtype=np.float32).reshape(1, 7)}
    data = Data(graph_inputs(graph), lambda: iter([sample]))
    distribution = Expected(graph, data, {"x": normal_input(1)}, 6.0)
    (name,) = graph.outputs
    np.testing.assert_array_equal(distribution.means([name])[name], np.maximum(sample["x"][0], 0))
    assert distribution.ranges([name])[name] != (0.0, 4.0)  # known as a whole


def test_tensors_out_of_reach_of_statistics_come_from_samples():
    ours, theirs, graph = both(ZOO["prelu"]())
    name = graph.layers[0].result
    behind = graph.layers[1].output
    assert ours.ranges([behind]) == theirs.ranges([behind]) and ours.ranges([name]) != theirs.ranges([name])
    mixed = ours.ranges([name, behind])
    assert mixed[behind] == theirs.ranges([behind])[behind] and mixed[name] == ours.ranges([name])[name]


def test_channels_and_the_whole_agree():
    ours, _, graph = both(mobilenet())
    names = [n for n in named(graph) if channels(graph, n)]
    ranges, per = ours.ranges(names), ours.channel_ranges(names)
    means, moments = ours.means(names), ours.moments(names)
    for name in names:
        assert ranges[name] == pytest.approx((per[name][0].min(), per[name][1].max()))
        np.testing.assert_array_equal(means[name], moments[name].mean)
        assert (moments[name].square >= moments[name].mean ** 2 - 1e-12).all()


def test_histograms_and_grams_are_those_of_the_samples(tmp_path):
    """Also from a cache that the other wrote: counts do not depend on the statistics."""
    for cache in (None, tmp_path):
        ours, theirs, graph = both(mobilenet(), cache=cache)
        names = named(graph)[:6]
        a, b = ours.histograms(names), theirs.histograms(names)
        for name in names:
            np.testing.assert_array_equal(a[name].counts, b[name].counts)
            assert (a[name].low, a[name].high) == (b[name].low, b[name].high) == theirs.ranges([name])[name]
        a, b = ours.grams(graph.layers), theirs.grams(graph.layers)
        for layer in graph.layers:
            np.testing.assert_array_equal(a[layer.name].h, b[layer.name].h)


def test_a_clip_bounds_ranges():
    ours, _, graph = both(mobilenet())
    clips = [n.outputs[0].name for n in graph.nodes if n.op == "Clip"]
    assert len(clips) == 5
    for low, high in ours.ranges(clips).values():
        assert 0 <= low <= high <= 6


def test_changes_of_the_graph_take_effect():
    ours, _, graph = both(ZOO["cnn"]())
    layer = graph.layers[-1]
    before = ours.means([layer.output])[layer.output]
    graph.set_constant(layer.bias, graph.constant(layer.bias) + 5)
    np.testing.assert_allclose(ours.means([layer.output])[layer.output], before + 5, atol=1e-5)


def test_more_deviations_are_wider_spans():
    graph = load(mobilenet())
    narrow, wide = (propagate(graph, start_of(graph), deviations) for deviations in (3.0, 6.0))
    for name in graph.batchnorms:
        assert wide[name].high - wide[name].low == pytest.approx(2 * (narrow[name].high - narrow[name].low))


def test_results_do_not_depend_on_the_order_of_calls():
    names = named(load(mobilenet()))
    for order in itertools.islice(itertools.permutations(names[:4]), 3):
        ours, _, _ = both(mobilenet())
        assert {n: ours.ranges([n])[n] for n in order} == ours.ranges(names[:4])
