"""Axes of tensors that shape inference does not know, from a run of the float model.

onnx infers nothing behind operators of other domains, sequences or branches of unlike rank; a run shows how many axes a
tensor has. Sizes are taken from the layers that read it, since those of one sample may be its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.spec import Array


def complete_shapes(graph: Graph, feed: Mapping[str, Array]) -> None:
    """Give tensors of unknown rank a shape, in place. Where the model does not run on the feed, they stay unknown."""
    for _ in range(2):  # the second round is about what the first made computable
        unknown = [name for name in graph.unranked if name not in graph.inputs]
        if not unknown:
            return
        weights: dict[str, Array] = {}
        model = graph.model(weights)
        outputs = {o.name for o in model.graph.output}
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in unknown if name not in outputs)
        try:
            values = runtimes.session(model, weights=weights, lean=True).run(unknown, dict(feed))
        except OnnxqError:
            return
        ranks = {n: v for n, v in zip(unknown, values, strict=True) if isinstance(v, np.ndarray)}
        for name, value in ranks.items():
            graph.set_shape(name, _sizes(graph, name, value.ndim), value.dtype)
        _infer(graph)
        if len(ranks) < len(unknown):
            return


def _sizes(graph: Graph, name: str, rank: int) -> list[int | None]:
    """The shape of a tensor: the channels that layers read from it, None elsewhere."""
    sizes: list[int | None] = [None] * rank
    for layer in graph.layers:
        if layer.input == name and rank:
            inputs = layer.shape[layer.in_axis] * (layer.groups if layer.op == "Conv" else 1)
            sizes[1 if layer.op.startswith("Conv") and rank > 1 else -1] = inputs
    return sizes


def _infer(graph: Graph) -> None:
    """Infer shapes of what lies behind tensors that have one now."""
    model = graph.model({})
    shell = onnx.ModelProto()
    shell.CopyFrom(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(shell)
    except Exception:  # onnx raises several types; then the next run has to show them
        return
    for value in inferred.graph.value_info:
        kind = value.type.tensor_type
        if value.name in graph and graph.shape(value.name) is None and kind.HasField("shape"):
            shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
            graph.set_shape(value.name, shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
