"""`onnxq auto`: try built-in recipes from cheap to costly, measure each on samples it was not made with, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data import Data, DataOptions, Source
from onnxq_plugins.engine import Result, quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, Model, as_model, load
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.metrics import (
    chance,
    check_labels,
    find_metric,
    mean_sqnr,
    metric_name,
    percent_agreement,
    top1,
)
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.spec import Array

Prefer = Literal["speed", "size"]
# From cheap to costly. For speed, recipes that run in the same integer kernels: the first that is accurate enough is as fast
# as any. For size all are tried, since only the file shows it.
RECIPES: dict[Prefer, tuple[str, ...]] = {
    "speed": ("int8", "int8-rounded"),
    "size": ("int8", "mixed-coding-length", "mixed", "int4-rounded", "int4-storage"),
}
_APART = 16  # samples from which models are made and judged on different ones
_MOST = 512  # samples to judge on
_FINE = 0.2  # points below which the weight of one sample affects no decision
_SECONDS = 1.0  # of latency measurement for each model


@dataclass(frozen=True)
class Candidate:
    """The model that a recipe makes, and what it is worth.

    drop            of the metric, in its own units, below the float model; on samples not used to make the model
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
    """The outcome of `auto`.

    trials      the candidates in the order in which they were made
    metric      its name
    reference   the float model's own value of the metric
    best        the candidate that was kept
    result      its model
    met         True if it is within the allowed drop
    notes       what the user should know
    """

    trials: tuple[Candidate, ...]
    metric: str
    reference: float
    best: Candidate
    result: Result
    met: bool
    notes: tuple[str, ...] = ()


def auto(
    model: Model,
    data: Source,
    *,
    max_drop: float = 1.0,
    prefer: Prefer = "speed",
    test: Source | None = None,
    labels: str | Path | Array | None = None,
    state: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    recipes: Sequence[str] = (),
    target: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    float32: bool = False,
    options: DataOptions | None = None,
    track: Track = silent,
    tell: Callable[[Candidate], None] = lambda _: None,
) -> AutoResult:
    """Try recipes in their order and keep the best within a drop.

    model      as for `quantize`
    data       samples; without `test`, every second one is kept apart to judge on, if there are 16 or more
    test       samples to judge on; `labels` are of these then
    max_drop   how far the metric may fall below the float model's, in its own units: percent of samples
    prefer     ``speed``: the first recipe within the drop, as all run integer kernels. ``size``: all are tried, the smallest
               file wins
    state      as for `quantize`, of both
    metric     as for `quantize`; top1 if there are labels, else agreement
    recipes    names or files, in place of the built-in choice
    tell       called with each candidate as soon as it was measured

    If no recipe stays within the drop, the one that drops least is kept, and `AutoResult.met` is False. Raises OnnxqError
    for inputs that cannot be used, and if no recipe makes a model.
    """
    _check_options(prefer, max_drop, metric)
    model = as_model(model)
    graph = load(model, float32=float32)
    options = options if state is None else replace(options or DataOptions(), state=dict(state))
    calibration, judging, notes = _samples(graph, data, test, labels, metric, options)
    judge = _Judge.of(graph, model, judging, metric)
    make = partial(quantize, model, data=calibration, target=target, seed=seed, workers=workers, cache=cache)
    candidates: list[Candidate] = []
    results: dict[str, Result] = {}
    for recipe in recipes or RECIPES[prefer]:
        try:
            results[recipe] = make(recipe=recipe, float32=float32, track=track)
        except OnnxqError as error:
            candidates.append(Candidate(recipe, why=str(error)))
        else:
            candidates.append(judge.candidate(recipe, results[recipe]))
        tell(candidates[-1])
        if prefer == "speed" and candidates[-1].drop <= max_drop:
            break
    best = _best(candidates, prefer, max_drop)
    notes = (*notes, *judge.notes(max_drop))
    name = metric_name(judge.metric)
    return AutoResult(tuple(candidates), name, judge.reference, best, results[best.recipe], best.drop <= max_drop, notes)


def _check_options(prefer: Prefer, max_drop: float, metric: str | Metric | None) -> None:
    """Raise OnnxqError for options that make no sense."""
    if prefer not in RECIPES:
        raise OnnxqError(f"prefer = '{prefer}' is unknown; known: {', '.join(get_args(Prefer))}.")
    if not max_drop >= 0:
        raise OnnxqError(f"max_drop = {max_drop} must be 0 or more.")
    if metric in ("sqnr", mean_sqnr):
        raise OnnxqError(
            "metric 'sqnr' has no drop: the float model's own has no bound; give another metric, such as "
            "agreement, and read the dB off the table."
        )


