"""Where a quantized network's error comes from: what has gathered at each layer, and what each layer adds by itself.

Two ways of looking, one sample at a time, so that no more than one sample's activations are held:

gathered   the float and the quantized network run side by side; at each layer's output, signal to noise in dB
own        the float network alone; beside each layer its copies with rounded weight, with rounded input, and with both, so
           that nothing but this layer's own quantizers makes the difference
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.calibration.statistics import add_reduction
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import bias_values, weight_values
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target

Feeds = Sequence[Mapping[str, Array]]
_HELD = 2**28  # bytes of activations fetched from one run
_SILENT = 200.0  # dB that stand for equality, as in runtimes.sqnr


@dataclass(frozen=True)
class Own:
    """Signal to noise in dB at a layer's output that its own quantizers make, each alone and together; `mean_share` is the
    part of the weight's noise (0..1, before a Relu) that is a constant error per channel, which a bias could take back."""

    weight: float
    input: float
    both: float
    mean_share: float


# ---- gathered -------------------------------------------------------------------------------------------------------------


def gathered(graph: Graph, model: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> dict[str, float]:
    """Tensor of the float graph -> dB at it in the quantized network, where all errors before it have gathered.

    model   the quantized form of the graph: tensors keep their names in it (`qdq.export`)
    """
    found: dict[str, list[float]] = {name: [] for name in names}
    for some in _portions(graph, names):
        exact, weights = _fetching(graph, some)
        reads = {name: _Read(model, name) for name in some}
        rounded = onnx.ModelProto()
        rounded.CopyFrom(model)
        _outputs(rounded, [reads[name].fetched for name in some])
        runners = runtimes.session(exact, weights=weights), runtimes.session(rounded)
        for feed in feeds:
            ys = runners[0].run(some, dict(feed))
            zs = runners[1].run([reads[name].fetched for name in some], dict(feed))
            for name, y, z in zip(some, ys, zs, strict=True):
                noise = np.square(reads[name].values(z) - y, dtype=np.float64).sum()
                found[name].append(_ratio(float(np.square(y, dtype=np.float64).sum()), float(noise)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _portions(graph: Graph, names: Sequence[str]) -> Iterator[list[str]]:
    """The tensors in runs that are not too much to hold at once; dynamic axes count as 1."""
    some: list[str] = []
    held = 0
    for name in names:
        size = 8 * int(np.prod([n for n in graph.shape(name) or () if isinstance(n, int)]))
        if some and held + size > _HELD:
            yield some
            some, held = [], 0
        some.append(name)
        held += size
    if some:
        yield some


class _Read:
    """How one tensor is read off a quantized network: as codes where it has some, so that kernels stay what they are."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self.fetched, self.scale, self.zero = name, np.float32(1), 0
        constants = {t.name: t for t in model.graph.initializer}
        quantizer = next((n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name), None)
        if quantizer is not None:
            self.fetched = quantizer.output[0]
            self.scale = np.float32(numpy_helper.to_array(constants[quantizer.input[1]]))
            self.zero = int(numpy_helper.to_array(constants[quantizer.input[2]]))

    def values(self, fetched: Array) -> Array:
        """What the readers of the tensor compute with, float32."""
        if fetched.dtype.kind == "f":
            return fetched
        made: Array = (fetched.astype(np.float32) - np.float32(self.zero)) * self.scale
        return made


def _fetching(graph: Graph, names: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    weights: dict[str, Array] = {}
    model = graph.model(weights)
    _outputs(model, names)
    return model, weights


def _outputs(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Make some tensors outputs, beside those that are."""
    known = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in dict.fromkeys(names) if n not in known)


# ---- own ------------------------------------------------------------------------------------------------------------------


def own(graph: Graph, plan: Plan, target: Target, feeds: Feeds, tensors: Sequence[str] = ()) -> dict[str, Own]:
    """Planned layers by name, and planned tensors by name -> the error that they add by themselves.

    tensors   planned activations that no layer reads: only what rounding does to them is told
    """
    made = _Copies(graph, plan, target)
    for layer in graph.layers:
        if layer.weight in plan:
            made.add(layer)
    for name in tensors:
        made.add_tensor(name)
    return made.run(feeds) if made.fields else {}


class _Copies:
    """The float network with copies of its layers beside them, and sums of what they differ by."""

    def __init__(self, graph: Graph, plan: Plan, target: Target) -> None:
        self.graph, self.plan, self.target = graph, plan, target
        self.weights: dict[str, Array] = {}
        self.model = graph.model(self.weights)
        self.nodes = {n.name: n for n in self.model.graph.node}
        self.fields: list[tuple[str, str]] = []  # (layer, what) of each output
        self.rounded: dict[tuple[str, str], str] = {}  # (tensor, its key) -> its rounded form
        del self.model.graph.output[:]

    def add(self, layer: Layer) -> None:
        """Copies of one layer and the sums of squares of their errors."""
        graph, spec = self.graph, self.plan[layer.weight]
        key = Planned(graph, self.plan, self.target).input(layer)
        weight = self._constant(f"{layer.name}|weight", weight_values(layer, spec))
        bias = layer.bias or ""
        if spec.shift is not None:
            values = bias_values(graph, layer, spec)
            assert values is not None
            bias = self._constant(f"{layer.name}|bias", values.astype(np.float32))
        exact, coded = layer.input, self._fake(layer.input, key) if key else ""
        forms = {
            "weight": (exact, weight, bias),
            "input": (coded, layer.weight, layer.bias or ""),
            "both": (coded or exact, weight, bias),
        }
        self._sum(layer.name, "signal", layer.result)
        for what, inputs in forms.items():
            if inputs[0]:
                plain, after = self._copy(layer, what, [name for name in inputs if name])
                self._difference(layer.name, what, after, layer.result)
                if what == "weight":
                    self._means(layer, plain)

    def add_tensor(self, name: str) -> None:
        """What rounding does to a tensor itself."""
        self._sum(name, "signal", name)
        self._difference(name, "both", self._fake(name, name), name)

    def run(self, feeds: Feeds) -> dict[str, Own]:
        """The errors over all samples."""
        runner = runtimes.session(self.model, weights=self.weights, lean=True)
        names = dict.fromkeys(name for name, _ in self.fields)
        ratios: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        means: dict[str, list[Array]] = {name: [] for name in names}
        squares: dict[str, list[float]] = {name: [] for name in names}
        for feed in feeds:
            values = dict(zip(self.fields, runner.run(None, dict(feed)), strict=True))
            for (name, what), value in values.items():
                if what in ("weight", "input", "both"):
                    ratios[name].setdefault(what, []).append(_ratio(float(values[name, "signal"]), float(value)))
                elif what == "means":
                    means[name].append(np.asarray(value, np.float64))
                elif what == "square":
                    squares[name].append(float(value))
        found = {}
        for name in names:
            weight, inner, both = (float(np.mean(ratios[name].get(what, [_SILENT]))) for what in ("weight", "input", "both"))
            square = float(np.mean(squares[name])) if squares[name] else 0.0
            constant = float(np.mean(np.square(np.mean(means[name], axis=0)))) if means[name] else 0.0
            found[name] = Own(weight, inner, both, min(constant / square, 1.0) if square > 0 else 0.0)
        return found

    def _copy(self, layer: Layer, what: str, inputs: list[str]) -> tuple[str, str]:
        """A layer once more with other inputs: its output, and that behind the Relu or Clip that belongs to it."""
        plain = f"{layer.name}|{what}|output"
        self._again(self.nodes[layer.name], inputs, plain)
        if layer.result == layer.output:
            return plain, plain
        node = self.graph.producer(layer.result)
        assert node is not None
        after = self.nodes[node.name]
        self._again(after, [plain, *after.input[1:]], f"{layer.name}|{what}|result")
        return plain, f"{layer.name}|{what}|result"

    def _again(self, node: onnx.NodeProto, inputs: list[str], output: str) -> None:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name = output
        del made.input[:], made.output[:]
        made.input.extend(inputs)
        made.output.append(output)
        self.model.graph.node.append(made)

    def _fake(self, name: str, key: str) -> str:
        """A tensor after a round trip through its codes, in float operators."""
        if (name, key) not in self.rounded:
            spec = self.plan[key]
            at = f"{name}|rounded"
            scale = self._constant(f"{at}|scale", np.asarray(spec.scale, np.float32))
            zero = int(np.asarray(spec.zero_point))
            low, high = (
                self._constant(f"{at}|{side}", np.asarray(code - zero, np.float32))
                for side, code in zip(("low", "high"), spec.grid, strict=True)
            )
            self._op("Div", [name, scale], f"{at}|steps")
            self._op("Round", [f"{at}|steps"], f"{at}|whole")
            self._op("Clip", [f"{at}|whole", low, high], f"{at}|codes")
            self._op("Mul", [f"{at}|codes", scale], at)
            self.rounded[name, key] = at
        return self.rounded[name, key]

    def _difference(self, layer: str, what: str, made: str, exact: str) -> None:
        self._op("Sub", [made, exact], f"{layer}|{what}|error")
        self._sum(layer, what, f"{layer}|{what}|error")

    def _means(self, layer: Layer, made: str) -> None:
        """Mean error per channel, and mean of its square over all."""
        shape = self.graph.shape(layer.output)
        if shape is None or not layer.takes_bias:
            return
        axes = tuple(a for a in range(len(shape)) if a != channel_axis(self.graph, layer.output))
        error, square = f"{layer.name}|bare|error", f"{layer.name}|bare|square"
        self._op("Sub", [made, layer.output], error)
        self._op("Mul", [error, error], square)
        add_reduction(self.model, "ReduceMean", error, f"{layer.name}|bare|means", axes, self.graph.opset)
        add_reduction(self.model, "ReduceMean", square, f"{layer.name}|bare|mean", None, self.graph.opset)
        self.fields += [(layer.name, "means"), (layer.name, "square")]

    def _sum(self, layer: str, what: str, name: str) -> None:
        add_reduction(self.model, "ReduceSumSquare", name, f"{layer}|{what}|sum", None, self.graph.opset)
        self.fields.append((layer, what))

    def _op(self, op: str, inputs: list[str], output: str) -> None:
        self.model.graph.node.append(helper.make_node(op, inputs, [output], output))

    def _constant(self, name: str, values: Array) -> str:
        """A float32 constant; a large one as a placeholder, not copied."""
        values = np.ascontiguousarray(values) if values.ndim else values
        if values.nbytes <= 1024:
            self.model.graph.initializer.append(numpy_helper.from_array(values, name))
            return name
        stub = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
        stub.external_data.add(key="location", value="weights")
        self.model.graph.initializer.append(stub)
        self.weights[name] = values
        return name


def _ratio(signal: float, noise: float) -> float:
    """dB; as `runtimes.sqnr`, 200 for equality. A tensor that is 0 has no signal to lose."""
    return 10 * float(np.log10(signal / max(noise, signal * 1e-20))) if signal > 0 else _SILENT
