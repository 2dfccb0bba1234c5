"""Limits that a model must keep in a CI job: options, exit code 1 for what misses them, JUnit XML, Markdown, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer

from onnxq_plugins.cli.console import echo, notify
from onnxq_plugins.cli.options import OptionGroup, check_outputs, output_option, search_option
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import write_file


@dataclass(frozen=True)
class Limit:
    """A limit in words, what was found in words, and whether it is kept."""

    limit: str
    found: str
    kept: bool


@dataclass(frozen=True)
class GateOptions(OptionGroup):
    """Where a command tells which limits a model keeps."""

    junit: Annotated[
        Path | None, output_option(metavar="OUT.xml", show_default=False, help="write each limit as a test of JUnit")
    ] = None
    markdown: Annotated[
        Path | None,
        output_option(metavar="OUT.md", show_default=False, help="append a table of the limits: $GITHUB_STEP_SUMMARY"),
    ] = None
    as_json: Annotated[bool, output_option("--json", help="print JSON")] = False

    def check_files(self, inputs: Mapping[str, Path | None]) -> None:
        """Raise OnnxqError for files that cannot be written, or are inputs."""
        check_outputs({"--junit": self.junit, "--markdown": self.markdown}, inputs)

    def tell(self, name: str, limits: Sequence[Limit], numbers: Mapping[str, Any]) -> None:
        """Say which limits a model of that name misses, in all forms that are asked for; exit with 1 if there is one.

        numbers   what was measured, for --json
        """
        if self.as_json:
            echo(json.dumps({**numbers, "limits": [dataclasses.asdict(each) for each in limits]}, indent=2))
        for each in limits:
            if not each.kept:
                notify(f"missed: {each.limit}: {each.found}")
        if self.junit is not None:
            write_file(_junit(name, limits), self.junit)
        if self.markdown is not None:
            before = self.markdown.read_bytes() if self.markdown.exists() else b""
            write_file(before + _markdown(name, limits).encode(), self.markdown)
        if not all(each.kept for each in limits):
            raise typer.Exit(1)


@dataclass(frozen=True)
class LimitOptions(GateOptions):
    """What a model must keep beside its reference; exit code 1 otherwise."""

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

    @property
    def given(self) -> bool:
        """True if there is a limit."""
        return any(limit is not None for limit in (self.min_sqnr, self.max_drop, self.min_speed))

    def judged(self, sqnr: float | None, drop: float | None, speed: float) -> list[Limit]:
        """The limits that are given. Raises OnnxqError for one on what was not measured.

        sqnr    dB of the worst output
        drop    of the metric
        speed   times the reference
        """
        if self.max_drop is not None and drop is None:
            raise OnnxqError("--max-drop needs a --metric, or labels of classes.")
        if self.min_sqnr is not None and sqnr is None:
            raise OnnxqError("--min-sqnr needs an output of floats; use --metric and --max-drop.")
        found = []
        if self.min_sqnr is not None and sqnr is not None:
            kept = sqnr >= self.min_sqnr
            found.append(Limit(f"SQNR of {self.min_sqnr:g} dB", f"the worst output has {sqnr:.2f} dB", kept))
        if self.max_drop is not None and drop is not None:
            kept = drop <= self.max_drop
            found.append(Limit(f"drop of at most {self.max_drop:g}", f"the metric falls by {drop:.2f}", kept))
        if self.min_speed is not None:
            kept = speed >= self.min_speed
            found.append(Limit(f"{self.min_speed:g} times the speed", f"it has {speed:.2f} times the speed", kept))
        return found


def _junit(name: str, limits: Sequence[Limit]) -> bytes:
    failures = sum(not each.kept for each in limits)
    suite = ElementTree.Element("testsuite", name="onnxq", tests=str(len(limits)), failures=str(failures))
    for each in limits:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=each.limit)
        if not each.kept:
            ElementTree.SubElement(case, "failure", message=each.found)
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def _markdown(name: str, limits: Sequence[Limit]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rows = [f"| {'yes' if each.kept else '**no**'} | {cell(each.limit)} | {cell(each.found)} |" for each in limits]
    kept = sum(each.kept for each in limits)
    table = ["| kept | limit | found |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join([f"### {cell(name)}: {kept} of {len(limits)} limits kept", "", *table, ""])
