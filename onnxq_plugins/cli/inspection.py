"""Commands that look at what was lost: diagnose, compare."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins import runtimes
from onnxq_plugins.cli.console import echo, notify, out, show, track
from onnxq_plugins.cli.options import (
    ClassAxis,
    CustomOps,
    DataPath,
    ImageOptions,
    Labels,
    Model,
    RecipeOptions,
    SampleCount,
    WorkOptions,
    data_option,
    recipe_option,
)
from onnxq_plugins.data import Data, Input, model_inputs, open_data
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.compact import alike
from onnxq_plugins.export.provenance import recipe_of
from onnxq_plugins.graph.reading import bytes_on_disk, read
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.measure.arrays import leaves
from onnxq_plugins.measure.classes import labelled
from onnxq_plugins.measure.metrics import chance, find_metric, metric_name, top1
from onnxq_plugins.measure.samples import RANDOM, OutputScore, Samples
from onnxq_plugins.report.diagnosis import Diagnosis, diagnose
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.report.rows import LayerError, percent
from onnxq_plugins.runtimes.machine import has_vnni
from onnxq_plugins.spec import Array


def diagnose_command(
    model: Model,
    *,
    data: DataPath,
    samples: SampleCount = 0,
    measured: Annotated[int, data_option(help="measure errors on so many samples")] = 8,
    images: ImageOptions,
    recipe: RecipeOptions,
    quantized: Annotated[
        Path | None,
        recipe_option(
            metavar="Q.ONNX",
            show_default=False,
            help="instead of a recipe: a model that onnxq made of MODEL on the same data; it is made again",
        ),
    ] = None,
    work: WorkOptions,
    attempts: Annotated[
        int,
        typer.Option("--try", help="try so many remedies, the most promising first; each quantizes anew"),
    ] = 0,
    all_layers: Annotated[
        bool, typer.Option("--all", help="show all layers, not only the ten worst, and measure each by itself")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Quantize MODEL and show which layers hold its error, why, and what to try; writes no model."""
    if measured < 1 or attempts < 0:
        raise OnnxqError("--measured must be at least 1, and --try not negative.")
    if quantized is not None and recipe.recipe:
        raise OnnxqError(f"--quantized '{quantized}' brings its own recipe; leave --recipe out.")
    source, seed = recipe.source(recipe_of(quantized) if quantized is not None else None)
    result = quantize(
        model,
        source,
        data,
        target=recipe.target or None,
        seed=seed,
        samples=samples,
        workers=work.workers or None,
        cache=work.cache,
        settings=[*images.settings(), *(recipe.settings or [])],
        check=False,
        track=track,
    )
    if quantized is not None and not alike(read(quantized), result.model):
        notify(
            f"note: '{quantized}' is not what its recipe makes of '{model}' on these samples; the diagnosis is of the latter"
        )
    diagnosis = diagnose(
        result, samples=measured, attempts=attempts, every=all_layers, workers=work.workers or None, track=track
    )
    if as_json:
        echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        _show_diagnosis(diagnosis, result.summary, all_layers)


_WORST = 10  # layers in the table without --all
_EXPLAINED = 5  # layers in float below it
_REMEDIES = 3  # of each layer


def _show_diagnosis(diagnosis: Diagnosis, summary: str, all_layers: bool) -> None:
    """Print the worst layers as a table, then causes and remedies of the five worst."""
    layers = diagnosis.layers if all_layers else diagnosis.layers[:_WORST]
    for line in fit(error_columns(layers), out.width):
        echo(line)
    if len(layers) < len(diagnosis.layers):
        echo(f"... and {len(diagnosis.layers) - len(layers)} more with less error: --all shows them")
    echo(
        f"\nnoise %: part of the noise of output '{diagnosis.output}', negative for what takes back errors of others; "
        "alone: SQNR there with only this layer quantized; own: SQNR at the layer's output with only its weight and its "
        "input rounded; accumulated: SQNR there in the quantized network\n"
    )
    _show_explained(diagnosis)
    if diagnosis.saturating:
        here = " (not on this machine, which has it)" if has_vnni() else ""
        echo(
            f"{len(diagnosis.saturating)} layers could saturate on x86-64 without VNNI{here}: --target ort-cpu-avx2 avoids "
            "that."
        )
    for attempt in diagnosis.tried:
        echo(f"tried for {attempt.layer or 'all'}, {attempt.remedy.text}: {attempt.verdict(diagnosis.written)}")
    for note in diagnosis.notes:
        echo(note)
    echo(
        f"{summary}\n{diagnosis.sqnr:.2f} dB at the outputs, on {diagnosis.samples} of the calibration samples | "
        f"{diagnosis.seconds:.1f} s"
    )


