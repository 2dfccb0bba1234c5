"""A solved plan for another target: derived where that is exact, solved anew where it is not, and counted.

The sign of codes is no matter of the plan (`Target.offset`). Entries that the other target takes stay. Activations that it
wants and the plan has not get the range over the samples, which a solved plan holds; grids that it wants around 0 cover the
range that they had; weights whose form it does not take are rounded to the nearest codes of the form that it requests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from onnxq_plugins.calibration import Calibration
from onnxq_plugins.engine.plans import Solved
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.conform import conform
from onnxq_plugins.graph.flow import activation_inputs, result_of
from onnxq_plugins.job import Job, LayerRule, Recipe, Report
from onnxq_plugins.layers.complete import activation_spec, complete_constants, complete_weight
from onnxq_plugins.plan.constants import float_constants
from onnxq_plugins.plan.entries import entry_problem
from onnxq_plugins.plan.floats import layer_rule
from onnxq_plugins.plan.grids import natural_grids
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import Request, request
from onnxq_plugins.spec import Plan, QuantSpec
from onnxq_plugins.targets import Target
from onnxq_plugins.targets.refusals import problems, too_wide, unheld

# Layers that are in float for these reasons are asked about again: they are about the target that the plan was made for.
_ITS_OWN = ("slower", "unsupported", "weight-only", "unquantized")


@dataclass
class Changes:
    """What became of the entries of a plan: numbers by kind, such as ``weights kept``."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, how: str, n: int = 1) -> None:
        """Count a weight or an activation."""
        self.counts[f"{what} {how}"] += n

    @property
    def text(self) -> str:
        """The counts in words, one weight as one weight."""
        shown = (f"{n} {kind if n != 1 else kind.replace('s ', ' ', 1)}" for kind, n in self.counts.items() if n)
        return ", ".join(shown) or "nothing is quantized"


def retargeted(solved: Solved, recipe: Recipe, target: Target, seed: int = 0) -> tuple[Job, Changes]:
    """A job with the complete plan for a target. Raises OnnxqError with all that the target cannot hold.

    recipe   of the plan, with the target and its settings
    """
    changes = Changes()
    graph = solved.graph.copy()
    if solved.recipe.get("target") == recipe.to_dict()["target"]:
        plan = solved.plan
        floats = {name: Reason(cast(Any, kind), "the plan leaves it float") for name, kind in solved.floats.items()}
        for name in plan:
            changes.add("weights" if graph.is_constant(name) else "activations", "kept")
    else:
        conform(graph, target.operators, target.whole)
        rules = _float_rules(solved, graph)
        own = tuple(r for r in recipe.layers if r.everywhere or any(map(r.names, (str(n.name) for n in graph.nodes))))
        asked = request(graph, replace(recipe, layers=own + rules), target, _unfit(solved, graph))
        floats = {**float_constants(asked.constants), **asked.floats}
        plan = _activations(solved, graph, target, asked, changes)
        plan |= _weights(solved, graph, target, asked, plan, changes)
    planned = Planned(graph, plan, target)
    inputs = {layer.name: planned.input(layer) for layer in planned.layers}
    OnnxqError.check([*unheld(target, graph), *problems(target, graph, plan, inputs)])
    report = Report(floats=floats, notes=[])
    job = Job(graph, plan, Calibration(graph, None), target, recipe, np.random.default_rng(seed), 1, report)
    _complete(job, changes)
    return job, changes


def _unfit(solved: Solved, graph: Graph) -> list[str]:
    return [name for name in solved.unfit if name in graph]


def _float_rules(solved: Solved, graph: Graph) -> tuple[LayerRule, ...]:
    """Rules that keep in float what the plan keeps in float for a reason of its own, such as the quality of an output."""
    left = (y.name for y in graph.layers if solved.floats.get(y.name, "slower") not in _ITS_OWN)
    return tuple(layer_rule(name, quantize=False) for name in left)


def _islands(solved: Solved, graph: Graph) -> set[str]:
    """Activations that the plan leaves float for the quality of an output, beside operators other than layers."""
    layers = {y.name for y in graph.layers}
    kept = {name for name, kind in solved.floats.items() if kind == "quality"} - layers
    nodes = [node for node in graph.nodes if node.name in kept]
    beside = {graph.root(name) for n in nodes for name in (*activation_inputs(graph, n), result_of(graph, n))}
    return {name for name in beside if name not in solved.plan}


