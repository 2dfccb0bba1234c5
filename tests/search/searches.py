"""Searches of widths in a few steps."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from onnxq_plugins.job import Job
from onnxq_plugins.passes.mixed_precision import MixedPrecision
from onnxq_plugins.search.quantizers import parse_widths
from onnxq_plugins.search.widths import Widths
from tests.jobs import make_job

SMALL = ["cnn", "mobilenet", "inception", "mlp", "transformer", "resnet20"]


def make_widths(model: onnx.ModelProto, candidates: Sequence[str] = ("W4A8", "W8A8"), recipe: dict | None = None) -> Widths:
    job = make_job(model, recipe)
    widths = Widths(job, parse_widths(candidates), next(iter(job.calibration.data)))
    widths.round("nearest", job.calibration.data)
    return widths


def search(job: Job, **parameters) -> dict:
    """Run the pass on a job."""
    return MixedPrecision(**{"method": "nearest", "curve": 2, **parameters}).apply(job)


def recipe_of(target: str = "ort-cpu", behind: Sequence[dict] = (), **parameters) -> dict:
    step = {"use": "mixed-precision", "method": "nearest", "curve": 2, **parameters}
    return {"target": target, "pass": [step, *behind]}
