"""Operators on elements, of one or of several tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxq_plugins.formats.tflite.builder import Builder, Refused, Tail, Value
from onnxq_plugins.formats.tflite.layouts import Order, stored, turned, widened
from onnxq_plugins.formats.tflite.reading import Node
from onnxq_plugins.formats.tflite.schema import Grid

Maker = Callable[[Builder, Node], None]
# Functions whose codes LiteRT writes on one grid alone: (scale, zero point) beside int8, beside int16.
FIXED = {
    "LOGISTIC": ((1 / 256, -128), (1 / 32768, 0)),
    "SOFTMAX": ((1 / 256, -128), (1 / 32768, 0)),
    "TANH": ((1 / 128, 0), (1 / 32768, 0)),
}
_FINER = 0.75  # a grid that is finer than the fixed one by more: the function is computed in floats


def fixed_grid(op: str, x: Grid | None, target: Grid | None) -> Grid | None:
    """The fixed grid of a function on codes; None if it has to run in floats, since the model's grid is much finer: as in
    the Softmax of an attention over many tokens, whose largest value is far below 1."""
    if x is None or target is None or not x.activation or target.type != x.type:
        return None
    scale, zero = FIXED[op][x.type == "int16"]
    return Grid(x.type, (scale,), zero) if target.scale[0] >= _FINER * scale else None


def common(b: Builder, values: Sequence[Value]) -> tuple[list[Value], Order]:
    """Values of equal rank, and the order in which most of their data lie."""
    rank = max(value.rank for value in values)
    wide = []
    for value in values:
        more = rank - value.rank
        if not more:
            wide.append(value)
        elif value.constant is not None:
            codes = None if value.codes is None else value.codes.reshape((*(1,) * more, *value.shape))
            grid = value.grid if value.grid is None or value.grid.axis is None else None
            constant = value.constant.reshape((*(1,) * more, *value.shape))
            wide.append(Value(constant.shape, value.type, widened(value.order, rank), grid, -1, constant, codes))
        else:
            made = b.reshaped(value, (*(1,) * more, *value.shape))
            wide.append(made)
    largest = max((v for v in wide if v.constant is None), key=lambda v: (math.prod(v.shape), v.index >= 0), default=wide[0])
    return wide, largest.order


def exact(value: Value, type: str) -> Grid | None:
    """A grid that holds a constant as it is: its own, or that of its one value."""
    assert value.constant is not None
    if value.grid is not None:
        return value.grid if value.grid.activation and value.grid.type == type else None
    if value.constant.dtype != np.float32 or not value.constant.size or np.ptp(value.constant) != 0:
        return None
    top = {"int8": 127, "int16": 32767}[type]
    number = abs(float(value.constant.reshape(-1)[0]))
    return Grid(type, (number / top if number else 1.0,))


def operand_grids(values: Sequence[Value], target: Grid | None) -> list[Grid] | None:
    """The grids of the inputs of an operator whose output is on `target`, or None if some has none."""
    if target is None or not target.activation:
        return None
    grids = [v.grid if v.constant is None else exact(v, target.type) for v in values]
    fit = [g for g in grids if g is not None and g.activation and g.type == target.type]
    return fit if len(fit) == len(values) else None


def arithmetic(op: str, kind: str) -> Maker:
    """Add, Sub, Mul, Div of two tensors or more, with the bounds behind them."""

    def make(b: Builder, n: Node) -> None:
        values = [b.value(name) for name in n.inputs]
        name = op
        if values[0].type != "float32":
            _binary_numbers(b, n, op, kind)
            return
        if op == "DIV" and values[1].constant is not None and np.all(values[1].constant) and np.ptp(values[1].constant) == 0:
            values[1], name = b.literal(1 / values[1].constant), "MUL"
        for extra in range(2, len(values)):  # Sum of several: pairs, in floats up to the last
            values[:2] = [_floats(b, name, values[:2])]
            del extra
        if len(values) == 1:
            b.values[n.outputs[0]] = values[0]
            return
        tail = b.tail(n)
        values, order = common(b, values)
        grids = None if name == "DIV" else operand_grids(values, tail.grid)
        grid = tail.grid if grids else None
        tensors = [b.tensor(v, order, g) for v, g in zip(values, grids or (None, None), strict=True)]
        shape, fused = b.source.shapes[tail.name], b.fused(tail, grid)
        options: dict[str, Any] = {"fusedActivationFunction": fused or "NONE"}
        if name in ("ADD", "SUB") and grid is not None:
            options["potScaleInt16"] = False
        table = {"ADD": "Add", "SUB": "Sub", "MUL": "Mul", "DIV": "Div"}[name]
        made = b.emit(name, tensors, stored(shape, order), "float32", grid, kind=table, **options)
        b.finish(tail, made, shape, order, grid, fused)

    return make


def _floats(b: Builder, op: str, values: list[Value]) -> Value:
    values, order = common(b, values)
    shape = np.broadcast_shapes(*(v.shape for v in values))
    kind = {"ADD": "Add", "MAXIMUM": "MaximumMinimum", "MINIMUM": "MaximumMinimum", "MUL": "Mul"}[op]
    made = b.emit(op, [b.tensor(v, order) for v in values], stored(shape, order), values[0].type, kind=kind)
    return b.computed(made, shape, order, None, values[0].type)


def _binary_numbers(b: Builder, n: Node, op: str, kind: str, type: str = "") -> None:
    """An operator of two tensors that are no codes."""
    values, order = common(b, [b.value(name) for name in n.inputs])
    shape = b.source.shapes[n.outputs[0]]
    type = type or b.source.types[n.outputs[0]]
    made = b.emit(op, [b.tensor(v, order) for v in values], stored(shape, order), type, kind=kind)
    b.made(n.outputs[0], made, order, None, type)


def comparison(op: str, kind: str) -> Maker:
    """Equal, Less ...: of plain numbers, to bool."""
    return lambda b, n: _binary_numbers(b, n, op, kind, "bool")


def extreme(op: str) -> Maker:
    """Max and Min; codes have to be on the grid of the output."""

    def make(b: Builder, n: Node) -> None:
        values = [b.value(name) for name in n.inputs]
        target = b.source.target(n.outputs[0])
        grid = target if operand_grids([v for v in values if v.constant is None], target) else None
        if len(values) > 2:
            values[:-1] = [_all(b, op, values[:-1])]
            grid = None
        values, order = common(b, values)
        shape = b.source.shapes[n.outputs[0]]
        if len(values) == 1:
            b.values[n.outputs[0]] = values[0]
            return
        tensors = [b.tensor(v, order, grid) for v in values]
        made = b.emit(op, tensors, stored(shape, order), values[0].type, grid, kind="MaximumMinimum")
        b.made(n.outputs[0], made, order, grid)

    return make


def _all(b: Builder, op: str, values: list[Value]) -> Value:
    first = values[0]
    for other in values[1:]:
        first = _floats(b, op, [first, other])
    return first


def clip(b: Builder, n: Node) -> None:
    """Relu and Clip by themselves. On codes: the output's grid, which bounds the values already, and what it leaves."""
    bounds = b.bounds(n)
    if bounds is None:
        raise Refused("its bounds are computed from the input")
    x, name = b.value(n.inputs[0]), n.outputs[0]
    tail = Tail(name, *bounds, b.source.target(name))
    grid = tail.grid if operand_grids([x], tail.grid) else None
    index, shape = b.tensor(x, None, grid), stored(x.shape, x.order)
    if grid is None and b.fused(tail, None) in ("RELU", "RELU6", "RELU_N1_TO_1"):
        b.made(name, b.emit(b.fused(tail, None), [index], shape, x.type), x.order)
        return
    b.finish(tail, index, x.shape, x.order, grid)


