"""High-bias absorption: the function stays on the data it was made with, and where it cannot stay nothing is absorbed."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import audit_model, quantize, runtimes
from onnxq_plugins.graph import load
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import AbsorbBias
from tests.jobs import make_job
from tests.zoo import ZOO, Net, feeds, kinds, run

READERS = ("dense", "depthwise", "grouped", "two", "strided", "no bias", "valid")
LEFT = ("padded", "same", "one padded", "pool", "matmul", "output", "linear", "residual", "no bias to take from")
_WIDE = ("depthwise", "grouped", "strided", "valid", "padded", "same")
_ATTRS = {
    "depthwise": {"groups": 12, "pads": [0] * 4},
    "grouped": {"groups": 3, "pads": [0] * 4},
    "strided": {"pads": [0] * 4, "strides": [2, 2]},
    "no bias": {"bias": False},
    "valid": {"auto_pad": "VALID"},
    "same": {"auto_pad": "SAME_UPPER"},
}


def high(kind, top=None, seed=0):
    """A convolution (a Gemm for `gemm` and `matmul`) with biases up to 40 in front of a Relu, and what reads it."""
    flat = kind in ("gemm", "matmul", "gemm broadcast")
    net = Net(["N", 6] if flat else ["N", 3, 8, 8], seed)
    bias = np.linspace(-10, 40, 12)
    if flat:
        x = net.op("Gemm", "x", net.constant(net.rng.normal(size=(6, 12)) / 2), net.constant(bias))
    else:
        given = [] if kind == "no bias to take from" else [net.constant(bias)]
        x = net.op("Conv", "x", net.constant(net.rng.normal(size=(12, 3, 1, 1)) / 2), *given)
    x = x if kind == "linear" else net.op("Relu", x) if top is None else net.clip(x, 0.0, top)
    if kind == "gemm":
        return net.model(net.gemm(x, 12, 5, alpha=0.5, beta=2.0))
    if kind == "gemm broadcast":
        return net.model(net.op("Gemm", x, net.weight(12, 5), net.constant([[0.5]])))
    if kind == "matmul":
        return net.model(net.linear(x, 12, 5, bias=False))
    y = net.conv(x, 12, 12, 3 if kind in _WIDE else 1, **_ATTRS.get(kind, {}))
    if kind in ("two", "one padded"):
        y = net.op("Add", y, net.conv(x, 12, 12, 1 if kind == "two" else 3))
    elif kind in ("pool", "residual"):
        y = net.op("Add", y, net.op("MaxPool", x, kernel_shape=[1, 1]) if kind == "pool" else x)
    return net.model(net.head(net.op("Relu", y), 12), *([x] if kind == "output" else []))


def absorbed(model, n=8, data=None, **parameters):
    """The graph after the pass, without a margin unless one is given, and what it told."""
    job = make_job(model, {}, n)
    job.report["notes"] = []
    if data is False:
        job.calibration.data = None
    told = AbsorbBias(**{"margin": 0.0, **parameters}).apply(job)
    return job, told


def apart(model, graph, samples):
    return max(drift(run(model, feed, False), run(graph, feed, False)) for feed in samples)


@pytest.mark.parametrize("kind", [*READERS, "gemm", "gemm broadcast"])
def test_the_function_stays_on_the_data(kind):
    model = high(kind)
    job, told = absorbed(model)
    first, before = job.graph.layers[0], load(model)
    entry = told["layers"][first.name]
    assert entry["channels"] > 5 and entry["largest"] > 30
    assert apart(model, job.graph, feeds(model, 8)) <= 1e-5
    low, _ = job.calibration.channel_ranges([first.output])[first.output]
    taken = before.constant(first.bias) - job.graph.constant(first.bias)
    assert (taken >= 0).all() and taken.max() == pytest.approx(entry["largest"], abs=1e-3)
    np.testing.assert_allclose(low[taken > 0], 0, atol=1e-4)  # all that stays above 0 was taken
    for layer in before.layers:
        np.testing.assert_array_equal(before.constant(layer.weight), job.graph.constant(layer.weight))


@pytest.mark.parametrize("kind", ["dense", "gemm"])
def test_it_differs_only_where_a_channel_falls_below(kind):
    model = high(kind)
    job, _ = absorbed(model)
    name = job.graph.layers[0].output
    probe = job.graph.model()
    probe.graph.output.append(type(probe.graph.output[0])(name=name))
    taken = load(model).constant(job.graph.layers[0].bias) - job.graph.constant(job.graph.layers[0].bias)
    for scale, falls in ((0.3, False), (6.0, True)):
        for feed in feeds(model, 4, seed=5):
            feed = {"x": feed["x"] * np.float32(scale)}
            *_, lowered = runtimes.session(probe, optimize=False).run(None, feed)
            below = bool((np.moveaxis(lowered, 1, -1) < 0)[..., taken > 0].any())
            assert below == falls and (apart(model, job.graph, [feed]) > 1e-5) == below


@pytest.mark.parametrize("kind", LEFT)
def test_who_cannot_absorb_is_left_alone(kind):
    """A padded border would have to be c; a pool, a sum, a MatMul or an output have no place for it."""
    model = high(kind)
    digest = load(model).digest()
    job, told = absorbed(model)
    assert told == {"layers": {}} or job.graph.layers[0].name not in told["layers"]
    assert job.graph.digest() == digest or told["layers"]
    assert apart(model, job.graph, feeds(model, 8)) <= 1e-5


@pytest.mark.parametrize("top", [20.0, 1000.0])
def test_behind_a_clip_only_what_stays_below_it(top):
    model = high("dense", top)
    job, _ = absorbed(model)
    before, first = load(model), job.graph.layers[0]
    taken = before.constant(first.bias) - job.graph.constant(first.bias)
    low, reach = make_job(model, {}, 8).calibration.channel_ranges([first.output])[first.output]
    np.testing.assert_array_equal(taken > 0, (low > 0) & (reach < top))
    assert ((taken > 0).sum() < (low > 0).sum()) == (top == 20.0)
    assert apart(model, job.graph, feeds(model, 8)) <= 1e-5


def test_margin_leaves_room():
    model = high("dense")
    taken = []
    for margin in (0.0, 0.1, 100.0):
        job, _ = absorbed(model, margin=margin)
        first = job.graph.layers[0]
        low, reach = make_job(model, {}, 8).calibration.channel_ranges([first.output])[first.output]
        taken.append(load(model).constant(first.bias) - job.graph.constant(first.bias))
        np.testing.assert_allclose(taken[-1], np.maximum(low - margin * (reach - low), 0), atol=1e-4)
    assert (taken[0] >= taken[1]).all() and taken[1].any() and not taken[2].any()
    with pytest.raises(ValueError, match=r"margin = -1 must not be negative"):
        AbsorbBias(margin=-1)


def test_without_data():
    job, told = absorbed(high("dense"), data=False)
    assert told == {"layers": {}} and "absorb-bias was skipped: without --data" in job.report["notes"][0]
    assert job.graph.digest() == load(high("dense")).digest()


@pytest.mark.parametrize("name", kinds([n for n in ZOO if n != "no_layer"], "dead_channels"))
def test_the_zoo(name):
    model = ZOO[name]()
    job, _ = absorbed(model)
    assert apart(model, job.graph, feeds(model, 8)) <= 1e-5


def test_twice_is_once():
    model = high("dense")
    job, _ = absorbed(model)
    biases = {y.bias: job.graph.constant(y.bias) for y in job.graph.layers}
    AbsorbBias().apply(job)
    for name, values in biases.items():
        np.testing.assert_allclose(job.graph.constant(name), values, atol=1e-3)


def test_statistics_follow():
    """beta is the mean of the layer's output."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.batchnorm(net.conv("x", 3, 8, 1, bias=False), 8))
    model = net.model(net.head(net.op("Relu", net.conv(x, 8, 12, 1)), 12))
    job = make_job(model, {}, 8)
    first = job.graph.layers[0]
    job.graph.set_constant(first.bias, job.graph.constant(first.bias) + 20)
    before, norm = job.calibration.moments([first.output])[first.output], job.graph.batchnorms[first.output]
    assert AbsorbBias().apply(job)["layers"][first.name]["channels"] == 8
    after, moved = job.calibration.moments([first.output])[first.output], job.graph.batchnorms[first.output]
    np.testing.assert_allclose(norm.beta - moved.beta, before.mean - after.mean, rtol=1e-4)
    np.testing.assert_array_equal(norm.gamma, moved.gamma)


