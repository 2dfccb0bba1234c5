"""Runtimes at work: sessions, and audits that read off which kernels a model really runs."""

from onnxq_plugins.runtimes.sessions import (
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
    sqnr,
    trim,
    wanted,
)

__all__ = [
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
    "sqnr",
    "trim",
    "wanted",
]
