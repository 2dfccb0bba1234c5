"""Weight equalizing shift: exact powers of two, bounds on the step, and two forms of export that compute the same."""

from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxq_plugins import audit_model, measure, quantize, runtimes
from onnxq_plugins.export.weights import shifts, stored_bits
from onnxq_plugins.graph import load
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import ShiftEqualize
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.runtimes.openvino import audit_openvino
from onnxq_plugins.spec import QuantSpec, fake, solve_minmax, step
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.target import channel_block, channel_multipliers
from tests.passes.test_subtensor import spread
from tests.zoo import ZOO, Net, cnn, conv_transpose, examples, feeds, kinds, mlp, mobilenet, run, some, transformer

FORMS = [
    "cnn",
    "mobilenet",
    "grouped",
    "inception",
    "mlp",
    "transformer",
    "conv1d",
    "no_bias",
    "dead_channels",
    "odd_channels",
    "shared_weights",
    "conv_transpose",
]
TARGETS = {t.name: t for t in BUILTIN}
RECIPE = {"weights": {"block": "tensor"}, "pass": [{"use": "shift-equalize"}]}
ASKED = {"weights": {"block": "tensor", "sub_block": "channel", "pow2": True, "max_multiplier": 32768}}


def recipe(*steps, bits=8, block="tensor", target="ort-cpu", **parameters):
    """shift-equalize with parameters, then the steps."""
    return {
        "target": target,
        "weights": {"bits": bits, "block": block},
        "pass": [{"use": "shift-equalize", **parameters}, *steps],
    }


def one_layer(rows, bias=None, op="Conv"):
    """A network of one planned layer with these rows [outputs, inputs], in front of a Relu."""
    rows = np.asarray(rows, np.float32)
    net = Net(["N", rows.shape[1], 3, 3] if op == "Conv" else ["N", rows.shape[1]])
    inputs = [] if bias is None else [net.constant(bias)]
    if op == "Conv":
        y = net.op("Conv", "x", net.constant(rows[:, :, None, None]), *inputs)
    elif op == "Gemm":
        y = net.op("Gemm", "x", net.constant(rows), *inputs, transB=1)
    else:
        y = net.op("MatMul", "x", net.constant(rows.T))
    return net.model(net.op("Relu", y))


def entry(made):
    """The solved entry of the only weight."""
    (found,) = (spec for spec in made.plan.values() if spec.codes is not None)
    return found


def solved(model, result):
    """Layers of the float model with their entries."""
    return [(y, result.plan[y.weight]) for y in load(model).layers if y.weight in result.plan]


def wes(weight, bits=8, top=32768):
    asked = QuantSpec(bits, block=None, sub_block=(1, *[0] * (weight.ndim - 1)), pow2=True, max_multiplier=top)
    return solve_minmax(weight, asked)


def heavy(seed, outputs, inputs, tail):
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(tail, size=(outputs, inputs)) * np.exp2(rng.uniform(-6, 6, (outputs, 1)))
    return rows.astype(np.float32)


def quality(model, made, data):
    return measure.sqnr(*(runtimes.outputs(runtimes.session(m), data)[0] for m in (model, made.model)))


def mse(weight, spec):
    return float(np.mean((fake(weight, spec).astype(np.float64) - weight) ** 2))


# ---- the arithmetic -------------------------------------------------------------------------------------------------


@examples(100)
@given(
    exponents=st.lists(st.floats(-22, 0), min_size=1, max_size=12),
    bits=st.integers(2, 8),
    width=st.integers(1, 4),
    size=st.floats(-20, 20),
    most=st.integers(1, 4),
)
def test_shifts_are_what_the_formula_says(exponents, bits, width, size, most):
    """multiplier * scale == s 2^-n with n = min(floor(log2(R / r)), 2^most - 1); a range hardly above a power of two counts
    as that power."""
    ranges = np.exp2(np.array([0.0, *exponents]) + size).astype(np.float32)
    weight = ranges[:, None] * np.linspace(-1, 1, width + 1, dtype=np.float32)[None, :]
    spec = wes(weight, bits, 2 ** (2**most - 1))
    n = np.minimum(np.floor(np.log2(ranges[0] * (1 + 1e-6) / ranges.astype(np.float64))), 2**most - 1)
    whole = solve_minmax(weight, QuantSpec(bits))
    np.testing.assert_array_equal(step(spec, weight.shape)[:, 0], (whole.scale * np.exp2(-n)).astype(np.float32))
    enlarged = weight * np.exp2(n).astype(np.float32)[:, None]
    np.testing.assert_array_equal(enlarged * np.exp2(-n).astype(np.float32)[:, None], weight)
    assert np.abs(enlarged).max() <= ranges[0] * (1 + 1e-6)
    short = n < 2**most - 1
    assert (np.abs(enlarged).max(axis=1)[short] > ranges[0] / 2 * (1 - 1e-6)).all()


