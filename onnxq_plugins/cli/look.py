"""Commands that look at models: audit, compare, diagnose."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins import runtimes
from onnxq_plugins.cli.console import command, out, say, show, tell, track
from onnxq_plugins.cli.options import (
    Crop,
    DataPath,
    Labels,
    Layout,
    Mean,
    MetricName,
    Model,
    Resize,
    Samples,
    Settings,
    Std,
    TargetName,
    image_settings,
)
from onnxq_plugins.data import model_inputs, open_data
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.provenance import recipe_of
from onnxq_plugins.graph.importer import bytes_on_disk, read
from onnxq_plugins.measure.metrics import chance, check_labels, find_metric, metric_name, top1
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.report.diagnosis import Diagnosis, LayerError, diagnose
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.runtimes.openvino import audit_openvino
from onnxq_plugins.search.latency import has_vnni


@command("audit")
def audit_command(
    model: Model,
    against: Annotated[Path | None, typer.Option(help="the float model: measures the latency ratio, interleaved")] = None,
    runtime_name: Annotated[str, typer.Option("--runtime", help="onnxruntime or openvino")] = "onnxruntime",
) -> None:
    """Tell for every layer of MODEL which kernel runs it, and if that is a float kernel, why."""
    for path in (model, against):
        if path is not None:
            read(path)
    if runtime_name not in ("onnxruntime", "openvino"):
        raise OnnxqError(f"runtime '{runtime_name}' is unknown; known: onnxruntime, openvino.")
    if runtime_name == "openvino" and against is not None:
        raise OnnxqError(
            "--against measures in onnxruntime; leave it out beside --runtime openvino (OpenVINO's own "
            "benchmark_app measures there)."
        )
    found = audit_openvino(model) if runtime_name == "openvino" else audit_model(model, against)
    table = Table("layer", "operator", "kernel", "accumulator", "why float", box=None, header_style="bold")
    for layer in found.layers:
        if layer.constant_weight or layer.quantized or layer.product:
            bits = f"{layer.accumulator} bits" if layer.accumulator is not None else ""
            table.add_row(
                escape(layer.name),
                layer.op,
                layer.kernel,
                bits,
                escape(layer.why),
                style=None if layer.quantized else "yellow",
            )
    show(table)
    rest = ", ".join(f"{n} {op}" for op, n in sorted(found.other.items(), key=lambda item: -item[1])[:12])
    say(f"\nother operators: {rest or 'none'}")
    say(found.summary())
    if accumulators := found.accumulators():
        say(accumulators)
    if found.speedup is not None and found.milliseconds is not None:
        slow, fast = found.milliseconds
        say(f"{found.speedup:.2f}x the speed of {against} ({slow:.3f} -> {fast:.3f} ms, batch 1, 1 thread)")


@command("diagnose")
def diagnose_command(
    model: Model,
    data: DataPath,
    recipe: Annotated[
        str, typer.Option("-r", "--recipe", show_default="int8", help="a built-in recipe (see onnxq recipes) or a file")
    ] = "",
    quantized: Annotated[
        Path | None,
        typer.Option(
            metavar="Q.ONNX",
            show_default=False,
            help=("instead of a recipe: a model that onnxq made of MODEL on the same data; it is made again"),
        ),
    ] = None,
    samples: Samples = 0,
    resize: Resize = 0,
    crop: Crop = 0,
    mean: Mean = "",
    std: Std = "",
    layout: Layout = "",
    set_: Settings = None,
    target: TargetName = "",
    seed: Annotated[int | None, typer.Option(show_default="0", help="one seed, one result")] = None,
    workers: Annotated[int, typer.Option(help="threads at once; 0 for one per core")] = 0,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps calibration results between runs")] = None,
    measured: Annotated[int, typer.Option(help="measure errors on so many of the samples")] = 8,
    try_: Annotated[
        int,
        typer.Option("--try", help=("try so many of the remedies, those of the worst layer first; each is a quantization")),
    ] = 0,
    all_: Annotated[bool, typer.Option("--all", help="show all layers, not only the ten worst")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Quantize MODEL and tell which layers hold its error, why, and what to try; writes no model."""
    if measured < 1 or try_ < 0:
        raise OnnxqError("--measured must be at least 1, and --try not negative.")
    settings = [*image_settings(resize, crop, mean, std, layout), *(set_ or [])]
    asked: str | dict[str, Any] = recipe or "int8"
    if quantized is not None:
        if recipe:
            raise OnnxqError(f"--quantized '{quantized}' brings its own recipe; leave --recipe out.")
        asked, kept = recipe_of(quantized)
        seed = kept if seed is None else seed
    result = quantize(
        model,
        asked,
        data,
        target=target or None,
        seed=seed or 0,
        samples=samples,
        workers=workers or None,
        cache=cache,
        settings=settings,
        track=track,
    )
    if quantized is not None and read(quantized).graph != result.model.graph:
        tell(
            f"note: '{quantized}' is not what its recipe makes of '{model}' on these samples; what is told is about the "
            "latter"
        )
    found = diagnose(result, samples=measured, attempts=try_, workers=workers or None, track=track)
    if json_:
        say(json.dumps(found.to_dict(), indent=2))
    else:
        _show_diagnosis(found, result.summary, all_)


