"""Bounds of values are Relu or Clip, which integer kernels absorb, instead of Max and Min; of two in a row one remains.
Slopes that channels share are LeakyRelu, which has an integer kernel."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.affine import operands
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.rewriting import Rewrite, is_float32, left_out, rank_of, read_alone, rewrite_of, values_of

Bounds = tuple[float, float]


def _bounds(node: gs.Node) -> Bounds | None:
    """Lowest and highest value that a Relu or Clip lets pass; None if they are computed."""
    if node.op == "Relu":
        return 0.0, math.inf
    found = [(-math.inf, math.inf)[at] if left_out(node, at + 1) else values_of(node, at + 1) for at in (0, 1)]
    if any(v is None or np.size(v) != 1 for v in found):
        return None
    low, high = (float(np.asarray(v).item()) for v in found)
    return (low, high) if low <= high else None


def _bound(graph: Graph, node: gs.Node, x: gs.Tensor, low: float, high: float) -> None:
    """Make an operator the Relu or Clip of a tensor."""
    node.op, node.attrs = "Relu" if (low, high) == (0.0, math.inf) else "Clip", {}
    ends: list[gs.Tensor] = []
    for at, value in enumerate((low, high) if node.op == "Clip" else ()):
        finite = math.isfinite(value)
        ends.append(graph.add_constant(f"{node.name}_{at}", np.array(value, np.float32)) if finite else gs.Variable.empty())
    while ends and ends[-1].is_empty():
        ends.pop()
    node.inputs = [x, *ends]


@rewrite_of("Max", "Min")
def bound_by_constant(graph: Graph, node: gs.Node) -> bool:
    """The larger of x and a number is Relu or Clip, and so is the smaller."""
    found = operands(node)
    if found is None or found[1].size != 1 or not np.isfinite(found[1]).all() or found[1].ndim > (rank_of(found[0]) or 0):
        return False
    value = float(found[1].item())
    _bound(graph, node, found[0], *((value, math.inf) if node.op == "Max" else (-math.inf, value)))
    return True


@rewrite_of("Relu", "Clip")
def join_bounds(graph: Graph, node: gs.Node) -> bool:
    """Of Relu and Clip in a row one remains."""
    first = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if first is None or first.op not in ("Relu", "Clip") or first.domain or not read_alone(graph, node.inputs[0], node):
        return False
    one, other = _bounds(first), _bounds(node)
    if one is None or other is None or not is_float32(first.inputs[0]) or isinstance(first.inputs[0], gs.Constant):
        return False
    low, high = max(one[0], other[0]), min(one[1], other[1])
    if low > high:
        return False
    _bound(graph, node, first.inputs[0], low, high)
    return True


@rewrite_of("PRelu")
def share_slope(graph: Graph, node: gs.Node) -> bool:
    """A PRelu of one slope for all channels is a LeakyRelu, which integer kernels know."""
    slopes = values_of(node, 1)
    if slopes is None or slopes.size == 0 or not np.isfinite(slopes).all() or (slopes != slopes.flat[0]).any():
        return False
    if slopes.ndim > (rank_of(node.inputs[0]) or 0) or not is_float32(node.inputs[0]):
        return False
    node.op, node.attrs, node.inputs = "LeakyRelu", {"alpha": float(slopes.flat[0])}, [node.inputs[0]]
    return True


BOUNDS: tuple[Rewrite, ...] = (bound_by_constant, join_bounds, share_slope)
