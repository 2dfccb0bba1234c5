"""Layers in float kernels: why each runs there, and what may bring it into an integer one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxq_plugins.errors import Reason
from onnxq_plugins.job import Outcome
from onnxq_plugins.plan.requests import rule_keys
from onnxq_plugins.report.remedies import Remedy, float_remedies
from onnxq_plugins.search.quantizers import multiply_adds
from onnxq_plugins.spec import Array


@dataclass(frozen=True)
class FloatLayer:
    """A layer that runs in a float kernel.

    why        the reason
    work       its part of the network's multiply-adds, 0..1
    remedies   what may bring it into an integer kernel
    """

    name: str
    op: str
    kernel: str
    why: str
    work: float
    remedies: tuple[Remedy, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "op": self.op,
            "kernel": self.kernel,
            "why": self.why,
            "work": round(self.work, 4),
            "remedies": [r.to_dict() for r in self.remedies],
        }


def float_layers(result: Outcome, feed: Mapping[str, Array]) -> tuple[FloatLayer, ...]:
    """The layers of a result that run in float kernels, those with the most work first; not those that a pass keeps there.

    feed   one sample, from which the work of layers of dynamic size is known
    """
    rows = [row for row in result.report.layers if row.get("why_float_kind", "pass") != "pass"]
    if not rows:
        return ()
    work = multiply_adds(result.graph, feed)
    total = max(sum(work.values()), 1)
    keys = rule_keys(result.graph, result.recipe)
    layers = []
    for row in rows:
        name, op, reason = row["name"], row["op"], Reason(row["why_float_kind"], row["why_float"])
        remedies = float_remedies(name, op, reason, result.target, keys.get(name, frozenset()))
        layers.append(FloatLayer(name, op, row["kernel"], str(reason), work.get(name, 0) / total, remedies))
    return tuple(sorted(layers, key=lambda layer: -layer.work))