@command()
def compare(
    a: Annotated[Path, typer.Argument(help="the reference, usually the float model")],
    b: Annotated[Path, typer.Argument(help="the model to judge")],
    data: DataPath,
    samples: Samples = 0,
    resize: Resize = 0,
    crop: Crop = 0,
    mean: Mean = "",
    std: Std = "",
    layout: Layout = "",
    labels: Labels = None,
    metric: MetricName = "",
) -> None:
    """Compare two models on the same data: error, agreement, size, latency; with labels also how many each gets right."""
    judge = find_metric(metric) if metric else None
    models = [read(a), read(b)]
    image = image_settings(resize, crop, mean, std, layout)
    options = dataclasses.replace(load_recipe({}, {}, image).data, samples=samples)
    inputs = [model_inputs(m) for m in models]
    if {i.name for i in inputs[0]} != {i.name for i in inputs[1]}:
        raise OnnxqError(
            f"'{a}' and '{b}' have different inputs: {', '.join(i.name for i in inputs[0])} and "
            f"{', '.join(i.name for i in inputs[1])}."
        )
    feeds = open_data(data, inputs[0], options, labels)
    runners = [runtimes.session(a), runtimes.session(b)]
    gathered: list[list[Any]] = [[], []]
    first = None
    for feed in track(feeds, "comparing", feeds.size):
        first = first or feed
        for rows, runner, wanted in zip(gathered, runners, inputs, strict=True):  # one may be in half precision
            rows.append(runner.run(None, {i.name: feed[i.name].astype(i.dtype) for i in wanted}))
    assert first is not None
    own = [{i.name: first[i.name].astype(i.dtype) for i in wanted} for wanted in inputs]
    times = runtimes.latency(runners, own, 2.0)
    names = [o.name for o in runners[0].get_outputs()]
    truth = feeds.spread_labels(0)
    right = None if truth is None else np.concatenate(truth)
    judge = judge or (top1 if right is not None else None)
    if judge is top1:
        check_labels(right, (len(gathered[0]), *np.shape(gathered[0][0][0])[1:]), names[0])
    table = Table("output", "SQNR dB", "same argmax", box=None, header_style="bold")
    for i, name in enumerate(names):
        y, z = (np.concatenate([np.atleast_1d(r[i]) for r in rows]) for rows in gathered)
        if y.shape != z.shape:
            raise OnnxqError(f"output '{name}' has shape {y.shape} in '{a}' and {z.shape} in '{b}'.")
        table.add_row(name, f"{runtimes.sqnr(y, z):.2f}", f"{100 * runtimes.agreement(y, z):.2f}%" if y.ndim > 1 else "-")
    show(table)
    if judge is not None:
        whole = [[np.concatenate([np.atleast_1d(r[i]) for r in rows]) for i in range(len(names))] for rows in gathered]
        found = [judge(whole[0], one, right) for one in whole]
        say(f"{metric_name(judge)}: {found[0]:.2f} -> {found[1]:.2f}")
        if judge is top1 and (remark := chance(found[0], whole[0][0].shape[-1], len(whole[0][0]))):
            tell("note: " + remark.replace("the float model", f"'{a}'"))
    sizes = [bytes_on_disk(p) for p in (a, b)]
    say(
        f"{len(gathered[0])} samples | {sizes[0] / 1e6:.2f} -> {sizes[1] / 1e6:.2f} MB | {times[0]:.3f} -> "
        f"{times[1]:.3f} ms ({times[0] / times[1]:.2f}x, batch {len(next(iter(first.values())))}, 1 thread)"
    )


_ROWS = 10  # layers in the table, if not all are asked for


