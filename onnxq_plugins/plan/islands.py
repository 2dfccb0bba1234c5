"""Activations in float where a target quantizes as a whole: islands of float operators between DequantizeLinear and
QuantizeLinear.

An activation without an entry is float: what writes it writes floats, what reads it computes in floats. Layers beside it run
in float, with their weights; other operators cost no more than their conversions. What is quantized around them stays."""

from __future__ import annotations

from collections.abc import Collection

from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Plan


def layers_beside(planned: Planned, tensor: str) -> tuple[str, ...]:
    """The planned layers that read or write a planned activation, in the order of the network."""
    return tuple(y.name for y in planned.layers if tensor in (planned.input(y), planned.source(y.result)))


def with_islands(planned: Planned, tensors: Collection[str], layers: Collection[str]) -> Plan:
    """The plan without the entries of some activations, of the weights of some layers, and of activations that no integer
    operator reads or writes any more.

    layers   all that are beside the tensors, perhaps others
    """
    graph, weights = planned.graph, [y.weight for y in planned.layers if y.name in layers]
    plan = planned.plan.without(*tensors, *weights)
    left = Planned(graph, plan, planned.target)
    before, after = planned.read | planned.coded, left.read | left.coded
    return plan.without(*(name for name in left.activations if name in before - after))


def turned_float(planned: Planned, plan: Plan) -> list[str]:
    """Operators that are integer in one plan and float in another, in the order of the network."""
    lost = planned.integer - Planned(planned.graph, plan, planned.target).integer
    return [str(node.name) for node in planned.graph.nodes if node.name in lost]
