"""Where a quantized network's error comes from: what has accumulated at each layer, and what each layer adds by itself.

Two measurements, one sample at a time, so that no more than one sample's activations are held in memory; signal and noise
are added up over the samples:

accumulated   the float and the quantized network run side by side; signal to noise in dB at each layer's output
own           the float network alone; beside each layer, copies of it with rounded weight, with rounded input, and with
              both, so that only this layer's own quantizers make the difference

Layers are ranked by a third one, the outputs with one layer alone quantized: in KWT-1 the layers with the largest error of
their own cause hardly any of the noise at the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.calibration.reductions import add_reduction
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.measure.arrays import decibels, energies
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import bias_values, weight_values
from onnxq_plugins.spec import Array

Feeds = Sequence[Mapping[str, Array]]
_HELD = 2**28  # bytes of activations fetched from one run


@dataclass(frozen=True)
class Own:
    """Signal to noise in dB at a layer's output with only its own quantizers, each alone and both together.

    mean_share   part of the weight's noise (0..1, before a Relu) that is a constant error per channel, which a bias could
                 cancel
    """

    weight: float
    input: float
    both: float
    mean_share: float


# ---- accumulated ----------------------------------------------------------------------------------------------------------


def accumulated_errors(
    graph: Graph, model: onnx.ModelProto, names: Sequence[str], feeds: Feeds, shown: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Tensor of the float graph -> dB at it in the quantized network, with the errors of all layers before it.

    model   the quantized form of the graph
    shown   what tensors are called there, where they have another name
    """
    energy, there = {name: np.zeros(2) for name in names}, shown or {}
    for portion in _portions(graph, names):
        exact, weights = _fetching(graph, portion)
        reads = {name: _Read(model, there.get(name, name)) for name in portion}
        rounded = onnx.ModelProto()
        rounded.CopyFrom(model)
        _add_outputs(rounded, [reads[name].fetched for name in portion])
        runners = runtimes.session(exact, weights=weights), runtimes.session(rounded)
        for feed in feeds:
            ys = runners[0].run(portion, dict(feed))
            zs = runners[1].run([reads[name].fetched for name in portion], dict(feed))
            for name, y, z in zip(portion, ys, zs, strict=True):
                energy[name] += energies(y, reads[name].values(z))[0]
    return {name: decibels(sums) for name, sums in energy.items()}


def _portions(graph: Graph, names: Sequence[str]) -> Iterator[list[str]]:
    """The tensors in portions small enough to hold at once; dynamic axes count as 1."""
    portion: list[str] = []
    held = 0
    for name in names:
        size = 8 * int(np.prod([n for n in graph.shape(name) or () if isinstance(n, int)]))
        if portion and held + size > _HELD:
            yield portion
            portion, held = [], 0
        portion.append(name)
        held += size
    if portion:
        yield portion


class _Read:
    """How one tensor is read from a quantized network: as codes if it has some, so that the kernels stay the same."""

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
        values: Array = (fetched.astype(np.float32) - np.float32(self.zero)) * self.scale
        return values


