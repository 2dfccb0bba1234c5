"""Grids that follow from what an operator computes, whatever the samples.

A kernel that looks its results up in a table has them on a fixed grid: Softmax and Sigmoid in steps of 2^-bits from 0, Tanh
in steps of 2^(1-bits) around it. TFLite's kernels take no other (quantization specification, tensorflow.org/lite), and no
other would be finer."""

from __future__ import annotations

from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.flow import result_of
from onnxq_plugins.spec import Plan, from_range
from onnxq_plugins.targets import Target

_FROM_ZERO, _AROUND_ZERO = ("Softmax", "Sigmoid"), ("Tanh",)


def natural_grids(graph: Graph, target: Target, plan: Plan) -> Plan:
    """The entries, solved, of planned outputs whose grid is fixed; none for targets that do not quantize as a whole."""
    specs = {}
    for node in graph.nodes if target.whole else ():
        name = result_of(graph, node) if node.op in (*_FROM_ZERO, *_AROUND_ZERO) and not node.domain else ""
        if name not in plan:
            continue
        spec = plan[name].request()
        steps = 2.0 ** (spec.bits - (spec.symmetric or node.op in _AROUND_ZERO))
        low = -1.0 if node.op in _AROUND_ZERO else 0.0
        specs[name] = from_range(low + (1 / steps if spec.symmetric and low else 0), 1 - 1 / steps, spec)
    return Plan(specs)