def test_a_power_of_two_is_its_own_shift():
    weight = np.exp2(-np.arange(18.0))[:, None].astype(np.float32)
    result = quantize(one_layer(weight), RECIPE, feeds(one_layer(weight), 2))
    n = np.log2(entry(result).multiplier.max() / entry(result).multiplier.ravel())
    assert n.tolist() == [*range(16), 15, 15]


@examples(60)
@given(
    seed=st.integers(0, 9999),
    outputs=st.integers(8, 24),
    inputs=st.integers(24, 64),
    bits=st.integers(3, 8),
    tail=st.floats(1.5, 8),
)
def test_between_one_scale_and_one_per_channel(seed, outputs, inputs, bits, tail):
    weight = heavy(seed, outputs, inputs, tail)
    spec, channel = wes(weight, bits), solve_minmax(weight, QuantSpec(bits, block=(1, 0)))
    size = step(spec, weight.shape)
    free = size > size.max() * 2.0**-14.5  # not at the largest shift
    assert (size <= 2 * (1 + 1e-5) * channel.scale)[free].all() and (size >= channel.scale * (1 - 1e-5)).all()
    assert mse(weight, spec) <= 4 * mse(weight, channel)


def test_finer_than_one_scale():
    """Rounding is luck weight by weight; over many layers and channels it is not."""
    rows = [heavy(seed, 16, 64, 3.0) for seed in range(40)]
    for bits in (4, 6, 8):
        for weight in rows:
            assert mse(weight, wes(weight, bits)) <= mse(weight, solve_minmax(weight, QuantSpec(bits))) * 1.05


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_cap_the_shift(bits):
    weight = np.exp2(-np.arange(20.0))[:, None].astype(np.float32)
    result = quantize(one_layer(weight), RECIPE, feeds(one_layer(weight), 2), settings=[f"shift-equalize.bits={bits}"])
    top = 2**bits - 1
    assert (entry(result).multiplier.max() / entry(result).multiplier.min()) == 2**top
    assert result.report["steps"][0]["result"]["largest_shift"] == top


@pytest.mark.parametrize("bits", [0, 5])
def test_wrong_parameters(bits):
    with pytest.raises(ValueError, match=r"bits = \d must be 1\.\.4"):
        ShiftEqualize(bits=bits)


# ---- what is shifted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_equal_ranges_need_no_shift(op):
    rows = np.random.default_rng(0).uniform(-1, 1, (6, 5))
    rows[:, 0] = 1
    model = one_layer(rows, op=op)
    made, plain = (quantize(model, r, feeds(model, 4)) for r in (RECIPE, {"weights": {"block": "tensor"}}))
    assert entry(made).multiplier is None and made.report["steps"][0]["result"] == {"layers": 0, "largest_shift": 0}
    np.testing.assert_array_equal(entry(made).codes, entry(plain).codes)
    assert entry(made).scale == entry(plain).scale
    assert not [p for p in made.model.metadata_props if p.key == "onnxq.shifts"]


def test_dead_channels_are_not_shifted():
    rows = np.random.default_rng(0).normal(size=(6, 8)) * np.exp2(-np.arange(6.0))[:, None]
    rows[[2, 4]] = 0
    bias = np.linspace(-2, 2, 6)
    model = one_layer(rows, bias)
    for target in ("ort-cpu", "per-tensor"):
        result = quantize(model, recipe(target=target), feeds(model, 4))
        n = np.log2(entry(result).multiplier.max() / entry(result).multiplier.ravel())
        assert (n[[2, 4]] == 0).all() and n.max() > 0
        got = run(result.model, feeds(model, 1)[0])[0][:, [2, 4]]
        want = np.maximum(bias[[2, 4]], 0)[None, :, None, None]
        assert np.abs(got - want).max() < 2 / 255


