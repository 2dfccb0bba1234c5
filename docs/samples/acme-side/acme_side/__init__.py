"""acme-side: a pass that adds operators: a float side path for channels that widen a grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnxq_plugins import Cause, Job, Layer, Pass, Remedy, hookimpl
from onnxq_plugins.job import Stage


@dataclass(frozen=True)
class SidePath(Pass):
    """Compute in float what a few input channels of a MatMul or Gemm have beyond the others:

        W x = W clip(x, low, high) + W[over] (x[over] - clip(x[over], low, high))

    The integer kernel reads x within the range of the other channels; what the few have beyond
    it, which mostly is 0, goes through a Gather, a Clip, a Sub and a small MatMul in float. The sum
    is exactly W x.

    channels   of an input at most
    factor     a channel is split off if it reaches so many times as far as the median channel
    """

    name: ClassVar[str] = "acme.side-path"
    stage: ClassVar[Stage] = "rewrite"
    channels: int = 8
    factor: float = 4.0

    def apply(self, job: Job) -> dict[str, Any]:
        by_input: dict[str, list[Layer]] = {}
        for layer in job.graph.layers:
            # one that is planned, reads codes, and has the channels of its input on the last axis
            if layer.op in ("MatMul", "Gemm") and job.input_of(layer) == layer.input:
                by_input.setdefault(layer.input, []).append(layer)
        inputs = list(by_input)
        if not inputs or not job.calibration.ready:
            return {"layers": {}}
        ranges = job.calibration.channel_ranges(inputs)
        rows: dict[str, int] = {}
        for name in inputs:
            low, high = (
                np.atleast_1d(end) for end in ranges[name]
            )  # of an unknown axis: one for all
            reach = np.maximum(np.abs(low), np.abs(high))
            order = np.argsort(-reach)[: self.channels]
            over = np.sort(order[reach[order] > self.factor * np.median(reach)])
            if not len(over) or len(over) == len(reach) or reach.size < 2 * self.channels:
                continue
            rest = np.delete(np.arange(len(reach)), over)
            ends = float(min(low[rest].min(), 0)), float(max(high[rest].max(), 0))
            self._split(job, name, by_input[name], over, ends)
            rows |= {layer.name: len(over) for layer in by_input[name]}
        return {"layers": rows}

    def _split(
        self, job: Job, name: str, layers: list[Layer], over: Any, ends: tuple[float, float]
    ) -> None:
        """Add the operators. The engine sorts and checks them, and plans what layers read."""
        graph = job.graph
        low, high = (
            graph.add_constant(f"{name}_{i}", np.float32(end)) for i, end in enumerate(ends)
        )
        at = graph.add_constant(f"{name}_over", over.astype(np.int64))
        few = graph.add_node("Gather", "", [name, at], axis=-1)
        inside = graph.add_node("Clip", "", [few.outputs[0], low, high])
        beyond = graph.add_node("Sub", "", [few.outputs[0], inside.outputs[0]])
        clipped = graph.add_node("Clip", "", [name, low, high])
        for layer in layers:
            output = graph.tensor(layer.output)
            node = graph.producer(layer.output)
            own = graph.add_variable(f"{layer.output}_main", like=output)
            weight = np.take(graph.constant(layer.weight), over, axis=layer.in_axis)
            if layer.in_axis:  # the side path is a MatMul [inputs, outputs]
                weight = np.ascontiguousarray(weight.T)
            side = graph.add_node(
                "MatMul",
                f"{layer.name}_side",
                [beyond.outputs[0], graph.add_constant(f"{layer.weight}_side", weight)],
            )
            graph.set_input(node, 0, clipped.outputs[0])
            node.outputs[0] = own
            graph.add_node("Add", "", [own, side.outputs[0]], [output])
            job.keep_float(side.name, f"the side path of '{layer.name}'")


@hookimpl
def onnxq_passes() -> list[type[Pass]]:
    return [SidePath]


@hookimpl
def onnxq_recipes() -> dict[str, Path]:
    return {"acme.side": Path(__file__).with_name("side.toml")}


@hookimpl
def onnxq_remedies(cause: Cause, layer: Layer | None) -> list[Remedy]:
    """`onnxq diagnose --try` and `onnxq auto` try it where a few channels hold the range."""
    if cause.kind == "outlier-channels" and layer is not None and layer.op in ("MatMul", "Gemm"):
        return [Remedy("outlier channels in a float side path", passes=(SidePath(),))]
    return []
