"""Float constants outside layers: weights of recurrent operators, tables of embeddings, operands of products that are no
layer, and whatever else a model holds.

No integer kernel reads them, but a file need not hold them in 32 bits: codes with one scale per slice, decoded at load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.spec import Block

LEAST = 1024  # bytes of the smallest constant that counts as a weight


@dataclass(frozen=True)
class Constant:
    """A float constant of at least `LEAST` bytes that is no layer's weight or bias.

    readers   the operators that read it: (name, op)
    op        that of the first reader
    shape     its shape, of float32 or float64 values
    block     one scale per slice of it: a row of a gate, an output channel, a row of a table
    weight    it is a weight or a table, whose values a grid of 8 bits serves; others may hold anything, such as coordinates
    table     every reader is a Gather along the first axis, so that it can be decoded row by row
    """

    name: str
    readers: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    double: bool
    block: Block | None
    weight: bool
    table: bool

    @property
    def op(self) -> str:
        return self.readers[0][1]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes as float."""
        return self.size * (8 if self.double else 4)


def constants(graph: Graph) -> list[Constant]:
    """The float constants outside layers, those that only bodies of control flow read included, in the order of their first
    readers."""
    owned = {name for layer in graph.layers for name in (layer.weight, layer.bias)}
    read = {tensor.name: tensor for node in graph.nodes for tensor in node.inputs if tensor.name not in owned}
    floats = [t for t in read.values() if isinstance(t, gs.Constant) and t.dtype in (np.float32, np.float64)]
    return [_constant(graph, t) for t in floats if math.prod(t.shape) * np.dtype(t.dtype).itemsize >= LEAST]


def tables(graph: Graph) -> set[str]:
    """Names of the constants that every reader reads row by row."""
    return {constant.name for constant in constants(graph) if constant.table}


def _constant(graph: Graph, tensor: gs.Constant) -> Constant:
    shape, reads = tuple(tensor.shape), _reads(graph, tensor)
    blocks = [_slices(read, shape) for read in reads]
    weight = bool(blocks) and all(block is not None for block in blocks)
    table = weight and all(read.op == "Gather" and not read.inside and not read.attrs.get("axis", 0) for read in reads)
    block = next((block for block in blocks if block is not None), _rows(shape))
    readers = tuple(dict.fromkeys((read.name, read.op) for read in reads))
    return Constant(tensor.name, readers, shape, tensor.dtype == np.float64, block, weight, table)


class _Read(NamedTuple):
    """An operator that reads a constant as input `at`; `inside` a body of control flow."""

    name: str
    op: str
    attrs: Mapping[str, Any]
    at: int
    inside: bool = False


def _reads(graph: Graph, tensor: gs.Constant) -> list[_Read]:
    reads = []
    for node in {id(node): node for node in tensor.outputs}.values():
        rest = graph._beside.rest.get(node.name)
        for at, other in enumerate(node.inputs):
            if other is not tensor:
                continue
            if rest is None or at < rest.inputs:
                reads.append(_Read(str(node.name), str(node.op), node.attrs, at))
            else:  # an operator with bodies has what they read as further inputs
                reads += [read for a in rest.attributes for read in _inside(a, rest.captured[at - rest.inputs])]
    return reads


def _inside(attribute: onnx.AttributeProto, name: str) -> Iterator[_Read]:
    """The operators in the bodies of an attribute that read an outer tensor."""
    for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
        for node in body.node:
            if name in node.input:
                attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                yield _Read(node.name or node.op_type, node.op_type, attrs, list(node.input).index(name), inside=True)
            for inner in node.attribute:
                yield from _inside(inner, name)


def _rows(shape: tuple[int, ...]) -> Block | None:
    """One scale for each row along the last axis; one in all where rows are short."""
    return (*(1,) * (len(shape) - 1), 0) if len(shape) > 1 and shape[-1] >= 8 else None


# Operators -> inputs that are weights -> axes over which one scale serves.
_INNER: dict[str, dict[int, tuple[int, ...]]] = {
    **{op: {1: (2,), 2: (2,)} for op in ("LSTM", "GRU", "RNN")},  # [directions, gates * hidden, inputs]
    **{op: {0: (-1,), 1: (-2,)} for op in ("MatMul", "FusedMatMul")},
    "Attention": {1: (0,)},  # of com.microsoft: [inputs, 3 * outputs]
    "EmbedLayerNormalization": {2: (1,), 3: (1,), 4: (1,)},
}


def _slices(read: _Read, shape: tuple[int, ...]) -> Block | None:
    """The block of a constant that is a weight of an operator that reads it; None if it is none."""
    rank, op, attrs, at = len(shape), read.op, read.attrs, read.at
    inner = _INNER.get(op, {}).get(at)
    if op in ("Conv", "FusedConv") and at == 1:
        inner = tuple(range(1, rank))
    elif op == "ConvTranspose" and at == 1:
        return (shape[0] // int(attrs.get("group", 1)), 1, *(0,) * (rank - 2)) if rank > 2 else None
    elif op in ("Gemm", "FusedGemm") and at < 2:
        inner = (1 if bool(attrs.get("transB" if at else "transA", 0)) == bool(at) else 0,)
    elif op in ("MatMul", "FusedMatMul") and inner is not None:
        swapped = attrs.get("transB" if at else "transA", 0)
        inner = ((-1 if inner == (-2,) else -2) if swapped else inner[0],)
    elif op == "Einsum":
        inner = _summed(attrs.get("equation", ""), at)
    elif op == "Gather" and at == 0 and rank == 2 and min(shape) >= 8:
        inner = (1 - int(attrs.get("axis", 0)) % 2,)
    if inner is None or rank < 2 or max(inner, default=0) >= rank:
        return None
    return tuple(0 if axis in inner or axis - rank in inner else 1 for axis in range(rank))


def _summed(equation: str | bytes, at: int) -> tuple[int, ...] | None:
    """Axes of an operand of an Einsum that its output does not have; None if it has all, or they cannot be counted."""
    text = equation.decode() if isinstance(equation, bytes) else equation
    operands, _, output = text.replace(" ", "").partition("->")
    letters = operands.split(",")[at]
    if "." in letters or not output:
        return None
    return tuple(axis for axis, letter in enumerate(letters) if letter not in output) or None