def _activations(solved: Solved, graph: Graph, target: Target, asked: Request, changes: Changes) -> Plan:
    """Entries of the activations that the target quantizes. Raises OnnxqError naming those whose range is not known."""
    found: dict[str, QuantSpec] = {}
    unknown = []
    islands = _islands(solved, graph)
    wanted = [name for name in asked.plan if not graph.is_constant(name) and graph.root(name) not in islands]
    natural = natural_grids(graph, target, asked.plan.without(*islands))
    for name in wanted:
        spec, old = asked.plan[name], solved.plan.get(name)
        if old is not None and old.bits in target.activation_bits:
            symmetric = target.centred(old.bits) or (old.symmetric and target.either)
            spec = replace(spec.request(), bits=old.bits, symmetric=symmetric)
        if name in natural:
            changes.add("activations", "on the grid of a table")
        elif old is not None and old.bits == spec.bits and (exact := _same(old, spec)) is not None:
            found[name] = exact
            changes.add("activations", "kept")
        elif (ends := old.value_range if old is not None else _range(solved, graph, name)) is not None:
            found[name] = activation_spec(ends, spec)
            changes.add("activations", "from stored ranges" if old is None else "solved anew")
        else:
            unknown.append(name)
    if unknown:
        names = ", ".join(f"'{name}'" for name in unknown[:4]) + " ..." * (len(unknown) > 4)
        raise OnnxqError(
            f"target '{target.name}' quantizes {len(unknown)} activations whose ranges the plan does not hold ({names}); "
            "quantize with --data, or for this target."
        )
    return Plan(found) | natural


def _same(old: QuantSpec, spec: QuantSpec) -> QuantSpec | None:
    """An entry that stands for the same values on the grid that is asked for; None if there is none."""
    if old.symmetric == spec.symmetric:
        return old
    if old.symmetric:  # unsigned codes around the middle
        return replace(old, symmetric=False, zero_point=np.asarray(2 ** (old.bits - 1)))
    return None


def _range(solved: Solved, graph: Graph, name: str) -> tuple[float, float] | None:
    """The range of an activation that the plan leaves in float: over the samples; or, of one that was not in the graph,
    that of what it is made of; None if it is not known."""
    if name in solved.ranges:
        return solved.ranges[name]
    if (root := graph.root(name)) in solved.plan:
        return solved.plan[root].value_range
    if root in solved.ranges:
        return solved.ranges[root]
    node = graph.producer(name)
    if node is None or node.op != "Mul" or not graph.is_constant(node.inputs[1].name):
        return None
    factor = float(graph.constant(node.inputs[1].name).max())  # of a Swish
    source = node.inputs[0].name
    ends = solved.plan[source].value_range if source in solved.plan else solved.ranges.get(source)
    return None if ends is None else (ends[0] * factor, ends[1] * factor)


def _weights(
    solved: Solved, graph: Graph, target: Target, asked: Request, activations: Plan, changes: Changes
) -> dict[str, QuantSpec]:
    """Entries of weights and other constants: those of the plan where the target takes them, else requests."""
    found: dict[str, QuantSpec] = {}
    layers = {layer.weight: layer for layer in graph.layers}
    planned = Planned(graph, asked.plan | activations, target)
    for name in asked.plan:
        if not graph.is_constant(name):
            continue
        spec, old = asked.plan[name], solved.plan.get(name)
        found[name] = spec
        if old is None or entry_problem(graph, name, old):
            continue
        if name not in layers:
            found[name] = old
            continue
        layer = layers[name]
        old = replace(old, decoded=spec.decoded)
        rule = planned.rule_for(layer, old, planned.bits(layer))
        shift = old.shift is None or layer.takes_bias
        if rule is not None and not too_wide(target, rule, layer, old) and shift and _storable(layer.op, layer.groups, old):
            found[name] = old
    return found


def _storable(op: str, groups: int, spec: QuantSpec) -> bool:
    """False for scales of a grouped transposed convolution, which only decoded weights can have."""
    return op != "ConvTranspose" or groups == 1 or spec.block is None


def _complete(job: Job, changes: Changes) -> None:
    """Solve the entries that are open, and widen scales beside which a bias would overflow."""
    before = job.plan
    complete_constants(job)
    solved = {layer.weight: complete_weight(job, layer, job.plan[layer.weight]) for layer in Planned.of(job).layers}
    job.plan |= solved
    if changes.counts["weights kept"]:
        return
    for name, spec in job.plan.items():
        if job.graph.is_constant(name):
            how = "kept" if before[name].codes is not None else "solved anew " + spec.describe().partition(" ")[2]
            changes.add("weights", how)
