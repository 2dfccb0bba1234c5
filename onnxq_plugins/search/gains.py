"""How much the noise of an activation matters: predicted from weights and second moments, nothing is exported or run.

Noise of variance v_c on the channels of x is noise of variance sum_c W_oc^2 v_c on the outputs of a layer that reads it.
Each layer counts by that noise relative to its signal. Through additions, activations and whatever keeps channels apart the
outputs' own readers decide which of these channels matter, so that the result does not depend on how channels are scaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxq_plugins.calibration import Moments, channel_axis, channels
from onnxq_plugins.graph import ChannelGroup, Graph, Layer, Member
from onnxq_plugins.graph.flow import activation_inputs
from onnxq_plugins.job import Job
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.spread import Read, Reader
from onnxq_plugins.spec import Array

_ENDS = {"MatMul", "Softmax", "LayerNormalization", "LSTM", "GRU", "RNN"}  # noise is mixed, or measured, in other terms


class Gains:
    """Relative noise at the layers that read an activation, per unit of noise variance on it.

    tensors   activation -> [channels] along its `channel_axis`
    rows      layer -> weight of a unit of noise variance on each of its outputs [outputs]

    Layers count as uncorrelated inputs, and a ReLU passes all noise. Cost: every weight is squared once.
    """

    def __init__(self, graph: Graph, moments: Mapping[str, Moments]) -> None:
        self.graph, self.moments = graph, moments
        self.power = {n: np.maximum(m.square - m.mean**2, 0.0) for n, m in moments.items()}
        self.tensors: dict[str, Array] = {}
        self.rows: dict[str, Array] = {}
        layers = {layer.name: layer for layer in graph.layers}
        for name in graph.outputs:
            self._end(name)
        for node in reversed(graph.nodes):
            if node.name in layers:
                self._layer(layers[node.name])
            else:
                self._node(node)

    def _layer(self, layer: Layer) -> None:
        if layer.op == "ConvTranspose":
            self._end(layer.input)
            return
        with self.graph.mapped.reading():
            weight = layer.matrix(self.graph.constant(layer.weight))
            squares = np.square(weight.reshape(*weight.shape[:2], -1, max(int(np.prod(layer.shape[2:])), 1))).sum(axis=3)
        x, axis = layer.input, 1 if layer.op == "Conv" else len(self.graph.shape(layer.input) or (0, 0)) - 1
        own = axis == channel_axis(self.graph, x) and layer.shape[layer.in_axis] * layer.groups == channels(self.graph, x)
        power = self.power.get(x) if own else None
        spread = np.ones((layer.groups, squares.shape[2])) if power is None else power.reshape(layer.groups, -1)
        signal = np.einsum("goi,gi->go", squares, spread).reshape(-1)
        gain = self.tensors.get(layer.output)
        gain = gain if gain is not None and gain.shape == signal.shape else np.ones(len(signal))
        total = float(gain @ signal)
        self.rows[layer.name] = gain / total if total > 0 else np.zeros(len(gain))
        each = np.einsum("goi,go->gi", squares, self.rows[layer.name].reshape(layer.groups, -1)).reshape(-1)
        self._add(x, each if own else each.mean(keepdims=True))

    def _node(self, node: Any) -> None:
        graph, names = self.graph, activation_inputs(self.graph, node)
        outputs = [t.name for t in node.outputs if not t.is_empty()]
        gains = [self.tensors[n] for n in outputs if n in self.tensors]
        if node.op in _ENDS or graph.has_body(node):
            for name in names:
                self._end(name)
        elif node.op == "Concat" and gains and sum(sizes := [channels(graph, n) or 0 for n in names]) == len(gains[0]):
            for name, part in zip(names, np.split(gains[0], np.cumsum(sizes)[:-1]), strict=True):
                self._add(name, part)
        elif node.op == "Split" and len(gains) == len(outputs):
            self._add(names[0], np.concatenate(gains))
        else:
            for name in names:
                others = [t.name for t in node.inputs if t.name != name] if node.op == "Mul" else []
                for gain in gains:
                    for other in others:
                        gain = gain * self._square(other, len(gain))
                    self._add(name, gain)

    def _square(self, name: str, count: int) -> Array:
        """Mean square of a factor, per channel where it is known."""
        if self.graph.is_constant(name):
            square = np.square(self.graph.constant(name).astype(np.float64)).reshape(-1)
        else:
            square = self.moments[name].square if name in self.moments else np.ones(1)
        return square if len(square) == count else square.mean(keepdims=True)

    def _end(self, name: str) -> None:
        """A reader that is not a layer: noise relative to the tensor itself."""
        power = self.power.get(name)
        if power is not None and power.sum() > 0:
            self._add(name, np.full(len(power), 1 / power.sum()))

    def _add(self, name: str, gain: Array) -> None:
        count = channels(self.graph, name)
        if count is None:
            return
        part = gain if len(gain) == count else np.full(count, gain.mean())
        known = self.tensors.get(name)
        self.tensors[name] = part if known is None else known + part


class Taken:
    """The factors that groups got so far. A Concat joins channels of several groups, and some of none, on one grid, and a
    layer reads them with one weight, so that each group's factors depend on those of the others."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Array] = {}

    def add(self, graph: Graph, group: ChannelGroup, factors: Array) -> None:
        """Remember the factors of a group."""
        for m in group.members:
            if m.role != "fixed" and m.rows is None:
                count = graph.constant(m.tensor).shape[m.axis] if m.constant else channels(graph, m.tensor)
                if count:
                    self._known.setdefault((m.tensor, m.role), np.ones(count))[m.index] = factors[:, None]

    def of(self, member: Member, count: int) -> Array:
        """The factors along a member's axis [count], 1 where no group had one."""
        return self._known.get((member.tensor, member.role), np.ones(count))


