"""Coarse and fine weight splitting: the parts are the weight to the last bit, the rewrite is exact and stays integer, and a
re-parameterised network gains more than 10 dB."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.split_weights import FLOAT, measure, network
from onnxq_plugins import OnnxqError, audit_model, quantize
from onnxq_plugins.graph import load, replace_with_sum
from onnxq_plugins.graph.rewrites import centre_of, centre_pads
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import SplitWeights
from onnxq_plugins.passes.split_weights import error, split
from onnxq_plugins.runtimes.openvino import audit_openvino
from onnxq_plugins.spec import QuantSpec, decode, solve_minmax
from tests.zoo import Net, conv_transpose, examples, feeds, mlp, mobilenet, run, some

# Convolutions, each with what it must keep: rank, channels in and out, kernel, attributes.
KINDS = {
    "plain": (2, 4, 6, (3, 3), {"pads": [1] * 4}),
    "strides": (2, 4, 6, (3, 5), {"pads": [1, 2, 1, 2], "strides": [2, 3]}),
    "dilation": (2, 4, 6, (3, 3), {"pads": [2] * 4, "dilations": [2, 2]}),
    "wide pads": (2, 4, 6, (3, 3), {"pads": [2, 1, 1, 3], "strides": [2, 1]}),
    "groups": (2, 4, 6, (3, 3), {"pads": [1] * 4, "group": 2}),
    "depthwise": (2, 4, 4, (3, 3), {"pads": [1] * 4, "group": 4, "strides": [2, 2]}),
    "one axis": (2, 4, 6, (1, 7), {"pads": [0, 3, 0, 3]}),
    "1-D": (1, 4, 6, (5,), {"pads": [2, 2], "strides": [2]}),
    "3-D": (3, 4, 6, (3, 1, 3), {"pads": [1, 0, 1] * 2}),
    "same": (2, 4, 6, (3, 3), {"auto_pad": "SAME_UPPER"}),
    "same, strided": (2, 4, 6, (3, 5), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
}
BEHIND = ("relu", "none", "residual", "output", "both", "no bias")
TARGETS = ("ort-cpu", "ort-cpu-avx2", "openvino")
ONCE = tuple(dict.fromkeys([*((kind, "relu") for kind in KINDS), *(("plain", behind) for behind in BEHIND)]))


def outlier(net, cin, cout, kernel, groups=1, times=20.0):
    """A weight whose centre taps are that many times larger than the others."""
    weight = net.rng.normal(size=(cout, cin // groups, *kernel)) / np.sqrt(cin // groups * np.prod(kernel)) / 10
    weight[centre_of(weight.shape)] *= times
    return net.constant(weight)


def model_of(kind, behind="relu", size=9):
    """One convolution with outliers between others; `behind` is what reads it."""
    rank, cin, cout, kernel, attrs = KINDS[kind]
    net = Net(["N", 3, *[size] * rank])
    x = net.op("Relu", net.conv("x", 3, cin, rank=rank))
    weight = outlier(net, cin, cout, kernel, attrs.get("group", 1))
    y = net.op("Conv", x, weight, *([] if behind == "no bias" else [net.weight(cout)]), **attrs)
    if behind == "output":
        return net.model(y)
    if behind == "residual":
        y = net.op("Add", y, net.op("Conv", x, outlier(net, cin, cout, kernel, attrs.get("group", 1)), **attrs))
    z = y if behind == "none" else net.op("Relu", y)
    z = net.conv(z, cout, 3, 1, rank=rank, pads=[0] * 2 * rank)
    return net.model(z, y) if behind == "both" else net.model(z)


def recipe(step=None, bits=8, block="channel", **more):
    """Split and, behind it, ranges."""
    return {
        "weights": {"bits": bits, "block": block},
        "pass": [{"use": "split-weights", "below": 99.0, **(step or {})}, {"use": "ranges"}],
        **more,
    }


def told(made):
    return made.report["steps"][0]["result"]


# ---- the arithmetic -------------------------------------------------------------------------------------------------


@examples(200)
@given(
    bits=st.integers(2, 8),
    block=st.sampled_from([None, (1, 0, 0, 0), (1, 2, 0, 0), (4, 2, 0, 0)]),
    pow2=st.booleans(),
    sub=st.booleans(),
    times=st.floats(0, 200),
    size=st.floats(1e-6, 1e6),
    seed=st.integers(0, 999),
)
def test_parts_are_the_weight_to_the_last_bit(bits, block, pow2, sub, times, size, seed):
    net = Net(["N", 6, 8, 8], seed)
    layer = load(net.model(net.conv("x", 6, 8))).layers[0]
    weight = (net.rng.normal(size=(8, 6, 3, 3)) * size).astype(np.float32)
    weight[:, :, 1, 1] *= times * net.rng.integers(0, 2, (8, 1))
    sub_block = (1, 2, 0, 0) if sub and block in (None, (1, 0, 0, 0)) and bits < 8 else None
    spec = QuantSpec(bits, True, block, sub_block, pow2)
    coarse, fine = split(layer, weight, spec)
    values = decode(coarse.codes, coarse)
    whole = np.zeros(weight.shape)
    whole[:, :, 1:2, 1:2] = values
    np.testing.assert_array_equal(whole + fine.astype(np.float64), weight.astype(np.float64))
    assert (np.abs(fine[:, :, 1:2, 1:2]) <= np.asarray(coarse.scale) / 2 * (1 + 1e-5)).all()
    assert np.abs(coarse.codes).max() <= coarse.grid[1] and coarse.scale.shape == (() if block is None else (8, 1, 1, 1))
    again = solve_minmax(values, coarse.request())  # dropped and solved anew, it is as exact
    np.testing.assert_allclose(decode(np.rint(values / again.scale), again), values, rtol=1e-5)


@examples(60)
@given(
    bits=st.integers(3, 8),
    block=st.sampled_from(["tensor", "channel"]),
    times=st.floats(0.5, 100),
    gain=st.sampled_from([0.0, 6.0]),
    seed=st.integers(0, 999),
)
def test_split_only_where_the_error_falls(bits, block, times, gain, seed):
    net = Net(["N", 4, 6, 6], seed)
    x = net.op("Conv", "x", outlier(net, 4, 8, (3, 3), times=times), pads=[1] * 4)
    model = net.model(net.conv(net.op("Relu", x), 8, 2, 1, pads=[0] * 4))
    result = quantize(model, {**recipe({"gain": gain}, bits, block), **FLOAT}, feeds(model, 1))
    layer = load(model).layers[0]
    weight = load(model).constant(layer.weight)
    spec = QuantSpec(bits, True, None if block == "tensor" else (1, 0, 0, 0))
    after, before = error(split(layer, weight, spec)[1], spec), error(weight, spec)
    assert ("conv0" in told(result)["layers"]) == (after < before * 10 ** (-gain / 10))
    if "conv0" in told(result)["layers"]:
        assert after <= before
        assert told(result)["layers"]["conv0"]["gain_db"] == pytest.approx(10 * np.log10(before / after), abs=0.01)


# ---- the rewrite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "behind"),
    some(itertools.product(KINDS, BEHIND), *ONCE),
)
def test_function_stays(kind, behind):
    model = model_of(kind, behind)
    graph = load(model)
    layer = graph.layers[1]
    coarse, fine = split(layer, graph.constant(layer.weight), QuantSpec(8))
    made = replace_with_sum(graph, layer, [fine, decode(coarse.codes, coarse)])
    assert [y.bias for y in made] == [layer.bias, None] and {y.groups for y in made} == {layer.groups}
    assert set(made[1].shape[2:]) == {1} and "dilations" not in made[1].attrs and made[0].attrs == layer.attrs
    samples = feeds(model, 2)
    assert max(drift(run(model, f), run(graph, f)) for f in samples) < 1e-5


def test_same_padding_of_unknown_sizes():
    """At stride 1 the pads are known; at stride 2 they hang on the size, and may leave no centre."""
    for stride, sizes, why in ((1, ["H", "W"], ""), (2, ["H", 9], "unknown"), (2, [8, 8], "negative"), (2, [9, 9], "")):
        net = Net(["N", 3, *sizes])
        graph = load(net.model(net.conv("x", 3, 4, auto_pad="SAME_UPPER", strides=[stride] * 2)))
        if why:
            with pytest.raises(ValueError, match=why):
                centre_pads(graph, graph.layers[0])
        else:
            assert centre_pads(graph, graph.layers[0]) == [0] * 4


@pytest.mark.parametrize(
    "kernel, attrs, why",
    [
        (4, {"pads": [2] * 4}, "odd kernel"),
        (3, {}, "negative"),
        (3, {"pads": [1, 1, 1, 0]}, "negative"),
        (3, {"pads": [1] * 4, "dilations": [2, 2]}, "negative"),
        (3, {"auto_pad": "VALID"}, "negative"),
    ],
)
def test_what_has_no_centre_is_refused(kernel, attrs, why):
    net = Net(["N", 3, 8, 8])
    weight = np.zeros((4, 3, kernel, kernel))
    model = net.model(net.op("Conv", "x", net.constant(weight), **attrs))
    graph = load(model)
    digest = graph.digest()
    with pytest.raises(ValueError, match="add up" if kernel % 2 == 0 else why):
        replace_with_sum(graph, graph.layers[0], [weight, weight[:, :, :1, :1]])
    assert graph.digest() == digest and not graph.touched
    assert why in told(quantize(model, recipe({"gain": 0.0}), feeds(model, 1)))["left_alone"]["conv0"]


def test_the_centre_counts_in_the_sum():
    graph = load(model_of("plain"))
    weight = graph.constant(graph.layers[1].weight)
    for centre in (weight[:, :, :1, :1], 2 * weight[:, :, 1:2, 1:2], weight[:, :, 1:2, 1:2].squeeze(3)):
        with pytest.raises(ValueError, match="add up"):
            replace_with_sum(graph, graph.layers[1], [weight, centre])


def test_statistics_stay_with_the_sum():
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.batchnorm(net.op("Conv", "x", outlier(net, 3, 6, (3, 3)), pads=[1] * 4), 6))
    graph = load(net.model(net.conv(x, 6, 4)))
    layer = graph.layers[0]
    before = graph.batchnorms[layer.output]
    coarse, fine = split(layer, graph.constant(layer.weight), QuantSpec(8))
    replace_with_sum(graph, layer, [fine, decode(coarse.codes, coarse)])
    assert graph.producer(layer.output).op == "Add" and graph.batchnorms == {layer.output: before}


# ---- the pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "behind", "target"),
    some(
        ((*pair, target) for pair in ONCE for target in TARGETS),
        *((*pair, "ort-cpu") for pair in ONCE),
        *((kind, "relu", target) for kind in ("plain", "depthwise") for target in TARGETS[1:]),
    ),
)
def test_everything_stays_integer(kind, behind, target):
    model = model_of(kind, behind)
    result = quantize(model, recipe(target=target), feeds(model, 3), verify=True)
    split_up = 2 if behind == "residual" else 1
    assert len(told(result)["layers"]) == split_up and result.report["steps"][0]["drift"] < 1e-5
    audit = audit_model(result.model)
    assert len(audit.layers) == len(load(model).layers) + split_up
    assert {y.kernel for y in audit.layers} == {"QLinearConv"} and "Conv" not in audit.other, audit
    assert audit.other["QLinearAdd"] == split_up + (behind == "residual") and "Add" not in audit.other
    taps = float(np.prod(KINDS[kind][3]))
    assert {v["more_multiply_adds"] for v in told(result)["layers"].values()} == {round(1 / taps, 4)}
    assert json.loads(json.dumps(result.report)) == result.report


def test_openvino_runs_the_parts_as_integer(tmp_path):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    path = tmp_path / "model.onnx"
    quantize(model_of("plain"), recipe(target="openvino"), feeds(model_of("plain"), 3), output=path)
    assert len(layers := audit_openvino(path).layers) == 4 and all(y.quantized for y in layers)


@pytest.mark.parametrize("block", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_plan_of_the_parts(bits, block):
    model = model_of("plain")
    result = quantize(model, recipe(bits=bits, block=block), feeds(model, 3))
    fine, coarse = (spec for name, spec in result.plan.items() if "_part" in name and spec.codes is not None)
    assert (coarse.bits, coarse.codes.shape[2:]) == (bits, (1, 1)) and (coarse.block is None) == (block == "tensor")
    assert (fine.bits, fine.block, fine.codes.shape[2:]) == (bits, coarse.block, (3, 3))
    assert np.max(fine.scale) < np.max(coarse.scale)
    outputs = [result.plan[f"conv2_part{k}_out"] for k in (1, 2)]
    assert all(spec.describe() == "uint8 per tensor" and spec.solved for spec in outputs)
    assert not any(name == load(model).layers[1].weight for name in result.plan)


@pytest.mark.parametrize("behind", ["relu", "none"])
def test_a_solved_range_is_kept(behind):
    """The sum is the tensor that the range was found for."""
    model, data = model_of("plain", behind), feeds(model_of("plain", behind), 4)
    first = {"use": "ranges", "method": "percentile", "percentile": 90.0}
    plain, made = (
        quantize(model, {"pass": [first, *more]}, data) for more in ([], [{"use": "split-weights", "below": 99.0}])
    )
    assert made.report["steps"][1]["result"]["layers"]
    result = load(model).layers[1].result
    assert made.plan[result].scale == plain.plan[result].scale


def test_bias_keeps_its_precision():
    """It goes to the fine part; where that has an empty channel, whose scale is 1, to the coarse one."""
    for empty in (False, True):
        net = Net(["N", 4, 8, 8])
        weight = net.rng.normal(size=(6, 4, 3, 3)) / 100
        weight[:, :, 1, 1] = net.rng.normal(size=(6, 4))
        if empty:
            weight[2] = 0
            weight[2, 1, 1, 1] = 1.27  # 127 codes of a scale
        bias = net.constant(net.rng.normal(size=6) / 50)
        x = net.op("Relu", net.op("Conv", "x", net.constant(weight), bias, pads=[1] * 4))
        model = net.model(net.conv(x, 6, 3, 1, pads=[0] * 4))
        result = quantize(model, recipe(), feeds(model, 3))
        graph = {t.name: t for t in result.model.graph.initializer}
        bias = load(model).constant(load(model).layers[0].bias)
        at = next(n for n in result.model.graph.node if n.name == "conv0_part1")
        dequantize = next(n for n in result.model.graph.node if at.input[2] in n.output)
        codes, scale = (
            np.frombuffer(graph[name].raw_data, kind) for name, kind in zip(dequantize.input, ("<i4", "<f4"), strict=False)
        )
        fine = next(spec for spec in result.plan.values() if spec.codes is not None and spec.codes.shape == (6, 4, 3, 3))
        assert np.abs(codes * scale - bias).max() < 1e-3
        assert (fine.codes.reshape(6, -1).any(axis=1).all()) != empty


def test_what_is_left_alone_is_told():
    def left(model, step=None, **more):
        result = quantize(model, recipe(step, **more), feeds(model, 2))
        assert not told(result)["layers"] and set(told(result)["left_alone"]) == {
            y.name for y in load(model).layers if y.weight in result.plan
        }
        return set(told(result)["left_alone"].values())

    kernel = "only convolutions with a kernel larger than 1 have a centre among other taps"
    assert left(mlp()) == {kernel}
    assert any("fall by" in why for why in left(mobilenet(), {"gain": 20.0}))
    assert any("as they are" in why for why in left(model_of("plain"), {"below": 20.0}))
    assert left(conv_transpose(), target="storage") >= {kernel}
    solved = quantize(
        model_of("plain"),
        {"pass": [{"use": "ranges"}, {"use": "vector-scale"}, {"use": "split-weights"}]},
        feeds(model_of("plain"), 2),
    ).report["steps"][2]["result"]
    assert not solved["layers"] and "its scales are solved" in solved["left_alone"].values()


@pytest.mark.parametrize(
    "steps", [[{"use": "round", "method": "gptq"}], [{"use": "bias-correct"}], [{"use": "sub-layer"}], [{"use": "reorder"}]]
)
@pytest.mark.parametrize("block", ["tensor", "channel"])
def test_later_passes_take_the_parts_as_layers(steps, block):
    model = network(1, 12)
    before = recipe(block=block, bits=5)
    result = quantize(model, {**before, "pass": before["pass"] + steps}, feeds(model, 8), verify=True)
    assert told(result)["layers"] and all(y.quantized for y in audit_model(result.model).layers)


@pytest.mark.parametrize("more", [{"sub_block": [1, 4]}, {"block": [1, 4], "pow2": True}, {"block": [2, 2]}])
def test_finer_scales_are_kept_for_the_fine_part(more):
    weights = {"bits": 4, "block": "channel", **more}
    model = model_of("plain")
    result = quantize(model, {**recipe(), "weights": weights, **FLOAT}, feeds(model, 2), settings=["split-weights.gain=0.5"])
    names = {y.name for y in audit_model(result.model).layers}
    assert {"conv2_part1", "conv2_part2"} <= names


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("block", ["tensor", "channel"])
def test_a_reparameterised_network_gains_more_than_10_db(block, blocks):
    """By its weights; beside 8-bit activations these are the floor, and there is still a gain."""
    model = network(blocks, 64)
    weights = {"weights": {"bits": 8, "block": block}}
    for more, least in ((FLOAT, 10), ({}, 4)):
        plain, (db, layers) = measure(model, {**weights, **more})[0], measure(model, {**weights, **more}, {})
        assert db > plain + least and len(layers) == blocks, (plain, db)


@pytest.mark.parametrize("parameters", [{"gain": -1.0}, {"gain": float("nan")}, {"below": 0.0}])
def test_wrong_parameters(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        SplitWeights(**parameters)
    with pytest.raises(OnnxqError):
        quantize(mlp(), recipe(parameters), feeds(mlp(), 1))
