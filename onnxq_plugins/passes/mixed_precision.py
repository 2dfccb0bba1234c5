"""mixed-precision: search bit widths for every group of quantizers.

Rounding and measuring use different samples: codes fit the samples they were chosen on, and measured there, 4 bits of
MobileNetV1's last layer look harmless."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.data import open_data
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.job import Job, Metric, Pass, Report, Service
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import correct_biases
from onnxq_plugins.measure.metrics import chance, metric, metric_name, top1, worst_sqnr
from onnxq_plugins.measure.networks import Measure
from onnxq_plugins.measure.samples import RANDOM, Samples
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.runtimes.machine import machine_name
from onnxq_plugins.search import latency
from onnxq_plugins.search.quantizers import FLOAT_BITS, Width, parse_widths
from onnxq_plugins.search.widths import ALONE, Budget, Choice, Widths, sample
from onnxq_plugins.solvers.pareto import Strategy, longest
from onnxq_plugins.solvers.rounding import Method
from onnxq_plugins.spec import Plan

Entry = tuple[float, int, Width]  # SQNR of a group alone, its number, its width
_DECIBELS = ("sqnr", "int8")  # budgets on the SQNR of the worst output
_ALONE = 8  # samples for each group alone: enough to rank them
_APART = 16  # with this many samples, rounding and measuring use different ones


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Search bit widths for every group of quantizers.

    A group is an activation with the weights of all layers that read it.

    1. Sensitivity: for each group and candidate, the error of the network's outputs with that group alone quantized. The
       noise of groups is nearly additive.
    2. Budgets on cost: the choice of least total noise within the budget. Budgets on accuracy: from the widest candidates
       everywhere a path leads down, change by change; a search finds the last point that is accurate enough.
    3. Points along the path are measured: the curve in the report, with the widths of each.

    candidates  such as W4A8, W8A8, W8A16, float; per group those that the target has kernels for
    budget      ``size`` (bits of weights), ``bops`` (bit operations): at most `limit` times those of 8-bit weights and
                activations everywhere. ``latency``: the same for milliseconds, measured in onnxruntime on this machine.
                ``sqnr``: at least `limit` dB. ``int8``: at least `limit` dB more than the recipe's own widths, rounded to
                the nearest. ``metric``: at most `limit` below the float network's
    limit       see budget
    metric      ``sqnr``, ``agreement`` (percent of samples with the same class) or ``top1`` (percent correct; needs
                labels), shown with the curve; a function given to `quantize(metric=)` or ``--metric`` replaces it
    cost        what to reduce where the budget is on accuracy: ``bops``, ``size`` or ``latency``
    order       of changes on the path: ``noise``, least added noise per saved cost first; ``sqnr``, the paper's list: the
                least sensitive first, whatever it saves
    strategy    of the search: ``binary``, ``interpolation``, ``hybrid`` of both, or ``brute``, which measures every point
    samples     number of samples, evenly spaced
    method      how weights are rounded: as in `round`, on the inputs of the float network
    curve       points of the path to measure, evenly spaced, beside those that the search visits
    widths      of each group by name, as in a point of an earlier curve: reproduces that point without a search

        sensitivity of a group at a width = 10 log10(E[y^2] / E[(y - yq)^2]),   y the outputs, yq with that group quantized

    Weights are rounded once for each layer and width, so that a choice of widths costs no further rounding. For the search
    they are rounded on half of the samples and measured on the others, since codes fit the samples they were chosen on;
    those of the final point are rounded again on all data. Layers whose weights.bits a [[layer]] rule sets keep them.

    Source: Practical Mixed Precision (Pandey et al., arXiv 2302.05397). Budgets on cost by dynamic programming and the order
    by noise are our own.
    Cost: groups x candidates, each an export and eight runs; points, each an export and half of `samples` runs; rounding
    once per width.
    """

    name: ClassVar[str] = "mixed-precision"
    provides: ClassVar[frozenset[Service]] = frozenset({"codes", "curve"})
    candidates: tuple[str, ...] = ("W4A8", "W6A8", "W8A8")
    budget: Literal["size", "bops", "latency", "sqnr", "int8", "metric"] = "size"
    limit: float = 0.75
    cost: Budget = "bops"
    metric: Literal["sqnr", "agreement", "top1"] = "sqnr"
    order: Literal["noise", "sqnr"] = "noise"
    strategy: Strategy = "hybrid"
    samples: int = 64
    method: Method = "gptq"
    curve: int = 9
    widths: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        parse_widths(self.candidates)
        metric(self.metric)
        if self.widths:
            parse_widths(self.widths.values())
        if self.samples < 1 or self.curve < 0:
            raise ValueError("samples must be at least 1 and curve not negative")
        if self.budget == "sqnr" and 0 < self.limit < 3:  # a limit that is meant for another budget
            raise ValueError(
                f"limit = {self.limit:g} dB would let noise drown the outputs; set it to the least acceptable "
                "SQNR, such as limit = 25"
            )

    def apply(self, job: Job) -> dict[str, Any]:
        if job.calibration.data is None:
            raise OnnxqError(
                "mixed-precision measures networks on sample inputs, and there are none; give data (--data "
                "PATH), or put the pass data-free before it."
            )
        if self.widths:
            return self._reproduce(job)
        by = job.metric or metric(self.metric)
        if self.budget == "metric" and by is worst_sqnr:
            raise OnnxqError(
                "mixed-precision: budget = 'metric' limits the drop of a metric such as 'agreement', and the "
                "float network's sqnr has no bound; set metric, or budget = 'sqnr' and limit to the least "
                "acceptable SQNR."
            )
        return _Search(self, job, by).run()

    def _reproduce(self, job: Job) -> dict[str, Any]:
        """The point that `widths` describe."""
        widths = Widths(job, {name: Width.parse(text) for name, text in self.widths.items()}, sample(job))
        choice = tuple(options[0] for options in widths.options)
        _apply(self, widths, choice)
        return {"groups": len(choice), **{key: round(value, 4) for key, value in widths.shares(choice).items()}}


