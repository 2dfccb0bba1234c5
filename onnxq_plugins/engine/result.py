"""What `quantize` returns."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins import files
from onnxq_plugins.data import Source
from onnxq_plugins.engine.plans import Solved
from onnxq_plugins.errors import PATH, counted, expects
from onnxq_plugins.job import Outcome
from onnxq_plugins.report.check import Check
from onnxq_plugins.report.page import write_report
from onnxq_plugins.targets import Target


def save(target: Target, model: onnx.ModelProto, path: Path) -> Path:
    """Write a QDQ model in the format of a target, whole or not at all; as it is under a name that ends in .onnx where the
    target's do not."""
    if target.write is None or path.suffix == ".onnx" != target.suffix:
        return files.save_model(model, path)
    files.check_writable(path)
    return files.write_file(encoded(target, model), path)


def encoded(target: Target, model: onnx.ModelProto) -> bytes:
    """A QDQ model in the format of a target."""
    return model.SerializeToString() if target.write is None else target.write(model, target.settings)


@dataclass(frozen=True, eq=False)
class Result(Outcome):
    """What `quantize` returns: what the job leaves (see the fields of `Outcome`), ready to be saved and shown.

    check    the quantized network beside the user's own model; None if nothing was checked
    missed   what was insisted on (`min_sqnr`, `min_speed`) and not reached, in a sentence; "" if all was
    """

    check: Check | None = None
    missed: str = ""

    @expects(path=PATH)
    def save(self, path: str | Path) -> Path:
        """Write the model in the target's format; an existing file is replaced only when the new one is complete."""
        return save(self.target, self.model, Path(path))

    @expects(path=PATH)
    def save_plan(self, path: str | Path) -> Path:
        """Write the solved plan with all that `retarget` needs to write the network for other targets, without samples: the
        float network after the passes, values and codes, the recipe, and the ranges of what is in float, for which the
        samples are run once."""
        return Solved.of(self).write(Path(path))

    @expects(path=PATH)
    def save_report(self, path: str | Path, data: Source | None = None, **options: Any) -> Path:
        """Write what was done and how good it is as one page of HTML, and the same beside it as JSON; see
        `onnxq_plugins.report.write_report`. Needs the extra ``report``."""
        return write_report(self, Path(path), data, **options)

    def __repr__(self) -> str:
        """The summary, and what the user should know: a warning or a note a line."""
        lines = [f"missed: {self.missed}"] if self.missed else []
        lines += [*(f"warning: {text}" for text in self.report.warnings), *(f"note: {note}" for note in self.report.notes)]
        return f"<Result: {self.summary}" + "".join(f"\n {line}" for line in lines) + ">"

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary, warnings and notes, and the layers in a fold."""
        columns = ("name", "op", "weights", "bits_per_weight", "kernel", *self.report.columns, "why_float")
        layers = self.report.layers
        rows = ("".join(f"<td>{escape(str(row.get(key, '')))}</td>" for key in columns) for row in layers)
        head = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in columns)
        notes = "".join(f"<li><strong>{escape(text)}</strong></li>" for text in (*self.report.warnings, self.missed) if text)
        notes += "".join(f"<li>{escape(note)}</li>" for note in self.report.notes)
        return (
            f"<p>{escape(self.summary)}</p>{f'<ul>{notes}</ul>' if notes else ''}<details>"
            f"<summary>{counted(len(layers), 'layer')}</summary>"
            f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></details>"
        )
