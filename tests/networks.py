"""Small networks written as lists of operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Operator = tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]


def weight(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Random values whose products keep their size."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def network(
    operators: Sequence[Operator],
    shape: Sequence[int | str],
    constants: Mapping[str, Any],
    kind: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("y",),
    output_kind: int = TensorProto.FLOAT,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model of operators (op, inputs, outputs, attributes) that reads ``x``; constants are shapes or arrays."""
    values = {n: weight(v, i) if isinstance(v, tuple) else np.asarray(v) for i, (n, v) in enumerate(constants.items())}
    graph = helper.make_graph(
        [
            helper.make_node(op, ins, outs, f"{op.lower()}_{i}", **attrs)
            for i, (op, ins, outs, attrs) in enumerate(operators)
        ],
        "network",
        [helper.make_tensor_value_info("x", kind, list(shape))],
        [helper.make_tensor_value_info(name, output_kind, None) for name in outputs],
        [numpy_helper.from_array(v, n) for n, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


def feed_of(model: onnx.ModelProto, seed: int = 0, rows: int = 64) -> dict[str, np.ndarray]:
    """One random feed; open axes are 3, integers below `rows`."""
    rng = np.random.default_rng(seed)
    (x,) = model.graph.input
    shape = [d.dim_value or 3 for d in x.type.tensor_type.shape.dim]
    if x.type.tensor_type.elem_type == TensorProto.INT64:
        return {"x": rng.integers(0, rows, shape)}
    return {"x": rng.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type))}
