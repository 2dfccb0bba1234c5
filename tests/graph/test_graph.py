"""Import: the canonical form computes what the model does, keeps its documentation and fuses what it should."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import load
from onnxq_plugins.measure import drift
from tests.zoo import (
    ZOO,
    Net,
    batch,
    cnn,
    feeds,
    kinds,
    mlp,
    mobilenet,
    resnet20,
    run,
    shared_weights,
    transformer,
    written_out,
)


def ops(graph):
    return Counter(node.op for node in graph.nodes)


def imported(model):
    """The canonical graph, after checking that it computes what `model` does, in the same shapes."""
    graph = load(model)
    samples = feeds(model, 3)
    for feed in (*samples, batch(samples)) if has_dynamic_batch(model) else samples:
        for optimize in (True, False):
            before, after = run(model, feed, optimize), run(graph, feed, optimize)
            assert [a.shape for a in before] == [a.shape for a in after]
            assert drift(before, after) < 1e-4
    return graph


def has_dynamic_batch(model):
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def documented(model):
    """The model with all kinds of documentation."""
    helper.set_model_props(model, {"labels": "cat,dog", "license": "MIT"})
    model.doc_string, model.graph.doc_string, model.graph.name = "of the model", "of the graph", "named"
    model.producer_name, model.model_version = "zoo", 7
    for node in model.graph.node:
        node.doc_string = f"about {node.name}"
    return model


# ---- all models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_function_and_interface_stay(name):
    model = ZOO[name]()
    untouched = model.SerializeToString()
    graph = imported(model)
    exported = graph.model()
    onnx.checker.check_model(exported, full_check=True)
    assert exported.opset_import[0].version == graph.opset == 17 and exported.ir_version == 8
    assert graph.inputs == [i.name for i in model.graph.input] and graph.outputs == [o.name for o in model.graph.output]
    assert exported.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert model.SerializeToString() == untouched
    assert not graph.touched and not graph.notes


@pytest.mark.parametrize("name", kinds(ZOO, "written_out", "control_flow", "no_layer"))
def test_documentation_survives(name):
    model = documented(ZOO[name]())
    for exported in (load(model).model(), load(model).copy().model()):
        assert {p.key: p.value for p in exported.metadata_props} == {"labels": "cat,dog", "license": "MIT"}
        assert (exported.doc_string, exported.graph.doc_string, exported.graph.name) == (
            "of the model",
            "of the graph",
            "named",
        )
        assert (exported.producer_name, exported.model_version) == ("zoo", 7)
        common = {n.name for n in exported.graph.node} & {n.name for n in model.graph.node}
        assert len(common) >= len(load(model).layers) - 2
        assert all(n.doc_string == f"about {n.name}" for n in exported.graph.node if n.name in common)


@pytest.mark.parametrize("name", ZOO)
def test_importing_again_changes_nothing(name):
    graph = load(ZOO[name]())
    again = load(graph.model())
    assert ops(again) == ops(graph) and len(again.layers) == len(graph.layers)


@pytest.mark.parametrize("name", ZOO)
def test_layers(name):
    graph = load(ZOO[name]())
    owners = Counter(c for layer in graph.layers for c in (layer.weight, layer.bias) if c)
    assert all(n == 1 for n in owners.values())  # law L7
    for layer in graph.layers:
        weight = graph.constant(layer.weight)
        assert weight.shape == layer.shape and graph.layer(layer.name) == layer
        assert graph.producer(layer.output).op == layer.op
        if layer.op != "ConvTranspose":
            matrix = layer.matrix(weight)
            outputs = weight.shape[layer.out_axis]
            assert matrix.shape == (layer.groups, outputs // layer.groups, weight.size // outputs)
            np.testing.assert_array_equal(layer.from_matrix(matrix), weight)
        if layer.bias:
            channels = layer.shape[1] * layer.groups if layer.op == "ConvTranspose" else layer.shape[layer.out_axis]
            assert graph.constant(layer.bias).shape == (channels,)


@pytest.mark.parametrize("make", [cnn, mlp, mobilenet, resnet20])
@pytest.mark.parametrize("opset", [11, 13])
def test_old_opsets_are_converted(make, opset):
    model = documented(make(opset))
    graph = imported(model)
    exported = graph.model()
    assert graph.opset == 13 and graph.versions == (opset, model.ir_version) and not graph.notes
    assert exported.ir_version == model.ir_version and ops(graph) == ops(load(make()))
    assert {p.key: p.value for p in exported.metadata_props} == {"labels": "cat,dog", "license": "MIT"}
    assert (
        exported.doc_string == "of the model" and exported.graph.node[0].doc_string == f"about {exported.graph.node[0].name}"
    )
    onnx.checker.check_model(exported, full_check=True)


@pytest.mark.parametrize("opset, word", [(6, "too old"), (99, "too new")])
def test_unsupported_opsets_are_refused(opset, word):
    model = cnn()
    model.opset_import[0].version = opset
    with pytest.raises(OnnxqError, match=word):
        load(model)


@pytest.mark.parametrize("ir, opset", [(3, 11), (3, 13), (4, 11), (8, 17), (10, 21)])
def test_weights_listed_as_inputs(ir, opset):
    model = cnn(opset)
    model.ir_version = ir
    weights = model.graph.initializer
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)
    graph = load(model)
    assert graph.inputs == ["x"] and len(graph.layers) == 3 and graph.opset == max(opset, 13)
    assert drift(run(cnn(), feeds(cnn(), 1)[0]), run(graph, feeds(cnn(), 1)[0])) < 1e-4


# ---- copies and digests ----------------------------------------------------------------------------------------------


def test_copy_is_independent():
    model = mobilenet()
    graph = load(model)
    digest, feed = graph.digest(), feeds(model, 1)[0]
    before = run(graph, feed)
    copied = graph.copy()
    assert copied.digest() == digest and set(copied.batchnorms) == set(graph.batchnorms)
    for layer in copied.layers:
        copied.set_constant(layer.weight, copied.constant(layer.weight) * 2)
    copied.batchnorms.clear()
    copied.notes.append("a note")
    assert copied.digest() != digest and drift(before, run(copied, feed)) > 1e-3
    assert graph.digest() == digest and drift(before, run(graph, feed)) == 0
    assert graph.batchnorms and not graph.touched and not graph.notes


def test_digest_depends_on_weights_alone():
    graph = load(cnn())
    digest = graph.digest()
    weight = graph.layers[1].weight
    values = graph.constant(weight).copy()
    assert graph.digest() == load(cnn()).digest() == digest
    _ = graph.layers, graph.root(graph.outputs[0]), graph.model()
    graph.set_constant(weight, values.copy())
    assert graph.digest() == digest and graph.touched == {weight}
    values[0, 0, 0, 0] = np.nextafter(values[0, 0, 0, 0], np.float32(9))
    graph.set_constant(weight, values)
    assert graph.digest() != digest


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_kinds_and_axes():
    net = Net(["N", 4, 8, 8])
    x = net.conv("x", 4, 8)
    x = net.conv(x, 8, 8, groups=8)
    x = net.conv(x, 8, 16, groups=8)
    x = net.conv(x, 16, 12, groups=4)
    x = net.op("ConvTranspose", x, net.weight(12, 3, 2, 2), group=4)
    x = net.op("ConvTranspose", x, net.weight(12, 1, 2, 2), group=12)
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    x = net.gemm(net.gemm(x, 12, 9, trans_b=0), 9, 10)
    graph = imported(net.model(net.op("MatMul", x, net.weight(10, 5))))
    assert [(y.op, y.kind, y.out_axis, y.in_axis) for y in graph.layers] == [
        ("Conv", "dense", 0, 1),
        ("Conv", "depthwise", 0, 1),
        ("Conv", "depthwise", 0, 1),
        ("Conv", "grouped", 0, 1),
        ("ConvTranspose", "grouped", 1, 0),
        ("ConvTranspose", "depthwise", 1, 0),
        ("Gemm", "dense", 1, 0),
        ("Gemm", "dense", 0, 1),
        ("MatMul", "dense", 1, 0),
    ]
    with pytest.raises(KeyError):
        graph.layer("unknown")
    with pytest.raises(ValueError, match="ConvTranspose"):
        graph.layers[4].matrix(graph.constant(graph.layers[4].weight))


def test_matrix_times_patches_is_the_layer():
    """Rows of the matrix are outputs, in the order of the output channels."""
    model = mlp()
    graph = load(model)
    x = feeds(model, 1)[0]["x"]
    first = graph.layers[0]
    expected = layer_output(graph, first, {"x": x})
    y = first.matrix(graph.constant(first.weight))[0] @ x.T + graph.constant(first.bias)[:, None]
    np.testing.assert_allclose(y.T, expected, rtol=1e-4, atol=1e-5)


def layer_output(graph, layer, feed):
    model = graph.model()
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info(layer.output))
    return run(model, feed)[0]


def test_results_are_behind_the_activation():
    net = Net(["N", 3, 8, 8])
    relu = net.op("Relu", net.conv("x", 3, 8))
    relu6 = net.clip(net.conv(relu, 8, 8))
    signed = net.clip(net.conv(relu6, 8, 8), -1.0, 1.0)
    forked = net.conv(signed, 8, 8)
    x = net.op("Add", net.op("Relu", forked), forked)
    graph = load(net.model(net.conv(x, 8, 8)))
    conv = [y.output for y in graph.layers]
    assert [y.result for y in graph.layers] == [relu, relu6, conv[2], conv[3], conv[4]]


def test_root_follows_shape_only_operators_upwards():
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    y = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Transpose", y, perm=[0, 2, 3, 1])
    y = net.op("Reshape", y, net.constant([0, 16, 8], np.int64))
    z = net.op("Slice", y, *(net.constant([v], np.int64) for v in (2, 9, 1)))
    first = net.op("Split", z, net.constant([3, 4], np.int64), outputs=2, axis=1)
    other = f"{first}_1"
    padded = net.op("Pad", z, net.constant([0, 1, 0, 0, 1, 0], np.int64))
    ones = net.op("Pad", z, net.constant([0, 1, 0, 0, 1, 0], np.int64), net.constant(1.0))
    mean = net.op("ReduceMean", z, axes=[1])
    outputs = [net.op("Sigmoid", t) for t in (first, other, padded, ones, mean)]
    graph = load(net.model(*outputs))
    assert all(graph.root(t) == x for t in (x, y, z, first, other, padded))
    assert graph.root(ones) == ones and graph.root(mean) == mean and graph.root("x") == "x"
    assert graph.root(graph.layers[0].weight) == graph.layers[0].weight


@pytest.mark.parametrize("mode, same", [("nearest", True), ("linear", False)])
def test_root_and_resize(mode, same):
    net = Net(["N", 3, 8, 8])
    x = net.op("Resize", net.conv("x", 3, 8), "", net.constant([1, 1, 2, 2]), mode=mode)
    graph = imported(net.model(net.conv(x, 8, 4)))
    assert (graph.root(x) != x) is same


def test_shared_weights_are_split():
    graph = imported(shared_weights())
    a, b, c = (y for y in graph.layers if y.op == "Conv")
    assert len({y.weight for y in (a, b, c)}) == len({y.bias for y in (a, b, c)}) == 3
    np.testing.assert_array_equal(graph.constant(b.weight), graph.constant(c.weight))
    graph.set_constant(b.weight, graph.constant(b.weight) * 2)
    assert np.abs(graph.constant(c.weight) * 2 - graph.constant(b.weight)).max() == 0


def test_weight_shared_with_an_operator_that_is_not_a_layer():
    net = Net(["N", 8])
    weight, bias = net.weight(8, 8), net.weight(8)
    x = net.op("Gemm", net.op("Mul", "x", bias), weight, bias)
    graph = imported(net.model(net.op("Add", x, net.op("Gemm", net.op("MatMul", "x", weight), weight, bias, transB=1))))
    assert len({y.weight for y in graph.layers}) == 3


# ---- Gemm ------------------------------------------------------------------------------------------------------------


def test_gemm_alpha_and_beta_are_folded():
    graph = imported(mlp())
    assert all("alpha" not in y.attrs and "beta" not in y.attrs for y in graph.layers)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (1, 6), (4, 6), (4, 1), (6, 1)])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_gemm_with_every_bias_shape(shape, beta):
    """(6, 1) is one bias per sample of a batch whose size happens to equal the number of outputs."""
    net = Net([4 if shape[:1] == (4,) else 6, 5])
    x = net.op("Gemm", "x", net.weight(5, 6), net.weight(*shape), alpha=0.5, beta=beta)
    graph = imported(net.model(net.gemm(net.op("Relu", x), 6, 3)))
    per_row = len(shape) == 2 and shape[0] > 1
    assert per_row or graph.constant(graph.layers[0].bias).shape == (6,)


def test_gemm_without_bias_and_of_a_transposed_input():
    net = Net([5, 7])
    x = net.op("Gemm", "x", net.weight(7, 6), alpha=3.0)
    x = net.op("Gemm", x, net.weight(5, 4), transA=1, alpha=0.5)
    graph = imported(net.model(x))
    assert [y.bias for y in graph.layers] == [None, None] and not any(y.attrs.get("transA") for y in graph.layers)


# ---- BatchNormalization and bias -------------------------------------------------------------------------------------


def test_batchnorm_is_folded_and_its_statistics_are_kept():
    model = mobilenet()
    graph = imported(model)
    convs = [y for y in graph.layers if y.op == "Conv"]
    assert "BatchNormalization" not in ops(graph) and len(convs) == 7
    assert set(graph.batchnorms) == {y.output for y in convs}
    nodes = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for layer, node in zip(convs, nodes, strict=True):
        norm = graph.batchnorms[layer.output]
        for statistic, name in zip((norm.gamma, norm.beta, norm.mean, norm.variance), node.input[1:], strict=True):
            np.testing.assert_array_equal(statistic, values[name])


@pytest.mark.parametrize(
    "op, shape, attrs",
    [
        ("Conv", (12, 4, 3, 3), {"group": 2}),
        ("Conv", (16, 1, 1, 1), {"group": 8}),
        ("ConvTranspose", (8, 12, 2, 2), {}),
        ("ConvTranspose", (8, 6, 3, 3), {"group": 2}),
        ("ConvTranspose", (8, 1, 3, 3), {"group": 8}),
        ("ConvTranspose", (8, 3, 2, 2), {"group": 4, "strides": [2, 2]}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_batchnorm_behind_groups(op, shape, attrs, bias):
    net = Net(["N", 8, 6, 6])
    channels = shape[1] * attrs.get("group", 1) if op == "ConvTranspose" else shape[0]
    x = net.op(op, "x", net.weight(*shape), *([net.weight(channels)] if bias else []), **attrs)
    last = net.batchnorm(x, channels)
    graph = imported(net.model(last))
    assert ops(graph) == {op: 1} and set(graph.batchnorms) == {last} == {graph.layers[0].output}


def test_batchnorm_behind_gemm():
    net = Net(["N", 6])
    graph = imported(net.model(net.op("Relu", net.batchnorm(net.gemm("x", 6, 9, trans_b=0), 9, epsilon=0.5))))
    assert ops(graph) == {"Gemm": 1, "Relu": 1}


@pytest.mark.parametrize("shape", [["N", 6], ["N", 5, 6], ["N", 9, 6]])
def test_batchnorm_behind_matmul(shape):
    """On three axes it normalizes axis 1, the tokens, not the outputs."""
    net = Net(shape)
    x = net.op("MatMul", "x", net.weight(6, 9))
    onnx.checker.check_model(imported(net.model(net.batchnorm(x, shape[1] if len(shape) == 3 else 9))).model())


def test_batchnorm_stays_where_the_layer_is_read_twice():
    net = Net(["N", 3, 6, 6])
    x = net.conv("x", 3, 8)
    graph = imported(net.model(net.op("Add", x, net.batchnorm(x, 8))))
    assert ops(graph)["BatchNormalization"] == 1 and not graph.batchnorms
    net = Net(["N", 3, 6, 6])
    x = net.conv("x", 3, 8)
    assert ops(imported(net.model(x, net.batchnorm(x, 8))))["BatchNormalization"] == 1


@pytest.mark.parametrize(
    "shape, folded",
    [((8, 1, 1), True), ((1, 8, 1, 1), True), ((8,), False), ((1,), True), ((8, 1, 8), False), ((1, 1, 8, 1, 1), False)],
)
def test_constant_behind_conv(shape, folded):
    """Only one constant, or one per channel, is a bias; the image here is 8 pixels wide on purpose."""
    net = Net(["N", 3, 8, 8])
    graph = imported(net.model(net.op("Add", net.weight(*shape), net.conv("x", 3, 8, bias=False))))
    assert ("Add" not in ops(graph)) is folded


# ---- functions written out -------------------------------------------------------------------------------------------


def c(net, value):
    return net.constant(value)


def tanh_mul_cube(net, x):
    cube = net.op("Mul", net.op("Mul", x, x), x)
    inner = net.op("Add", net.op("Mul", c(net, 0.044715), cube), x)
    tanh = net.op("Tanh", net.op("Mul", c(net, 0.7978845608), inner))
    return net.op("Mul", net.op("Mul", net.op("Add", c(net, 1.0), tanh), c(net, 0.5)), x)


def tanh_factored(net, x):
    """x (1 + tanh(0.797.. x (1 + 0.044715 x^2))) / 2"""
    poly = net.op("Add", net.op("Mul", net.op("Mul", x, x), c(net, 0.044715)), c(net, 1.0))
    tanh = net.op("Tanh", net.op("Mul", net.op("Mul", x, c(net, 0.7978845608)), poly))
    return net.op("Div", net.op("Mul", x, net.op("Add", tanh, c(net, 1.0))), c(net, 2.0))


def erf_half_first(net, x):
    erf = net.op("Erf", net.op("Mul", x, c(net, 0.70710678)))
    return net.op("Mul", net.op("Mul", c(net, 0.5), x), net.op("Add", c(net, 1.0), erf))


def erf_half_inside(net, x):
    """x (0.5 + 0.5 erf)"""
    erf = net.op("Erf", net.op("Div", x, c(net, [1.41421356])))
    return net.op("Mul", x, net.op("Add", net.op("Mul", erf, c(net, 0.5)), c(net, 0.5)))


def swish_clip(net, x):
    return net.op("Mul", x, net.op("Div", net.clip(net.op("Add", x, c(net, 3.0))), c(net, 6.0)))


def swish_reciprocal(net, x):
    return net.op("Mul", net.op("Mul", net.clip(net.op("Add", c(net, 3.0), x)), x), c(net, 1 / 6))


def swish_hardsigmoid(net, x):
    return net.op("Mul", net.op("HardSigmoid", x, alpha=1 / 6, beta=0.5), x)


def written(function, *more):
    """x -> Gemm -> function -> Gemm, as a graph; the outputs of operators `more` of the function are model outputs too."""
    net = Net(["N", 6])
    x = net.gemm("x", 6, 8)
    first = len(net.nodes)
    y = net.gemm(function(net, x), 8, 5)
    inner = [n.output[0] for n in net.nodes[first:] if n.op_type in more]
    return imported(net.model(y, *inner))


@pytest.mark.parametrize(
    "function, op, approximate",
    [
        (Net.gelu_tanh, "Gelu", "tanh"),
        (tanh_mul_cube, "Gelu", "tanh"),
        (tanh_factored, "Gelu", "tanh"),
        (Net.gelu_erf, "Gelu", "none"),
        (erf_half_first, "Gelu", "none"),
        (erf_half_inside, "Gelu", "none"),
        (Net.hardswish, "HardSwish", None),
        (swish_clip, "HardSwish", None),
        (swish_reciprocal, "HardSwish", None),
        (swish_hardsigmoid, "HardSwish", None),
    ],
)
def test_functions_become_one_operator(function, op, approximate):
    graph = written(function)
    assert ops(graph) == {"Gemm": 2, op: 1}
    assert graph.nodes[1].attrs.get("approximate") == approximate


def wrong_cubic(net, x):
    return net.gelu_tanh(x, cubic=0.05)


def wrong_root(net, x):
    erf = net.op("Erf", net.op("Mul", x, c(net, 0.7)))
    return net.op("Mul", net.op("Mul", x, net.op("Add", erf, c(net, 1.0))), c(net, 0.5))


def wrong_divisor(net, x):
    return net.op("Div", net.op("Mul", x, net.clip(net.op("Add", x, c(net, 3.0)))), c(net, 6.01))


def wrong_factor(net, x):
    """The constant differs in one channel."""
    half = np.full(8, 0.5)
    half[3] = 0.51
    erf = net.op("Erf", net.op("Div", x, c(net, np.sqrt(2))))
    return net.op("Mul", net.op("Mul", x, net.op("Add", erf, c(net, 1.0))), c(net, half))


def two_variables(net, x):
    other = net.op("Abs", x)
    erf = net.op("Erf", net.op("Div", x, c(net, np.sqrt(2))))
    return net.op("Mul", net.op("Mul", other, net.op("Add", erf, c(net, 1.0))), c(net, 0.5))


def quick_gelu(net, x):
    return net.op("Mul", x, net.op("Sigmoid", net.op("Mul", x, c(net, 1.702))))


@pytest.mark.parametrize("function", [wrong_cubic, wrong_root, wrong_divisor, wrong_factor, two_variables, quick_gelu])
def test_near_misses_stay(function):
    assert not {"Gelu", "HardSwish"} & set(ops(written(function)))


@pytest.mark.parametrize(
    "function, inner",
    [
        (Net.gelu_tanh, "Tanh"),
        (Net.gelu_tanh, "Pow"),
        (Net.gelu_erf, "Erf"),
        (Net.hardswish, "Clip"),
        (swish_hardsigmoid, "HardSigmoid"),
    ],
)
def test_values_that_are_read_elsewhere_stay(function, inner):
    graph = written(function, inner)
    assert not {"Gelu", "HardSwish"} & set(ops(graph)) and ops(graph)[inner] == 1


def test_input_of_a_function_may_be_read_elsewhere():
    net = Net(["N", 6])
    x = net.gemm("x", 6, 8)
    assert ops(imported(net.model(net.op("Add", x, net.gelu_erf(x))))) == {"Gemm": 1, "Gelu": 1, "Add": 1}


def layernorm(net, x, *, square="Pow", twice=False, axis=-1, epsilon=1e-5, affine=("Mul", "Add")):
    def centred():
        return net.op("Sub", x, net.op("ReduceMean", x, axes=[axis]))

    d = centred()
    e = centred() if twice else d
    squares = net.op("Pow", d, c(net, 2.0)) if square == "Pow" else net.op("Mul", d, d)
    variance = net.op("ReduceMean", squares, axes=[axis])
    y = net.op("Div", e, net.op("Sqrt", net.op("Add", c(net, epsilon), variance)))
    for op in affine:
        y = net.op(op, net.weight(1, 8), y)
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"square": "Mul"},
        {"twice": True},
        {"axis": 2},
        {"epsilon": 0.1},
        {"affine": ()},
        {"affine": ("Mul",)},
        {"affine": ("Add",)},
    ],
)
def test_layernorm_becomes_one_operator(options):
    net = Net(["N", 5, 8])
    graph = imported(net.model(net.op("Relu", layernorm(net, "x", **options))))
    assert ops(graph) == {"LayerNormalization": 1, "Relu": 1}
    assert graph.nodes[0].attrs["epsilon"] == pytest.approx(options.get("epsilon", 1e-5))


@pytest.mark.parametrize(
    "options",
    [{"axis": 1}, {"affine": ("Add", "Mul")}, {"affine": ("Mul", "Mul")}, {"affine": ("Mul", "Add", "Mul", "Add")}],
)
def test_layernorm_with_something_else_behind(options):
    net = Net(["N", 5, 8])
    graph = imported(net.model(net.op("Relu", layernorm(net, "x", **options))))
    assert ops(graph)["LayerNormalization"] == ("axis" not in options)
    assert sum(ops(graph)[op] for op in ("Add", "Mul")) == (1 if "axis" in options else 0) + {
        ("Add", "Mul"): 1,
        ("Mul", "Mul"): 1,
        ("Mul", "Add", "Mul", "Add"): 2,
    }.get(options.get("affine"), 2)


def test_layernorm_with_an_inner_value_read_elsewhere():
    net = Net(["N", 5, 8])
    y = layernorm(net, "x")
    variance = next(n.output[0] for n in net.nodes if n.op_type == "Sqrt")
    divided = next(n.output[0] for n in net.nodes if n.op_type == "Div")
    imported(net.model(y, variance, divided))


def test_variance_of_something_else():
    net = Net(["N", 5, 8])
    d, e = (net.op("Sub", t, net.op("ReduceMean", t, axes=[-1])) for t in ("x", net.op("Abs", "x")))
    variance = net.op("ReduceMean", net.op("Mul", e, e), axes=[-1])
    y = net.op("Div", d, net.op("Sqrt", net.op("Add", variance, c(net, 1e-5))))
    assert "LayerNormalization" not in ops(imported(net.model(y)))


def test_fourth_powers_are_not_a_variance():
    net = Net(["N", 5, 8])
    d = net.op("Sub", "x", net.op("ReduceMean", "x", axes=[-1]))
    fourth = net.op("ReduceMean", net.op("Pow", d, c(net, 4.0)), axes=[-1])
    y = net.op("Div", d, net.op("Sqrt", net.op("Add", fourth, c(net, 1e-5))))
    assert "LayerNormalization" not in ops(imported(net.model(y)))


# ---- MatMul ----------------------------------------------------------------------------------------------------------


def test_matmul_and_add_become_gemm_with_few_reshapes():
    graph = imported(transformer())
    assert [y.op for y in graph.layers] == ["Gemm"] + ["MatMul"] * 3 + ["Gemm"] * 4
    # four for the heads, in and out of the block, around attention
    assert ops(graph)["Reshape"] <= 8 and ops(graph)["Add"] == 2 and ops(graph)["Gelu"] == 1
    graph = imported(written_out())
    assert ops(graph) == {"LayerNormalization": 1, "Gemm": 3, "Gelu": 1, "HardSwish": 1, "Reshape": 2}


@pytest.mark.parametrize(
    "shape, gemm", [(["N", 6], True), (["N", 5, 6], True), ([2, 5, 6], True), (["N", 3, 5, 6], True), (["N", "T", 6], False)]
)
def test_ranks_of_matmul(shape, gemm):
    net = Net(shape)
    y = net.op("Relu", net.linear("x", 6, 9))
    model = net.model(net.linear(y, 9, 4))
    graph = imported(model)
    assert {y.op for y in graph.layers} == {"Gemm" if gemm else "MatMul"}
    assert ops(graph)["Reshape"] == (2 if gemm and len(shape) > 2 else 0)
    x = np.random.default_rng(0).normal(size=[n if isinstance(n, int) else 3 for n in shape]).astype(np.float32)
    assert drift(run(model, {"x": x}), run(graph, {"x": x})) < 1e-4


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 9), (5, 9), (5, 1), (1,), (1, 1, 1, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("rank", [2, 3])
def test_matmul_with_every_bias_shape(shape, rank):
    net = Net([5, 6] if rank == 2 else ["N", 5, 6])
    imported(net.model(net.op("Relu", net.op("Add", net.op("MatMul", "x", net.weight(6, 9)), net.weight(*shape)))))


def test_matmul_read_twice_keeps_its_add():
    net = Net(["N", 5, 6])
    x = net.op("MatMul", "x", net.weight(6, 9))
    graph = imported(net.model(net.op("Mul", net.op("Add", x, net.weight(9)), x)))
    assert [y.op for y in graph.layers] == ["MatMul"]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (1, 1, 9), (5, 1), (5, 9), (1, 1, 1)])
def test_operators_behind_flattened_matmul(op, shape):
    """9 outputs and 5 tokens: constants per output may stay in two dimensions, constants per token may not."""
    net = Net(["N", 5, 6])
    x = net.op("Relu", net.linear("x", 6, 9))
    x = net.op(op, *([x, net.weight(*shape)] if op != "Div" else [net.weight(*shape), net.op("Exp", x)]))
    imported(net.model(net.linear(x, 9, 4)))


@pytest.mark.parametrize("axis", [1, 2])
def test_activations_that_are_broadcast_behind_flattened_matmul(axis):
    net = Net(["N", 5, 6])
    x = net.linear("x", 6, 9)
    x = net.op("Sub", x, net.op("ReduceMean", x, axes=[axis]))
    imported(net.model(net.linear(x, 9, 4)))


def test_square_tokens_and_outputs():
    """As many tokens as outputs: shapes alone do not distinguish them."""
    net = Net(["N", 6, 6])
    x = net.linear("x", 6, 6)
    x = net.op("Add", net.op("Mul", x, net.weight(6, 1)), net.op("Transpose", x, perm=[0, 2, 1]))
    x = net.op("Softmax", net.linear(x, 6, 6), axis=1)
    x = net.op("LayerNormalization", net.linear(x, 6, 6), net.weight(6, 6), net.weight(6, 6), axis=1)
    imported(net.model(net.op("ReduceMean", net.linear(x, 6, 6), axes=[1])))


def test_an_operator_is_no_input():
    graph = load(cnn())
    node = graph.add_node("Relu", "", [graph.layers[0].output])
    for wrong, words in ((node, r"an operator, not one of its outputs"), (1.0, "no tensor .1.0.*add_constant makes one")):
        with pytest.raises(OnnxqError, match=words):
            graph.add_node("Neg", "", [wrong])
        with pytest.raises(OnnxqError, match=words):
            graph.set_input(node, 0, wrong)
