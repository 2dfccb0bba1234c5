"""Where a run of a network spends its time: kernels by class, and what conversions between integers and floats, or from one
layout to another, take of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxq_plugins.runtimes.profiles import Profile

INTEGER = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "QAttention",
    }
)  # kernels of layers that read codes
_FLOAT = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv"), "Conv"),
    **dict.fromkeys(("Gemm", "FusedGemm"), "Gemm"),
    **dict.fromkeys(("MatMul", "FusedMatMul", "TransposeMatMul"), "MatMul"),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), "recurrent"),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention"), "attention"),
    "ConvTranspose": "ConvTranspose",
}
QUANTIZE, LAYOUT, COPY = "Quantize and Dequantize", "reorders and Transposes", "copies"
_ACTIVATIONS = (
    "Relu Clip LeakyRelu PRelu ThresholdedRelu Elu Selu Celu Sigmoid HardSigmoid HardSwish Swish QuickGelu Gelu FastGelu "
    "BiasGelu Tanh Erf Exp Softplus Softsign Mish Softmax LogSoftmax QLinearLeakyRelu QLinearSigmoid QLinearSoftmax"
)
_POOLING = (
    "MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool GlobalLpPool QLinearAveragePool QLinearGlobalAveragePool "
    "NhwcMaxPool ReduceMean QLinearReduceMean"
)
_CLASSES = {
    QUANTIZE: "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    LAYOUT: "ReorderInput ReorderOutput Transpose",
    COPY: "Identity Cast MemcpyFromHost MemcpyToHost",
    "activations": _ACTIVATIONS,
    "pooling": _POOLING,
    "sums and products": "Add Sub Mul Div Sum Min Max Pow Sqrt QLinearAdd QLinearMul",
    "normalization": "BatchNormalization LayerNormalization SkipLayerNormalization InstanceNormalization GroupNormalization "
    "SimplifiedLayerNormalization LpNormalization LRN",
}
_CLASS_OF = {
    **{op: op for op in INTEGER},
    **_FLOAT,
    **{op: name for name, ops in _CLASSES.items() for op in ops.split()},
}
REST, OUTSIDE = "the rest", "between kernels"
CONVERSIONS = (QUANTIZE, LAYOUT, COPY)
LAYERS = (*sorted(INTEGER), "Conv", "Gemm", "MatMul", "ConvTranspose")  # classes of layers, which quantization is about


@dataclass(frozen=True)
class Spent:
    """What a class of kernels takes of a run.

    name           of the class
    count          kernels that ran
    microseconds   of one run, all of them
    share          of its time
    ops            their operators -> how many, the most costly first
    """

    name: str
    count: int
    microseconds: float
    share: float
    ops: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, rounded."""
        numbers = {"kernels": self.count, "microseconds": round(self.microseconds, 2), "share": round(self.share, 4)}
        return {**numbers, "operators": self.ops}


@dataclass(frozen=True)
class Around:
    """Conversions at the borders of float operators of one type.

    op             the type
    count          how many of these there are
    conversions    kernels around them
    microseconds   that those take
    """

    op: str
    count: int
    conversions: int
    microseconds: float


