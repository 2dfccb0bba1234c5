"""One plan, many runtimes: what was quantized once is written for any target."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins import files
from onnxq_plugins.calibration.branches import branches
from onnxq_plugins.engine.plans import Solved, is_plan, read_plan
from onnxq_plugins.engine.result import encoded, save
from onnxq_plugins.engine.retarget import Changes, retargeted
from onnxq_plugins.errors import PATH, SEVERAL, TEXT, Expected, OnnxqError, expects
from onnxq_plugins.export.compact import compact
from onnxq_plugins.export.provenance import sign_again
from onnxq_plugins.export.qdq import export
from onnxq_plugins.export.static import fix_shapes
from onnxq_plugins.graph.reading import read
from onnxq_plugins.job import Job, Outcome, Recipe, Report
from onnxq_plugins.laws import exporting
from onnxq_plugins.layers.branches import Inside
from onnxq_plugins.plugins import Plugins, find_plugins
from onnxq_plugins.recipe import Settings, apply_setting, parse, texts
from onnxq_plugins.report.summary import describe, set_size
from onnxq_plugins.runtimes.examples import SHAPES_KEY
from onnxq_plugins.spec import Plan
from onnxq_plugins.targets import Target
from onnxq_plugins.targets.refusals import missing_operators

_SOURCE: Expected = ((Outcome, Solved, str, Path), "a plan file, a QDQ model, or what quantize returns")


@dataclass(frozen=True, eq=False)
class Retargeted:
    """A network that was quantized before, for a target.

    model     the QDQ model
    target    what it is for
    plan      the solved plan; empty for a file that was a QDQ model already
    report    what became of the plan, as of the report of `quantize`; its entry ``changes`` counts entries by what was done
    """

    model: onnx.ModelProto
    target: Target
    plan: Plan
    report: Report

    @property
    def summary(self) -> str:
        """What is in it, and what became of the plan, in a line."""
        return " | ".join(filter(None, (self.report.get("summary", ""), self.changes)))

    @property
    def changes(self) -> str:
        """What became of the entries of the plan, in words."""
        return str(self.report.get("changed", ""))

    @expects(path=PATH)
    def save(self, path: str | Path) -> Path:
        """Write it in the target's format, whole or not at all."""
        path = save(self.target, self.model, Path(path))
        if "bytes" in self.report:
            set_size(self.report, path.stat().st_size)
        return path

    def to_bytes(self) -> bytes:
        """The file."""
        return encoded(self.target, self.model)

    def __repr__(self) -> str:
        return f"<Retargeted: for {self.target.name}, {self.summary}>"


@expects(source=_SOURCE, target=TEXT, output=PATH, settings=SEVERAL, plugins=SEVERAL)
def retarget(
    source: str | Path | Outcome | Solved,
    target: str,
    output: str | Path | None = None,
    *,
    settings: Settings = (),
    plugins: Iterable[object] = (),
) -> Retargeted:
    """Write what was quantized before for a target, without samples. Raises OnnxqError with all that the target cannot
    hold, before anything is written.

    source     a file of `Result.save_plan`; a QDQ model, for targets that only change the format; or a Result
    output     write the file here as well
    settings   of the target, such as ``target.acme.soc=3``
    plugins    further plugin objects beside the installed ones
    """
    start, installed = time.perf_counter(), find_plugins(plugins)
    if isinstance(source, (str, Path)) and not is_plan(Path(source)) and Path(source).suffix == ".onnx":
        made = _converted(Path(source), installed.target_of(_recipe({"target": target}, target, settings)))
    else:
        solved = source if isinstance(source, Solved) else _solved(source)
        made = _written(solved, _recipe(solved.recipe, target, settings), installed)
    made.report["seconds"] = round(time.perf_counter() - start, 3)
    if output is not None:
        made.save(output)
    return made


def _solved(source: str | Path | Outcome) -> Solved:
    return Solved.of(source) if isinstance(source, Outcome) else read_plan(Path(source))


