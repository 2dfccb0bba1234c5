"""What exported models run as, read off onnxruntime's own optimized graph (RUNTIME B, C, E)."""

from __future__ import annotations

import copy
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import Result, audit_model, load, measure, quantize, runtimes
from onnxq_plugins.export.qdq import export
from onnxq_plugins.plan.values import bias_scale
from onnxq_plugins.testing.exact import exact_model
from tests.zoo import (
    ZOO,
    Net,
    control_flow,
    conv_transpose,
    examples,
    feeds,
    kinds,
    mobilenet,
    shared_weights,
    slowly,
    transformer,
)

LAYERS = ("Conv", "Gemm", "MatMul")
WEIGHT_ONLY = {"activations": {"bits": 32}, "weights": {"bits": 4, "block": 32}}


@pytest.fixture
def ops(tmp_path):
    """Counts the operators that onnxruntime really runs."""

    def count(model: onnx.ModelProto) -> Counter[str]:
        dump = tmp_path / "optimized.onnx"
        runtimes.session(model, dump=dump)
        return Counter(n.op_type for n in onnx.load(str(dump)).graph.node)

    return count


def quantized(model: onnx.ModelProto, recipe="int8", n: int = 8, **options) -> Result:
    return quantize(model, recipe, feeds(model, n), workers=1, **options)


def outputs(model: onnx.ModelProto, samples: list, optimize: bool = True) -> list[np.ndarray]:
    return runtimes.outputs(runtimes.session(model, optimize=optimize), samples)


def error_db(reference: onnx.ModelProto, model: onnx.ModelProto, **options) -> float:
    samples = feeds(reference, 8, seed=1)
    pairs = zip(outputs(reference, samples), outputs(model, samples, **options), strict=True)
    return min(measure.sqnr(a, b) for a, b in pairs)


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def made_by(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {o: n for n in model.graph.node for o in n.output}


def image_net(build) -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8])
    return net.model(build(net))


def three_convs(net: Net) -> str:
    x = net.op("Relu", net.conv("x", 3, 8))
    x = net.op("Relu", net.conv(x, 8, 8))
    return net.head(net.op("Relu", net.conv(x, 8, 8)), 8)


def mlp_net(k: int = 64) -> onnx.ModelProto:
    """Gemm (transB) - Relu - Gemm - MatMul."""
    net = Net(["N", k])
    x = net.gemm(net.op("Relu", net.gemm("x", k, 40)), 40, 33, trans_b=0)
    return net.model(net.linear(x, 33, 6, bias=False))


# ---- layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["channel", "tensor"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("groups", "attrs"), [(1, {}), (2, {}), (8, {}), (1, {"dilations": [2, 2], "pads": [2] * 4}), (8, {"strides": [2, 2]})]
)
def test_convolutions_run_as_qlinearconv(ops, block, bias, groups, attrs):
    model = image_net(
        lambda net: net.head(
            net.op("Relu", net.conv(net.op("Relu", net.conv("x", 3, 8)), 8, 8, groups=groups, bias=bias, **attrs)), 8
        )
    )
    result = quantized(model, settings=[f"weights.block={block}"])
    found = ops(result.model)
    assert found["QLinearConv"] == 2
    assert found["QGemm"] == 1
    assert not found & Counter(["Conv", "FusedConv", "DequantizeLinear", "Relu"])
    assert result.report["kernels"] == {"QLinearConv": 2, "QGemm": 1}
    assert error_db(model, result.model) > 30


def test_clip_and_relu_are_elided(ops):
    model = image_net(lambda net: net.head(net.op("Relu", net.conv(net.clip(net.conv("x", 3, 8)), 8, 8)), 8))
    loud = [{"x": 20 * feed["x"]} for feed in feeds(model, 8)]  # the Clip has work to do
    result = quantize(model, "int8", loud, workers=1)
    assert not ops(result.model) & Counter(["Clip", "Relu"])
    assert measure.sqnr(outputs(model, loud)[0], outputs(result.model, loud)[0]) > 30


def test_clip_with_another_minimum_stays():
    model = image_net(lambda net: net.head(net.clip(net.conv("x", 3, 8), low=-1.0, high=1.0), 8))
    assert error_db(model, quantized(model).model) > 30


