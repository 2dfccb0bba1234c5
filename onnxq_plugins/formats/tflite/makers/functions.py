"""Functions that LiteRT has no operator for, written with those it has, in floats; and Softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxq_plugins.formats.tflite.builder import Builder, Refused, Value
from onnxq_plugins.formats.tflite.layouts import Order, plain, stored
from onnxq_plugins.formats.tflite.makers.elementwise import fixed_grid
from onnxq_plugins.formats.tflite.reading import Node
from onnxq_plugins.spec import Array

_KINDS = {"ADD": "Add", "SUB": "Sub", "MUL": "Mul", "DIV": "Div", "EXP": "Exp", "ABS": "Abs", "NEG": "Neg", "SIGN": "Sign"}
_KINDS |= {"SQUARED_DIFFERENCE": "SquaredDifference", "MAXIMUM": "MaximumMinimum", "MINIMUM": "MaximumMinimum"}


class Floats:
    """Arithmetic on floats that are stored in one shape: each method writes an operator."""

    def __init__(self, b: Builder, shape: tuple[int, ...]) -> None:
        self.b, self.shape = b, shape

    def of(self, op: str, *operands: int | float, shape: tuple[int, ...] | None = None) -> int:
        """An operator of tensors and numbers."""
        tensors = [o if isinstance(o, int) else self.number(o) for o in operands]
        return self.b.emit(op, tensors, self.shape if shape is None else shape, kind=_KINDS.get(op, ""))

    def number(self, value: float | Array) -> int:
        """A constant."""
        return self.b.file.constant(self.b.fresh("number"), np.asarray(value, np.float32))

    def mean(self, x: int, axes: list[int]) -> int:
        """The mean over axes as stored, which stay with size 1."""
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(self.shape))
        return self.b.emit("MEAN", [x, self.b.ints(axes)], shape, kind="Reducer", keepDims=True)


def written(formula: Callable[[Floats, int, Node], int]) -> Callable[[Builder, Node], None]:
    """A maker of a function of the elements of one tensor."""

    def make(b: Builder, n: Node) -> None:
        x = b.value(n.inputs[0])
        made = formula(Floats(b, stored(x.shape, x.order)), b.tensor(x), n)
        b.made(n.outputs[0], made, x.order)

    return make


def hard_sigmoid(f: Floats, x: int, n: Node) -> int:
    """max(0, min(1, alpha x + beta))."""
    line = f.of("ADD", f.of("MUL", x, float(n.attr("alpha", 0.2))), float(n.attr("beta", 0.5)))
    return f.of("MINIMUM", f.of("MAXIMUM", line, 0.0), 1.0)


def erf(f: Floats, x: int, n: Node) -> int:
    """The error function to 1.5e-7. Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    size = f.of("ABS", x)
    t = f.of("DIV", 1.0, f.of("ADD", f.of("MUL", size, 0.3275911), 1.0))
    sum_ = f.number(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        sum_ = f.of("ADD", f.of("MUL", sum_, t), factor)
    decay = f.of("EXP", f.of("NEG", f.of("MUL", size, size)))
    return f.of("MUL", f.of("SIGN", x), f.of("SUB", 1.0, f.of("MUL", f.of("MUL", sum_, t), decay)))


def softplus(f: Floats, x: int, n: Node) -> int:
    """max(x, 0) + log(1 + exp(-|x|))."""
    rest = f.of("LOG", f.of("ADD", f.of("EXP", f.of("NEG", f.of("ABS", x))), 1.0))
    return f.of("ADD", f.of("MAXIMUM", x, 0.0), rest)


def mish(f: Floats, x: int, n: Node) -> int:
    """x tanh(softplus(x))."""
    return f.of("MUL", x, f.of("TANH", softplus(f, x, n)))


def softsign(f: Floats, x: int, n: Node) -> int:
    """x / (1 + |x|)."""
    return f.of("DIV", x, f.of("ADD", f.of("ABS", x), 1.0))


def swish(f: Floats, x: int, n: Node) -> int:
    """x sigmoid(alpha x)."""
    alpha = float(n.attr("alpha", 1.0))
    return f.of("MUL", x, f.of("LOGISTIC", x if alpha == 1.0 else f.of("MUL", x, alpha)))


def reciprocal(f: Floats, x: int, n: Node) -> int:
    """1 / x."""
    return f.of("DIV", 1.0, x)


def elu(f: Floats, x: int, n: Node) -> int:
    """x above 0, alpha (exp(x) - 1) below."""
    low = f.of("SUB", f.of("EXP", f.of("MINIMUM", x, 0.0)), 1.0)
    gain = float(n.attr("gamma", 1.0507009873554805)) if n.op == "Selu" else 1.0
    alpha = float(n.attr("alpha", 1.6732632423543772 if n.op == "Selu" else 1.0))
    sum_ = f.of("ADD", f.of("MAXIMUM", x, 0.0), f.of("MUL", low, alpha))
    return sum_ if gain == 1.0 else f.of("MUL", sum_, gain)


def softmax(b: Builder, n: Node) -> None:
    """Softmax -> SOFTMAX over the last axis; before opset 13 over all axes from `axis` on."""
    x = b.value(n.inputs[0])
    whole = b.source.opset < 13
    axis = int(n.attr("axis", 1 if whole else -1)) % max(x.rank, 1)
    grid = fixed_grid("SOFTMAX", x.grid, b.source.target(n.outputs[0]))
    if whole and axis != x.rank - 1 and math.prod(x.shape[axis + 1 :]) != 1:
        flat = b.reshaped(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
        made = b.emit(
            "SOFTMAX", [b.tensor(flat, plain(2), grid and x.grid)], flat.shape, "float32", grid, kind="Softmax", beta=1.0
        )
        b.values[n.outputs[0]] = b.reshaped(b.computed(made, flat.shape, plain(2), grid), x.shape)
        b.values[n.outputs[0]].prescribed = grid is not None
        return
    order = x.order if x.order[-1] == axis else _last(x.rank, axis)
    index = b.tensor(x, order, grid and x.grid)
    made = b.emit("SOFTMAX", [index], stored(x.shape, order), "float32", grid, kind="Softmax", beta=1.0)
    b.made(n.outputs[0], made, order, grid).prescribed = grid is not None


def log_softmax(b: Builder, n: Node) -> None:
    """LogSoftmax -> LOG_SOFTMAX over the last axis, in floats."""
    x = b.value(n.inputs[0])
    axis = int(n.attr("axis", 1 if b.source.opset < 13 else -1)) % x.rank
    if b.source.opset < 13 and math.prod(x.shape[axis + 1 :]) != 1:
        raise Refused("before opset 13 it is over several axes")
    order = x.order if x.order[-1] == axis else _last(x.rank, axis)
    b.made(n.outputs[0], b.emit("LOG_SOFTMAX", [b.tensor(x, order)], stored(x.shape, order), kind="LogSoftmax"), order)


def _last(rank: int, axis: int) -> Order:
    return (*(a for a in range(rank) if a != axis), axis)


def layer_normalization(b: Builder, n: Node) -> None:
    """LayerNormalization over the last axes: (x - mean) / sqrt(var + eps) * gamma + beta."""
    x = b.value(n.inputs[0])
    first = int(n.attr("axis", -1)) % x.rank
    axes = [at for at, axis in enumerate(x.order) if axis >= first]
    f = Floats(b, stored(x.shape, x.order))
    _normalize(b, f, n, x, axes, float(n.attr("epsilon", 1e-5)), range(first, x.rank))


def instance_normalization(b: Builder, n: Node) -> None:
    """InstanceNormalization over all axes behind the channels."""
    x = b.value(n.inputs[0])
    axes = [at for at, axis in enumerate(x.order) if axis >= 2]
    f = Floats(b, stored(x.shape, x.order))
    _normalize(b, f, n, x, axes, float(n.attr("epsilon", 1e-5)), range(1, 2))


def _normalize(b: Builder, f: Floats, n: Node, x: Value, axes: list[int], eps: float, scaled: range) -> None:
    """Normalize over stored `axes`; scale and bias lie along ONNX's axes `scaled`."""
    index = b.tensor(x)
    mean = f.mean(index, axes)
    few = tuple(b.file.tensors[mean].shape)
    variance = f.mean(f.of("SQUARED_DIFFERENCE", index, mean), axes)
    factor = f.of("RSQRT", f.of("ADD", variance, eps, shape=few), shape=few)
    made = f.of("MUL", f.of("SUB", index, mean), factor)
    for place, op in ((1, "MUL"), (2, "ADD")):
        values = b.constant(n, place, "scale or bias")
        if values is not None:
            size = tuple(x.shape[axis] if axis in scaled else 1 for axis in range(x.rank))
            wide = values.reshape(size) if values.size == math.prod(size) else np.broadcast_to(values, size)
            made = f.of(op, made, f.number(wide.transpose(x.order)))
    b.made(n.outputs[0], made, x.order)


def batch_normalization(b: Builder, n: Node) -> None:
    """BatchNormalization as it runs: a factor and a summand per channel."""
    x = b.value(n.inputs[0])
    scale, bias, mean, var = (b.constant(n, place, "statistics") for place in range(1, 5))
    assert scale is not None and bias is not None and mean is not None and var is not None
    factor = scale / np.sqrt(var + n.attr("epsilon", 1e-5))
    size = tuple(-1 if axis == 1 else 1 for axis in range(x.rank))
    f = Floats(b, stored(x.shape, x.order))
    wide = [v.reshape(size).transpose(x.order) for v in (factor, bias - mean * factor)]
    b.made(n.outputs[0], f.of("ADD", f.of("MUL", b.tensor(x), f.number(wide[0])), f.number(wide[1])), x.order)
