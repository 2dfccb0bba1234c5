"""Axes of tensors that shape inference does not know, from a run of the float model.

onnx infers nothing behind operators of other domains, sequences or branches of unlike rank; a run shows how many axes a
tensor has. Sizes are taken from the layers that read it, since those of one sample may be its own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.reductions import beside_makers
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, Layer
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


def spatial_sizes(graph: Graph, layers: Sequence[Layer], feed: Mapping[str, Array] | None) -> dict[str, tuple[int, ...]]:
    """Conv layers by name -> the sizes of their inputs along the spatial axes, from the shapes that are known, else from a
    run on one sample; a layer whose sizes stay unknown is left out."""
    sizes: dict[str, tuple[int, ...]] = {}
    unknown = []
    for layer in layers:
        if layer.op == "Conv":
            shape = (graph.shape(layer.input) or ())[2:]
            if shape and all(isinstance(n, int) for n in shape):
                sizes[layer.name] = tuple(int(n) for n in shape if isinstance(n, int))
            else:
                unknown.append(layer)
    if unknown and feed is not None:
        shapes = shapes_of(graph, feed, [layer.input for layer in unknown])
        sizes |= {layer.name: shapes[layer.input][2:] for layer in unknown}
    return sizes


def shapes_of(graph: Graph, feed: Mapping[str, Array], names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of some tensors, of all by default, in a run of the float model on one sample. What the last runs told is
    remembered as long as operators, small constants and sample stay the same."""
    sample = sorted((name, x.shape, x.dtype.str, _checksum(x)) for name, x in feed.items())
    state = f"{graph.structure()} {sample}"
    if graph.run_shapes[0] != state:
        graph.run_shapes = state, {name: tuple(np.shape(x)) for name, x in feed.items()}
    known = graph.run_shapes[1]
    whole = [t.name for node in graph.nodes for t in node.outputs if not t.is_empty() and t.dtype is not None]
    names = [*feed, *whole] if names is None else list(names)
    if missing := [name for name in dict.fromkeys(names) if name not in known]:
        tensors = [name for name in dict.fromkeys([*whole, *missing]) if name not in known]  # all at once
        weights: dict[str, Array] = {}
        model = graph.model(weights)
        own = len(model.graph.node)
        del model.graph.output[:]
        for name in tensors:
            model.graph.node.append(helper.make_node("Shape", [name], [f"{name}|shape"], f"{name}|shape"))
            model.graph.output.append(helper.make_tensor_value_info(f"{name}|shape", onnx.TensorProto.INT64, None))
        beside_makers(model.graph, own)
        values = runtimes.session(model, weights=weights, lean=True, ordered=True).run(None, dict(feed))
        known |= {name: tuple(int(n) for n in value) for name, value in zip(tensors, values, strict=True)}
    return {name: known[name] for name in names}


def _checksum(x: Array) -> int:
    """Of values, as shapes may depend on them."""
    return zlib.crc32(repr(x.tolist()).encode() if x.dtype == object else np.ascontiguousarray(x).tobytes())


def multiply_adds(graph: Graph, layers: Sequence[Layer], feed: Mapping[str, Array]) -> float:
    """Multiply-adds of some layers for one sample: outputs times weights per output (ConvTranspose: inputs times weights per
    input). Sizes come from the shapes that are known, open batches counted as 1, else from a run on the sample."""
    tensors = {y.name: y.input if y.op == "ConvTranspose" else y.output for y in layers}
    shapes = {name: graph.shape(tensor) for name, tensor in tensors.items()}
    inner = {n: [k for k in shape[1:] if isinstance(k, int)] for n, shape in shapes.items() if shape}
    # of two axes the first may be rows of any number, such as tokens
    sizes = {n: int(np.prod(known)) for n, known in inner.items() if 2 <= len(known) == len(shapes[n] or ()) - 1}
    unknown = {name: tensor for name, tensor in tensors.items() if name not in sizes}
    run = shapes_of(graph, feed, unknown.values()) if unknown else {}
    sizes |= {name: math.prod(run[tensor]) for name, tensor in unknown.items()}
    each = {y.name: y.shape[0] if y.op == "ConvTranspose" else y.channels for y in layers}
    return float(sum(sizes[y.name] * np.prod(y.shape) / each[y.name] for y in layers))
