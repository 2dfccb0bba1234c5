"""Tests are about models, not about the processor: where kernels can saturate, sessions run the same integers exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxq_plugins import runtimes
from onnxq_plugins.testing.exact import saturates, unsigned_weights

_session = runtimes.session


def _exact(model: onnx.ModelProto | bytes | str | Path, **options: Any) -> runtimes.Session:
    if options.get("optimize", True) and not options.get("folder") and not options.get("weights"):
        if isinstance(model, bytes):
            model = onnx.load_from_string(model)
        elif isinstance(model, (str, Path)) and Path(model).is_file():
            model = onnx.load(str(model))
        model = unsigned_weights(model) if isinstance(model, onnx.ModelProto) else model
    return _session(model, **options)


if saturates():

    @pytest.fixture(autouse=True)
    def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtimes, "session", _exact)
