"""Grids that follow from what an operator computes, whatever the samples.

A kernel that looks its results up in a table has them on a fixed grid: Softmax and Sigmoid in steps of 2^-bits from 0, Tanh
in steps of 2^(1-bits) around it. TFLite's kernels take no other (quantization specification, tensorflow.org/lite), and no
other would be finer.

What is smaller than a step is lost: on a picture without a face all scores of a detector are 0, whatever the samples of the
calibration held. Inside a network that hardly matters, beside larger values; in its outputs it does."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.flow import result_of
from onnxq_plugins.spec import Plan, from_range
from onnxq_plugins.targets import Target

_JOINS = "Concat"
_FROM_ZERO, _AROUND_ZERO = ("Softmax", "Sigmoid"), ("Tanh",)


def natural_grids(graph: Graph, target: Target, plan: Plan) -> Plan:
    """The entries, solved, of planned outputs whose grid is fixed; none for targets that do not quantize as a whole."""
    specs = {}
    for node in graph.nodes if target.whole else ():
        name = result_of(graph, node) if _tabled(node) else ""
        if name not in plan:
            continue
        spec = plan[name].request()
        steps = 2.0 ** (spec.bits - (spec.symmetric or node.op in _AROUND_ZERO))
        low = -1.0 if node.op in _AROUND_ZERO else 0.0
        specs[name] = from_range(low + (1 / steps if spec.symmetric and low else 0), 1 - 1 / steps, spec)
    return Plan(specs)


def float_ends(graph: Graph, target: Target) -> set[str]:
    """Results of such operators, and of what concatenates them, that are outputs of the network or merely move there, for
    targets that quantize as a whole but may have outputs of floats: no score is lost there."""
    if not target.whole or target.coded_ports:
        return set()
    ends: set[str] = set()
    for node in reversed(graph.nodes):
        if (_tabled(node) or (node.op == _JOINS and not node.domain)) and _ends(graph, node.outputs[0].name, ends):
            ends.add(node.outputs[0].name)
    found = {name for name in ends if _tabled(graph.producer(name))}
    for node in graph.nodes:  # in order: a Concat of such a result, or of such a Concat
        if node.op == _JOINS and node.outputs[0].name in ends and any(graph.root(t.name) in found for t in node.inputs):
            found.add(node.outputs[0].name)
    return found


def _tabled(node: Any) -> bool:
    """True for an operator whose results are on such a grid."""
    return node.op in (*_FROM_ZERO, *_AROUND_ZERO) and not node.domain


def _ends(graph: Graph, name: str, ends: Collection[str]) -> bool:
    """True if a tensor goes nowhere but to outputs, as it is or moved, perhaps through a Concat that ends there."""
    readers = graph.consumers(name)
    return (name in graph.outputs or bool(readers)) and all(
        all(_ends(graph, t.name, ends) for t in node.outputs)
        if graph.is_shape_only(node)
        else node.op == _JOINS and node.outputs[0].name in ends
        for node in readers
    )
