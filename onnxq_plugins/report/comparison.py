"""The quantized network beside the user's own model: accuracy and latency, and what they amount to."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.synthetic import SYNTHETIC
from onnxq_plugins.data import Data, DataOptions, Input, Source, model_inputs, open_data
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.graph.models import Model
from onnxq_plugins.graph.reading import read
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure.arrays import leaves
from onnxq_plugins.measure.classes import labelled
from onnxq_plugins.measure.metrics import percent_agreement, top1, worst_sqnr
from onnxq_plugins.measure.samples import RANDOM, OutputScore, Samples
from onnxq_plugins.runtimes.audits import file_or_proto
from onnxq_plugins.spec import Array

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
    elsewhere      the runtime of the target where it has kernels of its own: times in onnxruntime say nothing then
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
    elsewhere: str = ""

    def __repr__(self) -> str:
        """The verdict."""
        return f"<Comparison: {self.verdict}>"

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
        return self.speed < 0.97 and not self.elsewhere

    @property
    def verdict(self) -> str:
        """The grade in a sentence, with the reasons."""
        facts = [f"{self.sqnr:.1f} dB at the outputs"]
        if self.top1 is not None:
            facts.insert(0, f"accuracy {self.top1.quantized:.1f} %, float {self.top1.reference:.1f} %")
        elif self.agreement is not None:
            facts.insert(0, f"{self.agreement:.1f} % of the predictions are the same as the float model's")
        if self.elsewhere:
            pass
        elif self.slower:
            facts.append(f"slower than the float model on this machine: {self.speed:.2f} times its speed")
        elif self.speed < 1.05:
            facts.append("as fast as the float model")
        else:
            facts.append(f"{self.speed:.2f} times the speed of the float model")
        facts += [
            f"'{output.name}' falls by {output.decline:.0f} dB over {counted(len(output.steps), 'step')} on its own states"
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
        return counted(self.samples, f"{kind} sample")

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
        if self.elsewhere:
            return f"Accuracy was measured in onnxruntime on {source}{hint}Its times say nothing about {self.elsewhere}."
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
    runners = [runtimes.session(result.original), runtimes.session(result.model)]
    found = _measured(result.original, runners, data, most, calibration, result.class_axis)
    runtime = result.target.runtime if result.target.own_kernels else None
    return found if runtime is None else replace(found, elsewhere=runtime.name)


def compare_models(
    a: Model,
    b: Model,
    data: Source,
    *,
    labels: str | Path | Array | None = None,
    options: DataOptions | None = None,
    class_axis: int | None = None,
) -> Comparison:
    """How near a model is to another, and how fast, on the same data.

    a, b      the reference, usually the float model, and the model to judge: paths, ModelProtos, bytes, onnx_ir.Models
    data, labels, options   samples, see `onnxq_plugins.data.open_data`
    class_axis   of outputs that are classes; None finds it

    Raises OnnxqError for what is no model, and for two that have other inputs or outputs.
    """
    models = [file_or_proto(model) for model in (a, b)]
    paths = [
        model if isinstance(model, Path) else name for model, name in zip(models, ("the first", "the second"), strict=True)
    ]
    inputs = shared_inputs(models, paths)
    runners = [runtimes.session(model) for model in models]
    source = runtimes.rolled(open_data(data, inputs[0], options, labels), lambda: runners[0])
    return _measured(models[0], runners, source, 0, False, class_axis, paths)


def _measured(
    reference: Path | onnx.ModelProto,
    runners: Sequence[runtimes.Session],
    data: Data,
    most: int,
    calibration: bool,
    class_axis: int | None,
    paths: Sequence[object] = ("the float model", "the quantized one"),
) -> Comparison:
    """Measure two models.

    most   samples, 0 for all
    """
    feeds = data.spread(most)
    labels = data.spread_labels(most)
    known_labels = None if labels is None else np.concatenate(labels)
    known = Samples.of(reference, feeds, known_labels, class_axis, runners[0], data.state)
    quantized = in_order(known.names, runners[1], known.outputs(runners[1]), paths)
    check_ranks(known, quantized, paths)
    same = round(known.score(percent_agreement, quantized), 2) if known.telling else None
    correct = None
    if known_labels is not None and labelled(known.reference, known_labels, known.axes) is not None:
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


# ---- two models on the same inputs -----------------------------------------------------------------------------------


def shared_inputs(models: Sequence[Path | onnx.ModelProto], paths: Sequence[object]) -> list[list[Input]]:
    """The inputs of both models, called `paths` in sentences. Raises OnnxqError where their names differ."""
    inputs = [model_inputs(read(model) if isinstance(model, Path) else model) for model in models]
    names = [[value.name for value in each if not value.optional] for each in inputs]
    if set(names[0]) != set(names[1]):
        raise OnnxqError(
            f"'{paths[0]}' and '{paths[1]}' have different inputs: {', '.join(names[0])} and {', '.join(names[1])}."
        )
    return inputs


def check_ranks(known: Samples, outputs: Sequence[Any], paths: Sequence[object]) -> None:
    """Raise OnnxqError for an output that has another number of axes in the second model."""
    for name, one, other in zip(known.names, known.reference, outputs, strict=True):
        shapes = [[leaf.shape for leaf in leaves(values[0])] for values in (one, other)]
        if [len(shape) for shape in shapes[0]] != [len(shape) for shape in shapes[1]]:
            raise OnnxqError(
                f"output '{name}' has shape {shapes[0]} in '{paths[0]}' and {shapes[1]} in '{paths[1]}'; compare two forms "
                "of the same model."
            )


def in_order(
    names: Sequence[str], runner: runtimes.Session, outputs: Sequence[Any], paths: Sequence[object]
) -> Sequence[Any]:
    """The second model's outputs in the order of the first's. Raises OnnxqError where they are others; as many of other
    names are taken to be the same."""
    others = [output.name for output in runner.get_outputs()]
    if set(names) <= set(others):
        return [outputs[others.index(name)] for name in names]
    if len(names) != len(others):
        raise OnnxqError(
            f"'{paths[0]}' and '{paths[1]}' have different outputs: {', '.join(names)} and {', '.join(others)}; compare two "
            "forms of the same model."
        )
    return outputs


def truth(feeds: Data) -> Array | None:
    """The labels of all samples, if there are any."""
    labels = feeds.spread_labels(0)
    return None if labels is None else np.concatenate(labels)


def _grade(value: float, good: float, fair: float) -> str:
    return "good" if value >= good else "fair" if value >= fair else "poor"
