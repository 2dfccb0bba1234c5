"""What onnxruntime loads is imported whole: every way to write a model, and all that it holds beside its function."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import quantize
from onnxq_plugins.graph import load
from onnxq_plugins.measure import drift
from onnxq_plugins.testing.exact import exact_session
from tests.zoo import Net, cnn, feeds, run

FLOAT = TensorProto.FLOAT


def info(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def imported(model, samples=None):
    """The graph, after checking that it computes what the model does."""
    graph = load(model)
    for feed in feeds(model, 2) if samples is None else samples:
        assert drift(run(model, feed, False), run(graph, feed, False)) < 1e-4
        assert drift(run(model, feed), run(graph, feed)) < 1e-4
    return graph


def two_convs(middle, constants=(), opset=17, **parts):
    """Conv, the operators of `middle` from "c" to "r", Conv."""
    net = Net(["N", 3, 8, 8])
    nodes = [
        helper.make_node("Conv", ["x", net.weight(8, 3, 3, 3, fan_in=27)], ["c"], "first", pads=[1] * 4),
        *middle,
        helper.make_node("Conv", ["r", net.weight(4, 8, 1, 1, fan_in=8)], ["y"], "second"),
    ]
    ports = [net.input, *parts.pop("inputs", ())]
    outputs = [info("y", ["N", 4, 8, 8]), *parts.pop("outputs", ())]
    graph = helper.make_graph(nodes, "g", ports, outputs, [*net.constants, *constants])
    domains = [helper.make_opsetid(d, 1) for d in parts.pop("domains", ())]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), *domains], ir_version=8, **parts)


def constant(form):
    """Operators that multiply "c" by a Constant in one of its forms, to "r"."""
    values = np.linspace(0.5, 1.5, 8).astype(np.float32)
    shape = helper.make_node("Constant", [], ["s"], value_ints=[1, 8, 1, 1])
    scale = [helper.make_node("Reshape", ["k0", "s"], ["k"]), helper.make_node("Mul", ["c", "k"], ["r"])]
    if form == "value_float":
        return [helper.make_node("Constant", [], ["k"], value_float=0.5), helper.make_node("Mul", ["c", "k"], ["r"])]
    if form == "value_floats":
        return [shape, helper.make_node("Constant", [], ["k0"], value_floats=values.tolist()), *scale]
    if form == "value_int":
        axis = helper.make_node("Constant", [], ["a"], value_int=3)
        return [axis, helper.make_node("CumSum", ["c", "a"], ["r"])]
    if form == "bounds":
        ends = [helper.make_node("Constant", [], [n], value_float=v) for n, v in (("lo", 0.0), ("hi", 6.0))]
        return [*ends, helper.make_node("Clip", ["c", "lo", "hi"], ["r"])]
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(values[[1, 6]], "k0"), numpy_helper.from_array(np.array([1, 6]), "places"), [8]
    )
    return [shape, helper.make_node("Constant", [], ["k0"], sparse_value=sparse), *scale]


@pytest.mark.parametrize("form", ["value_float", "value_floats", "value_int", "bounds", "sparse_value"])
def test_constants_in_every_form(form):
    model = two_convs(constant(form))
    graph = load(model)
    assert len(graph.layers) == 2 and not any(node.op == "Constant" for node in graph.nodes)
    if form != "sparse_value":  # which onnxruntime takes in fewer places
        imported(model)
        return
    expected = np.zeros((8, 1, 1, 1))
    expected[[1, 6], 0, 0, 0] = np.linspace(0.5, 1.5, 8)[[1, 6]]
    weight = numpy_helper.to_array(model.graph.initializer[0])
    np.testing.assert_allclose(graph.constant(graph.layers[0].weight), weight * expected, rtol=1e-6)


def test_text_travels_through():
    names = helper.make_tensor("names", TensorProto.STRING, [4], [b"a", b"b", b"c", b"\xc3\xa9"])
    middle = [
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Constant", [], ["unit"], value_string="metres"),
        helper.make_node("Identity", ["unit"], ["of"]),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["names", "best"], ["label"]),
    ]
    outputs = [info("label", None, TensorProto.STRING), info("of", [], TensorProto.STRING)]
    model = two_convs(middle, [names], outputs=outputs)
    del model.graph.node[-1]
    model.graph.node.insert(2, helper.make_node("Conv", ["r", model.graph.initializer[1].name], ["y"], "second"))
    result = quantize(model, "int8", feeds(model, 8), workers=1)
    feed = feeds(model, 1, seed=3)[0]
    before, after = run(model, feed, False), run(result.model, feed, False)
    assert after[2] == before[2] == "metres" and (np.asarray(before[1]) == np.asarray(after[1])).mean() > 0.9


def test_local_functions_are_inlined():
    body = [helper.make_node("Conv", ["X", "W"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["Y"])]
    for opset in (17, 21):
        block = helper.make_function("my.domain", "Block", ["X", "W"], ["Y"], body, [helper.make_opsetid("", opset)])
        model = two_convs(
            [helper.make_node("Block", ["c", "w"], ["r"], domain="my.domain")],
            [numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype(np.float32), "w")],
            opset,
            domains=["my.domain"],
            functions=[block],
        )
        graph = imported(model)
        assert len(graph.layers) == 3 and not graph.model().functions


def test_order_and_domain_do_not_matter():
    model = cnn()
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(model.graph.node)]
    for node in nodes:
        node.domain = "ai.onnx"
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    shuffled.opset_import[0].domain = "ai.onnx"
    feed = feeds(model, 1)[0]
    assert drift(run(model, feed), run(load(shuffled), feed)) == 0
    assert len(load(shuffled).layers) == 3


def test_an_input_with_a_default_stays_one():
    gain = numpy_helper.from_array(np.array([2.0], np.float32), "gain")
    middle = [helper.make_node("Mul", ["c", "gain"], ["r"])]
    model = two_convs(middle, [gain], inputs=[info("gain", [1])])
    samples = [{"x": feed["x"]} for feed in feeds(model, 8)]
    result = quantize(model, "int8", samples, workers=1)
    assert [i.name for i in result.model.graph.input] == ["x", "gain"] and len(result.report.layers) == 2
    session = exact_session(result.model)
    plain, louder = (session.run(None, {**samples[0], **more})[0] for more in ({}, {"gain": np.array([3.0], np.float32)}))
    assert not np.array_equal(plain, louder)


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniformLike", "Bernoulli"])
def test_chance_is_not_folded(op):
    shape = numpy_helper.from_array(np.array([1, 8, 8, 8]), "shape")
    half = helper.make_tensor("v", FLOAT, [1], [0.5])
    source = [] if op == "RandomNormal" else [helper.make_node("ConstantOfShape", ["shape"], ["z0"], value=half)]
    attrs = {"shape": [1, 8, 8, 8]} if op == "RandomNormal" else {}
    middle = [
        *source,
        helper.make_node(op, ["z0"] * bool(source), ["z"], **attrs),
        helper.make_node("Add", ["c", "z"], ["r"]),
    ]
    model = two_convs(middle, [shape] * bool(source))
    session, feed = exact_session(load(model).model()), feeds(model, 1)[0]
    assert not np.array_equal(session.run(None, feed)[0], session.run(None, feed)[0])


def test_what_grows_is_not_folded():
    shape, tiles = (
        numpy_helper.from_array(np.array(v), n) for n, v in (("shape", [1, 8, 512, 512]), ("tiles", [1, 1, 2, 2]))
    )
    small = numpy_helper.from_array(np.array([1, 8, 1, 1]), "small")
    middle = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Tile", ["zeros", "tiles"], ["more"]),
        helper.make_node("ReduceMax", ["more"], ["top"], keepdims=0),
        helper.make_node("ConstantOfShape", ["small"], ["few"]),
        helper.make_node("Add", ["c", "few"], ["d"]),
        helper.make_node("Add", ["d", "top"], ["r"]),
    ]
    model = two_convs(middle, [shape, tiles, small])
    graph = imported(model)
    assert [n.op for n in graph.nodes if n.op in ("ConstantOfShape", "Tile")] == ["ConstantOfShape", "Tile"]
    assert graph.model().ByteSize() < 20_000


@pytest.mark.parametrize("op, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("left_out", [["", "h"], ["", "h", ""]])
def test_outputs_that_are_left_out(op, gates, left_out):
    if op != "LSTM" and len(left_out) > 2:
        return
    net = Net(["T", "B", 12])
    x = net.op("MatMul", "x", net.weight(12, 16, fan_in=12))
    inputs = [x, net.weight(1, gates * 16, 16, fan_in=16), net.weight(1, gates * 16, 16, fan_in=16)]
    net.nodes.append(helper.make_node(op, inputs, left_out, "recurrent", hidden_size=16))
    last = net.op("Squeeze", "h", net.constant([0], np.int64))
    model = net.model(net.linear(last, 16, 5))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(10, 1, 12)).astype(np.float32)} for _ in range(8)]
    imported(model, samples[:2])
    for recipe in ("int8", "int8-rounded", "int4-storage"):
        result = quantize(model, recipe, samples, workers=1)
        assert drift(run(model, samples[0]), exact_session(result.model).run(None, samples[0])) < 0.2, recipe


@pytest.mark.parametrize("recipe", ["int8", "int8-rounded", "int4-storage", "mixed"])
def test_single_numbers_stay_single_numbers(recipe):
    """The head of torch's exports: the batch size is read, a scalar, and put in front of the channels."""
    net = Net(["N", 3, 8, 8])
    x = net.op("GlobalAveragePool", net.op("Relu", net.conv("x", 3, 16)))
    size = net.op("Gather", net.op("Shape", x), net.constant(0, np.int64))
    shape = net.op("Concat", net.op("Unsqueeze", size, net.constant([0], np.int64)), net.constant([-1], np.int64), axis=0)
    gain = net.op("Mul", net.op("Reshape", x, shape), net.constant(0.7))
    model = net.model(net.gemm(gain, 16, 5))
    result = quantize(model, recipe, feeds(model, 16), workers=1)
    feed = feeds(model, 1, seed=2)[0]
    assert drift(run(model, feed), exact_session(result.model).run(None, feed)) < 0.2


