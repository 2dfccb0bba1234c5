"""placement: run in float what is faster in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.export.qdq import export
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.job import Job, Pass, Report, Service, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import request, rule_keys
from onnxq_plugins.runtimes.costs import tables
from onnxq_plugins.runtimes.profiles import TURN, interleaved, typical
from onnxq_plugins.search.placement import Placer
from onnxq_plugins.spec import Array, Plan, from_range

_LONG = 50_000.0  # microseconds of a run up to which networks are timed, too
_SECONDS = 0.3  # of timing
_WHY = "it is faster in float, conversions included"
_SURE = 1.5  # times the predicted time of the choice beyond which a network is not worth timing
_CLEAR = 0.03  # by which a network must be faster for timing to overrule the table


@dataclass(frozen=True)
class Placement(Pass):
    """Run in float what is faster in float.

    Integer kernels do not always pay: those of depthwise convolutions, few channels and short rows hardly do, and at every
    border between integers and floats a tensor is converted, mostly reordered as well. A table of what kernels cost on the
    target's kind of processor, for their sizes in this network, is minimized over all operators together, conversions
    included, by a minimum cut: exactly, and alike on every machine.

    Layers that are placed in float keep their weights in 8 bits in the file; onnxruntime decodes them once, at load. What
    the recipe says of single layers (`quantize`) is kept.

    least   milliseconds that a run must take: in shorter ones the call itself counts most
    gain    share of the predicted time that must be saved, else all stays integer
    check   time the network as integer, as placed and in float, in turn, where it takes up to 50 ms; one that is faster
            than what the table says by 3 % is taken in its place, so that on another kind of processor no network is
            slower than in float. The one decision that depends on the machine; false leaves all to the table

        minimize  sum_i t_i(a_i) + sum_(i, j) c_ij(a_i, a_j),   a_i in {integer, float, float in blocks of channels}

    t_i is the time of operator i, c_ij that of bringing what i writes into the form in which j reads it, once for all
    readers.

    Source: our own; minimum cuts as in Boykov, Veksler and Zabih, Fast approximate energy minimization via graph cuts
    (PAMI 2001).
    Cost: one run of the float model, and at most a second for timing.
    """

    name: ClassVar[str] = "placement"
    stage: ClassVar[Stage] = "rewrite"
    provides: ClassVar[frozenset[Service]] = frozenset({"placement"})
    least: float = 0.2
    gain: float = 0.03
    check: bool = True

    def __post_init__(self) -> None:
        if not self.least >= 0:
            raise ValueError(f"least = {self.least} must not be negative")
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain = {self.gain} must be at least 0 and less than 1")

    def apply(self, job: Job) -> dict[str, Any] | None:
        data, costs = job.calibration.data, tables().get(job.target.costs)
        if data is None or costs is None:
            return None
        feed = next(iter(data))
        try:
            shapes = shapes_of(job.graph, feed)
        except OnnxqError:
            return None  # calibration will run on the sample, too, and tell what is wrong with it
        placer = Placer(Planned.of(job), shapes, costs)
        if not placer.choices:
            return None
        forced = _forced(job)
        decision = placer.place(forced)
        predicted = decision.predicted
        shortest = min(predicted.values())
        if shortest < 1e3 * self.least:
            return None
        pays = decision.floats and predicted["placed"] <= (1 - self.gain) * predicted["integer"]
        choice = "placed" if pays else "integer"
        sets = {"integer": frozenset[str](), "placed": decision.floats, "float": placer.choices - forced}
        sets = {name: each for name, each in sets.items() if name == "integer" or each}
        result: dict[str, Any] = {"table": costs.name, "predicted": {name: round(predicted[name], 1) for name in sets}}
        plans = {name: in_float(job, names) for name, names in sets.items()}
        close = {name: plan for name, plan in plans.items() if predicted[name] < _SURE * predicted[choice]}
        if self.check and job.target.here and shortest <= _LONG and len(close) > 1:
            timed = _timed(job, close, feed)
            result["timed"] = {name: round(1e3 * typical(own)) for name, own in timed.items()}
            choice = fastest(timed, choice)
        job.plan = plans[choice]
        if sets[choice]:
            how, times, timed = "predicted", result["predicted"], result.get("timed", {})
            if timed.get(choice, np.inf) < timed.get("integer", 0.0):
                how, times = "measured", timed
            layers = {y.name for y in job.graph.layers} & sets[choice]
            job.report.floats.update({name: Reason("slower", _WHY) for name in layers})
            others = len(sets[choice]) - len(layers)
            job.note(
                f"{len(layers)} layer{'s' * (len(layers) != 1)}{f' and {others} other operators' * (others > 1)} run in "
                "float, where that is faster: the network takes "
                f"{times[choice] / 1e3:.3g} ms {how}, against {times['integer'] / 1e3:.3g} ms as integers"
            )
        return result | {"choice": choice, "float": sorted(sets[choice])}


def in_float(job: Job, names: Collection[str]) -> Plan:
    """The job's plan with some operators in float; weights of layers among them stay codes where the target decodes them."""
    if not names:
        return job.plan
    before, after = (request(job.graph, job.recipe, job.target, placed=some).plan for some in ((), names))
    kept = {name: spec for name, spec in job.plan.items() if name in after or name not in before}
    fresh = {name: spec for name, spec in after.items() if name not in kept or spec.decoded}
    return Plan(kept | fresh)


def _forced(job: Job) -> frozenset[str]:
    """Operators about which the recipe itself says whether they are quantized."""
    layers = {name for name, keys in rule_keys(job.graph, job.recipe).items() if "quantize" in keys}
    attention = any(rule.op == "Attention" and rule.quantize for rule in job.recipe.layers)
    products = {str(n.name) for n in job.graph.nodes if n.op == "MatMul"} - {y.name for y in job.graph.layers}
    return frozenset(layers | (products if attention else set()))


def fastest(times: Mapping[str, Array], first: str) -> str:
    """The network that is clearly faster than the `first`; the first, if none is.

    times   milliseconds of each in runs that took turns [runs]: it must be ahead by 3 % in the median of neighbouring runs,
            and ahead in most of them
    """
    ahead = {name: own / times[first] for name, own in times.items()}
    clear = [n for n, r in ahead.items() if np.median(r) < 1 - _CLEAR and np.quantile(r, 0.65) < 1]
    return min(clear, key=lambda name: float(np.median(ahead[name])), default=first)


def _timed(job: Job, plans: Mapping[str, Plan], feed: Mapping[str, Array]) -> dict[str, Array]:
    """Milliseconds of networks in runs that take turns, the best of a few at a time. Any codes do for that."""
    sessions = []
    for plan in plans.values():
        ends = {
            n: (0.0 if maker_of(job.graph, n) is not job.graph.producer(n) else -1.0, 1.0)
            for n in plan
            if not plan[n].solved
        }
        ranges = {n: from_range(*ends[n], plan[n]) for n in ends if not job.graph.is_constant(n)}
        trial = replace(job, plan=plan | ranges, report=Report())
        complete(trial)
        sessions.append(runtimes.session(export(job.graph, trial.plan, job.target)))
    taken = interleaved(sessions, feed, _SECONDS)
    return {name: own.reshape(-1, TURN - 1).min(axis=1) for name, own in zip(plans, taken, strict=True)}
