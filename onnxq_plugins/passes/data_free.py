"""data-free: calibration without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.calibration import Calibration
from onnxq_plugins.calibration.expected import Expected
from onnxq_plugins.calibration.synthetic import Range, Wish, synthesize
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import Job, Pass, Service, Stage

_MOSTLY = 0.75  # share of layers with statistics from which these are the source


@dataclass(frozen=True)
class DataFree(Pass):
    """Let all later passes calibrate without data: on made-up samples, on statistics that the model holds, or both.

    source      ``fractals``: images of iterated function systems with colour, blur and rotation, whose spectrum and contrast
                are those of photographs. ``noise``: normal noise of the same mean and deviation. ``statistics``: no samples
                for ranges and means; mean and deviation of each activation are those of the BatchNormalizations that were
                folded into the layers, and where there are none (an exporter folded them before) normal distributions are
                sent through the operators; channels count as independent there, so the ranges of deep networks come out
                too narrow, and images serve better. ``auto``: statistics where nearly all layers have them, else images
    samples     how many to make
    inputs      ranges of inputs: {mfcc = [-350, 30]}, or for each channel {x = [[lows], [highs]]}; of an image, the values
                of black and white: {image = [0, 255]}
    deviations  how many the span of an activation reaches beyond its mean (``statistics``)
    size        of dynamic axes other than the batch; 0: 224 for images, 128 elsewhere

        range of a channel (``statistics``) = beta -+ deviations |gamma|,   within the activation that follows

    Images get their declared range, or the scale that --mean and --std give, or else the one that the first layer's
    statistics, or weights, imply. A mean of 0 and a std of 1 are those that count as not given: images that are RGB/255 as
    they are need {image = [0, 1]}.
    Features without ranges per channel are the smaller the larger the weights that read them. Token inputs need a range only
    where no table of embeddings tells it. If real samples are given too, they serve no other pass; the report tells how far
    the ranges lie from theirs.

    Source: fractal images: Lazarevich et al. (arXiv 2104.15023), with palettes instead of a network that colours them;
    statistics: Data-Free Quantization (arXiv 1906.04721), with propagation where they are missing.
    Cost: 64 images of 224 x 224 take one to two seconds (`python -m benchmarks.fractals`), and are then calibrated on.
    """

    name: ClassVar[str] = "data-free"
    stage: ClassVar[Stage] = "rewrite"
    provides: ClassVar[frozenset[Service]] = frozenset({"data"})
    source: Literal["auto", "fractals", "noise", "statistics"] = "auto"
    samples: int = 64
    inputs: Mapping[str, Any] = field(default_factory=dict)
    deviations: float = 6.0
    size: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples = {self.samples} must be at least 1")
        if self.deviations <= 0:
            raise ValueError(f"deviations = {self.deviations} must be positive")
        for name, ends in self.inputs.items():
            _range(name, ends)

    def apply(self, job: Job) -> dict[str, Any]:
        real, graph = job.calibration, job.graph
        source = self._source(graph)
        wish = Wish(
            "noise" if self.source == "noise" else "fractals",
            self.samples,
            job.recipe.data,
            {name: _range(name, ends) for name, ends in self.inputs.items()},
            self.size,
        )
        data, made = synthesize(graph, wish, job.rng)
        settings: dict[str, Any] = {"cache": real.cache, "workers": real.workers, "track": real.track}
        job.calibration = Calibration(graph, data, **settings)
        if source == "statistics":
            starts = {name: one.distribution for name, one in made.items() if one.distribution is not None}
            job.calibration = Expected(graph, data, starts, self.deviations, **settings)
        elif not any(one.image for one in made.values()):
            source = "noise"
        told: dict[str, Any] = {"source": source, "inputs": {name: one.source for name, one in made.items()}}
        inputs = "; ".join(f"'{name}': {text}" for name, text in told["inputs"].items())
        job.note(f"calibrated without data, by {source}; inputs: {inputs}")
        if real.data is not None and real.data.where != data.where:
            told["against_real_data"] = distance = _distance(job, real)
            worst = next(iter(distance.get("worst", {}).items()), None)
            job.note(
                "the passes behind data-free do not use the data given"
                + (
                    f"; ranges overlap with theirs by {100 * distance['overlap_mean']:.0f} % on average, least at "
                    f"'{worst[0]}' by {100 * worst[1]['overlap']:.1f} %"
                    if worst
                    else ""
                )
            )
        return told

    def _source(self, graph: Graph) -> str:
        """The source in the end. Statistics tell ranges a little better than images do, but only where they reach: see
        `python -m benchmarks.data_free`."""
        if self.source != "auto":
            return self.source
        told = sum(layer.output in graph.batchnorms for layer in graph.layers)
        return "statistics" if told >= _MOSTLY * len(graph.layers) > 0 else "fractals"


def _distance(job: Job, real: Calibration) -> dict[str, Any]:
    """How far ranges lie from those of real samples: intersection over union, and width over width."""
    names = [n for n in job.plan if not job.graph.is_constant(n)]
    ours, theirs = job.calibration.ranges(names), real.ranges(names)
    rows = {}
    for name in names:
        (a, b), (c, d) = ours[name], theirs[name]
        union = max(b, d) - min(a, c)
        if d > c:
            rows[name] = (max(min(b, d) - max(a, c), 0.0) / max(union, 1e-30), (b - a) / (d - c))
    if not rows:
        return {}
    overlap, width = (np.array(side) for side in zip(*rows.values(), strict=True))
    worst = sorted(rows, key=lambda n: rows[n][0])[:3]
    return {
        "overlap_mean": round(float(overlap.mean()), 3),
        "width_ratio_median": round(float(np.median(width)), 3),
        "worst": {n: {"overlap": round(rows[n][0], 3), "width_ratio": round(rows[n][1], 3)} for n in worst},
    }


def _range(name: str, ends: Any) -> Range:
    """A declared range as two arrays. Raises ValueError if it is none."""
    try:
        low, high = (np.atleast_1d(np.asarray(end, np.float64)) for end in ends)
    except (TypeError, ValueError):
        low, high = np.zeros(0), np.zeros(0)
    if low.ndim > 1 or low.shape != high.shape or not low.size or not np.isfinite([low, high]).all() or (low > high).any():
        raise ValueError(
            f"inputs: the range of '{name}' must be [low, high] with low <= high, one number each or lists of "
            f"one per channel; it is {ends!r}"
        )
    return low, high
