"""Which operators should run as integers: those for which that is cheaper, conversions included.

An integer kernel is not always the faster one: depthwise convolutions, few channels and short rows gain little or lose, and
whatever lies between integers and floats has to be converted, and often reordered. All operators are decided together by a
minimum cut: each is an integer (0) or a float (1) and, as a float, in plain order (0) or in blocks of channels (1),

    minimize  sum of kernels(label) + sum of conversions between neighbours of different labels

where a tensor is converted once, however many operators read it. Costs come from a table (`runtimes.costs`), so that nothing
depends on the machine's load. Cuts are exact for energies of this form.

Source: Boykov, Veksler and Zabih, Fast approximate energy minimization via graph cuts (PAMI 2001); Ishikawa, Exact
optimization for Markov random fields with convex priors (PAMI 2003) for the ordered labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.flow import activation_inputs, maker_of, source_of
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.runtimes.costs import BLOCK, Costs, Kernel, table_of
from onnxq_plugins.spec import Array
from onnxq_plugins.targets import Target

Shapes = Mapping[str, tuple[int, ...]]
_PARTS = 1_000_000  # of the sum of all costs: capacities are integers
_BLOCKED = frozenset(  # operators that take blocks of channels as they are
    {"Add", "Mul", "Sum", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Relu", "Clip"}
    | {"LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Swish", "Gelu", "BatchNormalization"}
)
_FUSED = frozenset(  # into the float Conv before
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Add"}
)
_LAST = frozenset(
    {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize"}
)  # integer kernels on channels in the end
_FIRST = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Flatten", "Reshape"})  # not on those
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})  # copy nothing


@dataclass(frozen=True)
class Placement:
    """What is cheapest.

    floats     operators that could be integer but are better in float
    predicted  microseconds of a run ``placed`` like that, with all ``integer`` that can be, and with all in ``float``
    """

    floats: frozenset[str]
    predicted: dict[str, float]


@dataclass(eq=False)
class Energy:
    """A function of binary variables, a sum of costs of single values and of pairs (0, 1), which a cut minimizes."""

    single: list[list[float]] = field(default_factory=list)  # variable -> its costs at 0 and at 1
    pairs: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))  # (a, b): a is 0 and b is 1
    rules: set[tuple[int, int]] = field(default_factory=set)  # (a, b): b cannot be 1 where a is 0

    def variable(self, zero: float = 0.0, one: float = 0.0) -> int:
        """A new variable with its costs."""
        self.single.append([zero, one])
        return len(self.single) - 1

    def minimize(self, fixed: Mapping[int, int]) -> Array:
        """The values of least energy [variables], some of them given."""
        from scipy.sparse import csr_array  # late: slow to import
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        count = len(self.single)
        source, sink = count, count + 1
        edges: dict[tuple[int, int], float] = defaultdict(float, self.pairs)
        for v, (zero, one) in enumerate(self.single):
            edges[(source, v) if one > zero else (v, sink)] += abs(one - zero)
        total = max(sum(edges.values()), 1e-9)
        capacities = {pair: round(cost / total * _PARTS) for pair, cost in edges.items()}
        never = 2 * _PARTS
        capacities |= dict.fromkeys(self.rules, never)
        capacities |= {(v, sink) if value else (source, v): never for v, value in fixed.items()}
        pairs = np.array(list(capacities)).T
        sizes = np.array(list(capacities.values()), np.int32)
        graph = csr_array((sizes, (pairs[0], pairs[1])), shape=(count + 2, count + 2), dtype=np.int32)
        left = csr_array(graph - maximum_flow(graph, source, sink).flow)
        left.eliminate_zeros()
        values = np.ones(count + 2, int)
        values[breadth_first_order(left, source, return_predecessors=False)] = 0
        return values[:count]

    def of(self, values: Array) -> float:
        """The energy of some values."""
        alone = sum(costs[values[v]] for v, costs in enumerate(self.single))
        return float(alone + sum(cost for (a, b), cost in self.pairs.items() if values[a] == 0 and values[b] == 1))


def costs_of(target: Target, table: str = "") -> Costs | None:
    """The table to decide by; None for a target without one.

    table   the name that a recipe gives; "" takes that of the machine where the target's models run here, else the target's

    Raises OnnxqError if a table that this machine should have measured is not there.
    """
    if not target.costs:
        return None
    costs = table_of(table) if table else table_of(target.costs, target.here)
    if costs is None and table:
        raise OnnxqError("placement.table: costs were not measured on this machine; run onnxq costs --measure.")
    return costs


class Placer:
    """Decides the operators of a planned network.

    shapes   of every tensor, from a run on one sample
    """

    def __init__(self, planned: Planned, shapes: Shapes, costs: Costs) -> None:
        self.planned, self.graph, self.shapes, self.costs = planned, planned.graph, shapes, costs
        self.layers = {layer.name: layer for layer in self.graph.layers}
        nodes = [node for node in self.graph.nodes if maker_of(self.graph, node.outputs[0].name) is node]
        self.energy = Energy()
        self.choices = frozenset(str(n.name) for n in nodes if n.name in planned.integer)
        self.movers = {str(n.name) for n in nodes if n.name not in self.choices and self.graph.is_shape_only(n)}
        self.floats: dict[str, int] = {}  # operator -> 1 where it is float
        self.blocks: dict[str, int] = {}  # and 1 where it works on blocks
        for node in nodes:
            self.floats[str(node.name)], self.blocks[str(node.name)] = self.energy.variable(), self.energy.variable()
        self.outside = (self.energy.variable(), self.energy.variable())  # inputs and outputs of the network
        self.fixed = {self.outside[0]: 1, self.outside[1]: 0}
        for node in nodes:
            self._kernel(node)
        for name in self.shapes:
            self._conversions(name)

    def place(self, forced: Collection[str] = ()) -> Placement:
        """The cheapest choice.

        forced   operators that stay integer whatever that costs
        """
        self.fixed |= {self.floats[name]: 0 for name in forced if name in self.choices}
        values = {"placed": self.energy.minimize(self.fixed)}
        for name, value in (("integer", 0), ("float", 1)):
            values[name] = self.energy.minimize({self.floats[n]: value for n in self.choices} | self.fixed)
        floats = frozenset(name for name in self.choices if values["placed"][self.floats[name]])
        call = self.costs.call(len(self.graph.inputs) + len(self.graph.outputs))
        return Placement(floats, {name: call + self.energy.of(each) for name, each in values.items()})

    # ---- kernels -------------------------------------------------------------------------------------------------------

    def _kernel(self, node: Any) -> None:
        """The costs of an operator by its labels."""
        name, energy = str(node.name), self.energy
        float_, blocks = self.floats[name], self.blocks[name]
        kernel = self._described(node)
        energy.rules.add((float_, blocks))  # only floats have blocks
        if kernel is None or name not in self.choices | self.movers:
            self.fixed[float_] = 1
        takes = kernel is not None and self._takes_blocks(node, kernel)
        if not takes:
            self.fixed[blocks] = 0
        elif node.op == "Conv":
            energy.rules.add((blocks, float_))  # a float convolution that can have blocks has them
        if kernel is None:
            return
        plain, integer = self._time(node, kernel, False), self._time(node, kernel, True)
        energy.single[float_][0] += integer
        convolution = self._fuses(node)
        if convolution is None:
            energy.single[float_][1] += plain
        else:  # free behind a float convolution, which computes it, too
            energy.pairs[convolution, float_] += plain
        if node.op == "MaxPool":  # slow on codes in plain order
            energy.rules.add((float_, self._source(node.inputs[0].name)))
        if name in self.choices - set(self.layers) and node.op != "MatMul":  # chains are integer from layer to layer
            energy.rules |= {(float_, self._source(t)) for t in activation_inputs(self.graph, node)}

    def _source(self, tensor: str) -> int:
        """The variable of the operator that computes a tensor, seen through those that only move values."""
        return self.floats.get(source_of(self.graph, tensor), self.outside[0])

    def _described(self, node: Any) -> Kernel | None:
        """An operator with its sizes; None where they are unknown."""
        layer = self.layers.get(str(node.name))
        inputs = [self.shapes.get(t) for t in activation_inputs(self.graph, node)]
        output = next((self.shapes.get(t.name) for t in node.outputs if t.name), None)
        if output is None or any(shape is None for shape in inputs):
            return None
        weight = () if layer is None else layer.shape
        if layer is not None and layer.op in ("Gemm", "MatMul"):
            weight = (layer.shape[layer.in_axis], layer.shape[layer.out_axis])
        known = tuple(shape for shape in inputs if shape is not None)
        return Kernel(str(node.op), known, output, weight, 1 if layer is None else layer.groups, node.attrs)

    def _time(self, node: Any, kernel: Kernel, integer: bool) -> float:
        if node.op in _VIEWS:
            return float(node.op not in ("Identity", "Dropout"))
        return self.costs.of(kernel, integer)

    def _takes_blocks(self, node: Any, kernel: Kernel) -> bool:
        """True if a float operator works on blocks of channels."""
        if not kernel.spatial or node.domain:
            return False
        if node.op != "Conv":
            return node.op in _BLOCKED and all(len(shape) == 4 for shape in kernel.inputs)
        return kernel.blocked

    def _fuses(self, node: Any) -> int | None:
        """The variable of the convolution before an operator that computes that, too, where both are float."""
        if node.op not in _FUSED:
            return None
        for tensor in activation_inputs(self.graph, node):
            maker = maker_of(self.graph, tensor)
            alone = maker is not None and maker.op == "Conv" and len(self.graph.consumers(tensor)) == 1
            if alone and str(maker.name) in self.choices:
                return self.floats[str(maker.name)]
        return None

    def _stem(self, node: Any) -> bool:
        """True for a convolution of few channels, which reads them in plain order where it is float."""
        layer = self.layers.get(str(node.name))
        return layer is not None and layer.op == "Conv" and layer.groups == 1 and layer.shape[1] < BLOCK

    # ---- conversions ---------------------------------------------------------------------------------------------------

    def _maker(self, tensor: str) -> tuple[int, int]:
        """The labels of what writes a tensor."""
        node = maker_of(self.graph, tensor)
        known = node is not None and str(node.name) in self.floats
        return (self.floats[str(node.name)], self.blocks[str(node.name)]) if known else self.outside

    def _conversions(self, tensor: str) -> None:
        """What it costs to read a tensor otherwise than it was written; once for all its readers."""
        graph, energy = self.graph, self.energy
        if graph.is_constant(tensor) or tensor not in graph:
            return
        node = maker_of(graph, tensor)
        readers = [n for n in graph.consumers(tensor) if str(n.name) in self.floats]
        labels = [
            (self.floats[str(n.name)], self.outside[1] if self._stem(n) else self.blocks[str(n.name)]) for n in readers
        ]
        labels += [self.outside] * (tensor in graph.outputs)
        if not labels or (node is not None and str(node.name) not in self.floats):
            return
        size, spatial = prod(self.shapes[tensor]), len(self.shapes[tensor]) == 4
        written = self._maker(tensor)
        if node is not None and node.op in ("MatMul", "Gemm") and node.op not in self.planned.target.output_scale:
            written = (self.outside[0], written[1])  # these kernels write floats, whatever they read
        self._once(written[0], [a for a, _ in labels], "dequantize", "quantize", size)
        if spatial:
            self._once(written[1], [b for _, b in labels], "block", "unblock", size)
        turn = self.costs.move("transpose", size) if len(self.shapes[tensor]) > 2 else 0.0
        for reader, (float_, _) in zip([*readers, None], [*labels, self.outside], strict=False):
            if node is not None and node.op in _LAST and (reader is None or reader.op in _FIRST):
                energy.pairs[written[0], float_] += turn
            if reader is not None and reader.op in _LAST and (node is None or node.op in _FIRST):
                energy.pairs[float_, written[0]] += turn

    def _once(self, written: int, read: list[int], there: str, back: str, size: int) -> None:
        """Costs of conversions where a tensor is written as 0 and read as 1 (`there`), or the other way round (`back`)."""
        to, back_to = self.costs.move(there, size), self.costs.move(back, size)
        if len(read) == 1:
            self.energy.pairs[written, read[0]] += to
            self.energy.pairs[read[0], written] += back_to
            return
        ones, zeros = self.energy.variable(), self.energy.variable()  # the tensor in the form of each kind of reader
        self.energy.pairs[written, ones] += to
        self.energy.pairs[zeros, written] += back_to
        self.energy.rules |= {(ones, reader) for reader in read} | {(reader, zeros) for reader in read}
