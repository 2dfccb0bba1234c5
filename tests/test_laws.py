"""What the engine does behind a pass: a graph that can be mended is, another one stops the run and is told whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import pytest

from onnxq_plugins import Pass, hookimpl, quantize
from onnxq_plugins.graph import load
from onnxq_plugins.graph.soundness import same_structure, structure
from onnxq_plugins.laws import LawBroken
from tests.zoo import cnn, feeds, mlp, transformer

HERE = r"tests/test_laws\.py, line \d+"


def run(body, model=None, stage="rewrite", before=(), **options):
    """Quantize with a pass whose `apply` is that function of the job."""
    kind = type(
        "Mine",
        (Pass,),
        {"__annotations__": {}, "name": "acme.mine", "stage": stage, "apply": lambda self, job: body(job) and None},
    )
    kind = dataclass(frozen=True)(kind)

    class Plugin:
        @hookimpl
        def onnxq_passes(self):
            return [kind]

    model = cnn() if model is None else model
    steps = [*({"use": name} for name in before), {"use": "acme.mine"}]
    options = {"check": False, "verify": True, "workers": 1, **options}
    return quantize(model, {"pass": steps}, feeds(model, 2), plugins=[Plugin(), *options.pop("plugins", ())], **options)


def relu_behind(job, name="", op="Relu", **attrs):
    """Insert an operator between the first Relu and its readers."""
    graph = job.graph
    relu = next(node for node in graph.nodes if node.op == "Relu")
    made = graph.add_node(op, name, [relu.outputs[0]], **attrs)
    for reader in graph.consumers(relu.outputs[0].name):
        if reader is not made:
            graph.set_input(reader, [t.name for t in reader.inputs].index(relu.outputs[0].name), made.outputs[0])
    return made


def test_operators_out_of_order_unread_and_of_one_name_are_mended():
    def body(job):
        for _ in range(2):
            relu_behind(job, name=job.graph.layers[0].name)
        job.graph.add_node("Neg", "unread", [job.graph.inputs[0]])

    model = run(body).graph.model()
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and "unread" not in names
    onnx.checker.check_model(model, full_check=True)
    assert names.count(load(cnn()).layers[0].name) == 1  # the layer kept its name


def two_writers(job):
    relu = next(node for node in job.graph.nodes if node.op == "Relu")
    job.graph.add_node("Relu", "again", [relu.inputs[0]], [relu.outputs[0]])


def unwritten(job):
    job.graph.set_input(job.graph.nodes[-1], 0, job.graph.add_variable("nobody"))


def circle(job):
    node = next(node for node in job.graph.nodes if node.op == "Relu")
    job.graph.set_input(node, 0, job.graph.add_node("Relu", "", [node.outputs[0]]).outputs[0])


def same_name(job):
    relu_behind(job).outputs[0].name = job.graph.nodes[-1].outputs[0].name


def wrong_type(job):
    made = relu_behind(job, op="Add")
    job.graph.set_input(made, 1, job.graph.add_constant("one", np.ones(1, np.float64)))


def wrong_shape(job):
    made = relu_behind(job, op="Add")
    job.graph.set_input(made, 1, job.graph.add_constant("some", np.ones((1, 5, 1, 1), np.float32)))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (two_writers, r"written twice, by .*Relu 'again' \(made in " + HERE),
        (unwritten, r"read 'nobody', which nothing computes"),
        (circle, r"read each other in a circle"),
        (same_name, r"has two tensors named"),
        (
            lambda job: relu_behind(job, op="Reluu"),
            r"Reluu 'reluu' \(made in " + HERE + r"\), which onnx\.checker refuses: No Op",
        ),
        (
            lambda job: relu_behind(job, slope=2.0),
            r"Relu 'relu' \(made in " + HERE + r"\), which onnx\.checker refuses: Unrecognized",
        ),
        (wrong_type, r"cannot be loaded .*this is about Add 'add' \(made in " + HERE),
        (wrong_shape, r"cannot be loaded"),
    ],
)
def test_what_no_file_can_hold_stops_the_run_with_its_owner(body, words):
    with pytest.raises(LawBroken, match=words) as caught:
        run(body, verify=False)
    text = str(caught.value)
    assert "the graph that pass 'acme.mine' (tests/test_laws.py, line " in text and text.endswith(
        "this is a bug of the pass."
    )
    assert "\n" not in text


def test_inputs_are_replaced_and_left_out():
    graph = load(cnn())
    node = next(n for n in graph.nodes if len(n.inputs) == 3)
    bias = node.inputs[2]
    graph.set_input(node, 2, None)
    assert len(node.inputs) == 2 and not bias.outputs
    graph.set_input(node, 2, bias.name)
    assert node.inputs[2] is bias and [n is node for n in bias.outputs] == [True]
    twin = graph.add_node("Relu", "", [node.inputs[0]])
    other = graph.add_node("Relu", "", [node.inputs[0]])
    graph.set_input(other, 0, bias)
    assert any(n is twin for n in node.inputs[0].outputs) and not any(n is other for n in node.inputs[0].outputs)
    assert twin.name != other.name


def test_values_are_no_structure_but_their_shapes_and_attributes_are():
    graph = load(transformer())
    before = structure(graph)
    assert same_structure(before, graph)
    name = graph.layers[0].weight
    graph.set_constant(name, graph.constant(name) * 2)
    assert same_structure(before, graph)
    graph.nodes[-1].attrs["extra"] = 1
    assert not same_structure(before, graph)
    del graph.nodes[-1].attrs["extra"]
    assert same_structure(before, graph)
    graph.set_constant(name, graph.constant(name).astype(np.float64))
    assert not same_structure(before, graph)


def test_a_wrapper_that_forgets_to_return_is_named():
    class Forgets:
        @hookimpl(wrapper=True)
        def onnxq_run_pass(self, step, job):
            yield

    with pytest.raises(LawBroken, match=r"onnxq_run_pass of plugin 'Forgets' returns nothing around pass 'acme\.mine'"):
        run(lambda job: None, plugins=[Forgets()])


def test_solutions_that_a_late_pass_makes_stale_are_told():
    def body(job):
        layer = job.graph.layers[0]
        job.graph.set_constant(layer.weight, job.graph.constant(layer.weight) * np.float32(1))
        job.graph.constant(layer.weight)[...] *= 1  # the values may stay: the pass says that it set them

    result = run(body, before=("ranges", "round"), stage="finish")
    assert any("'acme.mine' changed 1 weight" in note for note in result.report.notes)
    assert not any("changed 1 weight" in note for note in run(body, before=("ranges", "round")).report.notes)


def test_what_a_pass_adds_has_shapes_and_types_and_the_plan_that_layers_need():
    seen = {}

    def body(job):
        layer = job.graph.layers[-1]
        shape = job.graph.add_node("Shape", "", [layer.input])
        seen["shape"] = shape.outputs[0]
        relu = job.graph.add_node("Relu", "", [layer.input])
        seen["relu"] = relu.outputs[0]
        job.graph.set_input(job.graph.producer(layer.output), 0, relu.outputs[0])
        kept = job.graph.add_node("Reshape", "", [layer.output, shape.outputs[0]])  # nothing reads it
        assert kept.outputs

    model = cnn()
    result = run(body, model, verify=False)
    layer = result.graph.layers[-1]
    assert result.graph.shape(layer.input) is not None and layer.input in result.plan
    assert all(spec.solved for spec in result.plan.values())


def test_an_activation_that_only_float_operators_read_is_taken_out_of_the_plan():
    """A pass puts a float layer before an integer one: what it reads needs no codes any more."""

    def turned(job):
        layer = job.graph.layers[1]
        node, size = job.graph.producer(layer.output), layer.shape[layer.in_axis]
        eye = job.graph.add_constant("eye", np.eye(size, dtype=np.float32))
        turn = job.graph.add_node("MatMul", "turn", [node.inputs[0], eye])
        job.graph.set_input(node, 0, turn.outputs[0])
        job.keep_float(turn.name, "a test")
        seen.append(layer.input)

    @dataclass(frozen=True)
    class Turn(Pass):
        """Turns."""

        name: ClassVar[str] = "acme.turn"
        stage: ClassVar[str] = "rewrite"

        def apply(self, job):
            turned(job)

    class Brought:
        @hookimpl
        def onnxq_passes(self):
            return [Turn]

    seen: list[str] = []
    recipe = {"pass": [{"use": "acme.turn"}, {"use": "ranges"}]}
    result = quantize(mlp(), recipe, feeds(mlp(), 4), plugins=[Brought()], workers=1, check=False)
    assert seen[0] not in result.plan
    assert sum(node.op_type == "QuantizeLinear" for node in result.model.graph.node) == 3
    row = next(row for row in result.report.layers if row["name"] == "turn")
    assert row["kernel"] in ("MatMul", "unknown") and row["why_float"] == "a test" and "3/3 Gemm" in result.summary
