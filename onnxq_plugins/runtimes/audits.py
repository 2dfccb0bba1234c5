"""`audit`: which kernels run a model, in either runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data import DataOptions, Source, model_inputs, open_data
from onnxq_plugins.errors import TABLE, TEXT, OnnxqError, expects
from onnxq_plugins.errors import known as known_names
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.models import Model, as_model
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.runtimes.openvino import audit_openvino

RUNTIMES = ("onnxruntime", "openvino")


@expects(runtime=TEXT, shapes=TABLE)
def audit(
    model: Model,
    against: Model | None = None,
    *,
    runtime: str = "onnxruntime",
    data: Source | None = None,
    options: DataOptions | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Audit:
    """Which kernel runs each layer of a model, and why if that is a float kernel.

    model     QDQ (or any) model: a path, ModelProto, bytes, Graph, ONNXProgram or onnx_ir.Model
    against   the float model: both are timed, in turn, one thread
    runtime   onnxruntime or openvino, which needs the extra of that name and times nothing
    data, options, shapes   samples, or shapes of inputs, to time the models on

    Raises OnnxqError for what is no model, and if the runtime cannot load or run it.
    """
    if runtime not in RUNTIMES:
        raise OnnxqError(f"runtime '{runtime}' is unknown; {known_names(runtime, RUNTIMES)}.")
    if runtime == "openvino" and not (against is None and data is None and not shapes):
        raise OnnxqError(
            "--against, --data and --shape are for times in onnxruntime; leave them out beside --runtime openvino "
            "(OpenVINO's own benchmark_app measures there)."
        )
    known, other = file_or_proto(model), None if against is None else file_or_proto(against)
    if runtime == "openvino":
        return _openvino(known)
    feeds = None
    if data is not None:
        inputs = model_inputs(read(known) if isinstance(known, Path) else known)
        feeds = runtimes.rolled(open_data(data, inputs, options), lambda: runtimes.session(known))
    return audit_model(known, other, data=feeds, shapes=dict(shapes) if shapes else None)


def file_or_proto(model: Model) -> Path | onnx.ModelProto:
    """A model as runtimes take it. Raises OnnxqError for what is none."""
    known: Any = as_model(model)
    if isinstance(known, Path):
        read(known)
    return known.model() if isinstance(known, Graph) else known


def _openvino(model: Path | onnx.ModelProto) -> Audit:
    if isinstance(model, Path):
        return audit_openvino(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save(model, str(path))
        return audit_openvino(path)