@pytest.mark.parametrize(("op", "kernel"), [("Add", "QLinearAdd"), ("Mul", "QLinearMul"), ("Concat", "QLinearConcat")])
def test_operators_of_two_branches_stay_integer(ops, op, kernel):
    def build(net: Net) -> str:
        x = net.op("Relu", net.conv("x", 3, 8))
        y = net.op(op, x, net.conv(x, 8, 8), **({"axis": 1} if op == "Concat" else {}))
        return net.head(net.op("Relu", net.conv(y, 16 if op == "Concat" else 8, 8)), 8)

    result = quantized(image_net(build))
    found = ops(result.model)
    assert found[kernel] == 1
    assert found[op] == found["DequantizeLinear"] == 0
    assert found["QuantizeLinear"] == 1  # the model's input alone


@pytest.mark.parametrize(
    ("op", "kernel", "attrs"),
    [
        ("AveragePool", "QLinearAveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("GlobalAveragePool", "QLinearGlobalAveragePool", {}),
        ("LeakyRelu", "QLinearLeakyRelu", {"alpha": 0.1}),
        ("Sigmoid", "QLinearSigmoid", {}),
    ],
)
def test_operators_between_layers_stay_integer(ops, op, kernel, attrs):
    model = image_net(lambda net: net.conv(net.op(op, net.conv("x", 3, 8), **attrs), 8, 4, 1))
    found = ops(quantized(model, {}).model)  # without passes: split-heads may give the last convolution two parts
    assert found[kernel] == 1
    assert found[op] == 0
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1  # at the model's input and output


def test_a_lone_operator_stays_float(ops):
    """Nothing integer reads the Sigmoid: two conversions would cost more than the kernel gains."""
    model = image_net(lambda net: net.op("Sigmoid", net.conv("x", 3, 8)))
    found = ops(quantized(model).model)
    assert found["Sigmoid"] == found["QLinearConv"] == 1


@pytest.mark.parametrize(
    ("op", "shape", "attrs"),
    [
        ("MaxPool", None, {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1] * 4}),
        ("Transpose", None, {"perm": [0, 1, 3, 2]}),
        ("Reshape", [0, 8, 4, 16], {}),
        ("Slice", None, {}),
    ],
)
def test_movers_between_layers_carry_codes(ops, op, shape, attrs):
    def build(net: Net) -> str:
        more = {"Reshape": [shape], "Slice": [[0, 0], [4, 4], [2, 3]]}.get(op, [])
        x = net.op(op, net.op("Relu", net.conv("x", 3, 8)), *(net.constant(v, np.int64) for v in more), **attrs)
        return net.head(net.op("Relu", net.conv(x, 8, 8)), 8)

    model = image_net(build)
    found = ops(quantized(model).model)
    assert found["QuantizeLinear"] == 1, found
    assert found["DequantizeLinear"] == 0
    assert found["QLinearConv"] == 2
    assert error_db(model, quantized(model).model) > 30


def test_pad_between_layers_runs_in_float_and_right(ops):
    """onnxruntime has no integer Pad here, but both ends share one grid, so nothing is lost."""
    model = image_net(
        lambda net: net.head(
            net.conv(
                net.op("Pad", net.op("Relu", net.conv("x", 3, 8)), net.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)), 8, 8
            ),
            8,
        )
    )
    result = quantized(model)
    assert ops(result.model)["QLinearConv"] == 2
    assert error_db(model, result.model) > 30


def test_flatten_carries_codes_into_the_gemm(ops):
    model = image_net(lambda net: net.gemm(net.op("Flatten", net.op("Relu", net.conv("x", 3, 4))), 256, 5))
    assert not ops(quantized(model).model) & Counter(["DequantizeLinear", "Gemm", "Conv"])


def test_gemm_at_the_end_writes_float(ops):
    model = mlp_net()
    result = quantized(model)
    last = made_by(result.model)["t3"]
    assert last.op_type == "MatMul"  # no Q behind it: the runtime need not round the logits
    found = ops(result.model)
    assert found["QGemm"] == 2
    assert found["MatMulIntegerToFloat"] == 1
    assert found["DequantizeLinear"] == 0


def test_matmul_between_layers_runs_as_qlinearmatmul(ops):
    net = Net(["N", 6, 16])
    x = net.op("Relu", net.linear("x", 16, 16, bias=False))
    found = ops(quantized(net.model(net.linear(x, 16, 8, bias=False))).model)
    assert found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 2
    assert found["MatMul"] == found["DequantizeLinear"] == 0


