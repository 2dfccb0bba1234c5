"""What a pass is, and the job it receives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnxq_plugins.calibration import Calibration, Track, silent
from onnxq_plugins.graph import ChannelGroup, Graph, permute
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target

if TYPE_CHECKING:
    from onnxq_plugins.measure.metrics import Metric
    from onnxq_plugins.recipe import Recipe


@dataclass(frozen=True)
class Pass:
    """One algorithm. A subclass is a frozen dataclass: its fields are its parameters, their defaults its defaults.

    name    how recipes call it; guests write ``vendor.pass``, built-ins have no dot
    exact   False if `apply` may change the float function (bias correction, pruning); the report shows it
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = True

    def apply(self, job: Job) -> dict[str, Any] | None:
        """Rewrite `job.graph` (its float function unchanged) and, or, replace `job.plan`. What is returned goes into
        the report and must be JSON."""
        raise NotImplementedError


@dataclass
class Job:
    """What a pass receives.

    graph         the float model; rewrite it in place, its function unchanged (law L1)
    plan          tensor name -> QuantSpec; a value: put a new one here
    calibration   statistics of the graph over the user's data
    target        what the runtime can execute
    recipe        the recipe being run
    rng           the only source of randomness, seeded by the user
    workers       how many things may run at once (joblib's n_jobs)
    metric        how the user judges a network, if he says so (`measure.Metric`); a search asks it
    report        JSON-able notes for the user, by topic
    track         wrap a long loop in it to show progress: track(items, what, total)
    """

    graph: Graph
    plan: Plan
    calibration: Calibration
    target: Target
    recipe: Recipe
    rng: np.random.Generator
    workers: int = 1
    report: dict[str, Any] = field(default_factory=dict)
    track: Track = silent
    metric: Metric | None = None

    def permute(self, group: ChannelGroup, order: Array) -> None:
        """Reorder the channels of a group (`graph.permute`). What was solved for the weights it moves is dropped when the
        pass ends (law L5); ranges per tensor, which do not depend on the order, stay."""
        permute(self.graph, group, order)
        kept = {n: self.plan[n] for n in group.tensors if n in self.plan and self.plan[n].block is None}
        self.plan |= {n: replace(spec) for n, spec in kept.items()}  # put anew: not stale in the engine's eyes
