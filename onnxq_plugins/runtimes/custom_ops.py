"""Operators of other domains, from shared libraries that every session loads."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import onnxruntime as ort

from onnxq_plugins import parallel
from onnxq_plugins.errors import OnnxqError

_libraries: list[str] = []


def register_custom_ops(*libraries: str | Path) -> None:
    """Load custom operators into every session from now on, in this process and in workers elsewhere.

    libraries   shared libraries as onnxruntime's `SessionOptions.register_custom_ops_library` takes them; Dask workers need
                them at the same path

    Raises OnnxqError for a file that onnxruntime does not load.
    """
    OnnxqError.check(
        f"library {library!r:.80} must be a path." for library in libraries if not isinstance(library, (str, Path))
    )
    fresh = [
        path for path in dict.fromkeys(str(Path(library).absolute()) for library in libraries) if path not in _libraries
    ]
    for path in fresh:
        if not Path(path).is_file():
            raise OnnxqError(f"custom operators '{path}' do not exist; give the shared library that holds them.")
        try:
            ort.SessionOptions().register_custom_ops_library(path)
        except Exception as error:  # onnxruntime raises a dozen types
            text = " ".join(str(error).split())[:200].rstrip(".")
            raise OnnxqError(
                f"custom operators '{path}' cannot be loaded ({text}); give a shared library made for onnxruntime "
                f"{ort.__version__} or older."
            ) from error
        _libraries.append(path)
    if fresh:
        parallel.in_workers(partial(register_custom_ops, *fresh))


def add_custom_ops(options: ort.SessionOptions) -> None:
    """Give a session the registered operators."""
    for path in _libraries:
        options.register_custom_ops_library(path)


def unknown_operator(error: Exception) -> OnnxqError | None:
    """The error for an operator that a session lacks; None if onnxruntime complains about something else."""
    match = re.search(r"([\w.\-]*):(\w+)\(-?\d+\) is not a registered function/op", str(error))
    if match is None:
        return None
    domain, operator = match.groups()
    return OnnxqError(
        f"operator '{operator}' of domain '{domain}' is unknown to onnxruntime {ort.__version__}; give the shared library "
        "that has it with --custom-ops LIB.so (in Python: onnxq_plugins.register_custom_ops)."
    )
