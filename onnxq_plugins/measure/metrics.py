"""What a quantized network does on some samples, against the float one: the measure of a search."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from onnxq_plugins.parallel import run_all
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Target

# (outputs of the float network, of the quantized one, labels or None) -> larger is better. Outputs: one array [samples, ...]
# each; labels: [samples, ...]
Metric = Callable[[Sequence[Array], Sequence[Array], Array | None], float]


def sqnr(reference: Sequence[Array], found: Sequence[Array], labels: Array | None = None) -> float:
    """Signal to quantization noise in dB, mean over samples and outputs."""
    return float(np.mean([runtimes.sqnr(y, z) for y, z in zip(reference, found, strict=True)]))


def agreement(reference: Sequence[Array], found: Sequence[Array], labels: Array | None = None) -> float:
    """Percent of samples whose largest value of the first output is the same."""
    return 100 * runtimes.agreement(reference[0], found[0])


def top1(reference: Sequence[Array], found: Sequence[Array], labels: Array | None = None) -> float:
    """Percent of samples whose largest value of the first output is at their label. Raises OnnxqError without labels, or
    where they do not fit the output."""
    if labels is None:
        raise OnnxqError("metric 'top1' needs labels; give --labels FILE, or an array named 'labels' in the .npz.")
    check_labels(labels, found[0].shape)
    best = np.argmax(found[0], axis=-1)
    if best.shape != labels.shape:
        raise OnnxqError(
            f"metric 'top1': the labels have shape {list(labels.shape)}, the outputs' classes "
            f"{list(best.shape)}; give one label for each."
        )
    return 100 * float(np.mean(best == labels))


def check_labels(labels: Array | None, shape: Sequence[Any] | None, name: str = "") -> None:
    """Raise OnnxqError for labels that are no classes of an output.

    labels   [samples, ...] or None
    shape    of the output, classes last; sizes that are not known are no int
    name     of the output
    """
    if labels is None or not shape or len(shape) < 2 or not isinstance(classes := shape[-1], int) or classes < 2:
        return
    output = f"output '{name}'" if name else "the first output"
    values = np.asarray(labels)
    if values.shape[1:] == (classes,) and values.ndim == len(shape) and ((values != 0).sum(axis=-1) == 1).all():
        raise OnnxqError(
            f"the labels have shape {list(values.shape)}, one-hot it seems, and {output} has {classes} "
            "classes; give the number of the class, such as labels.argmax(-1)."
        )
    if values.ndim != len(shape) - 1 or values.dtype.kind not in "iuf":
        return
    wrong = (values < 0) | (values >= classes) | (values != np.round(values))
    if wrong.any():
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        ones = wrong[values != classes].sum() == 0 and values.min() >= 1
        raise OnnxqError(
            f"label {values[at]:g} of sample {at[0]}, but {output} has {classes} classes, 0..{classes - 1}; "
            + ("the labels seem to count from 1: subtract 1." if ones else "give the number of the class.")
        )


def chance(score: float, classes: int, samples: int) -> str:
    """A remark where a float network gets no more labels right than guessing would; "" elsewhere, and for fewer than 30
    samples.

    score   percent of samples
    """
    if samples < 30 or classes < 2 or score > 150 / classes:
        return ""
    return (
        f"the float model gets {score:.1f}% of {samples} labels right, which guessing among {classes} classes does, "
        "too: check that labels are in the samples' order and count classes as the model does, and how the samples were "
        "normalized"
    )


BUILTIN: dict[str, Metric] = {"sqnr": sqnr, "agreement": agreement, "top1": top1}


def metric(name: str) -> Metric:
    """A built-in metric by name. Raises ValueError for an unknown one."""
    if name not in BUILTIN:
        raise ValueError(f"metric = {name!r} is unknown; known: {', '.join(BUILTIN)}")
    return BUILTIN[name]


def find_metric(name: str | Metric) -> Metric:
    """A metric that the user, not a recipe, names: a function, a built-in one, or ``package.module:function``, which is
    imported. Raises OnnxqError if there is no such thing."""
    if callable(name):
        return name
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in BUILTIN:
            raise OnnxqError(f"metric '{name}' is unknown; known: {', '.join(BUILTIN)}, or package.module:function.")
        return BUILTIN[name]
    try:
        made: Metric = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's own code: any error is theirs
        raise OnnxqError(
            f"metric '{name}' cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}."
        ) from error
    if not callable(made):
        raise OnnxqError(f"metric '{name}' is no function of (float outputs, quantized outputs, labels).")
    return made


def metric_name(by: Metric) -> str:
    """What reports call a metric."""
    return next((name for name, known in BUILTIN.items() if known is by), getattr(by, "__name__", type(by).__name__))


class Samples:
    """What networks are measured on: feeds, the float network's outputs for them, labels [samples, ...] or None."""

    def __init__(self, feeds: Sequence[Mapping[str, Array]], reference: Sequence[Array], labels: Array | None) -> None:
        self.feeds, self.reference, self.labels = list(feeds), list(reference), labels

    @property
    def arrays(self) -> list[Array]:
        """All of it."""
        rows = [array for feed in self.feeds for _, array in sorted(feed.items())]
        return [*rows, *self.reference, *([self.labels] if self.labels is not None else [])]

    def __sizeof__(self) -> int:
        """With all arrays: by it joblib tells what to send to each Dask worker once, not with each task."""
        return sum(array.nbytes for array in self.arrays)


