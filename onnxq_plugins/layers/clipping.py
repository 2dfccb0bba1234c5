"""Ranges of least squared error: what is clipped against how finely the rest is rounded, seen from who reads a tensor.

Beyond what saturates a Sigmoid or a Tanh nothing is lost: there the error of their output counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.flow import readers
from onnxq_plugins.job import Job
from onnxq_plugins.solvers.ranges import mse_range
from onnxq_plugins.spec import Array

Range = tuple[float, float]
Function = Callable[[Array], Array]


def least_squares(job: Job, names: Iterable[str], bins: int = 2048) -> dict[str, Range]:
    """The range of least mean squared error of each activation; of what a saturating function reads alone, least error of
    the values of that. Those whose grid has more codes than the histogram has bins, or that are constant, are left out.

    Cost: a run over the data, after that for the extremes.
    """
    ranges: dict[str, Range] = {}
    for name, h in job.calibration.histograms(list(names), bins).items():
        levels = 2 ** job.plan[name].bits
        if h.high > h.low and levels <= bins:
            ranges[name] = mse_range(h.counts, h.low, h.high, levels, through=saturating(job.graph, name))
    return ranges


def saturating(graph: Graph, name: str) -> Function | None:
    """The function of a tensor that all who read it compute between them, if it saturates: x -> Sigmoid(x), also times x;
    None if the tensor is read in another way, too, or is an output of the network."""
    if name in graph.outputs:
        return None
    nodes = {str(n.name): n for n in graph.nodes}
    found = [nodes[n] for n in readers(graph, name)]
    gates = [node for node in found if node.op in _SATURATING]
    if len(gates) != 1 or any(not _gated(graph, name, node, gates[0]) for node in found if node is not gates[0]):
        return None
    function = _SATURATING[gates[0].op](gates[0].attrs)
    return function if len(found) == 1 else lambda x: x * function(x)


def _gated(graph: Graph, name: str, node: Any, gate: Any) -> bool:
    """True if a node multiplies a tensor by what a gate made of it."""
    read = {graph.root(t.name) for t in node.inputs}
    return node.op == "Mul" and read == {graph.root(name), graph.root(gate.outputs[0].name)}


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


_SATURATING: dict[str, Callable[[Mapping[str, Any]], Function]] = {
    "Sigmoid": lambda _: _sigmoid,
    "Tanh": lambda _: np.tanh,
    "HardSigmoid": lambda a: lambda x: np.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda _: lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Softsign": lambda _: lambda x: x / (1 + np.abs(x)),
    "Gelu": lambda _: lambda x: x * _sigmoid(1.702 * x),  # near enough to choose a range by
    "Elu": lambda a: lambda x: np.where(x > 0, x, a.get("alpha", 1.0) * np.expm1(np.minimum(x, 0))),
}
