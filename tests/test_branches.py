"""Control flow: a branch that constants decide, layers inside branches, bodies that stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import quantize
from onnxq_plugins.graph import load
from onnxq_plugins.measure import drift
from onnxq_plugins.testing.exact import exact_session
from tests.zoo import Net, run

FLOAT = TensorProto.FLOAT


def branch(name, seed, op="Relu"):
    """h -> Gemm -> op -> Gemm, with constants of its own and a bias from outside."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Gemm", ["h", "w", "bias"], ["a"], "up"),
        helper.make_node(op, ["a"], ["r"], "middle"),
        helper.make_node("Gemm", ["r", "v"], [f"{name}_y"], "down"),
    ]
    weights = [("w", (32, 48)), ("v", (48, 16))]
    constants = [numpy_helper.from_array((rng.normal(size=s) / 6).astype(np.float32), n) for n, s in weights]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_y", FLOAT, None)], constants)


def branching(condition=None):
    """Two branches with two layers each between two layers; `condition` decides at export, else the sign of the mean."""
    net = Net(["N", 32])
    h = net.linear("x", 32, 32, bias=False)
    net.nodes[-1].output[0] = "h"
    assert h != "h"
    net.constants.append(numpy_helper.from_array(np.ones(48, np.float32) / 4, "bias"))
    if condition is None:
        decided = net.op("Greater", net.op("ReduceMean", "x", keepdims=0), net.constant(0.0))
    else:
        decided = net.constant(condition, bool)
    y = net.op("If", decided, then_branch=branch("yes", 1), else_branch=branch("no", 2, "Tanh"))
    net.nodes[-1].name = "choice"
    output = net.linear(y, 16, 5, bias=False)
    graph = helper.make_graph(
        net.nodes, "g", [net.input], [helper.make_tensor_value_info(output, FLOAT, ["N", 5])], net.constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count, seed=0, only_positive=False):
    rng = np.random.default_rng(seed)
    feeds = [{"x": rng.normal(size=(3, 32)).astype(np.float32)} for _ in range(count)]
    return [{"x": np.abs(f["x"])} for f in feeds] if only_positive else feeds


@pytest.mark.parametrize("condition, middle", [(True, "Relu"), (False, "Tanh")])
def test_a_branch_that_a_constant_decides_is_part_of_the_graph(condition, middle):
    model = branching(condition)
    graph = load(model)
    ops = [node.op for node in graph.nodes]
    assert len(graph.layers) == 4 and "If" not in ops and middle in ops
    feed = samples(1)[0]
    assert drift(run(model, feed), run(graph, feed)) < 1e-5


@pytest.mark.parametrize("recipe", ["int8", "int4-storage"])
def test_layers_inside_branches_are_quantized(recipe):
    model = branching()
    result = quantize(model, recipe, samples(24), workers=1)
    assert len(result.report.layers) == 6 and all("why_float" not in row for row in result.report.layers)
    assert {row.get("inside", "") for row in result.report.layers} == {
        "",
        "the then branch of If 'choice'",
        "the else branch of If 'choice'",
    }
    assert result.model.ByteSize() < 0.55 * model.ByteSize()
    onnx.checker.check_model(result.model, full_check=True)
    for feed in samples(6, seed=1):
        exact = run(model, feed)
        assert drift(exact, run(result.model, feed, False)) < 0.15
        assert drift(exact, exact_session(result.model).run(None, feed)) < 0.15


def test_a_branch_that_no_sample_takes_computes_float_and_is_named():
    model = branching()
    result = quantize(model, "int8", samples(16, only_positive=True), workers=1)
    assert any("no sample takes the else branch of If 'choice'" in note for note in result.report["notes"])
    assert result.model.ByteSize() < 0.55 * model.ByteSize()  # its weights are stored in 8 bits all the same
    assert result.report.bits_per_weight < 11
    for feed in samples(4, seed=1, only_positive=True):
        assert drift(run(model, feed), exact_session(result.model).run(None, feed)) < 0.15
    assert np.isfinite(exact_session(result.model).run(None, {"x": -samples(1)[0]["x"]})[0]).all()


