"""Operators that reduce or thin a tensor inside a model, so that no whole activation leaves it; and how what samples give is
merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxq_plugins.graph.patches import add_gram
from onnxq_plugins.spec import Array


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


def beside_makers(graph: onnx.GraphProto, own: int) -> None:
    """Move the operators that were added to a model, those behind its `own` ones, to where what they read is computed. In
    that order, activations are reduced while they are in the cache, and gone before the next ones come."""
    place: dict[str, int] = {}
    keys: dict[str, tuple[int, int]] = {}
    for number, node in enumerate(graph.node):
        at = number if number < own else max((place.get(name, -1) for name in node.input), default=-1)
        for name in node.output:
            place[name] = at
        keys[" ".join(node.output)] = at, number
    graph.node.sort(key=lambda node: keys[" ".join(node.output)])


# ---- merging what samples give -----------------------------------------------------------------------------------------


def _largest(a: Array, b: Array) -> Array:
    """The two rows with the largest first column."""
    if len(a) > 1 and (b[:, 0] <= a[1, 0]).all():
        return a
    rows = np.concatenate([a, b])
    return np.asarray(rows[np.argsort(-rows[:, 0], kind="stable")[:2]])


_MERGE: dict[str, Callable[[Array, Array], Array]] = {
    "low": np.minimum,
    "high": np.maximum,
    "sum": np.add,
    "gram": add_gram,
    "peak": _largest,
}


@cache
def merge_of(field: str) -> Callable[[Array, Array], Array]:
    """How two values of a field become one."""
    return next(merge for prefix, merge in _MERGE.items() if field.startswith(prefix))


_POOLED: dict[str, Callable[[Array], Any]] = {"low": np.min, "high": np.max, "sum": np.mean, "sum2": np.mean}


def alike(field: str, a: Array, b: Array) -> tuple[Array, Array]:
    """Two values of a field; pooled where samples differ in length along what counts as channels, such as [batch, time]."""
    if field not in _POOLED or a.shape == b.shape:
        return a, b
    return np.asarray(_POOLED[field](a)), np.asarray(_POOLED[field](b))
