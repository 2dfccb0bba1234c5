"""The inputs of a model, and how an array becomes the value of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class Input:
    """One input of a model: name, dtype and shape (None for dynamic axes)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @property
    def batch(self) -> int | None:
        """Size of the first axis; None if dynamic, 1 if there is no axis."""
        return self.shape[0] if self.shape else 1


def graph_inputs(graph: Graph) -> list[Input]:
    """The inputs of a Graph."""
    return [
        Input(
            name,
            np.dtype(graph.tensor(name).dtype or np.float32),
            tuple(n if isinstance(n, int) and n >= 0 else None for n in graph.shape(name) or ()),
        )
        for name in graph.inputs
    ]


def model_inputs(model: onnx.ModelProto) -> list[Input]:
    """The inputs of a model, without initializers that are listed among them."""
    constants = {t.name for t in model.graph.initializer}
    inputs = []
    for value in model.graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim)
            inputs.append(Input(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape))
    return inputs


def fit(array: Array, target: Input, where: str) -> Array:
    """The array with the input's dtype. Raises OnnxqError if dtype or shape (batch aside) differ, or for NaN and Inf."""
    if array.dtype != target.dtype:
        kinds = {"i": "iu", "u": "iu"}.get(target.dtype.kind, target.dtype.kind)
        if array.dtype.kind not in kinds:  # integers for a float input are mostly raw pixels
            hint = "; convert and normalize it as the model was trained" if target.dtype.kind == "f" else ""
            raise OnnxqError(f"{where}: input '{target.name}' wants {target.dtype}, the data is {array.dtype}{hint}.")
        array = array.astype(target.dtype)
    shape: tuple[int | None, ...] = target.shape
    if shape and shape[0] is not None and len(array.shape) == len(shape) and array.shape[0] == 1:
        shape = (1, *shape[1:])  # batches of a fixed size are assembled later
    if len(shape) != array.ndim or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        expected = [n if n is not None else "any" for n in target.shape]
        hint = "; see --resize, --crop and --layout" if where.startswith("folder") else _misfit(array.shape, target.shape)
        raise OnnxqError(f"{where}: input '{target.name}' wants shape {expected}, the data has {list(array.shape)}{hint}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "Inf"
        raise OnnxqError(f"{where}: input '{target.name}' has {kind}; remove or fix that sample.")
    return array


def _misfit(shape: tuple[int, ...], target: tuple[int | None, ...]) -> str:
    """A hint how an array of a shape could be made to fit; "" if there is none."""
    if len(shape) == len(target) == 4 and target[1] == shape[3] != shape[1]:
        return "; transpose to NCHW: x.transpose(0, 3, 1, 2)"
    if len(shape) == len(target) == 4 and target[3] == shape[1] != shape[3]:
        return "; transpose to NHWC: x.transpose(0, 2, 3, 1)"
    # where the first axis of an array counts samples, a single sample without a batch axis was taken apart
    missing = len(target) - len(shape)
    if missing in (1, 2) and all(n is None or n == m for n, m in zip(target[missing:], shape, strict=True)):
        return "; add a batch axis: x[None]"
    return ""


def quoted(names: Iterable[str]) -> str:
    """Names sorted and quoted, for a message."""
    return ", ".join(f"'{n}'" for n in sorted(names))
