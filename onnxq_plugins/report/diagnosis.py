"""Which layers hold a quantized network's error, why, and what to try: `onnxq diagnose`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, channels
from onnxq_plugins.data import Data, Source, graph_inputs, open_data
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.graph import Layer, channel_groups
from onnxq_plugins.graph.flow import activation_inputs, maker_of, readers
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure.metrics import mean_sqnr
from onnxq_plugins.measure.networks import Measure
from onnxq_plugins.parallel import Track, cores, silent
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import request, rule_keys
from onnxq_plugins.report.causes import Activation, Cause, causes
from onnxq_plugins.report.layer_errors import Own, gathered, own
from onnxq_plugins.report.remedies import Remedy, Scene, float_remedies, layer_rule
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.search.quantizers import multiply_adds
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Array, Plan

_MOST_FLOAT = 4  # layers that a remedy may name
_TOP = 3  # remedies of a layer that are shown and tried
_NO_USE = 0.1  # dB that the choice of samples moves
_ALONE = 4  # of the samples, for networks with one layer quantized: enough to rank layers


@dataclass(frozen=True, eq=False)
class LayerError:
    """The error of one layer, or of a planned activation that no layer reads.

    name      of the layer; "tensor NAME" for an activation that no layer reads
    at        tensor where `sqnr` is measured: the layer's output behind its Relu or Clip
    input     the planned activation that the layer reads, "" for float
    sqnr      dB there in the quantized network: all errors up to here
    own       dB there by this layer's quantizers alone, its weight's and its input's; None for a layer that stays float
    alone     dB of the network's outputs with only this layer quantized; None where that was not measured
    share     `alone` as a part of the noise of the outputs: parts of all layers add up to about 1
    causes    of its own error, the heaviest first
    """

    name: str
    op: str
    at: str
    input: str
    sqnr: float
    own: Own | None
    alone: float | None = None
    share: float | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def badness(self) -> tuple[bool, float]:
        """Sorts the worst first: those measured alone, then by their own error."""
        return (self.alone is None, self.alone if self.alone is not None else self.own.both if self.own else 200.0)

    @property
    def remedies(self) -> list[Remedy]:
        """Of all causes, the most promising first."""
        return list({remedy.typed: remedy for cause in self.causes for remedy in cause.remedies}.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, dB with two decimals."""
        own = self.own
        parts = {} if own is None else {"own_weight": own.weight, "own_input": own.input, "own": own.both}
        numbers = {"sqnr": self.sqnr, **parts, **({} if self.alone is None else {"alone": self.alone})}
        return {
            "name": self.name,
            "op": self.op,
            "input": self.input,
            **{k: round(v, 2) for k, v in numbers.items()},
            **({} if self.share is None else {"share": round(self.share, 4)}),
            "causes": [
                {"kind": c.kind, "text": c.text, "gain_estimated": c.gain, "remedies": [r.to_dict() for r in c.remedies]}
                for c in self.causes
            ],
        }


@dataclass(frozen=True)
class FloatLayer:
    """A layer that runs in a float kernel: why, its part of the network's multiply-adds, and what may change that."""

    name: str
    op: str
    kernel: str
    why: str
    work: float
    remedies: tuple[Remedy, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "op": self.op,
            "kernel": self.kernel,
            "why": self.why,
            "work": round(self.work, 4),
            "remedies": [r.to_dict() for r in self.remedies],
        }


