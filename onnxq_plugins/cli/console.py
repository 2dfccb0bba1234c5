"""What all commands share: the application, how they register, and how they speak."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from onnxq_plugins.errors import OnnxqError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize ONNX models so that they really run in integer kernels.",
)
# in a pipe or file there is no width to keep to
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command; Ctrl-C in it ends with one line and exit code 130."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except BaseException as error:
                if not _interrupted(error):
                    raise
                tell("interrupted; nothing was written (with --cache, finished statistics are kept)")
                raise typer.Exit(130) from None

        app.command(name)(run)
        return function

    return register


def _interrupted(error: BaseException | None) -> bool:
    """True for Ctrl-C, also where it came in the middle of something that then failed (a lock, a pass)."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def say(text: str | None) -> None:
    """A result, on standard output, exactly as it is."""
    out.print(text, highlight=False, markup=False)


def tell(text: str) -> None:
    """A remark, on standard error, exactly as it is."""
    err.print(text, highlight=False, markup=False)


def show(table: Table) -> None:
    """A table, on standard output."""
    out.print(table)


def complain(error: OnnxqError, code: int) -> None:
    for problem in error.problems:
        tell(f"error: {problem}")
    sys.exit(code)


def float_lines(floats: Mapping[str, str]) -> list[str]:
    """One line for each reason why layers stay float."""
    by_reason: dict[str, list[str]] = {}
    for name, why in floats.items():
        by_reason.setdefault(why, []).append(name)
    return [
        f"float: {', '.join(names[:4])}{f' and {len(names) - 4} more layers' if len(names) > 4 else ''}: {why}"
        for why, names in by_reason.items()
    ]


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A progress bar on standard error, if that is a terminal."""
    if not err.is_terminal:
        yield from items
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield from progress.track(items, total=total, description=what)
