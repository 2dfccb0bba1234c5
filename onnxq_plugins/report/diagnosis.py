"""Which layers hold a quantized network's error, why, and what to try: `onnxq diagnose`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, channels
from onnxq_plugins.data import Data, DataOptions, Source
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Layer, channel_groups
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.measure.networks import Measure
from onnxq_plugins.measure.samples import RANDOM, Samples
from onnxq_plugins.parallel import Track, cores, silent
from onnxq_plugins.plan.floats import FloatSets
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.report.attempts import Attempt, try_remedies
from onnxq_plugins.report.causes import Activation, Cause, causes
from onnxq_plugins.report.float_layers import FloatLayer, float_layers
from onnxq_plugins.report.layer_errors import Own, accumulated_errors, own_errors
from onnxq_plugins.report.remedies import Remedy, Scene
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Array, Plan

_MOST = 4  # layers that a remedy may make float
_TOP = 3  # remedies of a layer that are shown and tried
_ALONE = 4  # samples for networks with one layer quantized: enough to rank layers


@dataclass(frozen=True, eq=False)
class LayerError:
    """The error of one layer, or of a planned activation that no layer reads.

    name      of the layer; "tensor NAME" for an activation that no layer reads
    at        tensor where `sqnr` is measured: the layer's output, after its Relu or Clip
    input     the planned activation that the layer reads, "" for float
    sqnr      dB there in the quantized network, which includes the errors of all layers before it
    own       dB there by this layer's quantizers alone, its weight's and its input's; None for a layer that stays float
    alone     dB of the network's outputs with only this layer quantized; None if not measured
    share     noise of the outputs with only this layer quantized, as a part of all noise there: over all layers this adds up
              to about 1
    causes    of its own error, the largest first
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
        return (self.alone is None, self.alone if self.alone is not None else self.own.both if self.own else IDENTICAL)

    @property
    def remedies(self) -> list[Remedy]:
        """Those of all causes, the most promising first."""
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


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` measured and concluded.

    sqnr         dB of the network's worst output, pooled over the samples
    layers       all of them, the worst first
    floats       layers in float kernels, those with the most work first
    activations  planned activations by name
    saturating   layers that can saturate on AVX2 without VNNI
    samples      number of samples measured on
    tried        remedies that were tried; all others are suggestions
    random       True if the float model gives other outputs for the same input
    """

    sqnr: float
    layers: tuple[LayerError, ...]
    floats: tuple[FloatLayer, ...]
    activations: Mapping[str, Activation]
    saturating: tuple[str, ...]
    samples: int
    seconds: float
    tried: tuple[Attempt, ...] = ()
    random: bool = False

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
            "tried": [attempt.to_dict() for attempt in self.tried],
        }

    @property
    def notes(self) -> list[str]:
        """What to know when reading it."""
        compensation = (
            "Layers here compensate for each other's errors (the pass round solves them so), so one layer alone shows more "
            "error than it adds: trust the order, not the percentages."
        )
        remedies = "only those under 'tried' were tried." if self.tried else "none was tried."
        random = f"{RANDOM[0].upper()}{RANDOM[1:]}."
        notes = [*([random] if self.random else []), *([] if self.adds_up else [compensation])]
        return [*notes, f"Remedies are suggestions by rules of thumb; {remedies}"]

    @property
    def adds_up(self) -> bool:
        """True if the layers' shares of the noise can be read as parts of a whole. Layers that were solved to compensate for
        the errors before them (`round` does so) show more error alone than they add."""
        return sum(y.share or 0.0 for y in self.layers) < 1.5

    def part(self, layer: LayerError) -> float | None:
        """A layer's noise alone in percent: of all noise at the outputs, or of the worst layer's if shares do not add up."""
        if layer.share is None:
            return None
        worst = max((y.share or 0.0 for y in self.layers), default=0.0)
        return 100 * layer.share / (1.0 if self.adds_up else max(worst, 1e-30))

    @property
    def part_of(self) -> str:
        """What `part` is a percentage of, as a heading."""
        return "noise %" if self.adds_up else "% of worst"

    @property
    def explained(self) -> tuple[LayerError, ...]:
        """The five worst layers, which reports explain in words."""
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
            part, remedies = self.part(y), y.remedies[:1]
            cells = [
                escape(y.name),
                "" if part is None else f"{part:.1f}",
                escape(self.describe(y)),
                "".join(f"{escape(remedy.text)}<pre>{escape(remedy.typed)}</pre>" for remedy in remedies),
            ]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("layer", self.part_of, "why", "try"))
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<p>{self.sqnr:.1f} dB at the outputs, on {self.samples} samples</p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>{notes}"
        )

    def describe(self, layer: LayerError) -> str:
        """A layer in one paragraph: its error and its causes."""
        sentences = []
        if layer.share is not None and layer.alone is not None:
            share = f", about {layer.share:.0%} of all noise" if self.adds_up and layer.share < 1 else ""
            noun = "tensor" if layer.at == layer.input else "layer"
            sentences.append(f"With only this {noun} quantized, the outputs have {layer.alone:.1f} dB{share}.")
        if layer.own is not None and layer.own.weight < IDENTICAL and layer.own.input < IDENTICAL:
            sentences.append(
                f"At its own output, rounding its weight leaves {layer.own.weight:.1f} dB and rounding its input "
                f"{layer.own.input:.1f} dB."
            )
        sentences += [cause.text for cause in layer.causes[:2]]
        return " ".join(sentences)


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
    samples   how many of them, spread evenly
    alone     measure the network with one layer quantized alone, for this many layers of the largest own error (None: all);
              each costs an export and 4 runs
    attempts  try this many of the remedies: the first three of the worst layer, then of the next; each costs a quantization
    workers   networks measured side by side; None: one per core

    Cost: the float network eight times and the quantized one twice for each sample; and `alone`.
    Raises OnnxqError if there are no samples.
    """
    start, workers = time.perf_counter(), workers or cores()
    planned = Planned(result.graph, result.plan, result.target)
    data = samples_of(result, data)
    feeds = data.spread(samples)
    few = feeds[:: -(-len(feeds) // _ALONE)]
    known = Samples.of(result.graph.model(), feeds)
    sqnr = known.score(worst_sqnr, known.outputs(runtimes.session(result.model)))
    measure = Measure(result.graph, ALONE, few, coded=planned.coded)
    activations = _activations(planned, Data(data.inputs, lambda: iter(feeds), data.where, len(feeds)), workers)
    layers = _with_alone(result, measure, _layers(result, planned, feeds, activations), alone, workers, track)
    layers.sort(key=lambda y: y.badness)
    accumulators = needs(result.model)
    saturating = tuple(
        y.name for y in result.graph.layers if (need := accumulators.get(y.output)) is not None and need.saturates
    )
    tried = try_remedies(result, _promising(layers)[:attempts], feeds, track)
    floats = float_layers(result, feeds[0])
    seconds = time.perf_counter() - start
    return Diagnosis(sqnr, tuple(layers), floats, activations, saturating, len(feeds), seconds, tried, known.random)


def samples_of(result: Outcome, data: Source | Data | None) -> Data:
    """The samples to measure on: those given, or those that the result was calibrated with. Raises OnnxqError without."""
    if isinstance(data, Data):
        return data
    if data is not None:
        return runtimes.open_samples(data, result.graph, DataOptions(state=result.recipe.data.state))
    if result.data is None:
        raise OnnxqError("a diagnosis measures networks on sample inputs, and there are none; give some (--data PATH).")
    return result.data


def _with_alone(
    result: Outcome, measure: Measure, layers: Sequence[LayerError], count: int | None, workers: int, track: Track
) -> list[LayerError]:
    """The layers, with what each does to the outputs when quantized alone.

    count   for how many of the largest own error; None: all
    """
    noise = measure.samples.score(worst_sqnr, measure.samples.outputs(runtimes.session(result.model)))
    worst = sorted((y for y in layers if y.own is not None), key=lambda y: y.badness)[:count]
    plans = [_alone(result, y) for y in worst]
    scores = track(measure.scores(plans, [worst_sqnr], workers), "layers alone", len(plans))
    alone = {y.name: score["sqnr"] for y, score in zip(worst, scores, strict=True)}
    return [
        replace(y, alone=alone[y.name], share=float(10 ** ((noise - alone[y.name]) / 10))) if y.name in alone else y
        for y in layers
    ]


def _promising(layers: Sequence[LayerError]) -> list[tuple[str, Remedy]]:
    """The first remedies of the worst layer, then of the next, with the layer's name; each remedy once."""
    first: dict[str, tuple[str, Remedy]] = {}  # many layers may name the same pass
    for y in layers:
        for remedy in y.remedies[:_TOP]:
            first.setdefault(remedy.typed, (y.name, remedy))
    return list(first.values())


def _activations(planned: Planned, data: Data, workers: int) -> dict[str, Activation]:
    """What is known of each planned activation over the samples."""
    graph, plan, names = planned.graph, planned.plan, planned.activations
    calibration = Calibration(graph, data, workers=workers)
    histograms = calibration.histograms(names)
    ranges = calibration.channel_ranges([name for name in names if channels(graph, name)])
    inputs = set(graph.inputs)
    return {n: Activation(n, plan[n], histograms[n], ranges.get(n), n in inputs) for n in names}


def _layers(
    result: Outcome, planned: Planned, feeds: Sequence[Mapping[str, Array]], activations: Mapping[str, Activation]
) -> list[LayerError]:
    """Every layer, and every planned activation that no planned layer reads, with its errors and causes."""
    graph, plan = planned.graph, planned.plan
    inputs = {y.name: planned.input(y) for y in graph.layers}
    others = [name for name in activations if name not in inputs.values()]
    own = own_errors(planned, feeds, others)
    sqnr = accumulated_errors(graph, result.model, [*(y.result for y in graph.layers), *others], feeds)
    equalizable = {m.tensor for g in channel_groups(graph, "rescale", clips=True) for m in g.members if not m.constant}
    floating = FloatSets(graph, result.recipe, result.target, _MOST).names
    scene = Scene(result.target, result.recipe, frozenset(equalizable), floating)

    def causes_of(layer: Layer | None, key: str, error: Own) -> tuple[Cause, ...]:
        spec = plan[layer.weight] if layer is not None else None
        weight = graph.constant(layer.weight) if layer is not None else None
        noises = (10 ** (-error.weight / 10), 10 ** (-error.input / 10)) if layer is not None else (0.0, 1.0)
        return causes(layer, weight, spec, activations.get(key), noises, error.mean_share, scene)

    layers = []
    for y in graph.layers:
        key, error = inputs[y.name], own.get(y.name)
        known = causes_of(y, key, error) if error is not None else ()
        layers.append(LayerError(y.name, y.op, y.result, key, sqnr[y.result], error, causes=known))
    for name in others:
        maker = maker_of(graph, name)
        op = maker.op if maker is not None else "input"
        error = own[f"tensor {name}"]
        known = causes_of(None, name, error)
        layers.append(LayerError(f"tensor {name}", op, name, name, sqnr[name], error, causes=known))
    return layers


def _alone(result: Outcome, layer: LayerError) -> Plan:
    """The plan with nothing but a layer's weight and the activation it reads."""
    weights = [y.weight for y in result.graph.layers if y.name == layer.name]
    return Plan({name: result.plan[name] for name in [*weights, *([layer.input] if layer.input else [])]})