def test_tensors_of_unknown_rank():
    """An operator that onnx does not know, a sequence, and an If whose branches differ in rank, each in front of layers."""
    axes = numpy_helper.from_array(np.array([1]), "axes")
    then = helper.make_graph([helper.make_node("Squeeze", ["u", "axes"], ["t"])], "then", [], [info("t", None)])
    other = helper.make_graph([helper.make_node("Identity", ["u"], ["e"])], "else", [], [info("e", None)])
    one = numpy_helper.from_array(np.array(1), "one")
    middles = {
        "contrib": [helper.make_node("QuickGelu", ["c"], ["r"], domain="com.microsoft", alpha=1.7)],
        "sequence": [
            helper.make_node("SequenceConstruct", ["c"], ["s"]),
            helper.make_node("ConcatFromSequence", ["s"], ["r"], axis=1),
        ],
        "branches": [
            helper.make_node("Unsqueeze", ["c", "axes"], ["u"]),
            helper.make_node("Shape", ["u"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "one"], ["size"]),
            helper.make_node("Equal", ["size", "one"], ["condition"]),
            helper.make_node("If", ["condition"], ["r"], then_branch=then, else_branch=other),
        ],
    }
    for name, middle in middles.items():
        model = two_convs(middle, [axes, one], domains=["com.microsoft"])
        result = quantize(model, "int8", feeds(model, 8), workers=1)
        assert all(row.get("why_float") is None for row in result.report.layers), name
        feed = feeds(model, 1, seed=1)[0]
        assert drift(run(model, feed), exact_session(result.model).run(None, feed)) < 0.1, name


