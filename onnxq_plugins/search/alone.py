"""What quantizers of a solved plan do alone, all others in float."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.export.qdq import export
from onnxq_plugins.export.switched import switched
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.parallel import map_threads
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Array, Plan, QuantSpec, solve_minmax, weight_codes

_EXACT = 16  # bits of a weight whose noise is none


class Alone:
    """The network of a solved plan with some of its quantizers. Made by the exporter, in float kernels, which no machine
    saturates."""

    def __init__(self, planned: Planned, workers: int = 1) -> None:
        self.planned, self.workers = planned, workers
        self._read_by: dict[str, list[str]] = defaultdict(list)  # activation -> weights of the layers that read its codes
        for layer in planned.layers:
            self._read_by[planned.input(layer)].append(layer.weight)
        codes, graph = planned.integer | planned.carriers, planned.graph
        # what all readers read in codes in the whole network, whatever else is quantized here
        self._coded = planned.coded | {
            name for name in planned.activations if all(node.name in codes for node in graph.consumers(name))
        }
        self._exact: dict[str, QuantSpec] = {}
        self._session: tuple[runtimes.Session, Mapping[str, str]] | None = None  # whose activations can be switched

    def model(self, names: Collection[str]) -> onnx.ModelProto:
        """The network with these quantizers, entries of the plan."""
        plan = self.planned.plan
        chosen = {name: plan[name] for name in names}
        # where some readers read float, a layer reads codes only if its weight is planned, too
        mixed = [name for name in names if name not in self._coded]
        exact = {w: self._wide(w) for name in mixed for w in self._read_by.get(name, ()) if w not in chosen}
        return export(self.planned.graph, Plan({**exact, **chosen}), ALONE, self._coded)

    def outputs(self, sets: Sequence[Collection[str]], samples: Samples) -> Iterator[list[list[Any]]]:
        """The outputs on some samples with each of some sets of quantizers. Sets of activations share one session, in which
        they are switched."""
        yield from map_threads(lambda each: samples.also(each[1]).outputs(each[0]()), map(self._network, sets), self.workers)

    def _network(self, names: Collection[str]) -> tuple[Callable[[], runtimes.Session], dict[str, Array]]:
        """What makes the session of a network, and the states of its switches. Exports are made one after another."""
        if any(self.planned.graph.is_constant(name) for name in names):
            return partial(runtimes.session, self.model(names)), {}
        if self._session is None:
            model, switches = switched(self.planned.graph, self.planned.plan, ALONE, self._coded)
            self._session = runtimes.session(model), switches
        session, switches = self._session
        return lambda: session, {switch: np.array(key in names) for key, switch in switches.items()}

    def _wide(self, weight: str) -> QuantSpec:
        if weight not in self._exact:
            values = self.planned.graph.constant(weight)
            spec = solve_minmax(values, QuantSpec(_EXACT, True, self.planned.plan[weight].block))
            self._exact[weight] = replace(spec, codes=weight_codes(values, spec))
        return self._exact[weight]
