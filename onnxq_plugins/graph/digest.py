"""Fingerprints of graphs, without a copy of a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs


def update(digest: Any, value: Any) -> None:
    """Feed a graph, tensor, array or plain value to a hash."""
    if isinstance(value, gs.Graph):
        for part in (value.opset, value.inputs, value.outputs, value.nodes):
            update(digest, part)
    elif isinstance(value, gs.Node):
        for part in (value.op, value.name, value.domain, sorted(value.attrs.items()), value.inputs, value.outputs):
            update(digest, part)
    elif isinstance(value, gs.Constant):
        update(digest, value.name)
        update(digest, value.values)
    elif isinstance(value, gs.Variable):
        digest.update(f"{value.name} {value.dtype} {value.shape};".encode())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(
            np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            if value.size and value.dtype != object
            else repr(value.tolist()).encode()
        )
    elif isinstance(value, (list, tuple)):
        for item in value:
            update(digest, item)
    else:
        digest.update(f"{value!r};".encode())