@pytest.mark.parametrize("layer", ["gemm", "matmul", "matmul + bias"])
@pytest.mark.parametrize("behind", ["Relu", "Clip", "Clip from -1", "Add", "Sigmoid", "LeakyRelu", "Identity"])
@pytest.mark.parametrize("recipe", ["int8", "weight-only"])
def test_what_stays_float_behind_a_layer_does_not_drag_it_along(ops, layer, behind, recipe):
    """onnxruntime fuses Gemm + Relu and MatMul + Add into float kernels before it looks for integer ones."""
    net = Net(["N", 32])
    x = net.gemm("x", 32, 32) if layer == "gemm" else net.linear("x", 32, 32, bias="bias" in layer)
    x = (
        net.clip(x, low=-1.0 if "-1" in behind else 0.0)
        if "Clip" in behind
        else net.op("Add", net.op("Tanh", "x"), x)
        if behind == "Add"
        else net.op(behind, x)
    )
    model = net.model(net.op("Softmax", net.op("Tanh", x), axis=-1))
    result = quantized(model, WEIGHT_ONLY if recipe == "weight-only" else {})
    found = ops(result.model)
    assert sum(found[kernel] for kernel in ("QGemm", "MatMulIntegerToFloat", "MatMulNBits")) == 1, found
    assert found["DequantizeLinear"] == 0
    assert error_db(model, result.model) > 20


# ---- how weights are stored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", ["channel", "tensor"])
def test_narrow_weights_are_int4_behind_a_cast_and_run_as_integer(ops, bits, block):
    model = mobilenet()
    result = quantized(model, settings=[f"weights.bits={bits}", f"weights.block={block}", "quality.below=-200"])
    makers, stored = made_by(result.model), {t.name: t for t in result.model.graph.initializer}
    for node in result.model.graph.node:
        if node.op_type in LAYERS:
            cast = makers[makers[node.input[1]].input[0]]
            codes = stored[cast.input[0]]
            assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.INT8)
            assert codes.data_type == TensorProto.INT4
            assert np.abs(numpy_helper.to_array(codes).astype(int)).max() == 2 ** (bits - 1) - 1
    found = ops(result.model)
    assert (found["QLinearConv"], found["QGemm"]) == (7, 1)
    assert not found & Counter(["Cast", "DequantizeLinear"])


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_wide_weights_are_int8_within_their_grid(bits):
    result = quantized(mobilenet(), settings=[f"weights.bits={bits}"])
    values, makers = initializers(result.model), made_by(result.model)
    for node in result.model.graph.node:
        if node.op_type in LAYERS:
            codes = values[makers[node.input[1]].input[0]]
            assert codes.dtype == np.int8
            assert np.abs(codes.astype(int)).max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("name", ["mobilenet", "inception", "mlp", "conv1d", "resnet20", "dead_channels"])
def test_weight_zero_points_are_zero_and_biases_are_int32_at_the_product_of_scales(name):
    model = ZOO[name]()
    result = quantized(model)
    values, makers = initializers(result.model), made_by(result.model)
    seen = 0
    for node in result.model.graph.node:
        if node.op_type in LAYERS:
            x, weight = makers[node.input[0]], makers[node.input[1]]
            assert not values[weight.input[2]].any()
            if len(node.input) > 2:
                bias = makers[node.input[2]]
                assert values[bias.input[0]].dtype == np.int32
                assert len(bias.input) == 2  # no zero point
                product, scale = values[x.input[1]] * values[weight.input[1]], bias.input[1]
                if scale in values:
                    np.testing.assert_array_equal(values[scale], product)
                else:  # the file computes it
                    assert makers[scale].op_type == "Mul"
                    assert list(makers[scale].input) == [x.input[1], weight.input[1]]
                seen += 1
    assert seen


