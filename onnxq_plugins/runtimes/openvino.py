"""Audit in OpenVINO: the precision of each layer in its execution graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.runtimes.audit import Audit, audited, chain, constants_of, outside_kernels, readers_of
from onnxq_plugins.runtimes.constants import constant_bytes
from onnxq_plugins.runtimes.kernels import coded, computed, conversions, moved
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime
from onnxq_plugins.runtimes.timing import milliseconds as timed
from onnxq_plugins.spec import Array

_INSTALL = "pip install 'onnxq-plugins[openvino]'"


def audit_openvino(model: str | Path) -> Audit:
    """Audit a model in OpenVINO. Needs the extra ``openvino``. Raises OnnxqError if OpenVINO cannot load it."""
    proto, compiled = onnx.load(str(model)), _compiled(Path(model))
    precisions: dict[str, tuple[str, str, str]] = {}  # name in the model -> what runs it, its precision, its kernel
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        keys = ("originalLayersNames", "layerType", "runtimePrecision", "primitiveType")
        names, kind, precision, primitive = (info[key].astype(str) if key in info else "" for key in keys)
        if kind in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution"):
            for name in names.split(","):
                precisions[name.partition("/")[0]] = (kind, precision, primitive)
    constants, known, readers = constants_of(proto.graph), needs(proto), readers_of(proto.graph)
    rows = []
    for node in proto.graph.node:
        if node.op_type in LAYER_OPS:
            kind, precision, primitive = next(
                (precisions[name] for n in chain(node, readers) for name in (n.name, *n.output) if name in precisions),
                ("", "", ""),
            )
            integer, reason = _judged(precision, primitive)
            kernel = f"{kind or node.op_type} {precision or 'unknown'}"
            rows.append(audited(node, constants, kernel, integer, reason, known.get(node.output[0])))
    return Audit(tuple(rows), {}, constants=outside_kernels(proto.graph, rows), total=constant_bytes(proto.graph))


def _judged(precision: str, primitive: str) -> tuple[bool, Reason | None]:
    """Whether a kernel computes on integers, and why not. The precision of one that multiplies floats by weights in few bits
    is that of the weights; the name of what it computes with ends it, as in brgemm_avx512_f32."""
    narrow = precision in _BITS
    if not narrow:
        return False, Reason("runtime", "OpenVINO runs it in floating point")
    if primitive.endswith(("f32", "f16", "bf16")) or _BITS[precision] < 8:
        return False, Reason("decoded", f"OpenVINO multiplies floats by weights that it keeps in {_BITS[precision]} bits")
    return True, None


_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4}


def _compiled(model: Path) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise OnnxqError(f"OpenVINO is not installed; {_INSTALL}.") from error
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    try:
        return openvino.Core().compile_model(str(model), "CPU", hints)
    except RuntimeError as error:
        text = str(error).strip().splitlines()[-1][:300]
        raise OnnxqError(f"OpenVINO cannot load '{model}' ({text}); quantize it with --target openvino.") from error


_MOVES = frozenset(
    [
        "Broadcast",
        "Concat",
        "Convert",
        "Eye",
        "Gather",
        "Memory",
        "Pad",
        "Reorder",
        "Reshape",
        "Shape",
        "Split",
        "StridedSlice",
        "Tile",
        "Transpose",
    ]
)
_NONE = frozenset({"Const", "Input", "Output", "Result", "Parameter"})


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    compiled = _compiled(file)
    graph = read(file).graph
    names = [value.name for value in graph.output]
    codes, still = coded(graph), conversions(graph)
    operators = [
        _executed([str(info[key].astype(str)) if key in info else "" for key in _KEYS], codes, still)
        for info in (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    ]
    try:
        results = [compiled(dict(sample)) for sample in samples]
        outputs = tuple({name: np.array(result[n]) for n, name in enumerate(names)} for result in results)
        milliseconds = timed(lambda: compiled(dict(samples[0]))) if samples else None
    except RuntimeError as error:
        text = " ".join(str(error).split())[-300:]
        raise OnnxqError(f"OpenVINO cannot run '{file.name}' on the samples: {text.rstrip('.')}.") from error
    return Inspection(outputs, tuple(each for each in operators if each.op not in _NONE), milliseconds)


_KEYS = ("originalLayersNames", "layerType", "runtimePrecision")


def _executed(values: Sequence[str], codes: set[str], still: set[str]) -> Executed:
    """A node of the execution graph, under the first of the names of what was fused into it that the model has."""
    names, kind, precision = values
    parts = [part.partition("/")[0] for part in names.split(",")]
    name = next((part for part in parts if part in codes), parts[0])
    if kind in _MOVES or (kind in ("FakeQuantize", "Subgraph") and name in still) or precision in ("i32", "i64", "boolean"):
        return moved(name, kind)
    return computed(name, kind, precision in ("i8", "u8"), codes)


OPENVINO = Runtime("openvino", "OpenVINO's CPU plugin", _INSTALL, _inspect, module="openvino")
