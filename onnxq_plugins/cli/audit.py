"""The command that shows what runs, and where the time goes: audit."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins.cli.console import echo, fail, few, notify, show
from onnxq_plugins.cli.limits import GateOptions, Limit
from onnxq_plugins.cli.options import CustomOps, DataPath, ImageOptions, Model, ShapeList, read_shapes
from onnxq_plugins.cli.proofs import runtime_settings, show_proof
from onnxq_plugins.edge.audits import HERE, SAMPLES
from onnxq_plugins.edge.audits import audit as audit_of
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.provenance import recipe_of
from onnxq_plugins.graph.reading import read
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.changes import what_to_change
from onnxq_plugins.runtimes.runtime import Proof
from onnxq_plugins.runtimes.spending import Spent, classes
from onnxq_plugins.targets.misfits import misfits

_RUNTIMES = "onnxruntime (the default), openvino, qnn, web, tract, opencv, litert, litert-micro, vela"


def audit_command(
    model: Model,
    *,
    against: Annotated[
        Path | None,
        typer.Option(show_default=False, help="the float model: times both; other runtimes are compared with it"),
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", show_default=False, help=f"{_RUNTIMES}, or that of an installed target")
    ] = "",
    python: Annotated[str, typer.Option(show_default=False, help="a Python that has the runtime, if this one has not")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="a setting of the runtime: soc_model=60"),
    ] = None,
    samples: Annotated[int, typer.Option(help="that other runtimes than onnxruntime run; 0 for all")] = SAMPLES,
    data: DataPath = "",
    images: ImageOptions,
    shape: ShapeList = None,
    target: Annotated[
        str,
        typer.Option("--target", show_default=False, help="say what MODEL has and this target has not; exit code 1 then"),
    ] = "",
    no_float: Annotated[
        bool,
        typer.Option(
            "--no-float", help="exit code 1 if a layer, or a product of two activations, does not run in an integer kernel"
        ),
    ] = False,
    all_layers: Annotated[bool, typer.Option("--all", help="a line for each layer, also where many are alike")] = False,
    gate: GateOptions,
    custom_ops: CustomOps = None,
) -> None:
    """Show for every layer of MODEL which kernel runs it, and if that is a float kernel, why.

    With --against, --data or --shape also where the time goes, and what to change first. A runtime that is named runs
    samples of --data, or random numbers, and is compared with onnxruntime: on the same file, or on the model of --against.
    """
    gate.check_files({"model": model, "float model": against})
    if (gate.junit or gate.markdown) and not no_float:
        raise OnnxqError("--junit and --markdown tell of limits; give --no-float, too.")
    if target:
        _check_target(model, target)
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
    there = audit.proof is not None and (runtime != HERE or bool(settings or python))
    changes = [] if there else what_to_change(audit, _placed(model))
    if not gate.as_json:
        _tell(audit, changes, against, all_layers, there)
    gate.tell(model.name, _limits(audit, model) if no_float else [], {**audit.to_dict(), "what_to_change": changes})


def _tell(audit: Audit, changes: Sequence[str], against: Path | None, all_layers: bool, there: bool) -> None:
    """Print what kernels here run, and what another runtime ran; that alone where `there` is set."""
    if not there:
        _show(audit, changes, against, all_layers)
    if audit.proof is not None:
        show_proof(audit.proof, audit if there else None)


def _limits(audit: Audit, model: Path) -> list[Limit]:
    """What must run in integers: layers, or all operators of a file that has no layers of ours."""
    if audit.proof is not None and (model.suffix != ".onnx" or not audit.layers):
        return _operators_in_integers(audit.proof)
    return _in_integers(audit)


def _in_integers(audit: Audit) -> list[Limit]:
    """A limit for each layer and product, without those that a pass keeps in float."""
    return [
        Limit(f"{layer.name} in integers", f"{layer.kernel}{': ' * bool(layer.why)}{layer.why}", layer.quantized)
        for layer in audit.layers
        if layer.computes and not layer.kept
    ]


def _operators_in_integers(proof: Proof) -> list[Limit]:
    """A limit for each operator of a file that has no layers of ours."""
    return [
        Limit(f"{each.name} in integers", f"{each.op}: {each.kind}{': ' * bool(each.why)}{each.why}", each.kind == "integer")
        for each in proof.inspection.operators
        if each.kind != "moves"
    ]


def _show(audit: Audit, changes: Sequence[str], against: Path | None, all_layers: bool) -> None:
    """Print an audit."""
    if changes:
        echo("what to change:")
        for number, text in enumerate(changes, 1):
            echo(f"{number}. {text}")
        echo("")
    show(_audit_table(audit, all_layers))
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


def _check_target(model: Path, name: str) -> None:
    """Say whether a file is what a target declares, with the settings of the recipe that made it; exit with 1 if not."""
    plugins, file = find_plugins(), read(model)
    target = plugins.target(name)
    with contextlib.suppress(OnnxqError):
        recipe = plugins.recipe(recipe_of(model)[0])
        target = plugins.target_of(recipe) if recipe.target == name else target
    if unfit := misfits(target, file):
        fail(OnnxqError(*(f"'{model}' is no file for target '{name}': it {text}." for text in unfit)), 1)
    echo(f"target '{name}': opset, operators, codes, biases, scales and channels are what it declares\n")


_NAMED = 5  # operators of a class
_NAMED_LAYERS = 2  # of one kernel


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


def _audit_table(audit: Audit, all_layers: bool) -> Table:
    """The layers and constants, those of one operator and kernel and with one reason in a line unless `all_layers`."""
    table = Table("layer", "", "operator", "kernel", "accumulator", "why float", box=None, header_style="bold")
    names = {layer.name for layer in audit.layers if layer.computes}
    rows = [
        (y.name, (y.op, y.kernel, y.why), y.accumulator, None if y.quantized else "yellow")
        for y in audit.layers
        if y.computes
    ]
    rows += [
        (held.name, (held.op, held.op, held.why), None, "yellow" if held.floats else None)
        for held in audit.constants
        if held.name not in names
    ]
    alike: dict[Hashable, list[tuple[str, tuple[str, str, str], int | None, str | None]]] = {}
    for n, row in enumerate(rows):
        alike.setdefault(n if all_layers else (*row[1:2], row[3]), []).append(row)
    for some in alike.values():
        bits = sorted({row[2] for row in some if row[2] is not None})
        (_, (op, kernel, why), _, style), count = some[0], f"{len(some)}" if len(some) > 1 else ""
        span = f"{bits[0]}..{bits[-1]} bits" if len(bits) > 1 else f"{bits[0]} bits" if bits else ""
        table.add_row(
            escape(few([row[0] for row in some], _NAMED_LAYERS)), count, op, kernel, span, escape(why), style=style
        )
    return table
