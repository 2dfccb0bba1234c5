"""A few wide channels are computed in float, exactly, and only where prediction says that it pays."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import audit_model, quantize
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.graph import load, split_off_inputs
from onnxq_plugins.measure import drift, sqnr
from onnxq_plugins.solvers.outliers import cheapest, noise, widest_first
from onnxq_plugins.spec import QuantSpec, decode, encode, fake, from_range, solve_minmax
from tests.zoo import Net, feeds, run

WIDE = [3, 17, 40]  # channels of an input that are far larger than all others
WIDTH = 64


FREE = {"worth": 1e-6}  # dB for a percent: in a network this small, three more operators cost more than the layer


def wide(net, x, shape, channels=WIDE):
    """A tensor with a few large channels, written in float; the Max, which changes nothing, keeps import from moving the
    factors into the layer behind."""
    factors = np.ones(WIDTH, np.float32)
    factors[channels] = 60.0
    return net.op("Max", net.op("Mul", net.op("Tanh", x), net.constant(factors.reshape(shape))), net.constant(-1000.0))


def linear(net, x, outputs, bias=True, channels=WIDE):
    """A product in which wide channels say no more than others."""
    weight = net.rng.normal(size=(WIDTH, outputs))
    weight[channels] /= 60.0
    y = net.op("MatMul", x, net.constant(weight))
    return net.op("Add", y, net.weight(outputs)) if bias else y


def tokens(layers, channels=WIDE):
    net = Net(["N", 12, WIDTH])
    return net.model(layers(net, wide(net, "x", [WIDTH], channels)))


def matmul(net, x):
    return linear(net, x, 48)


def bare(net, x):
    return net.op("Tanh", linear(net, x, 48, bias=False))


def gelu(net, x):
    return net.linear(net.gelu_erf(linear(net, x, 48)), 48, 16)


def several(net, x):
    return net.op("Add", net.op("Mul", linear(net, x, 32), linear(net, x, 32)), linear(net, x, 32))


def gemm(net, x):
    return linear(net, net.op("Reshape", x, net.constant([-1, WIDTH], np.int64)), 20)


def image(k=3, after=lambda net, y: y):
    net = Net(["N", WIDTH, 8, 8])
    weight = net.rng.normal(size=(24, WIDTH, k, k))
    weight[:, WIDE] /= 60.0
    x = wide(net, "x", [WIDTH, 1, 1])
    return net.model(after(net, net.op("Conv", x, net.constant(weight), net.weight(24), pads=[k // 2] * 4)))


def relu(net, y):
    return net.conv(net.op("Relu", y), 24, 8)


MODELS = {
    "MatMul": tokens(matmul),
    "MatMul without bias": tokens(bare),
    "a second layer behind it": tokens(gelu),
    "three readers": tokens(several),
    "Gemm behind a Reshape": tokens(gemm),
    "Conv": image(),
    "Conv 1x1": image(1),
    "Conv, Relu, Conv": image(3, relu),
}


def recipe(*first):
    return {"pass": [*({"use": "split-outliers", **values} for values in first), {"use": "ranges"}, {"use": "bias-correct"}]}


@pytest.mark.parametrize("name", MODELS)
def test_small_channels_beside_wide_ones_keep_their_values(name):
    model = MODELS[name]
    samples, fresh = feeds(model, 8), feeds(model, 3, seed=1)
    plain, split = (quantize(model, recipe(*use), samples, verify=True, workers=1) for use in ((), (FREE,)))

    def quality(result):
        both = [np.concatenate([run(m, x, optimize=False)[0] for x in fresh]) for m in (model, result.model)]
        return sqnr(*both)

    before, after = quality(plain), quality(split)
    assert after > before + 6, (before, after)
    result = split.report.steps[0]["result"]
    assert result["gain"] > 6 and any({*WIDE} <= {*row["channels"]} for row in result["layers"].values())
    assert any("would widen the grid" in note for note in split.report.notes)
    audit = {row.name: row for row in audit_model(split.model).layers}
    for layer in result["layers"]:
        assert audit[layer].quantized and not audit[f"{layer}_outliers"].quantized
        (row,) = (row for row in split.report.layers if row["name"] == f"{layer}_outliers")
        assert row["why_float_kind"] == "outliers"
    for x in fresh[:1]:
        assert sqnr(run(split.model, x, optimize=False)[0], run(split.model, x)[0]) > 30


def test_grid_leaves_the_wide_channels_out():
    result = quantize(MODELS["MatMul"], recipe(FREE), feeds(MODELS["MatMul"], 8), workers=1)
    (spec,) = (result.plan[name] for name in result.plan if not result.graph.is_constant(name))
    assert max(map(abs, spec.value_range)) < 1.5
    layer = next(y for y in result.graph.layers if y.weight in result.plan)
    assert not result.graph.constant(layer.weight)[WIDE].any()


def left_alone():
    yield "no wide channel", tokens(matmul, []), True, FREE
    yield "too many wide channels", tokens(matmul, list(range(0, WIDTH, 3))), True, FREE
    net = Net(["N", 3, 8, 8])
    y = net.op("Relu", net.conv("x", 3, 32))
    yield "integer kernels write all tensors", net.model(net.head(net.op("Relu", net.conv(y, 32, 32)), 32)), False, FREE
    net = Net(["N", WIDTH, 8, 8])
    depthwise = net.conv(wide(net, "x", [WIDTH, 1, 1]), WIDTH, WIDTH, groups=WIDTH)
    yield "a depthwise layer reads it", net.model(depthwise), False, FREE
    yield "three operators cost more than the layer", MODELS["MatMul"], True, {}


@pytest.mark.parametrize(("model", "looks", "more"), [pytest.param(*case, id=name) for name, *case in left_alone()])
def test_others_stay_as_they_are(model, looks, more, monkeypatch):
    count = []
    fold = Calibration._run
    monkeypatch.setattr(Calibration, "_run", lambda self, *args: count.append(1) or fold(self, *args))
    samples = feeds(model, 4)
    plain = quantize(model, recipe(), samples, workers=1)
    single = len(count)
    split = quantize(model, recipe(more), samples, workers=1)
    assert split.report.steps[0]["result"]["layers"] == {} and split.model.graph == plain.model.graph
    assert looks or len(count) == 2 * single


def test_without_data_nothing_happens():
    weights = {"weights": {"bits": 4, "block": 32}, "activations": {"bits": 32}, "pass": [{"use": "split-outliers"}]}
    assert quantize(MODELS["MatMul"], weights).report.steps[0]["result"] == {"layers": {}}


def test_later_statistics_need_no_second_run(monkeypatch):
    """Of all samples: sizes are measured on a few."""
    runs = []
    fold = Calibration._run
    monkeypatch.setattr(Calibration, "_run", lambda self, *args: runs.append(self.data.size) or fold(self, *args))
    samples = feeds(MODELS["three readers"], 12)
    quantize(MODELS["three readers"], recipe(FREE), samples, workers=1)
    assert runs == [12, 8]


@pytest.mark.parametrize("name", MODELS)
def test_rewrite_is_exact(name):
    model = MODELS[name]
    graph, rng = load(model), np.random.default_rng(0)
    for tensor in dict.fromkeys(y.input for y in graph.layers):
        layers = [y for y in graph.layers if y.input == tensor]
        size = layers[0].shape[layers[0].in_axis]
        made = split_off_inputs(graph, layers, rng.choice(size, 5, replace=False))
        assert all(new.shape[new.in_axis] == 5 and new.bias is None for new in made)
        assert len({new.input for new in made}) == 1
    graph.tidy()
    for feed in feeds(model, 2):
        assert drift(run(model, feed), run(graph, feed)) < 1e-5


def test_rewrite_refuses_what_it_cannot_split():
    graph = load(image(3, lambda net, y: net.conv(y, 24, 24, groups=24)))
    with pytest.raises(ValueError, match="dense"):
        split_off_inputs(graph, [graph.layers[1]], [0])
    with pytest.raises(ValueError, match="same tensor"):
        split_off_inputs(graph, graph.layers, [0])


# ---- prediction -----------------------------------------------------------------------------------------------------------


def test_the_widest_channels_go_first():
    low, high = np.array([-1.0, 0, -9, -1, 0]), np.array([1.0, 20, 1, 2, 19])
    assert widest_first(low, high, 4).tolist() == [2, 1, 4, 3]


@pytest.mark.parametrize("groups", [1, 4])
def test_predicted_noise_is_that_of_random_rounding(groups):
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 2, 16)
    size[5] = 30
    x = rng.uniform(-1, 1, (20000, 16)) * size
    weight = rng.normal(size=(groups, 8, 16 // groups))
    grid, codes = QuantSpec(symmetric=False), QuantSpec(block=(1, 0))
    order = np.array([5] if groups == 1 else [], np.int64)
    predicted = noise(-size, size, np.square(x).mean(axis=0), weight, grid, codes, order)
    for count, expected in enumerate(predicted):
        kept = np.setdiff1d(np.arange(16), order[:count])
        ends = from_range(-size[kept].max(), size[kept].max(), grid)
        rounded = decode(encode(x, ends), ends)
        errors = 0.0
        for g in range(groups):
            mine = np.intersect1d(kept, np.arange(16 // groups) + g * (16 // groups))
            part = weight[g][:, mine - g * (16 // groups)]
            errors += (
                np.square(x[:, mine] @ part.T - rounded[:, mine] @ fake(part, solve_minmax(part, codes)).T).sum(1).mean()
            )
        assert abs(10 * np.log10(errors / expected)) < 1.5


def test_steps_are_taken_by_gain_for_their_cost():
    noises = [np.array([8.0, 8.0, 1.0]), np.array([4.0, 1.0]), np.array([2.0, 1.9])]
    costs = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 3.0]), np.array([0.0, 1.0])]
    steps = cheapest(noises, costs, 1.0, 0.5)
    assert [(step.tensor, step.channels) for step in steps] == [(0, 2), (1, 1)]
    assert steps[-1].noise == pytest.approx(5.0) and steps[-1].cost == 5.0
    assert cheapest(noises, costs, 1.0, 10.0) == [] and cheapest([], [], 1.0, 0.5) == []


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"gain": 0}, {"worth": -1}])
def test_parameters(wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        quantize(MODELS["MatMul"], {"pass": [{"use": "split-outliers", **wrong}]}, feeds(MODELS["MatMul"], 1))
