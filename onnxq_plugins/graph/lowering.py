"""An older opset for a model, where a runtime reads no newer one. Operators that mean the same in both stay as they are; a
few are written in the older form; whatever the older opset does not have is refused, all at once."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.bodies import all_graphs, set_nodes
from onnxq_plugins.graph.opsets import lacks, opset_of
from onnxq_plugins.spec import Array

# operators whose input became what had been an attribute: (first opset with the input, its place, the attribute)
_PART_OF_SHAPE = 15  # the opset in which Shape may tell some axes
_REDUCED = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_INPUTS = dict.fromkeys((f"Reduce{kind}" for kind in _REDUCED), (18, 1, "axes"))


def lower_opset(model: onnx.ModelProto, version: int, target: str) -> None:
    """Rewrite a model, in place and exactly, for an opset that is not newer than `version`. Raises OnnxqError with the
    number of each operator that needs a newer one.

    target   for whom, in the error
    """
    before = opset_of(model)
    if before <= version:
        return
    if version < _PART_OF_SHAPE <= before:
        for graph in all_graphs(model.graph):
            _slice_shapes(graph)
    constants = {t.name: t for graph in all_graphs(model.graph) for t in graph.initializer}
    left: Counter[str] = Counter()
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if not node.domain and not lacks(node.op_type, version) and not _lowered(node, before, version, constants):
                left[node.op_type] += 1
    if left:
        names = ", ".join(f"{op} ({n})" for op, n in left.most_common())
        raise OnnxqError(
            f"target '{target}' reads opset {version} at most, the model has opset {before} and operators that need "
            f"it: {names}; export the model with an older opset."
        )
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = version


def _slice_shapes(graph: onnx.GraphProto) -> None:
    """Write each Shape of some axes as a Slice of the whole shape."""
    taken = {t.name for t in graph.initializer} | {name for node in graph.node for name in (*node.input, *node.output)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        part = {a.name: a.i for a in node.attribute if a.name in ("start", "end")}
        if node.op_type != "Shape" or node.domain or not part:
            continue
        names = []
        for end in ("whole", "start", "end"):
            names.append(next(n for i in itertools.count() if (n := f"{node.output[0]}_{end}{i or ''}") not in taken))
            taken.add(names[-1])
        ends = (part.get("start", 0), part.get("end", np.iinfo(np.int64).max))
        graph.initializer.extend(numpy_helper.from_array(np.array([v]), n) for v, n in zip(ends, names[1:], strict=True))
        whole = helper.make_node("Shape", list(node.input), names[:1], node.name)
        nodes[-1:] = [whole, helper.make_node("Slice", names, list(node.output), f"{node.name}_part")]
    if len(nodes) > len(graph.node):
        set_nodes(graph, nodes)


def _lowered(node: onnx.NodeProto, before: int, version: int, constants: dict[str, onnx.TensorProto]) -> bool:
    """Write a node for an older opset; False if that does not have it."""
    try:
        old, new = (defs.get_schema(node.op_type, v, "") for v in (version, before))
    except defs.SchemaError:
        return False
    if old.since_version == new.since_version:
        return True
    first, place, attribute = _INPUTS.get(node.op_type, (0, 0, ""))
    if version < first <= before and len(node.input) > place and node.input[place]:
        if (tensor := constants.get(node.input[place])) is None:
            return False
        _as_attribute(node, place, attribute, numpy_helper.to_array(tensor))
    elif version < first <= before:
        del node.input[place:]
    return _same_meaning(node, old)


def _as_attribute(node: onnx.NodeProto, place: int, name: str, values: Array) -> None:
    del node.input[place:]
    node.attribute.append(helper.make_attribute(name, np.asarray(values).reshape(-1).tolist()))


def _same_meaning(node: onnx.NodeProto, old: defs.OpSchema) -> bool:
    """True if an operator has, without what an older opset lacks at its default, the form it has there."""
    for attribute in list(node.attribute):
        value = helper.get_attribute_value(attribute)
        if attribute.name in old.attributes:
            continue
        if (node.op_type, attribute.name) == ("Split", "num_outputs") or value in _DEFAULTS.get(attribute.name, ()):
            node.attribute.remove(attribute)
        else:
            return False
    while node.input and not node.input[-1]:
        node.input.pop()
    return old.min_input <= len(node.input) <= old.max_input and len(node.output) <= old.max_output


_DEFAULTS = {
    "allowzero": (0,),
    "saturate": (1,),
    "antialias": (0,),
    "axes": ([],),
    "noop_with_empty_axes": (0,),
    "start": (0,),
    "training_mode": (0,),
    "layout": (0,),
    "stash_type": (1,),
    "keep_aspect_ratio_policy": (b"stretch",),
    "dilations": ([1], [1, 1], [1, 1, 1]),
    "ceil_mode": (0,),
    "reduction": (b"none",),
}
