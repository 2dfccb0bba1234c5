"""A file in a runtime, beside onnxruntime: what ran, and how near the outputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.measure.metrics import likely_axes, percent_agreement, worst_sqnr
from onnxq_plugins.runtimes.runtime import Proof, Runtime
from onnxq_plugins.spec import Array

Outputs = list[list[Array]]  # of each output, one value per sample


def prove(
    runtime: Runtime,
    file: Path,
    samples: Sequence[Mapping[str, Array]],
    settings: Mapping[str, Any],
    reference: Path | None = None,
    random: bool = False,
) -> Proof:
    """Load and run a file in a runtime.

    settings    all that it has
    reference   what onnxruntime runs beside it; the file itself by default. Without one, a file of another format is not
                compared with anything
    random      the samples are random numbers

    Raises OnnxqError as `Runtime.inspect` does.
    """
    found = runtime.inspect(file, samples, settings)
    beside = reference or (file if file.suffix == ".onnx" else None)
    if beside is None or not found.outputs:
        return Proof(runtime.name, found, len(found.outputs), random, against="")
    names, exact = expected(beside, samples)
    theirs = gathered(names, found.outputs)
    agreement, decibels = distance(exact, theirs)
    same = all(np.array_equal(y, z) for a, b in zip(exact, theirs, strict=True) for y, z in zip(a, b, strict=True))
    against = "onnxruntime" if beside == file else f"'{beside.name}' in onnxruntime"
    return Proof(runtime.name, found, len(samples), random, None if random else agreement, decibels, same, against)


def expected(model: Path, samples: Sequence[Mapping[str, Array]]) -> tuple[list[str], Outputs]:
    """The names of a model's outputs, and what onnxruntime computes."""
    session = runtimes.session(model)
    names = [output.name for output in session.get_outputs()]
    rows = [session.run(None, dict(runtimes.wanted(session, sample))) for sample in samples]
    return names, [[row[n] for row in rows] for n in range(len(names))]


def gathered(names: Sequence[str], outputs: Sequence[Mapping[str, Array]]) -> Outputs:
    """The outputs of a runtime in the order of a model's, or in its own where it calls them otherwise. Raises OnnxqError if
    there are not as many."""
    if not set(names) <= set(outputs[0]) and len(outputs[0]) != len(names):
        raise OnnxqError(f"the runtime gives outputs {', '.join(outputs[0])}, the model has {', '.join(names)}.")
    keys = list(names) if set(names) <= set(outputs[0]) else list(outputs[0])
    return [[np.asarray(row[key]) for row in outputs] for key in keys]


def distance(exact: Outputs, other: Outputs) -> tuple[float | None, float]:
    """Percent of samples with the same class, None where no output is classes, and the decibels of the worst output."""
    axes = likely_axes(exact)
    agreement = percent_agreement(exact, other, None, axes) if any(axis is not None for axis in axes) else None
    return agreement, worst_sqnr(exact, other)
