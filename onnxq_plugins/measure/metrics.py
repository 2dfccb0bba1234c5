"""Metrics: what a quantized network's outputs are worth beside the float one's. Larger is better.

A metric is a function, and only the user names one: recipes know built-in names alone, so that a recipe from a stranger
imports no code."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxq_plugins.data import Data
from onnxq_plugins.errors import OnnxqError, known, raised
from onnxq_plugins.graph import Graph
from onnxq_plugins.job import Metric
from onnxq_plugins.measure.arrays import IDENTICAL, agreement, is_float, leaves, sqnr, values_of
from onnxq_plugins.measure.classes import label_axis, labelled, probability_axis
from onnxq_plugins.runtimes import joined
from onnxq_plugins.spec import Array

Axes = Sequence[int | None]  # of the classes of each output, from the last; None: no classes (`classes.class_axes`)


def score(by: Metric, reference: Sequence[Any], quantized: Sequence[Any], labels: Array | None, axes: Axes) -> float:
    """A metric of a network.

    reference, quantized   values of each output per feed, as `runtimes.per_feed` returns them
    axes                   for built-in metrics; those of users take what `job.Metric` says

    Raises OnnxqError for whatever a user's metric raises, and for what is no number.
    """
    if by in BUILTIN.values():
        return float(by(reference, quantized, labels, axes))  # type: ignore[call-arg]
    exact = [joined(values) for values in reference]
    rounded = exact if quantized is reference else [joined(values) for values in quantized]
    try:
        value = float(by(exact, rounded, labels))
    except OnnxqError:
        raise
    except Exception as error:  # the user's own code: any error is theirs
        raise OnnxqError(
            f"metric '{metric_name(by)}' fails with {raised(error)}; it gets (float outputs, quantized outputs, labels), "
            "each output an array over the samples, or a list with one value per feed if shapes vary, and returns a number."
        ) from error
    if not np.isfinite(value):
        raise OnnxqError(f"metric '{metric_name(by)}' returns {value}; it must return a finite number, larger for better.")
    return value


def worst_sqnr(
    reference: Sequence[Any], quantized: Sequence[Any], labels: Array | None = None, axes: Axes | None = None
) -> float:
    """Signal to quantization noise in dB, of the worst output, pooled over all samples.

    A network without an output of floats is judged by the elements that differ, each as noise as large as the signal:
    99 % of the same are 20 dB.
    """
    outputs = list(zip(reference, quantized, strict=True))
    noises = [sqnr(y, z) for y, z in outputs if is_float(y)]
    if not noises:
        differ = [1 - agreement(y, z, None) for y, z in outputs]
        noises = [float(-10 * np.log10(max(share, 10 ** (-IDENTICAL / 10)))) for share in differ]
    return min(noises, default=IDENTICAL)


def percent_agreement(
    reference: Sequence[Any], quantized: Sequence[Any], labels: Array | None = None, axes: Axes | None = None
) -> float:
    """Percent of samples (pixels, symbols) with the same class, of the worst output that is classes; if none is, of elements
    of integers, booleans and strings that are equal. Raises OnnxqError if there are neither."""
    axes = likely_axes(reference) if axes is None else axes
    outputs = list(zip(reference, quantized, axes, strict=True))
    shares = [agreement(y, z, axis) for y, z, axis in outputs if axis is not None]
    shares = shares or [agreement(y, z, None) for y, z, _ in outputs if not is_float(y)]
    likely = zip(
        reference, quantized, likely_axes(reference), strict=True
    )  # whoever wants agreement says that there are classes
    shares = shares or [agreement(y, z, axis) for y, z, axis in likely if axis is not None]
    if not shares:
        raise OnnxqError(
            "metric 'agreement': no output is classes, as far as the model shows; give their axis (--class-axis), or metric "
            "sqnr."
        )
    return 100 * min(shares)


def top1(reference: Sequence[Any], quantized: Sequence[Any], labels: Array | None = None, axes: Axes | None = None) -> float:
    """Percent of labels that are the class of the largest value; of pixels or symbols, if each has a label: those of 255, or
    below 0, are void then. Raises OnnxqError without labels, or if they fit no output."""
    if labels is None:
        raise OnnxqError("metric 'top1' needs labels; give --labels FILE, or an array named 'labels' in the .npz.")
    axes = likely_axes(reference) if axes is None else axes
    if (number := labelled(reference, labels, axes)) is None:
        first = next((list(np.shape(leaf)) for y in reference for value in values_of(y) for leaf in leaves(value)), [])
        raise OnnxqError(
            f"metric 'top1': the labels have shape {list(labels.shape)}, which no output's classes have (the first output "
            f"has shape {first} for the first feed); give one label for each, and --class-axis where classes are not found."
        )
    axis = axes[number]
    arrays = [leaf for value in values_of(quantized[number]) for leaf in leaves(value)]
    answers = np.concatenate([(a if axis is None else np.argmax(a, axis=axis)).ravel() for a in arrays])
    truth = labels.ravel()
    if answers.shape != truth.shape:
        raise OnnxqError(
            f"metric 'top1': there are {truth.size} labels and {answers.size} answers of the model; give one label for each."
        )
    kept = ~_void(labels).ravel()
    return 100 * float(np.mean(answers[kept] == truth[kept])) if kept.any() else 100.0


def likely_axes(reference: Sequence[Any]) -> list[int | None]:
    """The axes of classes as far as arrays alone tell: probabilities, else the last one of [N, C]."""
    axes = []
    for output in reference:
        ranks = {leaf.ndim for value in values_of(output) for leaf in leaves(value) if leaf.shape[-1:] != (1,)}
        axes.append(probability_axis(output) or (-1 if ranks == {2} and is_float(output) else None))
    return axes


def _void(labels: Array) -> Array:
    """Where labels of pixels or symbols mean none: 255 or negative, as data sets have them. [samples, ...] of bool"""
    return (labels == 255) | (labels < 0) if labels.ndim > 1 and labels.dtype.kind in "iuf" else np.zeros(labels.shape, bool)


def check_labels(labels: Array | None, shape: Sequence[Any] | None, name: str = "", axis: int | None = None) -> None:
    """Raise OnnxqError for labels that are not classes of an output.

    labels   [samples, ...] or None
    shape    of the output, samples first; unknown sizes are not int
    name     of the output
    axis     of its classes, from the last; found by the labels' shape if not known
    """
    if labels is None or not shape or len(shape) < 2:
        return
    values = np.asarray(labels)
    output = f"output '{name}'" if name else "the output"
    last = shape[-1]
    if values.shape[1:] == (last,) and values.ndim == len(shape) and ((values != 0).sum(axis=-1) == 1).all() and last > 1:
        raise OnnxqError(
            f"the labels have shape {list(values.shape)}, one-hot it seems, and {output} has {last} "
            "classes; give the number of the class, such as labels.argmax(-1)."
        )
    axis = label_axis(values, shape) if axis is None else axis
    if axis is None or not isinstance(classes := shape[axis], int) or values.dtype.kind not in "iuf":
        return
    wrong = ((values < 0) | (values >= classes) | (values != np.round(values))) & ~_void(values)
    if wrong.any():
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        from_one = wrong[values != classes].sum() == 0 and values.min() >= 1
        raise OnnxqError(
            f"label {values[at]:g} of sample {at[0]}, but {output} has {classes} classes, 0..{classes - 1}; "
            + ("the labels seem to count from 1: subtract 1." if from_one else "give the number of the class.")
        )


def check_graph_labels(data: Data, graph: Graph, axis: int | None = None) -> None:
    """`check_labels` for a model that has not run yet: labels are of its first output, unless that is not of floats. Labels
    that nobody gave, but that came with the inputs, are dropped with a note.

    axis   of its classes, as the user gave it
    """
    name = graph.outputs[0]
    shape, dtype = graph.shape(name), graph.tensor(name).dtype
    if shape is not None and (dtype is None or np.dtype(dtype).kind == "f"):
        known = None if axis is None or not -len(shape) <= axis < len(shape) else axis % len(shape) - len(shape)
        try:
            check_labels(data.labels, shape, name, known)
        except OnnxqError as error:
            if not data.implied:
                raise
            data.labels = None
            data.notes += (f"what the batches hold besides inputs was ignored: {str(error).rstrip('.')}",)


def chance(score: float, reference: Sequence[Any], labels: Array, axes: Axes) -> str:
    """A warning if the float network gets no more labels right than guessing would; "" otherwise, and for fewer than 30
    samples.

    score   `top1` of the float network, percent
    others  as for `top1`
    """
    number, samples = labelled(reference, labels, axes), labels.size
    axis = None if number is None else axes[number]
    if number is None or axis is None:
        return ""
    classes = next(leaf.shape[axis] for value in values_of(reference[number]) for leaf in leaves(value))
    if samples < 30 or score > 150 / classes:
        return ""
    return (
        f"the float model gets {score:.1f}% of {samples} labels right, no more than guessing among {classes} classes: "
        "check that labels are in the samples' order and count classes as the model does, and how the samples were "
        "normalized"
    )


BUILTIN: dict[str, Metric] = {"sqnr": worst_sqnr, "agreement": percent_agreement, "top1": top1}


def metric(name: str) -> Metric:
    """A built-in metric by name. Raises ValueError for an unknown one."""
    if name not in BUILTIN:
        raise ValueError(f"metric = {name!r} is unknown; {known(name, BUILTIN)}")
    return BUILTIN[name]


def find_metric(name: str | Metric) -> Metric:
    """A metric that the user, not a recipe, names: a function, a built-in one, or ``package.module:function``, which is
    imported. Raises OnnxqError if there is no such metric."""
    if callable(name):
        return name
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in BUILTIN:
            raise OnnxqError(f"metric '{name}' is unknown; {known(name, BUILTIN)}, or package.module:function.")
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
