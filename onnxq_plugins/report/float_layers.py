"""Layers in float kernels: why each runs there, and which layers must be float for an activation to stay unrounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.graph.flow import activation_inputs, maker_of, readers
from onnxq_plugins.job import Outcome
from onnxq_plugins.plan.requests import request, rule_keys
from onnxq_plugins.report.remedies import Remedy, float_remedies, layer_rule
from onnxq_plugins.search.quantizers import multiply_adds
from onnxq_plugins.spec import Array

_MOST = 4  # layers that a remedy may make float


@dataclass(frozen=True)
class FloatLayer:
    """A layer that runs in a float kernel.

    why        the reason
    work       its part of the network's multiply-adds, 0..1
    remedies   what may bring it into an integer kernel
    """

    name: str
    op: str
    kernel: str
    why: str
    work: float
    remedies: tuple[Remedy, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "op": self.op,
            "kernel": self.kernel,
            "why": self.why,
            "work": round(self.work, 4),
            "remedies": [r.to_dict() for r in self.remedies],
        }


def float_layers(result: Outcome, feed: Mapping[str, Array]) -> tuple[FloatLayer, ...]:
    """The layers of a result that run in float kernels, those with the most work first.

    feed   one sample, from which the work of layers of dynamic size is known
    """
    rows = [row for row in result.report.layers if "why_float" in row]
    if not rows:
        return ()
    work = multiply_adds(result.graph, feed)
    total = max(sum(work.values()), 1)
    keys = rule_keys(result.graph, result.recipe)
    layers = []
    for row in rows:
        name, op, reason = row["name"], row["op"], Reason(row["why_float_kind"], row["why_float"])
        remedies = float_remedies(name, op, reason, result.target, keys.get(name, frozenset()))
        layers.append(FloatLayer(name, op, row["kernel"], str(reason), work.get(name, 0) / total, remedies))
    return tuple(sorted(layers, key=lambda layer: -layer.work))


class LayersToFloat:
    """Which layers must be float for an activation to be float: found by planning with candidate sets, as the planner knows
    what each operator reads and writes."""

    def __init__(self, result: Outcome) -> None:
        self.graph, self.target, self.recipe = result.graph, result.target, result.recipe
        products = {n.name for n in self.graph.nodes if n.op == "MatMul" and not n.domain}  # of two activations, too
        self.eligible = {y.name for y in self.graph.layers} | products
        self.known: dict[str, tuple[str, ...]] = {}

    def names(self, activation: str) -> tuple[str, ...]:
        """Names in the order of the network, without those that are float already; empty if more than a few are needed."""
        root = self.graph.root(activation)
        if root not in self.known:
            self.known[root] = self._search(root)
        return self.known[root]

    def _search(self, root: str) -> tuple[str, ...]:
        reading = readers(self.graph, root) & self.eligible
        makers = self._makers(root)
        candidates = [reading, *(reading | {maker} for maker in makers), reading | set(makers)]
        try:
            floats = set(request(self.graph, self.recipe, self.target).floats)
            enough = next((names for names in candidates if names and self._is_float(root, names)), set())
        except OnnxqError:  # a rule of the recipe is about a layer that a pass replaced
            return ()
        names = tuple(n.name for n in self.graph.nodes if n.name in enough - floats)
        return names if len(names) <= _MOST else ()

    def _makers(self, root: str) -> list[str]:
        """The nearest layers upstream: the one that writes the tensor, or those that feed the operator that does."""
        node = maker_of(self.graph, root)
        if node is None or node.name in self.eligible:
            return [] if node is None else [str(node.name)]
        upstream = [maker_of(self.graph, self.graph.root(name)) for name in activation_inputs(self.graph, node)]
        return [str(n.name) for n in upstream if n is not None and n.name in self.eligible]

    def _is_float(self, root: str, names: set[str]) -> bool:
        """True if the tensor is float when these layers are."""
        rules = tuple(layer_rule(name, quantize=False) for name in sorted(names))
        plan = request(self.graph, replace(self.recipe, layers=self.recipe.layers + rules), self.target).plan
        return all(self.graph.is_constant(name) or self.graph.root(name) != root for name in plan)
