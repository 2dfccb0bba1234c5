"""The command line. Exit codes: 0 done, 1 something went wrong inside, 2 the input cannot be used."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from onnxq_plugins import __version__, planning, runtime
from onnxq_plugins.audit import audit_model, audit_openvino
from onnxq_plugins.auto import RECIPES, auto
from onnxq_plugins.auto import Trial as AutoTrial
from onnxq_plugins.curve import Curve, check_folder, point_recipe
from onnxq_plugins.data import model_inputs, open_data
from onnxq_plugins.diagnose import Diagnosis, diagnose
from onnxq_plugins.digits import digits_model_path, digits_split
from onnxq_plugins.engine import LawBroken, check_writable, quantize, recipe_of, save_model, write_file
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.graph import load
from onnxq_plugins.graph.importer import read
from onnxq_plugins.measure import find_metric, metric_name, top1
from onnxq_plugins.new_plugin import new_plugin
from onnxq_plugins.overrides import ort_model, ort_overrides
from onnxq_plugins.passes.mixed_precision import MixedPrecision
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.quickstart import quickstart
from onnxq_plugins.recipe import builtin_recipes, default_of, load_recipe
from onnxq_plugins.report import check_page, is_page, write_report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Quantize ONNX models so that they really run in integer kernels.")
# in a pipe or file there is no width to keep to
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="an .onnx file", show_default=False)]
DataPath = Annotated[str, typer.Option("--data", metavar="PATH", show_default=False, help=(
    "sample inputs: .npz or .npy (first axis = samples), a folder of images, or package.module:callable"))]
Output = Annotated[Path | None, typer.Option("-o", "--output", show_default=False,
                                             help="where to write; MODEL.RECIPE.onnx in this folder if not given")]
RecipeName = Annotated[str, typer.Option("-r", "--recipe", help="a built-in recipe (see onnxq recipes) or a file")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", show_default=False,
                                                    help="change the recipe: pass.key=value, weights.bits=4")]
TargetName = Annotated[str, typer.Option("--target", show_default=False, help="the runtime; the recipe's if not given")]
Samples = Annotated[int, typer.Option(help="use that many samples, spread evenly over the data; 0 for all")]
Resize = Annotated[int, typer.Option(help="images: shorter side after resizing, in pixels")]
Crop = Annotated[int, typer.Option(help="images: side of the square cut from the middle")]
Mean = Annotated[str, typer.Option(help="images: mean of RGB/255, one value or three, comma-separated")]
Std = Annotated[str, typer.Option(help="images: standard deviation of RGB/255, one value or three")]
Labels = Annotated[Path | None, typer.Option("--labels", show_default=False, help=(
    "one label a sample: .npy, or text with a number a line (an .npz may hold them as 'labels')"))]
MetricName = Annotated[str, typer.Option("--metric", show_default=False, help=(
    "how searches judge a network: sqnr, agreement, top1 (wants labels), or your package.module:function"))]
Layout = Annotated[str, typer.Option(help="images: nchw or nhwc; read off the model's input if not given")]


def _command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command; Ctrl-C in it ends with one line and exit code 1."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                _tell("interrupted; nothing was written (with --cache, finished statistics are kept)")
                raise typer.Exit(1) from None

        app.command(name)(run)
        return function

    return register


@_command("quantize")
def quantize_command(
    model: Model,
    output: Output = None,
    recipe: Annotated[str, typer.Option("-r", "--recipe", show_default="int8",
                                        help="a built-in recipe (see onnxq recipes) or a file")] = "",
    data: DataPath = "",
    plan: Annotated[Path | None, typer.Option(metavar="POINT", help=(
        "instead of a recipe: a point-NN.json that --curve wrote; makes that point without a search"))] = None,
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
    dask: Annotated[str, typer.Option("--dask", metavar="ADDRESS", show_default=False, help=(
        "spread the work over a Dask cluster, such as tcp://host:8786"))] = "",
    processes: Annotated[bool, typer.Option("--processes", help="workers are processes, not threads")] = False,
    float32: Annotated[bool, typer.Option("--float32", help="convert an fp16 or bf16 model to float32 first")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check after each pass that the float function stayed")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="show each hook call of a plugin")] = False,
    report: Annotated[Path | None, typer.Option(help=(
        "write what was done, layer by layer: .html measures the result and gives a page, with the same as .json beside it; "
        "any other name gives JSON alone"))] = None,
    curve: Annotated[Path | None, typer.Option(metavar="FOLDER", help=(
        "write the points that a search over widths measured, for --plan, and a drawing"))] = None,
    overrides: Annotated[Path | None, typer.Option(help=(
        "write the plan for onnxruntime's quantize_static as JSON, and beside it, as .onnx, the model it is for"))] = None,
) -> None:
    """Quantize MODEL into a QDQ model."""
    asked: str | dict[str, Any] = recipe or "int8"
    if plan is not None:
        for option, given in (("--recipe", recipe), ("--curve", curve)):
            if given:
                raise OnnxqError(f"--plan '{plan}' makes one point by the recipe in it, with no search; leave {option} out.")
        asked, kept = point_recipe(plan)
        seed = kept if seed is None else seed
    settings = [*_image_settings(resize, crop, mean, std, layout), *(set_ or [])]
    target_path = output or Path(f"{model.stem}.{(plan or Path(recipe or 'int8')).stem}.onnx")
    float_path = overrides.with_suffix(".onnx") if overrides is not None else None
    beside = report.with_suffix(".json") if report is not None and is_page(report) else None
    _check_outputs({"-o": target_path, "--report": report, "--report (its numbers)": beside,
                    "--overrides": overrides, "--overrides (its model)": float_path},
                   {"model": model, "data": Path(data), "plan": plan})
    if curve is not None:
        check_folder(curve)
        if not any(isinstance(step, MixedPrecision) and not step.widths
                   for step in load_recipe(asked, find_plugins().passes, settings).passes):
            raise OnnxqError(f"--curve: recipe '{recipe or 'int8'}' searches no widths; give one with the pass "
                             f"'{MixedPrecision.name}', such as -r mixed.")
    if beside is not None:
        check_page()
        made = load_recipe(asked, find_plugins().passes, settings)
        if not data and not made.data.path and not any(step.name == "data-free" for step in made.passes):
            raise OnnxqError(f"--report '{report}' measures the result on sample inputs, and there are none; give --data "
                             "PATH, or a name that ends in .json.")
    with _spread_over(dask, processes):
        result = quantize(model, asked, data or None, output=target_path, target=target or None, seed=seed or 0,
                          samples=samples, workers=workers or None, cache=cache, verify=verify, float32=float32,
                          settings=settings, labels=labels, metric=metric or None, track=_track,
                          trace=_tell if trace else None)
    notes = list(result.report["notes"])
    if report is not None:
        write_report(result, report, name=model.name, command=shlex.join(["onnxq", *sys.argv[1:]]), workers=workers or None,
                     track=_track)
    if (found := Curve.of(result, model.name)) is not None:
        _show_curve(found)
        notes += found.write(curve) if curve is not None else []
    if overrides is not None and float_path is not None:
        told = ort_overrides(result)
        save_model(ort_model(result), float_path)
        write_file((json.dumps({"model": float_path.name, **told}, indent=2) + "\n").encode(), overrides)
        notes += [f"overrides: {note}" for note in told["notes"]]
    for note in notes:
        _tell(f"note: {note}")
    for line in _float_lines(result.report["floats"]):
        _tell(line)
    _say(f"{target_path}: {result.summary} | {result.report['seconds']:.1f} s")


@_command("auto")
def auto_command(
    model: Model,
    data: DataPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", show_default=False, help=(
        "where to write; MODEL.auto.onnx in this folder if not given"))] = None,
    max_drop: Annotated[float, typer.Option(help="how far the metric may fall: percent of samples, mostly")] = 1.0,
    prefer: Annotated[str, typer.Option(help="speed or size")] = "speed",
    test: Annotated[str, typer.Option(metavar="PATH", show_default=False, help=(
        "samples to judge by, as --data; every second one of --data if not given"))] = "",
    labels: Labels = None,
    metric: MetricName = "",
    recipe: Annotated[list[str] | None, typer.Option("-r", "--recipe", show_default=False, help=(
        "try these instead of the built-in choice; may be given several times"))] = None,
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
    _check_outputs({"-o": target_path}, {"model": model, "data": Path(data), "test": Path(test) if test else None})
    if prefer not in RECIPES:
        raise OnnxqError(f"--prefer {prefer} is unknown; {known(prefer, RECIPES)}.")
    columns = ("recipe", "drop", "SQNR dB", "MB", "x float", "seconds", "")
    wide = max(len(name) for name in recipe or RECIPES[prefer])

    def tell(trial: AutoTrial) -> None:
        _tell(f"{trial.recipe:{wide}}  {_auto_line(trial)}")

    found = auto(model, data, max_drop=max_drop, prefer=prefer, test=test or None, labels=labels, metric=metric or None,
                 recipes=recipe or (), target=target or None, seed=seed, workers=workers or None, cache=cache,
                 float32=float32, options=load_recipe({}, {}, _image_settings(resize, crop, mean, std, layout)).data,
                 track=_track, tell=tell)
    found.result.save(target_path)
    table = Table(*columns, box=None, header_style="bold")
    for trial in found.trials:
        kept = trial is found.best
        cells = ["-"] * 5 if trial.why else [f"{trial.drop:.2f}", f"{trial.sqnr:.1f}", f"{trial.size / 1e6:.2f}",
                                             f"{trial.speed:.2f}", f"{trial.seconds:.1f}"]
        table.add_row(trial.recipe, *cells, "kept" if kept else "", style="bold" if kept else None)
    out.print(table)
    _say(f"drop is of {found.metric} (float: {found.reference:.2f}); x float is the speed in onnxruntime, batch 1, 1 thread")
    for note in found.notes:
        _tell(f"note: {note}")
    _say(f"{target_path}: {found.result.summary}")
    if not found.met:
        _complain(OnnxqError(f"no recipe stays within a drop of {max_drop:g}; the most accurate one was written. Raise "
                             "--max-drop, or look at onnxq diagnose."), 1)


@_command("audit")
def audit_command(
    model: Model,
    against: Annotated[Path | None, typer.Option(help="the float model: measures the latency ratio, interleaved")] = None,
    runtime_name: Annotated[str, typer.Option("--runtime", help="onnxruntime or openvino")] = "onnxruntime",
) -> None:
    """Tell for every layer of MODEL which kernel runs it, and if that is a float kernel, why."""
    for path in (model, against):
        if path is not None:
            read(path)
    if runtime_name not in ("onnxruntime", "openvino"):
        raise OnnxqError(f"runtime '{runtime_name}' is unknown; known: onnxruntime, openvino.")
    found = audit_openvino(model) if runtime_name == "openvino" else audit_model(model, against)
    table = Table("layer", "operator", "kernel", "accumulator", "why float", box=None, header_style="bold")
    for layer in found.layers:
        if layer.constant_weight or layer.quantized:
            bits = f"{layer.accumulator} bits" if layer.accumulator is not None else ""
            table.add_row(layer.name, layer.op, layer.kernel, bits, layer.why, style=None if layer.quantized else "yellow")
    out.print(table)
    rest = ", ".join(f"{n} {op}" for op, n in sorted(found.other.items(), key=lambda item: -item[1])[:12])
    _say(f"\nother operators: {rest or 'none'}")
    _say(found.summary())
    if accumulators := found.accumulators():
        _say(accumulators)
    if found.speedup is not None and found.milliseconds is not None:
        slow, fast = found.milliseconds
        _say(f"{found.speedup:.2f}x the speed of {against} ({slow:.3f} -> {fast:.3f} ms, batch 1, 1 thread)")


@_command("diagnose")
def diagnose_command(
    model: Model,
    data: DataPath,
    recipe: Annotated[str, typer.Option("-r", "--recipe", show_default="int8",
                                        help="a built-in recipe (see onnxq recipes) or a file")] = "",
    quantized: Annotated[Path | None, typer.Option(metavar="Q.ONNX", show_default=False, help=(
        "instead of a recipe: a model that onnxq made of MODEL on the same data; it is made again"))] = None,
    samples: Samples = 0,
    resize: Resize = 0,
    crop: Crop = 0,
    mean: Mean = "",
    std: Std = "",
    layout: Layout = "",
    set_: Settings = None,
    target: TargetName = "",
    seed: Annotated[int | None, typer.Option(show_default="0", help="one seed, one result")] = None,
    workers: Annotated[int, typer.Option(help="threads at once; 0 for one per core")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps calibration results between runs")] = None,
    measured: Annotated[int, typer.Option(help="measure errors on so many of the samples")] = 8,
    try_: Annotated[int, typer.Option("--try", help=(
        "try so many of the remedies, those of the worst layers first; each is a quantization"))] = 0,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Quantize MODEL and tell which layers hold its error, why, and what to try; writes no model."""
    if measured < 1 or try_ < 0:
        raise OnnxqError("--measured must be at least 1, and --try not negative.")
    settings = [*_image_settings(resize, crop, mean, std, layout), *(set_ or [])]
    asked: str | dict[str, Any] = recipe or "int8"
    if quantized is not None:
        if recipe:
            raise OnnxqError(f"--quantized '{quantized}' brings its own recipe; leave --recipe out.")
        asked, kept = recipe_of(quantized)
        seed = kept if seed is None else seed
    result = quantize(model, asked, data, target=target or None, seed=seed or 0, samples=samples, workers=workers or None,
                      cache=cache, settings=settings, track=_track)
    if quantized is not None and read(quantized).graph != result.model.graph:
        _tell(f"note: '{quantized}' is not what its recipe makes of '{model}' on these samples; what is told is about the "
              "latter")
    found = diagnose(result, samples=measured, attempts=try_, workers=workers or None, track=_track)
    if json_:
        out.print(json.dumps(found.to_dict(), indent=2), highlight=False, markup=False, soft_wrap=True)
    else:
        _show_diagnosis(found, result.summary)


