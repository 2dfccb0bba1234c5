"""The command line. Exit codes: 0 done, 1 something failed inside, 2 the input cannot be used, 130 interrupted."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from onnxq_plugins import __version__, runtimes
from onnxq_plugins.cli.audit import audit_command
from onnxq_plugins.cli.checking import check_command
from onnxq_plugins.cli.choice import auto_command
from onnxq_plugins.cli.comparing import compare_command
from onnxq_plugins.cli.console import echo, fail, interruptible
from onnxq_plugins.cli.costs import costs_command
from onnxq_plugins.cli.exporting import export_command
from onnxq_plugins.cli.inspection import diagnose_command
from onnxq_plugins.cli.inventory import plugins_command, recipes_command
from onnxq_plugins.cli.matrix import matrix_command
from onnxq_plugins.cli.new_plugin import new_plugin_command
from onnxq_plugins.cli.options import flatten
from onnxq_plugins.cli.quantization import quantize_command
from onnxq_plugins.cli.quickstart import quickstart_command
from onnxq_plugins.errors import OnnxqError, OnnxqWarning
from onnxq_plugins.laws import LawBroken

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: dict[str, Callable[..., None]] = {  # in the order of --help
    "quantize": quantize_command,
    "export": export_command,
    "auto": auto_command,
    "audit": audit_command,
    "matrix": matrix_command,
    "diagnose": diagnose_command,
    "compare": compare_command,
    "plugins": plugins_command,
    "new-plugin": new_plugin_command,
    "recipes": recipes_command,
    "costs": costs_command,
    "check": check_command,
    "quickstart": quickstart_command,
}
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize ONNX models so that they really run in integer kernels.",
)
for _name, _command in COMMANDS.items():
    app.command(_name)(flatten(interruptible(_command)))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False) -> None:
    if version:
        echo(f"onnxq-plugins {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; problems with the input become one line each on standard error."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's: what is not finite is an error of its own
    warnings.filterwarnings("ignore", category=OnnxqWarning)  # commands print them in their own form
    runtimes.quiet()
    try:
        app()
    except LawBroken as error:
        if error.__cause__ is not None:  # the pass's author wants to see where it failed
            traceback.print_exception(error.__cause__, limit=-3)
        fail(error, 1)
    except OnnxqError as error:
        fail(error, 2)