@dataclass(frozen=True, eq=False)
class Trial:
    """A remedy that was tried: dB of the network's outputs with it, or the sentence by which it was refused."""

    layer: str
    remedy: Remedy
    sqnr: float | None
    refused: str = ""

    def verdict(self, before: float) -> str:
        """In words what it was worth, where the outputs had so many dB before."""
        if self.sqnr is None:
            return f"refused: {self.refused}"
        gain = self.sqnr - before
        word = "no use" if abs(gain) < _NO_USE else "helps" if gain > 0 else "harms"
        return f"{word}: {gain:+.2f} dB, {before:.2f} -> {self.sqnr:.2f}"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found.

    sqnr         dB of the network's outputs
    layers       all of them, the worst first
    floats       layers in float kernels, those with the most work first
    activations  planned activations by name
    saturating   layers that can saturate on AVX2 without VNNI
    samples      the numbers above are from so many
    tried        remedies that were really tried; all others are suggestions
    """

    sqnr: float
    layers: tuple[LayerError, ...]
    floats: tuple[FloatLayer, ...]
    activations: Mapping[str, Activation]
    saturating: tuple[str, ...]
    samples: int
    seconds: float
    tried: tuple[Trial, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {
            "sqnr": round(self.sqnr, 2),
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "layers": [layer.to_dict() for layer in self.layers],
            "floats": [f.to_dict() for f in self.floats],
            "saturating_without_vnni": list(self.saturating),
            "tried": [
                {
                    "layer": t.layer,
                    **t.remedy.to_dict(),
                    "sqnr": None if t.sqnr is None else round(t.sqnr, 2),
                    **({"refused": t.refused} if t.refused else {}),
                }
                for t in self.tried
            ],
        }

    @property
    def notes(self) -> list[str]:
        """What is to be known when reading it."""
        made = (
            []
            if self.adds_up
            else [
                "Layers here make up for each other's errors (the pass round solves them so), and "
                "one alone shows more error than it adds: read the order, not the parts."
            ]
        )
        return [
            *made,
            "What to try are suggestions by rules of thumb; "
            + ("only those under 'tried' were tried." if self.tried else "none was tried."),
        ]

    @property
    def adds_up(self) -> bool:
        """True if the layers' parts of the noise can be read as parts. Layers that were solved to make up for the errors
        before them (`round` does so) show more error alone than they add."""
        return sum(y.share or 0.0 for y in self.layers) < 1.5

    def part(self, layer: LayerError) -> float | None:
        """A layer's noise alone in percent: of the noise of the outputs, or, where parts do not add up, of the worst
        layer's."""
        if layer.share is None:
            return None
        worst = max((y.share or 0.0 for y in self.layers), default=0.0)
        return 100 * layer.share / (1.0 if self.adds_up else max(worst, 1e-30))

    @property
    def part_of(self) -> str:
        """Heading of `part`."""
        return "noise %" if self.adds_up else "% of worst"

    @property
    def explained(self) -> tuple[LayerError, ...]:
        """The five worst layers, which are worth some words."""
        return tuple(y for y in self.layers if y.own is not None)[:5]

    def __repr__(self) -> str:
        worst = ", ".join(y.name for y in self.explained[:3])
        return f"<Diagnosis: {self.sqnr:.1f} dB at the outputs of {len(self.layers)} layers, {len(self.floats)} in float" + (
            f"; worst: {worst}>" if worst else ">"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the worst layers with cause and remedy."""
        rows = []
        for y in self.explained:
            part, ways = self.part(y), y.remedies[:1]
            cells = [
                escape(y.name),
                "" if part is None else f"{part:.1f}",
                escape(self.told(y)),
                "".join(f"{escape(way.text)}<pre>{escape(way.typed)}</pre>" for way in ways),
            ]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("layer", self.part_of, "why", "to try"))
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<p>{self.sqnr:.1f} dB at the outputs, on {self.samples} samples</p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>{notes}"
        )

    def told(self, layer: LayerError) -> str:
        """A layer in one paragraph: its error, its cause, what to try."""
        parts = []
        if layer.share is not None and layer.alone is not None:
            part = f", about {layer.share:.0%} of all noise" if self.adds_up and layer.share < 1 else ""
            noun = "tensor" if layer.at == layer.input else "layer"
            parts.append(f"With this {noun} alone quantized the outputs have {layer.alone:.1f} dB{part}.")
        if layer.own is not None and layer.own.weight < 200 and layer.own.input < 200:
            parts.append(
                f"At its own output, rounding its weight leaves {layer.own.weight:.1f} dB, rounding its input "
                f"{layer.own.input:.1f} dB."
            )
        parts += [cause.text for cause in layer.causes[:2]]
        return " ".join(parts)


def diagnose(
    result: Outcome,
    data: Source | Data | None = None,
    *,
    samples: int = 8,
    alone: int | None = None,
    attempts: int = 0,
    workers: int | None = None,
    track: Track = silent,
) -> Diagnosis:
    """Find where the error of a quantized network comes from.

    data      sample inputs, as for `quantize`; those it was calibrated with if not given
    samples   of the data, spread evenly
    alone     measure the network with one layer quantized alone, for so many layers of the largest own error (None: all);
              each costs an export and 4 runs
    attempts  try so many of the remedies: the first three of the worst layer, then of the next; each costs a quantization
    workers   networks measured side by side; None: one per core

    Cost: the float network eight times and the quantized one twice for each sample; and `alone`.
    Raises OnnxqError if there are no samples.
    """
    start, workers = time.perf_counter(), workers or cores()
    graph, plan = result.graph, result.plan
    planned = Planned(graph, plan, result.target)
    data = samples_of(result, data)
    feeds = data.spread(samples)
    small = Data(data.inputs, lambda: iter(feeds), data.where, len(feeds))
    quantized = runtimes.outputs(runtimes.session(result.model), feeds)
    whole = mean_sqnr(runtimes.outputs(runtimes.session(graph.model()), feeds), quantized)
    measure = Measure(graph, ALONE, few := feeds[:: -(-len(feeds) // _ALONE)], coded=planned.coded)
    noise = mean_sqnr(measure.samples.reference, runtimes.outputs(runtimes.session(result.model), few))
    activations = _activations(planned, small, workers)
    layers = _layers(result, feeds, activations)
    asked = sorted((y for y in layers if y.own is not None), key=lambda y: y.badness)[:alone]
    plans = [_alone(result, y) for y in asked]
    scores = track(measure.scores(plans, [mean_sqnr], workers), "layers alone", len(plans))
    found = {y.name: score["sqnr"] for y, score in zip(asked, scores, strict=True)}
    layers = [
        replace(y, alone=found[y.name], share=float(10 ** ((noise - found[y.name]) / 10))) if y.name in found else y
        for y in layers
    ]
    layers.sort(key=lambda y: y.badness)
    saturating = needs(result.model)
    names = tuple(y.name for y in graph.layers if (need := saturating.get(y.output)) is not None and need.saturates)
    made = Diagnosis(whole, tuple(layers), _floats(result, feeds[0]), activations, names, len(feeds), 0.0)
    tried = _try(result, made, data, samples, attempts, track)
    return replace(made, tried=tried, seconds=time.perf_counter() - start)


def samples_of(result: Outcome, data: Source | Data | None) -> Data:
    if data is None and result.data is None:
        raise OnnxqError("a diagnosis measures networks on sample inputs, and there are none; give some (--data PATH).")
    return (
        data
        if isinstance(data, Data)
        else result.data
        if data is None and result.data is not None
        else (open_data(data, graph_inputs(result.graph)))
    )


def _activations(planned: Planned, data: Data, workers: int) -> dict[str, Activation]:
    graph, plan, names = planned.graph, planned.plan, planned.activations
    calibration = Calibration(graph, data, workers=workers)
    shapes = calibration.histograms(names)
    each = calibration.channel_ranges([name for name in names if channels(graph, name)])
    roots = set(graph.inputs)
    return {n: Activation(n, plan[n], shapes[n], each.get(n), n in roots) for n in names}


def _layers(
    result: Outcome, feeds: Sequence[Mapping[str, Array]], activations: Mapping[str, Activation]
) -> list[LayerError]:
    """Every layer, and every planned activation that no planned layer reads, with its errors and causes."""
    graph, plan = result.graph, result.plan
    planned = Planned(graph, plan, result.target)
    inputs = {y.name: planned.input(y) for y in graph.layers}
    rest = [name for name in activations if name not in inputs.values()]
    owns = own(graph, plan, result.target, feeds, rest)
    sums = gathered(graph, result.model, [*(y.result for y in graph.layers), *rest], feeds)
    tied = {m.tensor for g in channel_groups(graph, "rescale", clips=True) for m in g.members if not m.constant}
    scene = Scene(result.target, result.recipe, frozenset(tied), _Floating(result).layers)

    def explained(layer: Layer | None, key: str, mine: Own) -> tuple[Cause, ...]:
        spec = plan[layer.weight] if layer is not None else None
        weight = graph.constant(layer.weight) if layer is not None else None
        shares = (10 ** (-mine.weight / 10), 10 ** (-mine.input / 10)) if layer is not None else (0.0, 1.0)
        return causes(layer, weight, spec, activations.get(key), shares, mine.mean_share, scene)

    found = [
        LayerError(
            y.name,
            y.op,
            y.result,
            inputs[y.name],
            sums[y.result],
            owns.get(y.name),
            causes=explained(y, inputs[y.name], owns[y.name]) if y.name in owns else (),
        )
        for y in graph.layers
    ]
    for name in rest:
        maker = maker_of(graph, name)
        found.append(
            LayerError(
                f"tensor {name}",
                maker.op if maker is not None else "input",
                name,
                name,
                sums[name],
                owns[name],
                causes=explained(None, name, owns[name]),
            )
        )
    return found


def _alone(result: Outcome, layer: LayerError) -> Plan:
    """The plan with nothing but a layer's weight and the activation it reads."""
    weights = [y.weight for y in result.graph.layers if y.name == layer.name]
    return Plan({name: result.plan[name] for name in [*weights, *([layer.input] if layer.input else [])]})


def _floats(result: Outcome, feed: Mapping[str, Array]) -> tuple[FloatLayer, ...]:
    rows = [row for row in result.report.layers if "why_float" in row]
    if not rows:
        return ()
    work = multiply_adds(result.graph, feed)
    total = max(sum(work.values()), 1)
    keys = rule_keys(result.graph, result.recipe)
    found = [
        FloatLayer(
            row["name"],
            row["op"],
            row["kernel"],
            row["why_float"],
            work.get(row["name"], 0) / total,
            float_remedies(
                row["name"],
                row["op"],
                Reason(row["why_float_kind"], row["why_float"]),
                result.target,
                keys.get(row["name"], frozenset()),
            ),
        )
        for row in rows
    ]
    return tuple(sorted(found, key=lambda f: -f.work))


class _Floating:
    """Which layers must be float for an activation to be float: asked of the planner, which knows what each operator reads
    and writes."""

    def __init__(self, result: Outcome) -> None:
        self.graph, self.target, self.recipe = result.graph, result.target, result.recipe
        self.may = {y.name for y in self.graph.layers} | {
            n.name for n in self.graph.nodes if n.op == "MatMul" and not n.domain
        }  # products of activations, too
        self.known: dict[str, tuple[str, ...]] = {}

    def layers(self, name: str) -> tuple[str, ...]:
        """Layers in the order of the network that are not float yet; none if no few of them are enough."""
        root = self.graph.root(name)
        if root not in self.known:
            self.known[root] = self._found(root)
        return self.known[root]

    def _found(self, root: str) -> tuple[str, ...]:
        reading = readers(self.graph, root) & self.may
        makers = self._makers(root)
        ways = [reading, *(reading | {maker} for maker in makers), reading | set(makers)]
        try:
            floats = set(request(self.graph, self.recipe, self.target).floats)
            enough = next((way for way in ways if way and self._float(root, way)), set())
        except OnnxqError:  # a rule of the recipe is about a layer that a pass replaced
            return ()
        named = tuple(n.name for n in self.graph.nodes if n.name in enough - floats)
        return named if len(named) <= _MOST_FLOAT else ()

    def _makers(self, root: str) -> list[str]:
        """The nearest layers before a tensor: those that write it, or what an operator between makes it of."""
        node = maker_of(self.graph, root)
        if node is None or node.name in self.may:
            return [] if node is None else [str(node.name)]
        before = [maker_of(self.graph, self.graph.root(name)) for name in activation_inputs(self.graph, node)]
        return [str(n.name) for n in before if n is not None and n.name in self.may]

    def _float(self, root: str, names: set[str]) -> bool:
        rules = tuple(layer_rule(name, quantize=False) for name in sorted(names))
        plan = request(self.graph, replace(self.recipe, layers=self.recipe.layers + rules), self.target).plan
        return all(self.graph.is_constant(name) or self.graph.root(name) != root for name in plan)


def _try(result: Outcome, found: Diagnosis, data: Data, samples: int, attempts: int, track: Track) -> tuple[Trial, ...]:
    """Quantize anew with the remedies of the worst layer, then of the next, which is all that tells what they are worth."""
    each: dict[str, tuple[str, Remedy]] = {}  # many layers may name the same pass
    for y in found.layers:
        for remedy in y.remedies[:_TOP]:
            each.setdefault(remedy.typed, (y.name, remedy))
    wanted = list(each.values())[:attempts]
    if not wanted:
        return ()
    tried = []
    feeds = data.spread(samples)
    assert result.again is not None  # `quantize` sets it
    for name, remedy in track(wanted, "trying remedies", len(wanted)):
        try:
            made = result.again(remedy.on(result.recipe), settings=remedy.settings)
        except OnnxqError as error:
            tried.append(Trial(name, remedy, None, str(error)))
            continue
        reference = runtimes.outputs(runtimes.session(made.float_model), feeds)
        score = mean_sqnr(reference, runtimes.outputs(runtimes.session(made.model), feeds))
        tried.append(Trial(name, remedy, score))
    return tuple(tried)
