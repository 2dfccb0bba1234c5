"""The small models of `onnxq_plugins.testing`, and settings of property tests."""

from hypothesis import settings

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
    "mlp",
    "mobilenet",
    "no_bias",
    "no_layer",
    "odd_channels",
    "prelu",
    "resnet20",
    "run",
    "shared_weights",
    "transformer",
    "written_out",
]


def examples(n: int) -> settings:
    """Settings of a property test: the same `n` examples in every run."""
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)
