"""The engine: load, plan, run the passes under the laws, export."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import files, runtimes
from onnxq_plugins.calibration import Calibration, NotFinite
from onnxq_plugins.calibration.shapes import complete_shapes
from onnxq_plugins.data import Data, Source
from onnxq_plugins.data.outliers import usual
from onnxq_plugins.engine.result import Result
from onnxq_plugins.engine.targets import Retargeted, retarget
from onnxq_plugins.engine.writing import export_job
from onnxq_plugins.errors import JUDGE, NUMBER, PATH, SEVERAL, TABLE, TEXT, WHOLE, OnnxqError, OnnxqWarning, expects
from onnxq_plugins.export.compact import Names, check_names
from onnxq_plugins.graph import Graph, Model, as_model, load
from onnxq_plugins.graph.conform import conform
from onnxq_plugins.job import Job, Metric, Quality, Recipe, Report
from onnxq_plugins.laws import is_random, proposed, run_pass
from onnxq_plugins.layers.complete import complete, complete_constants
from onnxq_plugins.layers.float_inputs import keep_inputs_float
from onnxq_plugins.measure.metrics import check_graph_labels, find_metric, metric_name, top1
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.parallel import Track, cores, silent
from onnxq_plugins.plan.constants import float_constants
from onnxq_plugins.plan.requests import request
from onnxq_plugins.plan.rules import exclude as mark_excluded
from onnxq_plugins.plugins import Plugins, Trace, find_plugins
from onnxq_plugins.recipe import Settings
from onnxq_plugins.report.check import self_check
from onnxq_plugins.report.goals import Goals
from onnxq_plugins.report.summary import original_size
from onnxq_plugins.search.quality import keep_quality
from onnxq_plugins.spec import Array
from onnxq_plugins.targets import BUILTIN, Target
from onnxq_plugins.targets.refusals import problems, unheld

__all__ = ["Result", "Retargeted", "quantize", "retarget"]

_Solved = tuple[Job, Path | onnx.ModelProto | None, int, Samples | None]


@expects(output=PATH, target=TEXT, seed=WHOLE, samples=WHOLE, workers=WHOLE, cache=PATH, names=TEXT, class_axis=WHOLE)
@expects(settings=SEVERAL, exclude=SEVERAL, plugins=SEVERAL, state=TABLE, min_sqnr=NUMBER, min_speed=NUMBER, metric=JUDGE)
def quantize(
    model: Model,
    recipe: str | Path | Mapping[str, Any] | Recipe = "int8",
    data: Source | None = None,
    *,
    output: str | Path | None = None,
    target: str | None = None,
    seed: int = 0,
    samples: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    verify: bool = False,
    float32: bool = False,
    settings: Settings = (),
    exclude: Iterable[str] = (),
    plugins: Iterable[object] = (),
    labels: str | Path | Array | None = None,
    state: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    min_sqnr: float | None = None,
    min_speed: float | None = None,
    keep: bool = False,
    check: bool = True,
    class_axis: int | None = None,
    names: Names = "short",
    track: Track = silent,
    trace: Trace | None = None,
) -> Result:
    """Quantize a float ONNX model into QDQ form. Raises OnnxqError, one sentence a problem, before anything is written.

    model      path, ModelProto or its bytes, Graph, ONNXProgram of torch or onnx_ir.Model; left alone
    recipe     built-in name, path, mapping or Recipe
    data       sample inputs, see `onnxq_plugins.data.open_data`
    output, target   write the model here as well; overrides the recipe's target
    seed       one seed, one result
    samples, workers   use that many samples, spread evenly (0: all); threads and processes at once (None: one per core)
    cache      folder that keeps calibration results between runs
    verify, float32   check after every pass that the float function stayed (law L1); convert half-precision models first
    settings   changes to the recipe: one or several such as ``ranges.method=mse``, or a mapping from key to value
    exclude    operators of any kind that stay float: names, or globs on them
    plugins    further plugin objects beside the installed ones
    labels     of the samples: an array [samples, ...], an .npy file or a text file
    state      output -> the input that it is at the next step, of a model of streams: see `DataOptions.state`
    metric     how searching passes judge a network: a name, ``package.module:function`` (imported), or a `job.Metric`
    min_sqnr, min_speed, keep   dB of each output, times float here: what misses them is not written unless `keep` says so
    check      run both networks side by side in the end (`Result.check`), and warn of what is bad (`OnnxqWarning`)
    class_axis of outputs that are classes, such as 1 for segmentation [N, C, H, W]; None finds it
    names      of tensors inside the model: ``short``, or ``keep`` the user's own (see `onnxq_plugins.export.compact`)
    track, trace   show progress, see `Job.track`; receive a line of text for each hook call of a plugin
    """
    start, path, names = time.perf_counter(), None if output is None else Path(output), check_names(names)
    goals = _goals(min_sqnr, min_speed, keep, seed=seed, workers=workers or 0, samples=samples)
    installed = find_plugins(plugins := list(plugins), trace)
    loaded = _read_recipe(installed, recipe, settings, exclude, target, samples, state, min_sqnr)
    read = partial(_read_model, model, float32, installed.target_of(loaded), path)
    opened = partial(_calibration, data=data, recipe=loaded, labels=labels, cache=cache, workers=workers, track=track)
    prepare = partial(_prepare, installed, loaded, seed, metric, class_axis)
    solved = _solved(read, opened, prepare, partial(_run, plugins=installed, verify=verify))
    again = partial(quantize, model, seed=seed, workers=workers, plugins=plugins, cache=cache, names=names, float32=float32)
    return _finished(solved, installed, path, goals, start, check, partial(again, class_axis=class_axis, check=False))


def _finished(
    solved: _Solved, plugins: Plugins, path: Path | None, goals: Goals, began: float, check: bool, again: partial[Result]
) -> Result:
    """The result of a job with a complete plan: exported, checked and written. Warns of what is bad.

    began   when quantizing began, by `time.perf_counter`
    again   `quantize` with the same model and options
    """
    job, model, size, judged = solved
    ending = partial(self_check, job, source=model, began=began, judged=judged) if check else None
    exported, shown, checked, missed, inner = export_job(job, plugins, size, path, goals, ending, again)
    job.report["seconds"] = round(time.perf_counter() - began, 3)
    written = path if goals.keep or not missed else None
    plugins.manager.hook.onnxq_exported(job=job, model=exported, path=written)
    data = job.calibration.data
    left = (job.plan, job.report, job.graph, job.target, data, model, job.recipe, partial(again, data=data), job.class_axis)
    if bad := [*job.report.warnings, *([missed] if missed else [])]:
        warnings.warn("; ".join(bad), OnnxqWarning, stacklevel=4)
    return Result(exported, *left, shown, partial(proposed, plugins, job), inner.results, checked, missed)


def _solved(
    read: Callable[[], tuple[Graph, Path | onnx.ModelProto | None, int]],
    calibrate: Callable[[Graph], Calibration],
    prepare: Callable[[Calibration, Sequence[str]], Job],
    run: Callable[[Job], None],
) -> _Solved:
    """A job with a complete plan, with the user's own model, its bytes, and the samples that its outputs were judged on.
    Activations that turn out to be NaN or infinite stay float: the job starts again without them, as passes have changed the
    graph by then."""
    unfit: tuple[str, ...] = ()
    graph, source, size = read()
    calibration = calibrate(graph)
    while True:
        try:
            job = prepare(calibration, unfit)
            run(job)
            complete(job)
            judged = keep_quality(job)
        except NotFinite as error:
            broken = (y for y in calibration.graph.layers if not np.isfinite(calibration.graph.constant(y.weight)).all())
            OnnxqError.check(f"layer '{y.name}': its weight has NaN or Inf; the float model is broken." for y in broken)
            if set(error.names) <= set(unfit):
                raise
            unfit += error.names
            calibration = calibration.of(graph := read()[0])
            _complete_shapes(graph, calibration.data)
        else:
            return job, source, size, judged


def _goals(sqnr: float | None, speed: float | None, keep: bool, **numbers: int) -> Goals:
    """What the user insists on. Raises OnnxqError for numbers that make no sense, all of which must not be negative."""
    OnnxqError.check(f"{name} = {number} must not be negative." for name, number in numbers.items() if number < 0)
    return Goals(sqnr, speed, keep)


def _read_recipe(
    plugins: Plugins,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    settings: Settings,
    exclude: Iterable[str],
    target: str | None,
    samples: int,
    state: Mapping[str, str] | None,
    min_sqnr: float | None,
) -> Recipe:
    """The recipe with what overrides it, so that it makes the same model again."""
    loaded = plugins.recipe(recipe, settings)
    loaded = replace(loaded, target=target) if target else loaded
    names = [exclude] if isinstance(exclude, str) else [*exclude]
    OnnxqError.check(f"exclude: {name!r:.80} is no name of an operator." for name in names if not isinstance(name, str))
    loaded = replace(loaded, exclude=(*loaded.exclude, *names))
    if min_sqnr is not None:
        loaded = replace(loaded, quality=Quality(min_sqnr))
    own = loaded.data
    own = replace(own, samples=samples or own.samples, state=own.state if state is None else dict(state))
    return replace(loaded, data=own)


def _read_model(
    model: Model, float32: bool, target: Target, output: Path | None
) -> tuple[Graph, Path | onnx.ModelProto | None, int]:
    """The graph, the user's own model (None for a Graph, and where `output` will replace it) and its bytes. Raises
    OnnxqError where `output` could not be written, or has a name for files of another target."""
    if output is not None:
        files.check_writable(output)
        others = [other.name for other in BUILTIN if other.suffix == output.suffix not in (".onnx", target.suffix)]
        if others:
            raise OnnxqError(
                f"'{output}': target '{target.name}' writes {target.suffix}; give such a name, or --target {others[0]}."
            )
    model = as_model(model)
    runtimes.trim()  # of what making a large model leaves behind: copies of it follow
    graph = conform(load(model, float32=float32, flatten=target.flatten), target.operators, target.whole)
    source = model.absolute() if isinstance(model, Path) else None if isinstance(model, Graph) else model
    size = original_size(graph, source)
    replaced = isinstance(source, Path) and output is not None and source.resolve() == output.resolve()
    return graph, None if replaced else source, size


def _calibration(
    graph: Graph,
    recipe: Recipe,
    data: Source | None,
    labels: str | Path | Array | None,
    cache: str | Path | None,
    workers: int | None,
    track: Track,
) -> Calibration:
    """Statistics over the samples. A recipe may come from a stranger: its path is only ever a file, never code to import."""
    source = data if data is not None else Path(recipe.data.path) if recipe.data.path else None
    samples = None if source is None else runtimes.open_samples(source, graph, recipe.data, labels)
    if samples is not None and not recipe.data.outliers:
        samples = usual(samples)
    _complete_shapes(graph, samples)
    return Calibration(graph, samples, cache=Path(cache) if cache else None, workers=workers or cores(), track=track)


def _complete_shapes(graph: Graph, data: Data | None) -> None:
    if data is not None and graph.unranked:
        complete_shapes(graph, next(iter(data)))


def _prepare(
    plugins: Plugins,
    recipe: Recipe,
    seed: int,
    metric: str | Metric | None,
    class_axis: int | None,
    calibration: Calibration,
    unfit: Sequence[str],
) -> Job:
    """A job whose plan holds requests. Raises OnnxqError for labels that do not fit, and for what the target cannot run.

    unfit   activations that are NaN or infinite
    """
    judge = None if metric is None else find_metric(metric)
    graph, data, target = calibration.graph, calibration.data, plugins.target_of(recipe)
    if data is not None and judge in (None, top1):
        check_graph_labels(data, graph, class_axis)
    excluded = mark_excluded(graph, recipe)
    first = request(graph, recipe, target, unfit)
    OnnxqError.check([*unheld(target, graph), *problems(target, graph, first.plan, first.inputs)])
    if calibration.cache:
        files.clear_leftovers(calibration.cache)
    notes = [*graph.notes, *excluded, *(data.remarks() if data else ())]
    if unfit:
        names = ", ".join(f"'{name}'" for name in unfit[:4]) + (" ..." if len(unfit) > 4 else "")
        notes.append(
            f"{len(unfit)} activation{'s' * (len(unfit) > 1)} of the float model itself {'are' if len(unfit) > 1 else 'is'} "
            f"NaN or infinite on these samples ({names}): what reads or writes them stays float"
        )
    job = Job(
        graph,
        first.plan,
        calibration,
        target,
        recipe,
        np.random.default_rng(seed),
        calibration.workers,
        Report(floats={**float_constants(first.constants), **first.floats}, notes=notes),
        calibration.track,
        judge,
        class_axis,
    )
    complete_constants(job)  # passes measure the network with them as they will be,
    job.plan |= keep_inputs_float(job, job.plan)  # and with the kernels that will run
    return job


def _run(job: Job, plugins: Plugins, verify: bool) -> None:
    """Run the passes of the recipe, each under the laws."""
    random = verify and is_random(job.graph, job.calibration.data)
    steps = [run_pass(job, step, plugins, verify and not random) for step in job.recipe.passes]
    if job.metric is not None and not any(hasattr(step, "metric") for step in job.recipe.passes):
        job.note(f"metric '{metric_name(job.metric)}': no pass of the recipe searches, so none asked for it")
    if random:
        job.note(
            "the float model is random: the same input gives other outputs when it runs again, so that --verify could check "
            "nothing, and SQNR will say nothing either"
        )
    elif verify:
        drift = max((step["drift"] for step in steps if "drift" in step), default=0.0)
        job.note(f"verified after each exact pass: the float function moved by {drift:.0e} at most")
    job.report["steps"] = steps