@_command()
def compare(
    a: Annotated[Path, typer.Argument(help="the reference, usually the float model")],
    b: Annotated[Path, typer.Argument(help="the model to judge")],
    data: DataPath,
    samples: Samples = 0,
    resize: Resize = 0,
    crop: Crop = 0,
    mean: Mean = "",
    std: Std = "",
    layout: Layout = "",
    labels: Labels = None,
    metric: MetricName = "",
) -> None:
    """Compare two models on the same data: error, agreement, size, latency; with labels also how many each gets right."""
    judge = find_metric(metric) if metric else None
    models = [read(a), read(b)]
    image = _image_settings(resize, crop, mean, std, layout)
    options = dataclasses.replace(load_recipe({}, {}, image).data, samples=samples)
    inputs = [model_inputs(m) for m in models]
    if {i.name for i in inputs[0]} != {i.name for i in inputs[1]}:
        raise OnnxqError(f"'{a}' and '{b}' have different inputs: {', '.join(i.name for i in inputs[0])} and "
                         f"{', '.join(i.name for i in inputs[1])}.")
    feeds = open_data(data, inputs[0], options, labels)
    runners = [runtime.session(a), runtime.session(b)]
    gathered: list[list[Any]] = [[], []]
    first = None
    for feed in _track(feeds, "comparing", feeds.size):
        first = first or feed
        for rows, runner, wanted in zip(gathered, runners, inputs, strict=True):  # one may be in half precision
            rows.append(runner.run(None, {i.name: feed[i.name].astype(i.dtype) for i in wanted}))
    assert first is not None
    own = [{i.name: first[i.name].astype(i.dtype) for i in wanted} for wanted in inputs]
    times = runtime.latency(runners, own, 2.0)
    names = [o.name for o in runners[0].get_outputs()]
    table = Table("output", "SQNR dB", "same argmax", box=None, header_style="bold")
    for i, name in enumerate(names):
        y, z = (np.concatenate([np.atleast_1d(r[i]) for r in rows]) for rows in gathered)
        if y.shape != z.shape:
            raise OnnxqError(f"output '{name}' has shape {y.shape} in '{a}' and {z.shape} in '{b}'.")
        table.add_row(name, f"{runtime.sqnr(y, z):.2f}", f"{100 * runtime.agreement(y, z):.2f}%" if y.ndim > 1 else "-")
    out.print(table)
    truth = feeds.spread_labels(0)
    judge = judge or (top1 if truth is not None else None)
    if judge is not None:
        whole = [[np.concatenate([np.atleast_1d(r[i]) for r in rows]) for i in range(len(names))] for rows in gathered]
        found = [judge(whole[0], one, np.concatenate(truth) if truth is not None else None) for one in whole]
        _say(f"{metric_name(judge)}: {found[0]:.2f} -> {found[1]:.2f}")
    sizes = [p.stat().st_size for p in (a, b)]
    _say(f"{len(gathered[0])} samples | {sizes[0] / 1e6:.2f} -> {sizes[1] / 1e6:.2f} MB | {times[0]:.3f} -> "
         f"{times[1]:.3f} ms ({times[0] / times[1]:.2f}x, batch {len(next(iter(first.values())))}, 1 thread)")