def _samples(
    graph: Graph,
    data: Source,
    test: Source | None,
    labels: str | Path | Array | None,
    metric: str | Metric | None,
    options: DataOptions | None,
) -> tuple[Data, Data, tuple[str, ...]]:
    """Samples to make models with, samples to judge them on, and what the user should know about that."""
    samples = runtimes.open_samples(data, graph, options, None if test is not None else labels)
    others = None if test is None else runtimes.open_samples(test, graph, options, labels)
    if metric in (None, "top1", top1):
        check_labels((samples if others is None else others).labels, graph.shape(graph.outputs[0]), graph.outputs[0])
    if others is None:
        return _halves(samples)
    same = data is test or (isinstance(data, (str, Path)) and isinstance(test, (str, Path)) and Path(data) == Path(test))
    note = "the samples to judge on are those that models are made with, which flatters the models"
    return samples, others, (note,) if same else ()


def _halves(data: Data) -> tuple[Data, Data, tuple[str, ...]]:
    """Every second sample to make models with, the others to judge on, and a note; too few are not split."""
    halves = data.halves()
    sizes = [half.size or 0 for half in halves]
    if sum(sizes) < _APART:
        note = (
            f"models are judged on the {sum(sizes)} samples they were made with, which flatters them; give --test, or "
            f"{_APART} samples or more"
        )
        return data, data, (note,)
    return *halves, (f"made with {sizes[0]} samples, judged on the other {sizes[1]}",)


@dataclass(frozen=True, eq=False)
class _Judge:
    """What models are judged by.

    outputs     of the float model for the feeds
    labels      of the feeds, or None
    reference   the float model's own value of the metric
    original    the user's own model, which may be slower than its canonical form
    """

    metric: Metric
    feeds: Sequence[Mapping[str, Array]]
    outputs: Sequence[Array]
    labels: Array | None
    reference: float
    original: runtimes.Session

    @classmethod
    def of(cls, graph: Graph, model: Path | onnx.ModelProto | Graph, data: Data, metric: str | Metric | None) -> _Judge:
        """A judge by a metric: by labels if none is named, by agreement if there are no labels either."""
        feeds, portions = data.spread(_MOST), data.spread_labels(_MOST)
        labels = None if portions is None else np.concatenate(portions)
        by = find_metric(metric) if metric is not None else percent_agreement if labels is None else top1
        outputs = runtimes.outputs(runtimes.session(graph.model()), feeds)
        own = graph.model() if isinstance(model, Graph) else model
        return cls(by, feeds, outputs, labels, by(outputs, outputs, labels), runtimes.session(own))

    def candidate(self, recipe: str, result: Result) -> Candidate:
        """What a recipe's model is worth."""
        quantized = runtimes.session(result.model)
        outputs = runtimes.outputs(quantized, self.feeds)
        feeds = [runtimes.wanted(self.original, self.feeds[0]), self.feeds[0]]
        before, after = runtimes.latency([self.original, quantized], feeds, _SECONDS)
        return Candidate(
            recipe,
            self.reference - self.metric(self.outputs, outputs, self.labels),
            mean_sqnr(self.outputs, outputs),
            result.report.size("quantized"),
            before / after,
            float(result.report["seconds"]),
        )

    def notes(self, max_drop: float) -> list[str]:
        """What limits the judgement: too few samples for the drop, a float model that guesses."""
        notes = []
        answers = int(np.argmax(self.outputs[0], axis=-1).size)
        if self.metric in (top1, percent_agreement) and 100 / answers > max(max_drop, _FINE):
            notes.append(
                f"one of {answers} samples is {100 / answers:.1f} points, more than the drop of {max_drop:g} to decide on: "
                "give more --test samples for a decision this fine"
            )
        if self.metric is top1:
            notes.append(chance(self.reference, self.outputs[0].shape[-1], len(self.outputs[0])))
        return [note for note in notes if note]


def _best(candidates: Sequence[Candidate], prefer: Prefer, max_drop: float) -> Candidate:
    """The candidate to keep. Raises OnnxqError if no recipe made a model."""
    usable = [candidate for candidate in candidates if not candidate.why]
    if not usable:
        raise OnnxqError(*dict.fromkeys(f"recipe '{candidate.recipe}': {candidate.why}" for candidate in candidates))
    within = [candidate for candidate in usable if candidate.drop <= max_drop]
    if not within:
        return min(usable, key=lambda candidate: candidate.drop)
    return min(within, key=lambda candidate: candidate.size if prefer == "size" else -candidate.speed)
