"""The end of every run: float and quantized network side by side on a few samples. What each output is worth, how fast the
result is, how large, and what to try if one of these is bad, so that nothing bad leaves in silence.

The float network is the user's own model, the quantized one the model as it is exported, in onnxruntime as it will run. Work
is counted: some samples (those that `search.quality` judged on, else held-out ones), then at most 60 pairs of runs in turn
within a third of a second, or five. Beyond a second, or a tenth of the time that quantizing took, two samples and three
pairs are enough."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import multiply_adds
from onnxq_plugins.calibration.synthetic import SYNTHETIC
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.job import FLOAT, Job
from onnxq_plugins.measure.arrays import IDENTICAL, leaves
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.measure.verdict import Verdict, bounded_outputs, judge_outputs
from onnxq_plugins.runtimes.examples import examples, first_running
from onnxq_plugins.runtimes.speed import Speed, side_by_side
from onnxq_plugins.spec import Array

Feeds = Sequence[dict[str, Array]]
_SAMPLES, _STEPS, _FEWEST = 16, 32, 2
_WORK = 1e9  # multiply-adds over the samples
_BYTES = 2**26  # of their outputs
_SECONDS, _SHARE = 1.0, 0.1  # at most, or that part of the time so far
_TIMING = 0.3  # seconds of runs in turn
_TINY = 0.1  # milliseconds of a network that no kernel makes faster
RANDOM = "random inputs"  # a kind of samples
_SMALL = 2e4  # bytes of a file that may be more names than weights
_WIDE = 12.0  # bits per weight that are not those of an 8-bit model


@dataclass(frozen=True)
class Check:
    """What a run ends with: the quantized network beside the user's own model.

    outputs   what each output is worth on the samples; () if the float model is random
    samples   how many samples, or steps of a stream, that is
    kind      what these are, in words
    speed     interleaved runs on one thread; None if the result does not run here as it will in use
    before, after   bytes of both models
    seconds   that the check took
    warning   what is bad, and the one thing to try; "" if nothing is
    """

    outputs: tuple[Verdict, ...]
    samples: int
    kind: str
    speed: Speed | None
    before: int
    after: int
    seconds: float = 0.0
    warning: str = ""

    @property
    def real(self) -> bool:
        """True if the samples are the user's, so that decibels say what they will be in use."""
        return self.kind in ("samples", "steps")

    @property
    def where(self) -> str:
        """How many samples of what kind, in words."""
        whose = "calibration " if self.real else ""
        return self.kind if self.kind == RANDOM else counted(self.samples, f"{whose}{self.kind.removesuffix('s')}")

    @property
    def worst(self) -> Verdict | None:
        """The output with the fewest dB among those that vary; None if there is none of floats."""
        floats = [y for y in self.outputs if y.sqnr is not None and (y.grade != "idle")]
        return min(floats, key=lambda y: y.sqnr or 0.0, default=None)

    @property
    def sqnr(self) -> float | None:
        """Its dB."""
        return None if self.worst is None else self.worst.sqnr

    @property
    def destroyed(self) -> tuple[str, ...]:
        """Names of the outputs that are nothing but noise, or always the same."""
        return tuple(y.name for y in self.outputs if y.grade == "destroyed")

    @property
    def slower(self) -> bool:
        """True if the float model is faster on this machine, for sure."""
        return self.speed is not None and self.speed.slower

    @property
    def larger(self) -> bool:
        """True if the float model's file is smaller."""
        return self.after > self.before

    @property
    def text(self) -> str:
        """It in a few words, for the summary."""
        parts = [self._accuracy, self._pace]
        return ", ".join(part for part in parts if part)

    @property
    def _accuracy(self) -> str:
        where = f" on {self.where}"
        if self.sqnr is not None:
            return ("exact" if self.sqnr >= IDENTICAL else f"{self.sqnr:.1f} dB") + where
        same = [y.same for y in self.outputs if y.same is not None]
        return f"{min(same):.1f} % the same{where}" if same else ""

    @property
    def _pace(self) -> str:
        return "" if self.speed is None else self.speed.text

    def to_dict(self) -> dict[str, Any]:
        """As plain values, rounded."""
        speed: dict[str, Any] = {}
        if self.speed is not None:
            numbers = {"ratio": self.speed.ratio, "low": self.speed.low, "high": self.speed.high}
            times = {"float": self.speed.reference, "quantized": self.speed.quantized}
            speed |= {key: round(value, 3) for key, value in numbers.items()}
            speed |= {"pairs": self.speed.pairs, "milliseconds": {key: round(value, 4) for key, value in times.items()}}
        return {
            "samples": self.samples,
            "kind": self.kind,
            "outputs": [y.to_dict() for y in self.outputs],
            "sqnr": None if self.sqnr is None else round(self.sqnr, 2),
            "speed": speed or None,
            "bytes": {"float": self.before, "quantized": self.after},
            "destroyed": list(self.destroyed),
            "slower": self.slower,
            "larger": self.larger,
            "seconds": round(self.seconds, 3),
        }


