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
from onnxq_plugins.plan.planned import Planned

_MOSTLY = 0.75  # share of layers with statistics from which on these are the source


@dataclass(frozen=True)
class DataFree(Pass):
    """Calibrate without data.

    All later passes calibrate on synthetic samples, on statistics that the model holds, or on both.

    source      ``fractals``: images of iterated function systems with colour, blur and rotation, whose spectrum and contrast
                are those of photographs. ``noise``: normal noise of the same mean and deviation. ``statistics``: no samples
                for ranges and means; mean and deviation of each activation come from the BatchNormalizations that were
                folded into the layers; where there are none (an exporter folded them before), normal distributions are
                propagated through the operators. Channels count as independent there, so that the ranges of deep networks
                are too narrow, and images do better. ``auto``: statistics where nearly all layers have them, else images
    samples     number of samples to generate
    inputs      ranges of inputs: {mfcc = [-350, 30]}, or per channel {x = [[lows], [highs]]}; of an image, the values of
                black and white: {image = [0, 255]}
    deviations  how many standard deviations an activation's range reaches beyond its mean (``statistics``)
    size        of dynamic axes other than the batch; 0: 224 for images, 128 elsewhere

        range of a channel (``statistics``) = beta -+ deviations |gamma|,   within the activation that follows

    Images get their declared range, or the scale that --mean and --std give, or else the one that the first layer's
    statistics, or weights, imply. A mean of 0 and a std of 1 count as not given: images that are plain RGB/255 need {image =
    [0, 1]}. Without ranges per channel, features are scaled down in proportion to the weights that read them. Token inputs
    need a range only where no embedding table implies it. If real samples are given as well, no other pass uses them; the
    report shows how far the ranges are from theirs.

    Source: fractal images: Lazarevich et al. (arXiv 2104.15023), with palettes instead of a network that colours them;
    statistics: Data-Free Quantization (arXiv 1906.04721), with propagation where they are missing.
    Cost: 64 images of 224 x 224 take one to two seconds (`python -m benchmarks.fractals`); calibration then runs on them.
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
        data, synthetic = synthesize(graph, wish, job.rng)
        settings: dict[str, Any] = {"cache": real.cache, "workers": real.workers, "track": real.track}
        job.calibration = Calibration(graph, data, **settings)
        if source == "statistics":
            starts = {name: one.distribution for name, one in synthetic.items() if one.distribution is not None}
            job.calibration = Expected(graph, data, starts, self.deviations, **settings)
        elif not any(one.image for one in synthetic.values()):
            source = "noise"
        result: dict[str, Any] = {"source": source, "inputs": {name: one.source for name, one in synthetic.items()}}
        inputs = "; ".join(f"'{name}': {text}" for name, text in result["inputs"].items())
        job.note(f"calibrated without data, by {source}; inputs: {inputs}")
        if real.data is not None and real.data.where != data.where:
            result["against_real_data"] = distance = _distance(job, real)
            worst = next(iter(distance.get("worst", {}).items()), None)
            job.note(
                "the passes after data-free do not use the data given"
                + (
                    f"; ranges overlap with theirs by {100 * distance['overlap_mean']:.0f} % on average, least at "
                    f"'{worst[0]}' by {100 * worst[1]['overlap']:.1f} %"
                    if worst
                    else ""
                )
            )
        return result

    def _source(self, graph: Graph) -> str:
        """The source that is used. Statistics give slightly better ranges than images do, but only where there are some: see
        `python -m benchmarks.data_free`."""
        if self.source != "auto":
            return self.source
        count = sum(layer.output in graph.batchnorms for layer in graph.layers)
        return "statistics" if count >= _MOSTLY * len(graph.layers) > 0 else "fractals"


def _distance(job: Job, real: Calibration) -> dict[str, Any]:
    """How far ranges are from those of real samples: intersection over union, and width over width."""
    names = Planned.of(job).activations
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
    """A declared range as two arrays. Raises ValueError if it is not a range."""
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
