"""Running models: sessions, the machine, and audits that show which kernels a model really runs."""

from onnxq_plugins.runtimes.sessions import (
    Feed,
    Session,
    blas,
    is_random,
    joined,
    latency,
    outputs,
    per_feed,
    quiet,
    run,
    session,
    trim,
    wanted,
)

__all__ = [
    "Feed",
    "Session",
    "blas",
    "is_random",
    "joined",
    "latency",
    "outputs",
    "per_feed",
    "quiet",
    "run",
    "session",
    "trim",
    "wanted",
]
