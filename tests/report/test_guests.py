"""A guest's pass is believed as a built-in's is: by what it declares, never by its name. Each guest has a twin that does the
same and declares nothing; every assertion tells the two apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxq_plugins import Pass, Plan, cli, hookimpl, plugins, quantize
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.errors import Reason
from onnxq_plugins.job import Job, Recipe, Service, Stage
from onnxq_plugins.passes import BiasCorrect, DataFree, Equalize, Round
from onnxq_plugins.report.curve import Curve, point_recipe
from onnxq_plugins.report.diagnosis import diagnose
from onnxq_plugins.report.remedies import Remedy, Scene, codes_by_error, ranges_by
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.targets.ort_cpu import ORT_CPU
from tests.zoo import Net, feeds


@dataclass(frozen=True)
class PlainBias(Pass):
    """Corrects biases, of all layers but one."""

    name: ClassVar[str] = "plain.bias"
    skip: str = ""

    def apply(self, job: Job) -> dict[str, Any]:
        result = BiasCorrect().apply(job)
        skipped = [y.weight for y in job.graph.layers if y.name == self.skip]
        job.plan |= {weight: replace(job.plan[weight], shift=None) for weight in skipped}
        return result


@dataclass(frozen=True)
class GuestBias(PlainBias):
    name: ClassVar[str] = "guest.bias"
    stage: ClassVar[Stage] = "finish"
    provides: ClassVar[frozenset[Service]] = frozenset({"bias"})


@dataclass(frozen=True)
class PlainData(Pass):
    """Makes calibration data."""

    name: ClassVar[str] = "plain.data"

    def apply(self, job: Job) -> dict[str, Any]:
        return DataFree(source="noise", samples=4, inputs={"x": [-1, 1]}).apply(job)


@dataclass(frozen=True)
class GuestData(PlainData):
    name: ClassVar[str] = "guest.data"
    stage: ClassVar[Stage] = "rewrite"
    provides: ClassVar[frozenset[Service]] = frozenset({"data"})


@dataclass(frozen=True)
class PlainSearch(Pass):
    """Tries one width for all weights after the other, and keeps the last, or the given ones; "float" leaves a layer float
    for a reason of this kind."""

    name: ClassVar[str] = "plain.search"
    widths: Mapping[str, str] = field(default_factory=dict, hash=False)
    reason: Literal["search", "unquantized"] = "search"

    def apply(self, job: Job) -> dict[str, Any]:
        layers = [y for y in job.graph.layers if y.weight in job.plan]
        points = [
            {"size": bits / 8, "sqnr": 6.0 * bits, "widths": {y.name: f"W{bits}A8" for y in layers}} for bits in (8, 4)
        ]
        points[-1]["chosen"] = True
        for y in layers:
            width = {**points[-1]["widths"], **self.widths}[y.name]
            if width == "float":
                job.plan = job.plan.without(y.weight)
                job.report.floats[y.name] = Reason(self.reason, "its width is float")
            else:
                job.plan |= {y.weight: replace(job.plan[y.weight], bits=int(width[1]))}
        return {} if self.widths else {"cost": "size", "curve": points}


@dataclass(frozen=True)
class GuestSearch(PlainSearch):
    name: ClassVar[str] = "guest.search"
    provides: ClassVar[frozenset[Service]] = frozenset({"curve"})


class Guests:
    """The plugin."""

    @hookimpl
    def onnxq_passes(self) -> list[type[Pass]]:
        return [PlainBias, GuestBias, PlainData, GuestData, PlainSearch, GuestSearch]


def twins(guest: type[Pass], plain: type[Pass]) -> pytest.MarkDecorator:
    """A test runs with both: the pass, and whether it declares what it does."""
    return pytest.mark.parametrize(("kind", "declared"), [(guest, True), (plain, False)], ids=["guest", "twin"])


def chain() -> onnx.ModelProto:
    """Three layers; all weights of conv2 round the same way."""
    net = Net(["N", 3, 8, 8], 0)
    x = net.op("Relu", net.conv("x", 3, 16))
    x = net.op("Relu", net.conv(x, 16, 16))
    model = net.model(net.gemm(net.op("Flatten", x), 16 * 64, 10), opset=21)
    name = next(node for node in model.graph.node if node.name == "conv2").input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    weight = np.rint(numpy_helper.to_array(tensor) * 3) / 3 + 0.07
    weight[:, 0, 0, 0] = 7  # codes of 1 / 18
    tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), name))
    return model


def run(model: onnx.ModelProto, *steps: Pass, **options: Any):
    return quantize(model, Recipe(passes=steps), feeds(model, 8), plugins=[Guests()], workers=1, **options)


@pytest.fixture
def onnxq(monkeypatch, tmp_path, capsys):
    """The command line in a folder with model.onnx and data.npz, the guests installed: (exit code, standard error)."""
    point = SimpleNamespace(name="guests", dist=None, load=Guests)
    monkeypatch.setattr(plugins, "entry_points", lambda group: (point,))
    monkeypatch.chdir(tmp_path)
    onnx.save(chain(), "model.onnx")
    np.savez("data.npz", x=np.concatenate([feed["x"] for feed in feeds(chain(), 4)]))

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["onnxq", "quantize", "model.onnx", "-o", "out.onnx", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


# ---- biases ---------------------------------------------------------------------------------------------------------------


@twins(GuestBias, PlainBias)
def test_no_second_bias_correction_is_suggested(kind, declared):
    diagnosis = diagnose(run(chain(), kind(skip="conv2")), samples=4)
    causes = {cause.kind: cause for y in diagnosis.layers if y.name == "conv2" for cause in y.causes}
    steps = [step.name for remedy in causes["mean-error"].remedies for step in remedy.passes]
    assert ("bias-correct" in steps) != declared


@twins(GuestBias, PlainBias)
def test_equalization_is_judged_with_corrected_biases(kind, declared):
    """By `Judge`, as if the recipe had bias-correct; the same open plan for both, so that only the recipe differs."""
    scores = {}
    for step in (kind(), BiasCorrect()):
        result = run(chain(), step)
        plan = Plan({name: spec.request() for name, spec in result.plan.items()})
        calibration = Calibration(result.graph, result.data, workers=1)
        job = Job(result.graph, plan, calibration, result.target, result.recipe, np.random.default_rng(0))
        scores[step.name] = Judge.of(job, apart=False).sqnr(job.plan)
    assert (scores[kind.name] == scores["bias-correct"]) == declared


# ---- stages ---------------------------------------------------------------------------------------------------------------


@twins(GuestBias, PlainBias)
def test_a_remedy_goes_before_a_pass_that_finishes(kind, declared):
    steps = Remedy("", passes=(Round(),)).on(Recipe(passes=(kind(),))).passes
    assert [step.name for step in steps] == (["round", kind.name] if declared else [kind.name, "round"])


@twins(GuestData, PlainData)
def test_a_remedy_that_rewrites_goes_after_other_rewrites(kind, declared):
    steps = Remedy("", passes=(Equalize(),)).on(Recipe(passes=(kind(),))).passes
    assert [step.name for step in steps] == ([kind.name, "equalize"] if declared else ["equalize", kind.name])


# ---- data -----------------------------------------------------------------------------------------------------------------


@twins(GuestData, PlainData)
def test_a_page_needs_no_data_beside_a_pass_that_makes_some(kind, declared, onnxq):
    Path("recipe.toml").write_text(f'[[pass]]\nuse = "{kind.name}"\n')
    code, error = onnxq("-r", "recipe.toml", "--report", "page.html")
    assert (code == 0) == declared and Path("page.html").exists() == declared
    assert ("give --data" in error) != declared


# ---- searches -------------------------------------------------------------------------------------------------------------


@twins(GuestSearch, PlainSearch)
def test_a_search_writes_points_that_can_be_made_again(kind, declared, onnxq):
    Path("recipe.toml").write_text(f'[[pass]]\nuse = "{kind.name}"\n')
    code, error = onnxq("-r", "recipe.toml", "--data", "data.npz", "--curve", "points")
    assert (code == 0) == declared and Path("points").exists() == declared
    assert ("searches no widths" in error) != declared
    if declared:
        assert json.loads(Path("points/point-01.json").read_text())["pass"] == kind.name
        assert onnxq("--plan", "points/point-01.json", "--data", "data.npz")[0] == 0


def test_the_curve_of_a_guest():
    model = chain()
    result = run(model, GuestSearch())
    curve = Curve.of(result, "model.onnx")
    assert curve is not None and curve.step == "guest.search" and [point["size"] for point in curve.points] == [1.0, 0.5]
    files, _ = curve.files()
    bits = {}
    for number in (1, 2):
        recipe, seed = point_recipe(json.loads(files[f"point-{number:02}.json"]))
        again = quantize(model, recipe, feeds(model, 8), seed=seed, plugins=[Guests()], workers=1)
        assert Curve.of(again) is None
        bits[number] = {again.plan[y.weight].bits for y in again.graph.layers}
    assert bits == {1: {8}, 2: {4}}


@pytest.mark.parametrize("reason", ["search", "unquantized"])
def test_what_a_search_left_float_stays_float(reason):
    diagnosis = diagnose(run(chain(), GuestSearch(widths={"gemm5": "float"}, reason=reason)), samples=2)
    (layer,) = [y for y in diagnosis.floats if y.name == "gemm5"]
    assert layer.why == "its width is float" and bool(layer.remedies) == (reason != "search")


# ---- ranges and codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provided", ["ranges", "codes"])
def test_no_second_pass_for_ranges_or_codes_is_suggested(provided):
    class Solver(PlainBias):
        name = "guest.solver"
        provides = frozenset({provided})

    scene = Scene(ORT_CPU, Recipe(passes=(Solver(),)))
    assert bool(ranges_by("mse", scene, "")) == (provided != "ranges")
    assert bool(codes_by_error(scene, "")) == (provided != "codes")
