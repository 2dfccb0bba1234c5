"""What quantizers of a solved plan do alone, all others in float."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from onnxq_plugins import runtimes
from onnxq_plugins.export.switched import Switched
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.parallel import map_threads
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.widths import ALONE


class Alone:
    """The network of a solved plan with some of its quantizers: one session, in float kernels, which saturate nowhere."""

    def __init__(self, planned: Planned, workers: int = 1) -> None:
        codes, graph = planned.integer | planned.carriers, planned.graph
        # what all readers read in codes in the whole network, whatever else is quantized here
        coded = planned.coded | {
            name for name in planned.activations if all(node.name in codes for node in graph.consumers(name))
        }
        self.planned, self.workers = planned, workers
        self._writer = Switched(graph, planned.plan, ALONE, coded)
        self._session = runtimes.session(self._writer.write())

    def outputs(self, sets: Sequence[Collection[str]], samples: Samples) -> Iterator[list[list[Any]]]:
        """The outputs on some samples with each of some sets of quantizers, entries of the plan."""
        yield from map_threads(lambda names: self._outputs(names, samples), sets, self.workers)

    def _outputs(self, names: Collection[str], samples: Samples) -> list[list[Any]]:
        return samples.also(self._writer.states(names)).outputs(self._session)
