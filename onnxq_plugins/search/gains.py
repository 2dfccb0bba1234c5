"""How much the noise of an activation matters: predicted from weights and second moments, nothing is exported or run.

Noise of variance v_c on the channels of x is noise of variance sum_c W_oc^2 v_c on the outputs of a layer that reads it. Each
layer counts by that noise relative to its signal. Through additions, activations and whatever keeps channels apart the
outputs' own readers decide which of these channels matter, so that the result does not depend on how channels are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxq_plugins.calibration import Moments, channel_axis, channels
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.flow import activation_inputs
from onnxq_plugins.spec import Array

_ENDS = {"MatMul", "Softmax", "LayerNormalization", "LSTM", "GRU", "RNN"}  # noise is mixed, or measured, in other terms


class Gains:
    """Relative noise at the layers that read an activation, per unit of noise variance on it.

    tensors   activation -> [channels] along its `channel_axis`
    rows      layer -> weight of a unit of noise variance on each of its outputs [outputs]

    Layers count as uncorrelated inputs, and a ReLU passes all noise. Cost: every weight is squared once.
    """

    def __init__(self, graph: Graph, moments: Mapping[str, Moments]) -> None:
        self.graph = graph
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
            return self._end(layer.input)
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
        self._add(x, each if own else np.full(1, each.mean()))
        return None

    def _node(self, node: Any) -> None:
        graph, names = self.graph, activation_inputs(self.graph, node)
        if node.op in _ENDS or graph.has_body(node) or not node.outputs:
            for name in names:
                self._end(name)
            return
        outputs = [t.name for t in node.outputs if not t.is_empty()]
        gains = [self.tensors.get(n) for n in outputs]
        if node.op == "Concat" and len(known := gains[0] if gains[0] is not None else ()) == sum(channels(graph, n) or 0 for n in names):
            for name, part in zip(names, np.split(known, np.cumsum([channels(graph, n) for n in names])[:-1]), strict=True):
                self._add(name, part)
            return
        if node.op == "Split" and all(g is not None for g in gains) and len(names) == 1:
            return self._add(names[0], np.concatenate(gains))  # type: ignore[arg-type]
        for name in names:
            for gain in gains:
                if gain is not None:
                    others = [self._size(t.name, len(gain)) for t in node.inputs if t.name != name] if node.op == "Mul" else []
                    self._add(name, gain * np.prod(others, axis=0) if others else gain)
        return None

    def _size(self, name: str, count: int) -> Array | float:
        """Mean square of a factor, per channel where it is known."""
        if self.graph.is_constant(name):
            values = np.square(self.graph.constant(name).astype(np.float64))
            return values.reshape(-1) if values.size == count else float(values.mean())
        power = self.power.get(name)
        return 1.0 if power is None else power if len(power) == count else float(power.mean())

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