def test_equal_contents_are_stored_once():
    model = shared_weights()
    result = quantized(model, {})
    contents = [(t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in result.model.graph.initializer]
    assert len(contents) == len(set(contents))
    makers = made_by(result.model)
    used = [makers[n.input[1]].input[0] for n in result.model.graph.node if n.op_type == "Conv"]
    assert used[1] == used[2] != used[0]


def test_initializers_that_nothing_reads_are_dropped():
    model = quantized(mobilenet()).model
    assert {t.name for t in model.graph.initializer} <= {i for n in model.graph.node for i in n.input}


def test_activations_are_unsigned_per_tensor():
    model = quantized(mobilenet()).model
    values = initializers(model)
    found = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert found
    for node in found:
        assert values[node.input[1]].shape == values[node.input[2]].shape == ()
        assert values[node.input[2]].dtype == np.uint8


def test_a_channel_of_all_but_zero_weights_does_not_overflow_its_bias():
    """50 / (s_x s_w) of a channel with weights of 1e-12 is far beyond int32."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    weight, bias = net.rng.normal(size=(8, 8, 3, 3)), net.rng.normal(size=8)
    weight[2] *= 1e-12
    bias[2] = 50
    x = net.op("Relu", net.op("Conv", x, net.constant(weight), net.constant(bias), pads=[1] * 4))
    model = net.model(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 10))
    result = quantized(model)
    assert error_db(model, result.model) > 30
    assert error_db(model, result.model, optimize=False) > 30
    assert any("widened" in note for note in result.report["notes"])
    for tensor in result.model.graph.initializer:
        if tensor.data_type == TensorProto.INT32:
            assert np.abs(numpy_helper.to_array(tensor).astype(np.int64)).max() <= 2**30 + 2**10


def test_bias_scale_has_the_shape_of_the_weight_scale():
    graph = load(mobilenet())
    result = quantized(mobilenet())
    layer = graph.layers[1]
    weight, activation = result.plan[layer.weight], result.plan[graph.layers[0].result]
    np.testing.assert_array_equal(bias_scale(layer, weight, activation), weight.scale.ravel() * activation.scale)


# ---- weight-only --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [64, 72, 31])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_weight_only_layers_run_as_matmulnbits(ops, bits, k, block):
    model = mlp_net(k)
    result = quantized(model, WEIGHT_ONLY, settings=[f"weights.bits={bits}", f"weights.block={block}"])
    found = ops(result.model)
    assert found["MatMulNBits"] == 3, found
    assert not found & Counter(["MatMul", "Gemm", "FusedGemm", "DequantizeLinear"])
    assert error_db(model, result.model) > (15 if bits == 4 else 35)


def test_weight_only_tokens(ops):
    model = transformer()
    result = quantized(model, {**WEIGHT_ONLY, "weights": {"bits": 8, "block": 16}})
    found = ops(result.model)
    assert found["MatMulNBits"] == 8
    assert found["QuantizeLinear"] == 0
    assert error_db(model, result.model) > 30


def test_weight_only_needs_no_data():
    model = mlp_net()
    assert error_db(model, quantize(model, WEIGHT_ONLY).model) > 15


# ---- float on purpose ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"quantize": False}, {"activations": {"bits": 32}}, {"weights": {"bits": 32}}])
def test_a_float_layer_between_quantized_ones_stays_float(ops, rule):
    """onnxruntime takes DQ -> Conv(float weight) -> Q for an integer convolution and quantizes the weight by itself."""
    model = image_net(three_convs)
    result = quantized(model, {"layer": [{"match": "conv2", **rule}]})
    assert "conv2" in result.report["floats"]
    assert ops(result.model)["QLinearConv"] == 2
    bare = without_sums(result.model)
    assert ops(bare)["QLinearConv"] == 3  # what the Sum prevents
    samples = feeds(model, 8, seed=1)
    exact, kept, taken = (
        outputs(m, samples, optimize)[0] for m, optimize in ((bare, False), (result.model, True), (bare, True))
    )
    assert measure.sqnr(exact, kept) > 130 > measure.sqnr(exact, taken)


def test_a_float_layer_computes_with_its_float_weight():
    """Numpy's expectation: a 1x1 convolution of the dequantized input with the weight as it was."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    y = net.conv(x, 8, 6, 1)
    weight, bias = (numpy_helper.to_array(t).copy() for t in net.constants[-2:])
    weight[0] *= 1e-4  # per tensor, this channel would be rounded to nothing
    net.constants[-2].CopyFrom(numpy_helper.from_array(weight, net.constants[-2].name))
    model = net.model(y, net.conv(y, 6, 4, 1))
    result = quantized(model, {"layer": [{"match": "conv2", "quantize": False}]})
    probe = copy.deepcopy(result.model)
    node = next(n for n in probe.graph.node if n.name == "conv2")
    probe.graph.output.append(helper.make_empty_tensor_value_info(node.input[0]))
    feed = feeds(model, 1, seed=1)[0]
    given = runtimes.session(probe, optimize=False).run(None, feed)[-1]
    wanted = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], given) + bias[:, None, None]
    found = runtimes.session(result.model).run([model.graph.output[0].name], feed)[0]
    step = float(result.plan[model.graph.output[0].name].scale)  # the output is read by an integer layer, so it is rounded
    assert np.abs(found - wanted).max() <= 0.5 * step * 1.001


