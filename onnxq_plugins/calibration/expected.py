"""A Calibration that reads what it can from the statistics in the model, and the rest from samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxq_plugins.calibration.propagation import Distribution, Distributions, propagate
from onnxq_plugins.calibration.statistics import Calibration
from onnxq_plugins.calibration.values import Moments
from onnxq_plugins.data import Data
from onnxq_plugins.graph import Graph, channels
from onnxq_plugins.spec import Array


class Expected(Calibration):
    """Ranges, means and moments of the float graph as its BatchNorm statistics imply them (`propagation.propagate`), always
    of its present state. Histograms and Gram matrices, and tensors that the statistics do not reach, come from the samples.

    inputs       distributions of the model's inputs
    deviations   half the width of a range
    """

    def __init__(
        self, graph: Graph, data: Data, inputs: Mapping[str, Distribution], deviations: float, **settings: Any
    ) -> None:
        super().__init__(graph, data, **settings)
        self.inputs, self.deviations = dict(inputs), deviations
        self._latest: tuple[str, Distributions] = ("", {})  # digest of the graph, its distributions

    def ranges(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """(lowest, highest) value of each tensor."""
        expected = self._expected()
        rest = super().ranges([n for n in names if n not in expected])
        return {
            n: (float(expected[n].low.min()), float(expected[n].high.max())) if n in expected else rest[n] for n in names
        }

    def channel_ranges(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        """(lowest [C], highest [C]) value per channel of each tensor."""
        expected = self._per_channel(names)
        rest = super().channel_ranges([n for n in names if n not in expected])
        return {n: (expected[n].low, expected[n].high) if n in expected else rest[n] for n in names}

    def means(self, names: Sequence[str]) -> dict[str, Array]:
        """Mean per channel [C] of each tensor."""
        expected = self._per_channel(names)
        rest = super().means([n for n in names if n not in expected])
        return {n: expected[n].mean if n in expected else rest[n] for n in names}

    def moments(self, names: Sequence[str]) -> dict[str, Moments]:
        """Mean and mean square per channel of each tensor."""
        expected = self._per_channel(names)
        rest = super().moments([n for n in names if n not in expected])
        return {
            n: Moments(expected[n].mean, expected[n].variance + expected[n].mean ** 2) if n in expected else rest[n]
            for n in names
        }

    def _expected(self) -> Distributions:
        digest = self.graph.digest()
        if self._latest[0] != digest:
            self._latest = digest, propagate(self.graph, self.inputs, self.deviations)
        return self._latest[1]

    def _per_channel(self, names: Sequence[str]) -> Distributions:
        """The expected distributions that tell channels apart."""
        expected = self._expected()
        return {n: expected[n] for n in names if n in expected and len(expected[n].mean) == channels(self.graph, n)}