@dataclass(frozen=True)
class Spending:
    """Where the time of a run goes.

    microseconds   a run takes
    rows           classes of kernels, the most costly first; the last one is what no kernel accounts for
    borders        float operators whose inputs or outputs are converted, those with the most costly conversions first
    nodes          operator of the optimized graph, by name -> its microseconds
    """

    microseconds: float
    rows: tuple[Spent, ...]
    borders: tuple[Around, ...] = ()
    nodes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: Profile) -> Spending:
        """From a profile."""
        times, whole = 1e3 * profile.corrected(), max(1e3 * profile.milliseconds, 1e-3)
        spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for node, time in zip(profile.optimized.node, times, strict=True):
            if not np.isnan(time):
                spent[class_of(node.op_type)][node.op_type].append(float(time))
        rows = [_row(name, ops, whole) for name, ops in spent.items()]
        outside = max(whole - sum(row.microseconds for row in rows), 0.0)
        rows.sort(key=lambda row: -row.microseconds)
        nodes = {n.name: float(t) for n, t in zip(profile.optimized.node, times, strict=True) if not np.isnan(t)}
        return cls(whole, (*rows, Spent(OUTSIDE, 0, outside, outside / whole, {})), _borders(profile, times), nodes)

    def of_class(self, *names: str) -> Spent:
        """Some classes together."""
        rows = [row for row in self.rows if row.name in names]
        time = sum(row.microseconds for row in rows)
        ops = {op: count for row in rows for op, count in row.ops.items()}
        return Spent(", ".join(names), sum(row.count for row in rows), time, time / self.microseconds, ops)

    @property
    def conversions(self) -> Spent:
        """All that only converts values: from integers to floats, from one layout or type to another."""
        return self.of_class(*CONVERSIONS)

    @property
    def layers(self) -> Spent:
        """All layers, in integer and in float kernels."""
        return self.of_class(*LAYERS)

    @property
    def text(self) -> str:
        """Conversions in words."""
        found = self.conversions
        if not found.count:
            return "no conversions"
        ops = ", ".join(f"{count} {op}" for op, count in found.ops.items())
        one = found.count == 1
        words = f"{found.count} conversion{'' if one else 's'} ({ops}) take{'s' if one else ''}"
        return f"{words} {found.share:.0%} of the time"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, rounded."""
        borders = [
            {"operator": y.op, "count": y.count, "conversions": y.conversions, "microseconds": round(y.microseconds, 2)}
            for y in self.borders
        ]
        found = self.conversions
        return {
            "microseconds": round(self.microseconds, 2),
            "classes": {row.name: row.to_dict() for row in self.rows},
            "conversions": {"kernels": found.count, "share": round(found.share, 4), "around": borders},
        }


def class_of(op: str) -> str:
    """The class of an operator in an optimized graph."""
    return _CLASS_OF.get(op, REST)


def classes(spendings: Iterable[Spending]) -> list[str]:
    """Classes in a table of several networks, those on which any spends most first."""
    most: dict[str, float] = {}
    for spending in spendings:
        for row in spending.rows:
            most[row.name] = max(most.get(row.name, 0.0), row.microseconds)
    last = [OUTSIDE] if OUTSIDE in most else []
    return [*sorted((name for name in most if name != OUTSIDE), key=lambda name: -most[name]), *last]


def _row(name: str, ops: Mapping[str, list[float]], whole: float) -> Spent:
    total = sum(map(sum, ops.values()))
    ordered = sorted(ops, key=lambda op: -sum(ops[op]))
    return Spent(name, sum(map(len, ops.values())), total, total / whole, {op: len(ops[op]) for op in ordered})


def _borders(profile: Profile, times: np.ndarray[Any, Any]) -> tuple[Around, ...]:
    """Conversions that hang together in a graph belong to the float operators around them, in equal parts."""
    nodes = list(profile.optimized.node)
    makers = {name: n for n, node in enumerate(nodes) for name in node.output if name}
    readers: dict[str, list[int]] = defaultdict(list)
    for n, node in enumerate(nodes):
        for name in node.input:
            readers[name].append(n)
    converts = [class_of(node.op_type) in CONVERSIONS for node in nodes]
    seen: set[int] = set()
    floats: dict[str, set[int]] = defaultdict(set)
    cost: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for start in range(len(nodes)):
        if not converts[start] or start in seen:
            continue
        group, around, open_ = [], set(), [start]
        while open_:
            at = open_.pop()
            if not converts[at]:
                around.add(at)
            elif at not in seen:
                seen.add(at)
                group.append(at)
                node = nodes[at]
                open_ += [makers[name] for name in node.input if name in makers]
                open_ += [reader for name in node.output for reader in readers[name]]
        if not any(class_of(nodes[at].op_type) == QUANTIZE for at in group):
            continue  # layouts alone are no border between integers and floats
        beside = {at for at in around if _is_float(nodes[at], profile.types[at])}
        for op in {nodes[at].op_type for at in beside}:
            own = [at for at in beside if nodes[at].op_type == op]
            floats[op].update(own)
            cost[op] += float(np.nansum(times[group])) * len(own) / len(beside)
            count[op] += len(group)
    return tuple(Around(op, len(floats[op]), count[op], cost[op]) for op in sorted(floats, key=lambda op: -cost[op]))


def _is_float(node: onnx.NodeProto, types: str) -> bool:
    """True for an operator that computes with floats."""
    if class_of(node.op_type) in INTEGER or node.op_type.startswith("QLinear"):
        return False
    try:
        first = next(iter(json.loads(types)[0]), "")
    except (ValueError, IndexError, TypeError, KeyError):
        return False
    return first in ("float", "float16", "double")
