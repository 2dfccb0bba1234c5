"""A graph as bytes and back, exactly: nothing is brought into canonical form again, which would undo what passes made."""

from __future__ import annotations

from typing import Any

import onnx

from onnxq_plugins import files
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.beside import split
from onnxq_plugins.graph.core import Graph


def stored(graph: Graph) -> tuple[bytes, bytes, dict[str, Any]]:
    """A graph as the bytes of a model, those of its header (what it says about inputs, outputs and itself), and plain
    values. Raises OnnxqError for graphs beyond the 2 GB of a protobuf message."""
    model = graph.model(expand=False)
    if files.size_of(model) > files.LARGEST_MESSAGE:
        raise OnnxqError(
            "a plan file holds networks of up to 2 GB, and this one is larger; quantize it for one target at once."
        )
    values = {
        "versions": list(graph.versions),
        "imported": sorted(graph.imported),
        "floats": sorted(graph.floats),
        "output_opset": graph.output_opset,
    }
    return model.SerializeToString(), graph._beside.header.SerializeToString(), values


def restored(model: bytes, header: bytes, values: dict[str, Any]) -> Graph:
    """The inverse of `stored`. Raises what protobuf and graphsurgeon raise for anything else."""
    protos = onnx.ModelProto.FromString(model), onnx.ModelProto.FromString(header)
    opset, ir = values["versions"]
    graph = Graph(*split(*protos), versions=(int(opset), int(ir)), imported=values["imported"])
    graph.load_constants()
    graph.floats, graph.output_opset = frozenset(values["floats"]), int(values["output_opset"])
    return graph