def test_nothing_beside_the_function_is_lost():
    model = cnn()
    model.graph.value_info.extend([info("t0", ["N", 8, 12, 12])])
    for place in (model, model.graph, model.graph.input[0], model.graph.output[0], *model.graph.node):
        entry = place.metadata_props.add()
        entry.key, entry.value = "source", "line 1"
    model.graph.input[0].doc_string, model.graph.output[0].doc_string = "pixels", "logits"
    result = quantize(model, "int8", feeds(model, 8), workers=1, names="keep").model
    assert result.graph.input[0] == model.graph.input[0] and result.graph.output[0] == model.graph.output[0]
    assert any(p.key == "source" for p in result.metadata_props) and result.graph.metadata_props[0].value == "line 1"
    assert all(n.metadata_props for n in result.graph.node if n.name in {node.name for node in model.graph.node})
    assert [v.name for v in result.graph.value_info] == ["t0"]


def test_outputs_that_are_no_tensors():
    net = Net(["N", 8])
    scores = net.op("Softmax", net.gemm("x", 8, 3), axis=1)
    maps = helper.make_node("ZipMap", [scores], ["maps"], "zip", domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    pair = helper.make_node("SequenceConstruct", [scores, scores], ["pair"], "pair")
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, None))
    outputs = [
        helper.make_value_info("maps", helper.make_sequence_type_proto(kind)),
        helper.make_tensor_sequence_value_info("pair", FLOAT, None),
    ]
    graph = helper.make_graph([*net.nodes, maps, pair], "g", [net.input], outputs, net.constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    result = quantize(model, "int8", feeds(model, 8), workers=1).model
    assert [o.type for o in result.graph.output] == [o.type for o in model.graph.output]
    feed = feeds(model, 1)[0]
    before, after = run(model, feed), run(result, feed)
    assert before[0][0].keys() == after[0][0].keys() and len(after[1]) == 2


def test_double_precision_passes_through_or_is_converted():
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=s), n) for n, s in (("w", (8, 16)), ("v", (16, 4)))]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "v"], ["y"]),
    ]
    ports = [info("x", ["N", 8], TensorProto.DOUBLE)], [info("y", ["N", 4], TensorProto.DOUBLE)]
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ports, weights), opset_imports=opsets, ir_version=8)
    samples = [{"x": rng.normal(size=(1, 8))} for _ in range(8)]
    kept = quantize(model, "int8", samples, workers=1)
    assert drift(run(model, samples[0]), run(kept.model, samples[0])) < 0.05
    single = [{"x": feed["x"].astype(np.float32)} for feed in samples]
    converted = quantize(model, "int8", single, float32=True, workers=1)
    assert all("why_float" not in row for row in converted.report.layers) and len(converted.report.layers) == 2


