"""The conformance kit fails where a pass breaks a promise: for each check, passes that are wrong in one way."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, Pass, QuantSpec, hookimpl
from onnxq_plugins.passes import Ranges
from onnxq_plugins.spec import solve_minmax
from onnxq_plugins.testing import CHECKS, cases, checks, parametrize_with_checks
from onnxq_plugins.testing.bench import Bench, Own
from tests.zoo import LONG_CHECKS, Net, cnn, some

GLOBAL: Any = np.random  # the generator that no pass may touch
MEMORY: Any = itertools.count()


def bad(apply=lambda self, job: None, **more):
    """An instance of a pass that is in order but for `apply` and what is given."""
    body = {"__doc__": "Wrong.", "__annotations__": {}, "name": "acme.bad", "apply": apply, **more}
    return dataclass(frozen=True)(type("Bad", (Pass,), body))()


def planned(job):
    return next(y for y in job.graph.layers if y.weight in job.plan)


def plans(made):
    """A pass that puts something into the plan, made of (job, first planned layer)."""

    def apply(self, job):
        job.plan |= made(job, planned(job))

    return bad(apply)


def entry(**values):
    def made(job, layer):
        weight = job.graph.constant(layer.weight)
        return {
            layer.weight: QuantSpec(codes=np.zeros(weight.shape, np.int64), scale=np.float32(1), zero_point=np.int64(0))
            if not values
            else replace(
                QuantSpec(scale=np.array(1, np.float32)),
                **{key: value(weight) if callable(value) else value for key, value in values.items()},
            )
        }

    return plans(made)


def function(body):
    """A pass whose `apply` is that function of the job."""
    return bad(lambda self, job: body(job))


def scale_a_weight(job):
    layer = planned(job)
    job.graph.set_constant(layer.weight, job.graph.constant(layer.weight) * np.float32(1.01))


def assign_a_dict(job):
    job.plan = dict(job.plan)


def spoil_data(job):
    for feed in job.calibration.data or ():
        feed["x"] *= 2


def by_chance(draw):
    def made(job, layer):
        return {layer.weight: QuantSpec(scale=np.array(0.01 * (1 + draw(job)), np.float32))}

    return plans(made)


def once(job):
    if job.plan[planned(job).weight].solved:
        raise RuntimeError("not again")
    job.plan |= {planned(job).weight: QuantSpec(scale=np.array(0.1, np.float32))}


def ignores_pow2(job):
    """Right but for recipes that ask for powers of two."""
    layer = planned(job)
    spec = solve_minmax(job.graph.constant(layer.weight), job.plan[layer.weight])
    job.plan |= {layer.weight: replace(spec, scale=spec.scale * np.float32(1.1))}


def refuse(text):
    def body(job):
        raise OnnxqError(text)

    return function(body)


def needs_data(job):
    return {"samples": len(list(job.calibration.data))}


@dataclass(frozen=True)
class NoDefault(Pass):
    """Wrong."""

    name: ClassVar[str] = "acme.bad"
    value: int


class NoDataclass(Pass):
    """Wrong."""

    name: ClassVar[str] = "acme.bad"


@dataclass(frozen=True)
class NameIsField(Pass):
    """Wrong."""

    name: str = "acme.bad"


def doubled(self):
    object.__setattr__(self, "value", 2 * self.value)


def parameter(kind, value, **more):
    return bad(__annotations__={"value": kind}, value=value, **more)


def overwrites(job):
    job.plan |= {
        y.weight: replace(job.plan[y.weight].request(), scale=None) for y in job.graph.layers if y.weight in job.plan
    }


def scales_behind_the_plan(job):
    layer = planned(job)
    for name, factor in ((layer.weight, 2), *([(layer.bias, 2)] if layer.bias else [])):
        job.graph.set_constant(name, job.graph.constant(name) * np.float32(factor))


def misspells(job):
    job.graph.add_node("Reluu", "", [job.graph.layers[0].output])  # nothing reads it, so that it is dropped
    node = next(n for n in job.graph.nodes if n.op in ("Relu", "Add", "Gemm", "Mul"))
    node.op = "Reluu"


HERE = "testing/test_testing.py, line "  # a file is named with its folder
WRONG = [
    ("declaration", NoDataclass(), "must be a frozen dataclass"),
    ("declaration", NameIsField(), "name must belong to the class"),
    ("declaration", bad(name="bad"), "with a vendor in front"),
    ("declaration", bad(name="Acme.Bad"), "must be lower-case words"),
    ("declaration", bad(__doc__=None), "needs a docstring"),
    ("declaration", bad(exact="yes"), "exact must be True or False"),
    ("declaration", NoDefault(1), "'value' has no default"),
    ("declaration", parameter("complex", 1j), "cannot be written in TOML"),
    ("declaration", parameter("float", float("nan")), "cannot be written in TOML"),
    ("recipe_round_trip", parameter("int", 1, __post_init__=doubled), "comes back from a recipe"),
    ("recipe_round_trip", replace(parameter("int", 1), value=0.5), "cannot be read from a recipe"),
    ("float_function", function(scale_a_weight), "though it"),
    ("plan", function(assign_a_dict), "a dict in job.plan"),
    ("plan", plans(lambda job, layer: {"nothing": QuantSpec()}), "names no tensor"),
    ("plan", plans(lambda job, layer: {layer.bias or "t": QuantSpec()}), "a constant that is not a weight"),
    ("plan", plans(lambda job, layer: {layer.output: QuantSpec(block=(1,), scale=np.ones(1))}), "activations have one"),
    ("plan", entry(scale=np.array(0, np.float32)), "not positive"),
    ("plan", entry(scale=np.array(np.nan, np.float32)), "not positive"),
    ("plan", entry(scale=np.array(-1, np.float32)), "not positive"),
    ("plan", function(ignores_pow2), "not powers of two"),
    ("plan", entry(block=(1, 0, 0, 0)), "scales of shape"),
    ("plan", entry(codes=lambda w: np.full(w.shape, 128)), "codes that are not integers"),
    ("plan", entry(codes=lambda w: np.zeros(w.shape)), "codes that are not integers"),
    ("plan", entry(shift=np.ones(1)), "shift of shape"),
    ("plan", refuse("bad"), "one sentence on one line"),
    ("plan", refuse("It is bad."), "was not run"),
    ("plan", function(misspells), "which onnx.checker refuses: No Op registered for Reluu"),
    ("effect", bad(), "changes nothing on any of the"),
    ("effect", function(lambda job: job.plan | {planned(job).weight: QuantSpec()} and None), "does it assign job.plan"),
    ("solved_left_alone", function(overwrites), "overwrites"),
    ("solved_left_alone", function(scales_behind_the_plan), "without its entry"),
    ("repeatable", by_chance(lambda job: next(MEMORY) / 100), "another model when it runs again"),
    ("repeatable", by_chance(lambda job: GLOBAL.random()), "another model when it runs again"),
    ("repeatable", by_chance(lambda job: job.workers), "with two workers than with one"),
    ("inputs_left_alone", by_chance(lambda job: GLOBAL.random()), "global random generator"),
    ("inputs_left_alone", function(lambda job: GLOBAL.seed(0)), "global random generator"),
    ("inputs_left_alone", function(spoil_data), "changes the calibration data"),
    ("targets", refuse("bad"), "one sentence on one line"),
    ("twice", function(once), f"RuntimeError in {HERE}"),
    ("odd_graphs", function(lambda job: {"first": job.graph.layers[0].name}), f"IndexError in {HERE}"),
    ("odd_graphs", function(lambda job: {"first": planned(job).name}), f"StopIteration in {HERE}"),
    ("odd_graphs", refuse("It is bad."), "which works without it"),
    ("not_harmful", plans(lambda job, layer: {y.weight: QuantSpec(bits=2) for y in job.graph.layers}), "dB compared with"),
    ("report", function(lambda job: [1]), "it is a list"),
    ("report", function(lambda job: {1: 2}), "not text"),
    ("report", function(lambda job: {"x": np.int64(1)}), "hold (Object of type int64 is not JSON"),
    ("report", function(lambda job: {"x": float("nan")}), "hold (Out of range float values"),
    ("without_data", function(needs_data), f"TypeError in {HERE}"),
    ("without_data", refuse("It is bad."), "does not mention data"),
]


@pytest.mark.parametrize(("name", "step", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_pass_fails_in_one_sentence(name, step, words):
    with pytest.raises(AssertionError) as caught:
        CHECKS[f"check_{name}"](step, Bench())
    text = str(caught.value)
    assert words in text and "\n" not in text and text.endswith(".")


def test_each_check_is_seen_to_fail():
    assert {f"check_{name}" for name, *_ in WRONG} == set(CHECKS)


def test_runs_apart_with_and_without_optimization_are_found(monkeypatch):
    plain = checks.outputs

    def outputs(model, samples, optimize=True):
        mine = "acme.bad" in next((p.value for p in model.metadata_props if p.key == "onnxq.recipe"), "")
        return [y * (1 + 0.1 * (optimize and mine)) for y in plain(model, samples, optimize)]

    monkeypatch.setattr(checks, "outputs", outputs)
    with pytest.raises(AssertionError, match="with and without onnxruntime's optimizations agree to"):
        CHECKS["check_targets"](bad(), Bench())


@pytest.mark.parametrize("name", some(CHECKS, *(name for name in CHECKS if name not in LONG_CHECKS)))
def test_a_pass_that_does_nothing_conforms_but_for_that(name):
    expected = pytest.raises(AssertionError) if name == "check_effect" else contextlib.nullcontext()
    with expected:
        CHECKS[name](bad(), Bench())


def test_the_global_random_state_is_as_before():
    GLOBAL.seed(3)
    before = GLOBAL.get_state()[1].copy()
    CHECKS["check_repeatable"](bad(), Bench())
    assert (GLOBAL.get_state()[1] == before).all()


# ---- the decorator --------------------------------------------------------------------------------------------------------


def test_one_case_for_each_pass_and_check_with_a_name_that_tells_both():
    @parametrize_with_checks([Ranges(), Ranges(method="mse")])
    def decorated(step, check):
        check(step)

    (mark,) = decorated.pytestmark
    assert len(mark.args[1]) == 2 * len(CHECKS)
    assert {"ranges-plan", "ranges(method=mse)-plan"} <= {case.id for case in mark.args[1]}


def test_what_is_expected_to_fail_must_fail():
    marked = {case.id: case.marks for case in cases(Ranges(), expected_failures={"check_plan": "why"})}
    (mark,) = marked.pop("ranges-plan")
    assert mark.name == "xfail" and mark.kwargs == {"strict": True, "raises": AssertionError, "reason": "why"}
    assert not any(marked.values())


def test_mistakes_are_told():
    with pytest.raises(OnnxqError, match=r"no check 'check_nothing'; known: check_declaration"):
        parametrize_with_checks([Ranges()], expected_failures={"check_nothing": ""})
    with pytest.raises(OnnxqError, match=r"give instances, such as MyPass\(\)"):
        parametrize_with_checks([Ranges])


def small():
    """A model that the kit does not have: token ids, a table and a layer."""
    net = Net(["N", 4])
    net.input = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["N", 4])
    return net.model(net.linear(net.op("Gather", net.weight(32, 8), "x"), 8, 6))


IDS = {"x": np.random.default_rng(0).integers(0, 32, (30, 1, 4))}


def broken_on_tables(job):
    if any(node.op == "Gather" for node in job.graph.nodes):
        scale_a_weight(job)


def large(job):
    if any(node.op == "Gather" for node in job.graph.nodes):
        job.plan |= {y.weight: QuantSpec(bits=2) for y in job.graph.layers}


@pytest.mark.parametrize("source", ["model", "path"])
@pytest.mark.parametrize("data", [IDS, {"ids": IDS}], ids=["for all", "by name"])
def test_models_of_ones_own_are_tried(source, data, tmp_path):
    onnx.save(small(), tmp_path / "m.onnx")
    model = small() if source == "model" else tmp_path / "m.onnx"
    for body, name, words in [(broken_on_tables, "float_function", "of model 'ids' by"), (large, "not_harmful", "(ids -")]:
        tests = {case.id: case for case in cases(function(body), models={"ids": model}, data=data)}
        step, check = tests[f"acme.bad-{name}"].values
        with pytest.raises(AssertionError) as caught:
            check(step)
        assert words in str(caught.value)
        CHECKS[f"check_{name}"](step, Bench())  # the kit has no such model


def test_models_without_data_get_random_numbers_where_they_mean_something():
    bench = Bench(own={"mine": Own("mine", cnn())})
    CHECKS["check_float_function"](Ranges(), bench)
    calibration, others = bench.samples("mine"), bench.unseen("mine")
    assert len(calibration) == 8 and len(others) == 16
    assert not {feed["x"].tobytes() for feed in calibration} & {feed["x"].tobytes() for feed in others}
    with pytest.raises(OnnxqError, match=r"model 'ids': input 'x' has type int64.*give samples \(data="):
        Bench(own={"ids": Own("ids", small())}).samples("ids")
    with pytest.raises(OnnxqError, match="the kit has a model 'cnn'"):
        cases(Ranges(), models={"cnn": cnn()})


def test_a_pass_of_that_name_that_is_installed_is_not_tested_in_its_place():
    class Vendor:
        @hookimpl
        def onnxq_passes(self):
            return [type(bad())]

    with pytest.raises(AssertionError, match=r"pass 'acme\.bad' is known from 'given in Python' as another class"):
        CHECKS["check_plan"](bad(), Bench(plugins=(Vendor(),)))


def test_recipe_and_plugins_surround_the_pass():
    seen = []

    class Spy:
        @hookimpl(wrapper=True)
        def onnxq_run_pass(self, step, job):
            seen.append((step.name, job.recipe.weights.bits))
            return (yield)

    bench = Bench({"weights": {"bits": 4}, "pass": [{"use": "ranges"}]}, (Spy(),))
    CHECKS["check_report"](bad(), bench)
    assert seen == [("ranges", 4), ("acme.bad", 4)]
