"""A search over widths: the candidates of each group, the plan of a choice, its cost.

Widths are searched on plans: groups say what must change together, weights come from a cache per layer and width. One group
alone is exported for a target without conditions on outputs, so that what is measured comes from the exporter, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, Gram
from onnxq_plugins.data import Data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export import qdq
from onnxq_plugins.export.weights import code_bits
from onnxq_plugins.files import digest, load_arrays, save_arrays
from onnxq_plugins.graph import Layer
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.opsets import NARROW_OPSET
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.complete import complete_ranges, complete_weight, scale_floor
from onnxq_plugins.layers.float_inputs import keep_inputs_float
from onnxq_plugins.layers.problem import Problem, float_inputs, solvable
from onnxq_plugins.parallel import run_all
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import pinned, weight_request
from onnxq_plugins.runtimes.examples import examples, first_running
from onnxq_plugins.search import latency
from onnxq_plugins.search.quantizers import FLOAT_BITS, Cost, Group, Width, cost, multiply_adds, quantizer_groups
from onnxq_plugins.solvers.allocate import allocate
from onnxq_plugins.solvers.rounding import Effort, Method
from onnxq_plugins.spec import Array, Plan, QuantSpec, from_range
from onnxq_plugins.targets import STORAGE, Rule

Choice = tuple[Width, ...]  # one per group
Budget = Literal["size", "bops", "latency"]
_POSITIONS, _LIMIT = 256, 4608  # of Gram matrices: the defaults of the pass `round`

# For one group alone: decoded weights, activations of any width, and no layer that has to write codes.
ALONE = replace(
    STORAGE,
    name="alone",
    output_scale=frozenset(),
    rules=tuple(
        Rule(op, op, bits, tuple(range(2, 17)), ("tensor", "channel", "block", "tile"), "float", multipliers=True)
        for op in LAYER_OPS
        for bits in (*range(16, 1, -1), 0)
    ),
)


class Widths:
    """The choices for a job's plan.

    groups      the groups of quantizers
    options     per group the candidates that the target has kernels for, widest first; of equivalent ones the first
    work        multiply-adds of each layer for one sample
    coded       planned activations that are stored as codes, so that all their readers get the rounded values
    eight_bits  the choice of 8-bit weights and activations everywhere; of the widest option where the target has none
    times       of each group at each width, once `time` has measured them
    """

    def __init__(self, job: Job, candidates: Sequence[Width] | Mapping[str, Width], feed: Mapping[str, Array]) -> None:
        self.job, self.layers = job, {layer.name: layer for layer in job.graph.layers}
        self.forms: dict[tuple[str, int], QuantSpec] = {}  # (layer, bits of its weight) -> its request
        self.fixed = pinned(job.graph, job.recipe)
        self.groups = quantizer_groups(job.graph, job.plan, job.target)
        self.coded = Planned.of(job).coded
        self.work = multiply_adds(job.graph, feed)
        self.options = (
            self._named(candidates)
            if isinstance(candidates, Mapping)
            else [self._distinct(group, [w for w in candidates if self._runs(group, w)]) for group in self.groups]
        )
        if empty := [g.name for g, options in zip(self.groups, self.options, strict=True) if not options]:
            others = f" and {len(empty) - 1} others" if len(empty) > 1 else ""
            raise OnnxqError(
                f"widths: target '{job.target.name}' runs none of {', '.join(map(str, candidates))} for "
                f"'{empty[0]}'{others}; add a candidate that it runs, such as W8A8."
            )
        self.solved: dict[tuple[str, int], QuantSpec] = {}  # (layer, bits of its weight) -> its entry
        self.costs: dict[tuple[int, Width], Cost] = {}  # of one group
        self.eight_bits: Choice = tuple(
            Width(8, 8) if self._runs(group, Width(8, 8)) else options[0]
            for group, options in zip(self.groups, self.options, strict=True)
        )
        self.times: latency.Times | None = None

    def round(self, method: Method, data: Data, only: Mapping[int, Width] | None = None) -> None:
        """Round every layer's weight once at each width it may have, on the inputs of the float network.

        only   the width of each group (by number) if that is decided
        """
        complete_ranges(self.job)
        job = self._rounding_job(data, final=only is not None)
        pending = self._open_widths(self.options if only is None else [(only[i],) for i in range(len(self.groups))])
        solved_by_matrix = [layer for layer in solvable(self.job) if pending.get(layer.name)]
        for layer in self.layers.values():
            if pending.get(layer.name) and layer not in solved_by_matrix:
                for bits in pending[layer.name]:
                    self.solved[layer.name, bits] = complete_weight(job, layer, self._request(layer, bits))
        files = {
            (layer.name, bits): self._file(
                replace(job, plan=job.plan | {layer.weight: self._request(layer, bits)}), layer, method
            )
            for layer in solved_by_matrix
            for bits in pending[layer.name]
        }
        for (name, bits), file in files.items():
            if file is not None and (arrays := load_arrays(file)):
                solution: dict[str, Any] = dict(arrays)
                self.solved[name, bits] = replace(self._request(self.layers[name], bits), **solution)
                pending[name].discard(bits)
        for batch in float_inputs(job, [layer for layer in solved_by_matrix if pending[layer.name]], _POSITIONS, _LIMIT):

            def keep(number: int, specs: dict[int, QuantSpec], batch: list[tuple[Layer, Gram]] = batch) -> None:
                layer = batch[number][0]
                for bits, spec in specs.items():
                    self.solved[layer.name, bits] = spec
                    if (file := files[layer.name, bits]) is not None:
                        values = {f.name: getattr(spec, f.name) for f in fields(spec)}
                        save_arrays(file, {key: value for key, value in values.items() if isinstance(value, np.ndarray)})

            calls = (partial(_solve, self._problems(job, layer, gram, pending[layer.name]), method) for layer, gram in batch)
            with runtimes.blas(1):
                list(self.job.track(run_all(calls, self.job.workers, keep), "rounding", len(batch)))

    def _rounding_job(self, data: Data, final: bool) -> Job:
        """The job on other data, with scales fine enough for biases beside inputs of 8 bits.

        final   False leaves no trace in the report
        """
        old = self.job.calibration
        calibration = old
        if data is not old.data:
            calibration = Calibration(old.graph, data, cache=old.cache, workers=old.workers, track=old.track)
        names = [name for group in self.groups for name in group.activations]
        narrow = {name: self._activation(name, min(self.job.plan[name].bits, 8)) for name in names}
        report = self.job.report if final else Report()
        return replace(self.job, calibration=calibration, plan=self.job.plan | narrow, report=report)

    def _open_widths(self, options: Sequence[Sequence[Width]]) -> dict[str, set[int]]:
        """Layer -> bits of its weight in the options of its group."""
        return {
            name: {self._bits(name, width) for width in each if width.weights != FLOAT_BITS}
            for group, each in zip(self.groups, options, strict=True)
            for name in group.layers
        }

    def _problems(self, job: Job, layer: Layer, gram: Gram, widths: Collection[int]) -> dict[int, Problem]:
        """A layer at each width, in one call, since the problems share a Gram matrix."""
        plans = {bits: job.plan | {layer.weight: self._request(layer, bits)} for bits in sorted(widths)}
        return {bits: Problem.of(replace(job, plan=plan), layer, gram, True) for bits, plan in plans.items()}

    def _file(self, job: Job, layer: Layer, method: Method) -> Path | None:
        """The file that keeps the codes of a layer between runs: named after everything they depend on."""
        from onnxq_plugins.export.provenance import version_of

        cache, data = job.calibration.cache, job.calibration.data
        if cache is None or data is None:
            return None
        spec = job.plan[layer.weight]
        name = digest(
            version_of("onnxq-plugins"),
            job.calibration.graph.digest(),
            data.digest(),
            layer.name,
            spec.to_dict(),
            scale_floor(job, layer, spec),
            method,
            _POSITIONS,
            _LIMIT,
        )
        return cache / f"{name}-codes.npz"

    def time(self, feed: Mapping[str, Array]) -> latency.Times:
        """Measure the groups in onnxruntime on this machine, for one sample: costs then include latency. Weights must be
        rounded. Raises OnnxqError if the target is another runtime."""
        job = self.job
        if not job.target.here:
            raise OnnxqError(
                f"latency is measured in onnxruntime on this machine, and target '{job.target.name}' stands "
                "for another runtime; choose target ort-cpu, or a budget on bops."
            )
        start = self.eight_bits
        widths = dict.fromkeys(w for options in self.options for w in options)
        changed = (
            tuple(width if width in options else base for options, base in zip(self.options, start, strict=True))
            for width in widths
        )
        choices = dict.fromkeys([start, *changed])  # one width at a time, beside 8 bits
        trial = replace(job, report=Report())
        for group, width in zip(self.groups, start, strict=True):
            for name in group.layers if width.weights != FLOAT_BITS else ():
                key = name, self._bits(name, width)
                if key not in self.solved:
                    self.solved[key] = complete_weight(trial, self.layers[name], self._request(self.layers[name], key[1]))
        before, job.graph.output_opset = job.graph.output_opset, NARROW_OPSET  # in which equal kernels are alike
        networks = [(choice, self.exported(choice)) for choice in choices]
        job.graph.output_opset = before
        self.times = latency.measured(self.groups, networks, feed, self.coded, job.calibration.cache)
        self.costs.clear()
        return self.times

    def exported(self, choice: Choice) -> onnx.ModelProto:
        """The network of a choice."""
        return qdq.export(self.job.graph, self.plan(dict(enumerate(choice))), self.job.target)

    def plan(self, choice: Mapping[int, Width]) -> Plan:
        """The entries of some groups (by number), each at a width. Groups in float have none."""
        specs: dict[str, QuantSpec] = {}
        for number, width in choice.items():
            if width.weights == FLOAT_BITS:
                continue
            group = self.groups[number]
            specs |= {name: self._activation(name, width.activations) for name in group.activations}
            specs |= {self.layers[name].weight: self.solved[name, self._bits(name, width)] for name in group.layers}
        return Plan(specs)

    def requests(self, choice: Choice) -> Plan:
        """The entries of a choice, all open, for later passes to solve. Groups in float have none."""
        specs: dict[str, QuantSpec] = {}
        for group, width in zip(self.groups, choice, strict=True):
            if width.weights != FLOAT_BITS:
                specs |= {name: replace(self.job.plan[name].request(), bits=width.activations) for name in group.activations}
                specs |= {
                    self.layers[name].weight: self._request(self.layers[name], self._bits(name, width))
                    for name in group.layers
                }
        return Plan(specs)

    def within(self, loss: Sequence[Array], budget: Budget, limit: float) -> Choice:
        """The choice of least total `loss` (one array [options] per group) at a cost of at most `limit` times that of 8 bits
        everywhere. Raises OnnxqError if there is none."""
        numbers = allocate(loss, self.prices(budget), limit * getattr(self.eight, budget) * (1 + 1e-12))
        if numbers is None:
            raise self.too_expensive(budget, limit)
        return tuple(options[k] for options, k in zip(self.options, numbers, strict=True))

    def prices(self, budget: Budget) -> list[Array]:
        """The cost of each option, one array [options] per group."""
        return [
            np.array([float(getattr(self._cost(i, w), budget)) for w in options]) for i, options in enumerate(self.options)
        ]

    def too_expensive(self, budget: Budget, limit: float) -> OnnxqError:
        """The error that no choice is cheap enough."""
        whole = getattr(self.eight, budget)
        least = sum(float(p.min()) for p in self.prices(budget)) / (whole or 1.0)
        kind, better = ("fastest", "that run faster") if budget == "latency" else ("narrowest", "of fewer bits")
        return OnnxqError(
            f"widths: {budget} cannot fall to {limit} of 8 bits everywhere, the {kind} candidates have "
            f"{least:.3f}; raise limit, or add candidates {better}."
        )

    def shares(self, choice: Choice) -> dict[str, float]:
        """The cost of a choice relative to 8 bits everywhere; latency only if it was measured."""
        price, whole = asdict(self.cost(choice)), asdict(self.eight)
        return {key: value / (whole[key] or 1.0) for key, value in price.items() if key != "latency" or self.times}

    def stored(self, choice: Choice) -> float:
        """Bits of the weights' codes in a file for the target, relative to 8 bits each: widths of 5 to 7 bits take a byte
        there."""
        stored, whole = 0.0, 0.0
        for group, width in zip(self.groups, choice, strict=True):
            for layer in (self.layers[name] for name in group.layers):
                count, spec = float(np.prod(layer.shape)), self._request(layer, self._bits(layer.name, width))
                rule = self.job.target.rule(layer, spec, width.activations if group.activations else 0)
                stored += count * (float(FLOAT_BITS) if rule is None else code_bits(spec.bits, rule))
                whole += 8 * count
        return stored / (whole or 1.0)

    @property
    def eight(self) -> Cost:
        """The cost of 8-bit weights and activations everywhere."""
        return self.cost(tuple(Width(8, 8) for _ in self.groups))

    def cost(self, choice: Choice) -> Cost:
        """Size of the weights, bit operations and latency of a choice."""
        parts = [self._cost(i, width) for i, width in enumerate(choice)]
        return Cost(sum(p.size for p in parts), sum(p.bops for p in parts), sum(p.latency for p in parts))

    def _cost(self, number: int, width: Width) -> Cost:
        """The cost of one group. Weight-only layers read float."""
        if (number, width) not in self.costs:
            group = self.groups[number]
            activations = width.activations if group.activations else FLOAT_BITS
            widths = {name: Width(self._bits(name, width), activations) for name in group.layers}
            milliseconds = self.times.of(number, width) if self.times is not None else 0.0
            self.costs[number, width] = replace(cost(self.job.graph, widths, self.work), latency=milliseconds)
        return self.costs[number, width]

    def _bits(self, name: str, width: Width) -> int:
        """Bits of a layer's weight at a width; those of the recipe if it pins them."""
        if name in self.fixed and width.weights != FLOAT_BITS:
            return self.job.plan[self.layers[name].weight].bits
        return width.weights

    def _request(self, layer: Layer, bits: int) -> QuantSpec:
        """The request of a layer's weight at a width: as in the recipe, or in the form that an earlier pass gave it, such as
        the shifts of `shift-equalize`."""
        if (layer.name, bits) not in self.forms:
            job, planned = self.job, replace(self.job.plan[layer.weight].request(), decoded=False)
            original = weight_request(job.graph, job.recipe, job.target, layer, planned.bits)
            spec = weight_request(job.graph, job.recipe, job.target, layer, bits)
            spec = spec if original.to_dict() == planned.to_dict() else replace(planned, bits=spec.bits)
            self.forms[layer.name, bits] = keep_inputs_float(job, {layer.weight: spec})[layer.weight]
        return self.forms[layer.name, bits]

    def _activation(self, name: str, bits: int) -> QuantSpec:
        """An activation's entry at another width, over the same range."""
        spec = self.job.plan[name]
        if spec.bits == bits:
            return spec
        return from_range(*spec.value_range, replace(spec.request(), bits=bits))

    def _distinct(self, group: Group, candidates: Sequence[Width]) -> tuple[Width, ...]:
        """The candidates without equivalent ones, such as those of one width of activations in a group without weights."""
        distinct: dict[object, Width] = {}
        for width in candidates:
            bits = tuple(self._bits(name, width) for name in group.layers)
            distinct.setdefault((width.weights == FLOAT_BITS, bits, width.activations if group.activations else 0), width)
        return tuple(distinct.values())

    def _named(self, widths: Mapping[str, Width]) -> list[tuple[Width, ...]]:
        """The only option of each group, by its name. Raises OnnxqError if names or widths do not fit."""
        groups = {group.name: group for group in self.groups}
        refused: dict[Width, list[str]] = {}
        for name, width in widths.items():
            if name in groups and not self._runs(groups[name], width):
                refused.setdefault(width, []).append(name)
        wrong = {
            "no group is called {}": [n for n in widths if n not in groups],
            "{} have no width": [n for n in groups if n not in widths],
            **{f"target '{self.job.target.name}' does not run {w} for {{}}": names for w, names in refused.items()},
        }
        if problems := [text.format(", ".join(f"'{n}'" for n in names)) for text, names in wrong.items() if names]:
            raise OnnxqError(
                f"mixed-precision: the widths do not fit this model: {'; '.join(problems)}; take them from a "
                "search on this model, with the same passes before it and the same target."
            )
        return [(widths[name],) for name in groups]

    def _runs(self, group: Group, width: Width) -> bool:
        """True if the target has kernels for a group at a width."""
        graph, target = self.job.graph, self.job.target
        if width.weights == FLOAT_BITS:  # what a kernel has to write in codes cannot be read in float
            coded = any(
                maker_of(graph, name).op in target.output_scale | target.integer_ops
                for name in group.activations
                if name in self.coded
            )
            return not coded and not any(name in self.fixed for name in group.layers)
        activations = width.activations if group.activations else 0
        known = not group.activations or activations in target.activation_bits
        return known and all(
            target.rule(layer, self._request(layer, self._bits(layer.name, width)), activations) is not None
            for layer in (self.layers[name] for name in group.layers)
        )


def _solve(problems: Mapping[int, Problem], method: Method) -> dict[int, QuantSpec]:
    """One layer at several widths. Plain values in and out, so that it can run anywhere."""
    return {bits: problem.solve(method, Effort())[0] for bits, problem in problems.items()}


def sample(job: Job) -> Mapping[str, Array]:
    """One sample to count multiply-adds on: from the data, or random."""
    if job.calibration.data is not None:
        return next(iter(job.calibration.data))
    model = job.graph.model()
    return first_running(examples([model]), [runtimes.session(model)])