def _show_diagnosis(found: Diagnosis, summary: str, everything: bool) -> None:
    """The worst layers as a table, then what is known of the five worst."""
    shown = found.layers if everything else found.layers[:_ROWS]
    lines = _fitting(_table(found, shown), out.width)
    for line in lines:
        say(line)
    if len(shown) < len(found.layers):
        say(f"... and {len(found.layers) - len(shown)} more, which hold less: --all shows them")
    say(
        f"\nalone: SQNR of the outputs with only this layer quantized; {found.part_of}: "
        + ("its part of the noise of the outputs" if found.adds_up else "its noise there, the worst layer's being 100")
        + "; own: SQNR at the layer's output, of rounding its weight and its input; gathered: there in the quantized "
        "network\n"
    )
    numbers = {y.name: n for n, y in enumerate(found.layers, 1)}
    for y in found.explained:
        say(f"{numbers[y.name]}. {y.name}: {found.told(y)}")
        _show_remedies(y.remedies[:3])
    for slow in found.floats[:5]:
        say(f"{slow.name}: runs in float ({100 * slow.work:.1f}% of the multiply-adds): {slow.why}.")
        _show_remedies(slow.remedies)
    ways = [*(r for y in found.explained for r in y.remedies[:3]), *(r for y in found.floats[:5] for r in y.remedies)]
    if any(remedy.passes or remedy.layers for remedy in ways):
        say(
            "\nBlocks in [[ ]] belong in a recipe's file: onnxq recipes int8 > my.toml, put the block in, and use it with "
            "-r my.toml; what begins with --set belongs on the command line."
        )
    if found.saturating:
        here = " (not on this machine, which has it)" if has_vnni() else ""
        say(
            f"{len(found.saturating)} layers could saturate on x86-64 without VNNI{here}: --target ort-cpu-avx2 avoids that."
        )
    for tried in found.tried:
        say(f"tried for {tried.layer}, {tried.remedy.text}: {tried.verdict(found.sqnr)}")
    for note in found.notes:
        say(note)
    say(
        f"{summary}\n{found.sqnr:.2f} dB at the outputs, on {found.samples} of the calibration samples | "
        f"{found.seconds:.1f} s"
    )


def _show_remedies(remedies: Sequence[Remedy]) -> None:
    for remedy in remedies:
        say(f"  {remedy.text}:\n" + "\n".join(f"    {line}" for line in remedy.typed.splitlines()))


# Columns that make room for names on a narrow terminal, the first to go first.
_SPARE = ("gathered dB", "input dB", "weight dB", "own dB", "op", "alone dB")


def _table(found: Diagnosis, layers: Sequence[LayerError]) -> dict[str, list[str]]:
    """Cells of each column."""

    def decibels(values: Iterable[float | None]) -> list[str]:
        return ["" if value is None or value >= 200 else f"{value:.1f}" for value in values]

    parts, owns = [found.part(y) for y in layers], [y.own for y in layers]
    return {
        "#": [f"{n}" for n in range(1, len(layers) + 1)],
        "layer": [y.name for y in layers],
        "op": [y.op if y.at != y.input else "" for y in layers],
        found.part_of: ["" if part is None else f"{part:.1f}" for part in parts],
        "alone dB": decibels(y.alone for y in layers),
        "own dB": decibels(own.both if own else None for own in owns),
        "weight dB": decibels(own.weight if own else None for own in owns),
        "input dB": decibels(own.input if own else None for own in owns),
        "gathered dB": decibels(y.sqnr for y in layers),
        "cause": [", ".join(c.kind for c in y.causes[:2]) if y.own else "float" for y in layers],
    }


def _fitting(columns: dict[str, list[str]], width: int) -> list[str]:
    """A table as lines no wider than the terminal, if leaving numbers out can do it: names are never shortened."""
    kept = list(columns)
    sizes = {key: max(len(cell) for cell in (key, *cells)) for key, cells in columns.items()}
    for key in _SPARE:
        if sum(sizes[k] for k in kept) + 2 * (len(kept) - 1) <= width:
            break
        kept.remove(key)
    rows = [kept, *zip(*(columns[key] for key in kept), strict=True)]
    text = {"layer", "op", "cause"}
    return [
        "  ".join(
            cell.ljust(sizes[key]) if key in text else cell.rjust(sizes[key]) for key, cell in zip(kept, row, strict=True)
        ).rstrip()
        for row in rows
    ]
