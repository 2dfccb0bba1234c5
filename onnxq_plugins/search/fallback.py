"""The smallest part of a network that must not be in 8 bits for its outputs to be as good as asked.

A few quantizers hold most of a destroyed network's noise: the output of a filterbank in front of a Log, a stem one of whose
channels reaches far beyond the others, a layer behind it. What one of them costs shows with it alone quantized, all others
in float: noise at the outputs is nearly additive. They are found by bisection. The network's quantizers are cut into a few
runs, each run is quantized alone, and the noisiest is cut in two, again and again, until what is left whole promises the
quality: for few culprits among hundreds of quantizers that takes some dozens of short runs.

A culprit is kept in 16 bits with all that shares its width, where the target has kernels for that; else in float, along with
the layers without which it would be rounded all the same, which breaks the integer chain it is part of. The network itself
is then measured, as often as it takes; what turns out to be dispensable in the end becomes integer again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, Histogram
from onnxq_plugins.data import open_data
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.export.qdq import export
from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.parallel import run_all
from onnxq_plugins.plan.floats import FloatSets
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.search.quantizers import Group, multiply_adds, quantizer_groups
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Array, Plan, QuantSpec, from_range, solve_minmax, weight_codes
from onnxq_plugins.targets.refusals import problems

_MOST = 8  # layers that one tensor may need in float
_EVALUATIONS = 200  # of parts alone
_ROUNDS = 12  # of measuring the network
_ALONE = 2  # samples for parts alone
WIDE = 16  # bits of what is kept wide


@dataclass(frozen=True, eq=False)
class Fallback:
    """What a search found.

    plan     with the culprits in float or in 16 bits
    floats   operators that became float, in the order of the network
    wide     activations that became 16 bits wide
    sqnr     dB of each output of floats
    work     share of the network's multiply-adds in `floats`
    """

    plan: Plan
    floats: tuple[str, ...]
    wide: tuple[str, ...]
    sqnr: Array
    work: float


@dataclass(eq=False)
class _Part:
    """A run of quantizers, and its noise at each output relative to the signal there."""

    names: tuple[str, ...]
    noise: Array


class Search:
    """A search on a job whose plan is solved.

    samples   the network is judged on
    """

    def __init__(self, job: Job, samples: Samples) -> None:
        self.job, self.samples = job, samples
        few = samples.feeds[:_ALONE]
        self.few = Samples(few, samples.names, [v[:_ALONE] for v in samples.reference], None, samples.axes)
        self.sets = FloatSets(job.graph, job.recipe, job.target, _MOST)
        self.base = self.sets.plan(())
        self._inputs = job.calibration.data.inputs if job.calibration.data is not None else []
        self.work = multiply_adds(job.graph, samples.feeds[0])
        self.evaluated = 0
        planned = Planned.of(job)
        self.read_by: dict[str, list[str]] = defaultdict(list)  # activation -> weights of the layers that read its codes
        for layer in planned.layers:
            self.read_by[planned.input(layer)].append(layer.weight)
        self.coded = planned.coded | {name for name in planned.activations if name not in self.read_by}
        self._wide: dict[str, QuantSpec] = {}

    def measured(self, plan: Plan) -> Array:
        """dB of each output of floats, of the network as it is written: the same on every machine."""
        session = runtimes.session(export(self.job.graph, plan, self.job.target), optimize=False)
        return _decibels(self.samples, session)

    def run(self, least: float, most: float) -> list[Fallback]:
        """The networks that were measured on the way to `least` dB at each output, the last of which reaches it, if one can
        within the allowed work.

        most   share of the multiply-adds that may become float
        """
        found: list[Fallback] = []
        target, now = least, Fallback(self.job.plan, (), (), self.measured(self.job.plan), 0.0)
        parts = [_Part(names, np.empty(0)) for names in self._runs() if names]
        self._evaluate(parts)
        for _ in range(_ROUNDS):
            allowed = 10 ** (-target / 10)
            after = self._reduced(now, parts, allowed, most)
            if after is None:
                break
            now = replace(after, sqnr=self.measured(after.plan))
            found.append(now)
            if now.sqnr.min() >= least:
                break
            target = target + max(min(least - float(now.sqnr.min()), 3.0), 0.5)
        return found

    def _runs(self) -> list[tuple[str, ...]]:
        """The quantizers by what they lose where they are, the worst first, in runs that grow: the culprits are mostly among
        the first few, and long runs of the others cost one measurement each."""
        planned, graph = Planned.of(self.job), self.job.graph
        calibration = Calibration(graph, open_data(self.few.feeds, self._inputs), workers=self.job.workers)
        histograms = calibration.histograms(planned.activations)
        lost = {name: _lost(histograms[name], self.job.plan[name]) for name in planned.activations}
        for layer in planned.layers:
            weight = graph.constant(layer.weight)
            error = weight - weight_values(layer, self.job.plan[layer.weight]).reshape(weight.shape)
            lost[layer.weight] = float(np.square(error).sum() / max(float(np.square(weight).sum()), 1e-30))
        names = sorted(lost, key=lambda name: -lost[name])
        runs, at = [], 0
        while at < len(names):
            size = max(1, at // 2)
            runs.append(tuple(names[at : at + size]))
            at += size
        return runs

    def _evaluate(self, parts: Iterable[_Part]) -> None:
        """Measure the noise of parts, each alone."""
        parts = list(parts)
        calls = []
        for part in parts:
            own = {name: self.job.plan[name] for name in part.names}
            exact = {name: self._exact(name) for key in part.names for name in self.read_by.get(key, ()) if name not in own}
            model = export(self.job.graph, Plan({**exact, **own}), ALONE, self.coded).SerializeToString()
            calls.append(partial(_noise, np.frombuffer(model, np.uint8), self.few))
        self.evaluated += len(parts)
        for part, noise in zip(parts, run_all(calls, self.job.workers), strict=True):
            part.noise = noise

    def _exact(self, weight: str) -> QuantSpec:
        """An entry of so many bits that its noise is none: what reads codes needs a planned weight."""
        if weight not in self._wide:
            spec = QuantSpec(WIDE, True, self.job.plan[weight].block)
            values = self.job.graph.constant(weight)
            spec = solve_minmax(values, spec)
            self._wide[weight] = replace(spec, codes=weight_codes(values, spec))
        return self._wide[weight]

    def _reduced(self, now: Fallback, parts: list[_Part], allowed: float, most: float) -> Fallback | None:
        """The plan after culprits were taken out, until the noise of the rest adds up to what is allowed; None if nothing
        was, or can be."""
        before = now
        while self.evaluated < _EVALUATIONS:
            total = sum((part.noise for part in parts), np.zeros(1))
            if not parts or (total <= allowed).all():
                break
            worst = max(parts, key=lambda part: float(np.where(total > allowed, part.noise, 0).max()))
            parts.remove(worst)
            left = tuple(name for name in worst.names if name in now.plan and now.plan[name].bits < WIDE)
            if len(left) < len(worst.names):
                if left:
                    parts.append(again := _Part(left, worst.noise))
                    self._evaluate([again])
                continue
            if len(left) > 1:
                halves = [_Part(left[: len(left) // 2], worst.noise), _Part(left[len(left) // 2 :], worst.noise)]
                self._evaluate(halves)
                parts += halves
                continue
            now = self._without(now, left[0], most) or now
        return None if now is before else now

    def _without(self, now: Fallback, name: str, most: float) -> Fallback | None:
        """The plan with one more quantizer in 16 bits or in float; None if that is impossible, or too much work."""
        if wide := self._widened(now.plan, name):
            return replace(now, plan=now.plan | wide, wide=(*now.wide, *wide))
        names = self.sets.names(name)
        floats = tuple(sorted({*now.floats, *names}, key=lambda n: self.sets.order[n]))
        if not names or floats == now.floats:
            return None
        work = sum(self.work.get(n, 0) for n in floats) / max(sum(self.work.values()), 1)
        if work > most:
            return None
        try:
            wanted = self.sets.plan(floats)
        except OnnxqError:
            return None
        kept = Plan({n: spec for n, spec in now.plan.items() if n in wanted or n not in self.base})
        fresh = Plan({n: spec for n, spec in wanted.items() if n not in self.base and n not in kept})
        trial = replace(self.job, plan=kept | fresh)
        planned = Planned.of(trial)
        if problems(trial.target, trial.graph, trial.plan, {y.name: planned.input(y) for y in planned.layers}):
            return None
        complete(trial)
        return replace(now, plan=trial.plan, floats=floats, work=work)

    def _widened(self, plan: Plan, name: str) -> Plan:
        """Entries of 16 bits for all that shares the width of an activation; none where the target lacks kernels."""
        if WIDE not in self.job.target.activation_bits or self.job.graph.is_constant(name):
            return Plan({})
        group = next(g for g in self._groups(plan) if name in g.activations)
        layers = {y.name: y for y in self.job.graph.layers}
        rules = (self.job.target.rule(layers[n], plan[layers[n].weight], WIDE) for n in group.layers)
        if any(rule is None for rule in rules):
            return Plan({})
        return Plan(
            {n: from_range(*plan[n].value_range, replace(plan[n].request(), bits=WIDE)) for n in group.activations}
        )

    def _groups(self, plan: Plan) -> Sequence[Group]:
        return quantizer_groups(self.job.graph, plan, self.job.target)


def _lost(histogram: Histogram, spec: QuantSpec) -> float:
    """Rounding noise of an activation relative to its variance, clipping included."""
    values, counts = histogram.centers, histogram.counts / max(histogram.counts.sum(), 1.0)
    low, high = spec.value_range
    spread = counts @ np.square(values - counts @ values) + ((histogram.high - histogram.low) / values.size) ** 2 / 12
    over = counts @ np.square(np.maximum(np.maximum(low - values, values - high), 0))
    return float((float(np.asarray(spec.scale)) ** 2 / 12 + over) / max(spread, 1e-30))


def _decibels(samples: Samples, session: runtimes.Session) -> Array:
    """dB of each output of floats."""
    return np.array([row.sqnr for row in samples.table(samples.outputs(session)) if row.sqnr is not None])


def _noise(model: Array, samples: Samples) -> Array:
    """Noise of each output relative to its signal; plain values in and out, so that it runs anywhere."""
    return 10 ** (-_decibels(samples, runtimes.session(model.tobytes())) / 10)
