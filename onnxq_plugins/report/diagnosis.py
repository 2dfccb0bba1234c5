"""Which layers hold a quantized network's error, why, and what to try: `onnxq diagnose`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, channels
from onnxq_plugins.data import Data, DataOptions, Source
from onnxq_plugins.errors import WHOLE, OnnxqError, expects
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.measure.samples import RANDOM, Samples
from onnxq_plugins.parallel import Track, cores, silent
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.report.attempts import Attempt, promising, try_remedies
from onnxq_plugins.report.causes import Activation
from onnxq_plugins.report.float_layers import FloatLayer, float_layers
from onnxq_plugins.report.remedies import Remedy, quality
from onnxq_plugins.report.rows import LayerError, percent, rows, with_shares
from onnxq_plugins.report.shares import Run, players, shares
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.search.judge import SAMPLES, WORK
from onnxq_plugins.search.quantizers import multiply_adds
from onnxq_plugins.search.subsets import Subsets
from onnxq_plugins.spec import Array

_FEW = 4  # samples for networks that are quantized in part: enough to rank layers
_SATURATED = 1.0  # dB that a machine may take off unnoticed
_WORK, _FEWEST = 7.5e10, 40  # multiply-adds for all of these networks, some ten seconds; and how many there are at least
_NETWORK, _LOADED = 5e8, 50  # what making a network costs, and each of its weights, in multiply-adds


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
    output       name of the output whose noise is shared out: the worst one, or the part of one that is lost
    runs         the shares in the order of the network, also of quantizers that were measured together
    written      `sqnr` of the network as it is written: without sums that saturate in the kernels of this machine
    overall      remedies for the network as a whole
    where        which samples these are, in words
    tried_on     which samples remedies were tried on, in words
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
    written: float = IDENTICAL
    overall: tuple[Remedy, ...] = ()
    where: str = ""
    tried_on: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        return {
            "sqnr": round(self.sqnr, 2),
            "sqnr_as_written": round(self.written, 2),
            "output": self.output,
            "samples": self.samples,
            "where": self.where,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "layers": [layer.to_dict() for layer in self.layers],
            "runs": [{"names": list(run.names), "share": round(run.share, 4)} for run in self._together],
            "floats": [f.to_dict() for f in self.floats],
            "overall": [remedy.to_dict() for remedy in self.overall],
            "saturating_without_vnni": list(self.saturating),
            "tried": [attempt.to_dict() for attempt in self.tried],
        }

    @property
    def notes(self) -> list[str]:
        """What to know when reading it."""
        random = [f"{RANDOM[0].upper()}{RANDOM[1:]}."] if self.random else []
        remedies = "only those under 'tried' were tried." if self.tried else "none was tried."
        return [*random, *self.sharing, *self._saturated, f"Remedies are suggestions by rules of thumb; {remedies}"]

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
    def _saturated(self) -> list[str]:
        """A note if the kernels of this machine add much to the noise of rounding."""
        if self.written - self.sqnr < _SATURATED:
            return []
        return [
            f"As written the network has {self.written:.1f} dB, of which the kernels of this machine leave {self.sqnr:.1f}: "
            "their sums of 16 bits saturate, which target ort-cpu-avx2 avoids. Shares are those of the noise of rounding."
        ]

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
    def promising(self) -> list[tuple[str, Remedy]]:
        """All remedies, those that are likely to take off most of the noise first, each with the layer that it is for; ""
        stands for the network as a whole."""
        return promising(self.layers, self.overall)

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
                escape(y.text),
                "".join(f"{escape(remedy.text)}<pre>{escape(remedy.typed)}</pre>" for remedy in remedies),
            ]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("layer", "noise %", "why", "try"))
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<p>{self.sqnr:.1f} dB at the outputs, on {self.where}</p><table><tr>{head}</tr>{''.join(rows)}</table>{notes}"
        )

    def describe(self, layer: LayerError) -> str:
        """A layer in one paragraph: its error and its causes."""
        return layer.text


@expects(result=((Outcome,), "what quantize returns"), samples=WHOLE, alone=WHOLE, attempts=WHOLE, workers=WHOLE)
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
    attempts  try this many of the remedies, the most promising first; each costs a quantization
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
    mine = data is result.data
    feeds = data.spread(samples)
    known = Samples.of(result.graph.model(), feeds)
    sqnr, written = (
        known.score(worst_sqnr, known.outputs(runtimes.session(result.model, written=exact))) for exact in (False, True)
    )
    parts = players(planned)
    subsets = Subsets(planned, _few(known), workers)
    runs = shares(subsets, parts, _networks(planned, subsets.samples, every), alone, track)
    activations = _activations(planned, Data(data.inputs, lambda: iter(feeds), data.where, len(feeds)), workers)
    layers = with_shares(rows(result, planned, feeds, activations, parts), runs, subsets.noise)
    overall = tuple(quality(written, result.recipe))
    accumulators = needs(result.model)
    over = {
        n.name for n in result.model.graph.node if any(o in accumulators and accumulators[o].saturates for o in n.output)
    }
    saturating = tuple(y.name for y in result.graph.layers if y.name in over)
    remedies = promising(layers, overall)[:attempts]
    judging = data.spread(_affordable(planned, feeds[0], samples), apart=mine) if remedies else []
    tried = try_remedies(result, remedies, judging, track)
    floats = float_layers(result, feeds[0])
    seconds = time.perf_counter() - start
    found = (sqnr, tuple(layers), floats, activations, saturating, len(feeds), seconds, tried, known.random)
    names = "the calibration samples" if mine else "the given samples"
    unseen = ", which no codes are learned on" if mine and len(data.numbers(True)) < len(data.numbers()) else ""
    places = (f"{len(feeds)} of {names}", f"{len(judging)} of {names}{unseen}")
    return Diagnosis(*found, subsets.output, tuple(runs), written, overall, *places)


def samples_of(result: Outcome, data: Source | Data | None) -> Data:
    """The samples to measure on: those given, or those that the result was calibrated with. Raises OnnxqError without."""
    if isinstance(data, Data):
        return data
    if data is not None:
        return runtimes.open_samples(data, result.graph, DataOptions(state=result.recipe.data.state))
    if result.data is None:
        raise OnnxqError("a diagnosis measures networks on sample inputs, and there are none; give some (--data PATH).")
    return result.data


def _affordable(planned: Planned, feed: Mapping[str, Array], least: int) -> int:
    """How many samples to judge remedies on: as many as plans are judged on, but `least` whatever they cost."""
    return max(min(SAMPLES, int(WORK / max(sum(multiply_adds(planned.graph, feed).values()), 1.0))), least)


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


def _activations(planned: Planned, data: Data, workers: int) -> dict[str, Activation]:
    """What is known of each planned activation over the samples."""
    graph, plan, names = planned.graph, planned.plan, planned.activations
    calibration = Calibration(graph, data, workers=workers)
    histograms = calibration.histograms(names)
    ranges = calibration.channel_ranges([name for name in names if channels(graph, name)])
    inputs = set(graph.inputs)
    return {n: Activation(n, plan[n], histograms[n], ranges.get(n), n in inputs) for n in names}
