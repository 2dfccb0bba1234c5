"""Quantizers that must change together, the widths they may have, and the cost of a choice of widths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.flow import activation_inputs, result_of
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target

FLOAT_BITS = 32


@dataclass(frozen=True, order=True)
class Width:
    """A candidate: bits of weights and of the activations they meet; 32 and 32 for float."""

    weights: int
    activations: int

    @staticmethod
    def parse(text: str) -> Width:
        """``W4A8`` or ``float``. Raises ValueError for anything else."""
        if text == "float":
            return Width(FLOAT_BITS, FLOAT_BITS)
        match = re.fullmatch(r"W(\d+)A(\d+)", text)
        if match is None or not all(2 <= int(n) <= 16 for n in match.groups()):
            raise ValueError(f"candidate '{text}' must look like W4A8 (bits from 2 to 16), or be 'float'")
        return Width(*(int(n) for n in match.groups()))

    def __str__(self) -> str:
        return "float" if self.weights == FLOAT_BITS else f"W{self.weights}A{self.activations}"


@dataclass(frozen=True)
class Group:
    """Quantizers that share a width: planned activations, and the layers whose weights meet them."""

    activations: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name in reports: its first layer, or "tensor" and its first activation (a layer may have the name of a
        tensor)."""
        return self.layers[0] if self.layers else f"tensor {self.activations[0]}"


def quantizer_groups(graph: Graph, plan: Plan, target: Target) -> list[Group]:
    """The groups of a plan, in the order of the graph: an activation with the weights of all layers that read it; the inputs
    of an integer Add, Concat or product of two activations are tied, since its kernel takes one width. A weight-only layer
    is a group of its own.

    Source: Practical Mixed Precision (arXiv 2302.05397), section 3.
    """
    from scipy.cluster.hierarchy import DisjointSet  # late: slow to import, and only searches need it

    planned = Planned(graph, plan, target)
    names = planned.activations
    tied = DisjointSet(names)
    layers = {layer.name: layer for layer in graph.layers}
    order: dict[str, int] = {}  # planned activations -> where they first appear
    alone: dict[str, int] = {}  # weight-only layers
    members: dict[str, list[str]] = {}
    for position, node in enumerate(graph.nodes):
        keys = list(dict.fromkeys(key for t in activation_inputs(graph, node) if (key := planned.source(t))))
        for key in keys:
            order.setdefault(key, position)
        if node.name in layers:
            if layers[node.name].weight in plan:
                if key := planned.input(layers[node.name]):
                    members.setdefault(key, []).append(node.name)
                else:
                    alone[node.name] = position
        elif len(keys) > 1 and (node.op in target.integer_ops or node.op == "MatMul"):
            for key in keys[1:]:
                tied.merge(key, keys[0])
        if result_of(graph, node) in tied:
            order.setdefault(result_of(graph, node), position + 1)
    gathered: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted(names, key=lambda n: order.get(n, -1)):
        mine = gathered.setdefault(tied[name], ([], []))
        mine[0].append(name)
        mine[1].extend(members.get(name, []))
    placed = [(order.get(a[0], -1), Group(tuple(a), tuple(w))) for a, w in gathered.values()]
    placed += [(position, Group((), (name,))) for name, position in alone.items()]
    return [group for _, group in sorted(placed, key=lambda p: p[0])]


def multiply_adds(graph: Graph, feed: Mapping[str, Array]) -> dict[str, int]:
    """Multiply-adds of each layer for one sample, from the shapes in a run of the float model: one for each output and
    weight that contributes to it, or for each input and weight that spreads it (ConvTranspose)."""
    tensors = {y.name: y.input if y.op == "ConvTranspose" else y.output for y in graph.layers}
    shapes = shapes_of(graph, feed, tensors.values())
    return {
        y.name: math.prod(shapes[tensors[y.name]])
        * int(np.prod(y.shape))
        // (y.shape[0] if y.op == "ConvTranspose" else y.channels)
        for y in graph.layers
    }


def share_of_work(graph: Graph, products: Iterable[str]) -> float | None:
    """The share of a network's multiply-adds in some products of two activations, from shapes inferred at batch 1, without a
    run; None where these are not known.

    products   names of MatMul nodes
    """
    model = graph.model({})  # placeholders for large weights
    del model.graph.value_info[:]
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim[:1]:
            dim.dim_value = dim.dim_value or 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (ValueError, onnx.shape_inference.InferenceError):
        return None
    shapes = {
        v.name: [d.dim_value if d.HasField("dim_value") else np.nan for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.input, *inferred.value_info, *inferred.output)
        if v.type.tensor_type.HasField("shape")  # else not even the number of axes is known
    }
    layers = [
        np.prod(shapes.get(layer.input, [np.nan])) * np.prod(layer.shape) / layer.shape[0]
        if layer.op == "ConvTranspose"
        else np.prod(shapes.get(layer.output, [np.nan])) * np.prod(layer.shape) / layer.channels
        for layer in graph.layers
    ]
    work = {
        node.name: np.prod(shapes.get(node.outputs[0].name, [np.nan])) * shapes.get(node.inputs[0].name, [np.nan])[-1]
        for node in graph.nodes
        if node.op == "MatMul" and not node.domain and not any(graph.is_constant(t.name) for t in node.inputs)
    }
    share = sum(work.get(name, np.nan) for name in products) / max(sum(layers) + sum(work.values()), 1)
    return float(share) if np.isfinite(share) else None


@dataclass(frozen=True)
class Cost:
    """The cost of a choice of widths.

    size      bits of the weights
    bops      bit operations for one sample: multiply-adds x bits of the weight x bits of the input
    latency   milliseconds for one sample; 0 if not measured
    """

    size: float
    bops: float
    latency: float = 0.0


def cost(graph: Graph, widths: Mapping[str, Width], work: Mapping[str, int]) -> Cost:
    """The cost of one width per layer. Source of bit operations: Practical Mixed Precision, section 2.

    work   multiply-adds per layer
    """
    sizes = {layer.name: float(np.prod(layer.shape)) for layer in graph.layers}
    return Cost(
        sum(sizes[name] * w.weights for name, w in widths.items()),
        sum(float(work.get(name, 0)) * w.weights * w.activations for name, w in widths.items()),
    )


def parse_widths(texts: Iterable[str]) -> tuple[Width, ...]:
    """Candidates, widest first. Raises ValueError if one is malformed, or there are none."""
    if not (texts := list(texts)):
        raise ValueError("candidates must name at least one width, such as W8A8")
    return tuple(
        sorted({Width.parse(text) for text in texts}, key=lambda w: (w.weights * w.activations, w.activations), reverse=True)
    )
