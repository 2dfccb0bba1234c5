"""The quantized network beside the user's own model: accuracy and latency, and what they amount to."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.synthetic import SYNTHETIC
from onnxq_plugins.data import Data
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure.classes import labelled
from onnxq_plugins.measure.metrics import percent_agreement, top1, worst_sqnr
from onnxq_plugins.measure.samples import RANDOM, OutputScore, Samples

_CALIBRATION, _OTHER = 32, 512  # samples at most: of those it was calibrated with, of others
_DECLINE = 3.0  # dB of growing noise that are worth a word
_SECONDS = 0.6  # of interleaved runs for the latencies
_GRADES = {"good": "Good", "fair": "Usable, with care", "poor": "Poor"}


@dataclass(frozen=True)
class Pair:
    """A number of the float model and of the quantized one."""

    reference: float
    quantized: float

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return {"float": self.reference, "quantized": self.quantized}


@dataclass(frozen=True)
class Comparison:
    """What was measured of both models.

    samples        number of samples that accuracy is measured on
    available      samples in the data, None if unknown
    where          the data in words
    calibration    True if the network was calibrated with these samples
    sqnr           dB of the worst output, pooled over the samples
    agreement      percent of samples with the same class; None if the outputs are no classes, or always the same one
    top1           percent of samples classified correctly; None without labels of classes
    milliseconds   latency, batch 1, one thread
    outputs        each output's numbers
    random         True if the float model gives other outputs for the same input
    """

    samples: int
    available: int | None
    where: str
    calibration: bool
    sqnr: float
    milliseconds: Pair
    agreement: float | None = None
    top1: Pair | None = None
    outputs: tuple[OutputScore, ...] = ()
    random: bool = False

    @property
    def speed(self) -> float:
        """Times float."""
        return self.milliseconds.reference / self.milliseconds.quantized

    @property
    def synthetic(self) -> bool:
        """True if a pass generated the samples."""
        return self.where == SYNTHETIC

    @property
    def grade(self) -> str:
        """``good``, ``fair`` or ``poor``. Accuracy counts more than agreement with the float model, that more than noise."""
        if self.top1 is not None:
            grade = _grade(self.top1.quantized - self.top1.reference, -1, -3)
        elif self.agreement is not None:
            grade = _grade(self.agreement, 99, 95)
        else:
            grade = _grade(self.sqnr, 30, 10)
        return "fair" if grade == "good" and self.slower else grade

    @property
    def slower(self) -> bool:
        """True if the float model is faster on this machine."""
        return self.speed < 0.97

    @property
    def verdict(self) -> str:
        """The grade in a sentence, with the reasons."""
        facts = [f"{self.sqnr:.1f} dB at the outputs"]
        if self.top1 is not None:
            facts.insert(0, f"accuracy {self.top1.quantized:.1f} %, float {self.top1.reference:.1f} %")
        elif self.agreement is not None:
            facts.insert(0, f"{self.agreement:.1f} % of the predictions are the same as the float model's")
        if self.slower:
            facts.append(f"slower than the float model on this machine: {self.speed:.2f} times its speed")
        elif self.speed < 1.05:
            facts.append("as fast as the float model")
        else:
            facts.append(f"{self.speed:.2f} times the speed of the float model")
        facts += [
            f"'{output.name}' falls by {output.decline:.0f} dB over {len(output.steps)} steps on its own states"
            for output in self.outputs
            if output.decline >= _DECLINE
        ]
        facts += [f"output '{output.name}': {output.note}" for output in self.outputs if output.note]
        if self.random:
            facts.append(RANDOM)
        return f"{_GRADES[self.grade]}: {'; '.join(facts)}; on {self.kind}."

    @property
    def kind(self) -> str:
        """How many samples of what kind, in words."""
        kind = "synthetic" if self.synthetic else "calibration" if self.calibration else "other"
        return f"{self.samples} {kind} samples"

    @property
    def method(self) -> str:
        """How the numbers were measured, in sentences."""
        count = f"{self.samples} of {self.available} samples" if self.available else f"{self.samples} samples"
        if self.synthetic:
            source = f"{count} that were generated, for lack of data: it says little about real ones. "
        elif self.calibration:
            where = "" if self.where == "the data" else f" of {self.where}"
            source = f"{count}{where} that the network was calibrated with, which flatters it. "
        else:
            source = f"{count} of {self.where}, given for this report. "
        if any(output.steps for output in self.outputs):
            source += "Each model ran on its own states. "
        hint = "Pass --test PATH to measure on others. " if self.calibration else ""
        return (
            f"Accuracy was measured on {source}{hint}Latency: onnxruntime, batch 1, one thread, median of runs that "
            "alternate with the float model's."
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        answers = {} if self.agreement is None else {"agreement": self.agreement}
        return {
            "samples": self.samples,
            "of": self.available,
            "where": self.where,
            "calibrated_on_them": self.calibration,
            "sqnr": self.sqnr,
            **answers,
            **({} if self.top1 is None else {"top1": self.top1.to_dict()}),
            **({"outputs": [output.to_dict() for output in self.outputs]} if self.outputs else {}),
            **({"random": True} if self.random else {}),
            "milliseconds": {**self.milliseconds.to_dict(), "machine": platform.machine()},
        }


def compare(result: Outcome, data: Data) -> Comparison:
    """Measure the quantized network and the user's own model on some samples."""
    calibration = data is result.data
    most = _CALIBRATION if calibration and not data.state else _OTHER  # errors take many steps to feed back
    feeds, labels = data.spread(most), data.spread_labels(most)
    runners = [runtimes.session(result.original), runtimes.session(result.model)]
    truth = None if labels is None else np.concatenate(labels)
    known = Samples.of(result.original, feeds, truth, result.class_axis, runners[0], data.state)
    quantized = known.outputs(runners[1])
    same = round(known.score(percent_agreement, quantized), 2) if known.telling else None
    correct = None
    if truth is not None and labelled(known.reference, truth, known.axes) is not None:
        correct = Pair(round(known.score(top1), 2), round(known.score(top1, quantized), 2))
    times = runtimes.latency(runners, [runtimes.wanted(runner, feeds[0]) for runner in runners], _SECONDS)
    return Comparison(
        len(feeds),
        data.size,
        data.where,
        calibration,
        round(known.score(worst_sqnr, quantized), 2),
        Pair(*(round(time, 4) for time in times)),
        same,
        correct,
        tuple(known.table(quantized)),
        known.random,
    )


def _grade(value: float, good: float, fair: float) -> str:
    return "good" if value >= good else "fair" if value >= fair else "poor"
