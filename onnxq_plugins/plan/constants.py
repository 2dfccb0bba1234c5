"""Requests for constants outside layers: which are stored as codes, which stay float, and why.

Weights and tables get 8 bits, whatever the recipe's layers get: no pass looks after them, and nothing runs faster with
fewer. A rule for one of their operators changes that. Other constants may hold anything (boxes, coordinates, masks), so they
are stored only where their codes are exact, or where a rule says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from onnxq_plugins.errors import Reason
from onnxq_plugins.graph import Constant, Graph, constants
from onnxq_plugins.job import FLOAT, Recipe
from onnxq_plugins.runtimes.constants import OPERANDS
from onnxq_plugins.spec import Array, QuantSpec, block_shape
from onnxq_plugins.targets import Target


@dataclass(frozen=True)
class ConstantRequest:
    """A constant outside layers with its entry in the first plan, or the reason why it stays float."""

    constant: Constant
    spec: QuantSpec | None
    reason: Reason | None


def constant_requests(graph: Graph, recipe: Recipe, target: Target, unmatched: set[int]) -> list[ConstantRequest]:
    """A request for every constant outside layers; rules that match one of its readers leave `unmatched`."""
    requests = []
    for constant in constants(graph):
        spec = _request(graph, constant, recipe, target, unmatched)
        requests.append(
            ConstantRequest(constant, None, spec) if isinstance(spec, Reason) else ConstantRequest(constant, spec, None)
        )
    return requests


def float_constants(requests: Iterable[ConstantRequest]) -> dict[str, Reason]:
    """The operators that read constants that stay float -> why."""
    return {name: each.reason for each in requests if each.reason is not None for name, _ in each.constant.readers}


def _request(graph: Graph, constant: Constant, recipe: Recipe, target: Target, unmatched: set[int]) -> QuantSpec | Reason:
    base = replace(recipe, weights=replace(recipe.weights, bits=FLOAT if recipe.weights.bits == FLOAT else 8))
    found = [base.settings(name, op, "", {}, unmatched) for name, op in constant.readers]
    bits = max(weights.bits for weights, _, _ in found)
    left_out = any(name in graph.floats for name, _ in constant.readers)
    if bits == FLOAT or left_out or any(quantize is False for _, _, quantize in found):
        return Reason("recipe", "the recipe leaves it float")
    if not target.decodes or any(op in target.plain for _, op in constant.readers):
        return Reason("unsupported", f"target '{target.name}' has no 8-bit form of {constant.op}")
    values = graph.constant(constant.name)
    wanted = any(quantize for _, _, quantize in found)
    if not (constant.weight or wanted):
        kind = "biases and states of recurrent operators" if constant.op in ("LSTM", "GRU", "RNN") else "constant operands"
        return _exactly(values) or Reason("constant", f"{kind}, {OPERANDS}")
    if not np.isfinite(values).all():
        return Reason("constant", "it has NaN or Inf")
    block = constant.block
    if block is not None and 32 * np.prod(block_shape(constant.shape, block)) > 4 * constant.size:
        block = None  # scales that take half as much as codes
    if block is None and not wanted:
        return Reason("constant", "its slices are so short that scales would take the room that codes save")
    return QuantSpec(min(bits, 8), True, block)


def _exactly(values: Array) -> QuantSpec | None:
    """An entry whose codes stand for exactly these values, such as those of a mask; None if there is none."""
    if not np.isfinite(values).all():
        return None
    scale = np.float32(np.abs(values).min(initial=np.inf, where=values != 0))
    scale = scale if 0 < scale < np.inf else np.float32(1)  # all values are 0
    codes = np.rint(values / scale)
    if np.abs(codes).max() > 127 or not np.array_equal((codes * scale).astype(values.dtype), values):
        return None
    return QuantSpec(scale=np.asarray(scale), zero_point=np.asarray(0))
