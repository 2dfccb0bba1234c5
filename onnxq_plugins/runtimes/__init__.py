"""Runtimes at work: sessions, and audits that read off which kernels a model really runs."""

from onnxq_plugins.runtimes.sessions import (
    LARGE,
    LARGEST_MESSAGE,
    Feed,
    Session,
    agreement,
    blas,
    drift,
    latency,
    outputs,
    quiet,
    run,
    session,
    size_of,
    sqnr,
    trim,
    wanted,
)

__all__ = [
    "LARGE",
    "LARGEST_MESSAGE",
    "Feed",
    "Session",
    "agreement",
    "blas",
    "drift",
    "latency",
    "outputs",
    "quiet",
    "run",
    "session",
    "size_of",
    "sqnr",
    "trim",
    "wanted",
]
