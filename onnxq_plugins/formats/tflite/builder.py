"""What makers of operators work with: tensors in the forms that they ask for: a layout, codes or floats.

A `Value` is a tensor of the model as real numbers. It has the form in which it was computed, and gets others when an
operator asks for them: QUANTIZE, DEQUANTIZE, TRANSPOSE and RESHAPE are written there, once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxq_plugins.formats.tflite.layouts import Order, channels_last, moves_data, plain, stored, through_reshape, turned
from onnxq_plugins.formats.tflite.reading import Node, Source
from onnxq_plugins.formats.tflite.schema import File, Grid
from onnxq_plugins.spec import Array

_DECODED_AT_LOAD = 1024  # elements from which constant codes that are read as floats stay codes in the file


_AXES = 4
_IMAGES = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "Resize", "Upsample", "SpaceToDepth", "DepthToSpace"}
_ANY_ORDER = {
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Pad", "Slice", "Split", "Concat", "Relu", "Clip"),
    *("Add", "Sub", "Mul", "Div", "BatchNormalization", "Sigmoid", "LeakyRelu", "PRelu", "Abs", "Sqrt"),
}


class Refused(Exception):
    """LiteRT cannot hold an operator; the text says why."""


@dataclass(eq=False)
class Value:
    """A tensor of the model.

    shape     in ONNX's order
    type      float32 for real numbers, codes or not; else that of the numbers
    order     in which it was computed (`layouts`)
    grid      of the codes that were computed; None for floats and for other numbers
    index     of that tensor in the file; -1 for a constant, and for an input that nothing has read yet
    constant  values of a constant, in ONNX's order
    codes     its codes, if it has some
    forms     (order, grid) -> tensor in the file
    name      of an input that nothing has read yet
    prescribed  LiteRT prescribes its grid, so it is not put on another
    """

    shape: tuple[int, ...]
    type: str
    order: Order
    grid: Grid | None = None
    index: int = -1
    constant: Array | None = None
    codes: Array | None = None
    forms: dict[tuple[Order, Grid | None], int] = field(default_factory=dict)
    name: str = ""
    prescribed: bool = False

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclass(frozen=True)
class Tail:
    """What follows an operator and is written as part of it: bounds, then the grid of its output.

    name       of the last tensor
    low, high  bounds of a Relu or Clip
    grid       on which the tensor is quantized, if that is all that reads it
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    grid: Grid | None = None