@_command("plugins")
def plugins_command(
    name: Annotated[str, typer.Argument(help="a pass or target: shows its documentation")] = "",
    trace: Annotated[bool, typer.Option("--trace", help=(
        "quantize the quickstart model and show each hook call, with who answered it"))] = False,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="the recipe that --trace runs")] = "int8",
) -> None:
    """List the passes and targets that are installed, or explain one."""
    if trace:
        if name:
            raise OnnxqError(f"--trace shows all plugins at work; leave '{name}' out.")
        result = quantize(digits_model_path(), recipe, digits_split()["calibration_images"], trace=_say)
        _say(f"recipe '{recipe}' on the quickstart model: {result.summary}")
        return
    found = find_plugins()
    if name:
        if name not in found.passes and name not in found.targets:
            raise OnnxqError(f"'{name}' is neither a pass nor a target; "
                             f"{known(name, [*sorted(found.passes), *sorted(found.targets)])}." + found.excuse())
        if name in found.passes:
            _say(inspect.getdoc(found.passes[name]))
            for f in dataclasses.fields(found.passes[name]):
                _say(f"  {f.name} = {default_of(f)!r}")
        if name in found.targets:
            target = found.targets[name]
            _say(f"{target.doc}\nruns:")
            for op in dict.fromkeys(rule.op for rule in target.rules):
                _say(f"  {op}: {target.choices(op)}")
        return
    table = Table("kind", "name", "from", "about", box=None, header_style="bold")
    for key, kind in sorted(found.passes.items()):
        about = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
        table.add_row("pass", key, found.sources[f"pass {key}"], escape(about.split(". ")[0].rstrip(".")))
    for key, target in sorted(found.targets.items()):
        table.add_row("target", key, found.sources[f"target {key}"], target.doc)
    for key, why in found.broken.items():
        table.add_row("broken", key, "", why, style="yellow")
    out.print(table)


