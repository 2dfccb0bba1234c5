"""Focus: the pixels of every square of an image stacked as channels, sliced out one after the other, is SpaceToDepth."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.rewriting import Rewrite, dims, left_out, only_reader, rewrite_of, values_of


def _start(tensor: gs.Tensor, block: int) -> tuple[gs.Tensor, int, int] | None:
    """x, first row and first column, if a tensor is every `block`-th row and column of x."""
    starts = {2: 0, 3: 0}
    seen = set[int]()
    while len(seen) < 2:
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or node.op != "Slice" or node.domain or left_out(node, 3) or left_out(node, 4):
            return None
        first, ends, axes, steps = (values_of(node, at) for at in (1, 2, 3, 4))
        shape = dims(node.inputs[0])
        if first is None or ends is None or axes is None or steps is None or shape is None or len(shape) != 4:
            return None
        for start, end, axis, step in zip(first.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True):
            axis, size = axis % 4, shape[axis % 4]
            whole = isinstance(size, int) and size % block == 0 and end >= size
            if axis not in starts or axis in seen or step != block or not 0 <= start < block or not whole:
                return None
            starts[axis] = start
            seen.add(axis)
        tensor = node.inputs[0]
    return tensor, starts[2], starts[3]


@rewrite_of("Concat")
def slices_to_depth(graph: Graph, node: gs.Node) -> bool:
    """Concat of all x[:, :, i::b, j::b] is SpaceToDepth, and another order of the input channels of the Conv behind it, or a
    Gather."""
    block = round(len(node.inputs) ** 0.5)
    if block < 2 or block**2 != len(node.inputs) or int(node.attrs.get("axis", 0)) % 4 != 1:
        return False
    found = [_start(t, block) for t in node.inputs]
    first = found[0]
    if first is None or any(one is None or one[0] is not first[0] for one in found):
        return False
    x, shape = first[0], dims(first[0])
    places = [row * block + column for _, row, column in (one for one in found if one is not None)]
    if sorted(places) != list(range(block**2)) or shape is None or not isinstance(shape[1], int):
        return False
    order = (np.array(places)[:, None] * shape[1] + np.arange(shape[1])).reshape(-1)  # place in SpaceToDepth of each channel
    output = node.outputs[0]
    reader = only_reader(graph, output)
    layer = graph._layer(reader) if reader is not None and reader.op == "Conv" else None
    if (order == np.arange(len(order))).all():
        node.op, node.attrs = "SpaceToDepth", {"blocksize": block}
        node.inputs = [x]
    elif layer is not None and layer.groups == 1 and layer.input == output.name and reader is not None:
        weight = graph.constant(layer.weight)
        reader.inputs[1] = graph.add_constant(f"{layer.weight}_by_depth", weight[:, np.argsort(order)])
        node.op, node.attrs = "SpaceToDepth", {"blocksize": block}
        node.inputs = [x]
    else:
        depth = graph.add_variable(f"{output.name}_depth", like=output)
        graph.add_node("SpaceToDepth", f"{node.name}_depth", [x], [depth], before=node, blocksize=block)
        node.op, node.attrs = "Gather", {"axis": 1}
        node.inputs = [depth, graph.add_constant(f"{node.name}_order", order.astype(np.int64))]
    return True


FOCUS: tuple[Rewrite, ...] = (slices_to_depth,)
