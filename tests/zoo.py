"""The small models of `onnxq_plugins.testing`, and settings of property tests."""

import os
from collections.abc import Iterable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings

from onnxq_plugins import runtimes
from onnxq_plugins.testing.models import (
    ZOO,
    Net,
    batch,
    cnn,
    control_flow,
    conv1d,
    conv_transpose,
    dead_channels,
    feeds,
    grouped,
    inception,
    mlp,
    mobilenet,
    no_bias,
    no_layer,
    odd_channels,
    prelu,
    resnet20,
    run,
    shared_weights,
    transformer,
    written_out,
)

__all__ = [
    "LONG_CHECKS",
    "ZOO",
    "Net",
    "batch",
    "cnn",
    "control_flow",
    "conv1d",
    "conv_transpose",
    "dead_channels",
    "examples",
    "feeds",
    "grouped",
    "inception",
    "kinds",
    "labelled",
    "mlp",
    "mobilenet",
    "no_bias",
    "no_layer",
    "odd_channels",
    "prelu",
    "resnet20",
    "rows",
    "run",
    "shared_weights",
    "slowly",
    "some",
    "transformer",
    "written_out",
]


def rows(model: onnx.ModelProto, n: int) -> np.ndarray:
    """`n` random samples as one array, for a model of one input."""
    return np.concatenate([next(iter(feed.values())) for feed in feeds(model, n)])


def labelled(n: int = 40, wrong: bool = False) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """A model, samples, and what the model says of them, or never says."""
    model = mlp()
    outputs = runtimes.outputs(runtimes.session(model), feeds(model, n))[0]
    return model, rows(model, n), outputs.argmin(-1) if wrong else outputs.argmax(-1)


LONG_CHECKS = ("check_odd_graphs", "check_targets")  # of the conformance kit
REPRESENTATIVES = ("mobilenet", "inception", "grouped", "transformer", "conv_transpose", "shared_weights")


def kinds(names: Iterable[str] = ZOO, *more: str) -> list:
    """Networks as parameters: one of each kind of structure in every run, and those that matter to the test (`more`); the
    others with the slow tests. `onnxq_plugins.testing` runs every pass on every network."""
    names = list(names)
    return some(names, *(name for name in REPRESENTATIVES if name in names), *more)


def some(values: Iterable, *kept: object) -> list:
    """Parameters of a test: those `kept` are in every run, the others with the slow tests."""
    values = list(values)
    assert all(value in values for value in kept), kept
    return [value if value in kept else slowly(value)[0] for value in values]


def slowly(*values: object) -> list:
    """Parameters of a test that run with the slow tests only: others state the same."""
    return [pytest.param(*(v if isinstance(v, tuple) else [v]), marks=pytest.mark.slow) for v in values]


def examples(n: int) -> settings:
    """Settings of a property test: the same examples in every run. All `n` of them where slow tests run too (pytest -m ""),
    a quarter elsewhere, but ten at least."""
    few = n if os.environ.get("ONNXQ_SLOW") else max(min(n, 10), n // 4)
    return settings(
        max_examples=few,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
