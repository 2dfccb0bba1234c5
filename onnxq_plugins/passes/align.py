"""align: more channels where integer kernels run faster with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import ChannelGroup, Layer
from onnxq_plugins.graph.align import align, alignable
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.runtimes.costs import BLOCK, Costs, Kernel, check_table
from onnxq_plugins.search.placement import Shapes, costs_of


@dataclass(frozen=True)
class Align(Pass):
    """More channels where integer kernels run faster with them.

    Integer kernels of depthwise convolutions take two to five times as long where their channels are no multiple of 16. Such
    channels are filled up with others that are zero: outputs of the layers before, inputs of those behind, and everything
    between (a squeeze-and-excite block, too), where nothing mixes them. The function stays.

    gain    share of the time of the layers that have to be changed which must be saved
    table   of costs, as in `placement`

        aligned if  sum_i min(int_i, float_i) (aligned)  <  (1 - max(gain, share of weights added)) sum_i min(int_i, float_i)

    int_i and float_i are what layer i of the group takes as an integer and as a float, which is about the same for any
    channels of a block where the kernel computes blocks (multiples of 4), and much more for others.

    Source: our own; channels are padded like that by compilers for accelerators.
    Cost: one run of the float model, where there are such layers. At run time a few multiply-adds with zero, and the bytes
    of their weights.
    """

    name: ClassVar[str] = "align"
    stage: ClassVar[Stage] = "rewrite"
    gain: float = 0.1
    table: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain = {self.gain} must be at least 0 and less than 1")
        check_table(self.table)

    def apply(self, job: Job) -> dict[str, Any] | None:
        data, costs = job.calibration.data, costs_of(job.target, self.table)
        if data is None or costs is None:
            return None
        planned = {layer.weight for layer in Planned.of(job).layers}
        groups = [g for g in alignable(job.graph, BLOCK) if planned & {m.tensor for m in g.weights}]
        if not groups:
            return None
        try:
            shapes = shapes_of(job.graph, next(iter(data)))
        except OnnxqError:
            return None  # calibration will run on the sample, too, and tell what is wrong with it
        rows = []
        for group in groups:
            before, after = _times(job, group, shapes, costs)
            added = _added(job, group)
            if after < (1 - max(self.gain, added)) * before:
                align(job.graph, group, BLOCK)
                rows.append(
                    {"channels": group.size, "added": -group.size % BLOCK, "times": [round(before, 1), round(after, 1)]}
                )
        if rows:
            job.note(f"{len(rows)} groups of channels were filled up to multiples of {BLOCK}, for which kernels are faster")
        return {"table": costs.name, "groups": rows}


def _times(job: Job, group: ChannelGroup, shapes: Shapes, costs: Costs) -> tuple[float, float]:
    """Microseconds of the layers of a group as they are, and with its last block of channels filled."""
    axes: dict[str, list[int]] = {}
    for member in group.weights:
        axes.setdefault(member.tensor, []).append(member.axis)
    times = [0.0, 0.0]
    for layer in job.graph.layers:
        if layer.weight in axes and layer.input in shapes and layer.output in shapes:
            for which, more in enumerate((0, -group.size % BLOCK)):
                kernel = _kernel(layer, axes[layer.weight], more, shapes)
                times[which] += min(costs.of(kernel, True), costs.of(kernel))
    return times[0], times[1]


def _kernel(layer: Layer, axes: list[int], more: int, shapes: Mapping[str, tuple[int, ...]]) -> Kernel:
    """A convolution with more channels along some axes of its weight."""
    depthwise = layer.groups > 1
    weight = tuple(n + more * (axis in axes) for axis, n in enumerate(layer.shape))
    inputs, output = list(shapes[layer.input]), list(shapes[layer.output])
    inputs[1] += more * (layer.in_axis in axes or depthwise)
    output[1] += more * (layer.out_axis in axes)
    return Kernel("Conv", (tuple(inputs),), tuple(output), weight, layer.groups + more * depthwise)


def _added(job: Job, group: ChannelGroup) -> float:
    """The share that a group's weights grow by."""
    shapes = [(job.graph.constant(m.tensor).shape, m.axis) for m in group.weights]
    more = sum(prod(shape) // shape[axis] * (-group.size % BLOCK) for shape, axis in shapes)
    return float(more / sum(prod(shape) for shape, _ in shapes))