def test_shared_float_weights_are_shared_again():
    net = Net(["N", 64])
    weight, x = net.weight(64, 64, fan_in=64), "x"
    for _ in range(4):
        x = net.op("Relu", net.op("MatMul", x, weight))
    model = net.model(x)
    recipe = {"pass": [{"use": "ranges"}], "layer": [{"match": "*", "quantize": False}]}
    assert quantize(model, recipe, feeds(model, 8), workers=1).model.ByteSize() < 1.2 * model.ByteSize()


@pytest.mark.parametrize("recipe", ["int8", "int8-rounded", "int4-storage", "mixed"])
def test_inputs_without_a_batch_axis(recipe):
    net = Net([24])
    model = net.model(net.linear(net.op("Elu", net.linear("x", 24, 32)), 32, 6))
    result = quantize(model, recipe, feeds(model, 24), workers=1)
    feed = feeds(model, 1, seed=3)[0]
    assert drift(run(model, feed), exact_session(result.model).run(None, feed)) < 0.25


@pytest.mark.parametrize("recipe", ["int8", "int8-rounded"])
def test_values_that_are_infinite_in_the_float_model_stay_float(recipe):
    """A mask of -inf in front of a Softmax, which another layer reads as well."""
    net = Net(["N", 6, 16])
    scores = net.linear("x", 16, 16)
    masked = net.op("Where", net.op("Greater", scores, net.constant(0.0)), scores, net.constant(-np.inf))
    outputs = net.linear(net.op("Softmax", masked, axis=-1), 16, 8), net.op("MatMul", masked, net.weight(16, 4))
    model = net.model(*outputs)
    result = quantize(model, recipe, feeds(model, 16), workers=1)
    kinds = [row.get("why_float_kind") for row in result.report.layers]
    assert kinds.count("not-finite") == 1 and kinds.count(None) == 2
    assert any("NaN or infinite on these samples" in note for note in result.report["notes"])
    feed = feeds(model, 1, seed=2)[0]
    assert drift(run(model, feed)[:1], exact_session(result.model).run(None, feed)[:1]) < 0.2


def test_folding_does_not_let_onnxruntime_log(capfd):
    """The session that folds this Unsqueeze would warn that it cannot remove it."""
    constants = [numpy_helper.from_array(np.ones(3, np.float32), "c"), numpy_helper.from_array(np.array([0]), "axes")]
    nodes = [helper.make_node("Unsqueeze", ["c", "axes"], ["u"], "u"), helper.make_node("Add", ["x", "u"], ["y"], "add")]
    graph = helper.make_graph(nodes, "g", [info("x", [2, 3])], [info("y", [2, 3])], constants)
    usual = ort.InferenceSession
    assert [node.op for node in load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])).nodes] == ["Add"]
    assert capfd.readouterr().err == "" and ort.InferenceSession is usual
