"""Limits that a model must keep in a CI job: options, exit code 1 for what misses them, JUnit XML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer

from onnxq_plugins.cli.console import notify
from onnxq_plugins.cli.options import OptionGroup, output_option, search_option
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import write_file


@dataclass(frozen=True)
class LimitOptions(OptionGroup):
    """What B must keep beside A; exit code 1 otherwise."""

    min_sqnr: Annotated[
        float | None, search_option(show_default=False, help="dB that each output must have; exit code 1 if one has less")
    ] = None
    max_drop: Annotated[
        float | None,
        search_option(show_default=False, help="how far the metric may fall, in its own units; needs --metric or labels"),
    ] = None
    min_speed: Annotated[
        float | None, search_option(show_default=False, help="times the reference that it must run at; exit code 1 if not")
    ] = None
    junit: Annotated[
        Path | None, output_option(metavar="OUT.xml", show_default=False, help="write each limit as a test of JUnit")
    ] = None

    def enforce(self, name: str, sqnr: float | None, drop: float | None, speed: float) -> None:
        """Say which limits a model of that name misses, and exit with 1 if there is one. Raises OnnxqError for a limit on
        what was not measured."""
        if not _report(self._judged(sqnr, drop, speed), name, self.junit):
            raise typer.Exit(1)

    def _judged(self, sqnr: float | None, drop: float | None, speed: float) -> list[tuple[str, str]]:
        """Each limit in words, and what misses it in a sentence; "" if nothing does."""
        if self.max_drop is not None and drop is None:
            raise OnnxqError("--max-drop needs a --metric, or labels of classes.")
        if self.min_sqnr is not None and sqnr is None:
            raise OnnxqError("--min-sqnr needs an output of floats; use --metric and --max-drop.")
        rows = []
        if self.min_sqnr is not None and sqnr is not None:
            kept = sqnr >= self.min_sqnr
            rows.append((f"SQNR of {self.min_sqnr:g} dB", "" if kept else f"the worst output has {sqnr:.2f} dB"))
        if self.max_drop is not None and drop is not None:
            kept = drop <= self.max_drop
            rows.append((f"drop of at most {self.max_drop:g}", "" if kept else f"the metric falls by {drop:.2f}"))
        if self.min_speed is not None:
            kept = speed >= self.min_speed
            rows.append((f"{self.min_speed:g} times the speed", "" if kept else f"it has {speed:.2f} times the speed"))
        return rows


def _report(rows: Sequence[tuple[str, str]], name: str, junit: Path | None) -> bool:
    """Say which limits are missed, and write all to a file of JUnit; True if none is."""
    for limit, missed in rows:
        if missed:
            notify(f"missed: {limit}: {missed}")
    failures = sum(bool(missed) for _, missed in rows)
    if junit is not None:
        suite = ElementTree.Element("testsuite", name="onnxq", tests=str(len(rows)), failures=str(failures))
        for limit, missed in rows:
            case = ElementTree.SubElement(suite, "testcase", classname=name, name=limit)
            if missed:
                ElementTree.SubElement(case, "failure", message=missed)
        write_file(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True), junit)
    return not failures
