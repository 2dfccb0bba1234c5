"""What kernels cost on this machine: single operators of random shapes, timed and fitted (`runtimes.costs`).

Each round times two networks of some dozens of operators side by side, one float, one in QDQ form, kernel by kernel in
onnxruntime's profile, one thread, and takes off what the profile itself adds to each. Coefficients are fitted per class of
kernels by least squares of the relative error, none negative."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins.graph.opsets import CONTRIB, tuned
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.runtimes.costs import GATES, Kernel
from onnxq_plugins.runtimes.profiles import Profile, interleaved, profile, typical
from onnxq_plugins.runtimes.sessions import session
from onnxq_plugins.spec import Array

CHANNELS = (1, 3, 8, 12, 16, 18, 20, 24, 30, 32, 40, 48, 52, 56, 64, 72, 80, 96, 112, 128, 144, 192, 240, 256, 320, 384, 576)
WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
SIZES = (1, 2, 4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160)
CONVOLUTIONS = ("dense", "dense", "pointwise", "pointwise", "depthwise", "depthwise", "narrow", "row", "grouped", "1d")
ELEMENTWISE = (
    *("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "HardSigmoid", "Tanh", "Erf", "Clip", "Relu", "Softmax", "PRelu"),
    *("Exp", "Sub", "Div", "Gelu", "Swish", "HardSwish", "LayerNormalization", "Sqrt", "Pow", "Slice", "Transpose"),
)
WINDOWS = ("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "ReduceMean", "Pad")
MOVES = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "Transpose": "transpose",
    "ReorderInput": "block",
    "ReorderOutput": "unblock",
}
INTEGER = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "MaxPool"}
    | {"Resize"}
)
_CONSTANTS: Mapping[str, Sequence[Any]] = {  # further inputs
    "Resize": (None, np.array([1, 1, 2, 2], np.float32)),
    "Pad": (np.array([0, 0, 1, 1, 0, 0, 1, 1]),),
    "Clip": (np.float32(-1), np.float32(1)),
    "Pow": (np.float32(2),),
    "Slice": (np.array([1]), np.array([2**31]), np.array([2])),
}
_MOST = 1.2e8  # multiply-adds of an operator
_LARGEST = 2_000_000  # values of a tensor
_SCALES = (0.005, 0.05, 1.0)  # of both, one for each network: operators of small networks find more in the caches
_INPUT = _LARGEST + 1000
_QUIET = 0.2  # of the rounds in which other work disturbs least
_LEAST = 0.05  # microseconds of a kernel
_SMALL = 1.0  # microseconds that a prediction may be off
_DOUBT = 0.02  # relative errors up to which count squared
Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """Microseconds of a kernel or of a conversion."""

    kind: str
    features: tuple[float, ...]
    time: float
    ports: float = 0.0  # of its nodes, see `Profile.ports`


# ---- random operators -----------------------------------------------------------------------------------------------------


def _size(rng: Rng) -> list[int]:
    n = int(rng.choice(SIZES))
    return [n, int(rng.choice([n, n, n, 2 * n, 1]))]


def _convolution(rng: Rng, kind: str) -> Kernel:
    inputs, outputs, (height, width) = int(rng.choice(CHANNELS)), int(rng.choice(CHANNELS)), _size(rng)
    height, width = (1, 1) if kind == "row" else (height, 1 if kind == "narrow" else max(width, 2))
    taps = [1 if kind in ("pointwise", "row") else int(rng.choice([3, 3, 3, 5, 7]))] * 2
    if kind == "narrow":
        taps = [int(rng.choice([3, 3, 5, 9, 25, 100])), 1]
        height = max(height, taps[0])
    stride = 1 if taps == [1, 1] else int(rng.choice([1, 1, 2]))
    groups = 1
    if kind == "depthwise":
        groups = outputs = inputs
    elif kind == "grouped":
        groups = int(rng.choice([2, 4]))
        inputs, outputs = groups * int(rng.choice([4, 8, 16, 32])), groups * int(rng.choice([4, 8, 16, 32]))
    strides = [stride, 1 if width == 1 else stride]
    output = (1, outputs, -(-height // strides[0]), -(-width // strides[1]))
    axes = 1 if kind == "1d" else 2
    taps, strides, shape = taps[:axes], strides[:axes], (1, inputs, height, width)[: 2 + axes]
    attrs = {"kernel_shape": taps, "strides": strides, "pads": [(k - 1) // 2 for k in taps] * 2, "group": groups}
    return Kernel("Conv", (shape,), output[: 2 + axes], (outputs, inputs // groups, *taps), groups, attrs)


def _product(rng: Rng, op: str) -> Kernel:
    rows, inner, columns = (int(rng.choice(n)) for n in ([1, 1, 4, 16, 50, 128, 256], WIDTHS, WIDTHS))
    if op == "Gemm":
        return Kernel("Gemm", ((rows, inner),), (rows, columns), (inner, columns))
    return Kernel("MatMul", ((1, rows, inner),), (1, rows, columns), (inner, columns))


def _attention(rng: Rng, op: str) -> Kernel:
    heads, rows, inner, columns = (int(rng.choice(n)) for n in ([1, 4, 8, 12], [8, 32, 64, 128], [16, 32, 64], [8, 32, 128]))
    return Kernel(op, ((heads, rows, inner), (heads, inner, columns)), (heads, rows, columns))


def _recurrent(rng: Rng, op: str) -> Kernel:
    steps, inner, hidden = (int(rng.choice(n)) for n in ([1, 1, 8, 32], WIDTHS[:8], WIDTHS[:8]))
    ways = {"direction": "bidirectional"} if rng.random() < 0.3 else {}
    return Kernel(op, ((steps, 1, inner),), (steps, 1 + bool(ways), 1, hidden), attrs={"hidden_size": hidden, **ways})


def _tensor(rng: Rng) -> tuple[int, int, int, int]:
    """The shape of a tensor of two spatial axes, of any size with the same chance for each order of magnitude."""
    channels, size = int(rng.choice(CHANNELS[2:])), 10 ** rng.uniform(1.5, np.log10(_LARGEST))
    height = max(round(np.sqrt(size / channels)), 2)
    return (1, channels, height, max(height + int(rng.integers(-1, 2)), 2))


def _elementwise(rng: Rng, op: str) -> Kernel:
    shape = _tensor(rng)
    if op == "Concat":
        return Kernel(op, (shape, shape), (1, 2 * shape[1], *shape[2:]), attrs={"axis": 1})
    if op == "Slice":
        shape = (1, shape[1], shape[2] + 1, shape[3])
        return Kernel(op, (shape,), (1, shape[1], shape[2] - 1, shape[3]))
    if op == "Transpose":
        return Kernel(op, (shape,), (1, *shape[2:], shape[1]), attrs={"perm": [0, 2, 3, 1]})
    gate = (1, shape[1], 1, 1)
    inputs = (shape, gate if rng.random() < 0.3 else shape) if op in ("Add", "Mul", "Sub", "Div") else (shape,)
    return Kernel(op, inputs, shape)


def _window(rng: Rng, op: str) -> Kernel:
    shape = _, channels, height, width = _tensor(rng)
    if op in ("GlobalAveragePool", "ReduceMean"):
        return Kernel(op, (shape,), (1, channels, 1, 1), attrs={} if op == "GlobalAveragePool" else {"keepdims": 1})
    if op == "Resize":
        mode = str(rng.choice(["nearest", "linear"]))
        return Kernel(op, (shape,), (1, channels, 2 * height, 2 * width), attrs={"mode": mode})
    if op == "Pad":
        return Kernel(op, (shape,), (1, channels, height + 2, width + 2))
    return Kernel(op, (shape,), (1, channels, height // 2, width // 2), attrs={"kernel_shape": [2, 2], "strides": [2, 2]})


_DRAWS: tuple[tuple[Callable[[Rng, str], Kernel], tuple[str, ...], int], ...] = (  # with their kinds, so many in a network
    (_convolution, CONVOLUTIONS, 20),
    (_product, ("Gemm", "MatMul"), 6),
    (_attention, ("MatMul",), 1),
    (_recurrent, ("LSTM", "GRU"), 2),
    (_elementwise, ELEMENTWISE, 10),
    (_window, WINDOWS, 4),
)


def drawn(rng: Rng, rounds: int) -> Iterator[list[Kernel]]:
    """Operators of random shapes, of sizes that edge networks have, all kinds equally often; one list for each round."""
    turns = [(draw, kinds, count, rng.permutation(len(kinds))) for draw, kinds, count in _DRAWS]
    for n in range(rounds):
        scale, kernels = _SCALES[n % len(_SCALES)], []
        for draw, kinds, count, order in turns:
            for k in range(n * count, (n + 1) * count):
                kernels.append(_fitting(rng, draw, kinds[order[k % len(order)]], scale))
        yield kernels


def _fitting(rng: Rng, draw: Callable[[Rng, str], Kernel], kind: str, scale: float) -> Kernel:
    """An operator of a kind that is not too large for a scale."""
    while True:
        kernel = draw(rng, kind)
        largest = max(map(prod, (*kernel.inputs, kernel.output, *([kernel.weight] if kernel.weight else []))))
        if kernel.features(False)[1] * 1e6 < scale * _MOST and largest < scale * _LARGEST:
            return kernel


# ---- networks of them -----------------------------------------------------------------------------------------------------


@dataclass
class _Network:
    """A network of operators side by side, each from inputs of its own to an output of its own."""

    integer: bool
    rng: Rng
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}_node", **attrs))
        return output

    def codes(self, name: str, zero: int = 128) -> str:
        """A tensor through Q and DQ."""
        if not self.integer:
            return name
        grid = [self.constant(f"{name}_s", np.float32(0.05)), self.constant(f"{name}_z", np.uint8(zero))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [name, *grid], f"{name}_q"), *grid], f"{name}_d")

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
        names = [self._input(i, k, shape) for k, shape in enumerate(kernel.inputs)]
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
        elif op in GATES:
            hidden, inner = attrs["hidden_size"], kernel.inputs[0][-1]
            rows, sizes = (kernel.output[1], GATES[op] * hidden), (("w", inner), ("r", hidden))
            parts = [self.weight(f"{n}{i}", (*rows, m), 1) for n, m in sizes]
            self.node(op, [*names, *parts], y, **attrs)
        elif op in ("PRelu", "Gelu", "Swish"):  # as they are exported
            slopes = np.full((kernel.output[1], 1, 1), 0.2, np.float32)
            inputs = [*names, self.constant(f"s{i}", slopes)] if op == "PRelu" else names
            self.nodes += tuned(helper.make_node(op, inputs, [y], f"{y}_node"), slopes) or []
        else:
            more = (np.ones(kernel.output[-1], np.float32),) if op == "LayerNormalization" else _CONSTANTS.get(op, ())
            constants = ["" if v is None else self.constant(f"s{i}_{k}", v) for k, v in enumerate(more)]
            self.node(op, [*names, *constants], y, **attrs)
        y = self.codes(y, 0 if op in ("Conv", "Sigmoid") else 128) if not kernel.weight or op == "Conv" else y
        self.ends.append(self.node("ReduceMax", [y], f"end{i}", keepdims=0))

    def _input(self, i: int, k: int, shape: tuple[int, ...]) -> str:
        start = 2 * i + k  # or equal parts would be taken for one
        ends = [self.constant(f"x{i}_{k}_{end}", np.array([n])) for end, n in enumerate((start, start + prod(shape)))]
        part = self.node("Slice", ["x", *ends], f"x{i}_{k}_part")
        part = self.node("Reshape", [part, self.constant(f"x{i}_{k}_shape", np.array(shape))], f"x{i}_{k}_shaped")
        return self.codes(self.node("Neg", [part], f"x{i}_{k}"))  # Quantize moves in front of the others

    def model(self) -> onnx.ModelProto:
        """One input that all operators read parts of, one output: a session takes time for each."""
        self.node("Max", self.ends, "y")
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", [_INPUT]), ("y", [])))
        graph = helper.make_graph(self.nodes, "operators", [x], [y], self.constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


# ---- times ----------------------------------------------------------------------------------------------------------------


def measured(rounds: int = 24, seconds: float = 1.0, seed: int = 0, track: Track = silent) -> list[Sample]:
    """Times of operators, float and integer, and of what surrounds them.

    rounds    of two networks each
    seconds   of running each of them, in turn with a network that is always the same and tells how fast the machine is
    """
    rng = np.random.default_rng(seed)
    gauge = _Network(False, rng)
    for i, kernel in enumerate(next(drawn(np.random.default_rng(0), 1))):
        gauge.add(i, kernel)
    runs, own = [], gauge.model()
    for kernels in track(list(drawn(rng, rounds)), "timing", rounds):
        for integer in (False, True):
            network = _Network(integer, rng)
            for i, kernel in enumerate(kernels):
                if not integer or kernel.op in INTEGER:
                    network.add(i, kernel)
            pair, _ = profile([own, network.model()], {"x": rng.standard_normal(_INPUT).astype(np.float32)}, seconds)
            runs.append((kernels, integer, *pair))
    usual = float(np.quantile([first.milliseconds for *_, first, _ in runs], _QUIET))
    samples: list[Sample] = []
    added = []
    for kernels, integer, first, one in runs:
        pace = usual / first.milliseconds  # other work slows all alike
        added.append(1e3 * pace * (np.nansum(one.nodes) - one.milliseconds) / one.ports.sum())
        samples += _samples(kernels, integer, one, pace)
    extra = max(float(np.median(added)), 0.0)  # microseconds that profiling adds to a node for each of its `ports`
    return [replace(sample, time=max(sample.time - extra * sample.ports, _LEAST)) for sample in samples]


def _samples(kernels: Sequence[Kernel], integer: bool, one: Profile, pace: float) -> Iterator[Sample]:
    """Times of some operators, profiling included, multiplied by `pace`."""
    made = {name: node for node in one.optimized.node for name in node.output}
    own: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for node, time, ports in zip(one.optimized.node, np.nan_to_num(1e3 * pace * one.nodes), one.ports, strict=True):
        number = _branch(node, made)
        kernel = kernels[number] if number is not None else None
        if number is None or kernel is None or (kernel.op in WINDOWS and "Conv" in node.op_type):
            continue
        if node.op_type in MOVES and kernel.op != node.op_type:
            size = prod(kernel.output) if _behind(node, made) else prod(kernel.inputs[0])
            yield Sample(MOVES[node.op_type], (1.0, size / 1e3), float(time), float(ports))
        else:
            own[number][0] += float(time)
            own[number][1] += float(ports)
    for number, (time, ports) in own.items():
        yield Sample(kernels[number].kind(integer), kernels[number].features(integer), time, ports)


def _branch(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> int | None:
    """The number of the operator that a node belongs to, by the input it comes from; None for what feeds it or ends it."""
    if node.output[0].endswith("_part") or node.op_type in ("Reshape", "Neg", "Max") or node.output[0].startswith("end"):
        return None
    name = node.input[0]
    while name in made and made[name].op_type != "Neg":
        name = made[name].input[0]
    return int(name.split("_")[0][1:]) if name in made else None  # a constant's


def _behind(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> bool:
    """True if a conversion is behind the operator itself."""
    name = node.input[0]
    while name in made and made[name].op_type in MOVES:
        name = made[name].input[0]
    return name in made and made[name].op_type != "Neg"


def fitted(samples: Sequence[Sample]) -> Array:
    """Coefficients of least relative error, none negative; large errors count less than squared."""
    from scipy.optimize import nnls  # late: slow to import

    x = np.array([sample.features for sample in samples])
    y = np.array([sample.time for sample in samples])
    weights = 1 / (y + _SMALL)
    scales = weights.copy()
    for _ in range(20):
        found, _ = nnls(x * scales[:, None], y * scales)
        scales = weights / np.sqrt(np.maximum(np.abs((x @ found - y) * weights), _DOUBT))
    return np.asarray(found)


def by_kind(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples of each class of kernels."""
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[sample.kind].append(sample)
    return dict(sorted(kinds.items()))


