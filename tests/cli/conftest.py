"""The command line beside a model and its samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.folder import Ran, write_data, write_model


@pytest.fixture
def ready(onnxq: Callable[..., Ran]) -> Callable[..., Ran]:
    """The command line in a folder with model.onnx and data.npz."""
    write_model()
    write_data()
    return onnxq
