"""absorb-bias: move what a channel never falls below into the bias of the next layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.graph import Graph, Layer, add_bias, clip_maximum
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """High-bias absorption: a channel that stays above c > 0 in front of its ReLU is lowered by c there, and the layers that
    read it get W c on their biases. Its range shrinks by c, and so may the range of the whole activation: large biases are
    what equalization leaves behind.

        relu(x) = relu(x - c) + c   while x >= c;   b1 -= c,   b2 += sum_k W2 c

    c is the channel's lowest value over the calibration data (less `margin`), or its mean less so many deviations where the
    statistics of `data-free` answer. The function changes for samples that fall below, hence `exact` is False.

    margin   how far a channel may fall below its calibrated range, in parts of that range

    Only layers whose readers are convolutions without padding, or Gemm, take part: a padded border would have to be c.
    Behind a Clip only channels take part that stay below its maximum.

    Source: Data-Free Quantization (arXiv 1906.04721), section 4.1.3, with c = max(0, beta - 3 gamma).
    Cost: one run over the data.
    """

    name: ClassVar[str] = "absorb-bias"
    exact: ClassVar[bool] = False
    stage: ClassVar[Stage] = "rewrite"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin = {self.margin} must not be negative")

    def apply(self, job: Job) -> dict[str, Any]:
        graph = job.graph
        if not job.calibration.ready:
            job.note("absorb-bias was left out: without --data nothing tells how low a channel gets")
            return {"layers": {}}
        pairs = {y.name: readers for y in graph.layers if (readers := _readers(graph, y))}
        ranges = job.calibration.channel_ranges([graph.layer(name).output for name in pairs])
        told = {}
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
                told[name] = {"channels": int((absorbed > 0).sum()), "largest": round(float(absorbed.max()), 4)}
        return {"layers": told}


def _readers(graph: Graph, layer: Layer) -> list[Layer]:
    """The layers that read a layer's ReLU, if that is all of its readers and each can absorb a constant; else none."""
    if layer.bias is None or graph.constant(layer.bias).shape != (layer.channels,) or layer.result == layer.output:
        return []
    if layer.result in graph.outputs:
        return []
    by_name = {y.name: y for y in graph.layers}
    readers = [by_name.get(node.name) for node in graph.consumers(layer.result)]
    found = [
        y
        for y in readers
        if y is not None
        and y.op in ("Conv", "Gemm")
        and y.input == layer.result
        and _unpadded(y)
        and y.shape[y.in_axis] * y.groups == layer.channels
    ]
    return found if len(found) == len(readers) else []


def _unpadded(layer: Layer) -> bool:
    return not any(layer.attrs.get("pads") or ()) and layer.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _absorb(graph: Graph, layer: Layer, readers: list[Layer], absorbed: Array) -> None:
    """Take [channels] off a layer's bias and put it on those of its readers."""
    add_bias(graph, layer.name, -absorbed)
    if layer.output in graph.batchnorms:
        norm = graph.batchnorms[layer.output]
        graph.batchnorms[layer.output] = replace(norm, beta=norm.beta - absorbed)
    for reader in readers:
        weight = reader.matrix(graph.constant(reader.weight)).astype(np.float64)
        sums = weight.reshape(*weight.shape[:2], reader.shape[reader.in_axis], -1).sum(axis=3)
        add_bias(graph, reader.name, np.einsum("goi,gi->go", sums, absorbed.reshape(reader.groups, -1)).reshape(-1))
    graph.touched.update([layer.output, layer.result, *(reader.weight for reader in readers)])  # shifts hold input means
