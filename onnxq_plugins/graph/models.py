"""What a float model may be passed as."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.core import Graph

# str | Path | onnx.ModelProto | Graph | bytes of a ModelProto | torch's ONNXProgram | onnx_ir.Model
Model = Any


def as_model(model: Model) -> Path | onnx.ModelProto | Graph:
    """A model in the form that the rest of the package knows. Raises OnnxqError for what is no model."""
    if isinstance(model, (onnx.ModelProto, Graph)):
        return model
    if isinstance(model, (str, os.PathLike)):
        return Path(model)
    if isinstance(model, (bytes, bytearray, memoryview)):
        return _parsed(bytes(model))
    if type(model).__module__.partition(".")[0] == "onnx_ir" and type(model).__name__ == "Model":
        proto = importlib.import_module("onnx_ir").to_proto(model)
    else:
        proto = getattr(model, "model_proto", None)  # torch.onnx.export returns an ONNXProgram
    if not isinstance(proto, onnx.ModelProto):
        raise OnnxqError(
            f"an object of type {type(model).__name__} is no model; give the path of an .onnx file, an onnx.ModelProto or "
            "its bytes, an ONNXProgram of torch.onnx.export, or an onnx_ir.Model."
        )
    return proto


def _parsed(content: bytes) -> onnx.ModelProto:
    try:
        proto = onnx.load_from_string(content)
    except Exception as error:  # protobuf raises several types
        raise OnnxqError(
            "the bytes given as model are not those of an ONNX model; give the content of an .onnx file."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise OnnxqError("the bytes given as model hold no ONNX graph; give the content of an .onnx file.")
    return proto
