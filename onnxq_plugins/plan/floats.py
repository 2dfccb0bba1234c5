"""Which operators must be float for a tensor to be float: found by planning again with candidate sets, as the planner knows
what each operator reads and writes, and where a chain of integer operators then ends."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator
from dataclasses import replace

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.flow import activation_inputs, maker_of, readers
from onnxq_plugins.job import LayerRule, Recipe
from onnxq_plugins.plan.requests import request
from onnxq_plugins.spec import Plan
from onnxq_plugins.targets import Target


def layer_rule(name: str, **settings: object) -> LayerRule:
    """A rule for one layer, whatever characters its name has."""
    return LayerRule(match=glob.escape(name), **settings)  # type: ignore[arg-type]


class FloatSets:
    """Sets of layers and products of two activations that make a tensor of a plan float.

    most   operators in a set at most
    """

    def __init__(self, graph: Graph, recipe: Recipe, target: Target, most: int) -> None:
        names = {str(node.name) for node in graph.nodes}
        rules = tuple(r for r in recipe.layers if r.everywhere or any(map(r.names, names)))
        self.graph, self.target, self.most = graph, target, most
        self.recipe = replace(recipe, layers=rules)  # without those about layers that a pass replaced
        products = {n.name for n in graph.nodes if n.op == "MatMul" and not n.domain}  # of two activations, too
        self.eligible = {y.name for y in graph.layers} | products
        self.weights = {y.weight: y.name for y in graph.layers}
        self.order = {str(n.name): at for at, n in enumerate(graph.nodes)}
        self._known: dict[str, tuple[str, ...]] = {}
        self._floats: set[str] | None = None

    def names(self, tensor: str) -> tuple[str, ...]:
        """The operators to make float, in the order of the network, without those that are float already; () if more than
        `most` are needed. For a weight it is its layer."""
        if tensor in self.weights:
            return (self.weights[tensor],)
        root = self.graph.root(tensor)
        if root not in self._known:
            self._known[root] = self._search(root)
        return self._known[root]

    def plan(self, names: Collection[str]) -> Plan:
        """What the recipe requests with some operators in float. Raises OnnxqError if it requests nothing valid."""
        rules = tuple(layer_rule(name, quantize=False) for name in sorted(names))
        return request(self.graph, replace(self.recipe, layers=self.recipe.layers + rules), self.target).plan

    def _search(self, root: str) -> tuple[str, ...]:
        try:
            if self._floats is None:
                self._floats = set(request(self.graph, self.recipe, self.target).floats)
            enough = next((names for names in self._candidates(root) if names and self._is_float(root, names)), set())
        except OnnxqError:
            return ()
        names = tuple(sorted(enough - self._floats, key=lambda name: self.order[name]))
        return names if len(names) <= self.most else ()

    def _candidates(self, root: str) -> Iterator[set[str]]:
        """Sets to try, from the smallest: who reads the tensor, who writes it, and those beyond the operators between."""
        reading, makers = readers(self.graph, root) & self.eligible, self._makers(root)
        yield reading
        for maker in makers:
            yield {maker}
            yield reading | {maker}
        yield reading | set(makers)
        behind = self._behind(root)
        yield behind
        yield behind | set(makers)

    def _makers(self, root: str) -> list[str]:
        """The nearest layers upstream: the one that writes the tensor, or those that feed the operators that do."""
        found: dict[str, None] = {}
        seen, left = set[str](), [root]
        while left and len(found) <= self.most:
            node = maker_of(self.graph, left.pop(0))
            if node is None or node.name in seen:
                continue
            seen.add(str(node.name))
            if node.name in self.eligible:
                found[str(node.name)] = None
            else:
                left += [self.graph.root(name) for name in activation_inputs(self.graph, node)]
        return list(found)

    def _behind(self, root: str) -> set[str]:
        """The nearest layers downstream, through operators that can be part of a chain."""
        found, seen, left = set[str](), set[str](), [root]
        nodes = {str(n.name): n for n in self.graph.nodes}
        while left and len(found) <= self.most:
            for name in readers(self.graph, left.pop(0)) - seen:
                seen.add(name)
                if name in self.eligible:
                    found.add(name)
                elif nodes[name].op in self.target.integer_ops | {"Relu", "Clip"}:
                    left += [t.name for t in nodes[name].outputs]
        return found

    def _is_float(self, root: str, names: set[str]) -> bool:
        """True if the tensor is float when these operators are."""
        return all(self.graph.is_constant(name) or self.graph.root(name) != root for name in self.plan(names))