def _recipe(table: Mapping[str, Any], target: str, settings: Settings) -> Recipe:
    """The recipe of a plan for another target. Its passes have run, and need not be installed here."""
    own = {key: value for key, value in table.items() if key != "pass"}
    old = own.get("target")
    own["target"] = {**old, "use": target} if isinstance(old, Mapping) else target
    problems: list[str] = []
    for setting in texts(settings, problems):
        if not setting.startswith("target."):
            problems.append(f"setting '{setting}': a plan is solved; only settings of targets, target.NAME.KEY, can change.")
        else:
            apply_setting(own, setting, problems)
    OnnxqError.check(problems)
    return parse(own, {}, "the plan's recipe")


def _written(solved: Solved, recipe: Recipe, plugins: Plugins) -> Retargeted:
    """The model of a plan for the target of a recipe."""
    target = plugins.target_of(recipe)
    job, changes = retargeted(solved, recipe, target)
    model = export(job.graph, job.plan, target)
    inner = _inside(solved, job, model, plugins, changes)
    compact(model, {node.name for node in job.graph.nodes}, solved.names, folds=target.here)
    model = exporting(plugins, job, model)
    values = {
        "onnxq.recipe": json.dumps({**solved.recipe, "target": recipe.to_dict()["target"]}, sort_keys=True),
        "onnxq.seed": str(solved.seed),
        "onnxq.versions": solved.versions,
    }
    if solved.open:
        values[SHAPES_KEY] = json.dumps(solved.open)
    sign_again(model, values)
    describe(job, model, None, solved.size, inner)
    if target.static:
        fix_shapes(model, solved.shapes, target.name)
        set_size(job.report, files.size_of(model))
    job.report |= {"recipe": json.loads(values["onnxq.recipe"]), "changes": dict(changes.counts), "changed": changes.text}
    return Retargeted(model, target, job.plan, job.report)


def _inside(solved: Solved, job: Job, model: onnx.ModelProto, plugins: Plugins, changes: Changes) -> Inside:
    """Write the plans of branches of an If, put them into a model, and count what became of their entries, too."""
    inside, target = Inside(), job.recipe.to_dict()["target"]
    for branch in branches(job.graph):
        inner = solved.inside.get((branch.node, branch.side))
        if inner is None:
            job.note(f"the plan has nothing of {branch.words}, which is written in float")
            continue
        table = {**{key: value for key, value in inner.recipe.items() if key != "pass"}, "target": target}
        try:
            made = _written(inner, parse(table, {}, "the plan's recipe"), plugins)
        except OnnxqError as error:
            job.note(f"{branch.words} stays float: {error}")
            continue
        inside.put(model, branch, made.model, made.report)
        changes.counts.update(made.report["changes"])
        for note in made.report.notes:
            job.note(f"{branch.words}: {note}")
    return inside


def _converted(path: Path, target: Target) -> Retargeted:
    """A QDQ model in the format of a target. Raises OnnxqError if that is what it is in, or the model is not quantized."""
    if target.write is None:
        raise OnnxqError(
            f"target '{target.name}' has no format of its own, so that '{path}' cannot be written for it; give the plan "
            "that onnxq quantize --save-plan writes."
        )
    model = read(path)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise OnnxqError(
            f"model '{path}' is not quantized, or all in float; quantize the float model with --target {target.name}."
        )
    OnnxqError.check(missing_operators(target, model))
    if target.static:
        shapes = next((p.value for p in model.metadata_props if p.key == SHAPES_KEY), "{}")
        fix_shapes(model, json.loads(shapes), target.name)
    return Retargeted(model, target, Plan(), Report(notes=[], changed="written as it is"))


def for_targets(solved: Solved, targets: Iterable[str], settings: Settings = ()) -> dict[str, Retargeted]:
    """`retarget` for several targets, all or none. Raises OnnxqError with the problems of all targets that fail."""
    made, problems = {}, []
    for name in targets:
        try:
            made[name] = retarget(solved, name, settings=settings)
        except OnnxqError as error:
            problems += [text if f"'{name}'" in text else f"target '{name}': {text}" for text in error.problems]
    OnnxqError.check(problems)
    return made
