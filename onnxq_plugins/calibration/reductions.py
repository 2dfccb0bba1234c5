"""Operators that reduce or thin a tensor inside a model, so that no whole activation leaves it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper


def add_reduction(model: onnx.ModelProto, op: str, name: str, output: str, axes: tuple[int, ...] | None, opset: int) -> None:
    """Add an operator that reduces tensor `name` over `axes` (None: all) to a new float model output, without these axes."""
    inputs: list[str] = [name]
    attrs: dict[str, Any] = {"keepdims": 0}
    if axes == ():  # a vector of channels: to onnx no axes are all of them
        op, inputs, attrs = ("Mul", [name, name], {}) if op == "ReduceSumSquare" else ("Identity", [name], {})
    elif axes is not None and opset >= (13 if op == "ReduceSum" else 18):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{output}|axes"))
        inputs.append(f"{output}|axes")
    elif axes is not None:
        attrs["axes"] = list(axes)
    model.graph.node.append(helper.make_node(op, inputs, [output], **attrs))
    model.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))


def add_slice(model: onnx.ModelProto, name: str, output: str, step: int) -> None:
    """output = name.reshape(-1)[::step]"""
    for label, value in (("flat", -1), ("start", 0), ("end", 2**62), ("axis", 0), ("step", step)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), f"{output}|{label}"))
    model.graph.node.append(helper.make_node("Reshape", [name, f"{output}|flat"], [f"{output}|all"], f"{output}|reshape"))
    model.graph.node.append(
        helper.make_node(
            "Slice",
            [f"{output}|all", *(f"{output}|{part}" for part in ("start", "end", "axis", "step"))],
            [output],
            f"{output}|slice",
        )
    )
