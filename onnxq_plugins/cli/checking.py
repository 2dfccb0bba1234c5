"""The command that says whether a recipe fits a model, and whether what it makes keeps limits: check."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Annotated, Any

import onnx
import typer

from onnxq_plugins import runtimes
from onnxq_plugins.cli.comparing import CompareMetric, Judged, judged
from onnxq_plugins.cli.console import echo, float_lines, notify, track
from onnxq_plugins.cli.inventory import constant_lines
from onnxq_plugins.cli.limits import LimitOptions
from onnxq_plugins.cli.options import (
    ClassAxis,
    CustomOps,
    DataPath,
    ImageOptions,
    Labels,
    SampleCount,
    Settings,
    ShapeList,
    TargetName,
    data_option,
    read_shapes,
)
from onnxq_plugins.data import DataOptions, model_inputs, open_data
from onnxq_plugins.engine import Result, quantize
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.graph import load
from onnxq_plugins.graph.conform import conform
from onnxq_plugins.graph.reading import read
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.metrics import find_metric
from onnxq_plugins.plan import requests
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.runtimes.examples import Shapes, examples, first_running, written
from onnxq_plugins.targets.refusals import problems, unheld


def check_command(
    recipe: Annotated[str, typer.Argument(help="a built-in recipe or a file; a model alone means int8", show_default=False)],
    model: Annotated[
        Path | None, typer.Argument(help="also check that the recipe fits this model", show_default=False)
    ] = None,
    *,
    target: TargetName = "",
    settings: Settings = None,
    data: DataPath = "",
    samples: SampleCount = 0,
    labels: Labels = None,
    test: Annotated[
        str,
        data_option(metavar="PATH", show_default=False, help="samples for the limits; --data by default, which flatters"),
    ] = "",
    images: ImageOptions,
    shape: ShapeList = None,
    metric: CompareMetric = "",
    class_axis: ClassAxis = None,
    limits: LimitOptions,
    custom_ops: CustomOps = None,
) -> None:
    """Check a recipe, whether it fits a model, and whether the model runs on the first sample, without quantizing.

    With limits also whether what it makes of the model keeps them: the model is quantized, measured and thrown away.
    """
    if model is None and Path(recipe).suffix in (".onnx", ".tflite", ".plan"):
        recipe, model = "int8", Path(recipe)
    if limits.given and (model is None or not data):
        raise OnnxqError("limits are for a model that is quantized and measured; give a model and --data.")
    if not limits.given and (unused := _unused(samples, labels, test, metric, class_axis, limits)):
        raise OnnxqError(f"{unused} is for limits; give --min-sqnr, --max-drop or --min-speed, or leave it out.")
    limits.check_files({"model": model, "data": Path(data) if data else None, "test": Path(test) if test else None})
    judge = find_metric(metric) if metric else None
    changes = [*images.settings(), *(settings or ())]
    found = _fit(recipe, model, [*changes, *([f"target={target}"] if target else [])], limits.as_json)
    if model is None:
        limits.tell(recipe, [], found)
        return
    if not limits.given:
        if data or shape:
            found["runs"] = _check_feed(read(model), model, data, images, read_shapes(shape), limits.as_json)
        limits.tell(model.name, [], found)
        return
    measured, result = _measured(
        (model, recipe, data, test), changes, target, samples, labels, images.data_options(), judge, class_axis
    )
    kept = limits.judged(measured.sqnr, measured.drop, measured.speed)
    notes = [] if test else ["measured on the samples that it was calibrated with, which flatters; give --test PATH"]
    for note in [*result.report.notes, *notes]:
        notify(f"note: {note}")
    if not limits.as_json:
        echo(result.summary)
        measured.show()
    limits.tell(model.name, kept, {**found, **measured.to_dict(), "summary": result.summary})


def _measured(
    given: tuple[Path, str, str, str],
    settings: list[str],
    target: str,
    samples: int,
    labels: Path | None,
    options: DataOptions,
    judge: Metric | None,
    class_axis: int | None,
) -> tuple[Judged, Result]:
    """What a recipe makes of a model, measured.

    given     model, recipe, samples, and samples to measure on ("" for the same)
    labels    of the samples that it is measured on
    options   of these
    """
    model, recipe, data, test = given
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / f"{model.stem}.quantized.onnx"
        result = quantize(
            model,
            recipe,
            data,
            output=made,
            target=target or None,
            samples=samples,
            settings=settings,
            labels=None if test else labels,
            class_axis=class_axis,
            check=False,
            track=track,
        )
        return judged((model, made), test or data, options, labels, judge, class_axis), result


def _unused(samples: int, labels: Path | None, test: str, metric: str, class_axis: int | None, limits: LimitOptions) -> str:
    """The first option that says nothing without limits; "" if there is none."""
    given = {
        "--samples": samples,
        "--labels": labels,
        "--test": test,
        "--metric": metric,
        "--class-axis": class_axis is not None,
        "--junit": limits.junit,
        "--markdown": limits.markdown,
    }
    return next((option for option, value in given.items() if value), "")


def _fit(recipe: str, model: Path | None, settings: list[str], quiet: bool) -> dict[str, Any]:
    """Say what a recipe is, and what it quantizes of a model. Raises OnnxqError where it does not fit."""
    plugins = find_plugins()
    parsed = plugins.recipe(recipe, settings)
    runtime = plugins.target_of(parsed)
    names = [step.name for step in parsed.passes]
    lines = [f"recipe '{recipe}' is valid: target {parsed.target}, passes: {', '.join(names) or 'none'}"]
    found: dict[str, Any] = {"recipe": recipe, "target": parsed.target, "passes": names}
    if model is not None:
        graph = conform(load(model, flatten=runtime.flatten), runtime.operators, runtime.whole)
        request = requests.request(graph, parsed, runtime)
        OnnxqError.check([*unheld(runtime, graph), *problems(runtime, graph, request.plan, request.inputs)])
        runtimes.session(model, optimize=False)  # raises what onnxruntime has against it
        planned = sum(layer.weight in request.plan for layer in graph.layers)
        lines += [*float_lines(request.floats), *constant_lines(request.constants)]
        lines.append(f"it quantizes {planned} of {counted(len(graph.layers), 'layer')} of '{model}'")
        floats = {name: str(reason) for name, reason in request.floats.items()}
        found |= {"model": str(model), "layers": len(graph.layers), "quantized": planned, "float": floats}
    if not quiet:
        for line in lines:
            echo(line)
    return found


def _check_feed(
    proto: onnx.ModelProto, model: Path, data: str, images: ImageOptions, shapes: Shapes | None, quiet: bool
) -> str:
    """Say whether a model runs on the first sample, or on random numbers of some shapes. Returns the shapes in words, "" if
    it does not run."""
    session = runtimes.session(model, optimize=False)
    feeds = runtimes.rolled(open_data(data, model_inputs(proto), images.data_options()), lambda: session) if data else None
    try:
        feed = first_running(itertools.islice(feeds, 1) if feeds is not None else examples([proto], shapes), [session])
    except OnnxqError as error:
        notify(f"note: the model does not run {error}" if feeds is None else f"note: {error}")
        return ""
    if not quiet:
        echo(f"it runs on {written(feed)}")
    return str(written(feed))