def _show_explained(diagnosis: Diagnosis) -> None:
    """Print what is known of the worst layers and of those in float, and what to try."""
    remedies: list[Remedy] = []
    numbers = {layer.name: n for n, layer in enumerate(diagnosis.layers, 1)}
    for layer in diagnosis.explained:
        echo(f"{numbers[layer.name]}. {layer.name}: {layer.text}")
        remedies += _show_remedies(layer.remedies[:_REMEDIES])
    if diagnosis.overall:
        echo("For the network as a whole:")
        remedies += _show_remedies(diagnosis.overall)
    for slow in diagnosis.floats[:_EXPLAINED]:
        echo(f"{slow.name}: runs in float ({100 * slow.work:.1f}% of the multiply-adds): {slow.why}.")
        remedies += _show_remedies(slow.remedies)
    if any(remedy.passes or remedy.layers for remedy in remedies):
        echo(
            "\nBlocks in [[ ]] belong in a recipe's file: onnxq recipes int8 > my.toml, add the block, and use it with "
            "-r my.toml; what begins with --set belongs on the command line."
        )


def _show_remedies(remedies: Sequence[Remedy]) -> Sequence[Remedy]:
    for remedy in remedies:
        echo(f"  {remedy.text}:\n" + "\n".join(f"    {line}" for line in remedy.typed.splitlines()))
    return remedies


# Columns left out where a terminal is too narrow, the first to go first.
_SPARE = ("accumulated dB", "input dB", "weight dB", "own dB", "op", "alone dB")


def error_columns(layers: Sequence[LayerError]) -> dict[str, list[str]]:
    """Cells of each column, one per layer."""

    def decibels(values: Iterable[float | None]) -> list[str]:
        return ["" if value is None or value >= IDENTICAL else f"{value:.1f}" for value in values]

    own = [layer.own for layer in layers]
    return {
        "#": [f"{n}" for n in range(1, len(layers) + 1)],
        "layer": [layer.name for layer in layers],
        "op": [layer.op if layer.is_layer else "" for layer in layers],
        "noise %": [percent(layer.share) for layer in layers],
        "alone dB": decibels(layer.alone for layer in layers),
        "own dB": decibels(error.both if error else None for error in own),
        "weight dB": decibels(error.weight if error else None for error in own),
        "input dB": decibels(error.input if error else None for error in own),
        "accumulated dB": decibels(layer.sqnr for layer in layers),
        "cause": [", ".join(cause.kind for cause in layer.causes[:2]) if layer.own else "float" for layer in layers],
    }


def fit(columns: Mapping[str, list[str]], width: int) -> list[str]:
    """A table as lines, no wider than the terminal if leaving out numbers suffices: names are never shortened."""
    shown = list(columns)
    sizes = {key: max(len(cell) for cell in (key, *cells)) for key, cells in columns.items()}
    for key in _SPARE:
        if sum(sizes[k] for k in shown) + 2 * (len(shown) - 1) <= width:
            break
        shown.remove(key)
    rows = [shown, *zip(*(columns[key] for key in shown), strict=True)]
    text = {"layer", "op", "cause"}
    return [
        "  ".join(
            cell.ljust(sizes[key]) if key in text else cell.rjust(sizes[key]) for key, cell in zip(shown, row, strict=True)
        ).rstrip()
        for row in rows
    ]