def unary(op: str, kind: str = "", codes: bool = False, **options: Any) -> Maker:
    """A function of elements.

    codes   LiteRT computes it on codes, too (a table of 256 values)
    """

    def make(b: Builder, n: Node) -> None:
        x, target = b.value(n.inputs[0]), b.source.target(n.outputs[0])
        grid = target if codes and operand_grids([x], target) and target is not None and target.type == "int8" else None
        if op in FIXED:
            grid = fixed_grid(op, x.grid, target)
        index = b.tensor(x, None, grid and x.grid)
        made = b.emit(op, [index], stored(x.shape, x.order), x.type, grid, kind=kind, **options)
        b.made(n.outputs[0], made, x.order, grid).prescribed = op in FIXED and grid is not None

    return make


def leaky_relu(b: Builder, n: Node) -> None:
    """LeakyRelu -> LEAKY_RELU."""
    unary("LEAKY_RELU", "LeakyRelu", codes=True, alpha=float(n.attr("alpha", 0.01)))(b, n)


def prelu(b: Builder, n: Node) -> None:
    """PRelu -> PRELU; the slope has the axes of the input but the first."""
    x, slope = b.value(n.inputs[0]), b.value(n.inputs[1])
    if slope.constant is None:
        raise Refused("its slope is computed from the input")
    (x, slope), order = common(b, [x, slope])
    assert slope.constant is not None
    target = b.source.target(n.outputs[0])
    own = slope.grid if slope.grid is not None and slope.grid.activation else None
    if own is None and slope.grid is None and target is not None and target.type == "int8":
        own = exact(slope, "int8")
    grid = target if operand_grids([x], target) and own is not None else None
    index = b.tensor(x, order, grid and x.grid)
    values = turned(slope.constant, order)[0]
    slopes = b.file.constant(b.fresh("slope"), values if grid is None or own is None else own.encode(values), grid and own)
    made = b.emit("PRELU", [index, slopes], stored(x.shape, order), "float32", grid)
    b.made(n.outputs[0], made, order, grid)


