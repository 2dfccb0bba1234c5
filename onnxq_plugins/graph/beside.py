"""What graphsurgeon cannot hold, kept beside its graph and put back when the model is written.

That is the model's header, documentation and metadata; types of inputs and outputs (sequences, maps, optionals); bodies of
control flow and attributes of rare kinds; constants of text or of types without numpy arrays; default values of inputs.

In graphsurgeon's graph, an operator with a body has the tensors that the body reads as further inputs, so that it is among
their readers; constants that are kept here are tensors without a producer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxq_plugins.graph.bodies import outer_reads, rename_outer_reads
from onnxq_plugins.spec import Array

_SIMPLE = {
    AttributeProto.FLOAT,
    AttributeProto.INT,
    AttributeProto.STRING,
    AttributeProto.TENSOR,
    AttributeProto.FLOATS,
    AttributeProto.INTS,
    AttributeProto.STRINGS,
}
_ARRAYS = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.BOOL,
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}


@dataclass(frozen=True)
class _Rest:
    """What is kept of one operator: attributes, the number of its own inputs, and the outer tensors that its bodies read."""

    attributes: tuple[AttributeProto, ...]
    inputs: int
    captured: tuple[str, ...]


@dataclass
class Beside:
    """What is kept beside a graph.

    header    the model without nodes and constants: opset, IR version, metadata, inputs, outputs and value_info as they
              were; its nodes are names with documentation and metadata
    tensors   constants by name
    rest      operator name -> what is kept of it
    """

    header: onnx.ModelProto
    tensors: dict[str, TensorProto] = field(default_factory=dict)
    rest: dict[str, _Rest] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Array]:
        """Input -> the value that it has where a caller leaves it out."""
        inputs = {v.name for v in self.header.graph.input}
        return {name: numpy_helper.to_array(t) for name, t in self.tensors.items() if name in inputs}

    def has_body(self, name: str) -> bool:
        """True if an operator has control-flow bodies."""
        graphs = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
        return name in self.rest and any(a.type in graphs for a in self.rest[name].attributes)

    def restore(self, model: onnx.ModelProto) -> None:
        """Put everything back into a model that graphsurgeon wrote."""
        header = self.header
        for key, value in header.ListFields():
            if key.name in ("opset_import", "metadata_props"):
                model.ClearField(key.name)
                getattr(model, key.name).extend(value)
            elif key.name != "graph":
                setattr(model, key.name, value)
        known = {o.domain for o in model.opset_import}
        model.opset_import.extend(  # a pass may have added an operator of another domain
            onnx.helper.make_opsetid(domain, 1) for domain in {n.domain for n in model.graph.node} - known
        )
        model.graph.name, model.graph.doc_string = header.graph.name, header.graph.doc_string
        for part in ("input", "output", "metadata_props"):
            model.graph.ClearField(part)
            getattr(model.graph, part).extend(getattr(header.graph, part))
        described = {n.name: n for n in header.graph.node}
        for node in model.graph.node:
            if node.name in self.rest:
                self._restore_node(node, self.rest[node.name])
            if node.name in described:
                node.doc_string = described[node.name].doc_string
                node.metadata_props.extend(described[node.name].metadata_props)
        used = {name for n in model.graph.node for name in (*n.input, *outer_reads(n))}
        used |= {v.name for v in (*model.graph.input, *model.graph.output)}
        model.graph.initializer.extend(t for name, t in self.tensors.items() if name in used)

    def _restore_node(self, node: onnx.NodeProto, rest: _Rest) -> None:
        now = list(node.input)[rest.inputs :]
        del node.input[rest.inputs :]
        node.attribute.extend(rest.attributes)
        rename_outer_reads(node, dict(zip(rest.captured, now, strict=True)))


def split(proto: onnx.ModelProto, header: onnx.ModelProto) -> tuple[gs.Graph, Beside]:
    """A model as graphsurgeon's graph and what is kept beside that. The model is used up."""
    beside = Beside(header)
    for node in proto.graph.node:
        kept = [a for a in node.attribute if not _simple(a)]
        captured = outer_reads(node)
        if kept:
            beside.rest[node.name] = _Rest(tuple(_copied(a) for a in kept), len(node.input), tuple(captured))
            rest = [a for a in node.attribute if _simple(a)]
            del node.attribute[:]
            node.attribute.extend(rest)
            node.input.extend(captured)
    inputs = {v.name for v in proto.graph.input}
    odd = [t for t in proto.graph.initializer if t.data_type not in _ARRAYS or t.name in inputs]
    if odd:
        beside.tensors = {t.name: _copied(t) for t in odd}
        plain = [t for t in proto.graph.initializer if t.name not in beside.tensors]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(plain)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.WhichOneof("value") not in (None, "tensor_type"):
            value.ClearField("type")
    graph = gs.import_onnx(proto)
    # a part of a protobuf message keeps the whole message in memory, weights included
    graph.import_domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in proto.opset_import]
    return graph, beside


def _simple(attribute: AttributeProto) -> bool:
    """True if graphsurgeon reads and writes an attribute without loss."""
    if attribute.type not in _SIMPLE or attribute.ref_attr_name:
        return False
    try:
        _ = [text.decode() for text in (attribute.s, *attribute.strings)]
    except UnicodeDecodeError:
        return False
    if attribute.type in (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS):
        return bool(len(attribute.floats) + len(attribute.ints) + len(attribute.strings))
    return attribute.type != AttributeProto.TENSOR or attribute.t.data_type in _ARRAYS


def header_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without nodes and constants, see `Beside`."""
    header = onnx.ModelProto()
    for key, value in proto.ListFields():
        if key.name in ("opset_import", "metadata_props"):
            getattr(header, key.name).extend(value)
        elif key.name not in ("graph", "functions"):
            setattr(header, key.name, value)
    graph = proto.graph
    header.graph.name, header.graph.doc_string = graph.name, graph.doc_string
    for part in ("input", "output", "value_info", "metadata_props"):
        getattr(header.graph, part).extend(getattr(graph, part))
    header.graph.node.extend(
        onnx.NodeProto(name=n.name, doc_string=n.doc_string, metadata_props=n.metadata_props)
        for n in graph.node
        if n.doc_string or n.metadata_props
    )
    return header


def _copied(message: Any) -> Any:
    """A copy of a protobuf message, independent of the one it is a part of."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
