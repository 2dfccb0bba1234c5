"""placement: leave in float what is faster there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.export.qdq import export
from onnxq_plugins.job import Job, Pass, Report, Stage
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import request
from onnxq_plugins.runtimes.costs import shipped
from onnxq_plugins.search.placement import Placer, Placement as Decision
from onnxq_plugins.spec import Plan, from_range
from dataclasses import replace

_NAME = "avx512-vnni"


@dataclass(frozen=True)
class Placement(Pass):
    """x"""

    name: ClassVar[str] = "placement"
    stage: ClassVar[Stage] = "rewrite"
    gain: float = 0.03

    def apply(self, job: Job) -> dict[str, Any] | None:
        data = job.calibration.data
        if data is None or not job.target.here:
            return None
        feed = next(iter(data))
        decision = Placer(Planned.of(job), shapes_of(job.graph, feed), shipped()[_NAME]).place()
        result = {"integer": round(decision.integer), "float": round(decision.float), "placed": round(decision.placed)}
        if not decision.floats or decision.placed > (1 - self.gain) * decision.integer:
            return result
        job.plan = planned_in_float(job, decision.floats)
        return result


def planned_in_float(job: Job, names: frozenset[str]) -> Plan:
    before = request(job.graph, job.recipe, job.target)
    after = request(job.graph, job.recipe, job.target, placed=names)
    kept = Plan({n: s for n, s in job.plan.items() if n in after.plan or n not in before.plan})
    decoded = Plan({n: s for n, s in after.plan.items() if s.decoded or n not in before.plan})
    job.report.floats.update({n: r for n, r in after.floats.items() if r.kind == "slower"})
    return kept | decoded