@_command("new-plugin")
def new_plugin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="vendor and word, such as acme-clip", show_default=False)],
) -> None:
    """Write a plugin package into ./NAME: a working pass, tests with the conformance kit, README."""
    made = new_plugin(name)
    _say(f"{made} has a pass, its tests and a README; next:\n  cd {made}\n  pip install -e '.[test]'\n  pytest")


@_command("recipes")
def recipes_command(name: Annotated[str, typer.Argument(help="a recipe: prints it")] = "") -> None:
    """List the built-in recipes, or print one (a start for your own)."""
    recipes = builtin_recipes()
    if name:
        if name not in recipes:
            raise OnnxqError(f"recipe '{name}' is unknown; {known(name, recipes)}.")
        _say(recipes[name].read_text("utf-8").rstrip())
        return
    table = Table("recipe", "about", box=None, header_style="bold")
    for key, file in recipes.items():
        lines = file.read_text("utf-8").splitlines()
        table.add_row(key, " ".join(line.lstrip("# ") for line in lines if line.startswith("#")))
    out.print(table)


@_command()
def check(
    recipe: Annotated[str, typer.Argument(help="a built-in recipe or a file")],
    model: Annotated[Path | None, typer.Argument(help="also check that the recipe fits this model")] = None,
    target: TargetName = "",
    set_: Settings = None,
) -> None:
    """Check a recipe, and whether it fits a model, without data and without quantizing."""
    found = find_plugins()
    made = load_recipe(recipe, found.passes, [*(set_ or ()), *([f"target={target}"] if target else [])])
    chosen = found.target(made.target)
    steps = ", ".join(step.name for step in made.passes) or "none"
    _say(f"recipe '{recipe}' is valid: target {made.target}, passes: {steps}")
    if model is not None:
        graph = load(model, flatten=chosen.flatten)
        asked = planning.request(graph, made, chosen)
        OnnxqError.check(chosen.problems(graph, asked.plan, asked.inputs))
        for line in _float_lines(asked.floats):
            _say(line)
        _say(f"it quantizes {sum(y.weight in asked.plan for y in graph.layers)} of {len(graph.layers)} layers of "
             f"'{model}'")