def without_sums(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = copy.deepcopy(model)
    for node in [n for n in bare.graph.node if n.op_type == "Sum"]:
        makers = made_by(bare)
        maker = makers[node.input[0]]
        bare.graph.node.remove(node)
        maker.output[0] = node.output[0]
    return bare


@pytest.mark.parametrize("layer", ["gemm", "matmul"])
@pytest.mark.parametrize("behind", ["nothing", "Relu", "Clip", "Sigmoid", "Reshape", "Transpose"])
def test_a_weight_only_layer_between_quantized_ones_stays_weight_only(ops, layer, behind):
    """onnxruntime must find no Q to fuse into its MatMul, not even behind operators that Q can pass."""
    net = Net(["N", 64])
    x = net.op("Relu", net.gemm("x", 64, 64))
    x = net.gemm(x, 64, 64) if layer == "gemm" else net.linear(x, 64, 64, bias=False)
    k = 64
    if behind == "Clip":
        x = net.clip(x)
    elif behind == "Reshape":
        x, k = net.op("Reshape", x, net.constant([-1, 32], np.int64)), 32
    elif behind == "Transpose":
        x = net.op("Transpose", net.op("Reshape", x, net.constant([-1, 8, 8], np.int64)), perm=[0, 2, 1])
        k = 8
    elif behind != "nothing":
        x = net.op(behind, x)
    model = net.model(net.linear(x, k, 10, bias=False))
    result = quantized(model, {"layer": [{"match": "*2", "weights": {"block": 32}, "activations": {"bits": 32}}]})
    found = ops(result.model)
    assert found["MatMulNBits"] == 1, found
    assert found["QGemm"] + found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 2, found
    assert error_db(model, result.model) > 30


def test_a_float_residual_before_a_quantized_layer_is_not_fused(ops):
    """MatMul + Add in two dimensions is a Gemm to onnxruntime, and Add's result is quantized for the next layer."""
    net = Net(["N", 32])
    x = net.op("Relu", net.op("Add", net.linear("x", 32, 32, bias=False), net.op("Tanh", "x")))
    found = ops(quantized(net.model(net.linear(x, 32, 8, bias=False))).model)
    assert found["QGemm"] + found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 2, found


@pytest.mark.parametrize("layer", ["gemm", "matmul"])
@pytest.mark.parametrize("behind", ["Relu", "Clip"])
@pytest.mark.parametrize("other", ["output", "reader"])
def test_a_layer_that_others_read_beside_its_relu_stays_integer(ops, layer, behind, other):
    net = Net(["N", 32])
    y = net.gemm("x", 32, 32) if layer == "gemm" else net.linear("x", 32, 32, bias=False)
    x = net.clip(y) if behind == "Clip" else net.op("Relu", y)
    x = net.linear(x, 32, 8, bias=False)
    model = net.model(x, y) if other == "output" else net.model(x, net.op("Softmax", y, axis=-1))
    found = ops(quantized(model).model)
    assert found["QGemm"] + found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 2, found


def test_a_weight_only_layer_may_share_its_input_with_an_integer_one(ops):
    """Query, key and value of a transformer read one tensor; each follows its own rule."""
    net = Net(["N", 4, 32])
    x = net.op("Tanh", "x")
    model = net.model(net.op("Softmax", net.op("Mul", net.linear(x, 32, 32), net.linear(x, 32, 32)), axis=-1))
    rule = {"match": "matmul1", "weights": {"block": 32}, "activations": {"bits": 32}}
    result = quantized(model, {"layer": [rule]})
    found = ops(result.model)
    assert (found["MatMulNBits"], found["QGemm"]) == (1, 1), found
    assert error_db(model, result.model) > 30


def test_convtranspose_is_stored_in_8_bits_and_computes_float(ops):
    model = conv_transpose()
    result = quantized(model)
    assert ops(result.model)["ConvTranspose"] == 2
    rows = {row["name"]: row for row in result.report["layers"]}
    assert rows["convtranspose2"]["weights"] == "int8 per channel"
    assert "ConvTranspose" in rows["convtranspose2"]["why_float"]
    assert "2 ConvTranspose stored in 8 bits, compute float" in result.summary
    assert error_db(model, result.model) > 30


def test_control_flow_stays_float_and_runs(ops):
    model = control_flow()
    result = quantized(model)
    found = ops(result.model)
    assert found["If"] == 1
    node = next(n for n in result.model.graph.node if n.op_type == "If")
    assert [{n.op_type for n in a.g.node} for a in node.attribute] in ([{"Mul"}, {"Add"}], [{"Add"}, {"Mul"}])
    assert error_db(model, result.model) > 30
    assert found["QLinearConv"] == 2, "the convolution whose output the branches read"


def test_control_flow_may_read_the_models_input():
    model = control_flow()
    for attribute in model.graph.node[4].attribute:
        body = attribute.g
        body.node.insert(0, helper.make_node("ReduceMean", ["x"], [f"{body.name}_mean"], keepdims=0))
        body.node[1].input[1] = f"{body.name}_mean"
    onnx.checker.check_model(model)
    assert error_db(model, quantized(model).model) > 30


@pytest.mark.parametrize("quantize_it", [True, False])
def test_products_of_two_activations_are_integer_on_request(ops, quantize_it):
    model = transformer()
    result = quantized(model, {"layer": [{"op": "Attention", "quantize": quantize_it}]})
    found = ops(result.model)
    products = [
        n.name
        for n in model.graph.node
        if n.op_type == "MatMul" and not set(n.input) & {t.name for t in model.graph.initializer}
    ]
    kernels = {y.name: y.quantized for y in audit_model(result.model).layers}
    assert len(products) == 2
    assert all(kernels[name] == quantize_it for name in products)
    assert bool(found["FusedMatMul"] + found["MatMul"]) != quantize_it
    assert error_db(model, result.model) > 30


# ---- targets ------------------------------------------------------------------------------------------------------------


def test_avx2_target_keeps_codes_within_64_and_says_so():
    model = mobilenet()
    result = quantized(model, target="ort-cpu-avx2")
    codes = [a for a in initializers(result.model).values() if a.dtype == np.int8 and a.ndim > 1]
    assert len(codes) == 8
    assert max(np.abs(a.astype(int)).max() for a in codes) <= 64
    assert next(note for note in result.report["notes"] if "|code| <= 64" in note).startswith(
        "weight codes of 7 bits in 8 layers"
    )
    assert error_db(model, result.model) > 30
    assert result.report["recipe"]["target"] == "ort-cpu-avx2"


@pytest.mark.parametrize("name", ["mobilenet", "inception", "mlp", "transformer", *slowly("grouped", "no_bias", "resnet20")])
def test_openvino_agrees_with_onnxruntime(name):
    openvino = pytest.importorskip("openvino")
    model = ZOO[name]()
    result = quantized(model, target="openvino")
    core = openvino.Core()
    network = core.read_model(exact_model(result.model).SerializeToString())
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    samples = feeds(model, 8, seed=1)
    ours = outputs(result.model, samples)[0]
    theirs = np.concatenate([compiled(feed)[0] for feed in samples])
    assert measure.sqnr(ours, theirs) > 28
    assert measure.agreement(ours, theirs) == 1.0


# ---- the rest of the model ----------------------------------------------------------------------------------------------


def test_export_leaves_the_graph_alone():
    model = mobilenet()
    graph, result = load(model), quantized(model)
    before = graph.model().SerializeToString(deterministic=True)
    export(graph, result.plan, target_of(result))
    assert graph.model().SerializeToString(deterministic=True) == before


def target_of(result: Result):
    from onnxq_plugins.plugins import find_plugins

    return find_plugins().target(result.report["recipe"]["target"])


def test_names_shapes_and_metadata_are_kept():
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    y = net.conv(x, 8, 6)
    model = net.model(net.head(y, 6), x, y)  # outputs that quantized layers read as well
    for key, value in (("author", "me"), ("classes", "a,b")):
        model.metadata_props.add(key=key, value=value)
    model.doc_string, model.producer_name, model.graph.doc_string = "about the model", "trainer", "about the graph"
    model.graph.name, model.graph.node[0].doc_string = "the_graph", "first"
    result = quantized(model)
    made = result.model
    for a, b in ((model.graph.input, made.graph.input), (model.graph.output, made.graph.output)):
        assert [(v.name, v.type) for v in a] == [(v.name, v.type) for v in b]
    props = {p.key: p.value for p in made.metadata_props}
    assert (props["author"], props["classes"]) == ("me", "a,b")
    assert (made.doc_string, made.producer_name, made.graph.doc_string, made.graph.name) == (
        "about the model",
        "trainer",
        "about the graph",
        "the_graph",
    )
    assert next(n for n in made.graph.node if n.name == "conv0").doc_string == "first"
    assert {n.name for n in model.graph.node} <= {n.name for n in made.graph.node}
    assert error_db(model, made) > 30


def test_an_input_that_is_an_output_too():
    net = Net(["N", 3, 8, 8])
    model = net.model(net.conv("x", 3, 4))
    model.graph.output.append(model.graph.input[0])
    assert error_db(model, quantized(model).model) > 30


@pytest.mark.parametrize(("rows", "beta"), [(3, 0.5), (8, 1.0)])
def test_a_gemm_with_a_bias_per_row(rows, beta):
    """ONNX lets C be [M, 1]; with M = N it must not be taken for a bias per column."""
    net = Net([rows, 32])
    model = net.model(net.op("Gemm", "x", net.weight(32, 8), net.weight(rows, 1), beta=beta))
    result = quantized(model)
    assert error_db(model, result.model) > 30
    assert error_db(model, result.model, optimize=False) > 30


@pytest.mark.parametrize("name", kinds(sorted(ZOO), "mlp", "resnet20", "dead_channels", "control_flow", "no_layer"))
@pytest.mark.parametrize("recipe", ["int8", *slowly({})])
def test_every_toy_model_is_valid_and_runs_alike_with_and_without_optimization(name, recipe):
    model = ZOO[name]()
    result = quantized(model, recipe)
    onnx.checker.check_model(result.model, full_check=True)
    samples = feeds(model, 4, seed=1)
    for a, b in zip(outputs(result.model, samples), outputs(result.model, samples, optimize=False), strict=True):
        assert measure.sqnr(a, b) > 35
    assert error_db(model, result.model) > 25


@pytest.mark.parametrize("dynamic", ["N", 1, 4])
def test_any_batch_size(dynamic):
    net = Net([dynamic, 3, 8, 8])
    model = net.model(three_convs(net))
    result = quantized(model)
    batch = np.concatenate([feed["x"] for feed in feeds(image_net(three_convs), dynamic if dynamic != "N" else 3)])
    assert runtimes.session(result.model).run(None, {"x": batch})[0].shape == (len(batch), 10)


@pytest.mark.parametrize("name", kinds(sorted(ZOO), "conv1d", "control_flow", "no_layer"))
def test_the_audit_names_the_kernel_of_every_layer(name):
    """Float models too, whose convolutions onnxruntime renames when it changes their memory layout."""
    for model in (ZOO[name](), quantized(ZOO[name]()).model):
        kernels = {y.kernel for y in audit_model(model).layers}
        assert kernels <= {
            "Conv",
            "FusedConv",
            "ConvTranspose",
            "Gemm",
            "FusedGemm",
            "MatMul",
            "FusedMatMul",
            "QLinearConv",
            "QGemm",
            "QLinearMatMul",
            "MatMulIntegerToFloat",
        }


# ---- random graphs ------------------------------------------------------------------------------------------------------

STEPS = (
    "conv",
    "pointwise",
    "bare conv",
    "strided",
    "depthwise",
    "relu",
    "clip",
    "add",
    "flipped add",
    "concat",
    "maxpool",
    "averagepool",
)


def random_model(steps: list[str], seed: int) -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8], seed)
    x, c = "x", 3
    for step in steps:
        if step in ("conv", "pointwise", "bare conv", "strided"):
            attrs = {"strides": [2, 2]} if step == "strided" else {}
            wanted = int(net.rng.integers(3, 9))
            x, c = net.conv(x, c, wanted, 1 if step == "pointwise" else 3, bias=step != "bare conv", **attrs), wanted
        elif step == "depthwise":
            x = net.conv(x, c, c, groups=c)
        elif step == "relu":
            x = net.op("Relu", x)
        elif step == "clip":
            x = net.clip(x)
        elif step in ("add", "flipped add"):
            y = net.conv(x, c, c)
            x = net.op("Add", *((x, y) if step == "add" else (y, x)))
        elif step == "concat" and c < 16:
            x, c = net.op("Concat", x, net.conv(x, c, 4, 1), axis=1), c + 4
        elif step in ("maxpool", "averagepool"):
            x = net.op(
                "MaxPool" if step == "maxpool" else "AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]
            )
    return net.model(net.head(x, c))


