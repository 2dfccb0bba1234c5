"""What passes add to reports, and what reports say of the network as the last pass leaves it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, Pass, hookimpl, quantize
from onnxq_plugins.errors import Reason
from tests.targets.test_hardware import NPU, Brings
from tests.zoo import cnn, feeds, mlp

NASTY = "</script><script>alert(1)</script>"


def guest(body, name="acme.told"):
    """A plugin with one pass that calls a function of the job."""

    @dataclass(frozen=True)
    class Told(Pass):
        """Tells."""

        name: ClassVar[str] = ""

        def apply(self, job):
            return body(job)

    Told.name = name

    class Brought:
        @hookimpl
        def onnxq_passes(self):
            return [Told]

    return Brought()


def made(body, model=None, recipe=(), **options):
    model = cnn() if model is None else model
    steps = {"pass": [{"use": "acme.told"}, {"use": "ranges"}]}
    options = {"plugins": [guest(body)], "workers": 1, "check": False, **options}
    return quantize(model, {**steps, **dict(recipe)}, feeds(model, 4), **options)


def tells(job):
    layers = job.graph.layers
    job.report.add_column("acme loss", {y.name: 0.25 * n for n, y in enumerate(layers)})
    job.report.add_column("acme word", {layers[0].name: NASTY, "gone": "nowhere"})
    job.report.add_section("What acme saw", f"It saw {NASTY}.", ["layer", "sum"], [[y.name, 3] for y in layers[:2]])


def test_columns_and_sections_are_in_report_page_and_json(tmp_path):
    result = made(tells)
    rows = {row["name"]: row for row in result.report.layers}
    assert [row["acme loss"] for row in rows.values()] == [0, 0.25, 0.5]
    assert result.report.columns == ["acme loss", "acme word"] and "gone" not in json.dumps(result.report)
    assert result.report.sections[0]["rows"] == [[name, 3] for name in [*rows][:2]]
    assert "acme loss" in result._repr_html_() and "<script>" not in result._repr_html_()
    page = result.save_report(tmp_path / "r.html").read_text()
    assert "<h2>What acme saw</h2>" in page and ">acme loss</th>" in page and ">0.25</td>" in page
    assert NASTY not in page and page.count("alert(1)") == 2  # once a cell, once the paragraph
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["sections"][0]["title"] == "What acme saw" and told["layers"][1]["acme loss"] == 0.25


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.add_column("kernel", {}), "ValueError.*a column cannot be named 'kernel'"),
        (
            lambda r: r.add_column("a", {"conv0": np.float32(1)}),
            r"TypeError.*layer 'conv0': .*such as float\(x\)",
        ),
        (lambda r: r.add_column("a", {"conv0": float("nan")}), "is no plain value"),
        (lambda r: r.add_column("a", {"conv0": [1]}), "is no plain value"),
        (lambda r: r.add_section("s", "", ["a"], [[1, 2]]), "ValueError.*section 's' has 1 columns, and a row of 2 values"),
        (lambda r: r.add_section("s", "", ["a"], [[None]]), "section 's': None is no plain value"),
    ],
)
def test_what_no_table_holds_is_told_with_the_pass(call, words):
    with pytest.raises(OnnxqError, match=rf"pass 'acme\.told' fails with .*{words}"):
        made(lambda job: call(job.report))


# ---- as the last pass leaves it -------------------------------------------------------------------------------------------


def drops(job):
    job.plan = job.plan.without(job.graph.layers[0].weight)


def test_a_layer_that_a_pass_takes_out_of_the_plan_is_named():
    result = made(drops)
    (reason,) = [reason for name, reason in result.report.floats.items() if name == result.graph.layers[0].name]
    assert "the passes left its weight out" in reason and reason.kind == "unquantized"
    assert result.report.layers[0]["why_float"] == reason


def plans_again(job):
    layer, other = job.graph.layers[-1], job.graph.layers[0]
    assert job.report.floats[layer.name].kind == "recipe"
    job.plan |= {layer.weight: job.request_for(other), layer.input: next(s for n, s in job.plan.items() if n == other.input)}


def test_a_layer_that_a_pass_quantizes_after_all_is_not_named():
    result = made(plans_again, mlp(), {"layer": [{"position": "last", "quantize": False}]})
    assert not result.report.floats and "3/3 Gemm" in result.summary
    assert all("why_float" not in row for row in result.report.layers)


def splits(job):
    layer = job.graph.layers[0]
    half = layer.channels // 2
    job.report.floats[layer.name] = Reason("search", "for now")
    job.split(layer, [np.arange(half), np.arange(half, layer.channels)])


def test_what_is_gone_is_not_named_and_counts_are_of_what_is_there():
    target = replace(NPU, rules=tuple(replace(rule, granularity=("tensor",)) for rule in NPU.rules))
    plugins: list[Any] = [guest(splits), Brings(target)]
    recipe = {"target": target.name, "pass": [{"use": "acme.told"}, {"use": "ranges"}]}
    result = quantize(cnn(), recipe, feeds(cnn(), 4), plugins=plugins, workers=1, check=False)
    assert len(result.graph.layers) == 4 and not result.report.floats
    (note,) = [note for note in result.report.notes if "one scale for the weight" in note]
    assert "in 4 layers" in note


def test_a_plan_that_passes_leave_empty_is_told():
    def nothing(job):
        job.plan = job.plan.without(*(name for name in job.plan))

    assert "no layer is quantized" in made(nothing).report.notes
    assert "no layer is quantized" not in made(lambda job: None).report.notes