def _fetching(graph: Graph, names: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    weights: dict[str, Array] = {}
    model = graph.model(weights)
    _add_outputs(model, names)
    return model, weights


def _add_outputs(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Make tensors outputs of the model as well."""
    known = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in dict.fromkeys(names) if n not in known)


# ---- own ------------------------------------------------------------------------------------------------------------------


def own_errors(planned: Planned, feeds: Feeds, tensors: Sequence[str] = ()) -> dict[str, Own]:
    """Planned layers by name, and planned tensors as "tensor NAME", since a tensor may be called like a layer -> the error
    that they add by themselves.

    tensors   planned activations that no layer reads: for these only the effect of rounding them is measured
    """
    copies = _Copies(planned)
    for layer in planned.layers:
        copies.add(layer)
    for name in tensors:
        copies.add_tensor(name)
    return copies.run(feeds) if copies.fields else {}


class _Copies:
    """The float network with rounded copies of its layers beside them, and sums of the squared differences."""

    def __init__(self, planned: Planned) -> None:
        self.planned, self.graph, self.plan = planned, planned.graph, planned.plan
        self.weights: dict[str, Array] = {}
        self.model = self.graph.model(self.weights)
        self.nodes = {n.name: n for n in self.model.graph.node}
        self.fields: list[tuple[str, str]] = []  # (layer, what) of each output
        self.rounded: dict[tuple[str, str], str] = {}  # (tensor, its key) -> its rounded form
        del self.model.graph.output[:]

    def add(self, layer: Layer) -> None:
        """Add the copies of one layer and the sums of squares of their errors."""
        spec, key = self.plan[layer.weight], self.planned.input(layer)
        weight = self._constant(f"{layer.name}|weight", weight_values(layer, spec))
        bias = layer.bias or ""
        if spec.shift is not None:
            values = bias_values(self.graph, layer, spec)
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
        """Add the error that rounding a tensor makes in itself."""
        self._sum(f"tensor {name}", "signal", name)
        self._difference(f"tensor {name}", "both", self._fake(name, name), name)

    def run(self, feeds: Feeds) -> dict[str, Own]:
        """The errors over all samples."""
        runner = runtimes.session(self.model, weights=self.weights, lean=True)
        names = dict.fromkeys(name for name, _ in self.fields)
        energy: dict[str, dict[str, Array]] = {name: {} for name in names}
        means: dict[str, list[Array]] = {name: [] for name in names}
        squares: dict[str, list[float]] = {name: [] for name in names}
        for feed in feeds:
            values = dict(zip(self.fields, runner.run(None, dict(feed)), strict=True))
            for (name, what), value in values.items():
                if what in ("weight", "input", "both"):
                    sums = np.array([values[name, "signal"], value], np.float64)
                    if np.isfinite(sums).all():  # where the float network overflows there is nothing to compare
                        energy[name][what] = energy[name].get(what, np.zeros(2)) + sums
                elif what == "means":
                    means[name].append(np.asarray(value, np.float64))
                elif what == "square":
                    squares[name].append(float(value))
        errors = {}
        for name in names:
            weight, inner, both = (decibels(energy[name].get(what, np.zeros(2))) for what in ("weight", "input", "both"))
            square = float(np.mean(squares[name])) if squares[name] else 0.0
            constant = float(np.mean(np.square(np.mean(means[name], axis=0)))) if means[name] else 0.0
            errors[name] = Own(weight, inner, both, min(constant / square, 1.0) if square > 0 else 0.0)
        return errors

    def _copy(self, layer: Layer, what: str, inputs: list[str]) -> tuple[str, str]:
        """Add the layer again with other inputs. Returns its output, and that after its Relu or Clip."""
        plain = f"{layer.name}|{what}|output"
        self._repeat(self.nodes[layer.name], inputs, plain)
        if layer.result == layer.output:
            return plain, plain
        node = self.graph.producer(layer.result)
        assert node is not None
        after = self.nodes[node.name]
        self._repeat(after, [plain, *after.input[1:]], f"{layer.name}|{what}|result")
        return plain, f"{layer.name}|{what}|result"

    def _repeat(self, node: onnx.NodeProto, inputs: list[str], output: str) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = output
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        copy.output.append(output)
        self.model.graph.node.append(copy)

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

    def _difference(self, layer: str, what: str, rounded: str, exact: str) -> None:
        self._op("Sub", [rounded, exact], f"{layer}|{what}|error")
        self._sum(layer, what, f"{layer}|{what}|error")

    def _means(self, layer: Layer, rounded: str) -> None:
        """Add the mean error per channel, and the mean of its square over all channels."""
        shape = self.graph.shape(layer.output)
        if shape is None or not layer.takes_bias:
            return
        axes = tuple(a for a in range(len(shape)) if a != channel_axis(self.graph, layer.output))
        error, square = f"{layer.name}|bare|error", f"{layer.name}|bare|square"
        self._op("Sub", [rounded, layer.output], error)
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
        """Add a float32 constant; a large one as a placeholder, without a copy."""
        values = np.ascontiguousarray(values) if values.ndim else values
        if values.nbytes <= 1024:
            self.model.graph.initializer.append(numpy_helper.from_array(values, name))
            return name
        stub = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL)
        stub.external_data.add(key="location", value="weights")
        self.model.graph.initializer.append(stub)
        self.weights[name] = values
        return name
