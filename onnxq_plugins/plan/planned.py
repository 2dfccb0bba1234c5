"""What follows from a graph, its plan and its target together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.flow import activation_inputs, maker_of, result_of
from onnxq_plugins.graph.opsets import NARROW_OPSET
from onnxq_plugins.job import Job
from onnxq_plugins.plan.values import bias_values
from onnxq_plugins.spec import Array, Plan, QuantSpec
from onnxq_plugins.targets import Rule, Target
from onnxq_plugins.targets.reading import input_in, joins, source_in


@dataclass(frozen=True, eq=False)
class Planned:
    """What follows from graph, plan and target together. A view of one moment: make another when one of them has changed."""

    graph: Graph
    plan: Plan
    target: Target

    @classmethod
    def of(cls, job: Job) -> Planned:
        """Of a job's current graph and plan."""
        return cls(job.graph, job.plan, job.target)

    @cached_property
    def layers(self) -> list[Layer]:
        """Layers whose weight is planned."""
        return [layer for layer in self.graph.layers if layer.weight in self.plan]

    @cached_property
    def constants(self) -> Plan:
        """Entries of constants that are no layer's weight."""
        weights = {layer.weight for layer in self.graph.layers}
        return Plan({n: s for n, s in self.plan.items() if self.graph.is_constant(n) and n not in weights})

    @cached_property
    def activations(self) -> list[str]:
        """Planned tensors that are not weights."""
        return [name for name in self.plan if not self.graph.is_constant(name)]

    def source(self, tensor: str) -> str:
        """The planned activation from which a reader of `tensor` gets its codes: itself or what it is tied to through
        shape-only operators; "" if none is planned."""
        return source_in(self.graph, self.plan, tensor)

    def input(self, layer: Layer) -> str:
        """The planned activation that a layer reads; "" if it reads float. A weight-only layer reads float even where
        another reader of the same tensor made it planned."""
        return input_in(self.graph, self.plan, self.target, layer)

    def bits(self, layer: Layer) -> int:
        """Bits of the activation that a layer reads; 0 for float."""
        key = self.input(layer)
        return self.plan[key].bits if key else 0

    def rule(self, layer: Layer, weight: QuantSpec | None = None) -> Rule | None:
        """The target's rule for a layer; None if it has no quantized kernel for it.

        weight   in place of the weight's planned entry
        """
        weight = self.plan.get(layer.weight) if weight is None else weight
        return None if weight is None else self.rule_for(layer, weight, self.bits(layer))

    def rule_for(self, layer: Layer, weight: QuantSpec, activations: int) -> Rule | None:
        """`Target.rule`. Mixed widths in one weight are an offer to passes that leave channels of few bits, and ask for the
        opset that stores them; in other weights small codes are a coincidence."""
        rule = self.target.rule(layer, weight, activations)
        asked = self.graph.output_opset >= NARROW_OPSET
        return rule if rule is None or asked else replace(rule, narrow=False)

    def bias(self, layer: Layer) -> Array | None:
        """The bias of a planned layer with the shift that its weight's entry adds, float64; None if there is neither."""
        return bias_values(self.graph, layer, self.plan[layer.weight])

    @cached_property
    def integer(self) -> set[str]:
        """Names of the operators that read quantized activations: planned layers, and operators between them whose inputs
        and output are all planned."""
        graph, plan, target = self.graph, self.plan, self.target
        layers = {layer.name: layer for layer in graph.layers}
        names = set()
        for node in graph.nodes:
            inputs = activation_inputs(graph, node)
            if node.name in graph.floats or not inputs or not all(self.source(name) for name in inputs):
                continue
            if node.name in layers:
                fits = bool(self.input(layers[node.name])) and (
                    node.op not in target.output_scale or result_of(graph, node) in plan
                )
            elif node.op == "MatMul" and len(inputs) == 2:
                fits = not target.whole or (node.op in target.integer_ops and result_of(graph, node) in plan)
            else:
                fits = joins(graph, target, node) and result_of(graph, node) in plan
            if fits:
                names.add(str(node.name))
        return names

    @cached_property
    def read(self) -> set[str]:
        """Planned activations that integer operators read."""
        nodes = [node for node in self.graph.nodes if node.name in self.integer]
        return {self.source(name) for node in nodes for name in activation_inputs(self.graph, node)}

    @cached_property
    def carriers(self) -> set[str]:
        """Names of the shape-only operators between a planned tensor and an integer reader: they move codes. Where targets
        quantize as a whole, also those behind an integer operator."""
        names: set[str] = set()
        if self.target.whole:
            moving = (node for node in self.graph.nodes if self.graph.is_shape_only(node))
            names = {str(n.name) for n in moving if self.source(n.inputs[0].name) in self.coded} - self.graph.floats
        for node in self.graph.nodes:
            if node.name not in self.integer:
                continue
            for tensor in activation_inputs(self.graph, node):
                while tensor not in self.plan:
                    mover = self.graph.producer(tensor)
                    assert mover is not None
                    names.add(str(mover.name))
                    tensor = mover.inputs[0].name
        return names

    @cached_property
    def coded(self) -> set[str]:
        """Planned activations that integer operators write in codes, so that all readers see what that costs."""
        return {
            name
            for name in self.activations
            if (maker := maker_of(self.graph, name)) is not None and maker.name in self.integer
        }
