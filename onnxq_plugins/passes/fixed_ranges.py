"""fixed-ranges: the ranges of some activations are known, and given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layers.complete import activation_spec
from onnxq_plugins.plan.planned import Planned


@dataclass(frozen=True)
class FixedRanges(Pass):
    """The ranges of some activations are known, and given: those of a sensor, of another tool's calibration, of an NPU's
    tables. The other activations are left to the passes behind it.

    ranges   name of a tensor in the user's model -> [lowest, highest] value

        s = (max(high, 0) - min(low, 0)) / (2^bits - 1),   z = round(-min(low, 0) / s)

    They hold for the model as it is: leave out passes that rescale or shift channels, such as `equalize` and `centre`.

    Source: what quantization tools take as overrides.
    Cost: none.
    """

    name: ClassVar[str] = "fixed-ranges"
    ranges: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, ends in self.ranges.items():
            if len(ends) != 2 or not ends[0] < ends[1]:
                raise ValueError(f"ranges: that of '{name}' must be [lowest, highest], not {list(ends)}")

    def apply(self, job: Job) -> dict[str, Any]:
        planned = Planned.of(job)
        there = set(planned.activations)
        keys = {name: name if name in there else planned.source(name) if name in job.graph else "" for name in self.ranges}
        OnnxqError.check(
            f"fixed-ranges: '{name}' is no quantized tensor: no integer operator reads or writes it"
            + (f"; quantized are {', '.join(sorted(there)[:3])} and others." if there else ".")
            for name, key in keys.items()
            if not key
        )
        fixed = {keys[name]: (float(ends[0]), float(ends[1])) for name, ends in self.ranges.items()}
        job.plan |= {name: activation_spec(ends, job.plan[name]) for name, ends in fixed.items()}
        return {"activations": len(fixed)}
