"""`onnxq auto`: try built-in recipes from cheap to costly, measure each on samples it was not made with, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data import Data, DataOptions, Source, graph_inputs, open_data
from onnxq_plugins.engine import Result, quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, load
from onnxq_plugins.measure.metrics import Metric, agreement, chance, check_labels, find_metric, metric_name, sqnr, top1
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.spec import Array

Prefer = Literal["speed", "size"]
# From cheap to costly. For speed those that run the same integer kernels everywhere: the first that is accurate enough is as
# fast as any. For size all are tried, since only the file tells.
RECIPES: dict[Prefer, tuple[str, ...]] = {
    "speed": ("int8", "int8-rounded"),
    "size": ("int8", "mixed-coding-length", "mixed", "int4-rounded", "int4-storage"),
}
_APART = 16  # samples from which making and judging use different ones
_MOST = 512  # samples to judge by
_FINE = 0.2  # points below which a sample's worth matters to no decision
_SECONDS = 1.0  # of latency measurement for each model


@dataclass(frozen=True)
class Trial:
    """What a recipe gave.

    drop            of the metric, in its own units, against the float model; on samples not used to make the model
    sqnr            of the outputs, dB
    size            bytes of the model
    speed           times float, measured in turn with it in onnxruntime
    seconds         to make it
    why             why there is no model, if there is none
    """

    recipe: str
    drop: float = float("inf")
    sqnr: float = 0.0
    size: int = 0
    speed: float = 0.0
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True, eq=False)
class AutoResult:
    """The outcome of `auto`: all trials in their order, the name of the metric and what the float model has of it, and the
    best result, which is within the drop that was allowed if `met`."""

    trials: tuple[Trial, ...]
    metric: str
    reference: float
    best: Trial
    result: Result
    met: bool
    notes: tuple[str, ...] = field(default=())


def auto(
    model: str | Path | onnx.ModelProto | Graph,
    data: Source,
    *,
    max_drop: float = 1.0,
    prefer: Prefer = "speed",
    test: Source | None = None,
    labels: str | Path | Array | None = None,
    metric: str | Metric | None = None,
    recipes: Sequence[str] = (),
    target: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    float32: bool = False,
    options: DataOptions | None = None,
    track: Track = silent,
    tell: Callable[[Trial], None] = lambda _: None,
) -> AutoResult:
    """Try recipes in their order and keep the best within a drop.

    data       samples; where no `test` is given, every second one is kept apart to judge by, if there are 16 or more
    test       samples to judge by; `labels` are of these then
    max_drop   how far the metric may fall below the float model's, in its own units: percent of samples
    prefer     ``speed``: the first recipe within the drop, as all run integer kernels. ``size``: all are tried, the smallest
               file wins
    metric     as for `quantize`; top1 where there are labels, else agreement
    recipes    others than the built-in choice: names or files
    tell       called with each trial as it ends

    Where no recipe stays within the drop, the one that drops least is kept, and `AutoResult.met` is False. Raises OnnxqError
    for inputs that cannot be used, and where no recipe gives a model.
    """
    if prefer not in RECIPES:
        raise OnnxqError(f"prefer = '{prefer}' is unknown; known: {', '.join(get_args(Prefer))}.")
    if not max_drop >= 0:
        raise OnnxqError(f"max_drop = {max_drop} must be 0 or more.")
    if metric in ("sqnr", sqnr):
        raise OnnxqError(
            "metric 'sqnr' has no drop: the float model's own has no bound; give another metric, such as "
            "agreement, and read the dB off the table."
        )
    graph = load(model, float32=float32)
    inputs = graph_inputs(graph)
    opened = open_data(data, inputs, options, None if test is not None else labels)
    apart = None if test is None else open_data(test, inputs, options, labels)
    if metric in (None, "top1", top1):
        check_labels((opened if apart is None else apart).labels, graph.shape(graph.outputs[0]), graph.outputs[0])
    made_with, judged_on, notes = _apart(opened, apart)
    feeds, known = judged_on.spread(_MOST), judged_on.spread_labels(_MOST)
    right = None if known is None else np.concatenate(known)
    by = find_metric(metric) if metric is not None else agreement if right is None else top1
    reference = runtimes.outputs(runtimes.session(graph.model()), feeds)
    # the user's own model, which may be slower than its canonical form
    given = runtimes.session(graph.model() if isinstance(model, Graph) else Path(model) if isinstance(model, str) else model)
    if data is test or (isinstance(data, (str, Path)) and isinstance(test, (str, Path)) and Path(data) == Path(test)):
        notes += ("the samples to judge by are those that models are made with, which flatters them",)
    judged = int(np.argmax(reference[0], axis=-1).size)
    if by in (top1, agreement) and 100 / judged > max(max_drop, _FINE):
        notes += (
            f"one of {judged} samples is {100 / judged:.1f} points, more than the drop of {max_drop:g} to decide on: "
            "give more --test samples for a decision this fine",
        )
    best = by(reference, reference, right)
    if by is top1 and (remark := chance(best, reference[0].shape[-1], len(reference[0]))):
        notes += (remark,)
    trials: list[Trial] = []
    results: dict[str, Result] = {}
    for recipe in recipes or RECIPES[prefer]:
        try:
            result = quantize(
                model,
                recipe,
                made_with,
                target=target,
                seed=seed,
                workers=workers,
                cache=cache,
                float32=float32,
                track=track,
            )
        except OnnxqError as error:
            trials.append(Trial(recipe, why=str(error)))
        else:
            own = runtimes.session(result.model)
            outputs = runtimes.outputs(own, feeds)
            slow, fast = runtimes.latency([given, own], [runtimes.wanted(given, feeds[0]), feeds[0]], _SECONDS)
            trials.append(
                Trial(
                    recipe,
                    best - by(reference, outputs, right),
                    sqnr(reference, outputs),
                    int(result.report["bytes"]["quantized"]),
                    slow / fast,
                    float(result.report["seconds"]),
                )
            )
            results[recipe] = result
        tell(trials[-1])
        if prefer == "speed" and trials[-1].drop <= max_drop:
            break
    usable = [trial for trial in trials if not trial.why]
    if not usable:
        raise OnnxqError(*dict.fromkeys(f"recipe '{trial.recipe}': {trial.why}" for trial in trials))
    fit = [trial for trial in usable if trial.drop <= max_drop]
    found = min(fit or usable, key=_order(prefer) if fit else lambda trial: trial.drop)
    return AutoResult(tuple(trials), metric_name(by), best, found, results[found.recipe], bool(fit), notes)


def _order(prefer: Prefer) -> Callable[[Trial], float]:
    """What is to be least."""
    return (lambda trial: float(trial.size)) if prefer == "size" else (lambda trial: -trial.speed)


def _apart(data: Data, test: Data | None) -> tuple[Data, Data, tuple[str, ...]]:
    """Samples to make models with, samples to judge them by, and what the user should know about that."""
    if test is not None:
        return data, test, ()
    feeds, labels = data.spread(0), data.spread_labels(0)
    if len(feeds) < _APART:
        note = (
            f"models are judged by the {len(feeds)} samples they were made with, which flatters them; give --test, or "
            f"{_APART} samples or more"
        )
        return data, data, (note,)
    flat = None if labels is None else np.concatenate(labels[1::2])
    halves = open_data(feeds[::2], data.inputs), open_data(feeds[1::2], data.inputs, labels=flat)
    note = f"made with {len(feeds[::2])} samples, judged by the other {len(feeds[1::2])}"
    return halves[0], halves[1], (note,)
