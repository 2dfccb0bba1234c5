"""Channel groups: which places of the graph must move, or scale, together. How each operator links channels.

A residual Add links channel i of both inputs and the output, a Concat links with an offset, a Flatten of 4 x 4 positions
links channel c with columns 16 c .. 16 c + 15. So residual streams, grouped convolutions (whose channels can move only
inside their group), Concat segments and Flatten need no cases of their own. Unknown operators, and the model's inputs and
outputs, pin the channels they touch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.elements import ChannelGroup, Elements, Key, Kind
from onnxq_plugins.graph.layer import Layer
from onnxq_plugins.spec import Array

_HOMOGENEOUS = {"Relu", "LeakyRelu", "Identity", "Dropout"}
_POINTWISE = {
    "Clip",
    "Sigmoid",
    "Tanh",
    "Gelu",
    "Erf",
    "HardSwish",
    "Swish",
    "HardSigmoid",
    "Elu",
    "Selu",
    "Softplus",
    "Exp",
    "Sqrt",
    "Mish",
    "Softsign",
    "Abs",
    "Neg",
    "Cast",
}
_POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"}
_DYNAMIC = 1_000_003  # stands for a dynamic size: a prime that divides nothing


def channel_groups(graph: Graph, kind: Kind, clips: bool = False) -> list[ChannelGroup]:
    """All groups of at least two free channels that include a layer's weight.

    kind ``permute`` ties input and output of a depthwise convolution or LayerNormalization; ``rescale`` does not,
    since their own weights can absorb a factor on either side, but it stops at operators that are not positively
    homogeneous (Clip with a maximum, Sigmoid, Softmax, products of activations).

    clips   for ``rescale``: continue through a Clip from 0 to a maximum. Rescaling such a group keeps the function only
            where factor * value stays below the maximum, or where the factor is 1
    """
    walk = Walk(graph, kind, clips)
    walk.traverse()
    return walk.cut()


class Walk(Elements):
    """One traversal of the graph, starting at its layers."""

    def __init__(self, graph: Graph, kind: Kind, clips: bool = False) -> None:
        super().__init__(graph, kind)
        self.clips = clips
        self.coarse: list[tuple[gs.Tensor, int, gs.Tensor, list[int]]] = []  # (tensor, merged axis, finer tensor, axes)
        self.layers = {layer.name: layer for layer in graph.layers}
        self.main = {id(node) for node in graph.nodes}

    def traverse(self) -> None:
        """Collect the elements and their links."""
        for layer in self.layers.values():
            x, y = self.graph.tensor(layer.input), self.graph.tensor(layer.output)
            for tensor in (x, y):
                if tensor.shape is not None:
                    self.ids(tensor, 1 if layer.op.startswith("Conv") else len(tensor.shape) - 1)
        while self.todo or self.adopt():
            if not self.todo:
                continue
            tensor, axis = self.todo.pop()
            if tensor in self.graph._graph.inputs or tensor in self.graph._graph.outputs:
                self.pin(tensor, axis)
            for node in (*tensor.inputs, *tensor.outputs):
                if id(node) not in self.main or node.domain not in (None, "", "ai.onnx"):
                    self.pin(tensor, axis)
                else:
                    self.visit(node, tensor, axis)

    def adopt(self) -> bool:
        """Settle the Reshapes whose finer side has not been reached: follow its innermost axis, or pin; True if any."""
        waiting = [w for w in self.coarse if not any((w[2].name, b, "output", None) in self.start for b in w[3])]
        down = [w for w in waiting if w[3] and any(w[2] is y for reader in w[0].outputs for y in reader.outputs)]
        self.coarse = [w for w in waiting if w not in down] if down else []
        for _, _, other, fine in down:  # a split into heads, say
            self.ids(other, fine[-1])
        for tensor, axis, _, _ in [] if down else waiting:
            self.pin(tensor, axis)
        return bool(waiting)

    def visit(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        op = node.op
        if node.name in self.layers:
            self.visit_layer(self.layers[node.name], node, tensor, axis)
        elif op == "MatMul":
            self.visit_matmul(node, tensor, axis)
        elif op in _HOMOGENEOUS:
            self.same(node, tensor, axis)
        elif op in _POINTWISE:
            self.same(
                node,
                tensor,
                axis,
                homogeneous=op in ("Abs", "Neg")
                or (op == "Clip" and (_is_relu(node) or (self.clips and clip_maximum(node) is not None))),
            )
        elif op in _POOLS or op == "Resize":
            self.same(node, tensor, axis) if axis == 1 or op == "Resize" else self.pin(tensor, axis)
        elif op in ("Add", "Sub", "Mul", "Div"):
            self.visit_binary(node, tensor, axis)
        elif op in ("Concat", "Split", "Slice", "Pad", "Gather"):
            self.visit_window(node, tensor, axis)
        elif op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            self.visit_reshape(node, tensor, axis)
        elif op == "Transpose":
            perm = node.attrs.get("perm") or list(range(len(tensor.shape)))[::-1]
            x, y = node.inputs[0], node.outputs[0]
            if tensor is x:
                self.link(self.ids(x, axis), self.ids(y, list(perm).index(axis)))
            else:
                self.link(self.ids(y, axis), self.ids(x, perm[axis]))
        elif op == "LayerNormalization":
            self.visit_layernorm(node, tensor, axis)
        elif op in ("BatchNormalization", "PRelu"):
            if tensor is node.inputs[0] or tensor is node.outputs[0]:
                self.same(node, tensor, axis, homogeneous=op == "PRelu")
                self.follow(node.inputs[1:], node.inputs[0], axis, channels=op == "BatchNormalization")
        elif op in _REDUCTIONS:
            self.visit_reduction(node, tensor, axis)
        elif op == "Expand" and node.inputs[0].shape and node.outputs[0].shape:
            shift = len(node.outputs[0].shape) - len(node.inputs[0].shape)
            at = axis if tensor is node.inputs[0] else axis - shift
            if at >= 0 and node.inputs[0].shape[at] == node.outputs[0].shape[at + shift]:
                self.link(self.ids(node.inputs[0], at), self.ids(node.outputs[0], at + shift))
            elif tensor is node.inputs[0] or self.kind != "permute":
                self.pin(tensor, axis)
        elif op == "Softmax" and axis != node.attrs.get("axis", -1) % len(tensor.shape):
            self.same(node, tensor, axis, homogeneous=False)
        elif op == "Shape":
            pass
        else:
            self.pin(tensor, axis)

    def same(self, node: gs.Node, tensor: gs.Tensor, axis: int, homogeneous: bool = True) -> None:
        """Input and output share the axis. An operator that is not homogeneous stops rescaling on both sides."""
        if self.kind == "rescale" and not homogeneous:
            self.pin(node.inputs[0], axis)
            self.pin(node.outputs[0], axis)
        else:
            self.link(self.ids(node.inputs[0], axis), self.ids(node.outputs[0], axis))

    def follow(self, parameters: Sequence[gs.Tensor], tensor: gs.Tensor, axis: int, channels: bool) -> None:
        """Parameters that move with the channels but do not scale with them: vectors over axis 1 (`channels`), or
        arrays that broadcast against the tensor."""
        if self.kind != "permute" or (channels and axis != 1):
            return
        for p in parameters:
            at = 0 if channels else axis - len(tensor.shape) + len(p.shape or ())
            if at >= 0 and p.shape[at] == tensor.shape[axis]:
                self.link(self.ids(tensor, axis), self.ids(p, at))
            elif not isinstance(p, gs.Constant) or (at >= 0 and p.shape[at] != 1):
                self.pin(tensor, axis)

    def visit_layer(self, layer: Layer, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        x, y, w = node.inputs[0], node.outputs[0], node.inputs[1]
        if tensor is w or (layer.bias is not None and tensor.name == layer.bias):
            return
        channel_axis = 1 if layer.op.startswith("Conv") else len(tensor.shape) - 1
        if axis != channel_axis:
            if layer.op == "MatMul" or (layer.op == "Gemm" and axis == 0):
                self.link(self.ids(x, axis), self.ids(y, axis))
            else:
                self.pin(tensor, axis)
            return
        if layer.groups == 1:
            if tensor is x:
                self.link(self.ids(x, axis), self.ids(w, layer.in_axis, "input"))
        elif layer.op == "ConvTranspose":
            self.pin(tensor, axis)
        elif layer.kind == "depthwise":
            per_input = layer.shape[0] // layer.groups
            spread = np.repeat(self.ids(x, 1), per_input)
            if self.kind == "permute":
                self.link(spread, self.ids(y, 1))
            elif tensor is x:
                self.link(spread, self.ids(w, 0, "input"))
        else:
            self.visit_grouped(layer, x, y, w)
            return
        if tensor is y:
            self.link(self.ids(y, axis), self.ids(w, layer.out_axis))
            if layer.bias is not None:
                self.link(self.ids(y, axis), self.ids(node.inputs[2], 0))

    def visit_grouped(self, layer: Layer, x: gs.Tensor, y: gs.Tensor, w: gs.Tensor) -> None:
        """Channels stay inside their group of the convolution: one place per group on both sides."""
        outputs, inputs = layer.shape[0] // layer.groups, layer.shape[1]
        bias = self.graph.tensor(layer.bias) if layer.bias is not None else None
        for j in range(layer.groups):
            rows = (j * outputs, (j + 1) * outputs)
            self.link(self.ids(x, 1)[j * inputs : (j + 1) * inputs], self.ids(w, 1, "input", rows))
            key: Key = (w.name, 0, "output", rows)
            if key not in self.start:
                self.start[key], self.count[key] = self.total, outputs
                self.total += outputs
            self.link(self.ids(y, 1)[slice(*rows)], np.arange(self.start[key], self.start[key] + outputs))
        if bias is not None:
            self.link(self.ids(y, 1), self.ids(bias, 0))

    def visit_matmul(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
        ranks = [len(t.shape) if t.shape is not None else 0 for t in (a, b, y)]
        if min(ranks) < 2:
            self.pin(tensor, axis)
        elif (tensor is a and axis == ranks[0] - 1) or (tensor is b and axis == ranks[1] - 2):
            if self.kind == "rescale":
                self.pin(tensor, axis)
            else:
                self.link(self.ids(a, ranks[0] - 1), self.ids(b, ranks[1] - 2))
        elif (tensor is b and axis == ranks[1] - 1) or (tensor is y and axis == ranks[2] - 1):
            self.link(self.ids(b, ranks[1] - 1), self.ids(y, ranks[2] - 1))
        elif (tensor is a and axis == ranks[0] - 2) or (tensor is y and axis == ranks[2] - 2):
            self.link(self.ids(a, ranks[0] - 2), self.ids(y, ranks[2] - 2))
        else:
            self.pin(tensor, axis)

    def visit_binary(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        y = node.outputs[0]
        if any(t.shape is None for t in (*node.inputs, y)):
            self.pin(tensor, axis)
            return
        from_right = len(tensor.shape) - axis
        at_y = len(y.shape) - from_right
        size = y.shape[at_y]
        if tensor is not y and tensor.shape[axis] != size:
            self.pin(tensor, axis)
            return
        operands = [(t, len(t.shape) - from_right) for t in node.inputs]
        full = [(t, at) for t, at in operands if at >= 0 and t.shape[at] == size and size != 1]
        product = node.op in ("Mul", "Div")
        if (
            self.kind == "rescale"
            and node.op == "Mul"
            and sum(isinstance(t, gs.Constant) for t, _ in full)
            == 1
            == len([t for t, _ in full if not isinstance(t, gs.Constant)])
        ):
            for t, at in full:  # a factor per channel absorbs a scaling of either side, as a depthwise weight does
                if not isinstance(t, gs.Constant):
                    x, x_axis = t, at
                else:
                    factor, factor_axis = t, at
            self.link(self.ids(x, x_axis), self.ids(factor, factor_axis, "input"))
            self.link(self.ids(y, at_y), self.ids(factor, factor_axis))
            return
        if self.kind == "rescale":
            varying = [t for t, _ in full if not isinstance(t, gs.Constant)]
            if product and (len(varying) > 1 or (node.op == "Div" and node.inputs[1] in varying)):
                for t, at in ((y, at_y), *full):
                    self.pin(t, at)
                return
            others = [t for t, at in operands if (t, at) not in full]
            if not product and any(not (isinstance(t, gs.Constant) and not t.values.any()) for t in others):
                self.pin(y, at_y)
        for t, at in full:
            if not (product and isinstance(t, gs.Constant) and self.kind == "rescale"):
                self.link(self.ids(y, at_y), self.ids(t, at))

    def visit_window(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        """Concat, Split, Slice, Pad, Gather: the output is a window on the input, or the other way round."""
        x, y = node.inputs[0], node.outputs[0]
        if node.op in ("Concat", "Split"):
            whole, parts = (y, node.inputs) if node.op == "Concat" else (x, node.outputs)
            along = node.attrs.get("axis", 0) % len(tensor.shape)
            if any(t.shape is None or not isinstance(t.shape[along], int) for t in (*parts, whole)):
                self.pin(tensor, axis)
            elif axis != along:
                for t in parts:
                    self.link(self.ids(whole, axis), self.ids(t, axis))
            else:
                cuts = np.cumsum([0, *(t.shape[along] for t in parts)])
                for t, a, b in zip(parts, cuts, cuts[1:], strict=False):
                    self.link(self.ids(whole, axis)[a:b], self.ids(t, axis))
            return
        constants = [t.values if isinstance(t, gs.Constant) else None for t in node.inputs[1:] if not t.is_empty()]
        if any(c is None for c in constants) or tensor not in (x, y) or x.shape is None:
            self.pin(tensor, axis)
        elif node.op == "Gather":
            self.visit_gather(x, y, tensor, axis, node.attrs.get("axis", 0) % len(x.shape), np.asarray(constants[0]))
        elif node.op == "Slice":
            starts, ends, *rest = (np.asarray(c).tolist() for c in constants)
            axes = [a % len(x.shape) for a in (rest[0] if rest else range(len(starts)))]
            steps = rest[1] if len(rest) > 1 else [1] * len(starts)
            sliced = self.ids(x, axis)
            for s, e, a, step in zip(starts, ends, axes, steps, strict=True):
                sliced = sliced[slice(s, e if e > -(2**62) else None, step)] if a == axis else sliced
            self.link(sliced, self.ids(y, axis))
        else:
            pads = np.asarray(constants[0]).tolist()
            axes = np.asarray(constants[2]).tolist() if len(constants) > 2 else list(range(len(x.shape)))
            before = {a % len(x.shape): pads[i] for i, a in enumerate(axes)}.get(axis, 0)
            inside = self.ids(y, axis)[before : before + len(self.ids(x, axis))] if before >= 0 else self.ids(y, axis)
            constant_mode = node.attrs.get("mode", "constant") == "constant"
            zero = len(constants) < 2 or not np.any(constants[1])
            if not constant_mode or (not zero and self.kind == "rescale"):
                self.pin(tensor, axis)
            self.link(self.ids(x, axis), inside)

    def visit_gather(self, x: gs.Tensor, y: gs.Tensor, tensor: gs.Tensor, axis: int, along: int, at: Array) -> None:
        if tensor is x and axis == along and at.ndim == 0:
            self.pin(tensor, axis)
        elif (tensor is x and axis == along) or (tensor is y and along <= axis < along + at.ndim):
            if at.ndim == 1:
                self.link(self.ids(x, along)[at], self.ids(y, along))
            else:
                self.pin(tensor, axis)
        else:
            shift = at.ndim - 1
            from_x = axis if tensor is x else (axis if axis < along else axis - shift)
            self.link(self.ids(x, from_x), self.ids(y, from_x if from_x < along else from_x + shift))

    def visit_reshape(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        x, y = node.inputs[0], node.outputs[0]
        if tensor not in (x, y) or x.shape is None or y.shape is None:
            self.pin(tensor, axis)
            return
        other = y if tensor is x else x
        sizes, other_sizes = _numbers(tensor.shape, other.shape), _numbers(other.shape, tensor.shape)
        size, inner = sizes[axis], int(np.prod(sizes[axis + 1 :]))
        finer = []
        for b, n in enumerate(other_sizes):
            stride = int(np.prod(other_sizes[b + 1 :]))
            known = n % _DYNAMIC != 0  # else it holds an axis of unknown size
            if known and inner >= stride and inner % stride == 0 and n % (size * (inner // stride)) == 0:
                k = inner // stride  # this axis is part of the other: position = outer * size * k + channel * k + j
                self.link(self.ids(tensor, axis)[np.arange(n) // k % size], self.ids(other, b))
                return
            if stride >= inner and stride % inner == 0 and size % (n * (stride // inner)) == 0 and n > 1:
                finer.append(b)
        # this axis merges finer axes: they link from their own side, where it is known which of them hold channels
        self.coarse.append((tensor, axis, other, finer))

    def visit_layernorm(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        x, y, parameters = node.inputs[0], node.outputs[0], node.inputs[1:]
        if tensor in parameters:
            return
        last = len(x.shape or ()) - 1
        if last < 0 or node.attrs.get("axis", -1) not in (-1, last) or len(node.outputs) > 1:
            self.pin(tensor, axis)
        elif axis != last:
            self.same(node, tensor, axis, homogeneous=False)
        else:
            if self.kind == "permute":
                self.link(self.ids(x, last), self.ids(y, last))
            else:
                self.pin(x, last)
            for p in parameters:
                if not p.is_empty():
                    self.link(self.ids(y, last), self.ids(p, 0))

    def visit_reduction(self, node: gs.Node, tensor: gs.Tensor, axis: int) -> None:
        x, y = node.inputs[0], node.outputs[0]
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
            axes = node.inputs[1].values.tolist()
        if axes is None or x.shape is None:
            self.pin(tensor, axis)
            return
        reduced = {a % len(x.shape) for a in axes}
        kept = [a for a in range(len(x.shape)) if a not in reduced or node.attrs.get("keepdims", 1)]
        at = axis if tensor is x else kept[axis]
        if at in reduced:
            self.pin(tensor, axis)
        else:
            self.link(self.ids(x, at), self.ids(y, kept.index(at)))


def clip_maximum(node: gs.Node) -> float | None:
    """The maximum of a Clip from 0; None for any other operator."""
    if node.op != "Clip" or len(node.inputs) < 3 or not all(isinstance(t, gs.Constant) for t in node.inputs[1:3]):
        return None
    low, high = (float(t.values.item()) for t in node.inputs[1:3])
    return high if low == 0 < high else None


def _is_relu(node: gs.Node) -> bool:
    """True if the bounds of a Clip are constants, each 0 or as good as infinite."""
    bounds = [t.values.item() for t in node.inputs[1:] if isinstance(t, gs.Constant)]
    return all(b in (0.0, np.inf, -np.inf) or abs(b) > 1e30 for b in bounds) and len(bounds) == sum(
        not t.is_empty() for t in node.inputs[1:]
    )


def _numbers(shape: Sequence[int | str | None], other: Sequence[int | str | None]) -> list[int]:
    """Sizes as numbers. A dynamic axis becomes a large prime, so that products with it can be compared; one that merges
    other axes (as -1 in a Reshape does) becomes the size that gives both shapes the same number of elements."""
    prime = _DYNAMIC
    numbers = [n if isinstance(n, int) else prime for n in shape]
    partner = [n if isinstance(n, int) else prime for n in other]
    if None in shape and None not in other:
        rest = int(np.prod([n for n, s in zip(numbers, shape, strict=True) if s is not None]))
        whole = int(np.prod(partner))
        numbers = [whole // rest if s is None and whole % rest == 0 else n for n, s in zip(numbers, shape, strict=True)]
    return numbers
