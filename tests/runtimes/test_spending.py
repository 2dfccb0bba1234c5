"""Where the time of a run goes: classes add up to it, conversions are counted and told whose they are. No test looks at a
clock."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from onnxq_plugins import audit_model, quantize
from onnxq_plugins.runtimes import onnxruntime
from onnxq_plugins.runtimes.onnxruntime import QUANTIZED
from onnxq_plugins.runtimes.profiles import Profile, profile
from onnxq_plugins.runtimes.spending import CONVERSIONS, LAYERS, OUTSIDE, Spending, class_of, classes
from tests.zoo import cnn, examples, feeds, mlp, mobilenet, prelu, transformer

OPS = (
    "Conv",
    "FusedConv",
    "QLinearConv",
    "QuantizeLinear",
    "DequantizeLinear",
    "Transpose",
    "ReorderInput",
    "Cast",
    "PRelu",
)
OPS += ("MaxPool", "Add", "LayerNormalization", "LSTM", "Resize", "NoSuchOperator")


def chain(ops: list[str], integers: frozenset[str] = frozenset()) -> tuple[onnx.GraphProto, list[str]]:
    """Operators in a row, and the types of their inputs."""
    nodes = [helper.make_node(op, [f"t{n}"], [f"t{n + 1}"], name=f"n{n}") for n, op in enumerate(ops)]
    types = [json.dumps([{"uint8" if op in integers else "float": [1]}]) for op in ops]
    return onnx.GraphProto(node=nodes), types


@given(
    st.lists(st.tuples(st.sampled_from(OPS), st.floats(0, 10) | st.just(float("nan"))), max_size=30), st.floats(0.01, 200)
)
@examples(60)
def test_classes_add_up_to_the_run(kernels, whole):
    graph, types = chain([op for op, _ in kernels])
    nodes = np.array([time for _, time in kernels], np.float64)
    found = Spending.of(Profile(whole, graph, nodes, types))
    assert found.microseconds == pytest.approx(1e3 * whole)
    assert sum(row.microseconds for row in found.rows) == pytest.approx(found.microseconds, rel=1e-6)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert sum(row.count for row in found.rows) == np.sum(~np.isnan(nodes)) == len(found.nodes)
    assert all(sum(row.ops.values()) == row.count and {class_of(op) for op in row.ops} <= {row.name} for row in found.rows)
    assert found.rows[-1].name == OUTSIDE
    times = [row.microseconds for row in found.rows[:-1]]
    assert times == sorted(times, reverse=True)
    assert json.loads(json.dumps(found.to_dict()))["conversions"]["kernels"] == found.conversions.count


def test_what_only_converts_is_a_conversion():
    ops = ["QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "Transpose", "Cast", "Identity"]
    assert {class_of(op) for op in ops} == set(CONVERSIONS)
    assert class_of("Conv") == class_of("FusedConv") == "Conv" and class_of("Shape") == "the rest"
    assert {class_of(op) for op in QUANTIZED - {"int8"}} <= set(LAYERS)
    graph, types = chain(["QuantizeLinear", "QLinearConv", "Transpose"])
    text = Spending.of(Profile(1.0, graph, np.array([0.1, 0.7, 0.2]), types)).text
    assert text == "2 conversions (1 Transpose, 1 QuantizeLinear) take 30% of the time"


def test_conversions_belong_to_the_float_operators_between_them():
    ops = [
        "QLinearConv",
        "DequantizeLinear",
        "Transpose",
        "PRelu",
        "QuantizeLinear",
        "QLinearConv",
        "DequantizeLinear",
        "PRelu",
    ]
    graph, types = chain([*ops, "Transpose"], frozenset({"QLinearConv", "DequantizeLinear"}))
    nodes = np.array([9, 1, 2, 9, 4, 9, 8, 9, 16], np.float64)
    (around,) = Spending.of(Profile(67.0, graph, nodes, types)).borders
    assert (around.op, around.count, around.conversions) == ("PRelu", 2, 4)  # a layout alone is no border
    assert around.microseconds == pytest.approx(1e3 * (1 + 2 + 4 + 8))


def test_a_network_without_a_float_operator_has_no_borders():
    graph, types = chain(
        ["QuantizeLinear", "QLinearConv", "MaxPool", "DequantizeLinear"], frozenset({"QLinearConv", "MaxPool"})
    )
    assert Spending.of(Profile(4.0, graph, np.ones(4), types)).borders == ()


@pytest.mark.parametrize("make", [cnn, mobilenet, mlp, transformer, prelu])
def test_an_audit_profiles_both_models(make):
    model = make()
    result = quantize(model, "int8", feeds(model, 6), workers=1, check=False, settings=["placement.check=false"])
    audit = audit_model(result.model, model, 0.0, data=feeds(model, 1))
    before, after = audit.spending
    integer = sum(row.count for row in after.rows if row.name in QUANTIZED)
    assert integer == sum(layer.quantized for layer in audit.layers) and integer
    assert not any(row.name in QUANTIZED for row in before.rows) and before.layers.count
    assert audit.speed is not None and audit.speedup == audit.speed.ratio and len(audit.milliseconds) == 2
    assert {audit.nodes[layer.name] for layer in audit.layers} <= set(after.nodes)
    assert classes(audit.spending)[-1] == OUTSIDE and audit.timed.startswith(model.graph.input[0].name)
    assert audit.placed is None and audit_model(model, model, 0.0, data=feeds(model, 1)).placed is False


CONTROL_FLOW = """<ir_version: 8, opset_import: ["": 17]>
flow (float[64, 64] x) => (float[64, 64] y) {
    zero = Constant <value = float {0}> ()
    yes = Constant <value = bool {1}> ()
    trips = Constant <value = int64 {3}> ()
    sum = ReduceSum <keepdims = 0> (x)
    first = Greater (sum, zero)
    second = LessOrEqual (sum, zero)
    a = If (first) <
        then_branch = one () => (float[64, 64] p) { q = Exp (x) p = MatMul (q, q) },
        else_branch = two () => (float[64, 64] r) { s = Exp (x) r = MatMul (s, x) }
    >
    b = If (second) <
        then_branch = three () => (float[64, 64] t) { u = Exp (a) t = MatMul (a, u) },
        else_branch = four () => (float[64, 64] v) { w = Exp (a) v = MatMul (w, w) }
    >
    y = Loop (trips, yes, b) <
        body = five (int64 n, bool c, float[64, 64] d) => (bool e, float[64, 64] f) { e = Identity (c) f = MatMul (d, d) }
    >
}"""


def test_kernels_in_bodies_of_control_flow_are_told():
    """Nodes without names, with the same numbers in several bodies: those that run have a time, others none."""
    model = onnx.parser.parse_model(CONTROL_FLOW)
    (spending,) = audit_model(model, seconds=0.0, data=feeds(model, 1)).spending
    ran = {op: count for row in spending.rows for op, count in row.ops.items()}
    expected = {"ReduceSum": 1, "If": 2, "Exp": 2, "MatMul": 3, "Loop": 1}
    assert {op: ran.get(op) for op in expected} == expected


def test_a_model_alone_is_profiled_too_and_nothing_without_a_wish():
    model = cnn()
    audit = audit_model(model, seconds=0.0, data=feeds(model, 1))
    assert len(audit.spending) == len(audit.milliseconds) == 1 and audit.speed is None
    assert audit_model(model).spending == ()


def test_long_networks_run_a_few_times_only(monkeypatch):
    model, feed = mlp(), feeds(mlp(), 1)[0]
    assert profile([model], feed, 0.0)[1] == 9
    assert profile([model], feed, 0.0, brief=True)[1] == 1
    seen = []
    monkeypatch.setattr(onnxruntime, "profile", lambda *args, **more: seen.append(more["brief"]) or profile(*args, **more))
    audit_model(model, model, 0.0, data=[feed])
    assert seen == [True]
