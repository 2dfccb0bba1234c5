"""`onnxq quickstart`: quantize the embedded digits model and show the result, without any file of the user's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from onnxq_plugins import measure, runtimes
from onnxq_plugins.calibration import Track, silent
from onnxq_plugins.cli.console import echo, show, track
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.report.page import check_page
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class Row:
    """One model of the comparison: top-1 accuracy (0..1), output SQNR in dB against float, bytes, ms per image."""

    name: str
    path: Path
    accuracy: float
    sqnr: float
    size: int
    milliseconds: float


def quickstart(folder: Path, recipe: str = "int8", track: Track = silent) -> tuple[Row, Row, Path | None]:
    """Quantize scikit-learn's digits model into `folder`.

    Returns the rows of the float and the quantized model, measured on the 450 test images that neither training nor
    calibration used, and the report page, if the extra ``report`` is installed. Writes calibration.npz and test.npz as well,
    to try the commands by hand. Raises OnnxqError if the folder cannot be written.
    """
    data = digits_split()
    images = data["test_images"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        original = Path(shutil.copy(digits_model_path(), folder / "digits.onnx"))
        np.savez(folder / "calibration.npz", image=data["calibration_images"])
        np.savez(folder / "test.npz", image=images, labels=data["test_labels"])
    except OSError as error:
        raise OnnxqError(f"folder '{folder}' cannot be written: {error.strerror}; choose another with -o.") from error
    name = Path(recipe).stem
    path = folder / f"digits.{name}.onnx"
    result = quantize(original, recipe, data["calibration_images"], output=path, track=track, check=False)
    sessions = [runtimes.session(original), runtimes.session(path)]
    milliseconds = runtimes.latency(sessions, {"image": images[:1]})
    reference, logits = (runtimes.outputs(session, [{"image": images}])[0] for session in sessions)
    float_row = Row("float", original, _accuracy(reference, data), np.inf, original.stat().st_size, milliseconds[0])
    sqnr = measure.sqnr(reference, logits)
    quantized_row = Row(name, path, _accuracy(logits, data), sqnr, path.stat().st_size, milliseconds[1])
    try:
        check_page()
    except OnnxqError:
        return float_row, quantized_row, None
    page = folder / "report.html"
    command = f"onnxq quantize {original} -r {recipe} --data {folder / 'calibration.npz'} --report {page}"
    return float_row, quantized_row, result.save_report(page, name="digits.onnx", track=track, command=command)


def _accuracy(logits: Array, data: Mapping[str, Array]) -> float:
    return float(np.mean(np.argmax(logits, axis=1) == data["test_labels"]))


def quickstart_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the models")] = Path("onnxq-quickstart"),
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="a built-in recipe (see onnxq recipes) or a file")] = "int8",
) -> None:
    """Quantize a small digits model that comes with the package, and show the result."""
    original, quantized, page = quickstart(output, recipe, track)
    table = Table("model", "accuracy", "SQNR dB", "KB", "ms", box=None, header_style="bold")
    for row in (original, quantized):
        sqnr = "-" if row is original else f"{row.sqnr:.1f}"
        table.add_row(row.name, f"{100 * row.accuracy:.2f}%", sqnr, f"{row.size / 1e3:.0f}", f"{row.milliseconds:.3f}")
    show(table)
    speed = original.milliseconds / quantized.milliseconds
    small = ": this model is too small to gain, larger ones do" if speed < 1.2 else ""
    echo(f"{audit_model(quantized.path).summary} | {speed:.2f}x the speed of float{small}")
    if page is not None:
        echo(f"layer by layer, with plots: {page}")
    echo(
        f"\n{original.path} and {quantized.path} are yours to look at. Next, by hand:\n"
        f"  onnxq quantize {original.path} --data {output / 'calibration.npz'} -o my.onnx\n"
        f"  onnxq audit my.onnx --against {original.path}\n"
        f"  onnxq compare {original.path} my.onnx --data {output / 'test.npz'}\n"
        f"  onnxq diagnose {original.path} --data {output / 'calibration.npz'}"
    )
