"""A folder with a model and samples, and what a run of the command line gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.zoo import cnn, feeds


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def images(n: int = 8, side: int = 12) -> np.ndarray:
    return np.concatenate([feed["x"] for feed in feeds(cnn(), n)])[:, :, :side, :side]


def write_model(model: onnx.ModelProto | None = None) -> None:
    onnx.save(cnn() if model is None else model, "model.onnx")


def write_data(**arrays: np.ndarray) -> None:
    np.savez("data.npz", **(arrays or {"x": images()}))


def listing() -> dict[str, bytes | None]:
    paths = (p for p in sorted(Path().rglob("*")) if "__pycache__" not in str(p))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


def half(kind: int) -> onnx.ModelProto:
    model = cnn(opset=22 if kind == TensorProto.BFLOAT16 else 17)
    model.ir_version = 10
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def external(location: str, content: bytes | None) -> list:
    model = cnn()
    onnx.save(model, "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    proto = onnx.load("model.onnx", load_external_data=False)
    data = Path("weights").read_bytes()
    Path("weights").unlink()
    if content is not None:
        Path(location).write_bytes(data[: len(content)] if content else data)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    Path("model.onnx").write_bytes(proto.SerializeToString())
    return []
