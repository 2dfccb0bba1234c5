"""The recipe's rules for one operator: which apply, and what they make of its requests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import LayerRule, Recipe, TensorRequest


def settings(
    recipe: Recipe, name: str, op: str, kind: str, ends: Mapping[str, bool], unmatched: set[int]
) -> tuple[TensorRequest, TensorRequest, bool | None]:
    """Requests of weights and activations, and `quantize`, after all rules that match; these leave `unmatched`."""
    weights, activations, quantize = recipe.weights, recipe.activations, None
    for n, rule in enumerate(recipe.layers):
        if matches(rule, name, op, kind, ends):
            unmatched.discard(n)
            weights = replace(weights, **_tuples(rule.weights))
            activations = replace(activations, **_tuples(rule.activations))
            quantize = rule.quantize if rule.quantize is not None else quantize
    return weights, activations, quantize


def matches(rule: LayerRule, name: str, op: str, kind: str, ends: Mapping[str, bool]) -> bool:
    """True if a rule is about an operator.

    ends   whether it is the first, or the last, layer
    """
    if op == "Attention" and rule.op != "Attention" and rule.everywhere:
        return False  # rules for all layers mean layers with weights
    return (
        rule.names(name)
        and rule.op in ("", op)
        and rule.kind in ("", kind)
        and (not rule.position or ends.get(rule.position, False))
    )


def exclude(graph: Graph, recipe: Recipe) -> list[str]:
    """Mark the operators that the recipe excludes in `Graph.floats`. Returns notes about those that do not compute by
    themselves here. Raises OnnxqError for names that the user's model does not have."""
    names, problems, merged = {str(node.name) for node in graph.nodes}, list[str](), list[str]()
    graph.floats = frozenset(filter(recipe.excludes, names))
    for pattern in recipe.exclude:
        own = replace(recipe, exclude=(pattern.removeprefix("!"),))
        if not any(map(own.excludes, names)):
            there = sorted(filter(None, names | graph.imported))
            near = difflib.get_close_matches(pattern, there, 1) or there[:3]
            if any(map(own.excludes, graph.imported)):
                merged += [] if pattern.startswith("!") else [pattern]
            else:
                problems.append(f"exclude: the model has no operator '{pattern}'; it has {', '.join(near)} and others.")
    OnnxqError.check(problems)
    results = (graph.elided_activation(layer.output) for layer in graph.layers)
    absorbed = {str(node.name) for node in results if node is not None}
    moving = {str(node.name) for node in graph.nodes if graph.is_shape_only(node)}
    notes = [
        (merged, "were merged into their neighbours or folded at import: to keep their work in float exclude those"),
        (
            sorted(graph.floats & absorbed),
            "are part of the grid of the layer before them: to keep them in float exclude that layer",
        ),
        (
            sorted(graph.floats & moving),
            "only move values, codes as well as floats: to have them move floats exclude their neighbours",
        ),
    ]
    return [f"excluded {_quoted(some)} {text}" for some, text in notes if some]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
