"""Which layers hold a quantized network's error, why, and what to try: `onnxq diagnose`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np

from onnxq_plugins import measure, runtimes
from onnxq_plugins.calibration import Calibration, channels
from onnxq_plugins.data import Data, DataOptions, Source
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Layer, channel_groups
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.measure.samples import RANDOM, Samples
from onnxq_plugins.parallel import Track, cores, silent
from onnxq_plugins.plan.floats import FloatSets
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.report.attempts import Attempt, try_remedies
from onnxq_plugins.report.causes import Activation, Cause, causes, constant_causes, tensor_causes
from onnxq_plugins.report.float_layers import FloatLayer, float_layers
from onnxq_plugins.report.layer_errors import Own, accumulated_errors, own_errors
from onnxq_plugins.report.remedies import Remedy, Scene, listed
from onnxq_plugins.report.shares import Player, Run, players, shares
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.search.quantizers import multiply_adds
from onnxq_plugins.search.subsets import Subsets
from onnxq_plugins.spec import Array, decode

_MOST = 4  # layers that a remedy may make float
_TOP = 3  # remedies of a layer that are shown and tried
_FEW = 4  # samples for networks that are quantized in part: enough to rank layers
_LITTLE = 0.03  # part of the noise that is not worth words
_WORK, _FEWEST = 7.5e10, 40  # multiply-adds for all of these networks, some ten seconds; and how many there are at least
_NETWORK, _LOADED = 5e8, 50  # what making a network costs, and each of its weights, in multiply-adds


@dataclass(frozen=True, eq=False)
class LayerError:
    """The error of one layer; of an activation that has a share of its own, since several layers read it or none does; of a
    constant outside layers.

    name      of the layer; "tensor NAME" for an activation, "constant NAME" for a constant
    at        tensor where `sqnr` is measured: the layer's output, after its Relu or Clip
    input     the planned activation that the layer reads, "" for float
    sqnr      dB there in the quantized network, which includes the errors of all layers before it
    own       dB there by this layer's quantizers alone, its weight's and its input's; None for a layer that stays float
    alone     dB of the network's worst output with only this layer quantized; None if not measured
    share     of the noise there, negative if it takes back errors of others: over all quantizers they add up to 1. None if
              it was measured only together with others (`Diagnosis.runs`)
    causes    of its own error, the largest first
    lone      noise there with only this layer quantized, as a part of all noise: what the share has beyond that arises with
              the other layers
    readers   operators that read an activation or a constant
    place     in the order of the network
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
    lone: float | None = None
    readers: tuple[str, ...] = ()
    place: float = 0

    @property
    def badness(self) -> tuple[bool, float]:
        """Sorts the worst first: those with the largest shares, then by their own error."""
        own = self.own.both if self.own else IDENTICAL
        return (self.share is None, own if self.share is None else -self.share)

    @property
    def is_layer(self) -> bool:
        """False for an activation or a constant."""
        return self.at != self.input and not self.readers

    @property
    def remedies(self) -> list[Remedy]:
        """Those of all causes, the most promising first."""
        return list({remedy.typed: remedy for cause in self.causes for remedy in cause.remedies}.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, dB with two decimals."""
        own = self.own
        parts = {} if own is None else {"own_weight": own.weight, "own_input": own.input, "own": own.both}
        numbers = {"sqnr": self.sqnr, **parts, **({} if self.alone is None else {"alone": self.alone})}
        shares = {"share": self.share, "share_alone": self.lone}
        return {
            "name": self.name,
            "op": self.op,
            "input": self.input,
            **({"readers": list(self.readers)} if self.readers else {}),
            **{k: round(v, 2) for k, v in numbers.items()},
            **{k: round(v, 4) for k, v in shares.items() if v is not None},
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
    output       name of the output whose noise is shared out: the worst one
    runs         the shares in the order of the network, also of quantizers that were measured together
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
    output: str = ""
    runs: tuple[Run, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {
            "sqnr": round(self.sqnr, 2),
            "output": self.output,
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "layers": [layer.to_dict() for layer in self.layers],
            "runs": [{"names": list(run.names), "share": round(run.share, 4)} for run in self._together],
            "floats": [f.to_dict() for f in self.floats],
            "saturating_without_vnni": list(self.saturating),
            "tried": [attempt.to_dict() for attempt in self.tried],
        }

    @property
    def notes(self) -> list[str]:
        """What to know when reading it."""
        random = [f"{RANDOM[0].upper()}{RANDOM[1:]}."] if self.random else []
        remedies = "only those under 'tried' were tried." if self.tried else "none was tried."
        return [*random, *self.sharing, f"Remedies are suggestions by rules of thumb; {remedies}"]

    @property
    def sharing(self) -> list[str]:
        """What to know of the shares."""
        return [note for note in (self.interaction, self._grouped) if note]

    @property
    def interaction(self) -> str:
        """How much of the noise single layers make alone, and how much arises between them; "" if that was not measured."""
        parts = [run.alone for run in self.runs if run.alone is not None]
        if len(parts) < len(self.runs) or len(parts) < 2:
            return ""
        total = sum(parts)
        if total > 1.1:
            return f"Each alone, they would make {total:.0%} of the noise: together they cancel a part of it."
        if total < 0.9:
            return f"Each alone, they make {total:.0%} of the noise; {1 - total:.0%} arises only together."
        return f"Each alone, they make {total:.0%} of the noise: errors hardly amplify or cancel each other."

    @property
    def _together(self) -> list[Run]:
        return [run for run in self.runs if len(run.names) > 1]

    @property
    def _grouped(self) -> str:
        """A note about quantizers that were measured together."""
        runs = self._together
        count = sum(len(run.names) for run in runs)
        return (
            ""
            if not runs
            else (
                f"{count} quantizers with little noise were measured in {len(runs)} runs, which hold "
                f"{sum(run.share for run in runs):.0%} of it: diagnose --all takes them apart."
            )
        )

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
            remedies = y.remedies[:1]
            cells = [
                escape(y.name),
                percent(y.share),
                escape(self.describe(y)),
                "".join(f"{escape(remedy.text)}<pre>{escape(remedy.typed)}</pre>" for remedy in remedies),
            ]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("layer", "noise %", "why", "try"))
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<p>{self.sqnr:.1f} dB at the outputs, on {self.samples} samples</p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>{notes}"
        )

    def describe(self, layer: LayerError) -> str:
        """A layer in one paragraph: its error and its causes."""
        sentences = [_noise(layer)] if layer.share is not None else []
        if layer.readers:
            kind = "tensor" if layer.at == layer.input else "constant"
            sentences.append(f"This {kind} is read by {listed(layer.readers)}.")
        if layer.own is not None and layer.own.weight < IDENTICAL and layer.own.input < IDENTICAL:
            sentences.append(
                f"At its own output, rounding its weight leaves {layer.own.weight:.1f} dB and rounding its input "
                f"{layer.own.input:.1f} dB."
            )
        sentences += [cause.text for cause in layer.causes[:2]]
        return " ".join(sentences)


def _noise(layer: LayerError) -> str:
    """A layer's share in words, and what arises only together with others."""
    share, lone = layer.share or 0.0, layer.lone
    alone = "" if layer.alone is None or lone is None else f" Quantized alone, it leaves {layer.alone:.1f} dB at the outputs"
    if share < -_LITTLE:
        return f"It takes back {-share:.0%} of the noise: it compensates for errors of other layers." + (
            alone and f"{alone}."
        )
    text = f"It makes {share:.0%} of the noise of the outputs."
    if not alone or lone is None:
        return text
    if lone < share / 2 and share > _LITTLE:
        return f"{text}{alone}, {lone:.0%} of the noise: most of its share arises only together with other layers."
    if lone > share + max(_LITTLE, share / 2):
        return f"{text}{alone}, {lone:.0%} of the noise: other layers take back a part."
    return f"{text}{alone}."


def percent(share: float | None) -> str:
    """A share as a cell of a table."""
    return "" if share is None else f"{100 * share:.1f}"


def diagnose(
    result: Outcome,
    data: Source | Data | None = None,
    *,
    samples: int = 8,
    alone: int | None = None,
    attempts: int = 0,
    every: bool = False,
    workers: int | None = None,
    track: Track = silent,
) -> Diagnosis:
    """Find where the error of a quantized network comes from (`report.shares`).

    data      sample inputs, as for `quantize`; those it was calibrated with if not given
    samples   how many of them, spread evenly
    alone     also measure the network with one layer quantized alone, for so many layers of the largest share (None: all)
    attempts  try this many of the remedies: the first three of the worst layer, then of the next; each costs a quantization
    every     measure each layer by itself, however long that takes; else, in a large network, those with little noise
              together
    workers   networks measured side by side; None: one per core

    Cost: the float network eight times and the quantized one twice for each sample; two networks a layer, or as many as some
    seconds allow, on four samples.
    Raises OnnxqError if there are no samples.
    """
    start, workers = time.perf_counter(), workers or cores()
    planned = Planned(result.graph, result.plan, result.target)
    data = samples_of(result, data)
    feeds = data.spread(samples)
    known = Samples.of(result.graph.model(), feeds)
    sqnr = known.score(worst_sqnr, known.outputs(runtimes.session(result.model)))
    parts = players(planned)
    subsets = Subsets(planned, _few(known), workers)
    runs = shares(subsets, parts, _networks(planned, subsets.samples, every), alone, track)
    activations = _activations(planned, Data(data.inputs, lambda: iter(feeds), data.where, len(feeds)), workers)
    layers = _with_shares(_layers(result, planned, feeds, activations, parts), runs, subsets.noise)
    accumulators = needs(result.model)
    saturating = tuple(
        y.name for y in result.graph.layers if (need := accumulators.get(y.output)) is not None and need.saturates
    )
    tried = try_remedies(result, _promising(layers)[:attempts], feeds, track)
    floats = float_layers(result, feeds[0])
    seconds = time.perf_counter() - start
    output = known.names[subsets.output]
    found = (sqnr, tuple(layers), floats, activations, saturating, len(feeds), seconds, tried, known.random, output)
    return Diagnosis(*found, tuple(runs))


def samples_of(result: Outcome, data: Source | Data | None) -> Data:
    """The samples to measure on: those given, or those that the result was calibrated with. Raises OnnxqError without."""
    if isinstance(data, Data):
        return data
    if data is not None:
        return runtimes.open_samples(data, result.graph, DataOptions(state=result.recipe.data.state))
    if result.data is None:
        raise OnnxqError("a diagnosis measures networks on sample inputs, and there are none; give some (--data PATH).")
    return result.data


def _few(known: Samples) -> Samples:
    """A few of the samples."""
    step = -(-len(known.feeds) // _FEW)
    return Samples(known.feeds[::step], known.names, [values[::step] for values in known.reference], None, known.axes)


def _networks(planned: Planned, samples: Samples, every: bool) -> float:
    """How many networks to measure: counted in multiply-adds, so that the same are measured on every machine."""
    if every:
        return float("inf")
    work = sum(multiply_adds(planned.graph, samples.feeds[0]).values()) * len(samples.feeds)
    weights = sum(int(np.prod(layer.shape)) for layer in planned.graph.layers)
    return max(_WORK / (work + _LOADED * weights + _NETWORK), _FEWEST)


def _with_shares(layers: Sequence[LayerError], runs: Sequence[Run], noise: float) -> list[LayerError]:
    """The layers with what is known of their shares, the worst first.

    noise   of the output with all quantized, relative to its signal
    """
    known = {run.names[0]: run for run in runs if len(run.names) == 1}
    found = []
    for y in layers:
        run = known.get(y.name)
        if run is not None:
            lone = run.alone
            alone = None if lone is None else float(-10 * np.log10(np.clip(lone * noise, 10 ** (-IDENTICAL / 10), None)))
            y = replace(y, share=run.share, lone=lone, alone=alone)
        found.append(y)
    return sorted(found, key=lambda y: y.badness)


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
    result: Outcome,
    planned: Planned,
    feeds: Sequence[Mapping[str, Array]],
    activations: Mapping[str, Activation],
    parts: Sequence[Player],
) -> list[LayerError]:
    """Every layer, and every other quantizer with a share of its own, with its errors and causes."""
    graph, plan = planned.graph, planned.plan
    layers = {y.name: y for y in graph.layers}
    tensors = {p.name: p for p in parts if p.kind == "tensor"}
    shared = {p.entries[0] for p in tensors.values()}
    own = own_errors(planned, feeds, list(shared))
    sqnr = accumulated_errors(graph, result.model, [*(y.result for y in graph.layers), *shared], feeds)
    equalizable = {m.tensor for g in channel_groups(graph, "rescale", clips=True) for m in g.members if not m.constant}
    floating = FloatSets(graph, result.recipe, result.target, _MOST).names
    scene = Scene(result.target, result.recipe, frozenset(equalizable), floating)
    position = {node.name: n for n, node in enumerate(graph.nodes)}

    def of_layer(y: Layer) -> LayerError:
        key, error = planned.input(y), own.get(y.name)
        found = LayerError(y.name, y.op, y.result, key, sqnr[y.result], error, place=position[y.name])
        if error is None:
            return found
        mine = None if key in shared else activations.get(key)  # what others read, too, has a row for itself
        noises = (10 ** (-error.weight / 10), 10 ** (-error.input / 10) if mine is not None else 0.0)
        weight = graph.constant(y.weight)
        return replace(found, causes=causes(y, weight, plan[y.weight], mine, noises, error.mean_share, scene))

    def of_tensor(p: Player) -> LayerError:
        name, maker = p.entries[0], maker_of(graph, p.entries[0])
        reading = [layers[n] for n in p.readers if n in layers]
        known = tensor_causes(activations[name], reading, [graph.constant(y.weight) for y in reading], scene)
        op = maker.op if maker is not None else "input"
        return LayerError(p.name, op, name, name, sqnr[name], own[p.name], causes=known, readers=p.readers, place=p.place)

    def of_constant(p: Player) -> LayerError:
        name, spec = p.entries[0], plan[p.entries[0]]
        rounded = decode(spec.codes, spec) if spec.codes is not None else graph.constant(name)
        error = measure.sqnr(graph.constant(name), rounded.astype(np.float32))
        op = next((str(node.op) for node in graph.nodes if node.name in p.readers), "")
        own, known = Own(error, IDENTICAL, error, 0.0), constant_causes(spec, p.readers, scene)
        return LayerError(p.name, op, name, "", error, own, causes=known, readers=p.readers, place=p.place)

    others = [(of_tensor if p.kind == "tensor" else of_constant)(p) for p in parts if p.kind != "layer"]
    return [*(of_layer(y) for y in graph.layers), *others]