@pytest.mark.parametrize("kind", ["gemm", "depthwise"])
def test_the_range_shrinks_and_so_does_the_error(kind):
    model = high(kind)
    data = feeds(model, 16)
    plain, made = (
        quantize(model, {"pass": [*steps, {"use": "ranges"}, {"use": "bias-correct"}]}, data)
        for steps in ([], [{"use": "absorb-bias"}])
    )
    name = load(model).layers[0].result
    assert float(made.plan[name].scale) < float(plain.plan[name].scale) / 3
    outputs = [runtimes.outputs(runtimes.session(m), data)[0] for m in (model, plain.model, made.model)]
    errors = [float(np.mean((found - outputs[0]) ** 2)) for found in outputs[1:]]
    assert kind != "gemm" or errors[1] < errors[0] / 2, errors  # convolutions write their large means in 8 bits all the same
    assert all(y.quantized for y in audit_model(made.model).layers)
    assert made.report["steps"][0]["exact"] is False


def test_what_was_solved_for_the_old_inputs_is_dropped():
    """Ranges of the lowered activation, and the bias shifts of its readers, which hold its mean."""
    model = high("depthwise")
    data = feeds(model, 8)
    steps = [{"use": "ranges"}, {"use": "bias-correct"}]
    late = quantize(model, {"weights": {"bits": 4}, "pass": [*steps, {"use": "absorb-bias"}]}, data)
    early = quantize(model, {"weights": {"bits": 4}, "pass": [{"use": "absorb-bias"}, *steps]}, data)
    graph = load(model)
    first, second = graph.layers[:2]
    assert float(late.plan[first.result].scale) == pytest.approx(float(early.plan[first.result].scale), rel=1e-4)
    assert late.plan[second.weight].shift is None and early.plan[second.weight].shift is not None
    assert late.plan[first.weight].shift is not None
