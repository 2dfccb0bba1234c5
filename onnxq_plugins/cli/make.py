"""Commands that write a quantized model: quantize, auto."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from onnxq_plugins.cli.console import command, complain, err, float_lines, say, show, tell, track
from onnxq_plugins.cli.options import (
    Crop,
    DataPath,
    Labels,
    Layout,
    Mean,
    MetricName,
    Model,
    Output,
    Resize,
    Samples,
    Settings,
    Std,
    TargetName,
    check_outputs,
    image_settings,
    spread_over,
)
from onnxq_plugins.data import Data, DataOptions, graph_inputs, open_data
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.export.overrides import ort_model, ort_overrides
from onnxq_plugins.files import save_model, write_file
from onnxq_plugins.graph import load
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.report.curve import Curve, check_folder, point_recipe
from onnxq_plugins.report.page import check_page, is_page, write_report
from onnxq_plugins.selection import RECIPES, auto
from onnxq_plugins.selection import Trial as AutoTrial


@command("quantize")
def quantize_command(
    model: Model,
    output: Output = None,
    recipe: Annotated[
        str, typer.Option("-r", "--recipe", show_default="int8", help="a built-in recipe (see onnxq recipes) or a file")
    ] = "",
    data: DataPath = "",
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="POINT",
            help=("instead of a recipe: a point-NN.json that --curve wrote; makes that point without a search"),
        ),
    ] = None,
    samples: Samples = 0,
    resize: Resize = 0,
    crop: Crop = 0,
    mean: Mean = "",
    std: Std = "",
    layout: Layout = "",
    set_: Settings = None,
    target: TargetName = "",
    seed: Annotated[int | None, typer.Option(show_default="0", help="one seed, one result; of --plan if not given")] = None,
    workers: Annotated[int, typer.Option(help="threads and processes at once; 0 for one per core")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps calibration results between runs")] = None,
    labels: Labels = None,
    metric: MetricName = "",
    dask: Annotated[
        str,
        typer.Option(
            "--dask",
            metavar="ADDRESS",
            show_default=False,
            help=("spread the work over a Dask cluster, such as tcp://host:8786"),
        ),
    ] = "",
    processes: Annotated[bool, typer.Option("--processes", help="workers are processes, not threads")] = False,
    float32: Annotated[bool, typer.Option("--float32", help="convert an fp16 or bf16 model to float32 first")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check after each pass that the float function stayed")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="show each hook call of a plugin")] = False,
    test: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help=("samples to measure the --report on, as --data, which flatters: an .npz may hold 'labels', too"),
        ),
    ] = "",
    report: Annotated[
        Path | None,
        typer.Option(
            help=(
                "write what was done, layer by layer: .html measures the result and gives a page, with the same as .json "
                "beside it; .json gives that alone"
            )
        ),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help=("write the points that a search over widths measured, for --plan, and a drawing")
        ),
    ] = None,
    overrides: Annotated[
        Path | None,
        typer.Option(
            help=("write the plan for onnxruntime's quantize_static as JSON, and beside it, as .onnx, the model it is for")
        ),
    ] = None,
) -> None:
    """Quantize MODEL into a QDQ model."""
    asked: str | dict[str, Any] = recipe or "int8"
    if plan is not None:
        for option, given in (("--recipe", recipe), ("--curve", curve)):
            if given:
                raise OnnxqError(f"--plan '{plan}' makes one point by the recipe in it, with no search; leave {option} out.")
        asked, kept = point_recipe(plan)
        seed = kept if seed is None else seed
    settings = [*image_settings(resize, crop, mean, std, layout), *(set_ or [])]
    target_path = output or Path(f"{model.stem}.{(plan or Path(recipe or 'int8')).stem}.onnx")
    if report is not None and not is_page(report) and report.suffix.lower() != ".json":
        raise OnnxqError(f"--report '{report}': a report is a page or JSON; give a name that ends in .html or .json.")
    float_path = overrides.with_suffix(".onnx") if overrides is not None else None
    beside = report.with_suffix(".json") if report is not None and is_page(report) else None
    check_outputs(
        {
            "-o": target_path,
            "--report": report,
            "--report (its numbers)": beside,
            "--overrides": overrides,
            "--overrides (its model)": float_path,
        },
        {"model": model, "data": Path(data), "plan": plan, "test": Path(test) if test else None},
    )
    if test and beside is None:
        raise OnnxqError(f"--test '{test}' is what a report page is measured on; give --report NAME.html, too.")
    # read once more than the engine does only where an option depends on it: broken plugins warn each time
    made = find_plugins().recipe(asked, settings) if curve is not None or beside is not None else None
    if curve is not None and made is not None:
        check_folder(curve)
        if not any("curve" in step.provides and not getattr(step, "widths", None) for step in made.passes):
            raise OnnxqError(
                f"--curve: recipe '{recipe or 'int8'}' searches no widths; give one with the pass "
                "'mixed-precision', such as -r mixed."
            )
    tested = None
    if beside is not None and made is not None:
        check_page()
        if not (test or data or made.data.path) and not made.provides("data"):
            raise OnnxqError(
                f"--report '{report}' measures the result on sample inputs, and there are none; give --data "
                "PATH, or a name that ends in .json."
            )
        tested = _tested(model, test, made.data, float32) if test else None
    with spread_over(dask, processes):
        result = quantize(
            model,
            asked,
            data or None,
            output=target_path,
            target=target or None,
            seed=seed or 0,
            samples=samples,
            workers=workers or None,
            cache=cache,
            verify=verify,
            float32=float32,
            settings=settings,
            labels=labels,
            metric=metric or None,
            track=track,
            trace=tell if trace else None,
        )
    notes, wrote = list(result.report.notes), []
    if report is not None:
        start = time.perf_counter()
        write_report(
            result,
            report,
            tested,
            name=model.name,
            command=shlex.join(["onnxq", *sys.argv[1:]]),
            workers=workers or None,
            track=track,
        )
        wrote.append(f"report: {report}{f', {beside}' if beside else ''} ({time.perf_counter() - start:.1f} s)")
    if (found := Curve.of(result, model.name)) is not None:
        _show_curve(found)
        if curve is not None:
            notes += found.write(curve)
            wrote.append(f"curve: {len(found.points)} points for --plan in {curve}")
    if overrides is not None and float_path is not None:
        told = ort_overrides(result)
        save_model(ort_model(result), float_path)
        write_file((json.dumps({"model": float_path.name, **told}, indent=2) + "\n").encode(), overrides)
        notes += [f"overrides: {note}" for note in told["notes"]]
        wrote.append(f"overrides: {overrides}, for {float_path}")
    for note in notes:
        tell(f"note: {note}")
    for line in float_lines(result.report.floats):
        tell(line)
    say(f"{target_path}: {result.summary} | {result.report['seconds']:.1f} s")
    for line in wrote:
        say(line)


def _tested(model: Path, test: str, options: DataOptions, float32: bool) -> Data:
    """The samples of --test, looked at before anything is made."""
    found = open_data(test, graph_inputs(load(model, float32=float32)), replace(options, path="", samples=0, labels=""))
    found.spread_labels(1)
    next(iter(found))
    return found


@command("auto")
def auto_command(
    model: Model,
    data: DataPath,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", show_default=False, help=("where to write; MODEL.auto.onnx in this folder if not given")
        ),
    ] = None,
    max_drop: Annotated[float, typer.Option(help="how far the metric may fall: percent of samples, mostly")] = 1.0,
    prefer: Annotated[str, typer.Option(help="speed or size")] = "speed",
    test: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            show_default=False,
            help=("samples to judge by, as --data; every second one of --data if not given"),
        ),
    ] = "",
    labels: Labels = None,
    metric: MetricName = "",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "-r",
            "--recipe",
            show_default=False,
            help=("try these instead of the built-in choice; may be given several times"),
        ),
    ] = None,
    resize: Resize = 0,
    crop: Crop = 0,
    mean: Mean = "",
    std: Std = "",
    layout: Layout = "",
    target: TargetName = "",
    seed: Annotated[int, typer.Option(help="one seed, one result")] = 0,
    workers: Annotated[int, typer.Option(help="threads and processes at once; 0 for one per core")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps calibration results between runs")] = None,
    float32: Annotated[bool, typer.Option("--float32", help="convert an fp16 or bf16 model to float32 first")] = False,
) -> None:
    """Try recipes on MODEL from cheap to costly, measure each, and keep the best within a drop of accuracy."""
    target_path = output or Path(f"{model.stem}.auto.onnx")
    check_outputs({"-o": target_path}, {"model": model, "data": Path(data), "test": Path(test) if test else None})
    if prefer not in RECIPES:
        raise OnnxqError(f"--prefer {prefer} is unknown; {known(prefer, RECIPES)}.")
    columns = ("recipe", "drop", "SQNR dB", "size", "x float", "seconds", "")
    wide = max(len(name) for name in recipe or RECIPES[prefer])

    def progress(trial: AutoTrial) -> None:
        if err.is_terminal:  # where somebody waits; the table tells the same
            tell(f"{trial.recipe:{wide}}  {_auto_line(trial)}")

    found = auto(
        model,
        data,
        max_drop=max_drop,
        prefer=prefer,
        test=test or None,
        labels=labels,
        metric=metric or None,
        recipes=recipe or (),
        target=target or None,
        seed=seed,
        workers=workers or None,
        cache=cache,
        float32=float32,
        options=load_recipe({}, {}, image_settings(resize, crop, mean, std, layout)).data,
        track=track,
        tell=progress,
    )
    found.result.save(target_path)
    table = Table(*columns, box=None, header_style="bold")
    for trial in found.trials:
        kept = trial is found.best
        cells = (
            ["-"] * 5
            if trial.why
            else [f"{trial.drop:.2f}", f"{trial.sqnr:.1f}", _size(trial.size), f"{trial.speed:.2f}", f"{trial.seconds:.1f}"]
        )
        table.add_row(trial.recipe, *cells, "kept" if kept else "", style="bold" if kept else None)
    show(table)
    better = " (below 0: better than float on these samples)" if any(trial.drop < 0 for trial in found.trials) else ""
    say(
        f"drop{better} is of {found.metric} (float: {found.reference:.2f}); x float is the speed in onnxruntime, batch 1, 1 "
        "thread"
    )
    for note in found.notes:
        tell(f"note: {note}")
    for trial in found.trials:
        if trial.why:
            tell(f"note: recipe '{trial.recipe}' is not possible: {trial.why}")
    say(f"{target_path}: {found.result.summary}")
    if not found.met:
        complain(
            OnnxqError(
                f"no recipe stays within a drop of {max_drop:g}; the most accurate one was written. Raise "
                "--max-drop, or look at onnxq diagnose."
            ),
            1,
        )


def _show_curve(curve: Curve) -> None:
    """The measured points as a table."""
    columns, rows = curve.table()
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row, style="bold" if row[-1] else None)
    show(table)
    say(
        "size (bits), file (as stored: codes of 5 to 7 bits take a byte) and bops in parts of 8-bit weights and "
        "activations; the other columns count groups\n"
    )


def _auto_line(trial: AutoTrial) -> str:
    """What a recipe gave, in a line."""
    if trial.why:
        return f"not possible: {trial.why}"
    return (
        f"drop {trial.drop:.2f}, {trial.sqnr:.1f} dB, {_size(trial.size)}, {trial.speed:.2f} x float, {trial.seconds:.1f} s"
    )


def _size(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
