"""The range in front of an activation leaves out what the activation makes alike, however it is written."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.graph import load
from onnxq_plugins.graph.activations import activation_of
from onnxq_plugins.measure import sqnr
from onnxq_plugins.passes.activation_ranges import best_range
from onnxq_plugins.spec import QuantSpec, decode, encode, from_range
from tests.zoo import Net, feeds, run


def silu(net, x):
    return net.op("Mul", net.op("Sigmoid", x), x)


def mish(net, x):
    return net.op("Mul", x, net.op("Tanh", net.op("Softplus", x)))


def quick_gelu(net, x):
    return net.op("Mul", x, net.op("Sigmoid", net.op("Mul", x, net.constant(1.702))))


WRITTEN = {
    "SiLU": silu,
    "Mish": mish,
    "GELU": lambda net, x: net.gelu_erf(x),
    "HardSwish": lambda net, x: net.hardswish(x),
    "QuickGELU": quick_gelu,
    "Sigmoid": lambda net, x: net.op("Sigmoid", x),
    "LeakyRelu": lambda net, x: net.op("LeakyRelu", x, alpha=0.1),
}


def network(activation, mean=-6.0):
    """A convolution whose values lie mostly where many activations are flat."""
    net = Net([1, 3, 12, 12])
    weight = net.rng.normal(size=(8, 3, 3, 3))
    y = net.op("Conv", "x", net.constant(weight), net.constant(np.full(8, mean)), pads=[1] * 4)
    return net.model(net.conv(activation(net, y), 8, 4, 1))


@pytest.mark.parametrize("name", WRITTEN)
def test_an_activation_is_one_function_whatever_it_is_written_as(name):
    model = network(WRITTEN[name])
    graph = load(model)
    first, second = graph.layers
    f = activation_of(graph, first.result)
    assert f is not None and f.name == name and (f.input, f.output) == (first.result, second.input)
    assert {n.outputs[0].name for n in f.nodes} == {*f.inner, f.output}
    net = Net([64])
    y = WRITTEN[name](net, "x")
    x = np.linspace(-9, 9, 64, dtype=np.float32)
    np.testing.assert_allclose(f(x), run(net.model(y), {"x": x})[0], atol=2e-6)


def test_what_others_read_or_channels_differ_in_is_no_activation():
    net = Net([1, 3, 8, 8])
    y = net.conv("x", 3, 4)
    graph = load(net.model(silu(net, y), net.op("Neg", y)))
    assert activation_of(graph, graph.layers[0].result) is None
    net = Net([1, 3, 8, 8])
    y = net.op("PRelu", net.conv("x", 3, 4), net.weight(4, 1, 1))
    graph = load(net.model(y))
    assert activation_of(graph, graph.layers[0].result) is None


@pytest.mark.parametrize("name", ["SiLU", "HardSwish"])
def test_flat_ends_are_left_out_and_outputs_gain(name):
    model = network(WRITTEN[name])
    samples, fresh = feeds(model, 8), feeds(model, 4, seed=1)
    both = []
    for first in ([], [{"use": "activation-ranges"}]):
        result = quantize(model, {"pass": [*first, {"use": "ranges"}]}, samples, workers=1)
        both.append(sqnr(*(np.concatenate([run(m, x, optimize=False)[0] for x in fresh]) for m in (model, result.model))))
    assert both[1] > both[0] + 0.2, both
    ((tensor, row),) = result.report.steps[0]["result"]["activations"].items()
    assert row["activation"] == name and row["gain"] > 1
    assert result.plan[tensor].value_range[0] > -9


@pytest.mark.parametrize("name", ["LeakyRelu", "SiLU"])
def test_where_nothing_is_flat_nothing_changes(name):
    model = network(WRITTEN[name], mean=30.0 if name == "SiLU" else -6.0)
    plain, other = (
        quantize(model, {"pass": [*first, {"use": "ranges"}]}, feeds(model, 4), workers=1)
        for first in ([], [{"use": "activation-ranges"}])
    )
    assert other.model.graph == plain.model.graph


def test_the_chosen_range_has_the_least_error_of_rounded_values():
    rng = np.random.default_rng(0)
    spec = QuantSpec(symmetric=False)
    graph = load(network(silu))
    f = activation_of(graph, graph.layers[0].result)
    mean, width = np.array([-8.0, -4.0, 0.0, 1.0]), np.array([2.0, 2.0, 1.0, 0.5])
    x = mean + width * rng.normal(size=(20000, 4))
    low, high = x.min(axis=0), x.max(axis=0)
    (start, end), gain = best_range(f, low, high, mean, spec)

    def error(first, last):
        grid = from_range(first, last, spec)
        return np.square(f(decode(encode(x, grid), grid)) - f(x)).mean()

    whole, best = error(low.min(), high.max()), error(start, end)
    assert gain == pytest.approx(10 * np.log10(whole / best), abs=1.5) and gain > 3
    assert all(best < 1.2 * error(first, high.max()) for first in np.linspace(low.min(), -1, 20))


def test_parameters():
    with pytest.raises(Exception, match="gain"):
        quantize(network(silu), {"pass": [{"use": "activation-ranges", "gain": 0}]}, feeds(network(silu), 1))
