"""Weights outside layers: stored as codes, decoded at load or row by row, and counted where they stay float."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes
from onnxq_plugins.job import Recipe
from onnxq_plugins.measure import sqnr
from onnxq_plugins.plan.requests import request
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes
from tests.networks import feed_of, network, weight

F, D, INT = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
HEAD = ("MatMul", ["h", "head"], ["y"], {})


def recurrent(op, gates, directions=1):
    attrs = {"hidden_size": 16} | ({"direction": "bidirectional"} if directions == 2 else {})
    shapes = {"w": (directions, gates * 16, 24), "r": (directions, gates * 16, 16), "head": (16, 5)}
    return network([(op, ["x", "w", "r"], ["h"], attrs), HEAD], [7, 1, 24], shapes)


def table(readers=1, kind=np.float32):
    nodes = [("Gather", ["t", "x"], [f"r{i}"], {}) for i in range(readers)]
    nodes += [("Add", ["r0", "r1"], ["y"], {})] if readers == 2 else [("Identity", ["r0"], ["y"], {})]
    output = F if kind == np.float32 else D
    return network(nodes, ["n", 3], {"t": weight((64, 32)).astype(kind)}, INT, output_kind=output)


# name -> (model, the operator that holds the weights)
MODELS = {
    "LSTM": (lambda: recurrent("LSTM", 4), "LSTM"),
    "GRU": (lambda: recurrent("GRU", 3, 2), "GRU"),
    "RNN": (lambda: recurrent("RNN", 1), "RNN"),
    "table": (table, "Gather"),
    "shared table": (lambda: table(2), "Gather"),
    "double table": (lambda: table(kind=np.float64), "Gather"),
    "batched": (lambda: network([("MatMul", ["x", "w"], ["y"], {})], [3, 5, 24], {"w": (3, 24, 24)}), "MatMul"),
    "first": (lambda: network([("MatMul", ["w", "x"], ["y"], {})], [24, 5], {"w": (32, 24)}), "MatMul"),
    "first Gemm": (lambda: network([("Gemm", ["w", "x"], ["y"], {})], [24, 5], {"w": (32, 24)}), "Gemm"),
    "einsum": (
        lambda: network([("Einsum", ["x", "w"], ["y"], {"equation": "gbd,gde->gbe"})], [2, 5, 24], {"w": (2, 24, 24)}),
        "Einsum",
    ),
    "double": (
        lambda: network(
            [("MatMul", ["x", "w"], ["y"], {})], [5, 24], {"w": weight((24, 24)).astype(float)}, D, output_kind=D
        ),
        "MatMul",
    ),
    "transposed": (
        lambda: network([("ConvTranspose", ["x", "w"], ["y"], {"group": 2})], [1, 16, 5, 5], {"w": (16, 8, 3, 3)}),
        "ConvTranspose",
    ),
}


def quantized(model, recipe="int8", **options):
    return onnxq.quantize(model, recipe, [feed_of(model, i) for i in range(4)], workers=1, **options)


def ran(model, feed, optimize=True):
    return np.asarray(runtimes.session(model, optimize=optimize).run(None, feed)[0], float)


def sizes(model):
    return {t.name: numpy_helper.to_array(t).nbytes for t in model.graph.initializer}


@pytest.mark.parametrize("name", MODELS)
def test_weights_outside_layers_are_stored_in_8_bits_and_compute_float(name):
    make, op = MODELS[name]
    model = make()
    result, feed = quantized(model), feed_of(model, 9)
    floats, codes = sum(sizes(model).values()), sum(sizes(result.model).values())
    assert codes < 0.4 * floats
    assert sqnr(ran(model, feed), own := ran(result.model, feed)) > 30
    assert sqnr(own, ran(result.model, feed, optimize=False)) > 80
    assert f"{op} " in result.summary and "8 bits" in result.summary and "float:" not in result.summary
    assert result.report.bits_per_weight < 12


@pytest.mark.parametrize("op", ["LSTM", "table"])
def test_weights_are_those_of_the_plan(op):
    model = MODELS[op][0]()
    result, feed = quantized(model), feed_of(model, 9)
    stored = {name: spec for name, spec in result.plan.items() if name in ("w", "r", "t")}
    assert stored and all(spec.solved and spec.codes is not None for spec in stored.values())
    rounded = type(model)()
    rounded.CopyFrom(model)
    for tensor in rounded.graph.initializer:
        if tensor.name in stored:
            spec = stored[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array((spec.codes * spec.scale).astype(np.float32), tensor.name))
    if op == "table":
        np.testing.assert_array_equal(ran(rounded, feed), ran(result.model, feed))
    else:
        assert sqnr(ran(rounded, feed), ran(result.model, feed)) > 30  # the head is quantized


def test_a_shared_table_is_stored_once_and_never_float():
    result = quantized(table(2))
    held = [size for size in sizes(result.model).values() if size > 256]
    assert held == [64 * 32]


def test_a_head_that_shares_the_table_has_its_codes_too():
    nodes = [
        ("Gather", ["t", "x"], ["e"], {}),
        ("Relu", ["e"], ["h"], {}),
        ("Transpose", ["t"], ["head"], {"perm": [1, 0]}),
        HEAD,
    ]
    model = network(nodes, ["n", 3], {"t": (64, 48)}, INT)
    result, feed = quantized(model), feed_of(model, 9)
    assert [size for size in sizes(result.model).values() if size > 256] == [64 * 48]
    assert "1/1 MatMul as MatMulIntegerToFloat" in result.summary
    assert sqnr(ran(model, feed), ran(result.model, feed, optimize=False)) > 30


def test_rules_of_the_recipe_reach_them():
    model, feed = recurrent("LSTM", 4), feed_of(recurrent("LSTM", 4), 9)
    float_, narrow = (
        quantized(model, {"target": "ort-cpu", "layer": [rule]})
        for rule in ({"match": "lstm_0", "quantize": False}, {"op": "LSTM", "weights": {"bits": 4}})
    )
    assert "1 LSTM" in float_.summary and "stays float" in float_.summary and float_.report.floats["lstm_0"].kind == "recipe"
    assert "1 LSTM stored in 4 bits" in narrow.summary and sqnr(ran(model, feed), ran(narrow.model, feed)) > 10
    with pytest.raises(onnxq.OnnxqError, match="nothing matches 'gru_0'"):
        quantized(model, {"target": "ort-cpu", "layer": [{"match": "gru_0", "quantize": False}]})


def offsets(values):
    return network(
        [("MatMul", ["x", "w"], ["h"], {}), ("Add", ["h", "o"], ["y"], {})], [8, 32], {"w": (32, 32), "o": values}
    )


def test_operands_that_may_need_every_digit_stay_float_and_are_counted():
    values = np.arange(8 * 32, dtype=np.float32).reshape(8, 32) + np.float32(0.5)
    result = quantized(offsets(values))
    assert "1 Add, 1.02 of" in result.summary and "quantize = true" in result.report.floats["add_1"]
    (row,) = result.report.constants
    assert row["name"] == "o" and row["float_bytes"] == 1024 and "quantize = true" in row["why_float"]
    stored = quantized(offsets(values), {"target": "ort-cpu", "layer": [{"match": "add_1", "quantize": True}]})
    assert "1 Add stored in 8 bits" in stored.summary and "stays float" not in stored.summary


def test_operands_whose_codes_are_exact_are_stored():
    mask = np.where(np.arange(8 * 32).reshape(8, 32) % 3, 0.0, -1e4).astype(np.float32)
    model = offsets(mask)
    result = quantized(model)
    assert "1 Add stored in 8 bits" in result.summary
    assert sqnr(ran(model, feed_of(model)), ran(result.model, feed_of(model))) > 80


def test_constants_that_are_not_finite_stay():
    values = weight((64, 32))
    values[3] = np.nan
    model = network([("Gather", ["t", "x"], ["y"], {})], ["n", 3], {"t": values}, INT)
    assert "NaN" in quantized(model).report.floats["gather_0"]


def test_a_target_that_does_not_decode_says_so():
    result = quantized(recurrent("LSTM", 4), {"target": "npu"})
    assert (
        "no 8-bit form" in result.report.floats["lstm_0"] and "1 LSTM" in result.summary and "stays float" in result.summary
    )


def looped():
    """A Loop whose body is a product with a weight of the outer graph."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"], "inner"),
            helper.make_node("Identity", ["go"], ["on"], "same"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", F, [5, 32]),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", F, [5, 32])],
    )
    constants = {"w": (32, 32), "n": np.array(2), "yes": np.array(True)}
    return network([("Loop", ["n", "yes", "x"], ["y"], {"body": body})], [5, 32], constants)


def test_weights_that_the_body_of_a_loop_reads_are_stored():
    model = looped()
    result = quantized(model)
    assert "stored in 8 bits" in result.summary and sum(sizes(result.model).values()) < 2048
    assert sqnr(ran(model, feed_of(model)), ran(result.model, feed_of(model))) > 30


def test_the_check_says_it_before_any_work(tmp_path):
    from onnxq_plugins.graph import load

    graph, target = load(recurrent("LSTM", 4)), find_plugins().target("ort-cpu")
    rows = {each.constant.name: each.spec for each in request(graph, Recipe(), target).constants}
    assert set(rows) == {"w", "r"} and all(spec.bits == 8 and spec.block == (1, 1, 0) for spec in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(set(builtin_recipes()) - {"int8-data-free"}))
@pytest.mark.parametrize("name", ["LSTM", "table", "transposed"])
def test_every_recipe_takes_them(name, recipe):
    model = MODELS[name][0]()
    result, feed = quantized(model, recipe), feed_of(model, 9)
    assert sqnr(ran(model, feed), ran(result.model, feed, optimize=False)) > 12
    stored = find_plugins().target(result.report.recipe["target"]).decodes
    assert ("8 bits" in result.summary) == stored and ("float" in result.summary or name == "table")
