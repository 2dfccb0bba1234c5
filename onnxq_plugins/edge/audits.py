"""`audit`: which kernels run a model, in any runtime."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data import DataOptions, Input, Source, model_inputs, open_data
from onnxq_plugins.edge.known import find_runtime, told
from onnxq_plugins.edge.proof import prove
from onnxq_plugins.errors import TABLE, OnnxqError, Reason, expects
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.models import Model
from onnxq_plugins.graph.reading import read
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.runtimes.audit import Audit, LayerAudit
from onnxq_plugins.runtimes.audits import audit as audit_here
from onnxq_plugins.runtimes.audits import file_or_proto
from onnxq_plugins.runtimes.examples import examples
from onnxq_plugins.runtimes.onnxruntime import ONNXRUNTIME
from onnxq_plugins.runtimes.runtime import Executed, Proof, Runtime
from onnxq_plugins.spec import Array

HERE = "onnxruntime"
SAMPLES = 16  # that a runtime is asked with: simulators are slow


@expects(shapes=TABLE, settings=TABLE)
def audit(
    model: Model,
    against: Model | None = None,
    *,
    runtime: str | Runtime = "",
    data: Source | None = None,
    options: DataOptions | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    settings: Mapping[str, Any] | None = None,
    samples: int = SAMPLES,
) -> Audit:
    """Which kernel runs each layer of a model, and why if that is a float kernel.

    model     QDQ (or any) model: a path, ModelProto, bytes, Graph, ONNXProgram or onnx_ir.Model; the path of a file of
              another format for a runtime that reads it
    against   onnxruntime: the float model; both are timed, in turn, one thread. Other runtimes: the model whose outputs in
              onnxruntime theirs are compared with; the model itself by default, and nothing for a file of another format
    runtime   onnxruntime, openvino, qnn, web, tract, opencv, litert-micro, or one that an installed target brings; or a
              `Runtime`. By default the kernels of onnxruntime; where it is named and there are samples, it is asked as other
              runtimes are, besides
    data, options, shapes   samples, or shapes of inputs. onnxruntime times the models on the first; other runtimes run
              `samples` of them at most, or without any one of random numbers
    settings  of the runtime, such as ``{"soc_model": 60}``; onnxruntime with settings is only asked as other runtimes are

    Raises OnnxqError for what is no model, and if the runtime is not installed, or cannot load or run it.
    """
    if not isinstance(runtime, (str, Runtime)):
        raise OnnxqError(f"runtime = {runtime!r:.80} must be text.")
    if isinstance(runtime, str) and not settings and (runtime in ("", HERE) or (runtime == "openvino" and data is None)):
        found = audit_here(model, against, runtime=runtime or HERE, data=data, options=options, shapes=shapes)
        if runtime != HERE or data is None:
            return found
        there = audit(model, against, runtime=ONNXRUNTIME, data=data, options=options, shapes=shapes, samples=samples)
        return replace(found, proof=there.proof)
    asked = find_runtime(runtime, find_plugins()) if isinstance(runtime, str) else runtime
    given = told(asked, settings or {})
    with tempfile.TemporaryDirectory() as scratch:
        file = _file(model, Path(scratch) / "model.onnx", asked.suffix)
        beside = None if against is None else _file(against, Path(scratch) / "against.onnx", ".onnx")
        known = beside or (file if file.suffix == ".onnx" else None)
        if known is None and asked.inputs is not None:
            feeds, random = _own_samples(asked.inputs(file), data, options, shapes, samples), False
        else:
            feeds, random = _samples(known, data, options, shapes, samples)
        proof = prove(asked, file, feeds, given, beside, random)
        return _audit(proof, None if known is None else read(known))


def _file(model: Model, place: Path, suffix: str) -> Path:
    """A model as a file. Raises OnnxqError for what is none, and for a file that the runtime does not read."""
    if isinstance(model, (str, Path)) and Path(model).suffix != ".onnx" and suffix != ".onnx":
        if not Path(model).is_file():
            raise OnnxqError(f"'{model}' does not exist; give a {suffix} file.")
        return Path(model)
    known = file_or_proto(model)
    if suffix != ".onnx":
        raise OnnxqError(f"this runtime reads {suffix} files; export the model with a target that writes them.")
    if isinstance(known, Path):
        return known
    onnx.save(known, str(place))
    return place


def _samples(
    model: Path | None,
    data: Source | None,
    options: DataOptions | None,
    shapes: Mapping[str, Sequence[int]] | None,
    samples: int,
) -> tuple[list[Mapping[str, Array]], bool]:
    """The first samples, or one of random numbers, and whether it is that."""
    if model is None:
        if data is not None or shapes:
            raise OnnxqError("--data and --shape need the ONNX model that the file was made from; give it by --against.")
        return [], False
    if data is None:
        return [*itertools.islice(examples([read(model)], shapes), 1)], True
    found = open_data(data, model_inputs(read(model)), options)
    return [*itertools.islice(runtimes.rolled(found, lambda: runtimes.session(model)), samples or None)], False


def _own_samples(
    inputs: Sequence[Input],
    data: Source | None,
    options: DataOptions | None,
    shapes: Mapping[str, Sequence[int]] | None,
    samples: int,
) -> list[Mapping[str, Array]]:
    """The first samples for a file that says itself what it takes; none without data."""
    if shapes:
        raise OnnxqError("--shape is for inputs of open sizes; those of this file are fixed. Leave it out.")
    if data is None:
        return []
    found = open_data(data, inputs, options)
    if found.state and not found.complete:
        raise OnnxqError("samples that leave states out need the ONNX model, which computes them; give it by --against.")
    return [*itertools.islice(found, samples or None)]


def _audit(proof: Proof, model: onnx.ModelProto | None) -> Audit:
    """The layers of a model as the runtime's operators of their names say."""
    ran = {each.name: each for each in proof.inspection.operators if each.kind != "moves"}
    constants = set() if model is None else {t.name for t in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in LAYER_OPS] if model is not None else []
    rows = tuple(_row(node, ran[node.name], constants) for node in layers if node.name in ran)
    other: dict[str, int] = {}
    known = {row.name for row in rows}
    for each in proof.inspection.operators:
        if each.name not in known:
            other[each.op] = other.get(each.op, 0) + 1
    return Audit(rows, other, proof=proof)


def _row(node: onnx.NodeProto, ran: Executed, constants: set[str]) -> LayerAudit:
    integer = ran.kind == "integer"
    text = ran.why or ("it decodes codes and computes in float" if ran.kind == "fake" else "it is not quantized")
    return LayerAudit(node.name, node.op_type, True, ran.op, integer, None if integer else Reason("runtime", text))