def compare_command(
    a: Annotated[Path, typer.Argument(help="the reference, usually the float model", show_default=False)],
    b: Annotated[Path, typer.Argument(help="the model to judge", show_default=False)],
    *,
    data: DataPath,
    samples: SampleCount = 0,
    labels: Labels = None,
    images: ImageOptions,
    metric: Annotated[
        str,
        typer.Option(
            show_default=False,
            help="also measure: sqnr, agreement, top1 (needs labels), or package.module:function",
        ),
    ] = "",
    class_axis: ClassAxis = None,
    custom_ops: CustomOps = None,
) -> None:
    """Compare two models on the same data: error, agreement, size, latency; with labels also how many each gets right."""
    judge = find_metric(metric) if metric else None
    paths = (a, b)
    inputs = _shared_inputs(paths)
    sessions = [runtimes.session(path) for path in paths]
    source = runtimes.rolled(open_data(data, inputs[0], images.data_options(samples), labels), lambda: sessions[0])
    feeds, truth = list(track(source, "reading", source.size)), _truth(source)
    known = Samples.of(a, feeds, truth, class_axis, sessions[0], source.state)
    if judge in (None, top1):
        known.check_labels()
    outputs = _in_order(known.names, sessions[1], known.outputs(sessions[1]), paths)
    milliseconds = runtimes.latency(sessions, [runtimes.wanted(session, feeds[0]) for session in sessions], 2.0)
    _check_ranks(known, outputs, paths)
    scores = known.table(outputs)
    show(_output_table(scores, known.axes))
    if any(score.steps for score in scores):
        forced = _in_order(known.names, sessions[1], known.outputs(sessions[1], own=False), paths)
        show(_steps_table(scores, known.table(forced)))
    if judge is None and truth is not None:
        if labelled(known.reference, truth, known.axes) is None:
            notify("note: the labels are not classes of any output; give --class-axis, or a --metric of your own")
        else:
            judge = top1
    if judge is not None:
        score = known.score(judge)
        echo(f"{metric_name(judge)}: {score:.2f} -> {known.score(judge, outputs):.2f}")
        if judge is top1 and truth is not None and (note := chance(score, known.reference, truth, known.axes)):
            notify("note: " + note.replace("the float model", f"'{a}'"))
    if known.random:
        notify("note: " + RANDOM.replace("the float model", f"'{a}'"))
    sizes = [bytes_on_disk(path) / 1e6 for path in paths]
    echo(
        f"{len(feeds)} samples | {sizes[0]:.2f} -> {sizes[1]:.2f} MB | {milliseconds[0]:.3f} -> {milliseconds[1]:.3f} ms "
        f"({milliseconds[0] / milliseconds[1]:.2f}x, one sample a run, 1 thread)"
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


def _shared_inputs(paths: Sequence[Path]) -> list[list[Input]]:
    """The inputs of both models. Raises OnnxqError where their names differ."""
    inputs = [model_inputs(read(path)) for path in paths]
    names = [[value.name for value in each if not value.optional] for each in inputs]
    if set(names[0]) != set(names[1]):
        raise OnnxqError(
            f"'{paths[0]}' and '{paths[1]}' have different inputs: {', '.join(names[0])} and {', '.join(names[1])}."
        )
    return inputs


def _check_ranks(known: Samples, outputs: Sequence[Any], paths: Sequence[Path]) -> None:
    """Raise OnnxqError for an output that has another number of axes in the second model."""
    for name, one, other in zip(known.names, known.reference, outputs, strict=True):
        shapes = [[leaf.shape for leaf in leaves(values[0])] for values in (one, other)]
        if [len(shape) for shape in shapes[0]] != [len(shape) for shape in shapes[1]]:
            raise OnnxqError(
                f"output '{name}' has shape {shapes[0]} in '{paths[0]}' and {shapes[1]} in '{paths[1]}'; compare two forms "
                "of the same model."
            )


def _in_order(
    names: Sequence[str], runner: runtimes.Session, outputs: Sequence[Any], paths: Sequence[Path]
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


def _truth(feeds: Data) -> Array | None:
    """The labels of all samples, if there are any."""
    labels = feeds.spread_labels(0)
    return None if labels is None else np.concatenate(labels)


def _output_table(scores: Sequence[OutputScore], axes: Sequence[int | None]) -> Table:
    """How near each output of the second model is to the first's."""
    table = Table("output", "SQNR dB", "worst 5 %", "same", "", box=None, header_style="bold")
    for score, axis in zip(scores, axes, strict=True):
        kind = "" if score.same is None else "values" if axis is None else f"class (axis {axis})"
        sqnr, worst = ("-" if value is None else f"{value:.2f}" for value in (score.sqnr, score.worst))
        same = "-" if score.same is None else f"{score.same:.2f}%"
        table.add_row(escape(score.name), sqnr, worst, same, escape("; ".join(part for part in (kind, score.note) if part)))
    return table
