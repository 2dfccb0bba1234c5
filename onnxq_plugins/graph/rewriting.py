"""How rewrites are written and applied: a table of them, walked until none applies, and the questions that they ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.spec import Array

_ROUNDS = 50  # every rewrite leaves fewer operators, or moves one towards the outputs: far fewer rounds are needed


@dataclass(frozen=True)
class Rewrite:
    """One exact rewrite of a place in a graph.

    ops     the operators at which it may apply
    apply   rewrites the graph around such an operator and returns whether it did
    """

    ops: frozenset[str]
    apply: Callable[[Graph, gs.Node], bool]

    @property
    def name(self) -> str:
        return self.apply.__name__


def rewrite_of(*ops: str) -> Callable[[Callable[[Graph, gs.Node], bool]], Rewrite]:
    """A decorator that makes a rewrite of a function."""
    return lambda apply: Rewrite(frozenset(ops), apply)


def rewrite(graph: Graph, table: Iterable[Rewrite]) -> bool:
    """Apply the rewrites of a table, in its order at each operator, until none applies; whether any did."""
    by_op: dict[str, list[Rewrite]] = {}
    for entry in table:
        for op in entry.ops:
            by_op.setdefault(op, []).append(entry)
    any_did = False
    for _ in range(_ROUNDS):
        did = False
        for node in graph.nodes:
            if node.domain or graph.has_body(node):
                continue
            for entry in by_op.get(node.op, ()):
                if not node.outputs or node.op not in entry.ops:  # an earlier one removed or replaced it
                    break
                if entry.apply(graph, node):
                    graph.changed()
                    did = True
        if not did:
            break
        graph.tidy()
        any_did = True
    return any_did


def is_output(graph: Graph, tensor: gs.Tensor) -> bool:
    """True if a tensor is an output of the model."""
    return any(tensor is output for output in graph._graph.outputs)


def only_reader(graph: Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The operator that alone reads a tensor which is no output of the model."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 and not is_output(graph, tensor) else None


def read_alone(graph: Graph, tensor: gs.Tensor, node: gs.Node) -> bool:
    """True if an operator alone reads a tensor which is no output of the model."""
    return only_reader(graph, tensor) is node


def values_of(node: gs.Node, at: int) -> Array | None:
    """Values of a constant input of an operator; None if it has no such input, or it is computed."""
    tensor = node.inputs[at] if len(node.inputs) > at else None
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


def left_out(node: gs.Node, at: int) -> bool:
    """True if an operator has no such input."""
    return len(node.inputs) <= at or bool(node.inputs[at].is_empty())


def axes_of(node: gs.Node, rank: int | None, at: int = 1) -> list[int] | None:
    """The axes that an operator names as attribute or as input `at`, from 0 on and sorted; all if it names none; None if
    they are not known."""
    if "axes" in node.attrs:
        named: Sequence[int] = list(node.attrs["axes"])
    elif not left_out(node, at):
        values = values_of(node, at)
        if values is None:
            return None
        named = values.reshape(-1).tolist()
    else:
        named = []
    if not named:
        return None if rank is None else list(range(rank))
    if rank is None:
        return sorted(named) if min(named) >= 0 else None
    return sorted(a + rank if a < 0 else a for a in named)


def rank_of(tensor: gs.Tensor) -> int | None:
    """Number of axes; None if unknown."""
    return None if tensor.shape is None else len(tensor.shape)


def dims(tensor: gs.Tensor) -> list[int | str | None] | None:
    """The shape with a number or a symbol per axis; None if the rank is unknown. Equal symbols are equal sizes, see
    `shapes.refresh_shapes`."""
    return None if tensor.shape is None else [n if isinstance(n, (int, str)) else None for n in tensor.shape]


def kind_of(tensor: gs.Tensor) -> np.dtype | None:
    """The type of a tensor's elements; None if it is unknown, or none of numpy's."""
    try:
        return None if tensor.dtype is None else np.dtype(tensor.dtype)
    except TypeError:
        return None


def is_float32(tensor: gs.Tensor) -> bool:
    return kind_of(tensor) == np.float32
