"""Running models: sessions, the machine, and audits that show which kernels a model really runs."""

from onnxq_plugins.runtimes.custom_ops import register_custom_ops
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
from onnxq_plugins.runtimes.streams import open_samples, roll, rolled

__all__ = [
    "Feed",
    "Session",
    "blas",
    "is_random",
    "joined",
    "latency",
    "open_samples",
    "outputs",
    "per_feed",
    "quiet",
    "register_custom_ops",
    "roll",
    "rolled",
    "run",
    "session",
    "trim",
    "wanted",
]
