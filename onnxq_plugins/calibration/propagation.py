"""Distributions of activations without running the model: mean, variance and span per channel, from the statistics of
folded BatchNormalizations and, where there are none, by propagating normal distributions through the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.graph import Graph, Layer, channel_axis, channels
from onnxq_plugins.graph.opsets import expand
from onnxq_plugins.solvers.gaussian import clipped_moments, mapped_moments
from onnxq_plugins.spec import Array

_CORRELATION = 0.5  # of neighbouring positions of an activation: images are mostly smooth
_CURVES = {
    "Abs",
    "Celu",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Swish",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
    "ThresholdedRelu",
}
_IN_PLACE = {"Identity", "MaxPool", "Resize"}  # shape-only operators that leave every channel where it is
_DYNAMIC = 64  # stands for the size of a dynamic axis
_LARGEST = 10**7  # elements of a table of output channels against input channels


@dataclass(frozen=True, eq=False)
class Distribution:
    """Expected values of an activation per channel, [C] each, or [1] for all channels together.

    mean, variance   over samples and positions
    low, high        the span that holds all but the rarest values: a number of deviations around the mean, within the
                     bounds of a Relu, Clip or Sigmoid
    """

    mean: Array
    variance: Array
    low: Array
    high: Array

    def pooled(self) -> Distribution:
        """All channels as one."""
        mean = self.mean.mean(keepdims=True)
        return Distribution(
            mean,
            (self.variance + (self.mean - mean) ** 2).mean(keepdims=True),
            self.low.min(keepdims=True),
            self.high.max(keepdims=True),
        )

    def fitted(self, size: int | None) -> Distribution:
        """Itself if it has `size` channels or one for all, else pooled."""
        return self if len(self.mean) in (1, size) else self.pooled()

    def widened(self, size: int) -> Distribution:
        """Broadcast to one value per channel."""
        return Distribution(*(np.broadcast_to(part, size) for part in (self.mean, self.variance, self.low, self.high)))


Distributions = dict[str, Distribution]


def propagate(
    graph: Graph, inputs: Mapping[str, Distribution], deviations: float = 6.0, through: bool = True
) -> Distributions:
    """The distribution of every activation for which one can be derived, by name.

    inputs       distributions of the model's inputs
    deviations   half the width of a span: 6 in Data-Free Quantization
    through      propagate through layers without statistics, by their weights; False: their outputs are left out

    The output of a layer into which a BatchNormalization was folded has mean beta and deviation |gamma|, whatever its input.
    For other layers inputs count as independent and neighbouring positions of a convolution as half correlated; summands
    count as independent; operators of one variable see a normal distribution. The padding of convolutions is ignored.

    Source: Data-Free Quantization (arXiv 1906.04721), sections 4.2 and 5, for layers with statistics; moment propagation
    elsewhere is common in uncertainty estimation, the rules below are our own.
    """
    walk = _Walk(graph, deviations)
    for name, distribution in inputs.items():
        walk.store(name, distribution)
    layers = {y.name: y for y in graph.layers}
    for node in graph.nodes:
        if node.domain or not node.outputs:
            continue
        output, layer = node.outputs[0].name, layers.get(node.name)
        if output in graph.batchnorms:  # of a layer, or of the sum of its parts
            beta, gamma = (v.astype(np.float64) for v in (graph.batchnorms[output].beta, graph.batchnorms[output].gamma))
            walk.store(output, walk.along(output, walk.normal(beta, gamma**2), 1))
        elif layer is not None:
            walk.store(output, walk.layer(layer) if through else None)
        elif graph.is_shape_only(node):
            for tensor, output_distribution in zip(node.outputs, walk.moved(node), strict=False):
                walk.store(tensor.name, output_distribution)
        else:
            walk.store(output, walk.node(node))
    return walk.distributions


class _Walk:
    """The rules, one operator a method or entry. Distributions are along the `channel_axis` of their tensor."""

    def __init__(self, graph: Graph, deviations: float) -> None:
        self.graph, self.deviations = graph, deviations
        self.distributions: Distributions = {}

    def normal(
        self, mean: Array, variance: Array, low: Array | float = -np.inf, high: Array | float = np.inf
    ) -> Distribution:
        reach = self.deviations * np.sqrt(variance)
        return Distribution(mean, variance, np.maximum(mean - reach, low), np.minimum(mean + reach, high))

    def store(self, name: str, distribution: Distribution | None) -> None:
        if distribution is not None:
            self.distributions[name] = distribution.fitted(channels(self.graph, name))

    def along(self, name: str, distribution: Distribution, axis: int) -> Distribution:
        """A distribution along an axis of a tensor; pooled if that is not the axis of its channels."""
        rank = len(self.graph.shape(name) or ())
        return distribution if rank and axis % rank == channel_axis(self.graph, name) else distribution.pooled()

    def layer(self, layer: Layer) -> Distribution | None:
        if layer.input not in self.distributions or layer.op == "ConvTranspose":
            return None
        axis = 1 if layer.op == "Conv" else -1
        weight = layer.matrix(self.graph.constant(layer.weight)).astype(np.float64)
        taps = int(np.prod(layer.shape[2:])) if layer.op == "Conv" else 1
        by_input = weight.reshape(*weight.shape[:2], -1, taps)
        width = layer.groups * by_input.shape[2]
        x = self.along(layer.input, self.distributions[layer.input], axis).fitted(width).widened(width)
        mean, variance = (part.reshape(layer.groups, -1) for part in (x.mean, x.variance))
        total = by_input.sum(axis=3)
        power = (1 - _CORRELATION) * np.sum(by_input**2, axis=3) + _CORRELATION * total**2 if taps > 1 else total**2
        bias = self.graph.constant(layer.bias).astype(np.float64).reshape(-1) if layer.bias is not None else 0.0
        return self.along(
            layer.output,
            self.normal(
                np.einsum("goi,gi->go", total, mean).reshape(-1) + bias, np.einsum("goi,gi->go", power, variance).reshape(-1)
            ),
            axis,
        )

    def node(self, node: Any) -> Distribution | None:
        op, output = str(node.op), node.outputs[0].name
        if op == "LayerNormalization":
            return self._normalized(node)
        if op == "Softmax":
            size = (self.graph.shape(output) or (None,))[node.attrs.get("axis", -1)]
            return Distribution(np.array([1 / size if isinstance(size, int) else 0.0]), np.zeros(1), np.zeros(1), np.ones(1))
        several = op in ("Add", "Sub", "Mul", "Div", "MatMul", "Concat")
        parts = [self.value(t, output) for t in (node.inputs if several else node.inputs[:1])]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts) or not parts:
            return None
        if op in ("Relu", "Clip"):
            return self._clipped(known[0], node)
        if op in _CURVES:
            return self._mapped(known[0], self._curve(node))
        if op in ("Add", "Sub", "Mul", "Div"):
            return self._binary(node, *(p.fitted(channels(self.graph, output)) for p in known))
        if op == "MatMul":
            return self._product(node, *known)
        if op == "Concat":
            return self._concat(node, known)
        if op in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
            return self._averaged(self.distributions.get(node.inputs[0].name), node)
        same = op == "Dropout" or (op == "Cast" and np.dtype(node.outputs[0].dtype or np.int64).kind == "f")
        return known[0] if same else None

    def value(self, tensor: Any, output: str) -> Distribution | None:
        """The distribution of an operand, per channel of the output that is computed from it element by element."""
        shape = self.graph.shape(output)
        if shape is None:
            return None
        from_end = channel_axis(self.graph, output) - len(shape)
        if not self.graph.is_constant(tensor.name):
            x, axis = self.distributions.get(tensor.name), from_end + len(self.graph.shape(tensor.name) or ())
            return self.along(tensor.name, x, axis) if x and axis >= 0 else x
        values = self.graph.constant(tensor.name)
        if values.dtype.kind != "f" or not values.size:
            return None
        at = from_end + values.ndim
        spread = at >= 0 and values.shape[at] == channels(self.graph, output)
        values = np.moveaxis(values.astype(np.float64), at, 0) if spread else values.astype(np.float64)[None]
        rows = values.reshape(len(values), -1)
        return Distribution(rows.mean(axis=1), rows.var(axis=1), rows.min(axis=1), rows.max(axis=1))

    def moved(self, node: Any) -> list[Distribution | None]:
        """For each output of an operator that only moves values. The operator is run on channel numbers to see where
        channels go; 0 is the padding of a Pad."""
        graph, name = self.graph, node.inputs[0].name
        x, size, shape = self.distributions.get(name), channels(graph, name), graph.shape(name) or ()
        outputs, axis = [t.name for t in node.outputs], channel_axis(graph, name)
        if x is None:
            return []
        if node.op in _IN_PLACE or (
            node.op == "Reshape" and axis == len(shape) - 1 and shape[-1] == (graph.shape(outputs[0]) or (0,))[-1]
        ):
            return [self.along(outputs[0], x, axis - len(shape))]
        zero = Distribution(*np.zeros((4, 1)))
        unknown: list[Distribution | None] = [_mixed([x.pooled(), zero]) if node.op == "Pad" else x.pooled()] * len(outputs)
        run = _runner(graph, node)
        if run is None or size is None or (len(x.mean) == 1 and node.op != "Pad"):
            return unknown
        sizes = [n if isinstance(n, int) else 1 if a == 0 else _DYNAMIC for a, n in enumerate(shape)]
        numbers = np.arange(1, size + 1, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(len(sizes))])
        try:
            results = run(np.broadcast_to(numbers, sizes))
        except Exception:  # the sizes assumed for dynamic axes do not fit: onnxruntime raises a dozen types
            return unknown
        whole = _joined([zero, x.widened(size)], np.concatenate)
        rows = [np.moveaxis(y, channel_axis(graph, t), 0) for t, y in zip(outputs, results, strict=True)]
        return [_picked(whole, y.reshape(len(y), -1)) if y.size else None for y in rows]

    def _normalized(self, node: Any) -> Distribution | None:
        """LayerNormalization: mean beta, deviation |gamma|; none of n values is more than sqrt(n - 1) deviations away."""
        parameters = [t.name for t in node.inputs[1:3] if not t.is_empty()]
        if not all(self.graph.is_constant(name) for name in parameters):
            return None
        gamma, *rest = (self.graph.constant(name).astype(np.float64) for name in parameters)
        beta = rest[0] if rest else np.zeros(1)
        gamma, beta = (np.ravel(v) for v in np.broadcast_arrays(gamma, beta))
        furthest = np.abs(gamma) * np.sqrt(max(gamma.size - 1, 0))
        y, output = self.normal(beta, gamma**2, beta - furthest, beta + furthest), node.outputs[0].name
        last = node.attrs.get("axis", -1) in (-1, len(self.graph.shape(output) or ()) - 1)
        return self.along(output, y, -1) if last else y.pooled()

    def _clipped(self, x: Distribution, node: Any) -> Distribution | None:
        ends = clip_ends(self.graph, node)
        if ends is None:
            return None
        return _within(*clipped_moments(x.mean, x.variance, *ends), np.clip(x.low, *ends), np.clip(x.high, *ends))

    def _curve(self, node: Any) -> Callable[[Array], Array]:
        """An operator of one variable as a function of arrays."""
        run = _runner(self.graph, node)
        assert run is not None
        return lambda x: np.asarray(run(x.astype(np.float32))[0], np.float64)

    def _mapped(self, x: Distribution, function: Callable[[Array], Array]) -> Distribution:
        values = function(np.vstack([np.linspace(x.low, x.high, 257), np.clip(0, x.low, x.high)]))
        return _within(*mapped_moments(x.mean, x.variance, function), values.min(axis=0), values.max(axis=0))

    def _binary(self, node: Any, a: Distribution, b: Distribution) -> Distribution | None:
        op = node.op
        if op == "Div":
            if not self.graph.is_constant(node.inputs[1].name) or (b.variance > 0).any() or (b.low * b.high <= 0).any():
                return None
            b = Distribution(1 / b.mean, b.variance, 1 / b.mean, 1 / b.mean)
        if op in ("Add", "Sub"):
            sign = 1 if op == "Add" else -1
            ends = (a.low + b.low, a.high + b.high) if sign > 0 else (a.low - b.high, a.high - b.low)
            return self.normal(a.mean + sign * b.mean, a.variance + b.variance, *ends)
        gated = self._gated(a, *node.inputs) or self._gated(b, *node.inputs[::-1]) if op == "Mul" else None
        if gated is not None:
            return gated
        corners = np.stack(np.broadcast_arrays(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high))
        variance = (a.variance + a.mean**2) * (b.variance + b.mean**2) - (a.mean * b.mean) ** 2
        return self.normal(a.mean * b.mean, np.maximum(variance, 0), corners.min(axis=0), corners.max(axis=0))

    def _gated(self, x: Distribution, tensor: Any, gate: Any) -> Distribution | None:
        """x sigmoid(x) and its like: one variable, not two."""
        producer = self.graph.producer(gate.name)
        if producer is None or producer.op not in _CURVES or producer.inputs[0] is not tensor:
            return None
        curve = self._curve(producer)
        return self._mapped(x, lambda z: z * curve(z))

    def _product(self, node: Any, a: Distribution, b: Distribution) -> Distribution:
        """MatMul of two activations. Rows of a Softmax add up to 1: they average the other factor."""
        producer = self.graph.producer(node.inputs[0].name)
        if producer is not None and producer.op == "Softmax":
            return Distribution(b.mean, b.variance / 2, b.low, b.high)
        size = (self.graph.shape(node.inputs[0].name) or (None,))[-1]
        n = size if isinstance(size, int) else _DYNAMIC
        p, q = a.pooled(), b.pooled()
        variance = n * ((p.variance + p.mean**2) * (q.variance + q.mean**2) - (p.mean * q.mean) ** 2)
        return self.normal(n * p.mean * q.mean, np.maximum(variance, 0))

    def _concat(self, node: Any, known: Sequence[Distribution]) -> Distribution | None:
        output = node.outputs[0].name
        shapes = [self.graph.shape(t.name) for t in node.inputs]
        axis = node.attrs["axis"] % len(self.graph.shape(output) or (None,))
        sizes = [shape[axis] if shape is not None else None for shape in shapes]
        if axis != channel_axis(self.graph, output):
            return _mixed(
                [p.fitted(channels(self.graph, output)) for p in known], [n if isinstance(n, int) else 1 for n in sizes]
            )
        sized = [(p, n) for p, n in zip(known, sizes, strict=True) if isinstance(n, int)]
        if len(sized) < len(known):
            return _mixed([p.pooled() for p in known])
        return _joined([p.fitted(n).widened(n) for p, n in sized], np.concatenate)

    def _averaged(self, x: Distribution | None, node: Any) -> Distribution | None:
        """A mean over n positions, neither independent (variance / n) nor all the same: halfway, on a logarithmic scale."""
        name, output = node.inputs[0].name, node.outputs[0].name
        shape, out_shape = self.graph.shape(name), self.graph.shape(output)
        if x is None or shape is None or out_shape is None:
            return None
        rank, axis = len(shape), channel_axis(self.graph, name)
        axes: Sequence[int] = range(2, rank)
        if node.op == "ReduceMean":
            reduced = node.attrs.get("axes")
            if len(node.inputs) > 1 and not node.inputs[1].is_empty():
                if not self.graph.is_constant(node.inputs[1].name):
                    return None
                reduced = self.graph.constant(node.inputs[1].name).tolist()
            axes = [a % rank for a in reduced] if reduced else range(0 if node.attrs.get("noop_with_empty_axes") else rank)
        sizes = node.attrs["kernel_shape"] if node.op == "AveragePool" else [shape[a] for a in axes]
        n = float(np.prod([s for s in sizes if isinstance(s, int)]))
        kept = axis - (sum(a < axis for a in axes) if len(out_shape) < rank else 0)
        x = x.pooled() if axis in axes else self.along(output, x, kept)
        return self.normal(x.mean, x.variance / np.sqrt(max(n, 1.0)), x.low, x.high)


def _within(mean: Array, variance: Array, low: Array, high: Array) -> Distribution:
    """A distribution with its mean clipped to the span, which rounding and tails may have moved it out of."""
    return Distribution(np.clip(mean, low, high), variance, low, high)


def _joined(parts: Sequence[Distribution], join: Callable[[list[Array]], Array]) -> Distribution:
    return Distribution(*(join([getattr(p, name) for p in parts]) for name in ("mean", "variance", "low", "high")))


def _mixed(parts: Sequence[Distribution], shares: Sequence[float] | None = None) -> Distribution:
    """The mixture of the parts, channel by channel, in proportion to `shares` (None: equal)."""
    stacked = _joined([p.widened(max(len(q.mean) for q in parts)) for p in parts], np.stack)
    share = np.ones(len(parts)) if shares is None else np.asarray(shares, np.float64)
    share = share[:, None] / share.sum()
    mean = (share * stacked.mean).sum(axis=0)
    return Distribution(
        mean,
        (share * (stacked.variance + (stacked.mean - mean) ** 2)).sum(axis=0),
        stacked.low.min(axis=0),
        stacked.high.max(axis=0),
    )


def _picked(whole: Distribution, numbers: Array) -> Distribution:
    """Channel c of the result has the values of the channels numbers[c] of `whole`; numbers [C, positions]."""
    rows, size = numbers.astype(np.intp), len(whole.mean)
    if (rows == rows[:, :1]).all():
        return Distribution(*(part[rows[:, 0]] for part in (whole.mean, whole.variance, whole.low, whole.high)))
    if len(rows) * size > _LARGEST:
        return whole.pooled()
    share = np.bincount((rows + size * np.arange(len(rows))[:, None]).ravel(), minlength=len(rows) * size)
    share = share.reshape(len(rows), size) / rows.shape[1]
    mean = share @ whole.mean
    return Distribution(
        mean,
        np.maximum(share @ (whole.variance + whole.mean**2) - mean**2, 0),
        np.where(share > 0, whole.low, np.inf).min(axis=1),
        np.where(share > 0, whole.high, -np.inf).max(axis=1),
    )


def _runner(graph: Graph, node: Any) -> Callable[[Array], list[Array]] | None:
    """An operator as a function of its first input, run by onnxruntime. None if other inputs of it are not constant."""
    if not all(t.is_empty() or graph.is_constant(t.name) for t in node.inputs[1:]):
        return None
    names = ["" if t.is_empty() else f"c{i}" for i, t in enumerate(node.inputs[1:])]
    constants = [
        numpy_helper.from_array(graph.constant(t.name), name) for t, name in zip(node.inputs[1:], names, strict=True) if name
    ]
    outputs = [f"y{i}" for i in range(len(node.outputs))]

    def constant(name: str, values: Array) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    single = helper.make_graph(
        expand(helper.make_node(node.op, ["x", *names], outputs, node.op, **node.attrs), graph.opset, constant),
        node.op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        constants,
    )
    runner = runtimes.session(helper.make_model(single, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=8))
    return lambda x: list(runner.run(None, {"x": np.asarray(x, np.float32, order="C")}))


def clip_ends(graph: Graph, node: Any) -> tuple[float, float] | None:
    """The bounds of a Relu or Clip; None if they are not constant."""
    if node.op == "Relu":
        return 0.0, np.inf
    ends = [-np.inf, np.inf]
    for i, bound in enumerate(node.inputs[1:3]):
        if not bound.is_empty():
            if not graph.is_constant(bound.name):
                return None
            ends[i] = float(graph.constant(bound.name).item())
    return ends[0], ends[1]
