"""Bugs planted in passes, targets, remedies and exporters, two or more for each rule of docs/write-a-plugin.md: each is
caught, by the engine where it runs or by the kit, with a message that names it.

    python -m tests.testing.test_planted_bugs   prints the table of the page
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, Pass, QuantSpec, Remedy, hookimpl, quantize
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.report.causes import Cause
from onnxq_plugins.testing import CHECKS, PLUGIN_CHECKS, TARGET_CHECKS
from onnxq_plugins.testing.bench import Bench
from tests.targets.test_hardware import NPU, Brings
from tests.zoo import cnn, feeds

PAGE = Path(__file__).parents[2] / "docs" / "write-a-plugin.md"
RANGES = {"pass": [{"use": "ranges"}]}


def a_pass(apply: Callable[..., Any] = lambda self, job: None, **more: Any) -> Pass:
    """An instance of a pass that is in order but for what is given."""
    body = {"__doc__": "Planted.", "__annotations__": {}, "name": "acme.planted", "apply": apply, **more}
    return dataclass(frozen=True)(type("Planted", (Pass,), body))()


def does(body: Callable[[Any], Any], **more: Any) -> Pass:
    """A pass whose `apply` is that function of the job."""
    return a_pass(lambda self, job: body(job), **more)


def plugin(**hooks: Callable[..., Any]) -> object:
    """A plugin object with hooks."""
    return type("Guest", (), {name: hookimpl(body) for name, body in hooks.items()})()


# ---- where bugs are caught: each returns what is said -------------------------------------------------------------------


def loading(guest: object, *others: object) -> str:
    """The reason why a plugin is set aside."""
    return "; ".join(find_plugins([*others, guest]).broken.values())


def engine(*plugins: object, step: Pass | None = None, recipe: dict[str, Any] | None = None, **options: Any) -> str:
    """What `quantize` says."""
    guests = [*plugins, *([plugin(onnxq_passes=lambda self: [type(step)])] if step is not None else [])]
    table = {"pass": [*([{"use": step.name}] if step is not None else []), {"use": "ranges"}], **(recipe or {})}
    with pytest.raises(OnnxqError) as caught:
        result = quantize(cnn(), table, feeds(cnn(), 2), plugins=guests, workers=1, check=False, **options)
        result.propose(Cause("rounding", "A cause.", 0.0), None)
    return str(caught.value)


def kit(check: str, about: Any, **bench: Any) -> str:
    """What a check of the kit says."""
    every = {**CHECKS, **TARGET_CHECKS, **PLUGIN_CHECKS}
    with pytest.raises(AssertionError) as caught:
        every[check](about, Bench(bench.get("recipe", RANGES if check in PLUGIN_CHECKS else {}), bench.get("plugins", ())))
    return str(caught.value)


# ---- the bugs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoDefault(Pass):
    """Planted."""

    name: ClassVar[str] = "acme.planted"
    share: float


class NoDataclass(Pass):
    """Planted."""

    name: ClassVar[str] = "acme.planted"


def first(job):
    return job.graph.layers[0]


def scale_weight(job):
    job.graph.set_constant(first(job).weight, job.graph.constant(first(job).weight) * np.float32(1.01))


def scale_weight_and_bias(job):
    for layer in job.graph.layers[-1:]:
        for name in (layer.weight, layer.bias):
            job.graph.set_constant(name, job.graph.constant(name) * np.float32(2))


def overwrite(job):
    job.plan |= {y.weight: job.plan[y.weight].request() for y in job.graph.layers if y.weight in job.plan}


def add_relu(job):
    """Between the first layer and its readers, with a misspelt operator."""
    name = first(job).output
    readers = job.graph.consumers(name)
    made = job.graph.add_node("Reluu", "", [name])
    for node in readers:
        at = [tensor.name for tensor in node.inputs].index(name)
        job.graph.set_input(node, at, made.outputs[0])


def add_product(job):
    """A MatMul whose sizes do not fit, in front of the last layer."""
    layer = job.graph.layers[-1]
    wrong = job.graph.add_constant("wrong", np.ones((3, 3), np.float32))
    made = job.graph.add_node("MatMul", "", [layer.input, wrong])
    job.graph.set_input(job.graph.producer(layer.output), 0, made.outputs[0])


def raises(text):
    def body(job):
        raise OnnxqError(text)

    return body


def zero_point_of_3(self, job, model):
    quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    for tensor in model.graph.initializer:
        if tensor.name == quantizer.input[2]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.int8(3), tensor.name))
    return model


def weights_of_zero(self, job, model):
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims, np.int8), tensor.name))
    return model


def stamp(self, job, model):
    model.doc_string = "by acme"
    return model


def write_log(self, job, model, path):
    if path is not None:
        path.with_suffix(".log").write_text("log")


@hookimpl(wrapper=True)
def doubles_scales(step, job):
    result = yield
    job.plan |= {n: replace(s, scale=s.scale * np.float32(2)) for n, s in job.plan.items() if s.solved and not s.codes}
    return result


SYMMETRIC = replace(NPU, signed=True, symmetric=True)
REMEDY = Remedy("finer", ("ranges.method=mse",))


def proposes(*remedies, **more):
    return plugin(onnxq_remedies=lambda self, cause: list(remedies))


def changes_the_job(self, job):
    job.report.notes.append("asked")
    return [REMEDY]


@dataclass(frozen=True)
class Bug:
    """One row: the rule, where the bug is, what it is, who catches it (a check of the kit, loading, or the engine), the
    words that name it, and how to see that."""

    rule: str
    where: str
    bug: str
    by: str
    words: str
    seen: Callable[[], str]


def of_kit(rule: str, where: str, bug: str, check: str, words: str, about: Any, **bench: Any) -> Bug:
    return Bug(rule, where, bug, f"`{check}`", words, lambda: kit(check, about, **bench))


def of_engine(rule: str, where: str, bug: str, words: str, *plugins: object, **options: Any) -> Bug:
    return Bug(rule, where, bug, "engine", words, lambda: engine(*plugins, **options))


def of_loading(rule: str, where: str, bug: str, words: str, *plugins: object) -> Bug:
    return Bug(rule, where, bug, "loading", words, lambda: loading(*plugins))


def with_pass(kind: type[Pass]) -> object:
    return plugin(onnxq_passes=lambda self: [kind])


BUGS = [
    of_loading("declaration", "pass", "a parameter without a default", "parameter 'share' of", with_pass(NoDefault)),
    of_loading("declaration", "pass", "no decorator", "write @dataclass(frozen=True)", with_pass(NoDataclass)),
    of_kit(
        "declaration", "target", "a rule for an operator that it has not", "check_target_declaration",
        "not among its operators", replace(NPU, operators=frozenset({"Conv"})),
    ),
    of_loading("names", "pass", "no vendor", "needs a name like vendor.planted", with_pass(type(a_pass(name="planted")))),
    of_loading(
        "names", "pass", "a name that another package has", "comes from both",
        with_pass(type(a_pass())), with_pass(type(a_pass())),
    ),
    of_kit("names", "target", "no vendor", "check_target_declaration", "with a vendor in front", replace(NPU, name="npu")),
    of_kit(
        "no change by installing", "exporter", "it stamps every model", "check_plugin_quiet", "changes a model whose recipe",
        plugin(onnxq_exporting=stamp),
    ),
    of_kit(
        "no change by installing", "hook", "a log beside every model", "check_plugin_quiet", "writes model.log beside",
        plugin(onnxq_exported=write_log),
    ),
    of_kit(
        "no change by installing", "wrapper", "it changes the plan behind every pass", "check_plugin_quiet",
        "changes a model whose recipe",
        SimpleNamespace(onnxq_run_pass=doubles_scales),
    ),
    of_kit(
        "float function", "pass", "a weight is scaled, its reader is not", "check_float_function",
        "though it declares exact", does(scale_weight, stage="rewrite"),
    ),
    of_kit(
        "float function", "exporter", "it loses weights", "check_plugin_exporting", "changes what model 'cnn' computes",
        plugin(onnxq_exporting=weights_of_zero), plugins=(plugin(onnxq_exporting=weights_of_zero),),
    ),
    of_kit(
        "solved entries", "pass", "a late pass changes weights without their entries", "check_solved_left_alone",
        "without its entry", does(scale_weight_and_bias, exact=False),
    ),
    of_kit(
        "solved entries", "pass", "it plans anew what was solved", "check_solved_left_alone", "overwrites", does(overwrite),
    ),
    of_loading(
        "stage", "pass", "a stage that there is not", "must be one of rewrite", with_pass(type(a_pass(stage="rewrites"))),
    ),
    of_engine(
        "stage", "pass", "codes solved for a tensor that is no weight", "a constant that is not a weight",
        step=does(lambda job: setattr(job, "plan", job.plan | {first(job).bias: QuantSpec()})),
    ),
    of_loading(
        "provides", "pass", "a service that nothing knows", "provides 'range', which nothing knows",
        with_pass(type(a_pass(provides=frozenset({"range"})))),
    ),
    of_kit(
        "provides", "remedy", "a kind of cause that there is not", "check_plugin_remedies", "proposes nothing for any cause",
        plugin(onnxq_remedies=lambda self, cause: [REMEDY] if cause.kind == "outlier_channels" else []),
    ),
    of_engine(
        "float on purpose", "pass", "a layer that there is not", "no layer 'nowhere'",
        step=does(lambda job: job.keep_float("nowhere", "why")),
    ),
    of_engine(
        "float on purpose", "target", "operators that it has not are left to float", "has no Gemm (1)",
        Brings(replace(NPU, rules=NPU.rules[:1], operators=frozenset({"Conv", "Relu", "Flatten", "MaxPool"}))),
        recipe={"target": "acme.npu"},
    ),
    of_engine("results", "pass", "a list", "it is a list", step=does(lambda job: [1])),
    of_engine("results", "pass", "a number of numpy", "such as int(n)", step=does(lambda job: {"n": np.int64(1)})),
    of_engine(
        "results", "pass", "a column of numpy numbers", "such as float(x)",
        step=does(lambda job: job.report.add_column("acme", {first(job).name: np.float32(1)})),
    ),
    of_engine(
        "results", "remedy", "one remedy, no list", "returns a Remedy where a list",
        plugin(onnxq_remedies=lambda self: REMEDY),
    ),
    of_kit("refusals", "pass", "no sentence", "check_plan", "one sentence on one line", does(raises("bad"))),
    of_kit(
        "refusals", "pass", "it crashes where there is no layer", "check_odd_graphs", "IndexError",
        does(lambda job: {"first": first(job).name}),
    ),
    of_kit(
        "refusals", "remedy", "a setting that there is not", "check_plugin_remedies", "is refused on model",
        proposes(Remedy("finer", ("ranges.methud=mse",))), plugins=(proposes(Remedy("finer", ("ranges.methud=mse",))),),
    ),
    of_kit(
        "refusals", "remedy", "it changes the job that it is asked about", "check_plugin_remedies", "changes the job",
        plugin(onnxq_remedies=changes_the_job), plugins=(plugin(onnxq_remedies=changes_the_job),),
    ),
    of_engine("structure", "pass", "an operator that there is not", "refuses: No Op registered", step=does(add_relu)),
    of_engine("structure", "pass", "sizes that do not fit", "cannot be loaded", step=does(add_product)),
    of_engine(
        "structure", "exporter", "a zero point that the target has not", "it has a zero point of 3",
        Brings(SYMMETRIC), plugin(onnxq_exporting=zero_point_of_3), recipe={"target": "acme.npu"},
    ),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.where}: {bug.bug}")
def test_a_planted_bug_is_caught_with_a_message_that_names_it(bug):
    said = bug.seen()
    assert bug.words in said and "\n" not in said


def table() -> str:
    """The bugs as the page shows them."""
    rows = [f"| {bug.rule} | {bug.where} | {bug.bug} | {bug.by} | {bug.words} |" for bug in BUGS]
    return "\n".join(["| rule | in a | planted bug | caught by | with the words |", f"|{'---|' * 5}", *rows])


def test_two_bugs_a_rule_in_passes_targets_and_remedies():
    rules = [bug.rule for bug in BUGS]
    assert all(rules.count(rule) >= 2 for rule in rules) and len({*rules}) >= 6
    assert {"pass", "target", "remedy", "exporter"} <= {bug.where for bug in BUGS}


def test_the_page_has_the_table():
    assert table() in PAGE.read_text("utf-8")


if __name__ == "__main__":
    print(table())