class Builder:
    """Writes a `Source` into a `File`, operator by operator. `settings` are those of `write`."""

    def __init__(self, source: Source, settings: Mapping[str, Any]) -> None:
        self.source, self.settings, self.file = source, settings, File()
        self.values: dict[str, Value] = {}
        self.done: set[Node] = set()
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[int, tuple[str, Value, Order]] = {}
        self._reshaped: dict[tuple[int, tuple[int, ...]], int] = {}
        self._names: dict[str, int] = {}
        self.at = ""  # names of tensors begin with what they are computed for

    # ---- tensors of the model ---------------------------------------------------------------------------------------

    def value(self, name: str) -> Value:
        """A tensor by name."""
        if name not in self.values:
            array = self.source.constants[name]
            codes, grid = self.source.stored.get(name, (None, None))
            self.values[name] = self.literal(array, codes, grid)
        return self.values[name]

    def literal(self, array: Array, codes: Array | None = None, grid: Grid | None = None) -> Value:
        """A constant."""
        array = array.astype(np.float32) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array
        return Value(array.shape, str(array.dtype), plain(array.ndim), grid, constant=array, codes=codes)

    def given(self, node: Node, place: int) -> Value | None:
        """An input of an operator, or None if it is left out."""
        return self.value(node.inputs[place]) if place < len(node.inputs) and node.inputs[place] else None

    def constant(self, node: Node, place: int, what: str) -> Array | None:
        """The values of an input that must be constant, or None if it is left out."""
        value = self.given(node, place)
        if value is not None and value.constant is None:
            raise Refused(f"its {what} is computed from the input")
        return None if value is None else value.constant

    def numbers(self, node: Node, name: str, place: int, default: Any = None) -> Any:
        """Whole numbers that are an attribute in some opsets and an input in others."""
        if name in node.attrs:
            return [int(n) for n in np.atleast_1d(node.attrs[name])]
        given = self.constant(node, place, name) if place else None
        return default if given is None else [int(n) for n in given.reshape(-1)]

    def model_input(self, name: str) -> None:
        """Declare an input of the model. It gets its layout when it is first read."""
        shape, kind = self.source.shapes[name], self.source.types[name]
        kind = "float32" if kind in ("float16", "float64") else kind
        grid = self.source.target(name) if self.settings["io"] == "int8" and kind == "float32" else None
        self.values[name] = Value(shape, kind, plain(len(shape)), grid, name=name)
        self.inputs[name] = self.values[name]

    # ---- forms ------------------------------------------------------------------------------------------------------

    def tensor(self, value: Value, order: Order | None = None, grid: Grid | None = None) -> int:
        """A tensor's number in the file, in an order (its own if None) on a grid (floats, or plain numbers, if None)."""
        asked, order = order, value.order if order is None else order
        if value.constant is not None:
            return self._constant(value, order, grid)
        if value.index < 0:
            self._open(value)
            order = value.order if asked is None else asked
        key = order, grid
        if key not in value.forms:
            if order != value.order:
                between = grid if value.grid is None else value.grid  # codes are moved, not floats
                if between != grid:
                    value.forms[key] = self._converted(value, order, self.tensor(value, order, between), grid)
                else:
                    value.forms[key] = self._moved(value, order, grid)
            else:
                value.forms[key] = self._converted(value, order, value.index, grid)
        return value.forms[key]

    def _open(self, value: Value) -> None:
        """Make the tensor of an input: in ONNX's order, or in the one that the first layer reads."""
        if self.settings["layout"] == "native" and self._read_as_image(value.name):
            value.order = channels_last(value.rank)
        kind = value.type if value.grid is None else value.grid.type
        value.index = self.file.tensor(value.name, stored(value.shape, value.order), kind, value.grid)
        value.forms[value.order, value.grid] = value.index

    def _read_as_image(self, name: str) -> bool:
        """True if an input comes to a layer that computes in NHWC, through operators that compute in any order."""
        waiting = [name]
        for tensor in waiting:
            for node in self.source.readers.get(tensor, []):
                if node.op in _IMAGES:
                    return True
                waiting += [out for out in node.outputs if node.op in _ANY_ORDER and out not in waiting]
        return False

    def _constant(self, value: Value, order: Order, grid: Grid | None) -> int:
        assert value.constant is not None
        if (order, grid) not in value.forms:
            shape = stored(value.shape, order)
            if grid is not None:
                same = value.codes is not None and grid == value.grid
                codes = value.codes if same and value.codes is not None else grid.encode(value.constant)
                axis = None if grid.axis is None else order.index(grid.axis)
                index = self.file.constant(self.fresh("codes"), turned(codes, order), grid, axis)
            elif value.codes is not None and value.codes.dtype == np.int8 and value.codes.size >= _DECODED_AT_LOAD:
                index = self.emit(
                    "DEQUANTIZE", [self._constant(value, order, value.grid)], shape, "float32", kind="Dequantize"
                )
            else:
                index = self.file.constant(self.fresh("constant"), turned(value.constant, order))
            value.forms[order, grid] = index
        return value.forms[order, grid]

    def _moved(self, value: Value, order: Order, grid: Grid | None) -> int:
        shape, kind = stored(value.shape, order), value.type if grid is None else grid.type
        source = self.tensor(value, value.order, grid)
        if not moves_data(value.shape, value.order, order):
            return self.reshape(source, shape, kind, grid)
        return self._transposed(source, [value.order.index(axis) for axis in order], kind, grid)

    def _transposed(self, index: int, turn: list[int], kind: str, grid: Grid | None) -> int:
        """A TRANSPOSE; above four axes, of runs of axes that stay together: kernels and NPUs know four."""
        before = [int(size) for size in self.file.tensors[index].shape]
        after = [before[axis] for axis in turn]
        if len(turn) <= _AXES:
            return self.emit("TRANSPOSE", [index, self.ints(turn)], after, kind, grid, kind="Transpose")
        starts = [at for at in range(len(turn)) if at == 0 or turn[at] != turn[at - 1] + 1]
        runs = [turn[at:end] for at, end in zip(starts, [*starts[1:], len(turn)], strict=True)]
        firsts = sorted(run[0] for run in runs)
        sizes = {run[0]: math.prod(before[axis] for axis in run) for run in runs}
        flat = self.reshape(index, [sizes[first] for first in firsts], kind, grid)
        few = [firsts.index(run[0]) for run in runs]
        shape = [sizes[run[0]] for run in runs]
        return self.reshape(
            self.emit("TRANSPOSE", [flat, self.ints(few)], shape, kind, grid, kind="Transpose"), after, kind, grid
        )

    def _converted(self, value: Value, order: Order, index: int, grid: Grid | None) -> int:
        shape = stored(value.shape, order)
        if grid is None:
            return self.emit("DEQUANTIZE", [index], shape, "float32", kind="Dequantize")
        return self.emit("QUANTIZE", [index], shape, grid.type, grid, kind="Quantize")

    # ---- operators --------------------------------------------------------------------------------------------------

    def fresh(self, what: str) -> str:
        """A name for a tensor."""
        name = f"{self.at}/{what}" if self.at else what
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}{self._names[name]}"

    def emit(
        self,
        op: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        type: str = "float32",
        grid: Grid | None = None,
        *,
        kind: str = "",
        **options: Any,
    ) -> int:
        """Write an operator with one output, whose shape is as stored; returns the output's number."""
        index = self.file.tensor(self.fresh(op.lower()), shape, type if grid is None else grid.type, grid)
        self.file.operator(op, inputs, [index], kind, **options)
        return index

    def reshape(self, index: int, shape: Sequence[int], type: str, grid: Grid | None) -> int:
        """The same data in another shape, as stored."""
        shape = tuple(int(size) for size in shape)
        before = tuple(self.file.tensors[index].shape)
        if shape == before:
            return index
        if (index, shape) not in self._reshaped:
            made = self.emit("RESHAPE", [index, self.ints(shape)], shape, type, grid, kind="Reshape", newShape=list(shape))
            self._reshaped[index, shape], self._reshaped[made, before] = made, index  # there and back is nothing
        return self._reshaped[index, shape]

    def ints(self, values: Sequence[int] | Array) -> int:
        """A constant of whole numbers."""
        return self.file.constant(self.fresh("shape"), np.asarray(values, np.int32))

    def made(self, name: str, index: int, order: Order, grid: Grid | None = None, type: str = "") -> Value:
        """Name what was computed after a tensor of the model."""
        shape = self.source.shapes[name]
        self.values[name] = self.computed(index, shape, order, grid, type or self.source.types[name])
        return self.values[name]

    def computed(
        self, index: int, shape: Sequence[int], order: Order, grid: Grid | None = None, type: str = "float32"
    ) -> Value:
        """A tensor that the model does not name; `shape` is in ONNX's order."""
        type = "float32" if type in ("float16", "float64") else type
        value = Value(tuple(int(s) for s in shape), type, order, grid, index)
        value.forms[order, grid] = index
        assert tuple(self.file.tensors[index].shape) == stored(shape, order), (self.at, shape, order)
        return value

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """A tensor in another shape of the same elements, in ONNX's order. Data stay where they are, if they can."""
        shape = tuple(int(size) for size in shape)
        if value.constant is not None:
            return self.literal(value.constant.reshape(shape))
        if value.index < 0:
            self._open(value)
        order, source = through_reshape(value.order, value.shape, shape), value.order
        if order is None:
            order, source = plain(len(shape)), plain(value.rank)
        kind = value.type if value.grid is None else value.grid.type
        index = self.reshape(self.tensor(value, source, value.grid), stored(shape, order), kind, value.grid)
        return self.computed(index, shape, order, value.grid, value.type)

    # ---- what is around an operator ---------------------------------------------------------------------------------

    def tail(self, node: Node) -> Tail:
        """The bounds and the grid behind an operator. The operators of these bounds are written with it."""
        name, low, high = node.outputs[0], -math.inf, math.inf
        while (reader := self.source.only_reader(name)) is not None and reader.op in ("Relu", "Clip"):
            bounds = self.bounds(reader)
            if bounds is None:
                break
            low, high = min(max(low, bounds[0]), bounds[1]), max(min(high, bounds[1]), bounds[0])
            name = reader.outputs[0]
            self.done.add(reader)
        grid = self.source.target(name)
        return Tail(name, low, high, grid if grid is not None and grid.activation else None)

    def bounds(self, node: Node) -> tuple[float, float] | None:
        """The bounds of a Relu or Clip, if they are constant."""
        if node.op == "Relu":
            return 0.0, math.inf
        found = []
        for place, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
            given = self.given(node, place)
            if given is not None and given.constant is None:
                return None
            bound = given.constant if given is not None else np.asarray(node.attr(name, default))
            found.append(float(np.asarray(bound).reshape(-1)[0]))
        return found[0], found[1]

    def fused(self, tail: Tail, grid: Grid | None) -> str:
        """The activation function that an operator carries out on its output; "" if there is none for these bounds."""
        for name, low, high in _FUSED:
            if _codes(low, high, grid) == _codes(tail.low, tail.high, grid):
                return name
        return ""

    def finish(self, tail: Tail, index: int, shape: Sequence[int], order: Order, grid: Grid | None, fused: str = "") -> None:
        """Name the output of an operator, after what its bounds still need.

        fused   the activation function that it has carried out already
        """
        if not fused and self.fused(tail, grid) != "NONE":
            index = self.bounded(index, tail.low, tail.high, stored(shape, order), grid)
        self.values[tail.name] = self.computed(index, shape, order, grid)

    def bounded(self, index: int, low: float, high: float, shape: Sequence[int], grid: Grid | None) -> int:
        """Keep a tensor within bounds."""
        for op, bound in (("MAXIMUM", low), ("MINIMUM", high)):
            if math.isfinite(bound):
                edge = np.asarray([bound], np.float32)
                other = self.file.constant(self.fresh("bound"), edge if grid is None else grid.encode(edge), grid)
                index = self.emit(op, [index, other], shape, "float32", grid, kind="MaximumMinimum")
        return index


_FUSED = [
    ("NONE", -math.inf, math.inf),
    ("RELU", 0.0, math.inf),
    ("RELU6", 0.0, 6.0),
    ("RELU_N1_TO_1", -1.0, 1.0),
]


def _codes(low: float, high: float, grid: Grid | None) -> tuple[float, float]:
    """What bounds leave of a grid."""
    if grid is None:
        return low, high
    first, last = grid.codes
    return tuple(
        min(max(round(b / grid.scale[0]) + grid.zero, first), last) if math.isfinite(b) else e
        for b, e in ((low, first), (high, last))
    )  # type: ignore[return-value]