@_command("quickstart")
def quickstart_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the models")] = Path("onnxq-quickstart"),
    recipe: RecipeName = "int8",
) -> None:
    """Quantize a small digits model that comes along, and show what that gives."""
    rows, report = quickstart(output, recipe, _track)
    table = Table("model", "accuracy", "SQNR dB", "KB", "ms", box=None, header_style="bold")
    for row in rows:
        table.add_row(row.name, f"{100 * row.accuracy:.2f}%", "-" if row is rows[0] else f"{row.sqnr:.1f}",
                      f"{row.size / 1e3:.0f}", f"{row.milliseconds:.3f}")
    out.print(table)
    _say(f"{rows[1].kernels} | {rows[0].milliseconds / rows[1].milliseconds:.2f}x the speed of float")
    if report is not None:
        _say(f"layer by layer, with drawings: {report}")
    _say(f"\n{rows[0].path} and {rows[1].path} are yours to look at. Next, by hand:\n"
         f"  onnxq quantize {rows[0].path} --data {output / 'calibration.npz'} -o my.onnx\n"
         f"  onnxq audit my.onnx --against {rows[0].path}\n"
         f"  onnxq compare {rows[0].path} my.onnx --data {output / 'test.npz'}\n"
         f"  onnxq diagnose {rows[0].path} --data {output / 'calibration.npz'}")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="show the version and leave")] = False) -> None:
    if version:
        _say(f"onnxq-plugins {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; complaints about input become one line each on standard error."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's: what is not finite is told in a sentence
    runtime.quiet()
    try:
        app()
    except LawBroken as error:
        _complain(error, 1)
    except OnnxqError as error:
        _complain(error, 2)


def _say(text: str | None) -> None:
    """A result, on standard output, exactly as it is."""
    out.print(text, highlight=False, markup=False)


def _tell(text: str) -> None:
    """A remark, on standard error, exactly as it is."""
    err.print(text, highlight=False, markup=False)


def _complain(error: OnnxqError, code: int) -> None:
    for problem in error.problems:
        _tell(f"error: {problem}")
    sys.exit(code)


@contextlib.contextmanager
def _spread_over(dask: str, processes: bool) -> Iterator[None]:
    """Where joblib's work runs: threads of this process if nothing else is asked for."""
    import joblib

    if not dask:
        with joblib.parallel_config(backend="loky") if processes else contextlib.nullcontext():
            yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise OnnxqError("--dask needs Dask; install it with: pip install 'onnxq-plugins[dask]'.") from error
    try:
        client = Client(dask, timeout="10s")  # type: ignore[no-untyped-call]
    except Exception as error:  # distributed raises OSError, ValueError and others
        raise OnnxqError(f"no Dask scheduler answers at '{dask}' ({type(error).__name__}); start one with 'dask scheduler', "
                         "or mend the address.") from error
    warnings.filterwarnings("ignore", message="Sending large graph")  # a network is sent with its task
    with client:
        if not client.scheduler_info()["workers"]:
            raise OnnxqError(f"the Dask scheduler at '{dask}' has no workers; start some with 'dask worker {dask}'.")
        with joblib.parallel_config(backend="dask"):
            yield


def _check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Complain about an output that cannot be written, is one of the inputs, or is named twice."""
    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        check_writable(path)
        for what, given in inputs.items():
            if path.exists() and given is not None and given.exists() and path.samefile(given):
                raise OnnxqError(f"output '{path}' is the {what} itself; give another file with {option}.")
        if path.resolve() in seen:
            raise OnnxqError(f"{seen[path.resolve()]} and {option} are both '{path}'; choose another file for one.")
        seen[path.resolve()] = option


def _show_curve(curve: Curve) -> None:
    """The measured points as a table."""
    columns, rows = curve.table()
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row, style="bold" if row[-1] else None)
    out.print(table)
    _say("size and bops in parts of 8-bit weights and activations; the other columns count groups\n")


def _auto_line(trial: AutoTrial) -> str:
    """What a recipe gave, in a line."""
    if trial.why:
        return f"not possible: {trial.why}"
    return (f"drop {trial.drop:.2f}, {trial.sqnr:.1f} dB, {trial.size / 1e6:.2f} MB, {trial.speed:.2f} x float, "
            f"{trial.seconds:.1f} s")


def _show_diagnosis(found: Diagnosis, summary: str) -> None:
    """All layers as a table, the worst first, then what is known of the five worst."""
    table = Table(box=None, header_style="bold")
    for column in ("layer", "op", "alone dB", "noise %", "own dB", "weight dB", "input dB", "gathered dB", "cause"):
        table.add_column(column, justify="right" if column[-1] in "B%" else "left")

    def decibels(value: float | None) -> str:
        return "" if value is None or value >= 200 else f"{value:.1f}"

    for y in found.layers:
        own = y.own
        table.add_row(escape(y.name), y.op, decibels(y.alone), "" if y.share is None else f"{100 * y.share:.1f}",
                      *(decibels(v) for v in ((own.both, own.weight, own.input) if own else (None,) * 3)), decibels(y.sqnr),
                      ", ".join(cause.kind for cause in y.causes) if own else "float")
    out.print(table)
    _say("alone: SQNR of the outputs with only this layer quantized, and its part of their noise; own: at the layer's "
         "output, of rounding its weight and its input; gathered: there in the quantized network\n")
    for y in [y for y in found.layers if y.own is not None][:5]:
        _say(f"{y.name}: {found.told(y)}")
        for remedy in y.remedies[:3]:
            _say(f"  {remedy.text}:\n" + "\n".join(f"    {line}" for line in remedy.typed.splitlines()))
    for slow in found.floats[:5]:
        _say(f"{slow.name}: runs in float ({100 * slow.work:.1f}% of the multiply-adds): {slow.why}.")
        for remedy in slow.remedies:
            _say(f"  {remedy.text}:\n" + "\n".join(f"    {line}" for line in remedy.typed.splitlines()))
    if found.saturating:
        _say(f"{len(found.saturating)} layers could saturate on x86-64 without VNNI: --target ort-cpu-avx2 avoids that.")
    for tried in found.tried:
        _say(f"tried for {tried.layer} ({tried.remedy.text}): " + (
            f"{found.sqnr:.2f} -> {tried.sqnr:.2f} dB" if tried.sqnr is not None else f"refused: {tried.refused}"))
    for note in found.notes:
        _say(note)
    _say(f"{summary}\n{found.sqnr:.2f} dB at the outputs, on {found.samples} of the calibration samples | "
         f"{found.seconds:.1f} s")


def _float_lines(floats: Mapping[str, str]) -> list[str]:
    """One line for each reason why layers stay float."""
    by_reason: dict[str, list[str]] = {}
    for name, why in floats.items():
        by_reason.setdefault(why, []).append(name)
    return [f"float: {', '.join(names[:4])}{f' and {len(names) - 4} more layers' if len(names) > 4 else ''}: {why}"
            for why, names in by_reason.items()]


def _image_settings(resize: int, crop: int, mean: str, std: str, layout: str) -> list[str]:
    settings = [f"data.{key}={value}" for key, value in (("resize", resize), ("crop", crop)) if value]
    settings += [f"data.{key}=[{_decimals(value)}]" for key, value in (("mean", mean), ("std", std)) if value]
    return settings + ([f'data.layout="{layout}"'] if layout else [])


def _decimals(text: str) -> str:
    """Numbers as TOML writes them: .485 is none there. What is no number is left for the recipe to complain about."""
    try:
        return ",".join(repr(float(part)) for part in text.split(","))
    except ValueError:
        return text


def _track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A progress bar on standard error, if that is a terminal."""
    if not err.is_terminal:
        yield from items
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


if __name__ == "__main__":
    main()
