"""activation-ranges: choose the range in front of an activation by the error behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins.graph.activations import Activation, activation_of
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layers.complete import activation_spec
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Array, QuantSpec, from_range

_POINTS = 512  # of a numerical integral
_ENDS = 24  # values of either end that are tried
_FLAT = 0.05  # an end may leave out what the activation maps to so small a part of its range: there tails count for little


@dataclass(frozen=True)
class ActivationRanges(Pass):
    """Choose the range in front of an activation by the error behind it.

    A SiLU makes nearly 0 of all values below -5, a Sigmoid nearly 1 of all above 5: codes for what lies beyond are lost to
    the values that count. Where an activation f alone reads a tensor, its range [l, h] is the one of least error behind f,

        E = sum_x p(x) e(x),    e(x) = s^2 / 12 f'(x)^2  within [l, h],   (f(x) - f(l or h))^2  beyond

    with the step s of the range. p is a mixture of one normal distribution per channel, with its mean and a range of six
    standard deviations, cut at its extremes: no histogram, hence no further run, is needed.

    f is what the operators compute, whatever they are: SiLU as Sigmoid and Mul, HardSwish, GELU, Mish and others are one
    function each. Only where f is nearly constant are values left out: there the tails of p count for little.

    gain   a range is narrowed if the error falls by at least so many dB; all others stay open for `ranges`

    Source: our own; minimizing the error behind a layer's activation is common practice in hardware calibration tools.
    Cost: none beyond the run over the data that `ranges` needs.
    """

    name: ClassVar[str] = "activation-ranges"
    gain: float = 0.5

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"gain = {self.gain} must be positive")

    def apply(self, job: Job) -> dict[str, Any]:
        view = Planned.of(job)
        names = [name for name in view.activations if not job.plan[name].solved]
        known = {name: f for name in names if (f := activation_of(job.graph, name)) is not None}
        known = {name: f for name, f in known.items() if job.graph.shape(name) is not None}
        if not known or not job.calibration.ready:
            return {"activations": {}}
        job.calibration.ranges(names)  # what `ranges` asks for: one run over the data serves both
        ranges, means = job.calibration.channel_ranges([*known]), job.calibration.means([*known])
        rows: dict[str, dict[str, Any]] = {}
        for name, f in known.items():
            ends, gain = best_range(f, *ranges[name], means[name], job.plan[name])
            if gain >= self.gain:
                rows[name] = {"activation": f.name, "range": [round(end, 3) for end in ends], "gain": round(gain, 1)}
                job.plan |= {name: activation_spec(ends, job.plan[name])}
        return {"activations": rows}


def best_range(f: Activation, low: Array, high: Array, mean: Array, spec: QuantSpec) -> tuple[tuple[float, float], float]:
    """The range of least error behind an activation, and the dB that it gains over the extremes.

    low, high, mean   of each channel [C]
    """
    first, last = float(low.min()), float(high.max())
    if not last > first:
        return (first, last), 0.0
    x = np.linspace(first, last, _POINTS)
    y, weight = f(x), density(x, low, high, mean)
    slope = np.gradient(y, x) ** 2
    flat = _FLAT * float(np.ptp(y))
    spans = [np.maximum.accumulate(values) - np.minimum.accumulate(values) for values in (y, y[::-1])]  # beyond each point
    lows, highs = (
        [end, *(at for at in np.linspace(end, 0.0, _ENDS)[1:-1] if end * side > 0 and np.interp(at, x, values) <= flat)]
        for end, side, values in ((first, -1, spans[0]), (last, 1, spans[1][::-1]))
    )

    def error(start: float, end: float) -> float:
        step = float(np.asarray(from_range(start, end, spec).scale))
        below, above = x < min(start, 0.0), x > max(end, 0.0)
        errors = np.where(below, (y - np.interp(start, x, y)) ** 2, np.where(above, (y - np.interp(end, x, y)) ** 2, 0.0))
        return float((weight * np.where(below | above, errors, step**2 / 12 * slope)).sum())

    whole = error(first, last)
    start = min(lows, key=lambda at: error(at, last))
    end = min(highs, key=lambda at: error(start, at))
    best = error(start, end)
    return (start, end), float(10 * np.log10(max(whole, 1e-300) / max(best, 1e-300)))


def density(x: Array, low: Array, high: Array, mean: Array) -> Array:
    """The mixture of the channels' distributions at equidistant points, adding up to 1 [points]."""
    width = np.maximum((high - low) / 6, (x[1] - x[0]) / 2)[:, None]
    inside = (x >= low[:, None] - (x[1] - x[0])) & (x <= high[:, None] + (x[1] - x[0]))
    values = np.where(inside, np.exp(-0.5 * ((x - mean[:, None]) / width) ** 2), 0.0)
    total = values.sum(axis=1, keepdims=True)
    weight = np.divide(values, total, out=np.zeros_like(values), where=total > 0).mean(axis=0)
    return np.asarray(weight / max(float(weight.sum()), 1e-30))
