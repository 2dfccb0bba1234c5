"""placement: run in float what is faster in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.export.qdq import export
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.job import Job, Pass, Report, Service, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import FASTER, request, rule_keys
from onnxq_plugins.runtimes.costs import check_table, runs_here
from onnxq_plugins.runtimes.speed import EQUAL, Speed, against_first
from onnxq_plugins.search.placement import Placer, costs_of
from onnxq_plugins.spec import Array, Plan, from_range

_LONG = 50_000.0  # microseconds of a run up to which networks are timed, too
_SECONDS, _LIMIT = 0.25, 0.8  # of timing, and after which three rounds are enough
_SURE = 1.3  # times the predicted time of the choice beyond which a network is not worth timing


@dataclass(frozen=True)
class Placement(Pass):
    """Run in float what is faster in float.

    Integer kernels do not always pay: those of depthwise convolutions, few channels and short rows hardly do, and at every
    border between integers and floats a tensor is converted, mostly reordered as well. A table of what kernels cost on the
    target's kind of processor, for their sizes in this network, is minimized over all operators together, conversions
    included, by a minimum cut: exactly, and alike wherever the table is the same.

    Layers that are placed in float keep their weights in 8 bits in the file; onnxruntime decodes them once, at load. What
    the recipe says of single layers (`quantize`) is kept.

    least   milliseconds that a run must take: in shorter ones the call itself counts most
    table   of costs: one that comes with the package (`onnxq costs` lists them), or ``own``, measured on this machine;
            "" takes that if there is one and, for a target that runs on this machine, the one of its instruction set
    gain    share of the predicted time that must be saved, else all stays integer
    check   time the network as integer, as placed and in float, in turn, where it takes up to 50 ms; the
            fastest is taken, and of those that are as fast the one with most in float, so that on another kind of
            processor, too, no network is slower than in float. The one decision that depends on the machine; false leaves
            all to the table

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
    table: str = ""

    def __post_init__(self) -> None:
        if not self.least >= 0:
            raise ValueError(f"least = {self.least} must not be negative")
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain = {self.gain} must be at least 0 and less than 1")
        check_table(self.table)

    def apply(self, job: Job) -> dict[str, Any] | None:
        data, costs = job.calibration.data, costs_of(job.target, self.table)
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
        if self.check and job.target.here and runs_here(job.target.costs) and shortest <= _LONG and len(close) > 1:
            speeds = _timed(job, close, choice, feed)
            result["timed"] = {name: round(1e3 * speed.quantized, 1) for name, speed in speeds.items()}
            choice = chosen(speeds, sets)
        job.plan = plans[choice]
        if sets[choice]:
            _tell(job, sets[choice], choice, result)
        return result | {"choice": choice, "float": sorted(sets[choice])}


def _tell(job: Job, floats: Collection[str], choice: str, result: Mapping[str, Any]) -> None:
    """Say what runs in float, and what that gains."""
    how = "timed" if {choice, "integer"} <= set(result.get("timed", ())) else "predicted"
    times, word = result[how], "measured" if how == "timed" else "predicted"
    layers = [y.name for y in job.graph.layers if y.name in floats]
    job.report.floats.update(dict.fromkeys(layers, FASTER))
    others = len(floats) - len(layers)
    faster = "where that is faster" if times[choice] < times["integer"] else "where that is as fast, as far as timing tells"
    beside = f" and {counted(others, 'other operator')}" if others else ""
    verb = "runs" if len(floats) == 1 else "run"
    job.note(
        f"{counted(len(layers), 'layer')}{beside} {verb} in float, "
        f"{faster}: the network takes {times[choice] / 1e3:.3g} ms {word}, "
        f"against {times['integer'] / 1e3:.3g} ms as integers"
    )


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


def chosen(speeds: Mapping[str, Speed], floats: Mapping[str, Collection[str]]) -> str:
    """The fastest of some networks. Those that are not slower than it beyond doubt count as fast: of these the one with most
    operators in float, which is the most accurate.

    speeds   against one of them
    floats   the operators that each has in float
    """
    best = max([1.0, *(speed.ratio for speed in speeds.values() if speed.low > 1)])
    return max((n for n, speed in speeds.items() if speed.ratio >= (1 - EQUAL) * best), key=lambda n: len(floats[n]))


def _timed(job: Job, plans: Mapping[str, Plan], first: str, feed: Mapping[str, Array]) -> dict[str, Speed]:
    """How fast networks are against the first of them. Any codes do for that."""
    sessions = {}
    for name in sorted(plans, key=lambda name: name != first):
        plan, ranges = plans[name], {}
        for tensor in plan:
            if not plan[tensor].solved and not job.graph.is_constant(tensor):
                low = 0.0 if maker_of(job.graph, tensor) is not job.graph.producer(tensor) else -1.0  # a Relu is absorbed
                ranges[tensor] = from_range(low, 1.0, plan[tensor])
        trial = replace(job, plan=plan | ranges, report=Report())
        complete(trial)
        sessions[name] = runtimes.session(export(job.graph, trial.plan, job.target))
    speeds = against_first(list(sessions.values()), dict(feed), _SECONDS, _LIMIT)
    return dict(zip(sessions, speeds, strict=True))
