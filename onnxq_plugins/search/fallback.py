"""The smallest part of a network that must not be in 8 bits for its outputs to be as good as asked.

A few quantizers hold most of a destroyed network's noise: the output of a filterbank in front of a Log, a stem one of whose
channels reaches far beyond the others, a layer behind it. What one of them costs shows with it alone quantized, all others
in float: noise at the outputs is nearly additive. They are found by bisection. The network's quantizers are cut into a few
runs, each run is quantized alone, and the noisiest is cut in two, again and again, until what is left whole promises the
quality: for few culprits among hundreds of quantizers that takes some dozens of short runs.

A culprit is kept in 16 bits with all that shares its width, where the target has kernels for that; else in float, along with
the layers without which it would be rounded all the same, which breaks the integer chain it is part of. The network itself
is then measured, as often as it takes. What is found is not always the least: culprits are taken by noise per work, one
after another, and none is given back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, Histogram
from onnxq_plugins.data import open_data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.qdq import export
from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.arrays import decibels as energy_decibels
from onnxq_plugins.measure.arrays import is_float
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.measure.unlike import part_energies, part_name, parts
from onnxq_plugins.parallel import run_all
from onnxq_plugins.plan.floats import FloatSets
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.search.quantizers import Group, multiply_adds, quantizer_groups
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Array, Plan, QuantSpec, decode, from_range, solve_minmax, weight_codes
from onnxq_plugins.targets.refusals import problems

_MOST = 8  # layers that one tensor may need in float
_ROUNDS = 8  # of measuring the network for one level
_NEARLY = 0.2  # of the noise of the worst quantizer: one that has it may come first
_CHEAP = 0.01  # share of the multiply-adds below which layers are equally cheap
_ALONE = 4e8  # multiply-adds over the samples for one part alone; at least one sample, at most four
_WORK = 6e10  # multiply-adds for all parts alone
_EVALUATIONS = (48, 200)  # of parts alone, at least and at most
WIDE = 16  # bits of what is kept wide


@dataclass(frozen=True, eq=False)
class Fallback:
    """What a search found.

    plan     with the culprits in float or in 16 bits
    floats   operators that became float, in the order of the network
    wide     activations that became 16 bits wide
    constants  outside layers that became float
    sqnr     dB of each output of floats
    work     share of the network's multiply-adds in `floats`
    """

    plan: Plan
    floats: tuple[str, ...]
    wide: tuple[str, ...]
    constants: tuple[str, ...]
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
    brief     look for few culprits only
    """

    def __init__(self, job: Job, samples: Samples, brief: bool = False) -> None:
        self.job, self.samples = job, samples
        self.work = multiply_adds(job.graph, samples.feeds[0])
        total = max(float(sum(self.work.values())), 1.0)
        count = int(min(max(_ALONE / total, 1), 4))
        self.few = samples.few(count)
        least, most = _EVALUATIONS
        self.left = least if brief else int(min(max(_WORK / total / count, least), most))  # evaluations
        self.sets = FloatSets(job.graph, job.recipe, job.target, _MOST)
        self.base = self.sets.plan(())
        self._inputs = job.calibration.data.inputs if job.calibration.data is not None else []
        planned = Planned.of(job)
        self.read_by: dict[str, list[str]] = defaultdict(list)  # activation -> weights of the layers that read its codes
        for layer in planned.layers:
            self.read_by[planned.input(layer)].append(layer.weight)
        self.coded = planned.coded | {name for name in planned.activations if name not in self.read_by}
        self.constants = set(planned.constants)
        self._wide: dict[str, QuantSpec] = {}

    def measured(self, plan: Plan) -> Array:
        """dB of each output of floats, of the network as it is written: the same on every machine."""
        return decibels(self.job, self.samples, plan)

    def run(self, levels: Sequence[float], most: float) -> Fallback | None:
        """The network that reaches the highest of some levels, dB of each output; if none reaches the lowest, the best that
        was measured; None if there is nothing that can be kept from 8 bits.

        levels  ascending
        most    share of the multiply-adds that may be float for more than the lowest level
        """
        now = Fallback(self.job.plan, (), (), (), self.measured(self.job.plan), 0.0)
        best: Fallback | None = None
        parts = [_Part(names, np.empty(0)) for names in self._runs() if names]
        self._evaluate(parts)
        for n, level in enumerate(levels):
            target = level
            for _ in range(_ROUNDS):
                if now.sqnr.min() >= level:
                    break
                measured, alone = 10 ** (-now.sqnr / 10), sum((part.noise for part in parts), np.zeros(1))
                allowed = alone / measured * 10 ** (-target / 10)  # what the parts alone may add up to
                after = self._reduced(now, parts, allowed, most if n else 1.0)
                if after is None:
                    return best
                now = replace(after, sqnr=self.measured(after.plan))
                best = now if best is None or now.sqnr.min() > best.sqnr.min() else best
                target += max(min(level - float(now.sqnr.min()), 3.0), 0.5)
        return best

    def _runs(self) -> list[tuple[str, ...]]:
        """The quantizers by what they lose where they are, the worst first, in runs that grow: the culprits are mostly among
        the first few, and long runs of the others cost one measurement each."""
        planned, graph = Planned.of(self.job), self.job.graph
        calibration = Calibration(graph, open_data(self.few.feeds, self._inputs), workers=self.job.workers)
        histograms = calibration.histograms(planned.activations)
        lost = {name: _lost(histograms[name], self.job.plan[name]) for name in planned.activations}
        for layer in planned.layers:
            weight = graph.constant(layer.weight)
            lost[layer.weight] = _relative(weight, weight_values(layer, self.job.plan[layer.weight]))
        for name, spec in planned.constants.items():
            lost[name] = _relative(graph.constant(name), decode(spec.codes, spec)) if spec.codes is not None else 0.0
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
        self.left -= len(parts)
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

    def _reduced(self, now: Fallback, parts: list[_Part], allowed: Array, most: float) -> Fallback | None:
        """The plan after culprits were taken out, until the noise of the rest adds up to what is allowed; None if nothing
        was, or can be, or if that is too much work in float."""
        before = now
        while self.left > 0:
            total = sum((part.noise for part in parts), np.zeros(1))
            if not parts or (total <= allowed).all():
                break
            worst = self._worst(parts, total > allowed)
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
            now = self._without(now, left[0]) or now
            if now.work > most:
                return None
        return None if now is before else now

    def _worst(self, parts: Sequence[_Part], open_outputs: Array) -> _Part:
        """The noisiest part at the outputs that are not good enough; of single quantizers nearly as noisy the one whose
        layers are the least work."""
        noise = [float(np.where(open_outputs, part.noise, 0).max()) for part in parts]
        top = int(np.argmax(noise))
        if len(parts[top].names) > 1:
            return parts[top]
        near = [n for n, part in enumerate(parts) if len(part.names) == 1 and noise[n] >= _NEARLY * noise[top]]
        whole = max(float(sum(self.work.values())), 1.0)

        def price(n: int) -> float:
            return _CHEAP + sum(self.work.get(name, 0) for name in self.sets.names(parts[n].names[0])) / whole

        return parts[max(near, key=lambda n: noise[n] / price(n))]

    def _without(self, now: Fallback, name: str) -> Fallback | None:
        """The plan with one more quantizer in 16 bits or in float; None if that is impossible."""
        if wide := self._widened(now.plan, name):
            return replace(now, plan=now.plan | wide, wide=(*now.wide, *wide))
        if name in self.constants:
            return replace(now, plan=now.plan.without(name), constants=(*now.constants, name))
        names = self.sets.names(name)
        floats = tuple(sorted({*now.floats, *names}, key=lambda n: self.sets.order[n]))
        if not names or floats == now.floats:
            return None
        work = sum(self.work.get(n, 0) for n in floats) / max(sum(self.work.values()), 1)
        try:
            wanted = self.sets.plan(floats)
        except OnnxqError:
            return None
        kept = Plan({n: s for n, s in now.plan.items() if n in wanted or n not in self.base or n in self.constants})
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
        return Plan({n: from_range(*plan[n].value_range, replace(plan[n].request(), bits=WIDE)) for n in group.activations})

    def _groups(self, plan: Plan) -> Sequence[Group]:
        return quantizer_groups(self.job.graph, plan, self.job.target)


