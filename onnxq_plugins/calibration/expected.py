"""A Calibration that answers from a model's statistics what these tell, and from samples the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxq_plugins.calibration import statistics
from onnxq_plugins.calibration.propagation import Found, Moments, expected
from onnxq_plugins.calibration.statistics import Calibration
from onnxq_plugins.data import Data
from onnxq_plugins.graph import Graph
from onnxq_plugins.spec import Array


class Expected(Calibration):
    """Ranges, means and moments of the float graph as its BatchNorm statistics imply them (`moments.expected`), always of
    its present state. Histograms and Gram matrices, and tensors that statistics do not reach, come from the samples.

    inputs       moments of the model's inputs
    deviations   how many a range reaches beyond a mean
    """

    def __init__(self, graph: Graph, data: Data, inputs: Mapping[str, Moments], deviations: float, **settings: Any) -> None:
        super().__init__(graph, data, **settings)
        self.inputs, self.deviations = dict(inputs), deviations
        self._told: tuple[str, Found] = ("", {})

    def ranges(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """(lowest, highest) value of each tensor."""
        told = self._expected()
        rest = super().ranges([n for n in names if n not in told])
        return {n: (float(told[n].low.min()), float(told[n].high.max())) if n in told else rest[n] for n in names}

    def channel_ranges(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        """(lowest [C], highest [C]) value per channel of each tensor."""
        told = self._per_channel(names)
        rest = super().channel_ranges([n for n in names if n not in told])
        return {n: (told[n].low, told[n].high) if n in told else rest[n] for n in names}

    def means(self, names: Sequence[str]) -> dict[str, Array]:
        """Mean per channel [C] of each tensor."""
        told = self._per_channel(names)
        rest = super().means([n for n in names if n not in told])
        return {n: told[n].mean if n in told else rest[n] for n in names}

    def moments(self, names: Sequence[str]) -> dict[str, statistics.Moments]:
        """Mean and mean square per channel of each tensor."""
        told = self._per_channel(names)
        rest = super().moments([n for n in names if n not in told])
        return {
            n: statistics.Moments(told[n].mean, told[n].variance + told[n].mean ** 2) if n in told else rest[n]
            for n in names
        }

    def _expected(self) -> Found:
        digest = self.graph.digest()
        if self._told[0] != digest:
            self._told = digest, expected(self.graph, self.inputs, self.deviations)
        return self._told[1]

    def _per_channel(self, names: Sequence[str]) -> Found:
        """What is told of tensors channel by channel."""
        told = self._expected()
        return {n: told[n] for n in names if n in told and len(told[n].mean) == statistics.channels(self.graph, n)}
