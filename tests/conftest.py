"""Tests are about models, not about the machine: where kernels can saturate, sessions run the same integers exactly. And
what other packages compute from their arguments alone, slowly, is computed once a process."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
import pytest

from onnxq_plugins import plugins, runtimes
from onnxq_plugins.export import provenance
from onnxq_plugins.testing.exact import saturates, unsigned_weights

_session = runtimes.session
_convert = onnx.version_converter.convert_version


def _exact(model: onnx.ModelProto | bytes | str | Path, **options: Any) -> runtimes.Session:
    if options.get("optimize", True) and not options.get("folder") and not options.get("weights"):
        if isinstance(model, bytes):
            model = onnx.load_from_string(model)
        elif isinstance(model, (str, Path)) and Path(model).is_file():
            model = onnx.load(str(model))
        model = unsigned_weights(model) if isinstance(model, onnx.ModelProto) else model
    return _session(model, **options)


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" not in config.option.markexpr:
        os.environ["ONNXQ_SLOW"] = "1"  # read by tests.zoo.examples, in xdist's workers too


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> Sequence[EntryPoint]:
    return entry_points(group=group)


@functools.cache
def _version(name: str, path: tuple[str, ...]) -> str:
    return version(name)


@functools.lru_cache(maxsize=512)
def _converted(model: bytes, version: int) -> bytes:
    return bytes(_convert(onnx.ModelProto.FromString(model), version).SerializeToString())


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    if saturates():
        monkeypatch.setattr(runtimes, "session", _exact)
    monkeypatch.setattr(plugins, "entry_points", lambda group: _entry_points(group, tuple(sys.path)))
    monkeypatch.setattr(provenance, "version", lambda name: _version(name, tuple(sys.path)))
    monkeypatch.setattr(
        onnx.version_converter,
        "convert_version",
        lambda model, version: onnx.ModelProto.FromString(_converted(model.SerializeToString(), version)),
    )