def test_a_layer_of_zeros_is_left_with_one_scale():
    model = one_layer(np.zeros((4, 3)), np.ones(4))
    result = quantize(model, RECIPE, feeds(model, 2))
    assert result.report["steps"][0]["result"]["layers"] == 0 and entry(result).multiplier is None


@pytest.mark.parametrize("target", ["ort-cpu", "per-tensor"])
@pytest.mark.parametrize("asked", [RECIPE, ASKED])
def test_a_large_bias_makes_shifts_smaller(target, asked):
    """Shifted by 15 the channel's bias would be 2^31 codes and more."""
    rows = np.array([[1.0, -1.0], [2.0**-15, 2.0**-15], [2.0**-10, 0.0]])
    bias = np.array([0.0, 300.0, 1.0])
    model = one_layer(rows, bias)
    data = feeds(model, 8)
    result = quantize(model, {**asked, "target": target}, data)
    spec = entry(result)
    x = result.plan[Planned(load(model), result.plan, TARGETS[target]).input(load(model).layers[0])]
    codes = bias / (float(x.scale) * step(spec, (3, 2, 1, 1)).ravel())
    assert np.abs(codes).max() < 2**30 * 1.01
    n = np.log2(spec.multiplier.max() / spec.multiplier.ravel())
    assert 0 < n[1] < 15 and n[2] == 10 and np.abs(300.0 / (float(x.scale) * float(spec.scale))) > 2**30
    assert not any("widened" in note for note in result.report["notes"])
    for tensor in result.model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT32:
            assert np.abs(numpy_helper.to_array(tensor).astype(np.int64)).max() < 2**31 - 1
    for optimize in (True, False):
        got = np.concatenate([run(result.model, feed, optimize)[0] for feed in data])
        want = np.concatenate([run(model, feed)[0] for feed in data])
        assert np.abs(got - want).max() < 300 / 255


def test_a_bias_too_large_for_any_shift_widens_the_scale():
    model = one_layer([[1e-7, 1e-7], [1e-9, 2e-9]], [300.0, 1.0])
    for target in ("ort-cpu", "per-tensor"):
        result = quantize(model, recipe(target=target), feeds(model, 4))
        assert np.abs(run(result.model, feeds(model, 1)[0])[0] - run(model, feeds(model, 1)[0])[0]).max() < 300 / 255


def test_gain_decides():
    for gain, shifted in ((1.0, 7), (1e9, 0)):
        result = quantize(mobilenet(), recipe(gain=gain), feeds(mobilenet(), 2))
        report = result.report["steps"][0]["result"]
        assert bool(report["layers"]) == bool(shifted) and "left_out" not in report


@pytest.mark.parametrize(
    "weights, before",
    [
        ({"bits": 4, "block": "channel", "sub_block": 2}, []),
        ({"block": "tensor", "pow2": True}, []),
        ({"block": "tensor"}, [{"use": "sub-layer"}]),
        ({"block": "channel"}, [{"use": "round", "method": "gptq"}]),
    ],
)
def test_what_was_asked_or_solved_otherwise_is_left_out(weights, before):
    """Finer multipliers, scales that must be powers of two, scales and codes that another pass chose."""
    model = mlp()
    plain, made = (
        quantize(model, {"weights": weights, "pass": before + steps}, feeds(model, 4))
        for steps in ([], [{"use": "shift-equalize"}])
    )
    report = made.report["steps"][-2]["result"]
    assert report["layers"] == 0 and report["left_out"] == [y.name for y in load(model).layers]
    for name, spec in plain.plan.items():
        if spec.codes is not None:
            np.testing.assert_array_equal(made.plan[name].scale, spec.scale)
            np.testing.assert_array_equal(made.plan[name].codes, spec.codes)


def test_a_transposed_convolution_is_left_out():
    result = quantize(conv_transpose(), recipe(target="storage"), feeds(conv_transpose(), 2))
    names = [y.name for y in load(conv_transpose()).layers if y.op == "ConvTranspose"]
    assert result.report["steps"][0]["result"]["left_out"] == names and len(names) == 2


