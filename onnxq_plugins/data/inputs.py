"""What a model wants: its inputs, and how an array is made to fit one."""

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
    """What a model wants under one input name: dtype and shape (None for dynamic axes)."""

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
    """The inputs of a model, initializers listed among them left out."""
    constants = {t.name for t in model.graph.initializer}
    found = []
    for value in model.graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim)
            found.append(Input(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape))
    return found


def fit(array: Array, wanted: Input, where: str) -> Array:
    """The array as the model's dtype and shape, or the sentence that says why not."""
    if array.dtype != wanted.dtype:
        kinds = {"i": "iu", "u": "iu"}.get(wanted.dtype.kind, wanted.dtype.kind)
        if array.dtype.kind not in kinds:  # whole numbers for a float input are mostly raw pixels
            hint = "; convert and normalize it as the model was trained" if wanted.dtype.kind == "f" else ""
            raise OnnxqError(f"{where}: input '{wanted.name}' wants {wanted.dtype}, the data is {array.dtype}{hint}.")
        array = array.astype(wanted.dtype)
    shape: tuple[int | None, ...] = wanted.shape
    if shape and shape[0] is not None and len(array.shape) == len(shape) and array.shape[0] == 1:
        shape = (1, *shape[1:])  # batches of a fixed size are put together later
    if len(shape) != array.ndim or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        want = [n if n is not None else "any" for n in wanted.shape]
        hint = "; see --resize, --crop and --layout" if where.startswith("folder") else _misfit(array.shape, wanted.shape)
        raise OnnxqError(f"{where}: input '{wanted.name}' wants shape {want}, the data has {list(array.shape)}{hint}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "Inf"
        raise OnnxqError(f"{where}: input '{wanted.name}' has {kind}; remove that sample or mend it.")
    return array


def _misfit(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> str:
    """What would make an array of a shape fit, where that can be told."""
    if len(shape) == len(wanted) == 4 and wanted[1] == shape[3] != shape[1]:
        return "; transpose to NCHW: x.transpose(0, 3, 1, 2)"
    if len(shape) == len(wanted) == 4 and wanted[3] == shape[1] != shape[3]:
        return "; transpose to NHWC: x.transpose(0, 2, 3, 1)"
    # where the first axis of an array counts samples, one sample without it has been taken apart
    missing = len(wanted) - len(shape)
    if missing in (1, 2) and all(n is None or n == m for n, m in zip(wanted[missing:], shape, strict=True)):
        return "; add a batch axis: x[None]"
    return ""


def names(names: Iterable[str]) -> str:
    return ", ".join(f"'{n}'" for n in sorted(names))
