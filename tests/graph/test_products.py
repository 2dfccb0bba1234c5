"""Products in other words than MatMul: they become layers, and compute the same."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import runtimes
from onnxq_plugins.graph import load
from tests.networks import feed_of, network, weight

# name -> (operators, input shape, constants); each is one product
PRODUCTS = {
    "tbd,de->tbe": ([("Einsum", ["x", "w"], ["y"], {"equation": "tbd,de->tbe"})], [5, 2, 8], {"w": (8, 6)}),
    "tbd,ed->tbe": ([("Einsum", ["x", "w"], ["y"], {"equation": "tbd, ed -> tbe"})], [5, 2, 8], {"w": (6, 8)}),
    "constant first": ([("Einsum", ["w", "x"], ["y"], {"equation": "de,tbd->tbe"})], [5, 2, 8], {"w": (8, 6)}),
    "heads": ([("Einsum", ["x", "w"], ["y"], {"equation": "bsd,hdk->bshk"})], ["b", 5, 8], {"w": (2, 8, 3)}),
    "joined heads": ([("Einsum", ["x", "w"], ["y"], {"equation": "bshk,hkd->bsd"})], ["b", 5, 2, 4], {"w": (2, 4, 6)}),
    "unit axis": ([("MatMul", ["x", "w"], ["y"], {})], [2, 5, 8], {"w": (1, 8, 6)}),
    "transA": ([("Gemm", ["x", "w", "b"], ["y"], {"transA": 1})], [8, 5], {"w": (8, 6), "b": (6,)}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_constant_is_a_layer_and_computes_the_same(name):
    model = network(*PRODUCTS[name])
    graph = load(model)
    assert [layer.op for layer in graph.layers] in (["MatMul"], ["Gemm"])
    assert any("Einsum" in note for note in graph.notes) == (model.graph.node[0].op_type == "Einsum")
    feed = feed_of(model)
    exact, own = (runtimes.session(m).run(None, feed)[0] for m in (model, graph.model()))
    assert exact.shape == own.shape
    np.testing.assert_allclose(own, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equation", ["tbd,td->tb", "tbd,de->teb", "tbd,dd->tb", "tbd,de->te"])
def test_other_einsums_stay(equation):
    sizes = dict(zip("tbde", (5, 5, 5, 5), strict=True))
    operands = [tuple(sizes[c] for c in part) for part in equation.partition("->")[0].split(",")]
    model = network([("Einsum", ["x", "w"], ["y"], {"equation": equation})], list(operands[0]), {"w": operands[1]})
    assert [node.op for node in load(model).nodes] == ["Einsum"]


def test_a_constant_that_only_differs_in_axes_is_not_taken_for_a_matrix():
    model = network([("MatMul", ["x", "w"], ["y"], {})], [5, 8], {"w": (1, 8, 6)})  # the product has three axes
    assert load(model).layers == [] and weight((1, 8, 6)).ndim == 3
