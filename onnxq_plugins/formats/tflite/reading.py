"""A QDQ model with all sizes known: what depends on no sample is computed, what is quantized has its grid.

The model is run once, on zeros: every tensor's shape and every value that does not depend on an input follow from that run,
whatever operators the model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.formats.tflite.schema import Grid
from onnxq_plugins.graph.opsets import opset_of
from onnxq_plugins.spec import Array

Q, DQ = "QuantizeLinear", "DequantizeLinear"
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_SIZES = {"Shape", "Size"}
_NARROW = {TensorProto.INT4, TensorProto.UINT4}


@dataclass(eq=False)
class Node:
    """An operator of the model; inputs and outputs are names of tensors, "" for those left out."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, text as str."""
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else value


@dataclass(eq=False)
class Source:
    """A model as it is written.

    nodes      those that outputs depend on, without constants, in order
    shapes     of all tensors
    types      numpy's names of their types
    constants  tensors that depend on no input
    stored     tensors decoded from constant codes -> (codes, grid)
    grids      outputs of QuantizeLinear, and inputs and outputs of DequantizeLinear -> their grid
    """

    opset: int
    inputs: list[str]
    outputs: list[str]
    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    stored: dict[str, tuple[Array, Grid]] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    readers: dict[str, list[Node]] = field(default_factory=dict)

    def target(self, name: str) -> Grid | None:
        """The grid on which a tensor is quantized, if nothing reads its float values and there is one."""
        found = {self.grids.get(node.outputs[0]) if node.op == Q else None for node in self.readers.get(name, [])}
        return found.pop() if len(found) == 1 and name not in self.outputs else None

    def only_reader(self, name: str) -> Node | None:
        """The operator that reads a tensor, if there is one and it is no output."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def read_model(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> Source:
    """Raises OnnxqError if a size is unknown, or the model does not run.

    shapes   of inputs whose sizes the model leaves open
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    constants = {t.name for t in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in constants]
    source = Source(opset_of(model), [v.name for v in inputs], [v.name for v in model.graph.output])
    feed = _zeros(inputs, shapes)
    nodes = [_node(node) for node in model.graph.node]
    narrow = {t.name: _plain(t) for t in model.graph.initializer if t.data_type in _NARROW}
    narrow |= {n.outputs[0]: _plain(n.attrs["value"]) for n in nodes if n.op == "Constant" and _is_narrow(n)}
    known = constants | _constant(nodes, set(constants))
    _run(model, nodes, feed, known - constants, set(narrow), source)
    for tensor in model.graph.initializer:
        if tensor.name not in narrow:
            source.constants[tensor.name] = numpy_helper.to_array(tensor)
    source.constants |= narrow
    for name, array in source.constants.items():
        source.shapes[name], source.types[name] = array.shape, str(array.dtype)
    _grids(nodes, source)
    wanted = set(source.outputs)
    for node in reversed(nodes):
        if any(name in wanted and name not in known for name in node.outputs):
            source.nodes.insert(0, node)
            wanted |= {name for name in node.inputs if name}
    for node in source.nodes:
        for name in dict.fromkeys(node.inputs):
            source.readers.setdefault(name, []).append(node)
    return source


def _node(node: onnx.NodeProto) -> Node:
    op = node.op_type if node.domain in ("", "ai.onnx") or node.op_type in (Q, DQ) else f"{node.domain}.{node.op_type}"
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return Node(op, node.name or (node.output[0] if node.output else ""), list(node.input), list(node.output), attrs)


def _is_narrow(node: Node) -> bool:
    return isinstance(node.attrs.get("value"), TensorProto) and node.attrs["value"].data_type in _NARROW


def _plain(tensor: TensorProto) -> Array:
    """4-bit codes as bytes."""
    return numpy_helper.to_array(tensor).astype(np.int8 if tensor.data_type == TensorProto.INT4 else np.uint8)


