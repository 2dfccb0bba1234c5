"""`onnxq auto`: try built-in recipes from cheap to costly, measure each on samples it was not made with, keep the best, or
the float model. Where none is good enough, what a diagnosis of the best suggests is tried as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data import Data, DataOptions, Source
from onnxq_plugins.engine import Result, quantize
from onnxq_plugins.errors import NUMBER, PATH, TABLE, TEXT, WHOLE, OnnxqError, expects, known
from onnxq_plugins.files import save_model
from onnxq_plugins.graph import Graph, Model, as_model, load
from onnxq_plugins.job import Metric
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.measure.classes import labelled
from onnxq_plugins.measure.metrics import (
    chance,
    check_graph_labels,
    find_metric,
    metric_name,
    percent_agreement,
    top1,
    worst_sqnr,
)
from onnxq_plugins.measure.samples import RANDOM, OutputScore, Samples
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.plugins import BUILTIN_SOURCE, find_plugins
from onnxq_plugins.report.attempts import with_remedy
from onnxq_plugins.report.candidates import FLOAT, Bar, Candidate, Prefer, choose
from onnxq_plugins.report.diagnosis import diagnose
from onnxq_plugins.report.goals import Goals
from onnxq_plugins.report.remedies import Remedy, quality
from onnxq_plugins.report.summary import original_size
from onnxq_plugins.runtimes.speed import against_first
from onnxq_plugins.spec import Array

# From cheap to costly. For speed, recipes that run in the same integer kernels: the first that is accurate enough is as fast
# as any. For size and accuracy all are tried.
RECIPES: dict[Prefer, tuple[str, ...]] = {
    "speed": ("int8", "int8-rounded"),
    "size": ("int8", "int8-storage", "mixed-coding-length", "mixed", "int4-rounded", "int4-storage"),
    "accuracy": ("int8", "int8-rounded"),
}
_ALL_FLOAT = {"target": "storage", "weights": {"bits": 32}, "activations": {"bits": 32}}  # a recipe
MAX_DROP, MIN_SQNR = 1.0, 20.0  # what is good enough where nobody says: percent of samples, dB
_APART = 16  # samples from which models are made and judged on different ones
_MOST = 512  # samples to judge on
_FINE = 0.2  # points below which the weight of one sample affects no decision
_DESTROYED = 5.0  # dB below which an output is lost, whatever the classes say
_MARGIN = 1.0  # dB that other samples may take off
_SATURATED = 1.0  # dB that the kernels of this machine must take off for others to be tried
_SECONDS = 0.5  # of runs in turn, for each model


@dataclass(frozen=True, eq=False)
class AutoResult:
    """The outcome of `auto`.

    trials      the candidates in the order in which they were made
    metric      its name
    reference   the float model's own value of the metric; infinite for SQNR
    best        the candidate that was kept: one of the trials, or `unchanged`
    result      its model; `result.recipe` is the recipe, whose text is `onnxq_plugins.recipe.to_toml(recipe.to_dict())`.
                Where float is kept, what a recipe without codes makes of it, while `save` writes it as it is
    met         True if it is within the allowed drop, or has the least SQNR
    notes       what the user should know
    unchanged   the float model as a candidate
    """

    trials: tuple[Candidate, ...]
    metric: str
    reference: float
    best: Candidate
    result: Result
    met: bool
    notes: tuple[str, ...] = ()
    unchanged: Candidate = Candidate(FLOAT)

    def save(self, path: str | Path) -> Path:
        """Write the model that was kept; the float model as it is."""
        own = self.result.original
        if not self.kept_float:
            return self.result.save(path)
        return save_model(onnx.load(str(own)) if isinstance(own, Path) else own, Path(path))

    @property
    def summary(self) -> str:
        """What was kept, in one line."""
        if not self.kept_float:
            return self.result.summary
        size = self.unchanged.size
        return f"the float model as it is | {f'{size / 1e6:.2f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'}"

    @property
    def kept_float(self) -> bool:
        """True if the float model itself is the best."""
        return self.best is self.unchanged

    @property
    def reason(self) -> str:
        """Why the float model was kept, or what is not faster than it, in a sentence; "" for a model that is."""
        best = self.best
        if not self.kept_float:
            if not best.met or best.faster:
                return ""
            pace = f"slower than float, {best.speed:.2f}x its speed" if best.slower else "about as fast as float"
            return f"{best.recipe} is {pace}, and was kept for its size"
        good = [trial for trial in self.trials if trial.met]
        speeds = ", ".join(f"{trial.recipe} {trial.speed:.2f}x its speed" for trial in good if trial.pace is not None)
        smaller = any(trial.size < self.unchanged.size for trial in good)
        hint = "; --prefer size makes it smaller" if smaller else ""
        return f"keep float: no recipe that is good enough is better{f' ({speeds})' if speeds else ''}{hint}"


@expects(max_drop=NUMBER, min_sqnr=NUMBER, attempts=WHOLE, target=TEXT, seed=WHOLE, workers=WHOLE, cache=PATH, state=TABLE)
def auto(
    model: Model,
    data: Source,
    *,
    max_drop: float | None = None,
    min_sqnr: float | None = None,
    prefer: Prefer = "speed",
    test: Source | None = None,
    labels: str | Path | Array | None = None,
    state: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    class_axis: int | None = None,
    recipes: Sequence[str] = (),
    attempts: int = 4,
    target: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    float32: bool = False,
    options: DataOptions | None = None,
    track: Track = silent,
    tell: Callable[[Candidate], None] = lambda _: None,
) -> AutoResult:
    """Try recipes in their order and keep the best that is good enough, or the float model where none is better.

    model      as for `quantize`
    data       samples; without `test`, every second one is kept apart to judge on, if there are 16 or more
    test       samples to judge on; `labels` are of these then
    max_drop   how far the metric may fall below the float model's, in its own units: percent of samples. None: 1
    min_sqnr   what the worst output must have where SQNR is the metric, dB. None: 20. A note says which one is not used
    prefer     ``speed``: the fastest within the drop; of the built-in recipes the first, as all run integer kernels;
               ``size``, ``accuracy``: the smallest, the most accurate of all. Slower than float is kept only for size
    metric     as for `quantize`, as are state and class_axis. None: top1 if there are labels of classes; else agreement if
               outputs are classes (no output may be below 5 dB then); else SQNR
    recipes    names or files, in place of the built-in choice. Raises OnnxqError if none makes a model
    attempts   remedies to try where no recipe is good enough, each on top of what helped: the most promising ones of a
               diagnosis of the best model, at last the smallest part of the network in float. Else what drops least is kept
    tell       called with each candidate as soon as it was judged; speeds come at the end
    """
    _check_options(prefer, max_drop, min_sqnr)
    given = {"max_drop": max_drop, "min_sqnr": min_sqnr}
    max_drop, min_sqnr = MAX_DROP if max_drop is None else max_drop, MIN_SQNR if min_sqnr is None else min_sqnr
    model = as_model(model)
    graph = load(model, float32=float32)
    options = options if state is None else replace(options or DataOptions(), state=dict(state))
    calibration, judging, notes = _samples(graph, data, test, labels, options, metric, class_axis)
    judge = _Judge.of(graph, model, judging, metric, class_axis, max_drop, min_sqnr)
    notes = (*notes, *_unused(given, judge, metric is None))
    trials = _Trials(judge, tell)
    make = partial(quantize, model, data=calibration, seed=seed, workers=workers, cache=cache, class_axis=class_axis)
    make = partial(make, float32=float32, check=False, track=track)
    for recipe in recipes or (*RECIPES[prefer], *guest_recipes(target)):
        if trials.add(recipe, partial(make, recipe, target=target)).met and prefer == "speed" and not recipes:
            break
    _improve(trials, attempts, workers, track)
    return trials.outcome(prefer, notes, original_size(graph, None if isinstance(model, Graph) else model), make)


def guest_recipes(target: str | None) -> list[str]:
    """The recipes of other packages for a target, or for those that run here."""
    plugins = find_plugins()
    names = [name for name in plugins.recipes if plugins.sources[f"recipe {name}"] != BUILTIN_SOURCE]
    made_for = {name: plugins.target_of(plugins.recipe(name)) for name in names}
    return [name for name, one in made_for.items() if (one.here if target is None else one.name == target)]


class _Trials:
    """The candidates so far, and their results by name."""

    def __init__(self, judge: _Judge, tell: Callable[[Candidate], None]) -> None:
        self.judge, self.tell = judge, tell
        self.candidates: list[Candidate] = []
        self.results: dict[str, Result] = {}

    def add(self, name: str, make: Callable[[], Result]) -> Candidate:
        """Make and judge one more."""
        try:
            result = make()
        except OnnxqError as error:
            found = Candidate(name, why=str(error))
        else:
            self.results[name], found = result, self.judge.candidate(name, result)
        self.candidates.append(found)
        self.tell(found)
        return found

    @property
    def nearest(self) -> Candidate:
        """The most accurate one. Raises OnnxqError if no recipe made a model."""
        usable = [candidate for candidate in self.candidates if not candidate.why]
        if not usable:
            raise OnnxqError(*dict.fromkeys(f"recipe '{one.recipe}': {one.why}" for one in self.candidates))
        return min(usable, key=lambda one: (not one.met, one.drop, -one.sqnr))

    def outcome(self, prefer: Prefer, notes: Sequence[str], size: int, make: Callable[..., Result]) -> AutoResult:
        """What is kept, once all candidates and the float model ran in turn.

        notes   on the samples
        size    bytes of the float model
        make    a result of a recipe
        """
        judge = self.judge
        own = Candidate(FLOAT, 0.0, IDENTICAL, True, size, 1.0)
        best, candidates, own = choose(judge.timed(self.candidates, self.results), own, prefer, judge.bar)
        result = make(_ALL_FLOAT) if best is own else self.results[best.recipe]
        notes = (*notes, *judge.notes(best.outputs))
        return AutoResult(candidates, metric_name(judge.metric), judge.reference, best, result, best.met, notes, own)


def _improve(trials: _Trials, attempts: int, workers: int | None, track: Track) -> None:
    """Try some remedies if no candidate is good enough."""
    best = trials.nearest
    result = trials.results[best.recipe]
    if best.met or attempts < 1 or result.data is None:
        return
    found = diagnose(result, alone=0, workers=workers, track=track)
    remedies = [remedy for _, remedy in found.promising if remedy not in found.overall][: attempts - 1]
    if found.written - found.sqnr >= _SATURATED:
        remedies = [Remedy("weights with which no sum saturates", ("target=ort-cpu-avx2",)), *remedies][: attempts - 1]
    for remedy in [*remedies, *quality(found.written, result.recipe, trials.judge.goal)]:
        base = trials.results[trials.nearest.recipe]
        if trials.add(f"{trials.nearest.recipe} + {remedy.name}", partial(_with, base, remedy)).met:
            break


def _with(result: Result, remedy: Remedy) -> Result:
    changed = with_remedy(result, remedy)
    assert isinstance(changed, Result)
    return changed


def _check_options(prefer: Prefer, max_drop: float | None, min_sqnr: float | None) -> None:
    """Raise OnnxqError for options that make no sense."""
    if prefer not in RECIPES:
        raise OnnxqError(f"prefer = '{prefer}' is unknown; {known(prefer, RECIPES)}.")
    if max_drop is not None and not max_drop >= 0:
        raise OnnxqError(f"max_drop = {max_drop} must be 0 or more.")
    Goals(sqnr=min_sqnr)


def _unused(given: Mapping[str, float | None], judge: _Judge, found: bool) -> list[str]:
    """A note for a limit that was given and says nothing about the metric, which was named or `found`."""
    decibels, name = judge.metric is worst_sqnr, metric_name(judge.metric)
    used, limit = ("min_sqnr", f"{judge.bar.sqnr:g} dB") if decibels else ("max_drop", f"{judge.bar.drop:g}")
    why = f"models are judged by {name}{', as no output tells classes apart' if decibels and found else ''}"
    return [
        f"{key} = {value:g} is not used: {why}; {used} decides, here {limit}"
        for key, value in given.items()
        if key != used and value is not None
    ]


def _samples(
    graph: Graph,
    data: Source,
    test: Source | None,
    labels: str | Path | Array | None,
    options: DataOptions | None,
    metric: str | Metric | None,
    class_axis: int | None,
) -> tuple[Data, Data, tuple[str, ...]]:
    """Samples to make models with, samples to judge them on, and what the user should know about that."""
    samples = runtimes.open_samples(data, graph, options, None if test is not None else labels)
    others = None if test is None else runtimes.open_samples(test, graph, options, labels)
    if metric in (None, "top1", top1):
        check_graph_labels(samples if others is None else others, graph, class_axis)
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
    halves[0].labels = None  # which only the judge asks
    return *halves, (f"made with {sizes[0]} samples, judged on the other {sizes[1]}",)


@dataclass(frozen=True, eq=False)
class _Judge:
    """What models are judged by.

    reference   the float model's own value of the metric
    bar         what is good enough
    original    the user's own model, which may be slower than its canonical form
    """

    metric: Metric
    samples: Samples
    reference: float
    bar: Bar
    original: runtimes.Session

    @classmethod
    def of(
        cls,
        graph: Graph,
        model: Path | onnx.ModelProto | Graph,
        data: Data,
        metric: str | Metric | None,
        class_axis: int | None,
        max_drop: float,
        min_sqnr: float,
    ) -> _Judge:
        """A judge by a metric. If none is named, by labels of classes, by agreement of classes, or by SQNR."""
        feeds, portions = data.spread(_MOST), data.spread_labels(_MOST)
        labels = None if portions is None else np.concatenate(portions)
        samples = Samples.of(graph.model(), feeds, labels, class_axis, state=data.state)
        if metric is not None:
            by = find_metric(metric)
        elif labels is not None and labelled(samples.reference, labels, samples.axes) is not None:
            by = top1
        else:
            by = percent_agreement if samples.telling else worst_sqnr
        own = graph.model() if isinstance(model, Graph) else model
        least = min_sqnr if by is worst_sqnr else _DESTROYED if metric is None and by is percent_agreement else -np.inf
        reference = np.inf if by is worst_sqnr else samples.score(by)
        noise = 100 / max(_answers(by, samples), 1) if by in (top1, percent_agreement) else 0.0
        bar = Bar(max_drop, least, noise, decibels=by is worst_sqnr)
        return cls(by, samples, reference, bar, runtimes.session(own))

    @property
    def goal(self) -> float | None:
        """dB to ask of every output, with a margin for samples that none was made with; None where they are not what
        counts."""
        return self.bar.sqnr + _MARGIN if self.metric is worst_sqnr else None

    def candidate(self, recipe: str, result: Result) -> Candidate:
        """What a recipe's model is worth, but for its speed."""
        outputs = self.samples.outputs(runtimes.session(result.model))
        sqnr = self.samples.score(worst_sqnr, outputs)
        if self.metric is worst_sqnr:
            drop = max(self.bar.sqnr - sqnr, 0.0)
            met = drop == 0
        else:
            drop = self.reference - self.samples.score(self.metric, outputs)
            met = drop <= self.bar.drop and sqnr >= self.bar.sqnr
        return Candidate(
            recipe,
            drop,
            sqnr,
            met,
            result.report.size("quantized"),
            seconds=float(result.report["seconds"]),
            outputs=tuple(self.samples.table(outputs)),
        )

    def timed(self, candidates: Sequence[Candidate], results: Mapping[str, Result]) -> list[Candidate]:
        """The candidates with their speed where it says something about their target: all run in turn with the user's own
        model."""
        here = [one for one in candidates if not one.why and _runs_here(results[one.recipe])]
        runners = [self.original, *(runtimes.session(results[one.recipe].model) for one in here)]
        speeds = against_first(runners, self.samples.feeds[0], _SECONDS * len(runners)) if here else []
        paces = {one.recipe: pace for one, pace in zip(here, speeds[1:], strict=True)}
        return [replace(one, speed=pace.ratio, pace=pace) if (pace := paces.get(one.recipe)) else one for one in candidates]

    def notes(self, outputs: Sequence[OutputScore]) -> list[str]:
        """What limits the judgement: too few samples for the drop, a float model that guesses or is random, outputs that
        cannot be compared."""
        notes, samples = [RANDOM] if self.samples.random else [], self.samples
        if self.metric is worst_sqnr and samples.labels is not None:
            notes.append("the labels are not classes of any output, so that models are judged by SQNR")
        answers = _answers(self.metric, samples)
        if self.metric in (top1, percent_agreement) and 100 / max(answers, 1) > max(self.bar.drop, _FINE):
            notes.append(
                f"one of {answers} samples is {100 / max(answers, 1):.1f} points, more than the drop of {self.bar.drop:g} "
                "to decide on: give more --test samples for a decision this fine"
            )
        if self.metric is top1 and samples.labels is not None:
            notes.append(chance(self.reference, samples.reference, samples.labels, samples.axes))
        notes += [f"output '{output.name}': {output.note}" for output in outputs if output.note]
        return [note for note in notes if note]


def _answers(metric: Metric, samples: Samples) -> int:
    """How many answers a metric counts."""
    return int(samples.labels.size) if metric is top1 and samples.labels is not None else samples.answers


def _runs_here(result: Result) -> bool:
    """True if the model runs in onnxruntime on this machine as it will in use; float operators run anywhere."""
    return result.target.here or not result.target.integer
