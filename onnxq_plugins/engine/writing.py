"""The end of a job: its plan becomes a model, which is checked, signed, summarized and written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import files
from onnxq_plugins.data import Data
from onnxq_plugins.engine.plans import sample_shapes
from onnxq_plugins.engine.result import Result, save
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.compact import compact
from onnxq_plugins.export.provenance import sign
from onnxq_plugins.export.qdq import export
from onnxq_plugins.export.static import fix_shapes
from onnxq_plugins.graph.opsets import NARROW_OPSET, opset_of
from onnxq_plugins.job import Job
from onnxq_plugins.laws import exporting
from onnxq_plugins.layers.branches import Inside, quantize_branches
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plugins import Plugins
from onnxq_plugins.report.check import Check
from onnxq_plugins.report.goals import Goals
from onnxq_plugins.report.summary import describe, set_size
from onnxq_plugins.targets.refusals import problems

_WILD = 8.0  # times the magnitude that any other sample has


def _open_shapes(data: Data | None) -> dict[str, list[int]]:
    """The shapes of the first sample, where the model leaves open more than a batch of 1."""
    if data is None or all(i.shape is not None and all(isinstance(n, int) for n in i.shape[1:]) for i in data.inputs):
        return {}
    return {name: list(x.shape) for name, x in next(iter(data)).items() if isinstance(x, np.ndarray)}


def export_job(
    job: Job,
    plugins: Plugins,
    before: int,
    path: Path | None,
    goals: Goals,
    check: Callable[..., Check | None] | None,
    again: partial[Result],
) -> tuple[onnx.ModelProto, dict[str, str], Check | None, str, Inside]:
    """Make the model of a complete plan, check it and write it to `path`; the report is complete then. Returns it, the
    tensors of the graph that have other names there (see `Outcome.names`), the check, what it misses of the goals (it is
    not written then), and what is inside control flow.

    before   bytes of the user's own model
    check    `self_check` of a model; None to leave that out
    again    `quantize` with the same model and options
    """
    start = time.perf_counter()
    planned = Planned.of(job)
    inputs = {layer.name: planned.input(layer) for layer in planned.layers}
    OnnxqError.check(problems(job.target, job.graph, job.plan, inputs))
    if text := _outlier(job, planned.activations):
        job.note(text)
    if widened := job.report.pop("widened", {}):
        channels, layers = (
            f"{n} {what}{'s' * (n > 1)}"
            for n, what in ((sum(widened.values()), "nearly empty channel"), (len(widened), "layer"))
        )
        job.note(f"scales of {channels} in {layers} were widened so that their biases fit int32")
    large = path is not None and job.graph.mapped.size > files.LARGE and job.target.write is None
    data = files.DataFile(path) if path is not None and large else None
    with data or contextlib.nullcontext():
        model = export(job.graph, job.plan, job.target, data=data)
        quantize = partial(again.func, **_options_within(again))
        inner = Inside() if data is not None else quantize_branches(job, model, quantize)
        shown = compact(model, {node.name for node in job.graph.nodes}, again.keywords["names"], folds=job.target.here)
        model = exporting(plugins, job, model, beside=data is not None)
        if text := _newer_version(job, model):
            job.note(text)
        parts = [f"target {job.recipe.target}", *(f"pass {step.name}" for step in job.recipe.passes)]
        sources = (plugins.sources[part] for part in parts)
        seed, shapes = again.keywords["seed"], _open_shapes(job.calibration.data)
        sign(model, job.recipe, seed, sources, plugins.versions, shapes, job.report.floats)
        job.report["steps"].append({"pass": "export", "seconds": round(time.perf_counter() - start, 3)})
        describe(job, model, data, before, inner)
        checked = None if check is None else check(model, folder=None if data is None else data.path.parent)
        if job.target.static:
            shapes = sample_shapes(job.calibration.data)  # after the check: other samples may have other shapes
            fix_shapes(model, shapes, job.target.name, None if data is None else data.path.parent)
            set_size(job.report, files.size_of(model) + (data.size if data is not None else 0))
        missed = goals.missed(checked, job.report.quality)
        if path is not None and (goals.keep or not missed):
            data.finish(model) if data is not None else save(job.target, model, path)
            if job.target.write is not None:
                set_size(job.report, path.stat().st_size)
    return model, shown, checked, missed, inner


def _newer_version(job: Job, model: onnx.ModelProto) -> str:
    """A note if the result needs a newer opset or IR version than the user's model has; "" if not."""
    (opset, ir), after = job.graph.versions, opset_of(model)
    if after == job.target.opsets[0] > opset > 0:
        return (
            f"opset {opset} became {after} (IR version {model.ir_version}), in which target '{job.target.name}' is written"
        )
    if after > opset > 0 and not job.plan:
        return f"opset {opset} became {after} (IR version {model.ir_version}), the oldest that is written"
    if after > opset > 0:
        reason = "codes of 4 or 16 bits or scales per block" if after == NARROW_OPSET else "one scale per channel"
        return f"opset {opset} became {after} (IR version {model.ir_version}), for {reason}"
    return f"IR version {ir} became {model.ir_version}" if model.ir_version > ir > 0 else ""


def _options_within(again: partial[Result]) -> dict[str, Any]:
    """Those of `quantize` for a part of the model; what it reads from around it keeps its name."""
    return {**{key: again.keywords[key] for key in ("seed", "workers", "plugins", "check")}, "names": "keep"}


def _outlier(job: Job, names: Sequence[str]) -> str:
    """A note if one sample is far beyond all others in one of these tensors; "" if not."""
    furthest = job.calibration.outlier(names) if job.calibration.ready and names else None
    if furthest is None or furthest[2] < _WILD:
        return ""
    return (
        f"sample {furthest[1]} reaches {furthest[2]:.0f} times as far as any other in '{furthest[0]}': ranges that follow "
        "this outlier leave few codes for the rest; remove it, or use --set ranges.method=percentile"
    )
