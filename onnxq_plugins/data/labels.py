"""Labels of samples."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.spec import Array


def load_labels(path: str) -> Array | None:
    """Labels along the first axis, from an .npy file or from a text file with one number a line; None for no path. Raises
    OnnxqError if they cannot be read."""
    if not path:
        return None
    if not Path(path).exists():
        raise OnnxqError(f"labels '{path}' do not exist; give an .npy file, or a text file with one whole number a line.")
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of empty files
            labels: Array = (
                np.load(path, allow_pickle=False)
                if Path(path).suffix == ".npy"
                else np.loadtxt(path, dtype=np.int64, ndmin=1)
            )
        if not labels.ndim:
            raise ValueError("a single number")
        if not labels.size:
            raise ValueError("empty")
        return labels
    except Exception as error:  # numpy and zipfile raise their own
        raise OnnxqError(
            f"labels '{path}' are not a readable .npy file or text file with one whole number a line ({reason(error)})."
        ) from error


def check_labels(labels: Array | None, samples: int, where: str) -> Array | None:
    """The labels. Raises OnnxqError unless there is one for each sample."""
    if labels is not None and (not labels.ndim or len(labels) != samples):
        there = counted(len(labels) if labels.ndim else 1, "label")
        raise OnnxqError(f"{where} has {counted(samples, 'sample')} and {there}; give one label per sample.")
    return labels


def reason(error: Exception) -> str:
    """Why numpy cannot read a file, without its advice to allow pickles, which run code."""
    text = " ".join(str(error).split())
    if "pickle" in text.lower():
        return "it contains Python objects" if text.startswith("Object arrays") else "it is not in numpy's format"
    return text[:120].rstrip(".")