def test_bodies_within_a_branch_read_what_was_renamed_around_them():
    """Both branches name their tensors alike; an inner If reads one of them."""

    def body(name, op, read):
        node = helper.make_node(op, [read], [f"{name}_z"], f"{name}_inner")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_z", FLOAT, None)])

    model = branching()
    choice = next(n for n in model.graph.node if n.op_type == "If")
    for attribute in choice.attribute:
        sides = {"then_branch": body("a", "Relu", "r"), "else_branch": body("b", "Neg", "r")}
        inner = helper.make_node("If", ["sure"], ["q"], f"{attribute.name}_within", **sides)
        nodes = [helper.make_node("Identity", ["flag"], ["sure"]), *attribute.g.node[:2], inner, attribute.g.node[2]]
        nodes[-1].input[0] = "q"
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del attribute.g.node[:]
        attribute.g.node.extend(copies)
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    feeds = [{**feed, "flag": np.array(n % 2 == 0)} for n, feed in enumerate(samples(24))]
    result = quantize(model, "int8", feeds, workers=1)
    assert {row.get("inside") for row in result.report.layers} >= {"the then branch of If 'choice'"}
    for feed in feeds[:4]:
        assert drift(run(model, feed), exact_session(result.model).run(None, feed)) < 0.15


def test_what_is_said_of_a_branch_is_said_of_the_model():
    model = branching()
    result = quantize(model, "int8", samples(24), workers=1, min_sqnr=60, keep=True)
    assert any(note.startswith("the then branch of If 'choice': 8 bits leave") for note in result.report.notes)


def test_loops_survive_with_what_they_read_from_outside():
    """A Loop whose body multiplies by a weight from outside and has a constant of its own, and holds another body."""
    net = Net(["N", 16])
    x = net.op("Relu", net.gemm("x", 16, 16))
    shared = net.weight(16, 16, fan_in=16)
    inner = [
        helper.make_graph(
            [helper.make_node(op, ["m"], [f"{op}_y"])], op, [], [helper.make_tensor_value_info(f"{op}_y", FLOAT, None)]
        )
        for op in ("Relu", "Neg")
    ]
    own = numpy_helper.from_array((np.random.default_rng(1).normal(size=(16, 16)) / 4).astype(np.float32), "own")
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", shared], ["s"]),
            helper.make_node("MatMul", ["s", "own"], ["m"]),
            helper.make_node("If", ["go"], ["next"], then_branch=inner[0], else_branch=inner[1]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, ["N", 16]),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", FLOAT, ["N", 16])],
        [own],
    )
    y = net.op("Loop", net.constant(3, np.int64), net.constant(True, bool), x, body=body)
    model = net.model(net.gemm(y, 16, 4))
    data = [{"x": np.random.default_rng(i).normal(size=(2, 16)).astype(np.float32)} for i in range(8)]
    graph = load(model)
    assert drift(run(model, data[0]), run(graph, data[0])) < 1e-5
    for recipe in ("int8", "int8-rounded"):
        result = quantize(model, recipe, data, workers=1)
        assert drift(run(model, data[0]), exact_session(result.model).run(None, data[0])) < 0.2


def test_half_precision_bodies_are_converted():
    model = branching()
    half = onnx.ModelProto()
    half.CopyFrom(model)

    def narrow(graph):
        for tensor in graph.initializer:
            if tensor.data_type == FLOAT:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == FLOAT:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        for body in (a.g for node in graph.node for a in node.attribute if a.HasField("g")):
            narrow(body)

    narrow(half.graph)
    converted = load(half, float32=True)
    feed = samples(1)[0]
    assert drift(run(model, feed), run(converted, feed)) < 1e-2
