"""A network with some of its quantizers, all others in float: what one of them costs, or some together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq_plugins.measure.arrays import errors, is_float, leaves
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.measure.unlike import Part, part_name, parts
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.alone import Alone
from onnxq_plugins.spec import Array

_LOST = 0.1  # noise relative to the signal of a part of an output, from which it matters beside stronger parts


@dataclass(frozen=True)
class Measured:
    """One output of a network with some quantizers, relative to the network with all of them, pooled over the samples.

    noise   squared error, relative to that with all
    along   product of both errors, relative to the same: 1 with all, 0 for an error that has nothing to do with it
    """

    noise: float
    along: float


class Subsets:
    """The network of a solved plan with any of its quantizers. Made by the exporter, in float kernels, which no machine
    saturates.

    samples   to measure on
    output    name of the output that is worst with all quantizers, which is measured; of a part of one (`measure.unlike`) if
              that is nearly lost
    noise     of it then, relative to its signal
    made      how many networks were run
    """

    def __init__(self, planned: Planned, samples: Samples, workers: int = 1) -> None:
        self.planned, self.samples, self.made = planned, samples, 0
        self._alone = Alone(planned, workers)
        outputs = next(self._alone.outputs([planned.plan], samples))
        floats = [n for n, values in enumerate(samples.reference) if is_float(values)] or range(len(outputs))
        columns: list[tuple[int, Part]] = [(n, ()) for n in floats]
        columns += [(n, part) for n in floats for part in parts(samples.reference[n]) if part]
        found = [(column, errors(_cut(samples.reference, column), _cut(outputs, column))) for column in columns]
        noises = [_energy(error) / max(_signal(_cut(samples.reference, column)), 1e-30) for column, error in found]
        judged = [n for n, (_, part) in enumerate(columns) if not part or noises[n] > _LOST]
        worst = max(judged, key=lambda n: noises[n])
        self.noise = noises[worst]
        self._column, self._whole = found[worst]
        self.output = part_name(samples.names[self._column[0]], self._column[1])

    def measured(self, sets: Sequence[Collection[str]], what: str = "", track: Track = silent) -> list[Measured]:
        """The network with each of some sets of quantizers, names of entries of the plan."""
        self.made += len(sets)
        found = (self._compared(outputs) for outputs in self._alone.outputs(sets, self.samples))
        return list(track(found, what, len(sets))) if sets else []

    def _compared(self, outputs: Sequence[Sequence[Any]]) -> Measured:
        error = errors(_cut(self.samples.reference, self._column), _cut(outputs, self._column))
        scale = max(_energy(self._whole), 1e-30)
        along = sum(float(np.vdot(e, w)) for e, w in zip(error, self._whole, strict=True))
        return Measured(_energy(error) / scale, along / scale)


def _cut(outputs: Sequence[Sequence[Any]], column: tuple[int, Part]) -> list[Any]:
    """The values of an output, or of a part of it, per feed."""
    values, part = outputs[column[0]], column[1]
    return [np.asarray(value)[part] for value in values] if part else list(values)


def _energy(error: Sequence[Array]) -> float:
    return sum(float(np.vdot(e, e)) for e in error)


def _signal(reference: Sequence[Any]) -> float:
    arrays = [leaf for value in reference for leaf in leaves(value)]
    if not is_float(list(reference)):
        return float(sum(a.size for a in arrays))
    return sum(float(np.square(a[np.isfinite(a)], dtype=np.float64).sum()) for a in arrays)
