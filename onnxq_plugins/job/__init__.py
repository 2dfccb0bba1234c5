"""What a pass is, the recipe that lists passes, the job they receive, and what a job leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx

from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import Data, DataOptions
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.graph import ChannelGroup, Graph, Layer, permute, replace_with_sum, rescale, split_outputs
from onnxq_plugins.graph.flow import readers
from onnxq_plugins.job.report import Report
from onnxq_plugins.job.tables import (
    FLOAT,
    BlockRequest,
    LayerRule,
    Quality,
    SubBlockRequest,
    TensorRequest,
    changed,
    default_of,
    matches,
    tuples,
)
from onnxq_plugins.job.weights import narrowed, weight_spec
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.spec import Array, Plan, QuantSpec
from onnxq_plugins.targets import Target
from onnxq_plugins.targets.reading import input_in

__all__ = [
    "FLOAT",
    "BlockRequest",
    "Job",
    "LayerRule",
    "Metric",
    "Outcome",
    "Pass",
    "Quality",
    "Recipe",
    "Report",
    "Service",
    "Stage",
    "SubBlockRequest",
    "TensorRequest",
    "changed",
    "default_of",
    "parameters",
]

# (outputs of the float network, of the quantized one, labels or None) -> larger is better. Outputs: one array [samples, ...]
# each, concatenated over the feeds along the first axis; where that is impossible (shapes that vary, sequences, maps,
# optionals), a list with one value per feed, as onnxruntime returns it. labels: [samples, ...]
Metric = Callable[[Sequence[Any], Sequence[Any], Array | None], float]

Stage = Literal["rewrite", "solve", "finish"]
Service = Literal["data", "ranges", "codes", "bias", "curve", "placement"]


# ---- passes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One algorithm. A subclass is a frozen dataclass: its fields are its parameters, their defaults its defaults.

    name      how recipes call it; guests write ``vendor.pass``, built-ins have no dot
    exact     False if `apply` may change the float function (bias correction, pruning); the report shows it
    stage     where it belongs in a recipe: ``rewrite`` changes the graph or the calibration, before anything is solved;
              ``solve`` fills in the plan; ``finish`` works on what was solved
    provides  what it takes care of, so that nothing else does it again or suggests it:
              ``data`` calibration without the user's samples;
              ``ranges`` of activations;
              ``codes`` of weights, by the error they cause;
              ``bias`` takes back mean errors;
              ``curve`` its result holds the points of a search under ``curve``, and its parameter ``widths`` makes one of
              them again (see `onnxq_plugins.Curve`);
              ``placement`` decides by cost what runs as integer
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    stage: ClassVar[Stage] = "solve"
    provides: ClassVar[frozenset[Service]] = frozenset()

    def apply(self, job: Job) -> dict[str, Any] | None:
        """Rewrite `job.graph` (its float function unchanged) and, or, replace `job.plan`. What is returned goes into
        the report and must be JSON."""
        raise NotImplementedError


# ---- recipes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `onnxq_plugins.recipe` reads and writes its text.

    exclude   operators of any kind that stay float: their names, or globs on them; one that begins with ! takes back
    vendors   settings of targets by vendor, the first part of their names; the ``[target.VENDOR]`` tables
    """

    target: str = "ort-cpu"
    weights: TensorRequest = TensorRequest()
    activations: TensorRequest = TensorRequest(symmetric=False, block="tensor")
    passes: tuple[Pass, ...] = ()
    layers: tuple[LayerRule, ...] = ()
    data: DataOptions = DataOptions()
    quality: Quality = Quality()
    name: str = ""
    exclude: tuple[str, ...] = ()
    vendors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def excludes(self, name: str) -> bool:
        """True if an operator of this name is to stay float."""
        out = False
        for pattern in self.exclude:
            back, glob = pattern.startswith("!"), pattern.removeprefix("!")
            if out == back and (name == glob or fnmatchcase(name, glob)):
                out = not back
        return out

    def adding(self, step: Pass) -> Recipe:
        """With one more pass, behind the last one of its stage or an earlier one."""
        stages = get_args(Stage)
        at = max((n for n, s in enumerate(self.passes, 1) if stages.index(s.stage) <= stages.index(step.stage)), default=0)
        return replace(self, passes=(*self.passes[:at], step, *self.passes[at:]))

    def provides(self, *services: Service) -> bool:
        """True if one pass provides all of these."""
        return any(step.provides >= set(services) for step in self.passes)

    def settings(
        self, name: str, op: str, kind: str, ends: Mapping[str, bool], unmatched: set[int] | None = None
    ) -> tuple[TensorRequest, TensorRequest, bool | None]:
        """Requests of weights and activations of an operator, and `quantize`, after all rules that match.

        ends        whether it is the first, or the last, layer
        unmatched   numbers of rules; those that match leave it
        """
        weights, activations, quantize = self.weights, self.activations, None
        for n, rule in enumerate(self.layers):
            if matches(rule, name, op, kind, ends):
                (set() if unmatched is None else unmatched).discard(n)
                weights = replace(weights, **tuples(rule.weights))
                activations = replace(activations, **tuples(rule.activations))
                quantize = rule.quantize if rule.quantize is not None else quantize
        return weights, activations, quantize

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults left out: `recipe.parse` makes the same recipe of them."""
        vendors = {name: dict(values) for name, values in self.vendors.items() if values}
        table: dict[str, Any] = {"recipe": 1, "target": {"use": self.target, **vendors} if vendors else self.target}
        if self.exclude:
            table["exclude"] = list(self.exclude)
        for key in ("weights", "activations", "data", "quality"):
            if changes := changed(getattr(self, key), getattr(Recipe, key)):
                table[key] = changes
        if self.passes:
            table["pass"] = [{"use": step.name, **parameters(step)} for step in self.passes]
        if self.layers:
            table["layer"] = [changed(rule, LayerRule()) for rule in self.layers]
        return table

    def to_json(self) -> str:
        """`to_dict` as JSON; a file with it is a recipe too."""
        return json.dumps(self.to_dict(), sort_keys=True)


def parameters(step: Pass) -> dict[str, Any]:
    """The parameters of a pass that differ from its defaults, as plain values."""
    return changed(step, None)


# ---- jobs -----------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a pass receives.

    graph         the float model; rewrite it in place, its function unchanged (law L1)
    plan          tensor name -> QuantSpec; a value: put a new one here
    calibration   statistics of the graph over the user's data
    target        what the runtime can execute
    recipe        the recipe being run
    rng           the only source of randomness, seeded by the user
    workers       how many things may run at once (joblib's n_jobs)
    metric        how the user wants networks judged, None if no metric was given; a search asks it
    class_axis    of the classes in the outputs, None to find it
    report        what the user should know, by topic; see `note`
    track         wrap a long loop in it to show progress: track(items, what, total)
    """

    graph: Graph
    plan: Plan
    calibration: Calibration
    target: Target
    recipe: Recipe
    rng: np.random.Generator
    workers: int = 1
    report: Report = field(default_factory=Report)
    track: Track = silent
    metric: Metric | None = None
    class_axis: int | None = None

    def note(self, text: str) -> None:
        """Put what the user should know into the report."""
        self.report.notes.append(text)

    def keep(self, names: Iterable[str]) -> None:
        """Entries of the plan that stay valid although the pass changed their tensors: the engine drops other solutions of
        what was changed (law L5)."""
        self.plan |= {name: replace(self.plan[name]) for name in names if name in self.plan}

    # ---- what a pass asks --------------------------------------------------------------------------------------------

    def input_of(self, layer: Layer) -> str:
        """The planned activation that a layer reads, perhaps through operators that only move values; "" if it reads
        float."""
        return input_in(self.graph, self.plan, self.target, layer)

    def readers(self, tensor: str) -> list[str]:
        """Names of the operators that read a tensor, seen through those that only move values, in the graph's order."""
        names = readers(self.graph, tensor)
        return [str(node.name) for node in self.graph.nodes if node.name in names]

    def request_for(self, layer: Layer, bits: int | None = None) -> QuantSpec | None:
        """The entry that the recipe, with its ``[[layer]]`` rules, requests of a layer's weight, one that a pass has just
        made included. None if the layer stays float: a rule says so, or the target has no kernel.

        bits   in place of the recipe's; granularity and multipliers follow as far as this width leaves room for them
        """
        names = [other.name for other in self.graph.layers]
        ends = {"first": layer.name == names[0], "last": layer.name == names[-1]} if names else {}
        weights, activations, quantize = self.recipe.settings(layer.name, layer.op, layer.kind, ends)
        known = any(rule.op == layer.op for rule in self.target.rules)
        if quantize is False or weights.bits == FLOAT or not known:
            return None
        width = weights.bits if bits is None else bits
        width = width if activations.bits == FLOAT else narrowed(width, self.target)
        problems: list[str] = []
        spec = weight_spec(layer, replace(weights, bits=width), self.target, problems)
        OnnxqError.check(problems)
        return spec

    # ---- what a pass changes -----------------------------------------------------------------------------------------

    def keep_float(self, layer: Layer | str, reason: str) -> None:
        """Leave a layer in float on purpose, such as a small one that a pass has added: counts of layers leave it out, and
        no remedy or warning is about it. Reports show it with the reason. Raises ValueError for a name that no layer has."""
        if isinstance(layer, str):
            if layer not in {other.name for other in self.graph.layers}:
                raise ValueError(f"there is no layer '{layer}': a layer is an operator with a weight, see job.graph.layers")
            layer = self.graph.layer(layer)
        self.plan = self.plan.without(layer.weight)
        self.report.floats[layer.name] = Reason("pass", reason)

    def drop_unused(self) -> None:
        """Drop operators and constants that no output needs, and entries of tensors that are gone. The engine does so behind
        each pass; a pass that goes on with what is left may do it before."""
        self.graph.tidy()
        self.plan = self.plan.without(*(name for name in self.plan if name not in self.graph))

    def rescale(self, group: ChannelGroup, factors: Array) -> None:
        """Multiply the channels of a group's activations, and undo that in their readers (`graph.rescale`). Solutions for
        what changes are dropped when the pass ends (law L5)."""
        rescale(self.graph, group, factors)

    def split(self, layer: Layer, parts: Sequence[Array]) -> list[Layer]:
        """Make one layer of each part of a layer's output channels, joined by a Concat (`graph.split_outputs`); the new
        layers, each planned as the old one was requested."""
        return self._planned_like(layer, split_outputs(self.graph, layer, parts))

    def replace_with_sum(self, layer: Layer, parts: Sequence[Array]) -> list[Layer]:
        """Make W x + b a sum W_1 x + b + W_2 x + ... (`graph.replace_with_sum`); the new layers, each planned as the old one
        was requested."""
        return self._planned_like(layer, replace_with_sum(self.graph, layer, parts))

    def _planned_like(self, layer: Layer, made: list[Layer]) -> list[Layer]:
        spec = self.plan.get(layer.weight)
        if spec is not None:
            self.plan = self.plan.without(layer.weight) | {part.weight: spec.request() for part in made}
        return made

    def permute(self, group: ChannelGroup, order: Array) -> None:
        """Reorder the channels of a group (`graph.permute`). What was solved for the weights it moves is dropped when the
        pass ends (law L5); ranges per tensor, which do not depend on the order, stay."""
        permute(self.graph, group, order)
        self.keep(name for name in group.tensors if name in self.plan and self.plan[name].block is None)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a job leaves.

    model    the QDQ model
    plan     the solved plan
    report   what was done
    graph    the float graph that the plan is about: canonical, and rewritten by the passes
    target   what the model is for
    data     the samples it was calibrated with, None without
    source   the user's own model: its path, or what was passed; None for a Graph
    recipe   the recipe that was run
    again    quantizes the same model on the same data by another recipe: again(recipe, settings=())
    class_axis   of the classes in the outputs, as the user gave it
    names    tensor of `graph` -> its name in `model`, where that is another one
    propose  the remedies that plugins have against a cause: propose(cause, layer)
    inside   (If, attribute that holds the branch) -> what a job left of that branch
    """

    model: onnx.ModelProto
    plan: Plan
    report: Report
    graph: Graph
    target: Target
    data: Data | None = None
    source: Path | onnx.ModelProto | None = None
    recipe: Recipe = Recipe()
    again: Callable[..., Outcome] | None = None
    class_axis: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    propose: Callable[[Any, Layer | None], Any] | None = None
    inside: Mapping[tuple[str, str], Outcome] = field(default_factory=dict)

    @property
    def float_model(self) -> onnx.ModelProto:
        """The float model that the plan is about. Its function is the user's model's, unless a pass declares otherwise;
        its tensors and weights need not be: BatchNorm is folded, channels may be rescaled."""
        return self.graph.model()

    @property
    def original(self) -> Path | onnx.ModelProto:
        """What latency and accuracy are compared with: the user's own model, or `float_model` where that is gone."""
        gone = self.source is None or (isinstance(self.source, Path) and not self.source.is_file())
        return self.float_model if gone or self.source is None else self.source

    @property
    def recipe_name(self) -> str:
        """Name of the recipe's file; "" if it came from none."""
        return self.report.recipe_name

    @property
    def summary(self) -> str:
        """One line: kernels, size, what stayed float."""
        return self.report.summary
