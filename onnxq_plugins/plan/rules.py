"""Operators that a recipe excludes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import Recipe


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