@examples(120)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8), st.integers(0, 2**16))
def test_random_graphs(steps, seed):
    model = random_model(steps, seed)
    result = quantize(model, "int8", feeds(model, 12), workers=1, verify=True)
    onnx.checker.check_model(result.model, full_check=True)
    assert all(step.get("drift", 0) < 1e-4 for step in result.report["steps"])
    convs = sum(n.op_type == "Conv" for n in model.graph.node)
    assert result.report["kernels"].get("QLinearConv", 0) == convs
    samples = feeds(model, 6, seed=1)
    optimized, plain = outputs(result.model, samples)[0], outputs(result.model, samples, optimize=False)[0]
    # kernels may round ties apart by one code, which is far below what quantization itself adds
    assert measure.sqnr(plain, optimized) > 35
    assert measure.sqnr(outputs(model, samples)[0], optimized) > 8  # one sample beyond all ranges may hold most noise


def random_mlp(steps: list[str], tokens: bool, seed: int) -> onnx.ModelProto:
    net = Net(["N", 4, 16] if tokens else ["N", 16], seed)
    x = first = net.linear("x", 16, 16)
    for step in steps:
        if step in ("linear", "bare linear"):
            x = net.linear(x, 16, 16, bias=step == "linear")
        elif step == "layernorm":
            x = net.op("LayerNormalization", x, net.weight(16), net.weight(16), axis=-1)
        elif step == "gelu":
            x = net.gelu_tanh(x)
        elif step == "clip":
            x = net.clip(x)
        elif step in ("Add", "Mul"):
            x = net.op(step, x, first)
        else:
            x = net.op(step, x)
    return net.model(net.linear(x, 16, 16))


