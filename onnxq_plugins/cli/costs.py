"""The command that lists and measures what kernels cost: costs."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxq_plugins.cli.console import echo, track
from onnxq_plugins.export.kernel_times import measured, table
from onnxq_plugins.runtimes.costs import read_own, table_of, tables, write_own
from onnxq_plugins.runtimes.machine import machine_name

_NO_TABLE = "none is of this machine's instruction set: models that run on it are placed by the one that their target names"


def costs_command(
    measure: Annotated[
        bool, typer.Option("--measure", help="time kernels on this machine, and keep the table for pass placement")
    ] = False,
    rounds: Annotated[int, typer.Option(help="of --measure: a second or two each", min=2)] = 24,
) -> None:
    """List the tables of what kernels cost, by which pass placement decides, or measure this machine's own."""
    if measure:
        file = write_own(table(measured(rounds, seconds=0.4, track=track)))
        echo(f"measured: {machine_name()}\nkept in '{file}': pass placement uses it from now on")
        return
    own = read_own()
    used = table_of("", here=True)
    for costs in (*tables().values(), *([own] if own is not None else [])):
        echo(f"{'*' if used is not None and costs.name == used.name else ' '} {costs.name}: {costs.source}")
    echo("* used by pass placement for models that run on this machine" if used is not None else _NO_TABLE)
    if own is None:
        echo("onnxq costs --measure makes a table of this machine's own")
