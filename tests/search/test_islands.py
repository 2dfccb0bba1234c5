"""Where a target quantizes as a whole, activations that 8 bits destroy become islands of floats, and are named; what is
computed last on the grid of a table is float."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from onnxq_plugins import quantize, retarget, runtimes
from onnxq_plugins.formats import tflite
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.plan.islands import layers_beside, turned_float, with_islands
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.targets import BUILTIN
from tests.jobs import make_job
from tests.networks import network, weight

TARGETS = {target.name: target for target in BUILTIN}
WHOLE = ("litert", "qnn")
PLAIN = {"pass": [{"use": "ranges"}, {"use": "bias-correct"}]}


def magnitudes():
    """Squares, whose small values a grid for the large ones loses, and their roots between convolutions: on a grid of their
    own the roots are fine."""
    return network(
        [
            ("Conv", ["x", "w1"], ["a"], {"pads": [1] * 4}),
            ("Mul", ["a", "a"], ["p"], {}),
            ("Mul", ["p", "a"], ["c"], {}),
            ("Add", ["c", "p"], ["q"], {}),
            ("Abs", ["q"], ["b"], {}),
            ("Pow", ["b", "third"], ["r"], {}),
            ("Conv", ["r", "w2"], ["d"], {"pads": [1] * 4}),
            ("Relu", ["d"], ["e"], {}),
            ("Conv", ["e", "w3"], ["y"], {}),
        ],
        [1, 3, 12, 12],
        {
            "w1": weight((16, 3, 3, 3)) * 3,
            "third": np.float32(1 / 3),
            "w2": weight((16, 16, 3, 3)) / 3,
            "w3": weight((8, 16, 1, 1)),
        },
    )


def scores():
    """Boxes in one output beside scores near 0, moved and concatenated, and scores alone in another."""
    return network(
        [
            ("Conv", ["x", "w1"], ["h"], {"pads": [1] * 4}),
            ("Relu", ["h"], ["r"], {}),
            ("Conv", ["r", "wb", "bb"], ["boxes"], {}),
            ("Conv", ["r", "ws", "bs"], ["logits"], {}),
            ("Sigmoid", ["logits"], ["s"], {}),
            ("Concat", ["boxes", "s"], ["both"], {"axis": 1}),
            ("Transpose", ["both"], ["y"], {"perm": [0, 2, 3, 1]}),
            ("Conv", ["r", "wt", "bs"], ["t"], {}),
            ("Sigmoid", ["t"], ["z"], {}),
        ],
        [1, 3, 12, 12],
        {
            "w1": weight((16, 3, 3, 3)) * 3,
            "wb": weight((4, 16, 1, 1)) * 40,
            "bb": np.full(4, 200, np.float32),
            "ws": weight((2, 16, 1, 1)) / 30,
            "wt": weight((2, 16, 1, 1), 1) / 30,
            "bs": np.full(2, -7, np.float32),
        },
        outputs=("y", "z"),
    )


def pictures(n=24, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(n)]


def values(model, samples):
    return runtimes.outputs(runtimes.session(model, written=True), samples)


def distance(model, result, samples):
    """dB of the worst output, of boxes and scores apart."""
    reference, outputs = values(model, samples), values(result.model, samples)
    return worst_sqnr(reference, outputs)


def conversions(model):
    """Operators -> what writes their inputs."""
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    return {node.name: [makers.get(name, "") for name in node.input] for node in model.graph.node}


@pytest.mark.parametrize("target", WHOLE)
def test_activations_that_8_bits_destroy_are_islands_and_layers_stay_integer(target):
    model, others = magnitudes(), pictures(seed=1)
    before = quantize(model, {**PLAIN, "target": target}, pictures(), check=False)
    assert distance(model, before, others) < 20
    after = quantize(model, {**PLAIN, "target": target}, pictures(), min_sqnr=27, check=False)
    quality = after.report.quality
    assert quality["met"] and distance(model, after, others) > 25
    assert quality["float"] and quality["work"] == 0
    assert all(after.report.floats[name].kind == "quality" for name in quality["float"])
    assert any(f"{len(quality['float'])} operator" in note and "float" in note for note in after.report.notes)
    assert len(Planned(after.graph, after.plan, after.target).layers) == 3
    assert not quality["wide"] and {spec.bits for spec in after.plan.values()} == {8}  # kernels read and write one width
    read = conversions(after.model)
    assert all(read[f"conv_{n}"][:2] == ["DequantizeLinear"] * 2 for n in (0, 6, 8))


def test_the_file_of_islands_runs_in_litert():
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    model, others = magnitudes(), pictures(4, seed=1)
    result = quantize(model, {**PLAIN, "target": "litert"}, pictures(), min_sqnr=27, check=False)
    runner = interpreter.Interpreter(model_content=tflite.write(result.model))
    runner.allocate_tensors()
    run = runner.get_signature_runner()
    got = [np.concatenate([run(**feed)["y"] for feed in others])]
    assert worst_sqnr(values(result.model, others), got) > 30
    operators = Counter(each["op_name"] for each in runner._get_ops_details())
    assert operators["CONV_2D"] == 3 and operators["DEQUANTIZE"] >= 2


@pytest.mark.parametrize("target", WHOLE)
def test_any_activation_can_be_an_island(target):
    model, samples = magnitudes(), pictures(4)
    job = make_job(model, {"target": target})
    planned = Planned.of(job)
    assert len(planned.activations) > 6
    for name in planned.activations:
        layers = layers_beside(planned, name)
        plan = with_islands(planned, [name], layers)
        view = Planned(job.graph, plan, job.target)
        assert name not in plan and set(turned_float(planned, plan)) == planned.integer - view.integer
        assert {y.name for y in view.layers} == {y.name for y in planned.layers} - set(layers)
        assert set(view.activations) <= view.read | view.coded | (set(planned.activations) - planned.read - planned.coded)
        assert all(view.rule(y) is not None for y in view.layers)
        assert job.plan.keys() > plan.keys() and values(model, samples)


@pytest.mark.parametrize("target", WHOLE)
def test_scores_at_the_end_are_floats_and_boxes_beside_them_integer(target):
    model, others = scores(), pictures(seed=1)
    result = quantize(model, {**PLAIN, "target": target}, pictures(), check=False)
    assert {"s", "both", "y", "z"}.isdisjoint(result.plan)
    assert len(Planned(result.graph, result.plan, result.target).layers) == 4
    reference, outputs = values(model, others), values(result.model, others)
    parts = [(0, slice(None, 4)), (0, slice(4, None)), (1, slice(None))]
    for at, part in parts:
        assert worst_sqnr([[y[..., part] for y in reference[at]]], [[z[..., part] for z in outputs[at]]]) > 20


def test_outputs_that_must_be_codes_are_codes():
    result = quantize(scores(), {**PLAIN, "target": "ethos-u"}, pictures(), min_sqnr=30, check=False)
    assert {"both", "z"} <= set(result.plan)
    assert tflite.write(result.model, {"io": "int8"})
    assert not result.report.quality["met"] and any("activations.bits=16" in note for note in result.report.notes)
    settings = ["activations.bits=16"]
    wide = quantize(scores(), {**PLAIN, "target": "ethos-u"}, pictures(), settings=settings, check=False)
    others = pictures(seed=1)
    narrow, exact, reference = (values(m, others)[1] for m in (result.model, wide.model, scores()))
    assert worst_sqnr([reference], [exact]) > 15 > worst_sqnr([reference], [narrow])


def test_what_goes_on_is_on_the_grid_of_its_table():
    model = network(
        [
            ("Conv", ["x", "w1"], ["h"], {}),
            ("Sigmoid", ["h"], ["s"], {}),
            ("Mul", ["h", "s"], ["m"], {}),
            ("Conv", ["m", "w2"], ["y"], {}),
        ],
        [1, 3, 8, 8],
        {"w1": weight((8, 3, 1, 1)), "w2": weight((4, 8, 1, 1))},
    )
    data = [{"x": feed["x"][..., :8, :8]} for feed in pictures(8)]
    result = quantize(model, {**PLAIN, "target": "litert"}, data, check=False)
    (sigmoid,) = (node for node in result.graph.nodes if node.op == "Sigmoid")
    assert float(result.plan[sigmoid.outputs[0].name].scale) == 1 / 256 and {"m", "y"} <= set(result.plan)


def test_islands_stay_in_plans_for_other_targets(tmp_path):
    result = quantize(magnitudes(), {**PLAIN, "target": "litert"}, pictures(), min_sqnr=27, check=False)
    made = retarget(result.save_plan(tmp_path / "a.plan"), "qnn")
    assert {*result.plan} == {*made.plan}
    assert distance(magnitudes(), made, pictures(seed=1)) > 25