class _Search:
    """The phases of a search."""

    def __init__(self, step: MixedPrecision, job: Job, by: Metric) -> None:
        self.step, self.job, self.metric = step, job, by
        data = job.calibration.data
        assert data is not None
        feeds, labels = data.spread(step.samples), data.spread_labels(step.samples)
        apart = len(feeds) >= _APART
        self.rounded_on, measured_on = data.apart(feeds) if apart else (feeds, feeds)
        self.widths = Widths(job, parse_widths(step.candidates), feeds[0])
        truth = None if labels is None else np.concatenate(data.apart(labels)[1] if apart else labels)
        samples = Samples.of(job.graph.model(), measured_on, truth, job.class_axis, state=data.state)
        self.measure = Measure(job.graph, job.target, samples, cache=job.calibration.cache)
        self.by = [worst_sqnr] if by is worst_sqnr else [worst_sqnr, by]
        self.best = 0.0 if by is worst_sqnr else samples.score(by)
        if by is top1 and truth is not None and (remark := chance(self.best, samples.reference, truth, samples.axes)):
            job.note(remark)
        if samples.random:
            job.note(f"mixed-precision: {RANDOM}; nor about widths")
        self.feed = feeds[0]
        self.nearest = False  # True if no choice is as good as the nearest codes
        self.points: dict[Choice, dict[str, Any]] = {}
        self.scores: dict[Choice, float] = {}  # by which a budget on accuracy decides, not rounded for the report

    def run(self) -> dict[str, Any]:
        step, data = self.step, self.job.calibration.data
        assert data is not None
        half = open_data(self.rounded_on, data.inputs)
        self.widths.round(step.method, half)
        if self.objective == "latency":
            self.widths.time(self.feed)
        ranked = self.sensitivities()
        path = self.path(ranked)
        choice = self.least_noise(ranked) if step.budget == self.objective else self.farthest(path)
        shown = [path[round(k)] for k in np.linspace(0, len(path) - 1, step.curve)] if step.curve else []
        self.evaluate([choice, *shown])
        timed = {"latency": self.latency(choice)} if self.widths.times is not None else {}
        if self.nearest:
            self.job.plan = self.plans[max(self.plain, key=lambda name: self.plain[name])]
        else:
            _apply(step, self.widths, choice)
        self.points[choice]["chosen"] = True
        size, stored = self.points[choice]["size"], self.points[choice]["stored"]
        if self.objective == "size" and stored > size + 0.005:
            self.job.note(
                f"mixed-precision: size {size:.3f} counts bits of codes; in the file for target '{self.job.target.name}' "
                f"they take {stored:.3f} of 8 bits, as codes of 5 to 7 bits take a byte there: for small files use "
                "candidates W4A8 and W8A8"
            )
        groups = self.widths.groups
        nearest = {"nearest": {key: round(v, 2) for key, v in self.plain.items()}} if step.budget == "int8" else {}
        best = {} if self.metric is worst_sqnr else {"float": round(self.best, 3)}  # of the float network
        return {
            "groups": len(groups),
            "metric": metric_name(self.metric),
            "cost": self.objective,
            **best,
            "networks_measured": self.measure.scored,
            "sensitivities": [{"group": groups[i].name, "width": str(w), "sqnr": round(s, 2)} for s, i, w in ranked],
            "curve": sorted(self.points.values(), key=lambda p: -p[self.objective]),
            **timed,
            **nearest,
        }

    @property
    def objective(self) -> Budget:
        """The cost to reduce."""
        step = self.step
        budget = step.budget  # compared one by one, so that mypy narrows
        return step.cost if budget == "sqnr" or budget == "int8" or budget == "metric" else budget  # noqa: PLR1714

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """The recipe's own widths with the nearest codes, with and without corrected biases."""
        trial = replace(self.job, report=Report())
        complete(trial)
        plain = trial.plan
        correct_biases(trial, Planned.of(trial).layers)
        return {"plain": plain, "corrected": trial.plan}

    @cached_property
    def plain(self) -> dict[str, float]:
        """SQNR of `plans`."""
        return {name: self.measure.score(plan) for name, plan in self.plans.items()}

    def sensitivities(self) -> list[Entry]:
        """(SQNR, group, candidate) with that group alone quantized, from the least sensitive to the most."""
        samples, cache = self.measure.samples.few(_ALONE), self.measure.cache
        alone = Measure(self.job.graph, ALONE, samples, self.widths.coded, cache=cache)
        tasks = [(i, w) for i, options in enumerate(self.widths.options) for w in options if len(options) > 1]
        scores = alone.scores((self.widths.plan({i: w}) for i, w in tasks), [worst_sqnr], self.job.workers)
        tracked = self.job.track(scores, "sensitivities", len(tasks))
        entries = [(score["sqnr"], i, w) for score, (i, w) in zip(tracked, tasks, strict=True)]
        self.measure.scored += alone.scored
        return sorted(entries, key=lambda entry: (-entry[0], -(entry[2].weights + entry[2].activations), entry[1]))

    def path(self, ranked: list[Entry]) -> list[Choice]:
        """The choices on the path down, beginning with the widest everywhere; changes that reduce no cost are left out."""
        may_not_rise = ("latency",) if self.objective == "latency" else ("size", "bops")
        now = tuple(options[0] for options in self.widths.options)
        path, spent, noise = [now], self.widths.cost(now), _noise(ranked)
        left = [(i, w) for _, i, w in ranked]
        while True:
            changes = []
            for i, w in left:
                choice = (*now[:i], w, *now[i + 1 :])
                price = self.widths.cost(choice)
                saves = [getattr(spent, key) - getattr(price, key) for key in may_not_rise]
                if min(saves) >= 0 and max(saves) > 0:
                    saved = max(getattr(spent, self.objective) - getattr(price, self.objective), 1e-9)
                    changes.append(((noise[i, w] - noise[i, now[i]]) / saved, i, w, choice, price))
            if not changes:
                return path
            _, i, w, now, spent = changes[0] if self.step.order == "sqnr" else min(changes, key=lambda change: change[0])
            path.append(now)
            left.remove((i, w))

    def least_noise(self, ranked: list[Entry]) -> Choice:
        """The choice of least noise within the budget, with the noise of groups added up."""
        noise = _noise(ranked)
        loss = [np.array([noise.get((i, w), 0.0) for w in options]) for i, options in enumerate(self.widths.options)]
        return self.widths.within(loss, self.objective, self.step.limit)

    def farthest(self, path: list[Choice]) -> Choice:
        """The last choice on the path that is accurate enough."""
        step = self.step
        key, least = metric_name(self.metric), self.best - step.limit
        if step.budget in _DECIBELS:
            key, least = "sqnr", step.limit + (max(self.plain.values()) if step.budget == "int8" else 0.0)

        def score(k: int) -> float:
            self.evaluate([path[k]])
            return self.scores[path[k]]

        last = longest(score, len(path) - 1, least, step.strategy)
        if last < 0 and step.budget == "int8":
            self.nearest = score(0) < least - step.limit
            kept = "which was kept" if self.nearest else "and were used all the same"
            self.job.note(
                f"mixed-precision: the widest candidates have {score(0):.2f} dB, not {step.limit:g} more than rounding to "
                f"the nearest ({least - step.limit:.2f} dB), {kept}"
            )
        elif last < 0:
            self.job.note(
                f"mixed-precision: even the widest candidates only reach {key} {score(0):.2f}, not {least:.2f}; "
                "they were used"
            )
        return path[max(last, 0)]

    def evaluate(self, choices: Iterable[Choice]) -> None:
        """Add points to the curve, each measured once."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self.points]
        results = self.measure.scores(map(self.whole, new), self.by, self.job.workers)
        for choice, scores in zip(new, self.job.track(results, "measuring the curve", len(new)), strict=True):
            self.scores[choice] = scores["sqnr" if self.step.budget in _DECIBELS else metric_name(self.metric)]
            shares = self.widths.shares(choice)
            self.points[choice] = {
                **{
                    key: round(value, 4)
                    for key, value in {"size": shares["size"], "stored": self.widths.stored(choice), **shares}.items()
                },
                **{key: round(value, 3) for key, value in scores.items()},
                "widths": {g.name: str(w) for g, w in zip(self.widths.groups, choice, strict=True)},
            }

    def latency(self, choice: Choice) -> dict[str, Any]:
        """The time of the chosen network, and how far off the sum over its groups was; the same for the networks that the
        times of groups were derived from."""
        widths = self.widths
        assert widths.times is not None
        ms, eight = latency.compared([widths.exported(choice), widths.exported(widths.eight_bits)], self.feed)
        share, measured = widths.shares(choice)["latency"], ms / eight
        if self.step.budget == "latency" and measured > 1.05 * self.step.limit:
            self.job.note(
                f"mixed-precision: the chosen network takes {measured:.3f} of 8 bits everywhere, "
                f"more than the {share:.3f} that times of its groups add up to"
            )
        error = 100 * (share / measured - 1)
        return {
            "predicted": round(share, 4),
            "measured": round(measured, 4),
            "error_percent": round(error, 2),
            "ms": round(ms, 4),
            "ms_of_8_bits": round(eight, 4),
            "rounds": widths.times.rounds,
            "networks": [{"ms": round(a, 4), "predicted_ms": round(b, 4)} for a, b in widths.times.networks],
            "machine": machine_name(),
        }

    def whole(self, choice: Choice) -> Plan:
        """The plan of a choice, every group quantized."""
        return self.widths.plan(dict(enumerate(choice))) | Planned.of(self.job).constants


def _apply(step: MixedPrecision, widths: Widths, choice: Choice) -> None:
    """Round the weights of a choice on all data, and make it the job's plan."""
    job, numbered = widths.job, dict(enumerate(choice))
    assert job.calibration.data is not None
    widths.round(step.method, job.calibration.data, numbered)
    job.plan = widths.plan(numbered) | Planned.of(job).constants
    job.report.floats.update(
        {
            name: Reason("search", "mixed-precision chose float")
            for group, width in zip(widths.groups, choice, strict=True)
            if width.weights == FLOAT_BITS
            for name in group.layers
        }
    )


def _noise(ranked: list[Entry]) -> dict[tuple[int, Width], float]:
    """Noise-to-signal ratio of each group alone at each width."""
    return {(i, w): float(10 ** (-score / 10)) for score, i, w in ranked}
