"""Operators that compute nothing: they go, alone or in pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.rewriting import Rewrite, dims, is_output, kind_of, left_out, rewrite_of, values_of

Sizes = Sequence[int | str | None]

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_CONVOLUTIONS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool")
_FUNCTIONS = ("Relu", "Clip", "Sigmoid", "LeakyRelu", "HardSwish", "Swish", "HardSigmoid", "Tanh")
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")


def drops(graph: Graph, node: gs.Node) -> bool:
    """Remove an operator whose output is its first input; whether it goes. One between an input and an output of the model
    has to stay, since both keep their names."""
    x, output = node.inputs[0], node.outputs[0]
    if is_output(graph, output) and (isinstance(x, gs.Constant) or not x.inputs or is_output(graph, x)):
        return False
    graph.bypass(node, x)
    return True


@rewrite_of("Identity")
def drop_identity(graph: Graph, node: gs.Node) -> bool:
    """Identity is its input."""
    return drops(graph, node)


@rewrite_of("Dropout")
def drop_dropout(graph: Graph, node: gs.Node) -> bool:
    """Dropout outside training is its input."""
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and not mask.is_empty() and (mask.outputs or is_output(graph, mask)):
        return False
    training = values_of(node, 2)
    if not left_out(node, 2) and (training is None or training.any()):
        return False
    return drops(graph, node)


@rewrite_of("Cast")
def drop_cast(graph: Graph, node: gs.Node) -> bool:
    """A Cast to the type that its input has; the first of two, if it loses nothing."""
    x, output = node.inputs[0], node.outputs[0]
    kind = kind_of(x)
    if isinstance(x, gs.Constant) or kind is None:
        return False
    if kind == kind_of(output):
        return drops(graph, node)
    before = x.inputs[0] if x.inputs and x.inputs[0].op == "Cast" and not x.inputs[0].domain else None
    first = kind_of(before.inputs[0]) if before is not None else None
    if before is None or first is None or isinstance(before.inputs[0], gs.Constant):
        return False
    same_kind = first.kind == kind.kind or first.kind + kind.kind == "ui"
    if not same_kind or first.kind not in "iuf" or not np.can_cast(first, kind, "safe"):
        return False
    node.inputs[0] = before.inputs[0]
    return True


@rewrite_of("Concat", "Split", "Slice", "Expand", "Tile", "Pad", "Sum", "Max", "Min", "Mean")
def drop_trivial(graph: Graph, node: gs.Node) -> bool:
    """Concat of one, Split into one, Slice of everything, Expand to the same shape, Tile by ones, Pad by zeros."""
    x = node.inputs[0]
    if isinstance(x, gs.Constant) or x.is_empty() or len(node.outputs) != 1:
        return False
    if node.op in ("Concat", "Split", "Sum", "Max", "Min", "Mean"):
        same = node.op == "Split" or len(node.inputs) == 1
    elif node.op == "Slice":
        same = _takes_all(node)
    elif node.op == "Expand":
        wanted = values_of(node, 1)
        shape = dims(x)
        same = wanted is not None and shape is not None and len(wanted) <= len(shape)
        pairs = zip(wanted[::-1].tolist(), shape[::-1], strict=False) if wanted is not None and shape is not None else ()
        same = same and all(n in (1, m) for n, m in pairs)
    else:
        counts = values_of(node, 1)
        same = counts is not None and bool((counts == (1 if node.op == "Tile" else 0)).all())
    return bool(same) and drops(graph, node)


def _takes_all(node: gs.Node) -> bool:
    """True if a Slice starts at 0, with steps of 1, and ends behind the last element."""
    starts, ends, steps = (values_of(node, at) for at in (1, 2, 4))
    shape = dims(node.inputs[0])
    if starts is None or ends is None or starts.any() or (not left_out(node, 4) and (steps is None or (steps != 1).any())):
        return False
    if left_out(node, 3):
        axes: list[int] | None = list(range(len(ends)))
    else:
        given = values_of(node, 3)
        axes = None if given is None else given.tolist()
    if axes is None:
        return False
    sizes = [shape[a] if shape is not None and -len(shape) <= a < len(shape) else None for a in axes]
    return all(
        end >= np.iinfo(np.int32).max or (isinstance(n, int) and end >= n)
        for end, n in zip(ends.tolist(), sizes, strict=True)
    )


# ---- shapes ---------------------------------------------------------------------------------------------------------------


def known(sizes: Sizes) -> int:
    """How many axes have an unknown size."""
    return sum(not isinstance(n, int) for n in sizes)


def same_shape(one: Sizes | None, other: Sizes | None) -> bool:
    """True if two shapes of as many elements are equal: one axis may be unknown, the others give it."""
    if one is None or other is None or len(one) != len(other):
        return False
    unlike = [(a, b) for a, b in zip(one, other, strict=True) if a != b or a is None]
    if any(isinstance(a, int) and isinstance(b, int) for a, b in unlike) or len(unlike) > 1:
        return False
    rest = [a for a, b in zip(one, other, strict=True) if a == b and a is not None]
    return not unlike or 0 not in rest


def target(source: Sizes | None, result: Sizes | None) -> list[int] | None:
    """What a Reshape from one shape to another is told: 0 keeps an axis, -1 is the one that follows from the others; None if
    that does not say it."""
    if source is None or result is None or 0 in result:
        return None
    told = []
    for axis, n in enumerate(result):
        if isinstance(n, int):
            told.append(n)
        else:
            kept = isinstance(n, str) and axis < len(source) and source[axis] == n
            told.append(0 if kept else -1)
    return told if told.count(-1) <= 1 else None


def moves_unit_axes(node: gs.Node) -> bool:
    """True if a Transpose leaves the order of the axes longer than 1 as it is, which a Reshape does too."""
    shape, perm = dims(node.inputs[0]), node.attrs.get("perm")
    if shape is None or perm is None:
        return False
    order = [axis for axis in perm if shape[axis] != 1]
    return order == sorted(order)


def _reshapes(node: gs.Node | None) -> bool:
    if node is None or node.domain or isinstance(node.inputs[0], gs.Constant):
        return False
    return node.op in RESHAPES or (node.op == "Transpose" and moves_unit_axes(node) and not _beside_convolution(node))


def _beside_convolution(node: gs.Node) -> bool:
    """True if a Transpose turns what a convolution writes, perhaps behind a function, or reads: integer kernels have
    channels last, so that runtimes cancel it."""
    before, after = node.inputs[0], node.outputs[0]
    for _ in range(3):
        writers = [n for n in before.inputs if not n.domain]
        readers = [n for n in after.outputs if not n.domain]
        if any(n.op in _CONVOLUTIONS for n in (*writers, *readers)):
            return True
        before = writers[0].inputs[0] if writers and writers[0].op in _FUNCTIONS else gs.Variable.empty()
        after = readers[0].outputs[0] if readers and readers[0].op in _FUNCTIONS else gs.Variable.empty()
    return False


@rewrite_of(*RESHAPES, "Transpose")
def drop_reshape(graph: Graph, node: gs.Node) -> bool:
    """A Reshape (Flatten, Squeeze, Unsqueeze, Transpose of axes of size 1) to the shape its input has goes; of two in a row
    the first is passed by."""
    if not _reshapes(node) or len(node.outputs) != 1:
        return False
    x, output = node.inputs[0], node.outputs[0]
    shape = dims(output)
    if same_shape(dims(x), shape) and drops(graph, node):
        return True
    first = x.inputs[0] if x.inputs and _reshapes(x.inputs[0]) else None
    if first is None:
        return False
    source = first.inputs[0]
    if same_shape(dims(source), shape) and not (is_output(graph, output) and not source.inputs):
        node.inputs[0] = source
        return drops(graph, node) or _reshape(graph, node, source)
    return _reshape(graph, node, source)


def _reshape(graph: Graph, node: gs.Node, source: gs.Tensor) -> bool:
    """Make an operator a Reshape of another tensor to the shape of its output; whether that can be said."""
    told = target(dims(source), dims(node.outputs[0]))
    if told is None:
        return False
    shape = graph.add_constant(f"{node.name}_shape", np.array(told, np.int64))
    node.op, node.attrs = "Reshape", {}
    node.inputs = [source, shape]
    return True


# ---- duplicates -----------------------------------------------------------------------------------------------------------


def join_duplicates(graph: Graph) -> bool:
    """Operators that compute the same from the same become one; whether there were any. Layers stay, which have names and
    weights of their own, and so does what is random."""
    layers = {layer.name for layer in graph.layers}
    seen: dict[tuple[object, ...], gs.Node] = {}
    did = False
    for node in graph.nodes:
        if node.name in layers or node.op in _RANDOM or node.domain or graph.has_body(node) or not node.inputs:
            continue
        if any(is_output(graph, t) for t in node.outputs) or node.name in graph._beside.rest:
            continue
        attrs = tuple(sorted((k, _plain(v)) for k, v in node.attrs.items()))
        present = tuple(not t.is_empty() for t in node.outputs)
        key = (node.op, attrs, tuple(_identity(t) for t in node.inputs), present)
        first = seen.setdefault(key, node)
        if first is node:
            continue
        for old, new in zip(list(node.outputs), list(first.outputs), strict=True):
            for reader in list(old.outputs):
                for at, tensor in enumerate(reader.inputs):
                    if tensor is old:
                        reader.inputs[at] = new
        did = True
    if did:
        graph.tidy()
    return did


def _identity(tensor: gs.Tensor) -> object:
    """What tells tensors apart: small constants by value."""
    if tensor.is_empty():
        return ""
    if isinstance(tensor, gs.Constant) and tensor.values.nbytes <= 1024 and tensor.values.dtype != object:
        return (tensor.values.dtype.str, tensor.values.shape, tensor.values.tobytes())
    return id(tensor)


def _plain(value: object) -> object:
    """An attribute as something that can be looked up."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, gs.Tensor):
        return ("tensor", _identity(value))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    return (type(value).__name__, value)


REDUNDANT: tuple[Rewrite, ...] = (
    drop_identity,
    drop_dropout,
    drop_cast,
    drop_trivial,
    drop_reshape,
)
