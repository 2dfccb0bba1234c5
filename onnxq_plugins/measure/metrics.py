"""Metrics: what a quantized network's outputs are worth beside the float one's. Larger is better."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.arrays import agreement, sqnr
from onnxq_plugins.spec import Array


def mean_sqnr(reference: Sequence[Array], quantized: Sequence[Array], labels: Array | None = None) -> float:
    """Signal to quantization noise in dB, mean over samples and outputs."""
    return float(np.mean([sqnr(y, z) for y, z in zip(reference, quantized, strict=True)]))


def percent_agreement(reference: Sequence[Array], quantized: Sequence[Array], labels: Array | None = None) -> float:
    """Percent of samples whose largest value of the first output is the same class."""
    return 100 * agreement(reference[0], quantized[0])


def top1(reference: Sequence[Array], quantized: Sequence[Array], labels: Array | None = None) -> float:
    """Percent of samples whose largest value of the first output is at their label. Raises OnnxqError without labels, or
    if they do not fit the output."""
    if labels is None:
        raise OnnxqError("metric 'top1' needs labels; give --labels FILE, or an array named 'labels' in the .npz.")
    check_labels(labels, quantized[0].shape)
    classes = np.argmax(quantized[0], axis=-1)
    if classes.shape != labels.shape:
        raise OnnxqError(
            f"metric 'top1': the labels have shape {list(labels.shape)}, the outputs' classes "
            f"{list(classes.shape)}; give one label for each."
        )
    return 100 * float(np.mean(classes == labels))


def check_labels(labels: Array | None, shape: Sequence[Any] | None, name: str = "") -> None:
    """Raise OnnxqError for labels that are not classes of an output.

    labels   [samples, ...] or None
    shape    of the output, classes last; unknown sizes are not int
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
        from_one = wrong[values != classes].sum() == 0 and values.min() >= 1
        raise OnnxqError(
            f"label {values[at]:g} of sample {at[0]}, but {output} has {classes} classes, 0..{classes - 1}; "
            + ("the labels seem to count from 1: subtract 1." if from_one else "give the number of the class.")
        )


def chance(score: float, classes: int, samples: int) -> str:
    """A warning if the float network gets no more labels right than guessing would; "" otherwise, and for fewer than 30
    samples.

    score   percent of samples
    """
    if samples < 30 or classes < 2 or score > 150 / classes:
        return ""
    return (
        f"the float model gets {score:.1f}% of {samples} labels right, no more than guessing among {classes} classes: "
        "check that labels are in the samples' order and count classes as the model does, and how the samples were "
        "normalized"
    )


BUILTIN: dict[str, Metric] = {"sqnr": mean_sqnr, "agreement": percent_agreement, "top1": top1}


def metric(name: str) -> Metric:
    """A built-in metric by name. Raises ValueError for an unknown one."""
    if name not in BUILTIN:
        raise ValueError(f"metric = {name!r} is unknown; known: {', '.join(BUILTIN)}")
    return BUILTIN[name]


def find_metric(name: str | Metric) -> Metric:
    """A metric that the user, not a recipe, names: a function, a built-in one, or ``package.module:function``, which is
    imported. Raises OnnxqError if there is no such metric."""
    if callable(name):
        return name
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in BUILTIN:
            raise OnnxqError(f"metric '{name}' is unknown; known: {', '.join(BUILTIN)}, or package.module:function.")
        return BUILTIN[name]
    try:
        function: Metric = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's own code: any error is theirs
        raise OnnxqError(
            f"metric '{name}' cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}."
        ) from error
    if not callable(function):
        raise OnnxqError(f"metric '{name}' is not a function of (float outputs, quantized outputs, labels).")
    return function


def metric_name(by: Metric) -> str:
    """What reports call a metric."""
    return next((name for name, known in BUILTIN.items() if known is by), getattr(by, "__name__", type(by).__name__))
