"""The command that proves a model in every runtime: matrix."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins.cli.console import echo, show, track
from onnxq_plugins.cli.options import CustomOps, DataPath, ImageOptions, Model, check_outputs, data_option, output_option
from onnxq_plugins.data import Data
from onnxq_plugins.edge.audits import SAMPLES
from onnxq_plugins.edge.matrix import COLUMNS, Matrix, in_runtimes, matrix
from onnxq_plugins.edge.page import LEGEND, page
from onnxq_plugins.engine import Result
from onnxq_plugins.engine.targets import Retargeted
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import write_file
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.report.diagnosis import samples_of

_WRITERS: dict[str, Callable[[Matrix, str], str]] = {
    ".html": page,
    ".json": lambda found, title: json.dumps({"model": title, **found.to_dict()}, indent=2) + "\n",
    ".md": lambda found, title: f"# {title}\n\n{found.samples} samples; {found.machine}.\n\n{found.markdown()}",
}


_FEW = 8  # samples that runtimes run for a report


def matrix_command(
    model: Model,
    *,
    data: DataPath = "",
    test: Annotated[
        str, data_option(metavar="PATH", show_default=False, help="samples to judge by; --data by default")
    ] = "",
    samples: Annotated[int, data_option(help="that every runtime runs")] = SAMPLES,
    images: ImageOptions,
    recipes: Annotated[str, typer.Option(metavar="A,B", help="recipes")] = "int8",
    runtimes: Annotated[str, typer.Option(metavar="A,B", show_default=False, help="runtimes; all by default")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="RUNTIME.KEY=VALUE",
            show_default=False,
            help="a setting of a runtime, such as qnn.python=PATH or web.modules=FOLDER",
        ),
    ] = None,
    output: Annotated[
        Path | None, output_option("-o", "--output", show_default=False, help="also as .html, .json or .md")
    ] = None,
    custom_ops: CustomOps = None,
) -> None:
    """Quantize MODEL by each recipe for each target that names a runtime, run every file there, and compare.

    A runtime that is not installed is a row that says how to install it.
    """
    if not data:
        raise OnnxqError("matrix needs samples; give --data.")
    if output is not None and output.suffix not in _WRITERS:
        raise OnnxqError(f"-o {output}: give a name that ends with {', '.join(_WRITERS)}.")
    check_outputs({"-o": output}, {"model": model})
    found = matrix(
        model,
        data,
        recipes=_names(recipes),
        runtimes=_names(runtimes),
        test=test or None,
        options=images.data_options(),
        settings=runtime_tables(settings or []),
        samples=samples,
        track=track,
    )
    _show(found)
    if output is not None:
        write_file(_WRITERS[output.suffix](found, model.name).encode(), output)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def runtime_tables(given: list[str]) -> dict[str, dict[str, str]]:
    """RUNTIME.KEY=VALUE as tables. Raises OnnxqError for anything else."""
    tables: dict[str, dict[str, str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        runtime, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise OnnxqError(f"--set {text}: give RUNTIME.KEY=VALUE, such as --set qnn.soc_model=60.")
        tables.setdefault(runtime, {})[key] = value.strip()
    return tables


def add_runtimes(result: Result, others: Mapping[str, Retargeted], data: Data | None, track: Track = silent) -> None:
    """Add what the runtimes of a result's targets say to its report, if they have kernels of their own or are several.

    others   the result for further targets
    data     samples to judge by; None for those that it was calibrated with
    """
    made: list[Result | Retargeted] = [result, *others.values()]
    if not others and not result.target.own_kernels:
        return
    pairs = [(one.target, one.model) for one in made]
    try:
        found = in_runtimes(
            result.recipe_name or "of your own", pairs, result.original, samples_of(result, data), None, _FEW, track
        )
    except OnnxqError as error:
        result.report.add_section("Runtimes", f"Not asked: {error}")
        return
    whose = "" if data else ", of those that it was calibrated with"
    text = f"{LEGEND} {found.samples} samples{whose}; {found.machine}. onnxq matrix asks all runtimes."
    if found.cells:
        result.report.add_section("Runtimes", text, COLUMNS[1:], [[*map(_value, cell.row()[1:])] for cell in found.cells])


def _value(text: str) -> str | int | float:
    """A number where a cell is one, so that pages set it like one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _show(found: Matrix) -> None:
    table = Table(*COLUMNS, box=None, header_style="bold")
    for column in table.columns[3:10]:
        column.justify = "right"
    for cell in found.cells:
        table.add_row(*map(escape, cell.row()), style=None if cell.proof else "yellow")
    show(table)
    echo(f"\n{found.samples} samples; {found.machine}; dB: of the worst output, against onnxruntime; ms: 1 thread")
