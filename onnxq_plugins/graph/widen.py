"""Models in half or double precision as float32 models."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxq_plugins.graph.bodies import all_graphs

_OTHER = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def to_float32(proto: onnx.ModelProto) -> bool:
    """Convert weights, inputs, outputs, casts and constants of a model, those of control-flow bodies too, in place; False if
    there were none."""
    changed = False

    def widen(tensor: TensorProto) -> None:
        nonlocal changed
        if tensor.data_type in _OTHER:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
            changed = True

    for graph in all_graphs(proto.graph):
        for tensor in graph.initializer:
            widen(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in _OTHER:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
                changed = True
        for attribute in (a for node in graph.node for a in node.attribute):
            if attribute.type == AttributeProto.TENSOR:
                widen(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i in _OTHER:
                attribute.i = TensorProto.FLOAT
                changed = True
    return changed
