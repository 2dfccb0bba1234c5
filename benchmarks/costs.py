"""Fit the table of what kernels cost (onnxq_plugins/runtimes/costs.json) on this machine, and say how well it fits.

    python -m benchmarks.costs [--write NAME] [--rounds 12] [--seed 0]

Each round times a network of some dozens of single operators of random shapes, float and in QDQ form, kernel by kernel in
onnxruntime's profile, one thread. Coefficients are fitted per class of kernels by least squares of the relative error, none
negative; half of the shapes only judge. Prints Markdown; --write puts the coefficients into the package, under the name of
an instruction set.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

import onnxq_plugins
from benchmarks.int8 import machine
from onnxq_plugins.graph.opsets import CONTRIB, tuned
from onnxq_plugins.runtimes.costs import FEATURES, Kernel
from onnxq_plugins.runtimes.profiles import profile
from onnxq_plugins.spec import Array

CHANNELS = (1, 3, 8, 12, 16, 20, 24, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 192, 240, 256, 320, 384, 512, 576)
WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
SIZES = (1, 2, 4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160)
ELEMENTWISE = (
    "Add",
    "Mul",
    "Add",
    "Mul",
    "Concat",
    "Sigmoid",
    "LeakyRelu",
    "HardSigmoid",
    "Tanh",
    "Erf",
    "Clip",
    "Relu",
    "Softmax",
    "PRelu",
    "Exp",
    "Sub",
    "Div",
    "Gelu",
    "Swish",
    "HardSwish",
    "LayerNormalization",
)
WINDOWS = ("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "ReduceMean", "Pad")
MOVES = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "Transpose": "transpose",
    "ReorderInput": "block",
    "ReorderOutput": "unblock",
}
_MOST = 1.2e8  # multiply-adds of an operator
_LARGEST = 2_000_000  # values of a tensor
_SCALES = (0.005, 0.05, 1.0)  # of both, one for each network: operators of small networks find more in the caches
_INPUT = _LARGEST + 1000
Draw = Callable[[np.random.Generator], Kernel]


def _size(rng: np.random.Generator) -> list[int]:
    n = int(rng.choice(SIZES))
    return [n, int(rng.choice([n, n, n, 2 * n, 1]))]


def convolution(rng: np.random.Generator) -> Kernel:
    kind = rng.choice(["dense", "narrow", "pointwise", "depthwise"], p=[0.25, 0.1, 0.35, 0.3])
    inputs, outputs, (height, width) = int(rng.choice(CHANNELS)), int(rng.choice(CHANNELS)), _size(rng)
    taps = {"pointwise": [1, 1], "narrow": [int(rng.choice([3, 5, 9])), 1]}.get(kind, [int(rng.choice([3, 3, 3, 5, 7]))] * 2)
    stride = 1 if kind == "pointwise" else int(rng.choice([1, 1, 2]))
    groups, width = 1, 1 if kind == "narrow" else max(width, 2)
    if kind == "depthwise":
        groups = outputs = inputs
    strides = [stride, 1 if width == 1 else stride]
    output = (1, outputs, -(-height // strides[0]), -(-width // strides[1]))
    attrs = {"kernel_shape": taps, "strides": strides, "pads": [(k - 1) // 2 for k in taps] * 2, "group": groups}
    weight = (outputs, inputs // groups, *taps)
    return Kernel("Conv", ((1, inputs, height, width),), output, weight, groups, attrs)


def product(rng: np.random.Generator) -> Kernel:
    rows, inner, columns = (int(rng.choice(n)) for n in ([1, 1, 4, 16, 50, 128, 256], WIDTHS, WIDTHS))
    if rng.random() < 0.5:
        return Kernel("Gemm", ((rows, inner),), (rows, columns), (inner, columns))
    return Kernel("MatMul", ((1, rows, inner),), (1, rows, columns), (inner, columns))


def attention(rng: np.random.Generator) -> Kernel:
    heads, rows, inner, columns = (int(rng.choice(n)) for n in ([1, 4, 8, 12], [8, 32, 64, 128], [16, 32, 64], [8, 32, 128]))
    return Kernel("MatMul", ((heads, rows, inner), (heads, inner, columns)), (heads, rows, columns))


def elementwise(rng: np.random.Generator) -> Kernel:
    op = str(rng.choice(ELEMENTWISE))
    shape = (1, int(rng.choice(CHANNELS)), *_size(rng))
    if op == "PRelu":
        shape = (1, shape[1], *[max(n, 2) for n in shape[2:]])
    attrs: dict[str, Any] = {}
    if op == "Concat":
        return Kernel(op, (shape, shape), (1, 2 * shape[1], *shape[2:]), attrs={"axis": 1})
    gate = (1, shape[1], 1, 1)
    inputs = (shape, gate if rng.random() < 0.3 else shape) if op in ("Add", "Mul", "Sub", "Div") else (shape,)
    return Kernel(op, inputs, shape, attrs=attrs)


def window(rng: np.random.Generator) -> Kernel:
    op = str(rng.choice(WINDOWS))
    channels, (height, width) = int(rng.choice(CHANNELS)), [max(n, 2) for n in _size(rng)]
    shape = (1, channels, height, width)
    if op in ("GlobalAveragePool", "ReduceMean"):
        return Kernel(op, (shape,), (1, channels, 1, 1), attrs={} if op == "GlobalAveragePool" else {"keepdims": 1})
    if op == "Resize":
        return Kernel(
            op, (shape,), (1, channels, 2 * height, 2 * width), attrs={"mode": str(rng.choice(["nearest", "linear"]))}
        )
    if op == "Pad":
        return Kernel(op, (shape,), (1, channels, height + 2, width + 2))
    return Kernel(op, (shape,), (1, channels, height // 2, width // 2), attrs={"kernel_shape": [2, 2], "strides": [2, 2]})


DRAWS: tuple[tuple[Draw, float], ...] = (
    (convolution, 0.5),
    (product, 0.15),
    (attention, 0.03),
    (elementwise, 0.22),
    (window, 0.1),
)
INTEGER = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "MaxPool"}
    | {"Resize"}
)


def draw(rng: np.random.Generator, scale: float) -> Kernel:
    """An operator of random shape, of a size that an edge network of some scale has."""
    while True:
        make = DRAWS[rng.choice(len(DRAWS), p=[share for _, share in DRAWS])][0]
        kernel = make(rng)
        largest = max(map(prod, (*kernel.inputs, kernel.output, *([kernel.weight] if kernel.weight else []))))
        if kernel.features(False)[1] * 1e6 < scale * _MOST and largest < scale * _LARGEST:
            return kernel


@dataclass
class Network:
    """A network of operators side by side, each from inputs of its own to an output of its own."""

    integer: bool
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}_node", **attrs))
        return output

    def codes(self, name: str, zero: int = 128) -> str:
        """A tensor through Q and DQ."""
        if not self.integer:
            return name
        grid = [self.constant(f"{name}_s", np.float32(0.05)), self.constant(f"{name}_z", np.uint8(zero))]
        codes = self.node("QuantizeLinear", [name, *grid], f"{name}_q")
        return self.node("DequantizeLinear", [codes, *grid], f"{name}_d")

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        values = self.rng.standard_normal(shape).astype(np.float32)
        if not self.integer:
            return self.constant(name, values)
        codes = self.constant(f"{name}_q", np.clip(40 * values, -127, 127).astype(np.int8))
        scale = self.constant(f"{name}_s", np.full(shape[axis], 0.02, np.float32))
        return self.node("DequantizeLinear", [codes, scale], name, axis=axis)

    def bias(self, name: str, size: int) -> str:
        if not self.integer:
            return self.constant(name, np.ones(size, np.float32))
        codes, scale = self.constant(f"{name}_q", np.ones(size, np.int32)), np.full(size, 0.001, np.float32)
        return self.node("DequantizeLinear", [codes, self.constant(f"{name}_s", scale)], name, axis=0)

    def add(self, i: int, kernel: Kernel) -> None:
        """An operator, its number in the names of all its tensors."""
        names = []
        for k, shape in enumerate(kernel.inputs):
            start = 2 * i + k  # or equal parts would be taken for one
            ends = [self.constant(f"x{i}_{k}_{end}", np.array([n])) for end, n in enumerate((start, start + prod(shape)))]
            part = self.node("Slice", ["x", *ends], f"x{i}_{k}_part")
            part = self.node("Reshape", [part, self.constant(f"x{i}_{k}_shape", np.array(shape))], f"x{i}_{k}_shaped")
            names.append(self.codes(self.node("Neg", [part], f"x{i}_{k}")))  # Quantize moves in front of the others
        op, attrs, y = kernel.op, dict(kernel.attrs), f"y{i}"
        if op in WINDOWS:  # behind a convolution, in its order of values
            channels = kernel.inputs[0][1]
            names = [self.node("Conv", [*names, self.weight(f"w{i}", (channels, channels, 1, 1), 0)], f"before{i}")]
            names = [self.codes(names[0])]
        if op == "Conv":
            self.node(op, [*names, self.weight(f"w{i}", kernel.weight, 0), self.bias(f"b{i}", kernel.weight[0])], y, **attrs)
            y = self.node("Relu", [y], f"r{i}")
        elif kernel.weight:
            bias = [self.bias(f"b{i}", kernel.weight[1])] if op == "Gemm" else []
            self.node(op, [*names, self.weight(f"w{i}", kernel.weight, 1), *bias], y)
        elif op in ("PRelu", "Gelu", "Swish"):  # as they are exported
            slopes = np.full((kernel.output[1], 1, 1), 0.2, np.float32)
            inputs = [*names, self.constant(f"s{i}", slopes)] if op == "PRelu" else names
            self.nodes += tuned(helper.make_node(op, inputs, [y], f"{y}_node"), slopes) or []
        elif op == "LayerNormalization":
            self.node(op, [*names, self.constant(f"s{i}", np.ones(kernel.output[-1], np.float32))], y)
        elif op == "Resize":
            self.node(op, [*names, "", self.constant(f"s{i}", np.float32([1, 1, 2, 2]))], y, **attrs)
        elif op == "Pad":
            self.node(op, [*names, self.constant(f"s{i}", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], y)
        elif op == "Clip":
            self.node(op, [*names, *(self.constant(f"{s}{i}", np.float32(v)) for s, v in (("l", -1), ("h", 1)))], y)
        else:
            self.node(op, names, y, **attrs)
        y = self.codes(y, 0 if op in ("Conv", "Sigmoid") else 128) if not kernel.weight or op == "Conv" else y
        self.ends.append(self.node("ReduceMax", [y], f"end{i}", keepdims=0))

    def model(self) -> onnx.ModelProto:
        """One input that all operators read parts of, one output: a session takes time for each."""
        self.node("Max", self.ends, "y")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [_INPUT]), ("y", []))
        ]
        graph = helper.make_graph(self.nodes, "operators", ends[:1], ends[1:], self.constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)], ir_version=9
        )


@dataclass(frozen=True)
class Sample:
    """Microseconds of a kernel or a conversion in a profile, the sum over so many nodes with so many inputs and outputs."""

    kind: str
    features: tuple[float, ...]
    traced: float
    nodes: int
    ports: int


def measured(
    kernels: list[Kernel], rng: np.random.Generator, seconds: float, added: list[tuple[int, int, float]]
) -> Iterator[Sample]:
    """Times of operators, float and integer, and of what surrounds them.

    added   takes, for each network, its nodes, their inputs and outputs, and the microseconds that profiling adds
    """
    networks = [Network(False, rng), Network(True, rng)]
    values = rng.standard_normal(_INPUT).astype(np.float32)
    for network in networks:
        for i, kernel in enumerate(kernels):
            if not network.integer or kernel.op in INTEGER:
                network.add(i, kernel)
        one = profile([network.model()], {"x": values}, seconds)[0][0]
        times = np.nan_to_num(1e3 * one.nodes)
        ports = np.array([len(node.input) + len(node.output) for node in one.optimized.node])
        added.append((len(times), int(ports.sum()), float(times.sum()) - 1e3 * one.milliseconds))
        made = {name: node for node in one.optimized.node for name in node.output}
        own: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for node, time, count in zip(one.optimized.node, times, ports, strict=True):
            number = _branch(node, made)
            kernel = kernels[number] if number is not None else None
            if number is None or kernel is None or (kernel.op in WINDOWS and "Conv" in node.op_type):
                continue
            if node.op_type in MOVES and kernel.op != node.op_type:
                size = prod(kernel.output) if _behind(node, made) else prod(kernel.inputs[0])
                yield Sample(MOVES[node.op_type], (1.0, size / 1e3), float(time), 1, int(count))
            else:
                own[number].append((float(time), int(count)))
        for number, parts in own.items():
            kind, features = kernels[number].kind(network.integer), kernels[number].features(network.integer)
            yield Sample(kind, features, sum(t for t, _ in parts), len(parts), sum(n for _, n in parts))


def _branch(node: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> int | None:
    """The number of the operator that a node belongs to, by the input it comes from; None for what feeds it or ends it."""
    if node.op_type in ("Slice", "Reshape", "Neg", "Max") or node.output[0].startswith("end"):
        return None
    name = node.input[0]
    while name in made and made[name].op_type != "Neg":
        name = made[name].input[0]
    return int(name.split("_")[0][1:]) if name in made else None  # a constant's


def _behind(node: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> bool:
    """True if a conversion is behind the operator itself."""
    name = node.input[0]
    while name in made and made[name].op_type in MOVES:
        name = made[name].input[0]
    return name in made and made[name].op_type != "Neg"


def fitted(samples: list[tuple[tuple[float, ...], float]]) -> Array:
    """Coefficients of least relative error, none negative; large errors count less than squared."""
    x = np.array([features for features, _ in samples])
    y = np.array([time for _, time in samples])
    weights = 1 / (y + 2.0)
    scales = weights.copy()
    for _ in range(20):
        found, _ = nnls(x * scales[:, None], y * scales)
        scales = weights / np.sqrt(np.maximum(np.abs((x @ found - y) * weights), 0.02))
    return np.asarray(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="NAME", help="put the coefficients into the package, for this instruction set")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    added: list[tuple[int, int, float]] = []
    every = []
    for n in range(args.rounds):
        kernels = [draw(rng, _SCALES[n % len(_SCALES)]) for _ in range(20)]
        every += measured(kernels, rng, args.seconds, added)
    totals = np.array(added)
    extra, _ = nnls(totals[:, :2] / totals[:, :1], totals[:, 2] / totals[:, 0])  # per node, and per input and output
    print(f"profiling adds {extra[0]:.2f} us a node and {extra[1]:.2f} us an input or output\n")
    by_kind: dict[str, list[tuple[tuple[float, ...], float]]] = defaultdict(list)
    for s in every:
        by_kind[s.kind].append((s.features, max(s.traced - extra @ (s.nodes, s.ports), 0.1)))
    print(
        f"{machine()}\n\n| kernels | shapes | median error | 90 % | {' | '.join(FEATURES)} |\n"
        f"|{'---|' * (4 + len(FEATURES))}"
    )
    table = {}
    for kind, samples in sorted(by_kind.items()):
        half = fitted(samples[::2]) if len(samples) > 8 else fitted(samples)
        judged = samples[1::2] if len(samples) > 8 else samples
        errors = [abs(np.dot(features, half) - time) / (time + 2.0) for features, time in judged]
        coefficients = fitted(samples)
        table[kind] = [float(f"{c:.4g}") for c in coefficients]
        cells = [f"{100 * np.median(errors):.0f} %", f"{100 * np.quantile(errors, 0.9):.0f} %", *map(str, table[kind])]
        print(f"| {kind} | {len(samples)} | {' | '.join(cells)} |")
    if args.write:
        file = Path(onnxq_plugins.__file__).parent / "runtimes/costs.json"
        tables = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        tables[args.write] = {"source": machine(), "kernels": table}
        rows = [
            f' {json.dumps(name)}: {{"source": {json.dumps(one["source"])}, "kernels": {{\n'
            + ",\n".join(f"  {json.dumps(kind)}: {json.dumps(row)}" for kind, row in one["kernels"].items())
            + "\n }}"
            for name, one in tables.items()
        ]
        file.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
