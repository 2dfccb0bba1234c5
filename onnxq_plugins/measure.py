"""What a quantized network does on some samples, against the float one: the measure of a search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from threading import Lock

import numpy as np

from onnxq_plugins import qdq, runtime
from onnxq_plugins.graph import Graph
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.target import Target

Metric = Callable[[Sequence[Array], Sequence[Array]], float]  # (float outputs, quantized outputs) -> larger is better


def sqnr(reference: Sequence[Array], found: Sequence[Array]) -> float:
    """Signal to quantization noise in dB, mean over samples and outputs."""
    return float(np.mean([runtime.sqnr(y, z) for y, z in zip(reference, found, strict=True)]))


def agreement(reference: Sequence[Array], found: Sequence[Array]) -> float:
    """Percent of samples whose largest value of the first output is the same."""
    return 100 * runtime.agreement(reference[0], found[0])


BUILTIN: dict[str, Metric] = {"sqnr": sqnr, "agreement": agreement}


def metric(name: str) -> Metric:
    """A built-in metric by name. Raises ValueError for an unknown one."""
    if name not in BUILTIN:
        raise ValueError(f"metric = {name!r} is unknown; known: {', '.join(BUILTIN)}")
    return BUILTIN[name]


class Measure:
    """Scores plans on samples; the float outputs are computed once.

    coded    as for `qdq.export`
    scored   how many networks were run
    """

    def __init__(self, graph: Graph, target: Target, feeds: Sequence[Mapping[str, Array]],
                 reference: Sequence[Array] | None = None, coded: Collection[str] = ()) -> None:
        self.graph, self.target, self.feeds, self.coded = graph, target, list(feeds), coded
        self.reference = reference or runtime.outputs(runtime.session(graph.model()), self.feeds)
        self.scored = 0
        self._lock = Lock()  # export borrows the graph's constants

    def outputs(self, plan: Plan) -> list[Array]:
        """What the exported network gives for all samples, one array an output. Callable from several threads."""
        with self._lock:
            model = qdq.export(self.graph, plan, self.target, self.coded)
            self.scored += 1
        return runtime.outputs(runtime.session(model), self.feeds)

    def score(self, plan: Plan, by: Metric = sqnr) -> float:
        """A metric of a plan."""
        return by(self.reference, self.outputs(plan))
