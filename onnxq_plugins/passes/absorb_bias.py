"""absorb-bias: move what a channel never falls below into later biases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.graph import Graph, Layer, add_bias, clip_maximum
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Move what a channel never falls below into later biases.

    High-bias absorption: a channel that stays above c > 0 in front of its ReLU is lowered by c there, and W c is added to
    the biases of the layers that read it. Its range shrinks by c, and that of the whole activation may shrink too:
    equalization leaves large biases behind.

        relu(x) = relu(x - c) + c   while x >= c;   b1 -= c,   b2 += sum_k W2 c

    c is the channel's lowest value over the calibration data (less `margin`) or, with the statistics of `data-free`, its
    mean minus a number of deviations. The function changes for samples that fall below c, hence `exact` is False.

    margin   how far a channel may fall below its calibrated range, as a fraction of that range: samples that fall further
             lose what is below

    Only layers whose readers are all convolutions without padding, or Gemm, take part: a padded border would have to be c.
    In front of a Clip only channels that stay below its maximum take part.

    Source: Data-Free Quantization (arXiv 1906.04721), section 4.1.3, with c = max(0, beta - 3 gamma).
    Cost: one run over the data.
    """

    name: ClassVar[str] = "absorb-bias"
    exact: ClassVar[bool] = False
    stage: ClassVar[Stage] = "rewrite"
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin = {self.margin} must not be negative")

    def apply(self, job: Job) -> dict[str, Any]:
        graph = job.graph
        if not job.calibration.ready:
            job.note("absorb-bias was skipped: without --data it is not known how low a channel gets")
            return {"layers": {}}
        pairs = {layer.name: readers for layer in graph.layers if (readers := _readers(graph, layer))}
        ranges = job.calibration.channel_ranges([graph.layer(name).output for name in pairs])
        moved = {}
        for name, readers in pairs.items():
            layer = graph.layer(name)
            low, high = ranges[layer.output]
            reach = self.margin * (high - low)
            absorbed = np.maximum(low - reach, 0.0)
            after = graph.elided_activation(layer.output)
            top = clip_maximum(after) if after is not None else None
            if top is not None:
                absorbed = np.where(high + reach < top, absorbed, 0.0)
            if absorbed.any():
                _absorb(graph, layer, readers, absorbed)
                moved[name] = {"channels": int((absorbed > 0).sum()), "largest": round(float(absorbed.max()), 4)}
        return {"layers": moved}


def _readers(graph: Graph, layer: Layer) -> list[Layer]:
    """The layers that read a layer's ReLU, if it has no other readers and each can absorb a constant; else none."""
    if layer.bias is None or graph.constant(layer.bias).shape != (layer.channels,) or layer.result == layer.output:
        return []
    if layer.result in graph.outputs:
        return []
    by_name = {reader.name: reader for reader in graph.layers}
    nodes = graph.consumers(layer.result)
    readers = [
        reader
        for node in nodes
        if (reader := by_name.get(node.name)) is not None
        and reader.op in ("Conv", "Gemm")
        and reader.input == layer.result
        and _unpadded(reader)
        and reader.shape[reader.in_axis] * reader.groups == layer.channels
    ]
    return readers if len(readers) == len(nodes) else []


def _unpadded(layer: Layer) -> bool:
    return not any(layer.attrs.get("pads") or ()) and layer.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _absorb(graph: Graph, layer: Layer, readers: list[Layer], absorbed: Array) -> None:
    """Subtract [channels] from a layer's bias, and add what they contribute to the biases of its readers."""
    add_bias(graph, layer.name, -absorbed)
    if layer.output in graph.batchnorms:
        norm = graph.batchnorms[layer.output]
        graph.batchnorms[layer.output] = replace(norm, beta=norm.beta - absorbed)
    for reader in readers:
        weight = reader.matrix(graph.constant(reader.weight)).astype(np.float64)
        sums = weight.reshape(*weight.shape[:2], reader.shape[reader.in_axis], -1).sum(axis=3)
        add_bias(graph, reader.name, np.einsum("goi,gi->go", sums, absorbed.reshape(reader.groups, -1)).reshape(-1))
    # shifts depend on means of inputs
    graph.touched.update([layer.output, layer.result, *(reader.weight for reader in readers)])