class Measure:
    """Scores plans on samples; the float outputs are computed once.

    coded     as for `qdq.export`
    labels    of the samples, [samples, ...]
    cache     folder that keeps scores between runs: those of built-in metrics, for others may change
    scored    how many networks were run
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        feeds: Sequence[Mapping[str, Array]],
        reference: Sequence[Array] | None = None,
        coded: Collection[str] = (),
        labels: Array | None = None,
        cache: Path | None = None,
    ) -> None:
        self.graph, self.target, self.coded, self.cache = graph, target, coded, cache
        reference = reference or runtimes.outputs(runtimes.session(graph.model()), feeds)
        self.samples = Samples(feeds, reference, labels)
        self.scored = 0
        self._lock = Lock()  # export borrows the graph's constants

    def outputs(self, plan: Plan) -> list[Array]:
        """What the exported network gives for all samples, one array an output. Callable from several threads."""
        return runtimes.outputs(runtimes.session(self._export(plan)), self.samples.feeds)

    def score(self, plan: Plan, by: Metric = sqnr) -> float:
        """A metric of a plan."""
        self.scored += 1
        return by(self.samples.reference, self.outputs(plan), self.samples.labels)

    def scores(self, plans: Iterable[Plan], by: Sequence[Metric], workers: int = 1) -> Iterator[dict[str, float]]:
        """Metrics by name of each plan, in their order.

        workers   networks run side by side: in threads, or wherever `joblib.parallel_config` has them run. A network goes
                  there as bytes, so that a worker needs no more than this package

        What the cache holds is not run. Each result is kept there as soon as it arrives, so that a search that was
        interrupted goes on from the last one.
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
                    yield partial(measured, np.frombuffer(model, np.uint8), self.samples, by)

        def keep(number: int, found: dict[str, float]) -> None:
            if (file := files[number]) is not None:
                save_arrays(file, {name: np.array(value) for name, value in found.items()})

        return run_all(calls(), workers, keep)

    def _export(self, plan: Plan) -> bytes:
        with self._lock:
            return bytes(qdq.export(self.graph, plan, self.target, self.coded).SerializeToString())

    def _file(self, model: bytes, by: Sequence[Metric]) -> Path | None:
        """Where the scores of a network are kept, if they are."""
        if self.cache is None or not all(one in BUILTIN.values() for one in by):
            return None
        return self.cache / f"{digest(model, self._digest, [metric_name(one) for one in by])}-scores.npz"

    @cached_property
    def _digest(self) -> str:
        return digest(*self.samples.arrays)


def measured(model: Array, samples: Samples, by: Sequence[Metric]) -> dict[str, float]:
    """Metrics by name of a network on some samples; plain values in and out, so that it can run anywhere.

    model   its bytes, uint8
    """
    found = runtimes.outputs(runtimes.session(model.tobytes()), samples.feeds)
    return {metric_name(one): float(one(samples.reference, found, samples.labels)) for one in by}
