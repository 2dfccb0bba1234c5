"""Commands that look at what was lost: diagnose, compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from onnxq_plugins.cli.console import echo, few, notify, out, track
from onnxq_plugins.cli.options import (
    DataPath,
    ImageOptions,
    Model,
    RecipeOptions,
    SampleCount,
    WorkOptions,
    data_option,
    recipe_option,
)
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.export.compact import alike
from onnxq_plugins.export.provenance import recipe_of
from onnxq_plugins.graph.reading import read
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.report.diagnosis import Diagnosis, diagnose
from onnxq_plugins.report.float_layers import FloatLayer
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.report.rows import LayerError, percent
from onnxq_plugins.runtimes.machine import has_vnni


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
        exclude=recipe.exclude or (),
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
_EXPLAINED = 5  # reasons why layers are in float
_REMEDIES = 3  # of each layer


def _show_diagnosis(diagnosis: Diagnosis, summary: str, all_layers: bool) -> None:
    """Print the worst layers as a table, then causes and remedies of the five worst."""
    layers = diagnosis.layers if all_layers else diagnosis.layers[:_WORST]
    for line in fit(error_columns(layers), out.width):
        echo(line)
    if len(layers) < len(diagnosis.layers):
        echo(f"... and {len(diagnosis.layers) - len(layers)} more with less error: --all shows them")
    echo(
        f"\nmeasured on {diagnosis.where}, noise % and alone on a few of them. noise %: part of the noise of output "
        f"'{diagnosis.output}', negative for what takes back errors of others; alone: SQNR there with only this layer "
        "quantized; own: SQNR at the layer's output with only its weight and its input rounded; accumulated: SQNR there in "
        "the quantized network\n"
    )
    _show_explained(diagnosis)
    if diagnosis.saturating:
        here = " (not on this machine, which has it)" if has_vnni() else ""
        count = counted(len(diagnosis.saturating), "layer")
        echo(f"{count} could saturate on x86-64 without VNNI{here}: --target ort-cpu-avx2 avoids that.")
    if diagnosis.tried:
        echo(f"Tried, judged on {diagnosis.tried_on} (mean dB of a sample, and the standard error of its gain):")
    for attempt in diagnosis.tried:
        echo(f"  for {attempt.layer or 'all'}, {attempt.remedy.text}: {attempt.verdict}")
    for note in diagnosis.notes:
        echo(note)
    echo(f"{summary}\n{diagnosis.sqnr:.2f} dB at the outputs, on {diagnosis.where} | {diagnosis.seconds:.1f} s")


def _show_explained(diagnosis: Diagnosis) -> None:
    """Print what is known of the worst layers and of those in float, and what to try: what is the same for several, once."""
    offers: dict[str, list[tuple[str, Remedy]]] = {}  # text -> for whom, and what to type
    numbers = {layer.name: str(n) for n, layer in enumerate(diagnosis.layers, 1)}
    for layer in diagnosis.explained:
        if layer.share is not None and not round(100 * layer.share):
            continue  # nothing to gain
        echo(f"{numbers[layer.name]}. {layer.name}: {layer.text}")
        for remedy in layer.remedies[:_REMEDIES]:
            offers.setdefault(remedy.text, []).append((numbers[layer.name], remedy))
    for remedy in diagnosis.overall:
        offers.setdefault(remedy.text, []).append(("the network as a whole", remedy))
    reasons: dict[str, list[FloatLayer]] = {}
    for slow in diagnosis.floats:
        reasons.setdefault(slow.why, []).append(slow)
    for why, layers in list(reasons.items())[:_EXPLAINED]:
        echo(_float_line(why, layers))
        for slow in layers:
            for remedy in slow.remedies:
                offers.setdefault(remedy.text, []).append((slow.name, remedy))
    if offers:
        echo("What to try, and for which:")
    for text, some in offers.items():
        typed = some[0][1].typed
        same, others = ([who for who, remedy in some if (remedy.typed == typed) == alike] for alike in (True, False))
        likewise = f"; likewise, with their names, {few(others)}" if others else ""
        echo(f"  {text} ({few(same)}{likewise}):\n" + "\n".join(f"    {line}" for line in typed.splitlines()))
    if any(remedy.passes or remedy.layers for some in offers.values() for _, remedy in some):
        echo(
            "\nBlocks in [[ ]] belong in a recipe's file: onnxq recipes int8 > my.toml, add the block, and use it with "
            "-r my.toml; what begins with --set belongs on the command line."
        )


def _float_line(why: str, layers: Sequence[FloatLayer]) -> str:
    """The layers that run in float for one reason, in a line."""
    verb = "runs" if len(layers) == 1 else "run"
    work = sum(layer.work for layer in layers)
    return f"{few([y.name for y in layers])}: {verb} in float ({100 * work:.1f}% of the multiply-adds): {why}."


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
