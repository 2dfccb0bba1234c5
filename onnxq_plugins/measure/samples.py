"""What networks are judged on, and how each of their outputs is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data.samples import chosen
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.arrays import (
    agreement,
    alike,
    decibels,
    energies,
    is_float,
    leaves,
    pairs,
    worst_decibels,
)
from onnxq_plugins.measure.classes import class_axes, labelled
from onnxq_plugins.measure.metrics import check_labels, likely_axes, score
from onnxq_plugins.measure.unlike import Part, parts
from onnxq_plugins.spec import Array

_QUARTER = 4  # steps at least in a quarter of a stream
RANDOM = (
    "the float model itself is random: the same input gives other outputs when it runs again, so that SQNR and agreement "
    "say nothing about quantization"
)


@dataclass(frozen=True)
class OutputScore:
    """How near an output of a network is to the float one's.

    sqnr    dB over all samples, pooled; None if it is not of floats
    worst   dB of the worst 5 % of samples
    same    percent of positions with the same class, if it is classes; of equal elements, if it is not of floats; else None
    note    what limits these numbers, "" for nothing
    steps   dB at each step of the streams, pooled over them; () without states
    """

    name: str
    sqnr: float | None
    worst: float | None
    same: float | None
    note: str = ""
    steps: tuple[float, ...] = ()

    @property
    def decline(self) -> float:
        """How much noise grows on a network's own states: dB by which the last quarter of the steps is below the first; 0
        for less than 16 steps."""
        part = len(self.steps) // 4
        return 0.0 if part < _QUARTER else float(np.median(self.steps[:part]) - np.median(self.steps[-part:]))

    def to_dict(self) -> dict[str, Any]:
        """As plain values, rounded."""
        numbers = {"sqnr": self.sqnr, "worst_samples": self.worst, "same": self.same}
        return {
            "name": self.name,
            **{key: round(value, 2) for key, value in numbers.items() if value is not None},
            **({"note": self.note} if self.note else {}),
            **({"steps": [round(step, 2) for step in self.steps]} if self.steps else {}),
        }


@dataclass(frozen=True, eq=False)
class FloatOutputs:
    """What a float model gives for some feeds.

    rows     values of all outputs, a row per feed
    random   True if it gives other outputs for the same feed
    """

    rows: list[list[Any]]
    random: bool

    @classmethod
    def of(cls, runner: runtimes.Session, feeds: Sequence[Mapping[str, Array]], workers: int = 1) -> FloatOutputs:
        """By running it; `workers` feeds at the same time."""
        fitting = [runtimes.wanted(runner, feed) for feed in feeds]
        rows = [list(row) for row in zip(*runtimes.per_feed(runner, fitting, workers), strict=True)]
        return cls(rows, runtimes.is_random(runner, fitting[0]))

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(leaf.nbytes for row in self.rows for value in row for leaf in leaves(value))


class Samples:
    """What networks are judged on.

    feeds       for both networks
    names       of the outputs
    reference   values of the float network's outputs, a list per output with one value per feed (`runtimes.per_feed`)
    labels      [samples, ...] or None
    axes        of the outputs' classes, as `classes.class_axes` finds them
    random      True if the float network gives other outputs for the same feed
    state       output -> the input that it is at the next step: feeds that go on from the one before are run on the states
                of the network that is judged, so that it shows how its errors feed back
    parts       of each output that are judged apart (`unlike.parts`); found if not given
    """

    def __init__(
        self,
        feeds: Sequence[Mapping[str, Array]],
        names: Sequence[str],
        reference: Sequence[Sequence[Any]],
        labels: Array | None,
        axes: Sequence[int | None],
        random: bool = False,
        state: Mapping[str, str] | None = None,
        parts: Sequence[Sequence[Part]] | None = None,
    ) -> None:
        self.feeds, self.names, self.reference = list(feeds), list(names), [list(values) for values in reference]
        self._parts = parts
        self.labels, self.axes, self.random, self.state = labels, list(axes), random, dict(state or {})

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto | str | Path,
        feeds: Sequence[Mapping[str, Array]],
        labels: Array | None = None,
        class_axis: int | None = None,
        runner: runtimes.Session | None = None,
        state: Mapping[str, str] | None = None,
        workers: int = 1,
        known: FloatOutputs | None = None,
    ) -> Samples:
        """Samples with what a float model gives for them.

        class_axis   of its outputs, as for `classes.class_axes`
        runner       a session of the model, if there is one already
        workers      samples that run at the same time
        known        what it gives, if that is known already
        """
        proto = model if isinstance(model, onnx.ModelProto) else onnx.load(str(model), load_external_data=False)
        known = known or FloatOutputs.of(runner or runtimes.session(model), feeds, workers)
        names = [output.name for output in proto.graph.output]
        reference = [list(column) for column in zip(*known.rows, strict=True)]
        axes = class_axes(proto, reference, feeds[0], labels, class_axis)
        return cls(feeds, names, reference, labels, axes, known.random, state)

    def few(self, count: int) -> Samples:
        """The same with at most `count` of the feeds, for what needs many runs; without labels."""
        return self.some(chosen(len(self.feeds), count, self.state))

    def some(self, numbers: Sequence[int]) -> Samples:
        """The same with some of the feeds, by number; without labels."""
        reference = [[values[n] for n in numbers] for values in self.reference]
        feeds = [self.feeds[n] for n in numbers]
        return Samples(feeds, self.names, reference, None, self.axes, self.random, self.state, self.parts)

    def also(self, inputs: Mapping[str, Array]) -> Samples:
        """The same for a network with further inputs, whose values are the same for every feed; without labels."""
        feeds = [{**feed, **inputs} for feed in self.feeds]
        return Samples(feeds, self.names, self.reference, None, self.axes, self.random, self.state, self.parts)

    def check_labels(self) -> None:
        """Raise OnnxqError for labels that are not classes of the output they are of, or of the first one of floats."""
        if self.labels is None:
            return
        floats = [k for k, values in enumerate(self.reference) if is_float(values)]
        number = labelled(self.reference, self.labels, self.axes)
        for k in floats[:1] if number is None else {number} & {*floats}:
            shape = (None, *leaves(self.reference[k][0])[0].shape[1:])
            check_labels(self.labels, shape, self.names[k], self.axes[k])

    @cached_property
    def places(self) -> list[int]:
        """Which step of its stream each feed is, counted from 0: a feed goes on from the one before if its states are what
        the float network gave there."""
        places: list[int] = []
        outputs = {name: values for name, values in zip(self.names, self.reference, strict=True) if name in self.state}
        for n, feed in enumerate(self.feeds):
            goes_on = n > 0 and len(outputs) == len(self.state) > 0
            goes_on = goes_on and all(_near(values[n - 1], feed[self.state[name]]) for name, values in outputs.items())
            places.append(places[-1] + 1 if goes_on else 0)
        return places

    @cached_property
    def parts(self) -> Sequence[Sequence[Part]]:
        """The parts of each output that are judged apart (`unlike.parts`); none of one that is not of floats. They are those
        of all feeds where only a few are judged."""
        if self._parts is not None:
            return self._parts
        return [parts(values) if is_float(values) else [] for values in self.reference]

    def outputs(self, runner: runtimes.Session, own: bool = True, workers: int = 1) -> list[list[Any]]:
        """The outputs of another network for the feeds.

        own       with its own states, where there are streams, rather than with the float network's
        workers   feeds that run at the same time, unless one goes on from the other
        """
        if own and any(self.places):
            states = set(self.state.values())
            steps = (
                {name: x for name, x in feed.items() if not place or name not in states}
                for feed, place in zip(self.feeds, self.places, strict=True)
            )
            rows = [values for _, values in runtimes.roll(runner, steps, self.state)]
            return [list(column) for column in zip(*rows, strict=True)]
        return runtimes.per_feed(runner, (runtimes.wanted(runner, feed) for feed in self.feeds), workers)

    def score(self, by: Metric, outputs: Sequence[Sequence[Any]] | None = None) -> float:
        """A metric of another network's outputs; of the float network's own for None."""
        return score(by, self.reference, self.reference if outputs is None else outputs, self.labels, self.axes)

    def table(self, outputs: Sequence[Sequence[Any]]) -> list[OutputScore]:
        """How near each output of another network is."""
        columns = zip(self.names, self.reference, outputs, self.axes, strict=True)
        places = np.array(self.places) if any(self.places) else None
        return [output_score(name, y, z, axis, places) for name, y, z, axis in columns]

    @property
    def classes(self) -> bool:
        """True if an output is classes, or none is of floats: agreement with the float network means something."""
        return any(axis is not None for axis in self.axes) or not any(is_float(values) for values in self.reference)

    @property
    def telling(self) -> bool:
        """True if agreement with the float network is worth judging by: of outputs that are `classes`, whose answers are not
        all the same. A network that always gives the same one keeps it, whatever becomes of its values."""
        columns = [(values, axis) for values, axis in zip(self.reference, self.axes, strict=True) if axis is not None]
        firsts = [
            {int(n) for value in values for leaf in leaves(value) for n in np.unique(np.argmax(leaf, axis=axis))}
            for values, axis in columns
        ]
        return self.classes and (not columns or any(len(answers) > 1 for answers in firsts))

    @property
    def answers(self) -> int:
        """How many positions agreement counts, of the output with the fewest."""
        sizes = [
            sum(leaf.size // (1 if axis is None else max(leaf.shape[axis], 1)) for value in values for leaf in leaves(value))
            for values, axis in zip(self.reference, self.axes if self.classes else likely_axes(self.reference), strict=True)
            if axis is not None or not is_float(values)
        ]
        return min(sizes, default=0)

    @property
    def arrays(self) -> list[Array]:
        """All of it."""
        rows = [array for feed in self.feeds for _, array in sorted(feed.items())]
        rows += [_plain(leaf) for values in self.reference for value in values for leaf in leaves(value)]
        return [*rows, *([self.labels] if self.labels is not None else [])]

    def __sizeof__(self) -> int:
        """With all arrays: from this size joblib knows to send them to each Dask worker once, not with each task."""
        return sum(array.nbytes for array in self.arrays)


def output_score(
    name: str, reference: Sequence[Any], other: Sequence[Any], axis: int | None, places: Array | None = None
) -> OutputScore:
    """How near an output is to the float one's, with values per feed.

    places   which step of its stream each feed is
    """
    reference, other = list(reference), list(other)
    notes, floats = [], is_float(reference)
    feeds = list(pairs(reference, other))
    if shapes := sum(not alike(y, z) for y, z in zip(reference, other, strict=True)):
        notes.append(f"another shape for {shapes} of {len(feeds)} samples, which count as lost")
    if not floats:
        return OutputScore(name, None, None, 100 * agreement(reference, other, None), "; ".join(notes))
    energy = energies(reference, other)
    if lost := int(np.isinf(energy[:, 1]).sum()):
        notes.append(f"destroyed: NaN or Inf for {lost} of {len(feeds)} samples where the reference has none")
    if masked := sum(any(not np.isfinite(y).all() for y, _ in feed) for feed in feeds):
        notes.append(f"NaN or Inf in the reference for {masked} of {len(feeds)} samples, left out there")
    if not energy[:, 0].any():
        notes.append("the reference is 0 everywhere" + (", the other is not" if energy[:, 1].any() else ""))
    same = None if axis is None else 100 * agreement(reference, other, axis)
    steps = () if places is None else tuple(decibels(energy[places == n]) for n in range(int(places.max()) + 1))
    return OutputScore(name, decibels(energy), worst_decibels(energy), same, "; ".join(notes), steps)


def _near(one: Any, other: Any) -> bool:
    """True if two states are the same, up to the order of sums and half precision."""
    if np.shape(one) != np.shape(other) or np.asarray(one).dtype.kind not in "fiub":
        return False
    y, z = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return bool(np.abs(y - z).max(initial=0) <= 1e-2 * np.abs(y).max(initial=0))


def _plain(leaf: Array) -> Array:
    """An array whose bytes are its values: strings have a width."""
    return leaf.astype(str) if leaf.dtype.kind == "O" else leaf
