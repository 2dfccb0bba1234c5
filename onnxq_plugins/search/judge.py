"""Which of several plans makes the better network, judged on the whole of it and on samples that no solution saw.

    judge = Judge.of(job)                                   # None where there is nothing to judge by
    if judge is not None:
        verdict = judge.best({"minmax": one, "mse": other})  # the first wins ties: what is expected to be better
        job.plan = plans[verdict.name]                      # and say so: verdict.sqnr has the dB of each

A pass that chooses by the error of single layers, or of tensors, can lose where the network as a whole gains nothing by
that: errors that cancelled no longer do, weights fitted to clipped inputs extrapolate. Whoever solves on samples leaves
`held_out` ones out, and asks here in the end (law L9).

The measure is the mean of decibels over the samples, half of it that of the worst output, half that of all. Few samples are
judged, and what is pooled over few is what the loudest one says: on a face detector four of them pooled said 0.1 dB where
sixteen others said 4.4, pooled or not, and the mean of the four 2.3.

What one plan gains over another differs from sample to sample, and a mean over few of them can be above 0 by chance. So a
plan takes the place of the first only if it gains more than the standard error of the gain, paired sample by sample. On a
robot policy, ranges were 0.06 dB ahead on 32 samples, with a standard error of 0.54, and 0.5 behind on others. The first is
what is to stay where samples do not tell: what does least, or what is known to gain, such as learned codes of few bits.

The networks run as they are written (`runtimes.session(written=True)`), so that no machine's kernels decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import multiply_adds
from onnxq_plugins.data.samples import chosen
from onnxq_plugins.export.qdq import export
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import correct_biases
from onnxq_plugins.measure.arrays import is_float
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.measure.samples import FloatOutputs, Samples
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target

TIE = 0.1  # dB that decide nothing
SAMPLES = 32  # at most
_FEWEST = 4  # samples that must be affordable
WORK = 2e10  # multiply-adds of one network over the samples: one to three seconds
_RANGE = (-10.0, 60.0)  # dB
_KEPT = 2**24  # bytes of float outputs that are kept for the next judge
_FOLDED = 2**24  # weights up to which a session may hold them decoded, too: it runs several times faster


@dataclass(frozen=True)
class Verdict:
    """The better plan's name, and the dB of each, see `Judge.each`."""

    name: str
    sqnr: dict[str, float]

    def undone(self, what: str, other: str) -> str:
        """A sentence on the plan `other`, made by `what`, that was not chosen."""
        before, after = self.sqnr[self.name], self.sqnr[other]
        does = "lowers" if after < before else "does not clearly raise"
        return f"{what} {does} the outputs (from {before:.1f} to {after:.1f} dB) on the calibration samples that judge"

    @property
    def gain(self) -> float:
        """dB by which the best is ahead of the first."""
        return self.sqnr[self.name] - next(iter(self.sqnr.values()))


class Judge:
    """Scores plans of a job's network on at most 32 samples, fewer where they are much work. The float outputs are computed
    once.

    numbers   of the samples, among all of the job's data
    """

    def __init__(self, job: Job, samples: Samples, numbers: Sequence[int] = ()) -> None:
        self.job, self.samples, self.numbers = job, samples, list(numbers)

    @classmethod
    def of(cls, job: Job, *, apart: bool = True, work: float = WORK, least: int = 0) -> Judge | None:
        """The judge of a job; None without data, for a model that is random, and where even four samples are too much work.

        apart   on the samples that are held out from solutions; False: on all, for choices that cannot fit the samples, such
                as one of two methods
        work    multiply-adds of one network over all samples, at most
        least   samples, whatever they cost
        """
        data = job.calibration.data
        if data is None:
            return None
        afford = max(int(work / max(multiply_adds(job.graph, job.graph.layers, next(iter(data))), 1.0)), least)
        numbers = data.numbers(apart)
        if afford < min(_FEWEST, len(numbers)):
            return None
        kept = {numbers[i] for i in chosen(len(numbers), min(SAMPLES, afford), data.state)}
        feeds = [feed for n, feed in enumerate(data) if n in kept]
        weights: dict[str, Array] = {}
        model = job.graph.model(weights)
        known = _float_outputs(job, model, weights, dict(zip(sorted(kept), feeds, strict=True)))
        samples = Samples.of(model, feeds, class_axis=job.class_axis, state=data.state, known=known)
        return None if samples.random else cls(job, samples, sorted(kept))

    def sqnr(self, plan: Plan, graph: Graph | None = None) -> float:
        """How near the outputs are to the float ones, in dB: the mean of `each`."""
        return float(self.each(plan, graph).mean())

    def each(self, plan: Plan, graph: Graph | None = None) -> Array:
        """How near the outputs of each sample are to the float ones, see `decibels_of`. What the plan leaves open gets its
        default solution: extremes as ranges, the nearest codes and, where a pass of the recipe corrects biases, corrected
        ones. The job is not changed.

        graph   that the plan is about, where it is not the job's (any more)
        """
        graph = self.job.graph if graph is None else graph
        session = as_written(graph, self.completed(plan, graph), self.job.target)
        return decibels_of(self.samples.reference, self.samples.outputs(session, workers=self.job.workers))

    def completed(self, plan: Plan, graph: Graph | None = None) -> Plan:
        """A plan with the default solution of all that is open in it, see `each`."""
        job = self.job
        graph = job.graph if graph is None else graph
        calibration = job.calibration if graph is job.graph else job.calibration.of(graph)
        trial = replace(job, graph=graph, calibration=calibration, plan=plan, report=Report())
        uncoded = [y for y in Planned.of(trial).layers if trial.plan[y.weight].codes is None]
        complete(trial)
        if job.recipe.provides("bias"):
            correct_biases(trial, uncoded)
        return trial.plan

    def best(self, plans: Mapping[str, Plan]) -> Verdict:
        """The plan with the best outputs: the first one, unless another is ahead of it, see `ahead`."""
        scores = {name: self.each(plan) for name, plan in plans.items()}
        return Verdict(ahead(scores), {name: round(float(each.mean()), 2) for name, each in scores.items()})