def test_multipliers_per_input_are_no_channel_multipliers():
    """MatMul [K, N]: (1, 0) is per input; it stays in the codes, within int8, and in no list of shifts."""
    model = transformer()
    result = quantize(model, {"weights": {"bits": 4, "block": "tensor", "sub_block": [0, 1], "pow2": True}}, feeds(model, 4))
    inner = [(y, s) for y, s in solved(model, result) if y.op == "MatMul"]
    assert inner and all(s.sub_block == (1, 0) and not channel_multipliers(y, s) and shifts(y, s) is None for y, s in inner)
    assert all(int(np.abs(s.codes * s.multiplier).max()) <= 127 for _, s in inner)
    assert not [p for p in result.model.metadata_props if p.key == "onnxq.shifts"]
    assert drift(run(result.model, feeds(model, 1)[0], False), run(result.model, feeds(model, 1)[0])) < 1e-2
    for trans_b, block in ((1, (1, 0)), (0, (0, 1))):
        net = Net(["N", 6])
        (layer,) = load(net.model(net.gemm("x", 6, 5, trans_b=trans_b))).layers
        assert channel_block(layer) == block
        assert channel_multipliers(layer, QuantSpec(sub_block=block))
        assert not channel_multipliers(layer, QuantSpec(sub_block=block[::-1]))


@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_either_way_round(trans_b):
    net = Net(["N", 6])
    rows = net.rng.normal(size=(7, 6)) * np.exp2(-np.arange(7.0))[:, None]
    model = net.model(net.op("Gemm", "x", net.constant(rows if trans_b else rows.T), net.weight(7), transB=trans_b))
    for target in ("ort-cpu", "per-tensor"):
        result = quantize(model, recipe(target=target), feeds(model, 8))
        n = np.log2(entry(result).multiplier.max() / entry(result).multiplier.ravel())
        assert len(n) == 7 and n.max() >= 4
        assert quality(model, result, feeds(model, 8)) > 35


# ---- both forms of export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds([n for n in FORMS if n != "conv_transpose"], "mlp", "dead_channels"))
def test_both_forms_compute_the_same(name):
    """A vector of scales, and one scale per weight with a Mul by powers of two behind the layer."""
    model = ZOO[name]()
    data = feeds(model, 4)
    a, b = (quantize(model, recipe(target=t), data, verify=True, names="keep") for t in ("ort-cpu", "per-tensor"))
    layers = {y.weight for y in load(model).layers if y.op != "ConvTranspose"}
    assert set(a.plan) >= layers and set(b.plan) >= layers
    for key, spec in b.plan.items():
        if spec.codes is not None:
            np.testing.assert_array_equal(spec.codes, a.plan[key].codes)
            np.testing.assert_array_equal(spec.scale, a.plan[key].scale)
    outputs = [[run(made.model, feed, optimize) for feed in data] for made in (a, b) for optimize in (False, True)]
    assert max(drift(x, y) for other in outputs[1:] for x, y in zip(outputs[0], other, strict=True)) < 1e-4
    constants = {t.name: numpy_helper.to_array(t) for t in b.model.graph.initializer}
    scales = {
        n.output[0]: constants[n.input[1]]
        for n in b.model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in constants
    }
    assert scales and all(scale.ndim == 0 for scale in scales.values())
    muls = [n for n in b.model.graph.node if n.op_type == "Mul" and n.name.partition("_shift")[1]]
    report = b.report["steps"][0]["result"]
    assert len(muls) == report["layers"]
    for node in muls:
        factors = constants[node.input[1]]
        assert (np.exp2(np.rint(np.log2(factors))) == factors).all() and factors.max() == 1 > factors.min() >= 2.0**-15


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "inception"])
def test_a_vector_of_scales_keeps_layers_integer(name):
    model = ZOO[name]()
    result = quantize(model, recipe(), feeds(model, 4))
    audit = audit_model(result.model)
    assert all(y.quantized for y in audit.layers) and not set(audit.other) & {"Clip", "Relu", "Mul"}
    assert {y.kernel for y in audit.layers if y.op == "Conv"} == {"QLinearConv"}


