"""Layouts straightened: as few Transposes as compute the same.

TensorFlow has channels last, layers of ONNX have them second: converted networks turn every layer's input and output, and
what stands between in TensorFlow's order (bias, BatchNorm, Relu, Pad) cannot be fused. Operators that compute the same in
either order may be turned instead. Which ones are is a minimum cut: the nodes are these operators, the edges tensors, and a
tensor that is written in one order and read in the other costs a Transpose.

The *opening* Transpose, of order `perm`, reads what has the order of layers; the *closing* one undoes it. An operator
between the two is *turned* if it computes in the order of layers in the end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.rewriting import dims, is_output, rank_of
from onnxq_plugins.graph.transposes import perm_of
from onnxq_plugins.graph.turning import COSTLY, Perm, Turn, inverse, turn, turn_of, turned_shape
from onnxq_plugins.graph.units import moved_units

_TRANSPOSE, _UNIT, _OFF_AXIS = (
    20,
    1,
    10,
)  # costs: a Transpose, one that moves axes of size 1, an operator along an inner axis
_NEVER = 10**6
_ROUNDS = 8
_IN_ORDER = {  # operators that have channels second
    *(
        "Conv",
        "ConvTranspose",
        "MaxPool",
        "AveragePool",
        "LpPool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "BatchNormalization",
    ),
    *("InstanceNormalization", "LRN", "DepthToSpace", "SpaceToDepth", "GroupNormalization", "PRelu"),
}
_REACH = 32  # operators between a Transpose and the layer that says which it is


def straighten(graph: Graph) -> bool:
    """Turn operators, in place, so that fewer Transposes remain, or they stand where layers can take up what is in between;
    whether any was turned."""
    did = False
    for _ in range(_ROUNDS):
        perms = [p for node in graph.nodes if node.op == "Transpose" and (p := perm_of(node)) is not None]
        orders = dict.fromkeys(_opening(tuple(p)) for p in perms)
        orders |= {(0, 2, 3, 1): None}  # of Reshapes that turn images of one channel
        turned = [_straighten(graph, perm) for perm in orders]
        turned += [_straighten(graph, inverse(perm), only_fewer=True) for perm in orders if perm != inverse(perm)]
        if not any(turned):
            break
        did = True
    return did


def _opening(perm: Perm) -> Perm:
    """Of an order and its inverse the one that brings channels last."""
    back = inverse(perm)
    return perm if perm[-1] == 1 or (back[-1] != 1 and perm <= back) else back


def _straighten(graph: Graph, perm: Perm, only_fewer: bool = False) -> bool:
    """Turn operators for one order; `only_fewer` if that leaves fewer Transposes, also where it moves them."""
    cut = _Cut(graph, perm)
    if not cut.opening and not cut.closing:
        return False
    chosen = cut.chosen(only_fewer)
    if not chosen:
        return False
    cut.turn(chosen)
    graph.tidy()
    return True


class _Cut:
    """The operators of a graph for one order of axes.

    turns              by id of a node: how it is turned, if it can be
    opening, closing   ids of the Transposes (or Reshapes that do the same)
    """

    def __init__(self, graph: Graph, perm: Perm) -> None:
        self.graph, self.perm, self.back = graph, perm, inverse(perm)
        self.nodes = [n for n in graph.nodes if not graph.has_body(n)]
        self.turns: dict[int, Turn] = {}
        for node in self.nodes:
            if (found := turn_of(node, perm)) is not None:
                self.turns[id(node)] = found
        self.opening: set[int] = set()
        self.closing: set[int] = set()
        inside: set[int] = set()  # ids of tensors behind an opening Transpose
        for node in self.nodes:
            which = self._which(node, id(node.inputs[0]) in inside) if node.inputs else 0
            if which > 0:
                self.opening.add(id(node))
                inside.add(id(node.outputs[0]))
            elif which < 0:
                self.closing.add(id(node))
            elif id(node) in self.turns and any(id(node.inputs[at]) in inside for at in self.turns[id(node)].inputs):
                inside |= {id(node.outputs[at]) for at in self.turns[id(node)].outputs}

    def _which(self, node: gs.Node, inside: bool) -> int:
        """1 for an opening Transpose, -1 for a closing one, else 0."""
        if node.domain or isinstance(node.inputs[0], gs.Constant):
            return 0
        if node.op == "Transpose":
            perm = tuple(perm_of(node) or ())
            opens, closes = perm == self.perm, perm == self.back
        elif node.op == "Reshape":
            opens, closes = (_same_as(node, perm) for perm in (self.perm, self.back))
        else:
            return 0
        if opens and closes:
            opens = not inside and not self._reaches_layer(node.outputs[0])
        return 1 if opens else -1 if closes else 0

    def _reaches_layer(self, tensor: gs.Tensor) -> bool:
        seen, todo = set[int](), [tensor]
        while todo and len(seen) < _REACH:
            for reader in todo.pop().outputs:
                if reader.op in _IN_ORDER and not reader.domain:
                    return True
                if id(reader) in self.turns and id(reader) not in seen:
                    seen.add(id(reader))
                    todo += reader.outputs
        return False

    # ---- the cut --------------------------------------------------------------------------------------------------

    def _written(self, tensor: gs.Tensor) -> int | None:
        """1 if a tensor is there in the order of layers, 0 if it is not, None if that is to be chosen."""
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or id(node) not in self.turns:
            return int(node is not None and id(node) in self.opening)
        places = self.turns[id(node)].outputs
        return None if any(node.outputs[at] is tensor for at in places) else 0

    def _reads(self, tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int | None]]:
        """The readers of a tensor and the order in which they want it, as above."""
        for node in {id(n): n for n in tensor.outputs}.values():
            if id(node) in self.turns:
                carried = any(node.inputs[at] is tensor for at in self.turns[id(node)].inputs)
                yield node, None if carried else 0
            else:
                yield node, int(id(node) in self.closing)

    def _cost(self, tensor: gs.Tensor) -> int:
        """What a Transpose of a tensor costs; more between a layer and the function that its kernel absorbs."""
        shape = dims(tensor)
        order = [self.perm[i] for i, n in enumerate(shape) if n != 1] if shape is not None else [1, 0]
        absorbed = any(n.op in LAYER_OPS for n in tensor.inputs) and any(id(n) in self.turns for n in tensor.outputs)
        return (_UNIT if order == sorted(order) else _TRANSPOSE) + absorbed

    def tensors(self) -> list[gs.Tensor]:
        """The activations that may be in either order."""
        found = {id(t): t for n in self.nodes for t in (*n.inputs, *n.outputs)}
        rank = len(self.perm)
        return [t for t in found.values() if not isinstance(t, gs.Constant) and not t.is_empty() and rank_of(t) == rank]

    def chosen(self, only_fewer: bool) -> set[int]:
        """Ids of the operators to turn: the largest of the sets with fewest Transposes.

        only_fewer   none if there are as few already; else the smallest of the sets
        """
        number = {key: at + 2 for at, key in enumerate(self.turns)}  # 0 source: turned, 1 sink: not
        edges: list[tuple[int, int, int]] = []
        count, now = len(number) + 2, 0
        for tensor in self.tensors():
            written = self._written(tensor)
            reads = list(self._reads(tensor))
            producer = number[id(tensor.inputs[0])] if written is None else 1 - written
            readers = {number[id(n)] if order is None else 1 - order for n, order in reads}
            readers |= {1} if is_output(self.graph, tensor) else set()
            if readers <= {producer}:
                continue
            cost = self._cost(tensor)
            unturned = {order or 0 for _, order in reads} | ({0} if 1 in readers else set())
            now += cost * len(unturned - {written or 0})
            edges += [(producer, count, cost), (count + 1, producer, cost)]
            edges += [edge for reader in readers for edge in ((count, reader, _NEVER), (reader, count + 1, _NEVER))]
            count += 2
        edges += [(number[id(n)], 1, _OFF_AXIS) for n in self.nodes if id(n) in number and COSTLY(n.op)]
        if not edges:
            return set()
        heads, tails, costs = (np.array(column, np.int32) for column in zip(*edges, strict=True))
        capacity = coo_array((costs, (heads, tails)), shape=(count, count)).tocsr().astype(np.int32)
        flow = maximum_flow(capacity, 0, 1)
        residual = (capacity - flow.flow).tocsr()
        residual.eliminate_zeros()
        if only_fewer:
            source = set(breadth_first_order(residual, 0, return_predecessors=False).tolist())
            return {key for key, at in number.items() if at in source} if flow.flow_value < now else set()
        sink = set(breadth_first_order(residual.T.tocsr(), 1, return_predecessors=False).tolist())
        return {key for key, at in number.items() if at not in sink}

    # ---- what was chosen ----------------------------------------------------------------------------------------------

    def turn(self, chosen: set[int]) -> None:
        """Turn operators; their outputs get new names, since the old ones say what has the old order."""
        self.primes: dict[int, gs.Tensor] = {}  # by id of a tensor: the one that has the order of layers
        self.alive = self.tensors()  # ids stay valid
        for node in self.nodes:
            key = id(node)
            if key in self.closing:
                self._close(node)
            elif key in self.opening:
                self.primes[id(node.outputs[0])] = node.inputs[0]
            elif key in chosen:
                places = self.turns[key]
                for at in places.inputs:
                    node.inputs[at] = self._prime(node.inputs[at], node)
                turn(self.graph, node, self.perm)
                for at in places.outputs:
                    self._turn_output(node, at, chosen)
        self.graph.changed()

    def _turn_output(self, node: gs.Node, at: int, chosen: set[int]) -> None:
        old = node.outputs[at]
        if old.is_empty():
            return
        shape = None if old.shape is None else turned_shape(old.shape, self.perm)
        new = self.graph.add_variable(f"{old.name}_turned", like=old, shape=shape)
        node.outputs[at] = new
        self.primes[id(old)] = new
        as_it_was = [n for n in old.outputs if id(n) not in chosen and id(n) not in self.closing]
        as_it_was += [n for n in old.outputs if id(n) in chosen and not self._carries(n, old)]
        if as_it_was or is_output(self.graph, old):
            name = f"{old.name}_transpose"
            self.graph.add_node("Transpose", name, [new], [old], before=node, perm=list(self.perm))

    def _carries(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        return any(node.inputs[at] is tensor for at in self.turns[id(node)].inputs)

    def _prime(self, tensor: gs.Tensor, reader: gs.Node) -> gs.Tensor:
        """A tensor in the order of layers; a new Transpose, or a closing one that is there, if it is not there yet."""
        if id(tensor) not in self.primes:
            closing = [n for n in tensor.outputs if id(n) in self.closing]
            if closing:
                self.primes[id(tensor)] = closing[0].outputs[0]
            else:
                shape = None if tensor.shape is None else turned_shape(tensor.shape, self.perm)
                new = self.graph.add_variable(f"{tensor.name}_turned", like=tensor, shape=shape)
                name = f"{tensor.name}_transpose"
                self.graph.add_node("Transpose", name, [tensor], [new], before=reader, perm=list(self.back))
                self.primes[id(tensor)] = new
        return self.primes[id(tensor)]

    def _close(self, node: gs.Node) -> None:
        """A closing Transpose goes where its input is there in the order of layers."""
        x, output = node.inputs[0], node.outputs[0]
        prime = self.primes.get(id(x))
        if prime is None or prime is output:
            return
        if is_output(self.graph, output) and (not prime.inputs or is_output(self.graph, prime)):
            node.op, node.attrs = "Identity", {}
            node.inputs = [prime]
            return
        self.graph.bypass(node, prime)
        if is_output(self.graph, output):  # bypass renamed it
            self.primes[id(x)] = output


def _same_as(node: gs.Node, perm: Perm) -> bool:
    """True if a Reshape does what a Transpose would: it moves axes of size 1 alone."""
    source, result = dims(node.inputs[0]), dims(node.outputs[0])
    if source is None or result is None or len(source) != len(perm) or 1 not in source:
        return False
    order = [axis for axis in perm if source[axis] != 1]
    return order == sorted(order) and moved_units([source[axis] for axis in perm], result) == list(range(len(perm)))
