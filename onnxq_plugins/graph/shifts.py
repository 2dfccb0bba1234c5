"""Shifts: which channels of which activations may have a constant taken off, and how the graph makes up for it.

    x' = x - s,   y' = W x' + (b + W s_x - s_y) - ... = y - s_y

A layer takes the shift of its output off its bias and adds what its input lacks, W s_x. So both are free, except where a
padded border would have to be s instead of 0. Operators that only move values, average or take a maximum pass a shift on; an
Add has the sum of its inputs' shifts; a constant that is added (a positional embedding, the rows of an embedding) takes any.
Whatever else reads or writes a channel pins its shift at 0: activations, products, the model's inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.affine import add_bias
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.groups import Walk
from onnxq_plugins.graph.layer import Layer
from onnxq_plugins.spec import Array

Place = tuple[str, int]  # tensor, axis

_TRANSLATED = {"Identity", "Dropout", "MaxPool", "GlobalMaxPool", "GlobalAveragePool"}
_REDUCED = {"ReduceMean", "ReduceMax", "ReduceMin"}


@dataclass(frozen=True, eq=False)
class Shifts:
    """The shifts that a graph allows.

    places   the channels along an axis of a tensor -> their variables [channels], -1 where the shift must be 0
    sums     (z, x, y, sign), variables [channels] each: z = x + sign * y
    count    number of variables
    """

    places: dict[Place, Array]
    sums: list[tuple[Array, Array, Array, float]]
    count: int


def shifts(graph: Graph) -> Shifts:
    """All shifts that a graph allows. Cost: one traversal of the graph."""
    walk = _Walk(graph, "shift")
    walk.traverse()
    for name, axis, *_ in list(walk.start):
        if graph.is_constant(name) and graph.constant(name).dtype != np.float32:
            walk.pin(graph.tensor(name), axis)
    component = walk.components() if walk.total else np.zeros(0, np.int64)
    size = int(component.max(initial=-1)) + 1
    free = np.ones(size, bool)
    for ids in walk.pinned:
        free[component[ids]] = False
    sums = [(component[z], component[x], component[y], sign) for z, x, y, sign in walk.sums.values()]
    _settle(free, sums)
    number = np.where(free, np.cumsum(free) - 1, -1)
    places = {key[:2]: number[component[first : first + walk.count[key]]] for key, first in walk.start.items()}
    return Shifts(places, [(number[z], number[x], number[y], sign) for z, x, y, sign in sums], int(free.sum()))


def _settle(free: Array, sums: list[tuple[Array, Array, Array, float]]) -> None:
    """Pin, in place, what must be 0 because the two others of its sum are."""
    while True:
        before = int(free.sum())
        for three in sums:
            ends = np.stack(three[:3])
            alone = free[ends].sum(axis=0) == 1
            free[ends[:, alone]] = False
        if int(free.sum()) == before:
            return


def shift(graph: Graph, allowed: Shifts, values: Array) -> dict[Place, Array]:
    """Take a constant off channels of activations, and make up for it in the biases and constants behind them. The float
    function stays; ValueError if `values` do not keep the sums.

    allowed   what `shifts` says of the graph as it is
    values    one per variable [count], float64

    Returns what was taken off every activation that changed.
    """
    known = np.append(values, 0.0)
    size = max(float(np.abs(values).max(initial=0.0)), 1e-30)
    for z, x, y, sign in allowed.sums:
        if np.abs(known[z] - known[x] - sign * known[y]).max(initial=0.0) > 1e-6 * size:
            raise ValueError("the shift of a sum must be the sum of its inputs' shifts")
    taken = {place: known[numbers] for place, numbers in allowed.places.items() if known[numbers].any()}
    for layer in graph.layers:
        _absorb(graph, layer, taken)
    for node in graph.nodes:
        if (
            node.op == "LayerNormalization"
            and (off := taken.get((node.outputs[0].name, _last(node.outputs[0])))) is not None
        ):
            _lower(graph, node, 2, off)
    changed: dict[Place, Array] = {}
    for (name, axis), off in taken.items():
        if graph.is_constant(name):
            constant = graph.constant(name)
            along = off.reshape([-1 if a == axis else 1 for a in range(constant.ndim)])
            graph.set_constant(name, (constant.astype(np.float64) - along).astype(np.float32))
            continue
        changed[name, axis] = off
        if name in graph.batchnorms:  # beta is the activation's mean
            norm = graph.batchnorms[name]
            graph.batchnorms[name] = replace(norm, beta=norm.beta - off)
    graph.touched.update(name for name, _ in changed)
    return changed


def _absorb(graph: Graph, layer: Layer, taken: dict[Place, Array]) -> None:
    """Add W s_x - s_y to the bias of a layer, or W s_x to what is added behind a MatMul."""
    node = graph.producer(layer.output)
    assert node is not None
    x, y = (taken.get((t.name, _channel_axis(layer, t))) for t in (node.inputs[0], node.outputs[0]))
    delta = np.zeros(layer.channels)
    if x is not None:
        weight = layer.matrix(graph.constant(layer.weight)).astype(np.float64)
        sums = weight.reshape(*weight.shape[:2], layer.shape[layer.in_axis], -1).sum(axis=3)
        delta += np.einsum("goi,gi->go", sums, x.reshape(layer.groups, -1)).reshape(-1)
        graph.touched.add(layer.weight)  # a corrected bias depends on the mean of the input
    if y is not None:
        delta -= y
    if x is None and y is None:
        return
    if layer.takes_bias:
        add_bias(graph, layer.name, delta)
    else:
        add = _bias_behind(graph, layer)
        assert add is not None
        constant = next(t for t in add.inputs if isinstance(t, gs.Constant))
        graph.set_constant(constant.name, (constant.values.astype(np.float64) + delta).astype(np.float32))


def _lower(graph: Graph, node: gs.Node, at: int, off: Array) -> None:
    """Subtract from an optional parameter of an operator, a vector that may be missing or shared."""
    tensor = node.inputs[at] if len(node.inputs) > at and not node.inputs[at].is_empty() else None
    values = (0.0 if tensor is None else tensor.values.astype(np.float64)) - off
    constant = graph.add_constant(f"{node.name}_bias" if tensor is None else tensor.name, values.astype(np.float32))
    if len(node.inputs) > at:
        node.inputs[at] = constant
    else:
        node.inputs.append(constant)
    graph.changed()


class _Walk(Walk):
    """Links of equal shifts, and sums of shifts."""

    def __init__(self, graph: Graph, kind: Literal["shift"]) -> None:
        super().__init__(graph, kind)
        self.sums: dict[tuple[int, int], tuple[Array, Array, Array, float]] = {}  # (operator, axis from the right)

    def same(self, node: gs.Node, tensor: gs.Tensor, axis: int, homogeneous: bool = True) -> None:
        if _translated(node):
            super().same(node, tensor, axis)
        else:
            self.pin(tensor, axis)

    def visit_layer(self, layer: Layer, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        if tensor.shape is None or axis != _channel_axis(layer, tensor):
            self.pin(tensor, axis)
        if tensor is node.inputs[0] and not _takes_shift(self.graph, layer):
            self.pin(tensor, axis)
        if tensor is node.outputs[0] and not layer.takes_bias:
            self.pin(tensor, axis)

    def visit_matmul(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        self.pin(tensor, axis)

    def visit_layernorm(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        y, last = node.outputs[0], len(tensor.shape or ()) - 1
        free = (
            tensor is y
            and axis == last
            and node.attrs.get("axis", -1) in (-1, last)
            and all(isinstance(p, gs.Constant) and len(p.shape) == 1 for p in node.inputs[1:] if not p.is_empty())
        )
        if not free:
            self.pin(tensor, axis)

    def visit_reduction(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        if node.op in _REDUCED:
            super().visit_reduction(node, tensor, axis)
        else:
            self.pin(tensor, axis)

    def visit_window(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        if node.op == "Pad":
            self.pin(tensor, axis)
        else:
            super().visit_window(node, tensor, axis)

    def visit_binary(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        y = node.outputs[0]
        if node.op not in ("Add", "Sub") or any(t.shape is None for t in (*node.inputs, y)):
            self.pin(tensor, axis)
            return
        right = len(tensor.shape) - axis
        size = y.shape[len(y.shape) - right]
        full = [(t, len(t.shape) - right) for t in node.inputs if right <= len(t.shape) and t.shape[-right] == size]
        if not isinstance(size, int) or size == 1 or tensor.shape[axis] != size:
            self.pin(tensor, axis)
            return
        sum_ids = self.ids(y, len(y.shape) - right)
        parts = [self.ids(t, at) for t, at in full]
        if len(parts) == 1 and (node.op == "Add" or full[0][0] is node.inputs[0]):
            self.link(sum_ids, parts[0])  # the other one is the same for all channels
        elif len(parts) == 2:
            self.sums[id(node), right] = sum_ids, parts[0], parts[1], 1.0 if node.op == "Add" else -1.0
        else:
            self.pinned += [sum_ids, *parts]


def _translated(node: gs.Node) -> bool:
    """True if a constant per channel in front of an operator comes out behind it as it is."""
    if node.op == "AveragePool":
        pads, auto = node.attrs.get("pads") or [], node.attrs.get("auto_pad", "NOTSET")
        return not any(pads) and auto in ("NOTSET", "VALID") and not node.attrs.get("ceil_mode", 0)
    if node.op == "Resize":
        sampled = node.attrs.get("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        return bool(sampled and node.attrs.get("mode", "nearest") in ("nearest", "linear"))
    return node.op in _TRANSLATED


def _takes_shift(graph: Graph, layer: Layer) -> bool:
    """True if a layer can make up for a constant that is taken off its input."""
    if layer.op == "MatMul":
        return _bias_behind(graph, layer) is not None
    pads, auto = layer.attrs.get("pads") or [], layer.attrs.get("auto_pad", "NOTSET")
    unpadded = not any(pads) and (
        auto in ("NOTSET", "VALID") or set(layer.shape[2:]) <= {1} == set(layer.attrs.get("strides") or [1])
    )
    return layer.op == "Gemm" or (layer.op == "Conv" and unpadded)


def _bias_behind(graph: Graph, layer: Layer) -> gs.Node | None:
    """The Add of a constant vector, owned by it, that alone reads a MatMul; None if there is none."""
    readers = graph.consumers(layer.output)
    if len(readers) != 1 or readers[0].op != "Add" or layer.output in graph.outputs:
        return None
    constants = [t for t in readers[0].inputs if isinstance(t, gs.Constant)]
    owned = len(constants) == 1 and len(constants[0].outputs) == 1 and constants[0].values.dtype == np.float32
    return readers[0] if owned and constants[0].shape and constants[0].shape[-1] == layer.channels else None


def _channel_axis(layer: Layer, tensor: gs.Tensor) -> int:
    return 1 if layer.op.startswith("Conv") else _last(tensor)


def _last(tensor: gs.Tensor) -> int:
    return len(tensor.shape or ()) - 1
