"""Fingerprints, and what is remembered by them: nothing is stale, whatever was changed in whatever way."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.graph import load
from tests.zoo import ZOO, Net, cnn, feeds


def network():
    """A convolution with a weight beyond 1 kB, small constants, an attribute and an open batch."""
    net = Net(["N", 8, 8, 8])
    x = net.op("LeakyRelu", net.conv("x", 8, 16), alpha=0.25)
    x = net.op("Reshape", x, net.constant([0, 16, -1], np.int64))
    return net.model(net.op("Transpose", net.op("Mul", x, net.constant([0.5])), perm=[0, 1, 2]))


def node(graph, op):
    return next(n for n in graph.nodes if n.op == op)


def in_place(graph):
    graph.constant(graph.layers[0].weight)[0, 0, 0, 0] += 1


def replaced(graph):
    graph.set_constant(graph.layers[0].weight, graph.constant(graph.layers[0].weight) * 2)


def of_another_shape(graph):
    graph.set_constant(graph.layers[0].weight, graph.constant(graph.layers[0].weight)[:, :, :1, :1])
    node(graph, "Conv").attrs["pads"] = [0, 0, 0, 0]


def small_in_place(graph):
    graph.constant(graph.layers[0].bias)[0] += 1


def attribute(graph):
    node(graph, "LeakyRelu").attrs["alpha"] = 0.125


def operator(graph):
    node(graph, "LeakyRelu").op = "Elu"


def without(graph):
    graph.bypass(node(graph, "LeakyRelu"), node(graph, "LeakyRelu").inputs[0])


def by_hand(graph):
    """As a stranger's pass may do it, with graphsurgeon alone."""
    conv = node(graph, "Conv")
    conv.inputs[2] = gs.Constant("other_bias", np.ones(16, np.float32))


def shape(graph):
    graph.set_shape(graph.layers[0].output, [1, 16, 8, 8], np.float32)


EDITS = [in_place, replaced, of_another_shape, small_in_place, attribute, operator, without, by_hand, shape]
UNSEEN = [in_place, replaced]  # in a model with placeholders


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_is_of_the_graph_as_it_is(edit):
    graph = load(network())
    digest, structure, before = graph.digest(), graph.structure(), graph.model({})
    edit(graph)
    assert graph.digest() != digest
    assert (graph.structure() == structure) == (edit in UNSEEN)
    weights = {}
    model = graph.model(weights)
    assert (model == before) == (edit in UNSEEN)
    feed = feeds(network(), 1)[0]
    fresh = runtimes.session(graph.model()).run(None, feed)[0]  # all of it, written anew
    np.testing.assert_array_equal(runtimes.session(model, weights=weights).run(None, feed)[0], fresh)


def test_what_is_undone_has_the_fingerprint_that_it_had():
    graph = load(network())
    digest, weight = graph.digest(), graph.constant(graph.layers[0].weight)
    before = weight[0, 0, 0, 0]
    attribute(graph)
    in_place(graph)
    assert graph.digest() != digest
    weight[0, 0, 0, 0] = before
    node(graph, "LeakyRelu").attrs["alpha"] = 0.25
    assert graph.digest() == digest == load(network()).digest()


def test_another_array_in_the_place_of_one_that_is_gone_is_not_taken_for_it():
    graph = load(network())
    weight, seen = graph.layers[0].weight, set()
    for scale in range(1, 9):  # memory, and so identities, are used again
        graph.set_constant(weight, np.full(graph.constant(weight).shape, scale, np.float32))
        seen.add(graph.digest())
    assert len(seen) == 8


@pytest.mark.parametrize("name", ["cnn", "transformer", "control_flow", "shared_weights"])
def test_models_do_not_share_what_a_caller_changes(name):
    graph = load(ZOO[name]())
    first = graph.model({})
    untouched = first.SerializeToString()
    del first.graph.node[:], first.graph.output[:]
    assert graph.model({}).SerializeToString() == untouched
    assert graph.model({}, expand=False) is not graph.model({}, expand=False)


def test_forms_of_a_model_are_kept_apart():
    net = Net([1, 8])
    graph = load(net.model(net.gelu_erf(net.linear("x", 8, 8))))
    for _ in range(2):
        whole, single = ({n.op_type for n in graph.model({}, expand=expand).graph.node} for expand in (True, False))
        assert "Gelu" in single and "Erf" in whole and "Gelu" not in whole


def test_shapes_are_those_of_the_graph_and_of_the_sample(monkeypatch):
    graph, (feed,) = load(network()), feeds(network(), 1)
    output = graph.outputs[0]
    assert shapes_of(graph, feed)[output] == (1, 16, 64)
    twice = {"x": np.concatenate([feed["x"]] * 2)}
    assert shapes_of(graph, twice)[output] == (2, 16, 64) and shapes_of(graph, twice)["x"] == (2, 8, 8, 8)
    node(graph, "Conv").attrs["pads"] = [0, 0, 0, 0]
    assert shapes_of(graph, twice)[output] == (2, 16, 36)
    monkeypatch.setattr(runtimes, "session", None)  # what was asked before needs no run
    assert shapes_of(graph, twice, [output]) == {output: (2, 16, 36)}


def test_shapes_that_depend_on_values_follow_them():
    net = Net([6])
    graph = load(net.model(net.op("NonZero", "x"), net.op("Relu", "x")))
    found = graph.outputs[0]
    for values in ([1, 0, 0, 2, 0, 0], [1, 1, 1, 1, 0, 0]):
        x = np.array(values, np.float32)
        assert shapes_of(graph, {"x": x}, [found]) == {found: (1, int((x != 0).sum()))}


def test_contents_tell_types_and_shapes_apart():
    graph = load(cnn())
    name = graph.layers[0].weight
    first = graph.content(name)
    graph.set_constant(name, graph.constant(name).reshape(-1))
    assert graph.content(name) != first
