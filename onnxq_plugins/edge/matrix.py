"""The matrix of a model: each recipe, written for each target that names a runtime, and proven in that runtime."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins.data import Data, DataOptions, Source, model_inputs, open_data
from onnxq_plugins.edge.audits import SAMPLES
from onnxq_plugins.edge.known import told
from onnxq_plugins.edge.proof import Outputs, distance, expected, gathered, prove
from onnxq_plugins.engine import quantize
from onnxq_plugins.engine.result import save
from onnxq_plugins.errors import OnnxqError, OnnxqWarning, known
from onnxq_plugins.graph.models import Model
from onnxq_plugins.graph.reading import read
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.runtimes.audits import file_or_proto
from onnxq_plugins.runtimes.machine import machine_name
from onnxq_plugins.runtimes.onnxruntime import ONNXRUNTIME
from onnxq_plugins.runtimes.runtime import Proof, Runtime
from onnxq_plugins.spec import Array
from onnxq_plugins.targets import Target

FLOAT = "float"  # the recipe of the row that is the model itself
COLUMNS = ("recipe", "target", "runtime", "integer", "fake", "float", "same class %", "dB", "dB float", "ms", "note")
_NAMED = 4  # operators in a note


@dataclass(frozen=True)
class Cell:
    """A recipe for a target in its runtime.

    proof      what the runtime said; None if there is no file, or it does not load
    why        the reason then, a sentence
    decibels   of the worst output, against the float model in onnxruntime
    agreement  percent of samples with the float model's class; None without classes
    """

    recipe: str
    target: str
    runtime: str
    proof: Proof | None = None
    why: str = ""
    decibels: float | None = None
    agreement: float | None = None

    @property
    def note(self) -> str:
        """Why there is nothing, or which operators do not run in integers, and where else than they should."""
        if self.proof is None:
            return self.why
        parts = []
        for kind, words in (("fake", "decoded and computed in float"), (FLOAT, "float in the file")):
            ops = Counter(each.op for each in self.proof.inspection.operators if each.kind == kind)
            if ops and self.recipe != FLOAT:
                parts.append(f"{words}: {_named(ops.elements())}")
        explained = [each for each in self.proof.inspection.operators if each.why]
        for why, _ in Counter(each.why for each in explained).most_common(_NAMED):
            parts.append(f"{why}: {_named(each.op for each in explained if each.why == why)}")
        facts = self.proof.inspection.facts
        parts += [f"{name} {value}" for name, value in facts.items() if name != "version" and value not in ("", None)]
        return "; ".join(parts)

    def row(self) -> tuple[str, ...]:
        """Cells as text, in the order of `COLUMNS`."""
        if self.proof is None:
            return (self.recipe, self.target, self.runtime, *[""] * 7, self.note)
        counts = self.proof.inspection.counts()
        numbers = [str(counts.get(kind, 0) or "") for kind in ("integer", "fake", FLOAT)]
        shown = [_number(self.agreement, 1), _decibels(self.proof), _number(self.decibels, 1)]
        time = _number(self.proof.inspection.milliseconds, 2)
        return (self.recipe, self.target, self.runtime, *numbers, *shown, time, self.note.removeprefix("; "))


def _named(ops: Iterable[str]) -> str:
    """Operators in words, those that there are most of."""
    counts = Counter(ops)
    return ", ".join(f"{n} {op}" for op, n in counts.most_common(_NAMED)) + ", ..." * (len(counts) > _NAMED)


@dataclass(frozen=True)
class Matrix:
    """The cells of a model, the float model in onnxruntime first.

    samples   that every runtime ran
    machine   and version of onnxruntime, for readers
    """

    cells: tuple[Cell, ...]
    samples: int
    machine: str

    def rows(self) -> list[tuple[str, ...]]:
        """As text."""
        return [cell.row() for cell in self.cells]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows()]
        return {"machine": self.machine, "samples": self.samples, "cells": rows}

    def markdown(self) -> str:
        """As a table of a page."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *([text.replace("|", "\\|") for text in row] for row in self.rows())]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def matrix(
    model: Model,
    data: Source,
    *,
    recipes: Sequence[str] = ("int8",),
    runtimes: Iterable[str] = (),
    test: Source | None = None,
    options: DataOptions | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    samples: int = SAMPLES,
    track: Track = silent,
) -> Matrix:
    """Quantize a model by each recipe for each target that names a runtime, and prove every file by running it.

    model     a float model, as `quantize` takes it
    data      samples to calibrate with, and `test` those to judge by: `samples` of them, of the first sample's shape
    runtimes  names; all by default. One that is not installed is a cell that says so
    settings  of runtimes: runtime -> its settings

    Raises OnnxqError for what is no model, no data, no recipe or no runtime.
    """
    plugins = find_plugins()
    columns = [target for target in plugins.targets.values() if target.runtime is not None]
    names = {target.runtime.name for target in columns if target.runtime is not None}
    wanted, given = [*runtimes], settings or {}
    OnnxqError.check(f"runtime '{n}' is unknown; {known(n, sorted(names))}." for n in [*wanted, *given] if n not in names)
    for recipe in recipes:
        plugins.recipe(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        source = _source(model, Path(scratch))
        inputs = model_inputs(read(source))
        calibration = open_data(data, inputs, options)
        feeds = _alike(calibration if test is None else open_data(test, inputs, options), samples)
        proving = _Proving(source, Path(scratch), feeds, given, calibration)
        cells = [proving.float_cell()]
        todo = [
            (recipe, target, target.runtime)
            for recipe in recipes
            for target in columns
            if target.runtime is not None and (not wanted or target.runtime.name in wanted)
        ]
        cells += [proving.cell(*each) for each in track(todo, "asking runtimes", len(todo))]
    return Matrix(tuple(cells), len(feeds), machine_name())


def in_runtimes(
    recipe: str,
    made: Iterable[tuple[Target, onnx.ModelProto]],
    model: Model,
    data: Data,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    samples: int = SAMPLES,
    track: Track = silent,
) -> Matrix:
    """The matrix of what a recipe has made already: a QDQ model for each target. Targets without a runtime are left out.

    model   the float model
    data    samples to judge by, as for `matrix`

    Raises OnnxqError if onnxruntime does not run the float model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, feeds = _source(model, Path(scratch)), _alike(data, samples)
        proving = _Proving(source, Path(scratch), feeds, settings or {})
        todo = [(recipe, target, target.runtime, one) for target, one in made if target.runtime is not None]
        cells = tuple(proving.proven(*each) for each in track(todo, "asking runtimes", len(todo)))
    return Matrix(cells, len(feeds), machine_name())


class _Proving:
    """A float model, the samples to judge by, and what onnxruntime says of them."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        feeds: list[Mapping[str, Array]],
        given: Mapping[str, Any],
        calibration: Data | None = None,
    ) -> None:
        self.source, self.folder, self.feeds, self.given, self.calibration = source, folder, feeds, given, calibration
        self.names, self.exact = expected(source, feeds)
        self.missing: dict[str, str] = {}  # runtime -> that it is not installed
        self.made: list[tuple[str, Target, onnx.ModelProto]] = []  # by recipe and target

    def float_cell(self) -> Cell:
        """The float model in onnxruntime."""
        proof = prove(ONNXRUNTIME, self.source, self.feeds, told(ONNXRUNTIME, {}))
        return Cell(FLOAT, "", ONNXRUNTIME.name, proof)

    def cell(self, recipe: str, target: Target, runtime: Runtime) -> Cell:
        """A recipe for a target, quantized, written and run."""
        try:
            if why := runtime.missing(told(runtime, self.given.get(runtime.name, {}))):
                self.missing[runtime.name] = why
            made = None if runtime.name in self.missing else self._quantized(recipe, target)
        except OnnxqError as error:
            return self._failed(recipe, target, runtime, error)
        return self.proven(recipe, target, runtime, made)

    def proven(self, recipe: str, target: Target, runtime: Runtime, made: onnx.ModelProto | None) -> Cell:
        """What is made for a target, written and run; None where the runtime is missing."""
        if runtime.name in self.missing or made is None:
            return Cell(recipe, target.name, runtime.name, why=self.missing[runtime.name])
        given = {key: value for key, value in target.settings.items() if key in runtime.settings}
        try:
            onnx.save(made, str(beside := self.folder / "quantized.onnx"))
            file = save(target, made, self.folder / f"{target.name}{target.suffix}")
            proof = prove(runtime, file, self.feeds, told(runtime, given | {**self.given.get(runtime.name, {})}), beside)
            theirs = proof.inspection.outputs
            agreement, decibels = distance(self.exact, self._ordered(theirs)) if theirs else (None, None)
        except OnnxqError as error:
            return self._failed(recipe, target, runtime, error)
        return Cell(recipe, target.name, runtime.name, proof, "", decibels, agreement)

    def _failed(self, recipe: str, target: Target, runtime: Runtime, error: OnnxqError) -> Cell:
        why = " ".join(error.problems)
        if runtime.install in why:
            self.missing[runtime.name] = why
        return Cell(recipe, target.name, runtime.name, why=why)

    def _quantized(self, recipe: str, target: Target) -> onnx.ModelProto:
        """What was made for a target that differs in the format alone, or else made now; statistics are shared by all."""
        rules = replace(target, name="", doc="", write=None, runtime=None, configure=None, suffix="")
        known = next((made for name, same, made in self.made if name == recipe and same == rules), None)
        if known is not None:
            return known
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OnnxqWarning)
            cache = self.folder / "calibration"
            made = quantize(self.source, recipe, self.calibration, target=target.name, cache=cache, check=False).model
        self.made.append((recipe, rules, made))
        return made

    def _ordered(self, outputs: Sequence[Mapping[str, Array]]) -> Outputs:
        return gathered(self.names, outputs)


def _source(model: Model, folder: Path) -> Path:
    known_model = file_or_proto(model)
    if isinstance(known_model, Path):
        return known_model
    onnx.save(known_model, str(path := folder / "float.onnx"))
    return path


def _alike(data: Data, samples: int) -> list[Mapping[str, Array]]:
    """The first samples that have the first one's shapes: many runtimes are of fixed shapes."""
    found: list[Mapping[str, Array]] = []
    for feed in data:
        if not found or {n: x.shape for n, x in feed.items()} == {n: x.shape for n, x in found[0].items()}:
            found.append(feed)
        if len(found) == samples:
            break
    return found


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _decibels(proof: Proof) -> str:
    return "identical" if proof.identical else _number(proof.decibels, 1)
