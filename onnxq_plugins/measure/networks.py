"""Networks scored on samples, each against the float one. They run as they are written (`runtimes.session`), so that no
machine's kernels decide."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export import qdq
from onnxq_plugins.files import digest, load_arrays, save_arrays
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.metrics import BUILTIN, metric_name, worst_sqnr
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.parallel import run_all
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target


class Measure:
    """Scores plans on samples; the float outputs are computed once.

    samples   what they are judged on; feeds make it
    coded     as for `qdq.export`
    cache     folder that keeps scores between runs, of built-in metrics only: the code of others may change
    scored    how many networks were run
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        samples: Samples | Sequence[Mapping[str, Array]],
        coded: Collection[str] = (),
        cache: Path | None = None,
    ) -> None:
        self.graph, self.target, self.coded, self.cache = graph, target, coded, cache
        self.samples = samples if isinstance(samples, Samples) else Samples.of(graph.model(), samples)
        self.scored = 0
        self._lock = Lock()  # export borrows the graph's constants

    def outputs(self, plan: Plan) -> list[list[Any]]:
        """Outputs of the exported network, a list per output with one value per feed. Safe to call from several threads."""
        return self.samples.outputs(runtimes.session(self._export(plan), written=True))

    def score(self, plan: Plan, by: Metric = worst_sqnr) -> float:
        """A metric of a plan."""
        self.scored += 1
        return self.samples.score(by, self.outputs(plan))

    def scores(self, plans: Iterable[Plan], by: Sequence[Metric], workers: int = 1) -> Iterator[dict[str, float]]:
        """Metrics by name of each plan, in their order.

        workers   networks run side by side: in threads, or wherever `joblib.parallel_config` has them run. A network goes
                  there as bytes, so that a worker needs no more than this package

        Networks whose scores are cached are not run. Scores are cached as soon as they arrive, so that an interrupted
        search resumes where it stopped.
        """
        files: list[Path | None] = []

        def calls() -> Iterator[Callable[[], dict[str, float]]]:
            for plan in plans:
                model = self._export(plan)
                file = self._file(model, by)
                known = load_arrays(file) if file is not None else {}
                files.append(None if known else file)
                if known:
                    yield partial(dict, {name: float(value) for name, value in known.items()})
                else:
                    self.scored += 1
                    yield partial(score_model, np.frombuffer(model, np.uint8), self.samples, by)

        def keep(number: int, scores: dict[str, float]) -> None:
            if (file := files[number]) is not None:
                save_arrays(file, {name: np.array(value) for name, value in scores.items()})

        try:
            yield from run_all(calls(), workers, keep)
        except BrokenExecutor as error:  # a process was killed, mostly for its memory
            raise OnnxqError(
                "a worker process ended in the middle of a search, mostly for lack of memory; use fewer --workers, or leave "
                "--processes out."
            ) from error

    def _export(self, plan: Plan) -> bytes:
        with self._lock:
            return bytes(qdq.export(self.graph, plan, self.target, self.coded).SerializeToString())

    def _file(self, model: bytes, by: Sequence[Metric]) -> Path | None:
        """The file that caches the scores of a network; None if they are not cached."""
        if self.cache is None or not all(one in BUILTIN.values() for one in by):
            return None
        return self.cache / f"{digest(model, self._digest, [metric_name(one) for one in by])}-scores.npz"

    @cached_property
    def _digest(self) -> str:
        return digest(*self.samples.arrays, self.samples.axes, self.samples.state)


def score_model(model: Array, samples: Samples, by: Sequence[Metric]) -> dict[str, float]:
    """Metrics by name of a network on some samples; plain values in and out, so that it runs anywhere.

    model   its bytes, uint8
    """
    outputs = samples.outputs(runtimes.session(model.tobytes(), written=True))
    return {metric_name(one): samples.score(one, outputs) for one in by}