def seen_by(job: Job, groups: Sequence[ChannelGroup], taken: Taken) -> Iterator[tuple[list[Read], list[Reader]]]:
    """The planned activations of each group, and the planned weights that read it, as `solvers.spread` takes them; no
    activation where statistics of one belong to another axis. One run over the data, the one that `ranges` needs.

    taken   the factors of groups before, which the caller adds
    """
    graph, planned, calibration = job.graph, Planned.of(job), job.calibration
    calibration.ranges([n for n in planned.activations if not job.plan[n].solved])
    names = [n for n in planned.activations if channels(graph, n)]
    ranges, counts = calibration.channel_ranges(names), calibration.positions(names)
    inputs = [y.input for y in planned.layers if channels(graph, y.input)]  # others may be infinite
    moments = calibration.moments(list(dict.fromkeys([*names, *inputs])))
    gains, layers = Gains(graph, moments), {y.weight: y for y in planned.layers if planned.input(y)}
    for group in groups:
        here = [m for m in group.members if m.tensor in ranges]
        if not here or any(m.axis != channel_axis(graph, m.tensor) for m in here):
            yield [], []
            continue
        reads = []
        for m in here:
            low, high = ranges[m.tensor]
            gain = gains.tensors.get(m.tensor, np.zeros(len(low)))
            levels = 2 ** job.plan[m.tensor].bits - 1
            others = np.setdiff1d(np.arange(len(low)), m.index)
            own = low[m.index].min(axis=1), high[m.index].max(axis=1), gain[m.index].sum(axis=1)
            read = Read(*own, levels, counts[m.tensor])
            if len(others):
                f = taken.of(m, len(low))[others]
                ends = float((low[others] * f).min()), float((high[others] * f).max())
                read = replace(read, beside=(min(ends[0], 0.0), max(ends[1], 0.0), float((gain[others] / f**2).sum())))
            reads.append(read)
        readers = [
            _reader(job, layers[m.tensor], m, moments[layers[m.tensor].input], gains.rows[layers[m.tensor].name], taken)
            for m in group.weights
            if m.role == "input"
            and m.tensor in layers
            and layers[m.tensor].kind != "depthwise"  # the scales of its rows follow the factors
            and layers[m.tensor].input in moments
            and layers[m.tensor].name in gains.rows
        ]
        yield reads, readers


def _reader(job: Job, layer: Layer, member: Member, moments: Moments, gain: Array, taken: Taken) -> Reader:
    """A weight that reads a group, or the rows of a grouped convolution that do."""
    spec, power = job.plan[layer.weight], moments.square
    if job.recipe.provides("bias"):
        power = moments.square - moments.mean**2
    with job.graph.mapped.reading():
        weight = job.graph.constant(layer.weight)
        weight = weight[slice(*member.rows)] if member.rows else np.moveaxis(weight, layer.out_axis, 0)
        peak = np.abs(weight.reshape(*weight.shape[:2], -1)).max(axis=2)
    first = 0
    if member.rows:
        gain = gain[slice(*member.rows)]
        first = member.rows[0] // (layer.shape[0] // layer.groups) * layer.shape[1]
    power = int(np.prod(layer.shape[2:])) * np.maximum(power, 0.0)
    others, beside = np.setdiff1d(np.arange(peak.shape[1]), member.index), None
    if len(others) and not member.rows:
        f = taken.of(member, peak.shape[1])[others]
        beside = (peak[:, others] / f).max(axis=1), float(power[others] @ f**2)
    own = peak[:, member.index].max(axis=2), power[member.index + first].sum(axis=1)
    return Reader(*own, gain, spec.grid[1], spec.block is None, beside)
