"""The smallest part of a network that must not be in 8 bits for its outputs to be as good as asked.

A few quantizers hold most of a destroyed network's noise: the output of a filterbank in front of a Log, a stem one of whose
channels reaches far beyond the others, a layer behind it. What one of them costs shows with it alone quantized, all others
in float: noise at the outputs is nearly additive. They are found by bisection. The network's quantizers are cut into a few
runs, each run is quantized alone, and the noisiest is cut in two, again and again, until what is left whole promises the
quality: for few culprits among hundreds of quantizers that takes some dozens of short runs.

A culprit is kept in 16 bits with all that shares its width, where the target has kernels for that; else in float, along with
the layers without which it would be rounded all the same, which breaks the integer chain it is part of. Where the target
quantizes as a whole, any activation can be an island of floats (`plan.islands`): between operators other than layers it
costs little. The network itself
is then measured, as often as it takes. Culprits are taken by noise per work, one after another; in the end those that cost
most work go back to 8 bits where the quality is kept without them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from onnxq_plugins.calibration import Calibration, Histogram
from onnxq_plugins.data import open_data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.floats import FloatSets
from onnxq_plugins.plan.grids import natural_grids
from onnxq_plugins.plan.islands import layers_beside, turned_float, with_islands
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.search.alone import Alone
from onnxq_plugins.search.quantizers import Group, multiply_adds, quantizer_groups
from onnxq_plugins.search.unseen import Unseen, decibels, output_decibels
from onnxq_plugins.spec import Array, Plan, QuantSpec, decode, from_range
from onnxq_plugins.targets import STORED, channel_block
from onnxq_plugins.targets.refusals import problems

_MOST = 8  # layers that one tensor may need in float
_ROUNDS = 8  # of measuring the network for one level
_STEP = 0.5  # dB by which to aim higher each time, as noise alone is not quite additive
_NEARLY = 0.2  # of the noise of the worst quantizer: one that has it may come first
_CHEAP = 0.01  # share of the multiply-adds below which layers are equally cheap
_ALONE = 4e8  # multiply-adds over the samples for one part alone, at least of one sample
_FEW = 8  # samples for that at most
_WORK = 1e11  # multiply-adds for all parts alone
_EVALUATIONS = (48, 120)  # of parts alone, at least and at most
_FREE = 0.1  # of the noise at a level that activations beside no layer may have
_REST = 0.02  # of the noise of a run that one half has, for the other half
_TRIES = 3  # of giving back a culprit
_SLACK = 1.0  # dB by which noise that is added up may be above what is measured
_OPERATORS = 100  # bytes of what decodes a weight
_ROOM = 0.25  # of a range, beyond either end of it in 16 bits, which have steps to spare: other samples reach further
WIDE = 16  # bits of what is kept wide


@dataclass(frozen=True, eq=False)
class Fallback:
    """What a search found.

    taken    quantizers that are not in 8 bits any more, in the order in which they were found
    plan     without them
    floats   operators that became float, in the order of the network: layers and products of two activations; where the
             target quantizes as a whole all operators
    decoded  those of them whose weights stay 8 bits, decoded to float at load
    wide     activations that became 16 bits wide
    constants  outside layers that became float
    sqnr     dB of each output of floats
    work     share of the network's multiply-adds in `floats`
    """

    taken: tuple[str, ...]
    plan: Plan
    floats: tuple[str, ...]
    decoded: tuple[str, ...]
    wide: tuple[str, ...]
    constants: tuple[str, ...]
    work: float
    sqnr: Array


@dataclass(eq=False)
class Part:
    """A run of quantizers, and its noise at each output relative to the signal there.

    measured   rather than left by the other half of a run
    """

    names: tuple[str, ...]
    noise: Array
    measured: bool = False


class Search:
    """A search on a job whose plan is solved.

    samples   the network is judged on
    unseen    with ranges that have not seen them
    """

    def __init__(self, job: Job, samples: Samples, unseen: Unseen | None = None) -> None:
        self.job, self.samples, self.unseen = job, samples, unseen
        self.work = multiply_adds(job.graph, samples.feeds[0])
        self.total = max(float(sum(self.work.values())), 1.0)
        count = int(min(max(_ALONE / self.total, 1), _FEW))
        self.few = (samples if unseen is None else samples.some(unseen.first)).few(count)
        least, most = _EVALUATIONS
        self.sets = FloatSets(job.graph, job.recipe, job.target, _MOST)
        self.base = self.sets.plan(())
        self._inputs = job.calibration.data.inputs if job.calibration.data is not None else []
        self.planned = Planned.of(job)
        self.alone = self._alone(job.plan)
        self.weights = {layer.name: layer.weight for layer in self.planned.layers}
        self.kept = self._ports() if job.target.coded_ports else set[str]()  # in 8 bits
        most = max(most, len(self.planned.plan) // 2)  # where everything is quantized, there are many
        self.left = int(min(max(_WORK / self.total / count, least), most))  # evaluations
        self.noise: dict[str, Array] = {}  # of quantizers that were taken out
        self._layers: dict[str, tuple[str, ...]] = {}  # beside activations

    def _alone(self, plan: Plan) -> Alone:
        """Quantizers alone, with ranges that the few samples have not been seen by."""
        plan = plan if self.unseen is None else self.unseen.cut(plan, int(self.unseen.places.min()))
        return Alone(replace(self.planned, plan=plan), self.job.workers)

    def measured(self, found: Fallback) -> Fallback:
        """The same with the dB of each output of floats, of the network as it is written: the same on every machine."""
        return replace(found, sqnr=decibels(self.job, self.samples, found.plan, self.unseen))

    def run(self, levels: Sequence[float], most: Sequence[float]) -> Fallback | None:
        """The network that reaches the highest of some levels, dB of each output; if none reaches the lowest, the best that
        was measured; None if there is nothing that can be kept from 8 bits.

        levels  ascending
        most    share of the multiply-adds that may be float for each of them
        """
        wide = self._all_wide()
        if wide is not None and wide.sqnr.min() < levels[0]:  # so that floats are needed, too
            search = Search(replace(self.job, plan=wide.plan), self.samples, self.unseen)
            after = search.searched(levels, most)
            after = wide if after is None else replace(after, wide=wide.wide)
            found = None if after.sqnr.min() >= levels[0] else self.searched(levels, most)
            return after if found is None or found.sqnr.min() < after.sqnr.min() else found
        found = self.searched(levels, most)
        if wide is not None and (found is None or found.work > 0 or found.sqnr.min() < levels[0]):
            return wide
        return found

    def _all_wide(self) -> Fallback | None:
        """All activations in 16 bits, where the target quantizes as a whole and has kernels for that beside 8 bits. Kernels
        of such runtimes read and write one width: QNN computes layers between two in float, its simulator otherwise at each
        run. None elsewhere."""
        plan = self.job.plan
        for name in self.planned.activations if self.job.target.whole else ():
            plan |= self._widened(plan, name)
        names = tuple(name for name in plan if plan[name] is not self.job.plan[name])
        return self.measured(Fallback((), plan, (), (), names, (), 0.0, np.zeros(0))) if names else None

    def searched(self, levels: Sequence[float], most: Sequence[float]) -> Fallback | None:
        """`run` from the job's own plan."""
        now = self.measured(Fallback((), self.job.plan, (), (), (), (), 0.0, np.zeros(0)))
        best, reached = None, levels[0]
        if self.job.target.whole and now.sqnr.min() < reached:
            best = self._freed(now, reached)
            now = now if best is None else best
        parts = self._parts([name for name in self.quantizers if name in now.plan])
        for level, share in zip(levels, most, strict=True):
            target = level
            for _ in range(_ROUNDS):
                if now.sqnr.min() >= level:
                    break
                parts = self.alive(parts, now)
                measured, alone = 10 ** (-now.sqnr / 10), sum((part.noise for part in parts), np.zeros(1))
                allowed = alone / measured * 10 ** (-target / 10)  # what the parts alone may add up to
                after = self._reduced(now, parts, allowed, share)
                if after is None:
                    return self.given_back(best, reached)
                now = self.measured(after)
                best = now if best is None or now.sqnr.min() > best.sqnr.min() else best
                target += _STEP
            reached = level
        return self.given_back(best, reached)

    def _freed(self, now: Fallback, level: float) -> Fallback | None:
        """The noisiest activations that no layer is beside in float, until the others have a small part of the noise at a
        level: that costs no multiply-adds. What remains is measured anew after that, since what float operators read now is
        no longer rounded for them. None if that gains nothing."""
        left, free = self.left, [n for n in self.planned.activations if n not in self.kept and not self._beside(n)]
        found = self._reduced(now, self._parts(free), np.array([_FREE * 10 ** (-level / 10)]), 0.0)
        self.left = left
        found = None if found is None else self.measured(found)
        if found is None or found.sqnr.min() <= now.sqnr.min():
            return None
        self.alone = self._alone(found.plan)
        return found

    def given_back(self, found: Fallback | None, level: float) -> Fallback | None:
        """The same with culprits back in 8 bits, the most work first, while the outputs keep a level: what was found later
        often makes them float anyway, or good enough."""
        if found is None or found.sqnr.min() < level:
            return found
        works = {name: self._work([n for n in found.taken if n != name]) for name in found.taken}
        for name in sorted((n for n in works if works[n] < found.work - _CHEAP), key=lambda n: works[n])[:_TRIES]:
            left = [n for n in found.taken if n != name]
            noise = 10 ** (-found.sqnr / 10) + self.noise[name]
            trial = self.made(self.job.plan, left) if left and (10 * np.log10(noise) <= _SLACK - level).all() else None
            trial = None if trial is None else self.measured(trial)
            found = found if trial is None or trial.sqnr.min() < level else trial
        return found

    def _work(self, names: Collection[str]) -> float:
        """Share of the multiply-adds in float, where some quantizers must be."""
        layers = {layer for name in names for layer in self._beside(name)}
        return sum(self.work.get(layer, 0) for layer in layers) / self.total

    def _parts(self, names: Collection[str]) -> list[Part]:
        """Some quantizers by what they lose where they are, the worst first, in runs that grow, measured: the culprits are
        mostly among the first few, and long runs of the others cost one measurement each."""
        order, runs, at = [name for name in self.quantizers if name in names], list[Part](), 0
        while at < len(order):
            size = max(1, at // 2)
            runs.append(Part(tuple(order[at : at + size]), np.empty(0)))
            at += size
        self._evaluate(runs)
        return runs

    @cached_property
    def quantizers(self) -> list[str]:
        """All quantizers, those first that lose most where they are."""
        planned, graph = self.planned, self.job.graph
        calibration = Calibration(graph, open_data(self.few.feeds, self._inputs), workers=self.job.workers)
        histograms = calibration.histograms(planned.activations)
        lost = {name: _lost(histograms[name], self.job.plan[name]) for name in planned.activations}
        for layer in planned.layers:
            weight = graph.constant(layer.weight)
            lost[layer.weight] = _relative(weight, weight_values(layer, self.job.plan[layer.weight]))
        for name, spec in planned.constants.items():
            lost[name] = _relative(graph.constant(name), decode(spec.codes, spec)) if spec.codes is not None else 0.0
        return sorted(lost, key=lambda name: -lost[name])

    def _evaluate(self, parts: Sequence[Part]) -> None:
        """Measure the noise of parts, each alone."""
        self.left -= len(parts)
        outputs = self.alone.outputs([part.names for part in parts], self.few)
        for part, values in zip(parts, outputs, strict=True):
            part.noise, part.measured = 10 ** (-output_decibels(self.few, values) / 10), True

    def alive(self, parts: Sequence[Part], now: Fallback) -> list[Part]:
        """Parts without the quantizers that went with others, measured again."""
        kept = {part: _left(part, now) for part in parts}
        fresh = {part: Part(names, part.noise) for part, names in kept.items() if 0 < len(names) < len(part.names)}
        self._evaluate([*fresh.values()])
        return [fresh.get(part, part) for part, names in kept.items() if names]

    def _reduced(self, now: Fallback, parts: list[Part], allowed: Array, most: float) -> Fallback | None:
        """The plan after culprits were taken out, until the noise of the rest adds up to what is allowed; None if nothing
        was, or can be, or if that is too much work in float."""
        before, fixed = now, np.zeros(1)  # noise of what would be too much work
        while self.left > 0:
            total = sum((part.noise for part in parts), fixed)
            if not parts or (total <= allowed).all() or (fixed > allowed).any():
                break
            worst = self._worst(parts, total > allowed)
            parts.remove(worst)
            left = _left(worst, now)
            if len(left) < len(worst.names) or not worst.measured:
                if left:
                    parts.append(again := Part(left, worst.noise))
                    self._evaluate([again])
                continue
            if len(left) > 1:
                parts += self._halves(left, worst.noise)
                continue
            after = self.made(self.job.plan, [*now.taken, left[0]])
            if after is None or after.work > most:
                fixed = fixed + worst.noise
                continue
            now, self.noise[left[0]] = after, worst.noise
        return None if now is before else now

    def _halves(self, names: tuple[str, ...], noise: Array) -> list[Part]:
        """A run in two: one is measured, the other has the rest of its noise, at least a little of it."""
        one, other = Part(names[: len(names) // 2], noise), Part(names[len(names) // 2 :], noise)
        self._evaluate([one])
        other.noise = np.maximum(noise - one.noise, _REST * noise)
        other.measured = bool((one.noise <= noise / 2).all())  # as good as that
        return [one, other]

    def _worst(self, parts: Sequence[Part], open_outputs: Array) -> Part:
        """The noisiest part at the outputs that are not good enough; of single quantizers nearly as noisy the one whose
        layers are the least work."""
        noise = [float(np.where(open_outputs, part.noise, 0).max()) for part in parts]
        top = int(np.argmax(noise))
        if len(parts[top].names) > 1:
            return parts[top]
        near = [n for n, part in enumerate(parts) if len(part.names) == 1 and noise[n] >= _NEARLY * noise[top]]

        def price(n: int) -> float:
            return _CHEAP + sum(self.work.get(name, 0) for name in self._beside(parts[n].names[0])) / self.total

        return parts[max(near, key=lambda n: noise[n] / price(n))]

    def made(self, plan: Plan, names: Sequence[str]) -> Fallback | None:
        """A plan with some quantizers in 16 bits or in float; None if that is impossible, or the last one makes no
        difference. Layers that are float for the sake of an activation keep the job's codes where the target decodes them.

        plan   the job's, or another one of the same tensors
        """
        wide, floats, constants, islands = list[str](), dict[str, None](), list[str](), list[str]()
        for name in names:
            before = len(wide), len(constants), len(floats)
            if not self.job.target.whole and (wider := self._widened(plan, name)):  # of a whole one, all (`_all_wide`)
                plan |= wider
                wide += wider
            elif name in self.planned.constants:
                constants.append(name)
            elif self.job.target.whole:
                islands += [] if self.job.graph.is_constant(name) else [name]
                floats |= dict.fromkeys(self._beside(name))
            else:
                floats |= dict.fromkeys(self.sets.names(name))
            exact = name in (*self.weights.values(), *islands) and (name in islands or self._beside(name))
            if before == (len(wide), len(constants), len(floats)) and not exact:
                return None
        plan = plan.without(*constants)
        if self.job.target.whole:
            return self._islands(tuple(names), plan, islands, floats, wide, constants)
        return self._float(tuple(names), plan, floats, wide, constants)

    def _beside(self, name: str) -> tuple[str, ...]:
        """The layers, perhaps products of two activations, that must be float for a quantizer to be float."""
        if not self.job.target.whole or name in self.weights.values():
            return self.sets.names(name)
        if name not in self._layers:
            self._layers[name] = layers_beside(self.planned, name)
        return self._layers[name]

    def _ports(self) -> set[str]:
        """Activations in codes that the network's inputs and outputs are."""
        names = (*self.job.graph.inputs, *self.job.graph.outputs)
        coded = self.planned.read | self.planned.coded
        return {key for name in names if (key := self.planned.source(name)) in coded}

    def _islands(
        self,
        taken: tuple[str, ...],
        plan: Plan,
        islands: Sequence[str],
        layers: Collection[str],
        wide: Sequence[str],
        constants: Sequence[str],
    ) -> Fallback | None:
        """A plan with some activations and layers in float, for a target that quantizes as a whole; None if it cannot run
        what is left, or if an input or output would be float that must be codes."""
        trial = replace(self.job, plan=with_islands(replace(self.planned, plan=plan), islands, layers))
        planned = Planned.of(trial)
        if problems(trial.target, trial.graph, trial.plan, {y.name: planned.input(y) for y in planned.layers}):
            return None
        if not self.kept <= planned.read | planned.coded:
            return None
        complete(trial)
        floats = turned_float(self.planned, trial.plan)
        work = sum(self.work.get(n, 0) for n in floats) / self.total
        return Fallback(taken, trial.plan, tuple(floats), (), tuple(wide), tuple(constants), work, np.zeros(0))

    def _float(
        self, taken: tuple[str, ...], plan: Plan, floats: Collection[str], wide: Sequence[str], constants: Sequence[str]
    ) -> Fallback | None:
        """A plan with some operators in float; None if the target cannot run what is left."""
        try:
            wanted = self.sets.plan(floats)
        except OnnxqError:
            return None
        layers = {y.name: y for y in self.planned.layers}
        stored = {n: spec for n in floats if (y := layers.get(n)) and (spec := self._stored(y, y.weight in taken))}
        kept = Plan({n: s for n, s in plan.items() if n in wanted or n not in self.base or n in self.planned.constants})
        kept |= {layers[n].weight: spec for n, spec in stored.items()}
        fresh = Plan({n: spec for n, spec in wanted.items() if n not in self.base and n not in kept})
        trial = replace(self.job, plan=kept | fresh)
        planned = Planned.of(trial)
        if problems(trial.target, trial.graph, trial.plan, {y.name: planned.input(y) for y in planned.layers}):
            return None
        complete(trial)
        order, work = sorted(floats, key=lambda n: self.sets.order[n]), sum(self.work.get(n, 0) for n in floats)
        listed = tuple(n for n in order if n in stored and stored[n].bits < STORED)
        return Fallback(
            taken, trial.plan, tuple(order), listed, tuple(wide), tuple(constants), work / self.total, np.zeros(0)
        )

    def _stored(self, layer: Layer, exact: bool) -> QuantSpec | None:
        """How the file holds the weight of a layer that runs in float; None for floats, where the target decodes no codes.

        exact   not as the codes that it has, which cost too much, but in twice their bits
        """
        spec = replace(self.job.plan[layer.weight], decoded=True)
        if exact:
            spec = QuantSpec(STORED, True, channel_block(layer), decoded=True)
            if 2 * int(np.prod(layer.shape)) < 4 * layer.channels + _OPERATORS:
                return None
        rule = self.job.target.rule(layer, spec, 0)
        return spec if rule is not None and rule.storage == "float" else None

    def _widened(self, plan: Plan, name: str) -> Plan:
        """Entries of 16 bits for all that shares the width of an activation; none where the target lacks kernels, or has
        them for codes around 0 alone, and others in 8 bits."""
        target = self.job.target
        if WIDE not in target.activation_bits or self.job.graph.is_constant(name) or plan[name].bits >= WIDE:
            return Plan({})
        if target.centred(WIDE) and not target.centred(8):
            return Plan({})
        group = next(g for g in self._groups(plan) if name in g.activations)
        layers = {y.name: y for y in self.job.graph.layers}
        rules = (self.job.target.rule(layers[n], plan[layers[n].weight], WIDE) for n in group.layers)
        if any(rule is None for rule in rules):
            return Plan({})
        fixed, wider = natural_grids(self.job.graph, target, plan), {}
        for n in group.activations:
            low, high = plan[n].value_range
            more = 0 if n in fixed else _ROOM * (high - low)
            wider[n] = from_range(low - more if low < 0 else low, high + more, replace(plan[n].request(), bits=WIDE))
        return Plan(wider)

    def _groups(self, plan: Plan) -> Sequence[Group]:
        return quantizer_groups(self.job.graph, plan, self.job.target)


def _left(part: Part, now: Fallback) -> tuple[str, ...]:
    """The quantizers of a part that are still there, in 8 bits."""
    return tuple(name for name in part.names if name in now.plan and now.plan[name].bits < WIDE)


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