def as_written(graph: Graph, plan: Plan, target: Target) -> runtimes.Session:
    """The quantized network of a solved plan, as the file says and not as kernels of this machine would run it. It holds the
    weights decoded where these are few; of many, each is decoded in front of its layer, whenever it runs."""
    few = sum(int(np.prod(y.shape)) for y in Planned(graph, plan, target).layers) <= _FOLDED
    return runtimes.session(export(graph, plan, target), written=few, optimize=few, lean=True, ordered=not few)


def _float_outputs(
    job: Job, model: onnx.ModelProto, weights: Mapping[str, Array], feeds: Mapping[int, dict[str, Array]]
) -> FloatOutputs:
    """What the float network gives for samples, by their numbers. Outputs that are not large are kept beside the samples, as
    one judge after another asks for those of the same network."""
    data = job.calibration.data
    assert data is not None
    key = job.graph.digest(), "outputs"
    for old in [other for other in data.known if other[1] == key[1] and other != key]:
        del data.known[old]
    random, rows = data.known.get(key, (False, {}))
    missing = [n for n in feeds if n not in rows]
    if missing:
        runner = runtimes.session(model, weights=weights, lean=True)
        fresh = FloatOutputs.of(runner, [feeds[n] for n in missing], job.workers)
        random, rows = random or fresh.random, {**rows, **dict(zip(missing, fresh.rows, strict=True))}
    found = FloatOutputs([rows[n] for n in feeds], random)
    if found.nbytes <= _KEPT:
        data.known[key] = random, {n: rows[n] for n in feeds}
    return found


def decibels_of(reference: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> Array:
    """SQNR in dB of each sample, half of it that of the output that is worst on the average, half the mean over outputs of
    floats; of the elements that are equal where no output is of floats (see `worst_sqnr`).

    reference, other   values of each output per sample

    Beyond 60 dB nothing is better, below -10 nothing is worse.
    """
    outputs = list(zip(reference, other, strict=True))
    floats = [pair for pair in outputs if is_float(pair[0])] or outputs
    each = np.array([[np.clip(worst_sqnr([[y]], [[z]]), *_RANGE) for y, z in zip(*p, strict=True)] for p in floats])
    if not each.size:
        return np.array([_RANGE[1]])
    return np.asarray((each[each.mean(axis=1).argmin()] + each.mean(axis=0)) / 2)


def ahead(scores: Mapping[str, Array]) -> str:
    """The name with the highest mean score among the first, and those that are ahead of it by more than `TIE` and by more
    than the standard error of their gain.

    scores   dB of each sample, the same samples for all names
    """
    first, *others = scores
    gains = {name: scores[name] - scores[first] for name in others}
    better = [name for name, gain in gains.items() if gain.mean() > 0 and clear(gain)]
    return max([first, *better], key=lambda name: float(scores[name].mean()))


def clear(gain: Array) -> bool:
    """True if a gain in dB of each sample, or a loss, is more than `TIE` and than its standard error."""
    return bool(abs(gain.mean()) > max(TIE, standard_error(gain)))


def standard_error(gain: Array) -> float:
    """Of the mean of the gains of samples; 0 of a single one, which says nothing about it."""
    return float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else 0.0