def where(b: Builder, n: Node) -> None:
    """Where -> SELECT_V2; codes have to be on the grid of the output."""
    (mask, x, y), order = common(b, [b.value(name) for name in n.inputs])
    target = b.source.target(n.outputs[0])
    grid = target if operand_grids([v for v in (x, y) if v.constant is None], target) else None
    tensors = [b.tensor(mask, order), b.tensor(x, order, grid), b.tensor(y, order, grid)]
    shape = b.source.shapes[n.outputs[0]]
    b.made(n.outputs[0], b.emit("SELECT_V2", tensors, stored(shape, order), x.type, grid, kind="SelectV2"), order, grid)


def cast(b: Builder, n: Node) -> None:
    """Cast between numbers; of codes: of their values."""
    x, type = b.value(n.inputs[0]), b.source.types[n.outputs[0]]
    type = "float32" if type in ("float16", "float64") else type
    if type == x.type:
        b.values[n.outputs[0]] = x
        return
    types = b.file.schema.TensorType
    names = {"float32": "FLOAT32", "int32": "INT32", "int64": "INT64", "bool": "BOOL", "uint8": "UINT8", "int8": "INT8"}
    if type not in names or x.type not in names:
        raise Refused(f"from {x.type} to {type}")
    into = {"inDataType": getattr(types, names[x.type]), "outDataType": getattr(types, names[type])}
    made = b.emit("CAST", [b.tensor(x)], stored(x.shape, x.order), type, kind="Cast", **into)
    b.made(n.outputs[0], made, x.order, None, type)


def power(b: Builder, n: Node) -> None:
    """Pow -> SQUARE, SQRT or POW."""
    x, exponent = b.value(n.inputs[0]), b.value(n.inputs[1])
    if exponent.constant is not None and exponent.constant.size == 1:
        number = float(exponent.constant.reshape(-1)[0])
        plain = {2.0: ("SQUARE", "Square"), 0.5: ("SQRT", "")}.get(number)
        if plain is not None and x.type == "float32":
            made = b.emit(plain[0], [b.tensor(x)], stored(x.shape, x.order), kind=plain[1])
            b.values[n.outputs[0]] = b.reshaped(b.computed(made, x.shape, x.order), b.source.shapes[n.outputs[0]])
            return
        b.values[n.inputs[1]] = b.literal(exponent.constant.astype(np.float32))
    _binary_numbers(b, n, "POW", "Pow")


def gelu(b: Builder, n: Node) -> None:
    """Gelu, exact or by tanh -> GELU."""
    unary("GELU", "Gelu", codes=True, approximate=n.attr("approximate", "none") == "tanh")(b, n)
