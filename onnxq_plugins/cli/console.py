"""How commands speak: results on standard output, notes and errors on standard error."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from onnxq_plugins.errors import OnnxqError

# a pipe or file has no width to keep to
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command; Ctrl-C in it ends with one line and exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BaseException as error:
            if not _interrupted(error):
                raise
            notify("interrupted; nothing was written (with --cache, finished statistics are kept)")
            raise typer.Exit(130) from None

    return run


def _interrupted(error: BaseException | None) -> bool:
    """True for Ctrl-C, also where it hit something that then failed in its own way (a lock, a pass)."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def echo(text: str | None) -> None:
    """Print a result on standard output, exactly as it is."""
    out.print(text, highlight=False, markup=False)


def notify(text: str) -> None:
    """Print a note on standard error, exactly as it is."""
    err.print(text, highlight=False, markup=False)


def show(table: Table) -> None:
    """Print a table on standard output."""
    out.print(table)


def fail(error: OnnxqError, code: int) -> NoReturn:
    """Print each problem as a line on standard error, and exit."""
    for problem in error.problems:
        notify(f"error: {problem}")
    sys.exit(code)


def columns() -> int | None:
    """Width of the terminal; None where standard output is none."""
    return out.width if out.is_terminal else None


def float_lines(floats: Mapping[str, str]) -> list[str]:
    """One line for each reason why layers and constants stay float.

    floats   layer, or operator that reads a constant -> reason
    """
    layers: dict[str, list[str]] = {}
    for name, reason in floats.items():
        layers.setdefault(reason, []).append(name)
    return [f"float: {few(names)}: {reason}" for reason, names in layers.items()]


def few(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A progress bar on standard error, if that is a terminal; else a line there when the loop has taken 10 seconds, 20, 40
    and so on, which says how long it will take."""
    if not err.is_terminal:
        yield from _told(items, what, total)
        return
    layout = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*layout, console=err, transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


def _told(items: Iterable[Any], what: str, total: int | None) -> Iterable[Any]:
    start, due = time.monotonic(), _FIRST
    for done, item in enumerate(items):
        seconds = time.monotonic() - start
        if seconds >= due and done:
            rest = f", about {seconds / done * (total - done):.0f} s more" if total else ""
            notify(f"{what}: {done}{f' of {total}' if total else ''} after {seconds:.0f} s{rest}")
            due = 2 * seconds
        yield item


_FIRST = 10.0  # seconds
