"""The command that judges a model beside another: compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins import runtimes
from onnxq_plugins.cli.console import echo, notify, show, track
from onnxq_plugins.cli.limits import LimitOptions
from onnxq_plugins.cli.options import ClassAxis, CustomOps, DataPath, ImageOptions, Labels, SampleCount
from onnxq_plugins.data import DataOptions, open_data
from onnxq_plugins.errors import counted
from onnxq_plugins.graph.reading import bytes_on_disk
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.classes import labelled
from onnxq_plugins.measure.metrics import chance, find_metric, metric_name, top1
from onnxq_plugins.measure.samples import RANDOM, OutputScore, Samples
from onnxq_plugins.report.comparison import check_ranks, in_order, shared_inputs, truth
from onnxq_plugins.report.summary import sizes

CompareMetric = Annotated[
    str,
    typer.Option(
        "--metric",
        show_default=False,
        help="also measure: sqnr, agreement, top1 (needs labels), or package.module:function",
    ),
]


@dataclass(frozen=True)
class Judged:
    """What was measured of a model beside its reference, on the same samples.

    scores, axes   of each output; the axis of its classes, None where it has none
    forced         the same on the reference's states, of a model of streams
    metric, values   its name, and what it gives for both; "" for none
    notes          what the user should know
    samples        number of them
    where          whose they are
    bytes, milliseconds   of both
    """

    scores: Sequence[OutputScore]
    axes: Sequence[int | None]
    forced: Sequence[OutputScore]
    metric: str
    values: tuple[float, float]
    notes: Sequence[str]
    samples: int
    where: str
    bytes: tuple[int, int]
    milliseconds: tuple[float, float]

    @property
    def sqnr(self) -> float | None:
        """dB of the worst output; None where there is no output of floats."""
        return min((score.sqnr for score in self.scores if score.sqnr is not None), default=None)

    @property
    def drop(self) -> float | None:
        """How far the metric falls."""
        return self.values[0] - self.values[1] if self.metric else None

    @property
    def speed(self) -> float:
        """Times the reference."""
        return self.milliseconds[0] / self.milliseconds[1]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "samples": self.samples,
            "where": self.where,
            "sqnr": self.sqnr,
            "outputs": [score.to_dict() for score in self.scores],
            **({"metric": self.metric, "values": list(self.values), "drop": self.drop} if self.metric else {}),
            "bytes": list(self.bytes),
            "milliseconds": list(self.milliseconds),
            "speed": self.speed,
            "notes": list(self.notes),
        }

    def show(self) -> None:
        """Print it."""
        show(_output_table(self.scores, self.axes))
        if self.forced:
            show(_steps_table(self.scores, self.forced))
        if self.metric:
            echo(f"{self.metric}: {self.values[0]:.2f} -> {self.values[1]:.2f}")
        for note in self.notes:
            notify(f"note: {note}")
        times = " -> ".join(f"{ms:.3f}" for ms in self.milliseconds)
        echo(
            f"{counted(self.samples, 'sample')} of {self.where} | {sizes(*self.bytes)} | {times} ms "
            f"({self.speed:.2f}x, one sample a run, 1 thread)"
        )


def compare_command(
    a: Annotated[Path, typer.Argument(help="the reference, usually the float model", show_default=False)],
    b: Annotated[Path, typer.Argument(help="the model to judge", show_default=False)],
    *,
    data: DataPath,
    samples: SampleCount = 0,
    labels: Labels = None,
    images: ImageOptions,
    metric: CompareMetric = "",
    class_axis: ClassAxis = None,
    limits: LimitOptions,
    custom_ops: CustomOps = None,
) -> None:
    """Compare two models on the same data: error, agreement, size, latency; with labels also how many each gets right."""
    judge = find_metric(metric) if metric else None
    limits.check_files({"reference": a, "model": b})
    found = judged((a, b), data, images.data_options(samples), labels, judge, class_axis)
    if not limits.as_json:
        found.show()
    limits.tell(b.name, limits.judged(found.sqnr, found.drop, found.speed), found.to_dict())


def judged(
    paths: tuple[Path, Path],
    data: str,
    options: DataOptions,
    labels: Path | None,
    judge: Metric | None,
    class_axis: int | None,
) -> Judged:
    """Measure a model beside its reference. Raises OnnxqError where they are no two forms of the same model.

    paths   of the reference and of the model
    """
    inputs = shared_inputs(paths, paths)
    sessions = [runtimes.session(path) for path in paths]
    source = runtimes.rolled(open_data(data, inputs[0], options, labels), lambda: sessions[0])
    feeds, classes, notes = list(track(source, "reading", source.size)), truth(source), []
    known = Samples.of(paths[0], feeds, classes, class_axis, sessions[0], source.state)
    if judge in (None, top1):
        known.check_labels()
    outputs = in_order(known.names, sessions[1], known.outputs(sessions[1]), paths)
    times = runtimes.latency(sessions, [runtimes.wanted(session, feeds[0]) for session in sessions], 2.0)
    check_ranks(known, outputs, paths)
    scores, forced = known.table(outputs), list[OutputScore]()
    if any(score.steps for score in scores):
        forced = known.table(in_order(known.names, sessions[1], known.outputs(sessions[1], own=False), paths))
    if judge is None and classes is not None:
        if labelled(known.reference, classes, known.axes) is None:
            notes.append("the labels are not classes of any output; give --class-axis, or a --metric of your own")
        else:
            judge = top1
    values = (0.0, 0.0) if judge is None else (known.score(judge), known.score(judge, outputs))
    if judge is top1 and classes is not None and (note := chance(values[0], known.reference, classes, known.axes)):
        notes.append(note.replace("the float model", f"'{paths[0]}'"))
    if known.random:
        notes.append(RANDOM.replace("the float model", f"'{paths[0]}'"))
    return Judged(
        scores,
        known.axes,
        forced,
        "" if judge is None else metric_name(judge),
        values,
        notes,
        len(feeds),
        source.where,
        (bytes_on_disk(paths[0]), bytes_on_disk(paths[1])),
        (times[0], times[1]),
    )


def _steps_table(scores: Sequence[OutputScore], forced: Sequence[OutputScore]) -> Table:
    """How noise grows with the steps on the network's own states: the median of some steps together, longer and longer.

    forced   the same on the float network's states
    """
    count = max(len(score.steps) for score in scores)
    starts = [0, *itertools.takewhile(lambda n: n < count, (4**k for k in range(20)))]
    parts = list(zip(starts, [*starts[1:], count], strict=True))
    names = [f"step {first + 1}" if last == first + 1 else f"..{last}" for first, last in parts]
    table = Table("dB, own states", *names, "float's states", box=None, header_style="bold")
    for own, other in zip(scores, forced, strict=True):
        if own.steps and other.sqnr is not None:
            table.add_row(
                escape(own.name),
                *(f"{float(np.median(own.steps[first:last])):.1f}" for first, last in parts),
                f"{other.sqnr:.1f}",
            )
    return table


def _output_table(scores: Sequence[OutputScore], axes: Sequence[int | None]) -> Table:
    """How near each output of the second model is to the first's."""
    table = Table("output", "SQNR dB", "worst 5 %", "same", "", box=None, header_style="bold")
    for score, axis in zip(scores, axes, strict=True):
        kind = "" if score.same is None else "values" if axis is None else f"class (axis {axis})"
        sqnr, worst = ("-" if value is None else f"{value:.2f}" for value in (score.sqnr, score.worst))
        same = "-" if score.same is None else f"{score.same:.2f}%"
        table.add_row(escape(score.name), sqnr, worst, same, escape("; ".join(part for part in (kind, score.note) if part)))
    return table
