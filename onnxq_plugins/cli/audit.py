"""The command that shows what runs, and where the time goes: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins.cli.console import echo, notify, show
from onnxq_plugins.cli.options import CustomOps, DataPath, ImageOptions, Model, ShapeList, read_shapes
from onnxq_plugins.cli.proofs import runtime_settings, show_proof
from onnxq_plugins.edge.audits import SAMPLES
from onnxq_plugins.edge.audits import audit as audit_of
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.provenance import recipe_of
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.changes import what_to_change
from onnxq_plugins.runtimes.spending import Spent, classes


def audit_command(
    model: Model,
    *,
    against: Annotated[
        Path | None, typer.Option(show_default=False, help="the float model: times and profiles both, interleaved")
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", help="onnxruntime, openvino, qnn, web, tract, opencv, or that of an installed target")
    ] = "onnxruntime",
    python: Annotated[str, typer.Option(show_default=False, help="a Python that has the runtime, if this one has not")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="a setting of the runtime: soc_model=60"),
    ] = None,
    samples: Annotated[int, typer.Option(help="that other runtimes than onnxruntime run; 0 for all")] = SAMPLES,
    data: DataPath = "",
    images: ImageOptions,
    shape: ShapeList = None,
    custom_ops: CustomOps = None,
) -> None:
    """Show for every layer of MODEL which kernel runs it, and if that is a float kernel, why.

    With --against, --data or --shape also where the time goes, and what to change first. Other runtimes than onnxruntime run
    samples of --data, or random numbers, and are compared with it.
    """
    audit = audit_of(
        model,
        against,
        runtime=runtime,
        data=data or None,
        options=images.data_options(),
        shapes=read_shapes(shape),
        settings=runtime_settings(settings, python),
        samples=samples,
    )
    if audit.proof is not None:
        show_proof(audit.proof, audit)
        return
    _show_audit(audit, model, against)


def _show_audit(audit: Audit, model: Path, against: Path | None) -> None:
    """Print what to change, the layers, and times if there are any."""
    if changes := what_to_change(audit, _placed(model)):
        echo("what to change:")
        for number, text in enumerate(changes, 1):
            echo(f"{number}. {text}")
        echo("")
    show(_audit_table(audit))
    others = sorted(audit.other.items(), key=lambda item: -item[1])[:12]
    echo(f"\nother operators: {', '.join(f'{n} {op}' for op, n in others) or 'none'}")
    echo(audit.summary)
    if accumulators := audit.accumulators():
        echo(accumulators)
    if audit.spending:
        _show_spending(audit)
    if audit.speedup is not None and audit.milliseconds is not None:
        before, after = audit.milliseconds
        times = f"{before:.3f} -> {after:.3f} ms"
        echo(f"{audit.speedup:.2f}x the speed of {against} ({times}, 1 thread), timed on {audit.timed}")
    elif audit.milliseconds is not None:
        echo(f"{audit.milliseconds[0]:.3f} ms, 1 thread, timed on {audit.timed}")
    if audit.untimed:
        notify(f"note: {audit.untimed}")


_NAMED = 5  # operators of a class


def _placed(model: Path) -> bool | None:
    """Whether the recipe that made a model placed its operators by what they cost; None if it tells none."""
    try:
        return find_plugins().recipe(recipe_of(model)[0]).provides("placement")
    except OnnxqError:
        return None


def _show_spending(audit: Audit) -> None:
    """Print the time of each class of kernels, in both models if there are two."""
    models = ["float", "quantized"] if len(audit.spending) == 2 else [""]
    table = Table("class of kernels", box=None, header_style="bold")
    for name in models:
        for column in ("kernels", "us", "%"):
            table.add_column(f"{name} {column}".strip(), justify="right")
    table.add_column("operators")
    for name in classes(audit.spending):
        rows = [spending.of_class(name) for spending in audit.spending]
        cells = [cell for row in rows for cell in _spent_cells(row)]
        ops = rows[-1].ops or rows[0].ops
        words = ", ".join(f"{count} {op}" for op, count in list(ops.items())[:_NAMED]) + (
            ", ..." if len(ops) > _NAMED else ""
        )
        table.add_row(name, *cells, escape(words) if set(ops) - {name} else "")
    echo(f"\nwhere the time goes, on {audit.timed}:")
    show(table)
    for name, spending in zip(models, audit.spending, strict=True):
        echo(f"{name}{': ' if name else ''}{spending.text}")


def _spent_cells(row: Spent) -> tuple[str, str, str]:
    """Kernels, microseconds and percent; empty for a class that a model does not have."""
    if not row.count and not row.microseconds:
        return ("", "", "")
    return (str(row.count or ""), f"{row.microseconds:.1f}", f"{100 * row.share:.0f}")


def _audit_table(audit: Audit) -> Table:
    table = Table("layer", "operator", "kernel", "accumulator", "why float", box=None, header_style="bold")
    for layer in audit.layers:
        if layer.constant_weight or layer.quantized or layer.product:
            bits = f"{layer.accumulator} bits" if layer.accumulator is not None else ""
            cells = (escape(layer.name), layer.op, layer.kernel, bits, escape(layer.why))
            table.add_row(*cells, style=None if layer.quantized else "yellow")
    layers = {layer.name for layer in audit.layers if layer.constant_weight or layer.quantized or layer.product}
    for held in audit.constants:
        if held.name not in layers:
            table.add_row(escape(held.name), held.op, held.op, "", escape(held.why), style="yellow" if held.floats else None)
    return table
