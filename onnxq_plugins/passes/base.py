"""The base class of every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from onnxq_plugins.engine import Job


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
