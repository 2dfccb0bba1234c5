"""`onnxq quickstart`: quantize the embedded digits model and show what that gave, without any file of the user's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.report.page import check_page
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
    kernels: str


def quickstart(folder: Path, recipe: str = "int8", track: Track = silent) -> tuple[list[Row], Path | None]:
    """Quantize scikit-learn's digits model into `folder`; rows for the float and the quantized model, measured on
    the 450 test images that neither training nor calibration saw; and the report page, if the extra ``report`` is there.
    Also leaves calibration.npz there, to try `onnxq quantize` by hand."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = digits_split()
        original = Path(shutil.copy(digits_model_path(), folder / "digits.onnx"))
        np.savez(folder / "calibration.npz", image=data["calibration_images"])
        np.savez(folder / "test.npz", image=data["test_images"], labels=data["test_labels"])
    except OSError as error:
        raise OnnxqError(f"folder '{folder}' cannot be written: {error.strerror}; choose another with -o.") from error
    target = folder / f"digits.{Path(recipe).stem}.onnx"
    result = quantize(original, recipe, data["calibration_images"], output=target, track=track)
    runners = [runtimes.session(original), runtimes.session(target)]
    times = runtimes.latency(runners, {"image": data["test_images"][:1]})
    reference = runtimes.outputs(runners[0], [{"image": data["test_images"]}])[0]
    rows = []
    for name, path, runner, ms, kernels in zip(
        ("float", Path(recipe).stem),
        (original, target),
        runners,
        times,
        ("", result.summary.partition(" | ")[0]),
        strict=True,
    ):
        made = runtimes.outputs(runner, [{"image": data["test_images"]}])[0]
        rows.append(Row(name, path, _accuracy(made, data), runtimes.sqnr(reference, made), path.stat().st_size, ms, kernels))
    try:
        check_page()
    except OnnxqError:
        return rows, None
    return rows, result.save_report(
        folder / "report.html",
        name="digits.onnx",
        track=track,
        command=(
            f"onnxq quantize {original} -r {recipe} --data {folder / 'calibration.npz'} --report {folder / 'report.html'}"
        ),
    )


def _accuracy(logits: Array, data: Mapping[str, Array]) -> float:
    return float(np.mean(np.argmax(logits, axis=1) == data["test_labels"]))
