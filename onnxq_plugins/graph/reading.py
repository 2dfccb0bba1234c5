"""Model files: reading them with their external data, and their size."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.mapped import MappedWeights


def bytes_on_disk(path: Path) -> int:
    """Size of a model's file and of the files beside it with its external data."""
    beside = {
        entry.value
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in beside)))


def read(path: Path, mapped: MappedWeights | None = None) -> onnx.ModelProto:
    """The file as a ModelProto with its external data. Raises OnnxqError in one sentence if that fails.

    mapped   receives the large float32 weights of external data, which then stay in their files: the ModelProto refers to
             them
    """
    if path.is_dir():
        raise OnnxqError(f"model '{path}' is a folder; give the path of an .onnx file.")
    if not path.is_file():
        raise OnnxqError(f"model '{path}' does not exist; give the path of an .onnx file.")
    _check_format(path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises several types for bytes that are not a model
        raise OnnxqError(
            f"'{path}' is not a readable ONNX model (corrupt or truncated?); export or download it again."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise OnnxqError(f"'{path}' holds no ONNX graph (corrupt, truncated or another format?); export it again.")
    try:
        _check_external(proto, path)
        in_files = [t for t in proto.graph.initializer if mapped is not None and mapped.take(t, path.parent)]
        for tensor in in_files:  # not to be loaded
            tensor.data_location = TensorProto.DEFAULT
        load_external_data_for_model(proto, str(path.parent.resolve()))
        for tensor in in_files:
            tensor.data_location = TensorProto.EXTERNAL
        for tensor in proto.graph.initializer:  # truncated raw_data is only noticed when it is read
            if tensor.HasField("raw_data"):
                _ = numpy_helper.to_array(tensor)
    except OnnxqError:
        raise
    except Exception as error:
        raise OnnxqError(
            f"'{path}': its weights cannot be read ({first_line(error)}); export or download it again."
        ) from error
    return proto


def _check_format(path: Path) -> None:
    """Raise OnnxqError for files of ours that are no ONNX models, with the command that reads them."""
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head[4:8] == b"TFL3":
        raise OnnxqError(
            f"'{path}' is a .tflite file, not an ONNX model; onnxq audit '{path}' --runtime litert --data SAMPLES --against "
            "MODEL.onnx runs it and compares it with its model. Give other commands that model."
        )
    if head[:2] == b"PK" and head[30:39] == b"plan.json":
        raise OnnxqError(
            f"'{path}' is a solved plan, not a model; onnxq export '{path}' --target NAME writes a model, which this "
            "command takes."
        )


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    """Raise OnnxqError if weights are in a file that is missing, or outside the model's folder."""
    folder = path.parent.resolve()
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor):
            location = next((e.value for e in tensor.external_data if e.key == "location"), "")
            shown = repr(location if len(location) < 200 else f"{location[:200]}...")
            try:
                file = (folder / location).resolve()
                exists = file.is_file()
            except (OSError, ValueError):  # too long, or with a zero byte
                file, exists = folder / "?", False
            if not file.is_relative_to(folder):
                raise OnnxqError(
                    f"'{path}': weight '{tensor.name}' points to {shown}, outside the model's folder; "
                    "for safety only files beside the model are read, so save the model again."
                )
            if not exists:
                raise OnnxqError(
                    f"'{path}': the file {shown} with the data of weight '{tensor.name}' is missing; "
                    "put it beside the model."
                )


def first_line(error: Exception) -> str:
    """The start of an error's text, for a sentence of ours."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".;: ")[:200]
