"""What a pass is, the recipe that lists passes, the job they receive, and what a job leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx

from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import Data, DataOptions
from onnxq_plugins.errors import Reason
from onnxq_plugins.graph import ChannelGroup, Graph, permute
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target

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

BlockRequest = Literal["tensor", "channel"] | int | tuple[int, ...]
SubBlockRequest = Literal["none", "channel"] | int | tuple[int, ...]
FLOAT = 32  # bits = 32: stays float


@dataclass(frozen=True)
class TensorRequest:
    """How one kind of tensor is to be quantized; the ``[weights]`` and ``[activations]`` tables.

    bits        2..16, or 32 to stay float (targets run weights of 2..8 bits, activations of 8, some of 16)
    symmetric   signed codes with zero point 0
    block       granularity of the scale: "tensor", "channel", a number of inputs per scale, [outputs, inputs] or one
                size per axis
    sub_block   granularity of integer multipliers below that, written like `block`; "none" for none
    pow2        scales (or multipliers) are powers of two
    max_multiplier   largest multiplier: 15 packs into 4 bits; up to 127, or 32768 for multipliers per channel of one scale
    full             of fewer than 8 bits, with the code -2^(bits-1), which mirrors no other: -8..7 in place of -7..7
    """

    bits: int = 8
    symmetric: bool = True
    block: BlockRequest = "channel"
    sub_block: SubBlockRequest = "none"
    pow2: bool = False
    max_multiplier: int = 15
    full: bool = False


@dataclass(frozen=True)
class LayerRule:
    """Settings for some layers; the ``[[layer]]`` tables. Later rules win.

    match      glob on the layer's name, or a list of them
    op         Conv, ConvTranspose, Gemm, MatMul, or Attention for products of two activations; LSTM, GRU, RNN, Gather or
               Einsum for their constants, of which only `quantize` and ``weights.bits`` count
    kind       dense, grouped or depthwise
    position   first or last layer of the model
    quantize   false leaves the layer in float; true quantizes attention products whether or not it pays
    weights, activations   fields of TensorRequest that differ; activations means the layer's input
    """

    match: str | tuple[str, ...] = "*"
    op: Literal["", "Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LSTM", "GRU", "RNN", "Gather", "Einsum"] = ""
    kind: Literal["", "dense", "grouped", "depthwise"] = ""
    position: Literal["", "first", "last"] = ""
    quantize: bool | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`match` as a list."""
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    @property
    def everywhere(self) -> bool:
        """True if it is about layers of any name."""
        return "*" in self.patterns

    def names(self, name: str) -> bool:
        """True if it is about layers of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Quality:
    """What the outputs must be worth; the ``[quality]`` table. Where they are not, what costs them most is kept in 16 bits
    or in float (`onnxq_plugins.search.fallback`).

    sqnr    dB that each output must have on samples, pooled; None: nothing is checked
    below   act only where an output has less than this, dB, so that the network is destroyed; None: `sqnr`
    """

    sqnr: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if self.below is not None and (self.sqnr is None or self.below > self.sqnr):
            raise ValueError(f"below = {self.below:g} must not be above sqnr, which is what an output then has to reach")

    @property
    def asked(self) -> bool:
        """True if every output must have `sqnr`, not only those that would be destroyed."""
        return self.sqnr is not None and self.least == self.sqnr

    @property
    def least(self) -> float:
        """dB under which something is done."""
        return float(-np.inf if self.sqnr is None else self.sqnr if self.below is None else self.below)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `onnxq_plugins.recipe` reads and writes its text.

    exclude   operators of any kind that stay float: their names, or globs on them; one that begins with ! takes back
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults left out: `recipe.parse` makes the same recipe of them."""
        table: dict[str, Any] = {"recipe": 1, "target": self.target}
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


def changed(value: Any, default: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from a default instance (or from the fields' own defaults), as plain values."""
    changes = {}
    for f in fields(value):
        now = getattr(value, f.name)
        if now != (getattr(default, f.name) if default is not None else default_of(f)):
            changes[f.name] = list(now) if isinstance(now, tuple) else dict(now) if isinstance(now, Mapping) else now
    return changes


def default_of(f: Field[Any]) -> Any:
    """The default of a dataclass field, made by its factory where it has one."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


# ---- jobs -----------------------------------------------------------------------------------------------------------------


class Report(dict[str, Any]):
    """What a run did, for people and for JSON: a dict whose known entries are attributes with types. Plugins may add
    entries of their own, as values that JSON can hold."""

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        notes: list[str] = self.setdefault("notes", [])
        return notes

    @property
    def warnings(self) -> list[str]:
        """What is bad about the result, and what to try."""
        warnings: list[str] = self.setdefault("warnings", [])
        return warnings

    @property
    def check(self) -> dict[str, Any]:
        """The quantized network beside the user's own, see `Result.check`: ``outputs``, on so many ``samples``, ``sqnr`` of
        the worst one, ``speed``, ``bytes``, what is ``destroyed``, ``slower``, ``larger``. {} if nothing was checked."""
        return dict(self.get("check", {}))

    @property
    def floats(self) -> dict[str, Reason]:
        """Layers, and readers of other constants, that stay float by choice -> why."""
        floats: dict[str, Reason] = self.setdefault("floats", {})
        return floats

    @property
    def widened(self) -> dict[str, int]:
        """Layers -> scales that were widened so that biases fit int32; a note in the end."""
        widened: dict[str, int] = self.setdefault("widened", {})
        return widened

    @property
    def steps(self) -> list[dict[str, Any]]:
        """One entry a pass: ``pass``, ``seconds``, ``exact``, ``parameters``, ``result`` (what it returned; also under its
        old name, ``told``), ``drift``."""
        return list(self.get("steps", []))

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row a layer: ``name``, ``op``, ``kernel``, ``parameters``, ``weights``, ``bits_per_weight``; for one that runs
        in float ``why_float`` and ``why_float_kind`` (`Reason`)."""
        return list(self.get("layers", []))

    @property
    def constants(self) -> list[dict[str, Any]]:
        """One row a constant of 1 kB and more outside layers: ``name``, ``op`` and ``readers`` (operators), ``parameters``,
        ``float_bytes``; ``weights`` and ``bits_per_weight`` where it is stored as codes, else ``why_float`` and
        ``why_float_kind``."""
        return list(self.get("constants", []))

    @property
    def quality(self) -> dict[str, Any]:
        """What the outputs are worth, where the recipe asks for a quality: ``asked`` dB, whether that, or what the recipe
        insists on, is ``met``, and the ``sqnr`` of each output on ``samples`` samples. Where something was kept from 8 bits:
        the dB ``before``, the names that are now ``float`` and ``wide`` (16 bits), and their share of the ``work``. {} if
        nothing was checked."""
        return dict(self.get("quality", {}))

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dict(self.get("recipe", {}))

    @property
    def recipe_name(self) -> str:
        """Name of the recipe's file; "" if it came from none."""
        return str(self.get("recipe_name", ""))

    @property
    def summary(self) -> str:
        """One line: kernels, size, what stayed float."""
        return str(self.get("summary", ""))

    @property
    def bits_per_weight(self) -> float:
        """On disk, with scales and multipliers."""
        return float(self.get("bits_per_weight", 0.0))

    @property
    def float_products(self) -> list[str]:
        """Products of two activations that run in float."""
        return list(self.get("float_products", []))

    def size(self, of: Literal["float", "quantized"]) -> int:
        """Bytes of the user's own model, or of what was made of it."""
        return int(self["bytes"][of])

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        values: dict[str, Any] = json.loads(json.dumps(self))
        return values


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
