"""Where the channels of an activation are, and how many."""

from __future__ import annotations

from onnxq_plugins.graph.core import Graph


def channel_axis(graph: Graph, name: str) -> int:
    """The axis of an activation that holds its channels: 1 for images, the last one for matrices and tokens."""
    shape, maker = graph.shape(name) or (), graph.producer(name)
    while maker is not None and maker.op in ("Relu", "Clip", "LeakyRelu", "PRelu", "BatchNormalization"):
        maker = graph.producer(maker.inputs[0].name)
    around = [*graph.consumers(name), *([maker] if maker is not None else [])]
    return 1 if len(shape) >= 4 or any(n.op.startswith("Conv") for n in around) else len(shape) - 1


def channels(graph: Graph, name: str) -> int | None:
    """How many channels an activation has; None where that is not known, or it is a vector."""
    shape = graph.shape(name) or ()
    size = shape[channel_axis(graph, name)] if len(shape) > 1 else None
    return size if isinstance(size, int) else None
