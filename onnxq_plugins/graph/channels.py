"""Where the channels of an activation are, and how many."""

from __future__ import annotations

from onnxq_plugins.graph.core import Graph


def channel_axis(graph: Graph, name: str) -> int:
    """The axis of an activation's channels: 1 for images, the last one for matrices and tokens."""
    shape, producer = graph.shape(name) or (), graph.producer(name)
    while producer is not None and producer.op in ("Relu", "Clip", "LeakyRelu", "PRelu", "BatchNormalization"):
        producer = graph.producer(producer.inputs[0].name)
    neighbours = [*graph.consumers(name), *([producer] if producer is not None else [])]
    return 1 if len(shape) >= 4 or any(n.op.startswith("Conv") for n in neighbours) else len(shape) - 1


def channels(graph: Graph, name: str) -> int | None:
    """Number of channels of an activation; None if unknown, or if it is a vector."""
    shape = graph.shape(name) or ()
    size = shape[channel_axis(graph, name)] if len(shape) > 1 else None
    return size if isinstance(size, int) else None