def self_check(
    job: Job,
    model: onnx.ModelProto,
    source: Path | onnx.ModelProto | None,
    began: float,
    judged: Samples | None = None,
    folder: Path | None = None,
) -> Check | None:
    """Check the exported model of a job, and complete the report: ``check``, ``warnings``, notes and the summary. None if
    the two cannot be run.

    source   the user's own model; None for the job's graph
    began    when quantizing began, by `time.perf_counter`
    judged   samples that the job's outputs were judged on
    folder   of the external data of a model too large for a second copy in memory
    """
    data, start = job.calibration.data, time.perf_counter()
    if data is None and folder is not None:
        return None
    until = start + max(_SECONDS, _SHARE * (start - began))
    runtimes.trim()  # of what solving leaves behind: two whole networks follow
    here = job.target.here or not job.target.integer  # float operators run here as anywhere
    with job.graph.mapped.reading():
        try:
            own = _own(job, source, folder is not None)
            quantized = runtimes.session(model, folder=folder, written=not here)
            kind, feeds = _feeds(job, judged, (own, quantized), source, model)
            runs = _Runs(own, quantized, feeds, {} if data is None else data.state)
        except OnnxqError as error:
            if data is not None:
                job.note(f"the result was not checked: {error}")
            return None
        try:
            runs.run(lambda count: count >= _FEWEST and time.perf_counter() > until and not job.recipe.quality.asked)
            speed = runs.speed(until - time.perf_counter()) if here and folder is None else None
        except OnnxqError as error:
            text = f"the result does not run on sample {len(runs.reference)}: {error}"
            job.note(f"in onnxruntime {text}") if job.target.foreign else _warn(job, text)
            return None
    names = [output.name for output in model.graph.output]
    outputs = () if runs.random else judge_outputs(names, *runs.columns(), bounded_outputs(model))
    size = job.report["bytes"]
    check = Check(outputs, len(runs.reference), kind, speed, size["float"], size["quantized"])
    check = replace(check, warning=_warning(job, check), seconds=time.perf_counter() - start)
    _report(job, check, runs.random)
    return check


def _own(job: Job, source: Path | onnx.ModelProto | None, large: bool) -> runtimes.Session:
    """A session of the user's own model; of the job's graph, whose weights stay where they are, if that is gone or large."""
    if source is not None and not large:
        return runtimes.session(source)
    weights: dict[str, Array] = {}
    return runtimes.session(job.graph.model(weights), weights=weights)


def _feeds(
    job: Job,
    judged: Samples | None,
    runners: tuple[runtimes.Session, runtimes.Session],
    source: Path | onnx.ModelProto | None,
    model: onnx.ModelProto,
) -> tuple[str, Feeds]:
    """What to run on, and what that is in words. Raises OnnxqError where there is no data and no example runs."""
    data = job.calibration.data
    if data is None:
        own = onnx.load(str(source), load_external_data=False) if isinstance(source, Path) else source
        return RANDOM, [dict(first_running(examples([own or model, model]), runners))]
    kind = "synthetic samples" if data.where == SYNTHETIC else "steps" if data.state else "samples"
    if judged is not None:
        return kind, [dict(feed) for feed in judged.feeds]
    afford = int(_WORK / max(multiply_adds(job.graph, job.graph.layers, next(iter(data))), 1.0))
    return kind, data.spread(min(_STEPS if data.state else _SAMPLES, max(afford, _FEWEST)), apart=True)


class _Runs:
    """Both networks on some feeds.

    reference, other   the outputs of each feed
    random             True if the float network gives other outputs for the same feed
    """

    def __init__(self, own: runtimes.Session, quantized: runtimes.Session, feeds: Feeds, state: Mapping[str, str]) -> None:
        self.own, self.quantized, self.feeds, self.state = own, quantized, feeds, state
        self.reference: list[list[Any]] = []
        self.other: list[list[Any]] = []
        self.random = False
        self._first = own.run(None, dict(runtimes.wanted(own, feeds[0])))
        self._times: list[tuple[float, float]] = []

    def run(self, stop: Callable[[int], bool]) -> None:
        """Run all feeds, or as many as `stop` lets."""
        size = 0
        for count, feed in enumerate(self.feeds):
            if stop(count) or (count >= _FEWEST and size > _BYTES):
                break
            begin = time.perf_counter()
            self.reference.append(self.own.run(None, dict(runtimes.wanted(self.own, feed))))
            middle = time.perf_counter()
            size += sum(leaf.nbytes for value in self.reference[-1] for leaf in leaves(value))
            if self.state:  # steps run on states of their own, all at the end
                continue
            begin_other = time.perf_counter()
            self.other.append(self.quantized.run(None, dict(runtimes.wanted(self.quantized, feed))))
            self._times.append((middle - begin, time.perf_counter() - begin_other))
        self.random = pickle.dumps(self._first) != pickle.dumps(self.reference[0])
        if self.state:
            names = [output.name for output in self.own.get_outputs()]
            columns = list(zip(*self.reference, strict=True))
            feeds = self.feeds[: len(self.reference)]
            samples = Samples(feeds, names, columns, None, [None] * len(names), state=self.state)
            self.other = [list(row) for row in zip(*samples.outputs(self.quantized), strict=True)]

    def columns(self) -> tuple[list[list[Any]], list[list[Any]]]:
        """The values of each output per feed, in both networks."""
        return [list(y) for y in zip(*self.reference, strict=True)], [list(z) for z in zip(*self.other, strict=True)]

    def speed(self, left: float) -> Speed:
        """Runs in turn. Pairs of slow networks count from before, without the first, which found everything cold.

        left   seconds
        """
        both = [(runtimes.wanted(self.own, x), runtimes.wanted(self.quantized, x)) for x in self.feeds]
        slow = self._times[1:] if np.sum(self._times[1:]) > _TIMING else []
        limit = max(left, 0.0)
        return side_by_side((self.own, self.quantized), both, slow, min(_TIMING, limit), limit)


