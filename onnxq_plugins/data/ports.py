"""The inputs that a graph or a model declares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx

from onnxq_plugins.data.inputs import Input, Shape
from onnxq_plugins.data.streams import with_guesses
from onnxq_plugins.graph import Graph


def graph_inputs(graph: Graph) -> list[Input]:
    """The inputs of a Graph."""

    def port(name: str) -> Input:
        shape, dtype = _axes(graph.shape(name)), np.dtype(graph.tensor(name).dtype or np.float32)
        return Input(name, dtype, shape, name in graph.defaults)

    return with_guesses([port(name) for name in graph.inputs], [port(name) for name in graph.outputs])


def model_inputs(model: onnx.ModelProto) -> list[Input]:
    """The inputs of a model. Those with an initializer are optional, if the model may read them at all: before IR version 4
    all initializers were listed as inputs."""
    constants = {t.name for t in model.graph.initializer}
    listed = [v for v in model.graph.input if model.ir_version >= 4 or v.name not in constants]
    return with_guesses([_port(v, v.name in constants) for v in listed], [_port(v) for v in model.graph.output])


def _port(value: onnx.ValueInfoProto, optional: bool = False) -> Input:
    kind = value.type.tensor_type
    if not kind.elem_type:  # a sequence, a map or an optional
        return Input(value.name, np.dtype(object), None, optional)
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    shape = _axes(dims) if kind.HasField("shape") else None
    return Input(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape, optional)


def _axes(sizes: Iterable[Any] | None) -> Shape | None:
    """Sizes and symbols; negative sizes, which some exporters write, are open."""
    if sizes is None:
        return None
    return tuple(n if isinstance(n, str) or (isinstance(n, int) and n >= 0) else None for n in sizes)