def _zeros(inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """A feed of the shapes that the file is for."""
    feed, problems = {}, []
    for value in inputs:
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        given = [int(size) for size in shapes.get(value.name, shape)]
        if not kind.HasField("shape") or min(given, default=1) < 1 or len(given) != len(shape):
            sizes = [d.dim_value or d.dim_param or "?" for d in kind.shape.dim]
            problems.append(
                f"input '{value.name}' has open sizes {sizes}, and a .tflite file has none; give its shape "
                f'(shapes = {{"{value.name}" = [1, ...]}}).'
            )
            continue
        feed[value.name] = np.zeros(given, helper.tensor_dtype_to_np_dtype(kind.elem_type))
    OnnxqError.check(problems)
    return feed


def _constant(nodes: Sequence[Node], known: set[str]) -> set[str]:
    """Tensors that depend on no input, sizes included."""
    found = set(known)
    for node in nodes:
        bodies = any(isinstance(value, onnx.GraphProto) for value in node.attrs.values())
        follows = node.op in _SIZES or all(name in found for name in node.inputs if name)
        if follows and node.op not in _RANDOM and not bodies:
            found |= {name for name in node.outputs if name}
    return found


def _run(
    model: onnx.ModelProto, nodes: Sequence[Node], feed: Mapping[str, Array], keep: set[str], skip: set[str], source: Source
) -> None:
    """Shapes and types of all tensors, and the values of those to `keep`."""
    import onnxruntime as ort

    for name, array in feed.items():
        source.shapes[name], source.types[name] = array.shape, str(array.dtype)
    wanted = [name for node in nodes for name in node.outputs if name and name not in skip]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(wanted, dict(feed))
    except Exception as error:  # onnxruntime raises a type of its own for each kind
        text = " ".join(str(error).split())[:300]
        raise OnnxqError(
            f"the model cannot be written as .tflite: onnxruntime does not run it on zeros ({text})."
        ) from error
    for name, value in zip(wanted, values, strict=True):
        if isinstance(value, np.ndarray):
            source.shapes[name], source.types[name] = value.shape, str(value.dtype)
            if name in keep:
                source.constants[name] = value


def _grids(nodes: Sequence[Node], source: Source) -> None:
    """The grids of all pairs; values of 4 bits, blocks and zero points that differ are left to be decoded."""
    for node in nodes:
        if node.op not in (Q, DQ) or any(name and name not in source.constants for name in node.inputs[1:3]):
            continue
        scale = np.asarray(source.constants[node.inputs[1]], np.float32)
        zero = node.inputs[2] if len(node.inputs) > 2 else ""
        codes = node.inputs[0] if node.op == DQ else node.outputs[0]
        points = source.constants[zero].astype(np.int64) if zero else np.zeros(scale.shape, np.int64)
        axis = node.attr("axis", 1) % max(1, len(source.shapes[codes])) if scale.size > 1 else None
        if node.attr("block_size", 0) or (axis is not None and scale.ndim != 1):
            continue
        kind = source.types.get(codes, str(source.constants[zero].dtype) if zero else "uint8")
        if codes in source.constants and node.op == DQ:
            values = source.constants[codes].astype(np.int64)
            along = (
                points.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
                if axis is not None
                else points.reshape(())
            )
            held = _held(values, along, kind)
            if held is not None:
                source.stored[node.outputs[0]] = held[0], Grid(held[1], tuple(map(float, scale.reshape(-1))), held[2], axis)
        elif axis is None:
            grid = _activation(float(scale.reshape(-1)[0]), int(points.reshape(-1)[0]), kind)
            if grid is not None:
                source.grids[codes] = grid


def _held(codes: Array, zero: Array, kind: str) -> tuple[Array, str, int] | None:
    """Constant codes as signed ones, their type and zero point: 0 where that is possible without a change."""
    centred = codes - zero
    low, high = centred.min(initial=0), centred.max(initial=0)
    if kind in ("int8", "uint8") and low >= -128 and high <= 127:
        return centred.astype(np.int8), "int8", 0
    if kind == "int16" and low >= -32768 and high <= 32767:
        return centred.astype(np.int16), "int16", 0
    if kind == "int32" and not np.any(zero):
        return codes.astype(np.int32), "int32", 0
    if kind in ("int8", "uint8") and zero.size == 1:
        shift = 128 if kind == "uint8" else 0
        return (codes - shift).astype(np.int8), "int8", int(zero.reshape(-1)[0]) - shift
    return None


def _activation(scale: float, zero: int, kind: str) -> Grid | None:
    """The grid of an activation in LiteRT's types. 16-bit codes have no zero point there: with one, they become those of the
    symmetric grid of the same reach, whose step is at most twice as wide."""
    if kind in ("int8", "uint8"):
        return Grid("int8", (scale,), zero - (128 if kind == "uint8" else 0))
    if kind in ("int16", "uint16"):
        middle = zero - (32768 if kind == "uint16" else 0)
        reach = max(32768 + middle, 32767 - middle) if middle else 32767
        return Grid("int16", (float(np.float32(scale * reach / 32767)),))
    return None
