"""What activations look like without running the model: means, deviations and spans per channel, from the statistics of
folded BatchNormalizations and, where there are none, by sending normal distributions through the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxq_plugins import runtime
from onnxq_plugins.calibration import channel_axis, channels
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.solvers.gaussian import clipped_moments, mapped_moments
from onnxq_plugins.spec import Array

# How alike neighbouring positions of an activation are: in images mostly a smooth part that they share.
_ALIKE = 0.5
_CURVES = {"Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg", "Selu",
           "Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}


@dataclass(frozen=True, eq=False)
class Moments:
    """An activation per channel, [C] each, or [1] where channels are not told apart.

    mean, variance   over samples and positions
    low, high        the span that holds all but the rarest values: so many deviations around the mean, within the bounds
                     that a Relu, Clip or Sigmoid sets
    """

    mean: Array
    variance: Array
    low: Array
    high: Array

    def pooled(self) -> Moments:
        """All channels as one."""
        mean = self.mean.mean(keepdims=True)
        return Moments(mean, (self.variance + (self.mean - mean) ** 2).mean(keepdims=True), self.low.min(keepdims=True),
                       self.high.max(keepdims=True))

    def sized(self, size: int | None) -> Moments:
        """For another number of channels: each one repeated, as a Flatten does, or all as one."""
        if size is None or size == len(self.mean) or len(self.mean) == 1:
            return self
        if size % len(self.mean):
            return self.pooled()
        return Moments(*(np.repeat(part, size // len(self.mean))
                         for part in (self.mean, self.variance, self.low, self.high)))


    def fitted(self, size: int | None) -> Moments:
        """As it is where it has `size` channels or tells none apart, else all channels as one."""
        return self if len(self.mean) in (1, size) else self.pooled()

    def widened(self, size: int) -> Moments:
        """One value per channel."""
        return Moments(*(np.broadcast_to(part, size) for part in (self.mean, self.variance, self.low, self.high)))


Found = dict[str, Moments]


def expected(graph: Graph, inputs: Mapping[str, Moments], deviations: float = 6.0, through: bool = True) -> Found:
    """Moments of every activation that can be told, by name.

    inputs       of the model's inputs
    deviations   how many of them a span reaches on either side of the mean: 6 in Data-Free Quantization
    through      go on through layers without statistics, by their weights; False: what they write is not told

    A layer into which a BatchNormalization was folded writes mean beta and deviation |gamma|, whatever it reads. For others
    the inputs count as independent, neighbouring positions of a convolution as half alike; sums of tensors count as
    independent; operators of one variable see a normal distribution. Padding is left out of account.

    Source: Data-Free Quantization (arXiv 1906.04721), sections 4.2 and 5, for layers with statistics; moment propagation
    elsewhere is common in uncertainty estimation, the rules below are our own.
    """
    walk = _Walk(graph, deviations)
    walk.found.update(inputs)
    layers = {y.name: y for y in graph.layers}
    for node in graph.nodes:
        if node.domain or not node.outputs:
            continue
        if node.name in layers:
            layer = layers[node.name]
            made = walk.layer(layer) if through or layer.output in graph.batchnorms else None
        else:
            made = walk.node(node)
        if made is not None:
            for output in node.outputs:
                walk.found[output.name] = made.sized(channels(graph, output.name))
    return walk.found


class _Walk:
    """The rules, one operator a method or entry."""

    def __init__(self, graph: Graph, deviations: float) -> None:
        self.graph, self.k = graph, deviations
        self.found: Found = {}

    def normal(self, mean: Array, variance: Array, low: Array | float = -np.inf, high: Array | float = np.inf) -> Moments:
        reach = self.k * np.sqrt(variance)
        return Moments(mean, variance, np.maximum(mean - reach, low), np.minimum(mean + reach, high))

    def layer(self, layer: Layer) -> Moments | None:
        norm = self.graph.batchnorms.get(layer.output)
        if norm is not None:
            return self.normal(norm.beta.astype(np.float64), norm.gamma.astype(np.float64) ** 2)
        x = self.found.get(layer.input)
        if x is None or layer.op == "ConvTranspose":
            return None
        weight = layer.matrix(self.graph.constant(layer.weight)).astype(np.float64)
        taps = int(np.prod(layer.shape[2:])) if layer.op == "Conv" else 1
        by_input = weight.reshape(*weight.shape[:2], -1, taps)
        width = layer.groups * by_input.shape[2]
        mean, variance = (np.broadcast_to(part if len(part) == width else part.mean(), width).reshape(layer.groups, -1)
                          for part in (x.mean, x.variance))
        total = by_input.sum(axis=3)
        power = (1 - _ALIKE) * np.sum(by_input**2, axis=3) + _ALIKE * total**2 if taps > 1 else total**2
        bias = self.graph.constant(layer.bias).astype(np.float64).reshape(-1) if layer.bias is not None else 0.0
        return self.normal(np.einsum("goi,gi->go", total, mean).reshape(-1) + bias,
                           np.einsum("goi,gi->go", power, variance).reshape(-1))

    def node(self, node: Any) -> Moments | None:
        op, output = str(node.op), node.outputs[0].name
        if op == "LayerNormalization":
            gamma, beta = (self.graph.constant(t.name).astype(np.float64) if self.graph.is_constant(t.name) else np.ones(1)
                           for t in (node.inputs[1], node.inputs[min(2, len(node.inputs) - 1)]))
            beta = beta if len(node.inputs) > 2 else 0 * gamma
            return self.normal(beta + 0 * gamma, gamma**2 + 0 * beta)
        if op == "Softmax":
            size = (self.graph.shape(output) or (None,))[-1]
            return Moments(np.array([1 / size if isinstance(size, int) else 0.0]), np.zeros(1), np.zeros(1), np.ones(1))
        several = op in ("Add", "Sub", "Mul", "Div", "MatMul", "Concat")
        parts = [self.value(t, output) for t in (node.inputs if several else node.inputs[:1])]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts) or not parts:
            return None
        if op in ("Relu", "Clip"):
            return self._clipped(known[0], node)
        if op in _CURVES:
            return self._mapped(known[0], _curve(node, self.graph.opset))
        if op in ("Add", "Sub", "Mul", "Div"):
            return self._binary(op, *(p.fitted(channels(self.graph, output)) for p in known))
        if op == "MatMul":
            return self._product(node, *known)
        if op == "Concat":
            return self._concat(node, known)
        if op in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
            return self._averaged(known[0], node)
        if op in ("Slice", "Gather", "Split") and channels(self.graph, output) != channels(self.graph, node.inputs[0].name):
            return known[0].pooled()
        return known[0] if self.graph.is_shape_only(node) or op in ("Dropout", "Cast", "Expand") else None

    def value(self, tensor: Any, output: str) -> Moments | None:
        """What a tensor holds; a constant per channel of the output that is computed with it."""
        shape = self.graph.shape(output)
        if not self.graph.is_constant(tensor.name):
            return self.found.get(tensor.name)
        values = self.graph.constant(tensor.name)
        if values.dtype.kind != "f" or shape is None:
            return None
        size, at = channels(self.graph, output), channel_axis(self.graph, output) - len(shape) + values.ndim
        spread = at >= 0 and values.shape[at] == size
        values = np.moveaxis(values.astype(np.float64), at, 0) if spread else values.astype(np.float64)[None]
        rows = values.reshape(len(values), -1)
        return Moments(rows.mean(axis=1), rows.var(axis=1), rows.min(axis=1), rows.max(axis=1))

    def _clipped(self, x: Moments, node: Any) -> Moments | None:
        ends = clip_ends(self.graph, node)
        if ends is None:
            return None
        mean, variance = clipped_moments(x.mean, x.variance, *ends)
        return Moments(mean, variance, np.clip(x.low, *ends), np.clip(x.high, *ends))

    def _mapped(self, x: Moments, function: Callable[[Array], Array]) -> Moments:
        mean, variance = mapped_moments(x.mean, x.variance, function)
        values = function(np.linspace(x.low, x.high, 65))
        return Moments(mean, variance, values.min(axis=0), values.max(axis=0))

    def _binary(self, op: str, a: Moments, b: Moments) -> Moments | None:
        if op == "Div":
            if (b.variance > 0).any() or (b.mean == 0).any():
                return None
            b = Moments(1 / b.mean, b.variance, 1 / b.mean, 1 / b.mean)
        if op in ("Add", "Sub"):
            sign = 1 if op == "Add" else -1
            ends = (a.low + b.low, a.high + b.high) if sign > 0 else (a.low - b.high, a.high - b.low)
            return self.normal(a.mean + sign * b.mean, a.variance + b.variance, *ends)
        corners = np.stack(np.broadcast_arrays(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high))
        variance = (a.variance + a.mean**2) * (b.variance + b.mean**2) - (a.mean * b.mean) ** 2
        return self.normal(a.mean * b.mean, variance, corners.min(axis=0), corners.max(axis=0))

    def _product(self, node: Any, a: Moments, b: Moments) -> Moments:
        """Two activations. Rows of a Softmax add up to 1: they average the other factor."""
        maker = self.graph.producer(node.inputs[0].name)
        if maker is not None and maker.op == "Softmax":
            return Moments(b.mean, b.variance / 2, b.low, b.high)
        size = (self.graph.shape(node.inputs[0].name) or (None,))[-1]
        n = size if isinstance(size, int) else 64
        p, q = a.pooled(), b.pooled()
        variance = n * ((p.variance + p.mean**2) * (q.variance + q.mean**2) - (p.mean * q.mean) ** 2)
        return self.normal(n * p.mean * q.mean, variance)

    def _concat(self, node: Any, known: Sequence[Moments]) -> Moments:
        output = node.outputs[0].name
        rank = len(self.graph.shape(output) or ())
        if rank and node.attrs.get("axis", 0) % rank == channel_axis(self.graph, output):
            sizes = [channels(self.graph, t.name) or len(p.mean) for t, p in zip(node.inputs, known, strict=True)]
            return _joined([p.fitted(n).widened(n) for p, n in zip(known, sizes, strict=True)], np.concatenate)
        stacked = _joined([p.fitted(channels(self.graph, output)).widened(max(len(p.mean) for p in known)) for p in known],
                          np.stack)
        mean = stacked.mean.mean(axis=0)
        return Moments(mean, (stacked.variance + (stacked.mean - mean) ** 2).mean(axis=0), stacked.low.min(axis=0),
                       stacked.high.max(axis=0))

    def _averaged(self, x: Moments, node: Any) -> Moments:
        """A mean over n positions, neither independent (variance / n) nor all the same: halfway, on a logarithmic scale."""
        before, after = (self.graph.shape(t.name) or () for t in (node.inputs[0], node.outputs[0]))
        sizes = [float(np.prod([s for s in shape[2:] if isinstance(s, int)])) for shape in (before, after)]
        made = self.normal(x.mean, x.variance / np.sqrt(max(sizes[0] / sizes[1], 1.0)), x.low, x.high)
        return made if node.op != "ReduceMean" or len(before) == len(after) or len(before) > 3 else made.pooled()


def _joined(parts: Sequence[Moments], join: Callable[[list[Array]], Array]) -> Moments:
    return Moments(*(join([getattr(p, name) for p in parts]) for name in ("mean", "variance", "low", "high")))


def _curve(node: Any, opset: int) -> Callable[[Array], Array]:
    """An operator of one variable as a function of arrays: onnxruntime's own."""
    graph = helper.make_graph([helper.make_node(node.op, ["x"], ["y"], **node.attrs)], "curve",
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", "n"])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", "n"])])
    runner = runtime.session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))

    def run(x: Array) -> Array:
        return np.asarray(runner.run(None, {"x": x.astype(np.float32)})[0], np.float64)

    return run


def clip_ends(graph: Graph, node: Any) -> tuple[float, float] | None:
    """The ends of a Relu or Clip; None if they are computed."""
    if node.op == "Relu":
        return 0.0, np.inf
    ends = [-np.inf, np.inf]
    for i, bound in enumerate(node.inputs[1:3]):
        if not bound.is_empty():
            if not graph.is_constant(bound.name):
                return None
            ends[i] = float(graph.constant(bound.name).item())
    return ends[0], ends[1]
