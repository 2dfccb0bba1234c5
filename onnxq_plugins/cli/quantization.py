"""The command that makes a quantized model by a recipe: quantize."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from onnxq_plugins import runtimes
from onnxq_plugins.cli.console import echo, fail, float_lines, notify, show, track
from onnxq_plugins.cli.exporting import other_targets, target_names, target_paths, tell
from onnxq_plugins.cli.matrix import add_runtimes
from onnxq_plugins.cli.options import (
    ClassAxis,
    ClusterOptions,
    DataPath,
    Float32,
    GoalOptions,
    ImageOptions,
    Labels,
    MetricName,
    Model,
    OptionGroup,
    RecipeOptions,
    SampleCount,
    WorkOptions,
    check_outputs,
    output_option,
    search_option,
    work_option,
)
from onnxq_plugins.data import Data, DataOptions
from onnxq_plugins.engine import Result, quantize
from onnxq_plugins.engine.targets import Retargeted
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.export.compact import check_names
from onnxq_plugins.export.overrides import ort_model, ort_overrides
from onnxq_plugins.files import save_model, write_file
from onnxq_plugins.graph import load
from onnxq_plugins.job import Recipe
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.report.curve import Curve, check_folder, point_recipe
from onnxq_plugins.report.page import check_page, is_page, write_report

Point = Annotated[
    Path | None,
    search_option(
        "--plan",
        metavar="POINT",
        show_default=False,
        help="instead of a recipe: a point-NN.json that --curve wrote; makes that point without a search",
    ),
]


@dataclass(frozen=True)
class OutputOptions(OptionGroup):
    """What `quantize` writes."""

    output: Annotated[
        Path | None,
        output_option(
            "-o",
            "--output",
            show_default=False,
            help="the model, or a folder for several targets; ./MODEL.RECIPE.onnx by default",
        ),
    ] = None
    report: Annotated[
        Path | None,
        output_option(
            show_default=False,
            help="what was done, layer by layer: .html is a page that also measures the result, with .json beside it; .json "
            "is that alone",
        ),
    ] = None
    test: Annotated[
        str,
        output_option(
            metavar="PATH",
            show_default=False,
            help="samples to measure a --report page on (an .npz may hold 'labels'); --data by default, which flatters",
        ),
    ] = ""
    save_plan: Annotated[
        Path | None,
        output_option(
            metavar="FILE", show_default=False, help="the solved plan, which onnxq export writes for other targets later"
        ),
    ] = None
    overrides: Annotated[
        Path | None,
        output_option(
            show_default=False,
            help="the plan as JSON for onnxruntime's quantize_static, and beside it, as .onnx, the model it is for",
        ),
    ] = None
    curve: Annotated[
        Path | None,
        search_option(
            metavar="FOLDER",
            show_default=False,
            help="write the points that a search over widths measured, for --plan, and a plot",
        ),
    ] = None

    names: Annotated[
        str,
        output_option(
            help="of tensors inside the model: short, or keep the user's own; operators, inputs and outputs keep theirs"
        ),
    ] = "short"

    @property
    def page_numbers(self) -> Path | None:
        """The JSON file beside a report that is a page."""
        return self.report.with_suffix(".json") if self.report is not None and is_page(self.report) else None

    @property
    def overridden_model(self) -> Path | None:
        """The model beside the overrides."""
        return self.overrides.with_suffix(".onnx") if self.overrides is not None else None


def quantize_command(
    model: Model,
    *,
    data: DataPath = "",
    samples: SampleCount = 0,
    labels: Labels = None,
    images: ImageOptions,
    recipe: RecipeOptions,
    float32: Float32 = False,
    outputs: OutputOptions,
    metric: MetricName = "",
    goals: GoalOptions,
    class_axis: ClassAxis = None,
    point: Point = None,
    work: WorkOptions,
    cluster: ClusterOptions,
    verify: Annotated[bool, work_option("--verify", help="check that each pass keeps the float function")] = False,
    trace: Annotated[bool, work_option("--trace", help="show each hook call of a plugin")] = False,
) -> None:
    """Quantize MODEL into a QDQ model."""
    source, seed = _source(recipe, point, outputs.curve)
    settings = [*images.settings(), *(recipe.settings or [])]
    names = target_names(recipe.target)
    stem = f"{model.stem}.{(point or Path(recipe.recipe or 'int8')).stem}"
    several = target_paths(names, outputs.output, stem) if len(names) > 1 else {}
    path = next(iter(several.values())) if several else outputs.output or Path(f"{stem}{_suffix(names)}")
    _check_paths(outputs, {} if several else {"-o": path}, {"model": model, "data": Path(data), "plan": point})
    test = _check_extras(outputs, source, settings, data, model, float32)
    with cluster.backend():
        result = quantize(
            model,
            source,
            data or None,
            output=None if several else path,
            target=names[0] if names else None,
            seed=seed,
            samples=samples,
            workers=work.workers or None,
            cache=work.cache,
            verify=verify,
            float32=float32,
            settings=settings,
            exclude=recipe.exclude or (),
            labels=labels,
            metric=metric or None,
            min_sqnr=goals.min_sqnr,
            min_speed=goals.min_speed,
            keep=goals.keep,
            check=not goals.no_check,
            class_axis=class_axis,
            names=check_names(outputs.names),
            track=track,
            trace=notify if trace else None,
        )
    others = {} if result.missed and not goals.keep else other_targets(result, names[1:], several, outputs.save_plan)
    notes, lines = _write_extras(outputs, result, others, model.name, test, work.workers)
    for name, one in others.items():
        tell(one, several[name])
    _show_result(result, path, goals.keep, notes, lines)


def _suffix(names: Sequence[str]) -> str:
    """How the file for a target is called by default; that of a recipe is ONNX unless a target is named."""
    return find_plugins().target(names[0]).suffix if names else ".onnx"


def _show_result(result: Result, path: Path, keep: bool, notes: list[str], lines: list[str]) -> None:
    """Print what the user should know, and the result in a line; exit with 1 if it misses what was insisted on."""
    for note in [*result.report.notes, *notes]:
        notify(f"note: {note}")
    for line in float_lines(result.report.floats):
        notify(line)
    for text in result.report.warnings:
        notify(f"warning: {text}")
    written = "" if keep or not result.missed else " was not written"
    echo(f"{path}{written}: {result.summary} | {result.report['seconds']:.1f} s")
    for line in lines:
        echo(line)
    if result.missed:
        end = "the model was written all the same" if keep else "nothing was written (--keep writes it anyway)"
        fail(OnnxqError(f"{result.missed}; {end}."), 1)


def _source(options: RecipeOptions, point: Path | None, curve: Path | None) -> tuple[str | dict[str, Any], int]:
    """The recipe and the seed: from the options, or from a point of a curve."""
    if point is None:
        return options.source()
    for option, value in (("--recipe", options.recipe), ("--curve", curve)):
        if value:
            raise OnnxqError(f"--plan '{point}' makes one point by the recipe in it, with no search; leave {option} out.")
    return options.source(point_recipe(point))


def _check_paths(outputs: OutputOptions, models: dict[str, Path], inputs: dict[str, Path | None]) -> None:
    """Raise OnnxqError for files that cannot be written, before anything is done.

    models   by option
    """
    report = outputs.report
    if report is not None and not is_page(report) and report.suffix.lower() != ".json":
        raise OnnxqError(f"--report '{report}': a report is a page or JSON; give a name that ends in .html or .json.")
    check_outputs(
        {
            **models,
            "--save-plan": outputs.save_plan,
            "--report": report,
            "--report (its numbers)": outputs.page_numbers,
            "--overrides": outputs.overrides,
            "--overrides (its model)": outputs.overridden_model,
        },
        {**inputs, "test": Path(outputs.test) if outputs.test else None},
    )
    if outputs.test and outputs.page_numbers is None:
        raise OnnxqError(f"--test '{outputs.test}' is what a report page is measured on; give --report NAME.html, too.")


def _check_extras(
    outputs: OutputOptions, source: str | dict[str, Any], settings: list[str], data: str, model: Path, float32: bool
) -> Data | None:
    """Raise OnnxqError for a curve or page that this recipe and these samples cannot give. Returns the samples of --test."""
    if outputs.curve is None and outputs.page_numbers is None:
        return None  # the engine reads plugins and recipe itself, and broken plugins warn each time
    recipe = find_plugins().recipe(source, settings)
    if outputs.curve is not None:
        _check_curve(outputs.curve, recipe, str(source))
    if outputs.page_numbers is None:
        return None
    check_page()
    if not (outputs.test or data or recipe.data.path) and not recipe.provides("data"):
        raise OnnxqError(
            f"--report '{outputs.report}' measures the result on sample inputs, and there are none; give --data PATH, or a "
            "name that ends in .json."
        )
    return _open_test(model, outputs.test, recipe.data, float32) if outputs.test else None


def _check_curve(folder: Path, recipe: Recipe, name: str) -> None:
    check_folder(folder)
    if not any("curve" in step.provides and not getattr(step, "widths", None) for step in recipe.passes):
        raise OnnxqError(
            f"--curve: recipe '{name}' searches no widths; give one with the pass 'mixed-precision', such as -r mixed."
        )


def _open_test(model: Path, test: str, options: DataOptions, float32: bool) -> Data:
    """The samples of --test; the first one is checked."""
    options = replace(options, path="", samples=0, labels="")
    samples = runtimes.open_samples(test, load(model, float32=float32), options)
    samples.spread_labels(1)
    next(iter(samples))
    return samples


def _write_extras(
    outputs: OutputOptions,
    result: Result,
    others: Mapping[str, Retargeted],
    name: str,
    test: Data | None,
    workers: int,
) -> tuple[list[str], list[str]]:
    """Write the report, the curve and the overrides; print the curve. Returns notes, and a line about each.

    others   the result for further targets
    name     of the model's file
    """
    notes: list[str] = []
    lines: list[str] = []
    if outputs.report is not None:
        start = time.perf_counter()
        if is_page(outputs.report):
            add_runtimes(result, others, test, track)
        command = shlex.join(["onnxq", *sys.argv[1:]])
        write_report(result, outputs.report, test, name=name, command=command, workers=workers or None, track=track)
        numbers = f", {outputs.page_numbers}" if outputs.page_numbers else ""
        lines.append(f"report: {outputs.report}{numbers} ({time.perf_counter() - start:.1f} s)")
    if (curve := Curve.of(result, name)) is not None:
        _show_curve(curve)
        if outputs.curve is not None:
            notes += curve.write(outputs.curve)
            lines.append(f"curve: {counted(len(curve.points), 'point')} for --plan in {outputs.curve}")
    if outputs.overrides is not None and outputs.overridden_model is not None:
        table = ort_overrides(result)
        save_model(ort_model(result), outputs.overridden_model)
        content = json.dumps({"model": outputs.overridden_model.name, **table}, indent=2) + "\n"
        write_file(content.encode(), outputs.overrides)
        notes += [f"overrides: {note}" for note in table["notes"]]
        lines.append(f"overrides: {outputs.overrides}, for {outputs.overridden_model}")
    return notes, lines


def _show_curve(curve: Curve) -> None:
    """Print the measured points as a table."""
    columns, rows = curve.table()
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row, style="bold" if row[-1] else None)
    show(table)
    echo(
        "size (bits), file (as stored: codes of 5 to 7 bits take a byte) and bops are relative to 8-bit weights and "
        "activations; the other columns count groups\n"
    )