def test_openvino_takes_the_vector(tmp_path):
    result = quantize(mobilenet(), recipe(target="openvino"), feeds(mobilenet(), 4))
    plain = quantize(mobilenet(), recipe(), feeds(mobilenet(), 4))
    assert drift(run(plain.model, feeds(mobilenet(), 1)[0]), run(result.model, feeds(mobilenet(), 1)[0])) < 1e-4
    assert not [n for n in result.model.graph.node if n.op_type == "Mul"]
    pytest.importorskip("openvino")
    assert all(y.quantized for y in audit_openvino(result.save(tmp_path / "m.onnx")).layers)


def test_the_activation_stays_behind_the_factor():
    """Relu6 does not commute with it."""
    result = quantize(mobilenet(), recipe(target="per-tensor"), feeds(mobilenet(), 4))
    makers = {o: n for n in result.model.graph.node for o in n.output}
    clips = [n for n in result.model.graph.node if n.op_type == "Clip"]
    assert clips and all(makers[n.input[0]].op_type == "Mul" for n in clips)
    behind = {makers[n.input[0]].op_type for n in result.model.graph.node if n.op_type == "Mul"}
    assert behind == {"Conv", "Gemm"}


@pytest.mark.parametrize("target", ["ort-cpu", "per-tensor"])
@pytest.mark.parametrize("name", ["mobilenet", "transformer", "mlp"])
def test_metadata_tells_the_shifts(name, target):
    model = ZOO[name]()
    result = quantize(model, recipe(target=target), feeds(model, 4))
    table = json.loads(next(p.value for p in result.model.metadata_props if p.key == "onnxq.shifts"))
    assert table
    for layer, spec in solved(model, result):
        if spec.multiplier is None:
            assert layer.name not in table
            continue
        n = np.array([int(digit, 16) for digit in table[layer.name]])
        assert len(n) == layer.channels and n.min() == 0
        s = np.float32(spec.scale) * np.float32(spec.multiplier.max())
        along = [1] * len(layer.shape)
        along[layer.out_axis] = -1
        values = spec.codes * (s * np.exp2(-n.astype(np.float32))).reshape(along)
        np.testing.assert_array_equal(values.astype(np.float32), weight_values(layer, spec))


@pytest.mark.parametrize(
    ("name", "target"),
    some(
        itertools.product(["mobilenet", "mlp", "dead_channels", "transformer"], ["ort-cpu", "per-tensor"]),
        *[("mobilenet", "per-tensor"), ("mlp", "ort-cpu"), ("dead_channels", "ort-cpu"), ("transformer", "per-tensor")],
    ),
)
def test_the_recipe_asks_for_the_same(name, target):
    """Without the pass: sub_block = "channel" of a scale per tensor, powers of two up to 2^15."""
    model = ZOO[name]()
    data = feeds(model, 4)
    a, b = quantize(model, recipe(target=target), data), quantize(model, {**ASKED, "target": target}, data)
    for (layer, one), (_, two) in zip(solved(model, a), solved(model, b), strict=True):
        np.testing.assert_array_equal(weight_values(layer, one), weight_values(layer, two))
    assert drift(run(a.model, data[0], False), run(b.model, data[0], False)) < 1e-4


def test_one_scale_per_channel_becomes_one_for_all_and_a_note_names_the_pass():
    result = quantize(mlp(), {"target": "per-tensor"}, feeds(mlp(), 2))
    assert all(result.plan[layer.weight].block is None for layer in result.graph.layers)
    assert any("one scale for the weight" in note and "shift-equalize" in note for note in result.report.notes)


# ---- beside other passes --------------------------------------------------------------------------------------------


