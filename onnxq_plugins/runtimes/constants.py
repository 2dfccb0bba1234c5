"""What the operators of a model hold in constants outside integer kernels: how many bytes in float, and how many in codes
that are decoded at load or as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto

from onnxq_plugins.graph.layer import LAYER_OPS

LEAST = 1024  # bytes of the smallest float constant that counts
_FLOATS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.DOUBLE: 8, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}
_CODES: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4), 4),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8), 8),
    **dict.fromkeys((TensorProto.INT16, TensorProto.UINT16), 16),
}
_BIASED = {"Conv", "ConvTranspose", "Gemm"}
_WEIGHTED = {*_BIASED, "MatMul", "LSTM", "GRU", "RNN", "Einsum", "Gather"}
_DECODED = "weights in {} bits, decoded to float at load, and computed with in float"
OPERANDS = 'which may need every digit; [[layer]] match = "its name" quantize = true stores them in 8 bits'


@dataclass(frozen=True)
class Held:
    """The constants of one operator.

    name, op   of the operator
    floats     bytes of its float constants of at least `LEAST` bytes
    coded      values that are codes in the file
    bits       of these codes
    """

    name: str
    op: str
    floats: int = 0
    coded: int = 0
    bits: int = 8

    @property
    def why(self) -> str:
        """Why they are not computed with as integers, and what can be done."""
        floats = f"{self.floats / 1e6:.2f} MB" if self.floats >= 1e5 else f"{self.floats / 1e3:.1f} kB"
        if self.coded:
            form = "rows in {} bits, decoded as they are read" if self.op == "Gather" else _DECODED
            return form.format(self.bits) + (f"; {floats} of biases stay float" if self.floats else "")
        if self.op in _WEIGHTED:
            return f"{floats} of float weights; recipes of target ort-cpu store them in 8 bits"
        return f"{floats} of float operands, {OPERANDS}"


@dataclass(frozen=True)
class _Source:
    """What a tensor that follows from constants alone is made of: bytes of floats, number of codes and their bits."""

    floats: int = 0
    coded: int = 0
    bits: int = 8

    def joined(self, other: _Source) -> _Source:
        wide = self if self.coded >= other.coded else other
        return _Source(max(self.floats, other.floats), wide.coded, wide.bits)


def held_constants(graph: onnx.GraphProto) -> list[Held]:
    """The operators that hold float constants of 1 kB and more, or weights in codes; those in bodies of control flow
    included. A constant that several read counts for the first. Biases of layers count as part of these."""
    return list(_held(graph, {}, set()))


def _held(graph: onnx.GraphProto, outer: dict[str, _Source], counted: set[str]) -> Iterator[Held]:
    sources = {**outer, **{t.name: _source(t) for t in graph.initializer}}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _held(body, sources, counted)
        inputs = [name for name in node.input if name]
        if node.op_type == "Constant":
            sources[node.output[0]] = next((_source(a.t) for a in node.attribute if a.name == "value"), _Source())
        elif inputs and all(name in sources for name in inputs):  # it is folded at load
            whole = _Source()
            for name in inputs:
                whole = whole.joined(sources[name])
            sources |= dict.fromkeys(node.output, replace(whole, floats=0) if whole.coded else whole)
        elif not _scales(node, makers, readers):
            entry = Held(node.name or node.op_type, node.op_type)
            for name in inputs[: 2 if node.op_type in _BIASED and not node.domain else None]:
                source = sources.get(name, _Source())
                least = 1 if node.op_type in LAYER_OPS else LEAST // 4  # a layer counts with whatever weight it has
                if name in counted or not (source.coded >= least or source.floats >= LEAST):
                    continue
                counted.add(name)
                if source.coded:
                    entry = replace(entry, coded=entry.coded + source.coded, bits=source.bits)
                else:
                    entry = replace(entry, floats=entry.floats + source.floats)
            if entry.coded or entry.floats:
                yield entry


def _source(tensor: TensorProto) -> _Source:
    size = int(np.prod(tensor.dims))
    if tensor.data_type in _CODES:
        return _Source(0, size, _CODES[tensor.data_type])
    return _Source(_FLOATS.get(tensor.data_type, 0) * size)


def _scales(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], readers: dict[str, list[onnx.NodeProto]]) -> bool:
    """True for a Gather of the scales that belong to the rows of a table in codes, which another Gather reads."""
    after = readers.get(node.output[0], []) if node.op_type == "Gather" else []
    if len(after) == 1 and after[0].op_type == "Cast":
        after = readers.get(after[0].output[0], [])
    if len(after) != 1 or after[0].op_type != "Mul":
        return False
    wide = next((makers[name] for name in after[0].input if name in makers and makers[name].op_type == "Cast"), None)
    codes = makers.get(wide.input[0]) if wide is not None else None
    return codes is not None and codes.op_type == "Gather" and codes is not node and codes.input[1] == node.input[1]


def constant_bytes(graph: onnx.GraphProto) -> int:
    """Bytes of all constants in the file, those of control-flow bodies left out."""
    sizes = {**_FLOATS, TensorProto.INT32: 4, TensorProto.INT64: 8}
    return sum(int(np.prod(t.dims)) * _CODES.get(t.data_type, 8 * sizes.get(t.data_type, 1)) // 8 for t in graph.initializer)


def describe_held(entries: Iterable[Held], total: int) -> list[str]:
    """The constants outside integer kernels in clauses of a summary.

    total   bytes of all constants, of which the float ones are a part
    """
    clauses = []
    entries = list(entries)
    for bits in sorted({entry.bits for entry in entries if entry.coded}, reverse=True):
        ops = Counter(entry.op for entry in entries if entry.coded and entry.bits == bits)
        read = ops.pop("Gather", 0)
        if ops:
            clauses.append(f"{_ops(ops)} stored in {bits} bits, compute{'s' * (ops.total() == 1)} float")
        if read:
            clauses.append(f"{read} Gather of rows in {bits} bits")
    floats = [entry for entry in entries if entry.floats]
    if floats:
        whole, biases = (Counter(entry.op for entry in floats if bool(entry.coded) == coded) for coded in (False, True))
        what = " and ".join([*([_ops(whole)] if whole else []), *([f"biases of {_ops(biases)}"] if biases else [])])
        size = sum(entry.floats for entry in floats)
        unit, factor = ("MB", 1e6) if total >= 1e6 else ("kB", 1e3)
        part = f"{size / factor:.2f}" if size >= factor / 10 else f"{size / 1e3:.1f} kB"
        shares = f"{part} of {total / factor:.2f} {unit}"
        clauses.append(f"{what}, {shares}, stay{'s' * (whole.total() == 1 and not biases)} float")
    return clauses


def _ops(ops: Counter[str]) -> str:
    """The most frequent operators with their numbers."""
    shown = [f"{n} {op}" for op, n in ops.most_common(3)]
    rest = ops.total() - sum(n for _, n in ops.most_common(3))
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