def _relative(exact: Array, rounded: Array) -> float:
    """The square of an error relative to that of the values."""
    return float(
        np.square(exact - rounded).sum(dtype=np.float64) / max(float(np.square(exact).sum(dtype=np.float64)), 1e-30)
    )


def _lost(histogram: Histogram, spec: QuantSpec) -> float:
    """Rounding noise of an activation relative to its variance, clipping included."""
    values, counts = histogram.centers, histogram.counts / max(histogram.counts.sum(), 1.0)
    low, high = spec.value_range
    spread = counts @ np.square(values - counts @ values) + ((histogram.high - histogram.low) / values.size) ** 2 / 12
    over = counts @ np.square(np.maximum(np.maximum(low - values, values - high), 0))
    return float((float(np.asarray(spec.scale)) ** 2 / 12 + over) / max(spread, 1e-30))


def decibels(job: Job, samples: Samples, plan: Plan) -> Array:
    """dB of each output of floats of a quantized network as it is written, the same on every machine; of each part of an
    output that holds two things (`measure.unlike`)."""
    return _decibels(samples, runtimes.session(export(job.graph, plan, job.target), written=True, lean=True))


def judged(samples: Samples) -> list[str]:
    """What `decibels` has a value of: outputs and parts of outputs, by name."""
    columns = zip(samples.names, samples.reference, strict=True)
    return [part_name(name, part) for name, values in columns if is_float(values) for part in parts(values)]


def _decibels(samples: Samples, session: runtimes.Session) -> Array:
    columns = list(zip(samples.reference, samples.outputs(session), strict=True))
    rows = [part_energies(y, z, part) for y, z in columns if is_float(y) for part in parts(y)]
    return np.array([energy_decibels(row) for row in rows])


def _noise(model: Array, samples: Samples) -> Array:
    """Noise of each output relative to its signal; plain values in and out, so that it runs anywhere."""
    return 10 ** (-_decibels(samples, runtimes.session(model.tobytes())) / 10)