def uneven(model, seed=0):
    """The model with the rows of its convolutions made smaller, by up to 32."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            values = values * np.exp2(rng.uniform(-5, 0, (len(values), 1, 1, 1))).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


@pytest.mark.parametrize("target", ["ort-cpu", "per-tensor"])
def test_uneven_channels_gain_much(target):
    """Outputs that range over 1000 : 1, each as important as the others."""
    model = spread("gemm")
    data = feeds(model, 16)
    plain, made = (
        quantize(model, {"target": target, "weights": {"block": "tensor"}, "pass": steps}, data)
        for steps in ([], RECIPE["pass"])
    )
    assert quality(model, made, data) > quality(model, plain, data) + 20


@pytest.mark.parametrize("target", ["ort-cpu", "per-tensor"])
@pytest.mark.parametrize(
    "steps",
    [
        [],
        [{"use": "bias-correct"}],
        [{"use": "round", "method": "gptq"}],
        [{"use": "round", "method": "gptq", "sequential": False}],
    ],
)
def test_later_passes_keep_the_shifts(steps, target):
    model = uneven(cnn())
    data = feeds(model, 12)
    passes = [{"use": "ranges"}, {"use": "shift-equalize"}, *steps]
    result = quantize(model, {**RECIPE, "target": target, "pass": passes}, data, verify=True)
    alone = quantize(model, {**RECIPE, "target": target}, data)
    for (layer, spec), (_, before) in zip(solved(model, result), solved(model, alone), strict=True):
        np.testing.assert_array_equal(shifts(layer, spec), shifts(layer, before))
    assert quality(model, result, data) > quality(model, alone, data) + (1 if steps else -0.1)
    changed = any(
        (spec.codes != before.codes).any()
        for (_, spec), (_, before) in zip(solved(model, result), solved(model, alone), strict=True)
    )
    learned = [step for step in result.report.steps if step["pass"] == "round" and step["result"]["taken"] == "learned"]
    assert changed == bool(learned)  # what the network as a whole loses by is undone


@pytest.mark.parametrize("bits", [3, 4])
def test_four_bit_codes(bits):
    """INT4 -> Cast -> DequantizeLinear with a vector of scales."""
    model = uneven(cnn())
    data = feeds(model, 8)
    result = quantize(model, recipe({"use": "round", "method": "gptq"}, bits=bits), data)
    assert all(y.quantized for y in audit_model(result.model).layers)
    stored = [t for t in result.model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(stored) == len(load(model).layers)
    sizes = {n.input[1] for n in result.model.graph.node if n.op_type == "DequantizeLinear" and n.attribute}
    vectors = [numpy_helper.to_array(t) for t in result.model.graph.initializer if t.name in sizes]
    assert any(v.size == 12 for v in vectors)
    assert drift(run(result.model, data[0], False), run(result.model, data[0])) < 1e-4


@pytest.mark.parametrize(
    ("first", "target"),
    some(itertools.product([True, False], ["ort-cpu", "per-tensor"]), (True, "ort-cpu"), (False, "per-tensor")),
)
def test_reorder_before_or_after(target, first):
    model = mobilenet()
    data = feeds(model, 4)
    steps = [{"use": "reorder"}, {"use": "shift-equalize"}]
    made, alone = (
        quantize(model, {"target": target, "weights": {"block": "tensor"}, "pass": passes}, data, verify=True)
        for passes in (steps if first else steps[::-1], [steps[1]])
    )
    assert drift(run(alone.model, data[0]), run(made.model, data[0])) < 0.1
    assert [y.kernel for y in audit_model(made.model).layers] == [y.kernel for y in audit_model(alone.model).layers]


@pytest.mark.parametrize("target, bits", [("ort-cpu", 8), ("ort-cpu", 4), ("per-tensor", 8), ("per-tensor", 4)])
def test_stored_bits_count_what_is_written(target, bits):
    """Codes, a vector of scales, or one scale and a vector of factors."""
    rows = np.random.default_rng(0).normal(size=(16, 64)) * np.exp2(-np.arange(16.0) / 2)[:, None]
    model = one_layer(rows)
    result = quantize(model, recipe(bits=bits, target=target), feeds(model, 2), names="keep")
    (layer,) = load(model).layers
    told = stored_bits(layer, entry(result), TARGETS[target].rule(layer, entry(result), 8))
    wanted = {"INT4": 0.5, "INT8": 1, "FLOAT": 4}
    written = sum(
        wanted.get(onnx.TensorProto.DataType.Name(t.data_type), 0) * int(np.prod(t.dims)) * 8
        for t in result.model.graph.initializer
        if np.prod(t.dims) >= 16 and "zero_point" not in t.name
    )
    assert told * 16 * 64 == pytest.approx(written, abs=32)
    assert result.report["layers"][0]["bits_per_weight"] == pytest.approx(told, abs=1e-3)
