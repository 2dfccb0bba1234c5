"""Subtensors: the clusters are optimal, splitting by output channels is exact and stays integer, few scales gain much."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, audit_model, quantize, runtimes
from onnxq_plugins.graph import load
from onnxq_plugins.measure import drift, sqnr
from onnxq_plugins.passes import Subtensor
from onnxq_plugins.plan.values import weight_values
from tests.zoo import (
    ZOO,
    Net,
    cnn,
    conv_transpose,
    dead_channels,
    feeds,
    grouped,
    kinds,
    mlp,
    mobilenet,
    run,
    slowly,
)


def recipe(step=None, block="tensor", **more):
    """Ranges and, if its parameters are given, subtensor."""
    passes = [{"use": "ranges"}, *([{"use": "subtensor", **step}] if step is not None else [])]
    return {"weights": {"bits": 8, "block": block}, "pass": passes, **more}


def spread(kind):
    """Outputs of a layer whose channels range over 1000 : 1, brought to one size behind it in float; behind a Max, which
    changes nothing, since import would move the factors into the layer."""
    net = Net(["N", 8, 6, 6] if kind != "gemm" else ["N", 24])
    size = np.random.default_rng(1).permutation(np.logspace(-3, 0, 24)).astype(np.float32)
    if kind == "gemm":
        y = net.op("Gemm", "x", net.constant(net.rng.normal(size=(24, 24)) * size[:, None]), net.constant(size), transB=1)
        y = net.op("Max", y, net.constant(-1000.0))
        return net.model(net.op("Mul", net.op("Tanh", net.op("Mul", y, net.constant(1 / size / 8))), net.constant(2.0)))
    groups = 8 if kind == "depthwise" else 1
    weight = net.rng.normal(size=(24, 8 // groups, 3, 3)) * size[:, None, None, None]
    y = net.op("Conv", "x", net.constant(weight), net.constant(size), pads=[1] * 4, group=groups)
    y = net.op("Max", y, net.constant(-1000.0))
    return net.model(net.op("Tanh", net.op("Mul", y, net.constant((1 / size / 8).reshape(24, 1, 1)))))


def measure(model, made, data):
    reference = runtimes.outputs(runtimes.session(model), data)[0]
    return sqnr(reference, runtimes.outputs(runtimes.session(made.model), data)[0])


@pytest.mark.parametrize("kind", ["gemm", "conv", "depthwise"])
def test_few_scales_gain_much(kind):
    """Convolutions by their weights alone: one 8-bit scale for their outputs would hide what the weights gain."""
    model, more = spread(kind), {}
    if kind != "gemm":
        more = {"target": "storage", "activations": {"bits": 32}}
    data = feeds(model, 16)
    plain = measure(model, quantize(model, recipe(**more), data), data)
    for split in (False, True):
        db = [
            measure(model, quantize(model, recipe({"clusters": k, "split": split}, **more), data, verify=True), data)
            for k in (1, 2, 4, 24)
        ]
        assert db[0] == pytest.approx(plain) and db[1] > plain + 2 and db[2] > plain + 6 and db[3] > plain + 20, db


@pytest.mark.parametrize("name", kinds([n for n in ZOO if n not in ("no_layer", "conv_transpose")], "dead_channels"))
def test_both_realisations_compute_the_same(name):
    """Bit for bit up to the order of float sums, and in integer kernels."""
    model = ZOO[name]()
    data = feeds(model, 4)
    step = {"clusters": 3, "gain": 1.05}
    few, split = (quantize(model, recipe({**step, "split": s}), data, verify=True) for s in (False, True))
    report = split.report["steps"][1]["result"]
    left = set(report["left_alone"]) - set(few.report["steps"][1]["result"]["left_alone"])  # grouped ones
    assert report["layers"] and all(v == few.report["steps"][1]["result"]["layers"][n] for n, v in report["layers"].items())
    assert all("cannot be split" in report["left_alone"][n] for n in left)
    if not left:
        outputs = [runtimes.outputs(runtimes.session(m.model), data) for m in (few, split)]
        assert drift(*outputs) < 1e-5
    weights = [spec for spec in split.plan.values() if spec.codes is not None]
    assert all(spec.scale.ndim == 0 and spec.block is None for spec in weights)
    assert all(len(np.unique(spec.scale)) <= 3 for spec in few.plan.values() if spec.codes is not None)
    assert len(weights) == len([s for s in few.plan.values() if s.codes is not None]) + sum(
        v["clusters"] - 1 for v in report["layers"].values()
    )
    plain = {y.name for y in audit_model(quantize(model, recipe(), data).model).layers if not y.quantized}
    audit = audit_model(split.model)
    assert {y.name.partition("_part")[0] for y in audit.layers if not y.quantized} <= plain
    assert json.loads(json.dumps(split.report)) == split.report


@pytest.mark.parametrize("make", [cnn, mobilenet])
def test_a_chain_stays_integer(make):
    model = make()
    result = quantize(model, recipe({"split": True, "gain": 1.0}), feeds(model, 4))
    audit = audit_model(result.model)
    assert all(y.quantized for y in audit.layers) and not set(audit.other) & {"Clip", "Relu"}
    assert audit.other["QLinearConcat"] == sum(n.op == "Concat" for n in load(model).nodes) + len(load(model).layers) - 1
    assert audit.other["Concat"] == 1  # of the last Gemm, which writes float


def test_parts_write_on_the_scale_of_the_whole():
    model = mobilenet()
    result = quantize(model, recipe({"split": True}), feeds(model, 4), settings=["ranges.method=mse"])
    plain = quantize(model, recipe(), feeds(model, 4), settings=["ranges.method=mse"])
    assert result.report["steps"][1]["result"]["channel_groups_reordered"] > 0

    def scales(made):
        return {float(spec.scale) for spec in made.plan.values() if spec.codes is None}

    assert scales(result) == scales(plain)


@pytest.mark.parametrize("split", [False, True])
def test_open_ranges_are_solved_later(split):
    model = mobilenet()
    result = quantize(
        model, {**recipe(), "pass": [{"use": "subtensor", "split": split}, {"use": "ranges"}]}, feeds(model, 4)
    )
    assert any("put the pass ranges before" in note for note in result.report["notes"]) == split
    assert all(y.quantized for y in audit_model(result.model).layers)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["cnn", "transformer", *slowly("mobilenet", "mlp")])
def test_one_cluster_is_one_scale(name, split):
    model = ZOO[name]()
    data = feeds(model, 2)
    plain = quantize(model, recipe(), data)
    result = quantize(model, recipe({"clusters": 1, "gain": 1.0, "split": split}), data)
    assert list(result.plan) == list(plain.plan)
    for key, spec in plain.plan.items():
        if spec.codes is not None:
            np.testing.assert_array_equal(result.plan[key].codes, spec.codes)
            assert np.unique(result.plan[key].scale) == spec.scale
    feed = feeds(model, 1, seed=1)[0]
    assert drift(run(plain.model, feed), run(result.model, feed)) == 0


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "mlp", "dead_channels"])
def test_a_cluster_per_channel_is_a_scale_per_channel(name):
    model = ZOO[name]()
    data = feeds(model, 2)
    plain = quantize(model, recipe(block="channel"), data)
    result = quantize(model, recipe({"clusters": 99, "gain": 1.0}), data)
    layers = {y.weight: y for y in load(model).layers}
    for key, spec in plain.plan.items():
        if spec.codes is not None:
            np.testing.assert_array_equal(result.plan[key].codes, spec.codes)
            np.testing.assert_array_equal(weight_values(layers[key], result.plan[key]), weight_values(layers[key], spec))
            alive = spec.codes.any(axis=tuple(a for a in range(spec.codes.ndim) if a != layers[key].out_axis), keepdims=True)
            np.testing.assert_array_equal(result.plan[key].scale[alive], spec.scale[alive])


def left_alone(model, step, **more):
    result = quantize(model, recipe(step, **more), feeds(model, 2))
    report = result.report["steps"][1]["result"]
    assert set(report["layers"]) | set(report["left_alone"]) == {y.name for y in load(model).layers}
    return report["left_alone"]


def test_what_is_left_alone_is_told():
    assert all("would fall only by" in why for why in left_alone(mlp(), {"gain": 1e6}).values())
    for split in (True, False):  # scales per channel are finer already
        told = left_alone(mlp(), {"split": split}, block="channel")
        assert all('int8 per channel; set weights.block = "tensor"' in why for why in told.values())
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.op("Conv", "x", net.constant(np.zeros((8, 3, 1, 1)))))
    assert left_alone(net.model(net.head(x, 8)), {"gain": 1.0}) == {"conv0": "its weights are all 0"}
    found = left_alone(conv_transpose(), {"split": True, "gain": 1.0}, target="storage")
    assert len(found) == 2 and all("ConvTranspose cannot be split" in why for why in found.values())
    assert not left_alone(conv_transpose(), {"gain": 1.0}, target="storage")
    assert any("a grouped Conv cannot" in why for why in left_alone(grouped(), {"split": True, "gain": 1.0}).values())
    assert not left_alone(grouped(), {"gain": 1.0})
    found = left_alone(mlp(), {"gain": 1.0}, weights={"bits": 4, "block": "tensor", "sub_block": 8})
    assert any("sub-block" in why for why in found.values())


def test_solved_scales_are_kept():
    model = mobilenet()
    steps = [{"use": "ranges"}, {"use": "sub-layer"}]
    both = [
        quantize(model, {**recipe(), "pass": steps + more}, feeds(model, 4))
        for more in ([], [{"use": "subtensor", "split": True, "gain": 1.0}])
    ]
    assert set(both[1].report["steps"][2]["result"]["left_alone"].values()) == {"its scales are solved"}
    for key, spec in both[0].plan.items():
        assert spec.codes is None or np.array_equal(both[1].plan[key].codes, spec.codes)


@pytest.mark.parametrize(
    "steps",
    [
        [{"use": "round", "method": "gptq"}],
        [{"use": "bias-correct", "method": "analytic"}],
        [{"use": "sub-layer"}, {"use": "bias-correct"}],
    ],
)
def test_later_passes_take_the_parts_as_layers(steps):
    model = mobilenet()
    data = feeds(model, 8)
    before = [{"use": "ranges"}, {"use": "subtensor", "split": True}]
    plain, made = (quantize(model, {**recipe(), "pass": before + more}, data, verify=True) for more in ([], steps))
    assert all(y.quantized for y in audit_model(made.model).layers)
    assert measure(model, made, data) > measure(model, plain, data) - 3


@pytest.mark.parametrize("ops", [[], ["Relu"], ["Relu", "Tanh"]])
def test_float_readers_behind_a_gemm(ops):
    net = Net(["N", 24])
    x = net.gemm("x", 24, 16)
    for op in ops:
        x = net.op(op, x)
    model = net.model(net.op("Softmax", x))
    result = quantize(model, recipe({"split": True, "gain": 1.0}), feeds(model, 8), verify=True)
    audit = audit_model(result.model)
    assert len(audit.layers) == 4 and {y.kernel for y in audit.layers} == {"QGemm"}
    assert measure(model, result, feeds(model, 8)) > 25


def test_dead_channels_make_no_layer_of_their_own():
    result = quantize(dead_channels(), recipe({"split": True, "gain": 1.0, "clusters": 8}), feeds(dead_channels(), 2))
    assert all(spec.codes.any() for spec in result.plan.values() if spec.codes is not None)


def test_balance_spares_the_small_channels():
    """And those that are all but dead do not count."""
    model = spread("gemm")
    data = feeds(model, 16)
    db = [measure(model, quantize(model, recipe({"balance": b}), data), data) for b in (0.0, 1.0)]
    assert db[1] > db[0] + 6
    net = Net(["N", 6])
    weight = np.diag([1e-6, 1.0, 1.1, 1.2, 2.0, 2.1])
    model = net.model(net.op("Gemm", "x", net.constant(weight), net.constant(np.zeros(6)), transB=1))
    result = quantize(model, recipe({"clusters": 2, "gain": 1.0, "balance": 2.0}), feeds(model, 4))
    (scale,) = (spec.scale.ravel() for spec in result.plan.values() if spec.codes is not None)
    assert scale.tolist() == pytest.approx([1.2 / 127] * 4 + [2.1 / 127] * 2)


@pytest.mark.parametrize("parameters", [{"clusters": 0}, {"gain": 0.5}, {"gain": float("nan")}, {"balance": -1.0}])
def test_wrong_parameters(parameters):
    with pytest.raises(ValueError, match=f"{next(iter(parameters))} = .* at least [01]"):
        Subtensor(**parameters)
    with pytest.raises(OnnxqError):
        quantize(mlp(), recipe(parameters), feeds(mlp(), 1))
