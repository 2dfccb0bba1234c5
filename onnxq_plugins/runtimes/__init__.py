"""Running models: sessions, the machine, and audits that show which kernels a model really runs."""

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
