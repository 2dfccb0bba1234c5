"""Widths of quantizer groups: groups, costs, and single groups measured alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import load, quantize, runtimes
from onnxq_plugins.export import qdq
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.flow import activation_inputs
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.measure.networks import Measure
from onnxq_plugins.plan import requests
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.quantizers import Cost, Width, cost, multiply_adds, parse_widths, quantizer_groups
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Plan, from_range
from tests.jobs import make_job
from tests.search.searches import make_widths, recipe_of, search
from tests.zoo import ZOO, Net, cnn, examples, feeds, kinds, mlp, mobilenet, transformer

FLOAT = Width(32, 32)


def outputs(model, samples, optimize=True):
    return runtimes.outputs(runtimes.session(model, optimize=optimize), samples)


def activations(graph: Graph, plan) -> set[str]:
    return {name for name in plan if not graph.is_constant(name)}


def two_layers(first: dict, second: dict | None = None) -> tuple[onnx.ModelProto, Net]:
    net = Net(["N", 8, 9, 9])
    x = net.conv("x", 8, 12, **first)
    return net.model(net.conv(x, 12, 4, **second) if second else x), net


# ---- widths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "W8", "A8", "8A8", "W8A", "w8a8", "W8A8 ", "W1A8", "W8A1", "W17A8", "W8A32", "W-4A8", "FLOAT", "W4A8,W8A8"]
)
def test_what_is_no_width_is_told(text):
    with pytest.raises(ValueError, match="W4A8") as error:
        Width.parse(text)
    assert repr(text) in str(error.value)


@given(st.integers(2, 16), st.integers(2, 16))
@examples(30)
def test_widths_are_read_as_they_are_written(weights, bits):
    assert Width.parse(str(Width(weights, bits))) == Width(weights, bits)


def test_candidates_are_sorted_from_the_widest_and_named_once():
    assert [str(w) for w in parse_widths(["W4A8", "float", "W8A16", "W8A8", "W4A8", "W4A16"])] == [
        "float",
        "W8A16",
        "W4A16",
        "W8A8",
        "W4A8",
    ]
    assert str(Width.parse("float")) == "float"
    with pytest.raises(ValueError, match="at least one"):
        parse_widths([])


# ---- groups -------------------------------------------------------------------------------------------------------------


def ties(model, recipe=None):
    job = make_job(model, recipe)
    return job.graph, job.plan, job.target, quantizer_groups(job.graph, job.plan, job.target)


@pytest.mark.parametrize(
    "recipe",
    [{}, {"target": "npu"}, {"target": "storage"}, {"target": "npu", "layer": [{"op": "Attention", "quantize": True}]}],
)
@pytest.mark.parametrize("name", kinds(ZOO, "resnet20", "prelu", "control_flow", "no_layer"))
def test_groups_hold_each_quantizer_once_with_all_that_it_meets(name, recipe):
    graph, plan, target, groups = ties(ZOO[name](), recipe)
    planned = [a for g in groups for a in g.activations]
    layers = [y for g in groups for y in g.layers]
    assert sorted(planned) == sorted(activations(graph, plan))
    assert sorted(layers) == sorted(y.name for y in graph.layers if y.weight in plan)
    assert len({g.name for g in groups}) == len(groups)
    of = {
        member: i
        for i, g in enumerate(groups)
        for member in (*[("a", a) for a in g.activations], *[("y", y) for y in g.layers])
    }
    integer = Planned(graph, plan, target).integer
    by_name = {y.name: y for y in graph.layers}
    for node in graph.nodes:
        keys = {Planned(graph, plan, None).source(t) for t in activation_inputs(graph, node)} - {""}
        if node.name in by_name and by_name[node.name].weight in plan:
            key = Planned(graph, plan, target).input(by_name[node.name])
            if key:
                assert of["y", node.name] == of["a", key]
            else:
                alone = groups[of["y", node.name]]
                assert alone.layers == (node.name,) and not alone.activations
        elif node.name in integer:
            assert len({of["a", key] for key in keys}) == 1
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    first = [place[g.layers[0]] for g in groups if g.layers]
    assert first == sorted(first)
    for g in groups:
        assert [place[y] for y in g.layers] == sorted(place[y] for y in g.layers)


def test_adds_and_concats_tie_their_inputs():
    model = ZOO["resnet20"]()
    graph, plan, _, groups = ties(model)
    adds = [n for n in graph.nodes if n.op == "Add"]
    assert len(adds) == 2
    for node in adds:
        keys = {Planned(graph, plan, None).source(t.name) for t in node.inputs}
        assert len(keys) == 2 and any(keys <= set(g.activations) for g in groups)
    graph, plan, _, groups = ties(ZOO["inception"]())
    (concat,) = (n for n in graph.nodes if n.op == "Concat")
    assert any({Planned(graph, plan, None).source(t.name) for t in concat.inputs} <= set(g.activations) for g in groups)


@pytest.mark.parametrize("name", ["mobilenet", "inception", "transformer", "resnet20"])
def test_groups_do_not_depend_on_names(name):
    model = ZOO[name]()
    inner = [t for n in model.graph.node for t in n.output if t not in {o.name for o in model.graph.output}]
    renamed = {t: f"{(37 * i) % 101:03d}_{t}" for i, t in enumerate(inner)}
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for i, node in enumerate(other.graph.node):
        node.name = f"{(53 * i) % 97:03d}"
        for side in (node.input, node.output):
            side[:] = [renamed.get(t, t) for t in side]
    (one, _, _, groups), (two, _, _, others) = ties(model), ties(other)
    places = [{n.name: i for i, n in enumerate(graph.nodes)} for graph in (one, two)]
    back = {new: old for old, new in renamed.items()}
    numbers = [
        [sorted(place[y] for y in g.layers) for g in found] for place, found in zip(places, (groups, others), strict=True)
    ]
    assert numbers[0] == numbers[1]

    def old(name: str) -> str:
        return back.get(name, back.get(name.removesuffix("_2d"), name.removesuffix("_2d")))  # flattened tokens

    assert [sorted(a.removesuffix("_2d") for a in g.activations) for g in groups] == [
        sorted(old(a) for a in g.activations) for g in others
    ]


def test_weight_only_layers_stand_alone_in_the_order_of_the_graph():
    layers = [{"match": "gemm2", "activations": {"bits": 32}}]
    _, _, _, groups = ties(mlp(), {"target": "storage", "layer": layers})
    assert [g.layers for g in groups if g.layers] == [("gemm0",), ("gemm2",), ("gemm4",)]
    assert not groups[[g.layers for g in groups].index(("gemm2",))].activations


def test_a_group_of_activations_is_not_mistaken_for_a_layer_with_the_name_of_its_tensor():
    model = mobilenet()
    for node in model.graph.node:  # as some exporters have it
        node.name = node.output[0]
    told = search(make_job(model), limit=1.0)
    assert {len(point["widths"]) for point in told["curve"]} == {told["groups"]}


def test_products_of_activations_are_in_groups():
    attention = {"layer": [{"op": "Attention", "quantize": True}]}
    graph, plan, _, groups = ties(transformer(), attention)
    products = [n for n in graph.nodes if n.op == "MatMul" and not any(graph.is_constant(t.name) for t in n.inputs)]
    assert len(products) == 2
    for node in products:
        keys = {Planned(graph, plan, None).source(t.name) for t in node.inputs}
        assert "" not in keys and any(keys <= set(g.activations) for g in groups)
    told = search(
        make_job(transformer(), {"target": "npu", **attention}),
        candidates=("W4A8", "W8A8", "W8A16"),
        budget="bops",
        limit=1.0,
    )
    assert told["groups"] == len(groups)


# ---- costs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"k": 3}, 9 * 9 * 12 * 8 * 9),
        ({"k": 1}, 9 * 9 * 12 * 8),
        ({"k": 3, "strides": [2, 2]}, 5 * 5 * 12 * 8 * 9),
        ({"k": 3, "groups": 4}, 9 * 9 * 12 * 2 * 9),
        ({"k": 3, "pads": [0] * 4}, 7 * 7 * 12 * 8 * 9),
        ({"k": 3, "dilations": [2, 2], "pads": [0] * 4}, 5 * 5 * 12 * 8 * 9),
    ],
)
def test_multiply_adds_of_convolutions(settings, expected):
    model, _ = two_layers(settings)
    assert list(multiply_adds(load(model), feeds(model, 1)[0]).values()) == [expected]


def test_multiply_adds_of_other_layers():
    net = Net(["N", 8, 6, 6])
    x = net.conv("x", 8, 8, groups=8)
    model = net.model(net.op("ConvTranspose", x, net.weight(8, 5, 2, 2), strides=[3, 3]))
    work = multiply_adds(load(model), feeds(model, 1)[0])
    assert list(work.values()) == [6 * 6 * 8 * 9, 6 * 6 * 8 * 5 * 4]
    net = Net(["N", 7, 16])
    for y in (net.model(net.linear("x", 16, 20)), net.model(net.linear("x", 16, 20, bias=False))):
        for flatten in (True, False):  # a two-dimensional Gemm on tokens, or MatMul
            assert list(multiply_adds(load(y, flatten=flatten), feeds(y, 1)[0]).values()) == [7 * 16 * 20]
    assert multiply_adds(load(ZOO["no_layer"]()), feeds(ZOO["no_layer"](), 1)[0]) == {}


def test_cost_is_weights_times_bits_and_work_times_both():
    graph = load(mlp())
    a, b, c = (y.name for y in graph.layers)
    work = {a: 13 * 24, b: 24 * 20, c: 20 * 7}
    assert multiply_adds(graph, feeds(mlp(), 1)[0]) == work
    found = cost(graph, {a: Width(4, 8), b: Width(8, 16), c: FLOAT}, work)
    assert found == Cost(4 * 312 + 8 * 480 + 32 * 140, 32 * 312 + 128 * 480 + 1024 * 140)


def test_pinned_layers_keep_their_bits_and_are_counted_with_them():
    recipe = {"layer": [{"position": "first", "weights": {"bits": 6}}, {"match": "conv3", "weights": {"block": "tensor"}}]}
    job = make_job(cnn(), recipe)
    assert requests.pinned(job.graph, job.recipe) == {"conv0"}
    widths = make_widths(cnn(), recipe=recipe)
    first = widths.layers["conv0"]
    for width in (Width(4, 8), Width(8, 8)):
        everywhere = tuple(width for _ in widths.groups)
        plan = widths.plan(dict(enumerate(everywhere)))
        assert plan[first.weight].bits == 6
        sizes = {y.name: np.prod(y.shape) for y in job.graph.layers}
        assert widths.cost(everywhere).size == sum(n * (6 if y == "conv0" else width.weights) for y, n in sizes.items())
    result = quantize(cnn(), {**recipe, **recipe_of(candidates=["W4A8"], limit=1.0)}, feeds(cnn(), 6))
    assert {y["name"]: y["weights"].split()[0] for y in result.report["layers"]} == {
        "conv0": "int6",
        "conv3": "int4",
        "gemm7": "int4",
    }


# ---- one group alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds([n for n in ZOO if n != "no_layer"], "resnet20"))
def test_a_group_alone_leaves_all_others_float(name):
    model = ZOO[name]()
    recipe = {"target": "npu", "layer": [{"op": "Attention", "quantize": True}]}
    widths = make_widths(model, ("W4A8", "W8A16"), recipe)
    samples = list(widths.job.calibration.data)[:3]  # those that ranges were taken from: nothing is clipped
    reference = outputs(model, samples)
    for number, group in enumerate(widths.groups):
        noise = {}
        for width in (Width(4, 8), Width(8, 16)):
            plan = widths.plan({number: width})
            assert set(plan) == {*group.activations, *(widths.layers[y].weight for y in group.layers)}
            made = qdq.export(widths.job.graph, plan, ALONE, widths.coded)
            onnx.checker.check_model(made, full_check=True)
            weights = {t.name for t in made.graph.initializer}
            for layer in widths.job.graph.layers:
                if name != "shared_weights":  # whose float weights are shared again
                    assert (layer.weight in weights) == (layer.weight not in plan)
            written, run = outputs(made, samples, False), outputs(made, samples)
            assert worst_sqnr(written, run) > 90  # integer kernels between layers may round otherwise; weights do not
            noise[width] = worst_sqnr(reference, run)
        assert noise[Width(4, 8)] < 120, "the error of 8-bit activations must be seen"
        assert noise[Width(8, 16)] > max(35, noise[Width(4, 8)] + 3)


@pytest.mark.parametrize("name", ["mobilenet", "resnet20", "inception", "prelu", "control_flow"])
def test_every_planned_activation_alone_costs_something(name):
    """Also those that only operators without weights read."""
    widths = make_widths(ZOO[name](), ("W4A4", "W8A8"), {"target": "npu"})
    measure = Measure(widths.job.graph, ALONE, list(widths.job.calibration.data), coded=widths.coded)
    whole = widths.plan({i: Width(8, 8) for i in range(len(widths.groups))})
    assert widths.coded
    for group in widths.groups:
        for a in widths.coded & set(group.activations):
            coarse = from_range(
                *(float((code - whole[a].zero_point) * whole[a].scale) for code in whole[a].grid),
                replace(whole[a].request(), bits=4),
            )
            assert 0 < measure.score(Plan({a: coarse})) < 100, a
