"""The recipe's rules for one operator: which apply, and what they make of its requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

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
    if op == "Attention" and rule.op != "Attention" and rule.match == "*":
        return False  # rules for all layers mean layers with weights
    return (
        fnmatchcase(name, rule.match)
        and rule.op in ("", op)
        and rule.kind in ("", kind)
        and (not rule.position or ends.get(rule.position, False))
    )


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
