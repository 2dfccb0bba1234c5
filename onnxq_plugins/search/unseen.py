"""A network on samples that its ranges have not seen.

A grid of an activation reaches as far as the samples do that it was calibrated with. Other samples reach further and are
clipped, which a network judged on its own samples does not show: a detector calibrated on pictures with few faces was
good on them and useless on others, whose faces were clipped. So the samples fall into four folds, and each is judged with
grids that reach no further than the samples of the other three: cross-validation (Stone, J. R. Stat. Soc. B 36, 1974). Only
ranges are taken back; what else was solved on all samples hardly fits single ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from onnxq_plugins.calibration import Calibration
from onnxq_plugins.job import Job
from onnxq_plugins.measure.arrays import decibels as energy_decibels
from onnxq_plugins.measure.arrays import lower_decibels
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.measure.unlike import part_energies, part_name
from onnxq_plugins.plan.grids import natural_grids
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.judge import as_written
from onnxq_plugins.spec import Array, Plan, from_range

_FOLDS = 4
_FEWEST = 8  # samples: of fewer, a fold says nothing
_ROOM, _BEYOND = 1.5, 0.25  # of `reach`
_SAME = 1e-3  # of a range: what its grid rounds


class Unseen:
    """The folds of a job's samples, and what its network gives for each with the ranges of the others.

    places   the fold of each sample that is judged
    """

    def __init__(self, job: Job, numbers: Sequence[int]) -> None:
        self.job, self.places = job, np.array(numbers) % _FOLDS

    @classmethod
    def of(cls, job: Job, numbers: Sequence[int]) -> Unseen | None:
        """For targets that quantize as a whole, so that ranges decide everywhere; None for others, for steps of streams,
        which cannot be taken apart, and for few samples.

        numbers   of the samples that are judged, among all of the job's data
        """
        data = job.calibration.data
        if not job.target.whole or data is None or data.state or len(numbers) < _FEWEST:
            return None
        return cls(job, numbers)

    @property
    def first(self) -> list[int]:
        """Which of the judged samples are in the first fold that has any."""
        return [int(n) for n in np.flatnonzero(self.places == self.places.min())]

    def cut(self, plan: Plan, fold: int) -> Plan:
        """A plan of the job's graph with the ranges that it would have without a fold: less by what the fold adds, but not
        less than what the others reach."""
        fixed, cut = natural_grids(self.job.graph, self.job.target, plan), {}
        for name, others in self._without[fold].items():
            if name not in plan or name in fixed:
                continue
            low, high = (float(end) for end in plan[name].value_range)
            less = (
                max(low, min(others[0], low + others[0] - self._all[name][0])),
                min(high, max(others[1], high + others[1] - self._all[name][1])),
            )
            if max(less[0] - low, high - less[1]) > _SAME * (high - low):
                cut[name] = from_range(*less, plan[name].request())
        return plan | Plan(cut)

    def reach(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        """Ranges of activations with room for the values of other samples: half as far again from 0, and a quarter of what
        lies between beyond either end, since scores that were low on all samples are high on others. An end at 0 stays, as
        behind a Relu."""
        ranges = {}
        for name in names:
            low, high = self._all[name]
            more = _BEYOND * (high - low)
            ranges[name] = min(_ROOM * low, low - more if low else 0.0), max(_ROOM * high, high + more if high else 0.0)
        return ranges

    def outputs(self, plan: Plan, samples: Samples) -> list[list[Any]]:
        """The outputs for the samples that are judged, each with the ranges of the other folds; a list per output with one
        value per sample."""
        found: dict[int, list[Any]] = {}
        for fold in sorted({*self.places.tolist()}):
            numbers = np.flatnonzero(self.places == fold).tolist()
            session = as_written(self.job.graph, self.cut(plan, fold), self.job.target)
            columns = samples.some(numbers).outputs(session, workers=self.job.workers)
            found |= zip(numbers, map(list, zip(*columns, strict=True)), strict=True)
        return [list(column) for column in zip(*(found[n] for n in sorted(found)), strict=True)]

    @cached_property
    def _folds(self) -> list[dict[str, tuple[float, float]]]:
        """The extremes of the activations in each fold of all samples."""
        job, names = self.job, Planned.of(self.job).activations
        data = job.calibration.data
        assert data is not None
        parts = [[n for n in data.numbers() if n % _FOLDS != fold] for fold in range(_FOLDS)]
        return [Calibration(job.graph, data.without(part), workers=job.workers).ranges(names) for part in parts]

    @cached_property
    def _all(self) -> dict[str, tuple[float, float]]:
        return _hull(self._folds)

    @cached_property
    def _without(self) -> list[dict[str, tuple[float, float]]]:
        """The extremes in all folds but one."""
        return [_hull([other for n, other in enumerate(self._folds) if n != fold]) for fold in range(_FOLDS)]


def _hull(folds: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Extremes over several folds."""
    return {name: (min(f[name][0] for f in folds), max(f[name][1] for f in folds)) for name in folds[0]}


def decibels(job: Job, samples: Samples, plan: Plan, unseen: Unseen | None = None, seen: bool = False) -> Array:
    """dB of each output of floats of a quantized network as it is written, the same on every machine; of each part of an
    output that holds two things (`measure.unlike`).

    unseen   with ranges that have not seen the samples; dB are then what others have, too (`lower_decibels`)
    seen     the latter with ranges that have seen them
    """
    if unseen is not None and not seen:
        return output_decibels(samples, unseen.outputs(plan, samples), lower_decibels)
    session = as_written(job.graph, plan, job.target)
    pooled = energy_decibels if unseen is None else lower_decibels
    return output_decibels(samples, samples.outputs(session, workers=job.workers), pooled)


def judged(samples: Samples) -> list[str]:
    """What `decibels` has a value of: outputs and parts of outputs, by name."""
    return [part_name(name, part) for name, found in zip(samples.names, samples.parts, strict=True) for part in found]


def output_decibels(
    samples: Samples, outputs: Sequence[Sequence[Any]], pooled: Callable[[Array], float] = energy_decibels
) -> Array:
    """dB of each output of floats, or part of one, over some samples."""
    columns = zip(samples.reference, outputs, samples.parts, strict=True)
    rows = [part_energies(y, z, part) for y, z, found in columns for part in found]
    return np.array([pooled(row) for row in rows])