# ---- what is said ---------------------------------------------------------------------------------------------------------


def _report(job: Job, check: Check, random: bool) -> None:
    """Put a check into the report: numbers, the summary, a warning and notes."""
    report = job.report
    report["check"] = check.to_dict()
    if check.text:
        report["summary"] = f"{report.summary} | {check.text}"
    if check.warning:
        _warn(job, check.warning)
    idle = [y for y in check.outputs if y.grade == "idle"]
    if idle and check.kind != RANDOM:
        job.note(f"{_named(idle)}: {_worst(idle)}, so that nobody can say what is left of it; give others to see")
    if random:
        job.note("the float model is random, the same input gives other outputs: nothing can be said about accuracy")


def _warn(job: Job, text: str) -> None:
    job.report.warnings.append(text)


def _warning(job: Job, check: Check) -> str:
    """What is bad, and the one thing to try; "" if nothing is."""
    lost = [y for y in check.outputs if y.grade == "destroyed"]
    poor = [y for y in check.outputs if y.grade == "poor" and check.kind != RANDOM]
    bad: list[str] = []
    if lost:
        bad.append(f"{_named(lost)} {'is' if len(lost) == 1 else 'are'} destroyed: {_worst(lost)} on {check.where}")
    elif poor:
        bad.append(f"{_named(poor)} {'is' if len(poor) == 1 else 'are'} poor: {_worst(poor)} on {check.where}")
    if check.speed is not None and check.slower:
        bad.append(f"slower than float: {check.speed.ratio:.2f}x its speed")
    if check.larger:
        bad.append(f"larger than float: {check.after / 1e3:.1f} kB, not {check.before / 1e3:.1f}")
    return f"{'; '.join(bad)}; next: {_advice(job, check)}" if bad else ""


def _named(verdicts: Sequence[Verdict]) -> str:
    names = ", ".join(f"'{y.name}'" for y in verdicts[:3]) + (f" and {len(verdicts) - 3} more" if len(verdicts) > 3 else "")
    return f"output{'s' * (len(verdicts) > 1)} {names}"


def _worst(verdicts: Sequence[Verdict]) -> str:
    """What is wrong with the worst of them."""
    worst = min(verdicts, key=lambda y: -np.inf if y.sqnr is None else y.sqnr)
    return worst.why if len(verdicts) == 1 else f"'{worst.name}' {worst.why}"


def _advice(job: Job, check: Check) -> str:
    """The next thing to try."""
    recipe, target, keep = job.recipe, job.target, "keep the float model"
    rounded = recipe.activations.bits < FLOAT
    poor = any(y.grade in ("poor", "destroyed") for y in check.outputs)
    more = "-r int8 " if poor and recipe.weights.bits < 8 else ""
    stored = f"{more}--target storage --set activations.bits=32, small weights that compute in float"
    if check.larger and (job.report.bits_per_weight < _WIDE or check.before < _SMALL):
        return f"{keep}, which is too small to gain"
    if check.larger:  # a part stayed float, or a weight became several
        chosen = any(reason.kind != "pass" for reason in job.report.floats.values())
        return keep if recipe.quality.asked else stored if chosen and rounded else "-r int8, with smaller weights"
    if check.slower:
        if check.speed is not None and check.speed.reference < _TINY:
            return f"{keep}, which takes only {check.speed.reference:.3f} ms"
        if not target.integer:
            return "--set activations.bits=32, without the rounding between layers" if rounded else keep
        return stored if rounded else f"{more}--target storage, small weights that compute in float"
    if job.calibration.data is None:
        return "give samples (--data)"
    if recipe.weights.bits < 8:
        return "-r int8, with more bits" if rounded and target.integer else "--set weights.bits=8"
    if not recipe.quality.asked:
        return "--min-sqnr 20, which leaves in float what costs most"
    return "onnxq diagnose, which shows where it is lost"
