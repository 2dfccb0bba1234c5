"""Functions that exporters write out in elementary operators become one operator that runtimes know.

GELU, Swish (SiLU) and HardSwish are recognised by value, LayerNormalization by its pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.spec import Array

erf = np.vectorize(math.erf, otypes=[np.float64])
_NUMPY: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Tanh": np.tanh,
    "Erf": erf,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Relu": lambda x: np.maximum(x, 0),
    "Sqrt": np.sqrt,
    "Min": np.minimum,
    "Max": np.maximum,
    "Clip": lambda x, lo=-np.inf, hi=np.inf: np.clip(x, lo, hi),
}
_ANCHORS = ("Tanh", "Erf", "Sigmoid", "HardSigmoid", "Clip")
_KNOWN: tuple[tuple[str, dict[str, str | float], Callable[[Array], Array]], ...] = (
    ("Gelu", {"approximate": "tanh"}, lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ("Gelu", {"approximate": "none"}, lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
    ("HardSwish", {}, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("Swish", {"alpha": 1.0}, lambda x: x / (1 + np.exp(-x))),
    ("Swish", {"alpha": 1.702}, lambda x: x / (1 + np.exp(-1.702 * x))),
)


def fuse_scalar_functions(graph: Graph) -> None:
    """GELU, Swish and HardSwish written out in elementary operators become one operator.

    Recognised by value, not by pattern: any closed region of scalar operators around a Tanh, Erf, Sigmoid, HardSigmoid or
    Clip is evaluated on a grid and compared, so every algebraic way of writing the function is found.
    """
    grid = np.concatenate([np.linspace(-9, 9, 301), np.logspace(-6, 1, 40), -np.logspace(-6, 1, 40)])
    for anchor in graph.nodes:
        if anchor.op not in _ANCHORS or not anchor.outputs:
            continue
        for x, end in _regions(graph, anchor):
            match = next((k for k in _KNOWN if _matches(end, x, grid, k[2])), None)
            if match is not None:
                op, attrs = match[:2]
                output = end.outputs[0]
                end.outputs.clear()
                graph.add_node(op, end.name, [x], [output], before=end, **dict[str, Any](attrs))
                break
    graph.tidy()


def _regions(graph: Graph, anchor: gs.Node) -> Iterator[tuple[gs.Tensor, gs.Node]]:
    """(start tensor, last node) of regions around `anchor` that may be x * f(x), smallest first."""
    ends, node = [], anchor
    for _ in range(6):
        readers = node.outputs[0].outputs
        if len(readers) != 1 or readers[0].op not in _NUMPY or node.outputs[0] in graph._graph.outputs:
            break
        node = readers[0]
        if node.op in ("Mul", "Div"):
            ends.append(node)
    starts: list[gs.Tensor] = []
    frontier = [anchor]
    for _ in range(6):
        above = [t for n in frontier for t in n.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        starts += [t for t in above if t not in starts and len(t.outputs) > 1]
        frontier = [t.inputs[0] for t in above if t.inputs]
    for end in ends:
        for start in starts:
            if _closed(graph, start, end):
                yield start, end


def _closed(graph: Graph, start: gs.Tensor, end: gs.Node) -> bool:
    """True if `end` depends on `start` and scalar constants alone and no value in between is read elsewhere."""
    region, todo, names = [end], [end], {end.name}
    while todo:
        for t in todo.pop().inputs:
            if t is start or t.is_empty():
                continue
            if isinstance(t, gs.Constant):
                if t.values.size != 1:
                    return False
                continue
            if not t.inputs or t.inputs[0].op not in (*_NUMPY, "HardSigmoid") or len(region) > 12:
                return False
            if t.inputs[0].name not in names:
                names.add(t.inputs[0].name)
                region.append(t.inputs[0])
                todo.append(t.inputs[0])
    inside = [n.outputs[0] for n in region if n is not end]
    return all(reader.name in names for t in inside for reader in t.outputs) and not any(
        t in graph._graph.outputs for t in inside
    )


def _matches(end: gs.Node, start: gs.Tensor, grid: Array, function: Callable[[Array], Array]) -> bool:
    """True if the region from `start` to `end` computes `function` on a grid of inputs."""

    def value(t: gs.Tensor) -> Array:
        if t is start:
            return grid
        if isinstance(t, gs.Constant):
            return np.asarray(t.values, np.float64).reshape(())
        node = t.inputs[0]
        if node.op == "HardSigmoid":
            alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
            return np.asarray(np.clip(alpha * value(node.inputs[0]) + beta, 0, 1))
        return np.asarray(_NUMPY[node.op](*(value(i) for i in node.inputs if not i.is_empty())))

    with np.errstate(all="ignore"):
        region, expected = value(end.outputs[0]), function(grid)
    return region.shape == expected.shape and bool(np.allclose(region, expected, rtol=1e-5, atol=1e-6))


def fuse_layernorm(graph: Graph) -> None:
    """(x - mean) / sqrt(var + eps) * gamma + beta over the last axis becomes LayerNormalization."""
    for root in graph.nodes:
        if root.op != "Sqrt":
            continue
        plus = _producer(root.inputs[0], "Add")
        variance, epsilon = variable_and_constant(plus) if plus else (None, None)
        square = _mean_of(variance)
        power = _producer(square, "Pow") or _producer(square, "Mul")
        if power is None or epsilon is None or epsilon.values.size != 1:
            continue
        two: gs.Tensor = power.inputs[1]
        if power.op == "Pow" and not (isinstance(two, gs.Constant) and two.values.size == 1 and two.values.item() == 2):
            continue
        if power.op == "Mul" and two is not power.inputs[0]:
            continue
        readers = root.outputs[0].outputs
        divide = readers[0] if len(readers) == 1 and readers[0].op == "Div" else None
        if divide is None or divide.inputs[1] is not root.outputs[0]:
            continue
        x = _centred(divide.inputs[0])
        size = list(getattr(x, "shape", None) or [None])[-1]
        if x is None or _centred(power.inputs[0]) is not x or not isinstance(size, int):
            continue
        end: gs.Node = divide
        vectors: list[Array] = []
        for op, neutral in (("Mul", 1.0), ("Add", 0.0)):
            readers = end.outputs[0].outputs
            _, constant = variable_and_constant(readers[0]) if len(readers) == 1 and readers[0].op == op else (None, None)
            if (
                constant is not None
                and constant.values.size == size
                and constant.values.shape[-1] == size
                and end.outputs[0] not in graph._graph.outputs
            ):
                vectors.append(constant.values.reshape(size).astype(np.float32))
                end = readers[0]
            else:
                vectors.append(np.full(size, neutral, np.float32))
        gamma, beta = (graph.add_constant(f"{end.name}_{n}", v) for n, v in zip(("gamma", "beta"), vectors, strict=True))
        output = end.outputs[0]
        end.outputs.clear()
        graph.add_node(
            "LayerNormalization",
            end.name,
            [x, gamma, beta],
            [output],
            before=end,
            axis=-1,
            epsilon=float(epsilon.values.item()),
        )
    graph.tidy()


def _producer(tensor: gs.Tensor | None, op: str) -> gs.Node | None:
    """The operator that computes a tensor, if it is of that kind."""
    return tensor.inputs[0] if tensor is not None and tensor.inputs and tensor.inputs[0].op == op else None


def _mean_of(tensor: gs.Tensor | None) -> gs.Tensor | None:
    """x, if `tensor` is the mean of x over the last axis alone, which is kept."""
    node = _producer(tensor, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1):
        return None
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values.tolist()
    rank = len(node.inputs[0].shape or ())
    return node.inputs[0] if axes is not None and list(axes) in ([-1], [rank - 1]) else None


def _centred(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is x - mean(x)."""
    node = _producer(tensor, "Sub")
    return node.inputs[0] if node is not None and _mean_of(node.inputs[1]) is node.inputs[0] else None


def variable_and_constant(node: gs.Node) -> tuple[gs.Tensor | None, gs.Constant | None]:
    """The variable and the constant operand of a binary operator, in either order; (None, None) unless it has both."""
    a, b = (*node.inputs, None, None)[:2]
    if isinstance(a, gs.Constant):
        a, b = b, a
    return (a, b) if isinstance(b, gs.Constant) and not isinstance(a, gs.Constant) else (None, None)
