"""Operators as a runtime reports them -> what they are: integer, fake, float, or no computation at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx

from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.runtimes.runtime import Executed, Kind

# What computes no value, whatever runtime calls it so: conversions, copies, shapes.
MOVES = frozenset(
    [
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "DequantizeLinear",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "MemcpyFromHost",
        "MemcpyToHost",
        "NonZero",
        "Pad",
        "QuantizeLinear",
        "Range",
        "ReorderInput",
        "ReorderOutput",
        "Reshape",
        "ScatterND",
        "Shape",
        "Size",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
_CODES = ("uint8", "int8", "uint4", "int4", "uint16", "int16")
_WHOLE = ("int64", "int32", "bool", "uint32", "uint64", "string")
_WEIGHT_ONLY = ("MatMulNBits", "GatherBlockQuantized")


def coded(graph: onnx.GraphProto) -> set[str]:
    """Names of the operators of a QDQ model that read nothing but what is decoded from codes, and of activation functions
    between these and a QuantizeLinear: whoever computes them in float computes fake quantization. Their outputs are among
    the names, since runtimes call them by these, too."""
    producers = {output: node for node in graph.node for output in node.output}
    encoded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    names: set[str] = set()
    for node in graph.node:
        sources = [producers[name] for name in node.input[:2] if name in producers]
        if node.op_type in MOVES or not sources:
            continue
        decoded = all(source.op_type == "DequantizeLinear" for source in sources)
        if decoded or (node.output[0] in encoded and all(source.output[0] in names for source in sources)):
            names |= {node.name, *node.output} - {""}
    return names


def conversions(graph: onnx.GraphProto) -> set[str]:
    """Names, and outputs, of the operators of a model that compute nothing."""
    return {name for node in graph.node if node.op_type in MOVES for name in (node.name, *node.output)} - {""}


def computed(name: str, op: str, integer: bool, codes: set[str]) -> Executed:
    """One operator that computes.

    name     in the model
    codes    of the model (`coded`)
    """
    kind: Kind = "integer" if integer else "fake" if name in codes else "float"
    return Executed(name, op, kind)


def moved(name: str, op: str) -> Executed:
    """One operator that computes nothing."""
    return Executed(name, op, "moves")


def from_profile(events: Iterable[Mapping[str, Any]], codes: set[str]) -> list[Executed]:
    """The operators that ran in onnxruntime, anywhere: from the events of its profile."""
    found: dict[tuple[str, str], Executed] = {}  # older versions leave fused operators without a name
    for event in events:
        name, args = str(event.get("name", "")), event.get("args", {})
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or "op_name" not in args:
            continue
        name = plain(name.removesuffix("_kernel_time"))
        key = (name, str(args.get("node_index", "")))
        if key not in found:
            types = [next(iter(entry), "") for entry in args.get("input_type_shape", ())]
            found[key] = _profiled(name, str(args["op_name"]), types, codes)
    return list(found.values())


def plain(name: str) -> str:
    """An operator's name without what onnxruntime adds as it rewrites."""
    return re.sub(r"(_token_\d+|_nchwc|_nhwc|/duplicated)+$", "", name.removeprefix("fused "))


def _profiled(name: str, op: str, types: list[str], codes: set[str]) -> Executed:
    first = types[0] if types else ""
    if op in _WEIGHT_ONLY:
        return Executed(name, op, "fake", why="weights are codes, and are decoded as they are read beside float inputs")
    if op in MOVES or first in _WHOLE:
        return moved(name, op)
    return computed(name, op, first in _CODES, codes)


def layer_behind(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Operator -> the layer that it is, or that it is fused with: the one in front of an activation function."""
    producers = {output: node for node in graph.node for output in node.output}
    found: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        source = producers.get(node.input[0]) if node.input else None
        if node.op_type in LAYER_OPS:
            found[node.name] = node
        elif source is not None and source.name in found and len(node.output) == 1 and node.op_type not in MOVES:
            found[node.name] = found[source.name]
    return found
