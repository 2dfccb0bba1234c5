"""A network on samples that its ranges have not seen.

A grid of an activation reaches as far as the samples do that it was calibrated with. Other samples reach further and are
clipped, which a network judged on its own samples does not show: a detector calibrated on pictures with few faces had 22 dB
on them and 8 on others, whose faces were clipped. So the samples fall into four folds, and each is judged with grids that
reach no further than the samples of the other three: cross-validation (Stone, J. R. Stat. Soc. B 36, 1974). Only ranges are
taken back; what else was solved on all samples hardly fits single ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.export.qdq import export
from onnxq_plugins.job import Job
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.grids import natural_grids
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Plan, from_range

_FOLDS = 4
_FEWEST = 8  # samples: of fewer, a fold says nothing
_ROOM = 1.5  # of what samples reach
_SAME = 0.999  # of an end of a grid, which rounds it


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
        """A plan of the job's graph with the ranges that it would have without a fold. A range that is wider than what all
        samples reach is so by the same factor."""
        fixed, cut = natural_grids(self.job.graph, self.job.target, plan), {}
        for name, (low, high) in self._without[fold].items():
            if name not in plan or name in fixed:
                continue
            ends, every = np.array(plan[name].value_range, np.float64), np.array(self._all[name])
            room = np.maximum(np.divide(ends, every, out=np.ones(2), where=every != 0), 1)
            less = max(ends[0], low * room[0]), min(ends[1], high * room[1])
            if (np.abs(less) < _SAME * np.abs(ends)).any():
                cut[name] = from_range(*less, plan[name].request())
        return plan | Plan(cut)

    def reach(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        """Ranges of activations with room for the values of other samples."""
        return {name: (_ROOM * self._all[name][0], _ROOM * self._all[name][1]) for name in names}

    def outputs(self, plan: Plan, samples: Samples) -> list[list[Any]]:
        """The outputs for the samples that are judged, each with the ranges of the other folds; a list per output with one
        value per sample."""
        found: dict[int, list[Any]] = {}
        for fold in sorted({*self.places.tolist()}):
            numbers = np.flatnonzero(self.places == fold).tolist()
            model = export(self.job.graph, self.cut(plan, fold), self.job.target)
            session = runtimes.session(model, written=True, lean=True)
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
    """Extremes over several folds; 0 is always among them."""
    return {
        name: (min(0.0, *(fold[name][0] for fold in folds)), max(0.0, *(fold[name][1] for fold in folds)))
        for name in folds[0]
    }