@examples(60)
@given(
    st.lists(
        st.sampled_from(("linear", "bare linear", "layernorm", "gelu", "clip", "Relu", "Add", "Mul", "Tanh")), max_size=7
    ),
    st.booleans(),
    st.sampled_from(["int8", "weight-only"]),
    st.integers(0, 2**16),
)
def test_random_mlps(steps, tokens, recipe, seed):
    model = random_mlp(steps, tokens, seed)
    weight_only = {"activations": {"bits": 32}, "weights": {"block": 16}}
    result = quantize(model, weight_only if recipe == "weight-only" else "int8", feeds(model, 12), workers=1, verify=True)
    onnx.checker.check_model(result.model, full_check=True)
    assert {row["kernel"] for row in result.report["layers"]} <= (
        {"MatMulNBits"} if recipe == "weight-only" else {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
    )
    samples = feeds(model, 6, seed=1)
    optimized, plain = outputs(result.model, samples)[0], outputs(result.model, samples, optimize=False)[0]
    assert measure.sqnr(plain, optimized) > 30  # MatMulNBits rounds activations to 8 bits by itself
    assert measure.sqnr(outputs(model, samples)[0], optimized) > 8


def test_int4_constants_round_trip():
    """What the exporter relies on: ml_dtypes arrays become packed INT4 tensors and come back."""
    codes = np.arange(-7, 8).reshape(3, 5)
    tensor = numpy_helper.from_array(codes.astype(ml_dtypes.int4), "codes")
    assert len(tensor.raw_data) == 8
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(int), codes)


def test_channels_without_weights_keep_their_bias():
    """Their range is empty, hence any scale will do for the codes, but not for the bias, which has it too."""
    net = Net(["N", 4, 8, 8])
    x = net.conv("x", 4, 8)
    model = net.model(x)
    tensors = {t.name: t for t in model.graph.initializer}
    name = model.graph.node[-1].input[1]
    bias_name = model.graph.node[-1].input[2]
    weight, bias = numpy_helper.to_array(tensors[name]).copy(), numpy_helper.to_array(tensors[bias_name]).copy()
    weight, bias = weight / 100, bias / 100
    weight[3], bias[3] = 0, 0.003
    tensors[name].CopyFrom(numpy_helper.from_array(weight, name))
    tensors[bias_name].CopyFrom(numpy_helper.from_array(bias, bias_name))
    for block in ("channel", "tensor"):
        result = quantized(model, {"weights": {"block": block}})
        found = outputs(result.model, feeds(model, 2, seed=1))[0]
        step = float(next(spec.scale for key, spec in result.plan.items() if key == model.graph.output[0].name))
        assert np.abs(found[:, 3] - 0.003).max() <= step