def errors(samples: Sequence[Sample]) -> Array:
    """Relative errors of predicted times [n], where one half of the shapes is fitted and the other one judged."""
    half, judged = (samples[::2], samples[1::2]) if len(samples) > 8 else (samples, samples)
    coefficients = fitted(half)
    return np.array([abs(np.dot(s.features, coefficients) - s.time) / (s.time + _SMALL) for s in judged])


def table(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """A class of kernels -> its coefficients."""
    rows = {kind: fitted(each) for kind, each in by_kind(samples).items()} | {"call": np.array(_call())}
    return {kind: [float(f"{c:.4g}") for c in row] for kind, row in rows.items()}


def _call() -> tuple[float, float]:
    """Microseconds that a call of a session takes, and each of its inputs and outputs."""
    counts, runners, feed = (1, 9), [], {f"x{k}": np.zeros(1, np.float32) for k in range(9)}
    for count in counts:
        x, y = ([helper.make_tensor_value_info(f"{n}{k}", TensorProto.FLOAT, [1]) for k in range(count)] for n in "xy")
        nodes = [helper.make_node("Neg", [f"x{k}"], [f"y{k}"]) for k in range(count)]
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(helper.make_graph(nodes, "call", x, y), opset_imports=opsets, ir_version=9)
        runners.append(session(model))
    few, many = (1e3 * typical(times) for times in interleaved(runners, feed, 0.3, least=200))
    each = max((many - few) / (2 * (counts[1] - counts[0])), 0.0)
    return max(few - 2 * each, 0.0), each
