"""Tests are about models, not about the machine: where kernels can saturate, sessions run the same integers exactly. And
what other packages compute from their arguments alone, slowly, is computed once a process."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import pytest
import scipy.linalg  # noqa: F401  its BLAS is among the libraries that have threads
import threadpoolctl
from rich.console import Console
from threadpoolctl import ThreadpoolController

from onnxq_plugins import cli, engine, files, plugins, runtimes
from onnxq_plugins.export import provenance
from onnxq_plugins.graph import Graph
from onnxq_plugins.runtimes import onnxruntime
from onnxq_plugins.testing.exact import exact_model, saturates
from tests.cli.folder import Ran

# what a user, or an earlier run, measured on this machine is no test's
os.environ["ONNXQ_CACHE"] = str(Path(tempfile.gettempdir()) / f"onnxq-none-{os.getpid()}")
_session = runtimes.session
_profile = onnxruntime.profile  # no test looks at a clock: no more runs than it needs
_convert = onnx.version_converter.convert_version
_SMALL = 2**22  # bytes


def _exact_session(model: onnx.ModelProto | bytes | str | Path, **options: Any) -> runtimes.Session:
    """A session whose kernels saturate nowhere; one for all that just run the same small model, and one for all calibrations
    of it. An audit (`dump`) is about the kernels of the model itself."""
    if isinstance(model, onnx.ModelProto) and set(options) == {"lean", "weights"}:
        return _of_weights(model, options["weights"])
    if any(options.get(name) for name in ("dump", "folder", "weights")):
        return _session(model, **options)
    if saturates() and isinstance(model, (str, Path)) and Path(model).is_file():
        model = onnx.load(str(model))
    if isinstance(model, onnx.ModelProto) and files.size_of(model) < _SMALL:
        model = model.SerializeToString()
    optimize = options.get("optimize", True)
    if isinstance(model, bytes) and not any(value for name, value in options.items() if name != "optimize"):
        return _of_bytes(model, optimize)
    return _session(_exact(model) if optimize else model, **options)


@functools.lru_cache(maxsize=256)
def _of_bytes(model: bytes, optimize: bool) -> runtimes.Session:
    return _session(_exact(model) if optimize else model, optimize=optimize)


_calibrations: dict[bytes, runtimes.Session] = {}


def _of_weights(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> runtimes.Session:
    """A session that reduces activations; the last 128 are kept, if small."""
    if files.size_of(model) + sum(array.nbytes for array in weights.values()) > _SMALL:
        return _session(model, lean=True, weights=weights)
    digest = hashlib.blake2b(model.SerializeToString(deterministic=True))
    for name, array in weights.items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    key = digest.digest()
    if key not in _calibrations:
        copies = {name: array.copy() for name, array in weights.items()}  # the session uses them in place
        _calibrations[key] = _session(model, lean=True, weights=copies)
        while len(_calibrations) > 128:
            del _calibrations[next(iter(_calibrations))]
    return _calibrations[key]


_load = engine.load
_graphs: dict[tuple[bytes, bool, bool], Graph] = {}


def _copy_of_graph(model: onnx.ModelProto | Graph | str | Path, *, float32: bool = False, flatten: bool = True) -> Graph:
    """What `quantize` imports, once for each small model; tests/graph is about the import itself."""
    if not isinstance(model, onnx.ModelProto) or files.size_of(model) > _SMALL:
        return _load(model, float32=float32, flatten=flatten)
    key = model.SerializeToString(), float32, flatten
    if key not in _graphs:
        graph = _load(model, float32=float32, flatten=flatten)
        _graphs[key] = graph.copy()
        while len(_graphs) > 128:
            del _graphs[next(iter(_graphs))]
        return graph
    return _graphs[key].copy()


def _exact(model: onnx.ModelProto | bytes | str | Path) -> onnx.ModelProto | bytes | str | Path:
    proto = onnx.load_from_string(model) if isinstance(model, bytes) and saturates() else model
    return exact_model(proto) if isinstance(proto, onnx.ModelProto) else model


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end, and small models leave little: the garbage collector need not look often."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" not in config.option.markexpr:
        os.environ["ONNXQ_SLOW"] = "1"  # read by tests.zoo.examples, in xdist's workers too


_entry_points = functools.cache(entry_points)
_version = functools.cache(version)
_libraries = functools.cache(ThreadpoolController)


@functools.lru_cache(maxsize=512)
def _converted(model: bytes, version: int) -> bytes:
    return bytes(_convert(onnx.ModelProto.FromString(model), version).SerializeToString())


@pytest.fixture(scope="session", autouse=True)
def machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "session", _exact_session)
        patch.setattr(engine, "load", _copy_of_graph)
        patch.setattr(onnxruntime, "profile", lambda models, feed, seconds, **more: _profile(models, feed, 0.0, **more))
        patch.setattr(runtimes, "trim", lambda: None)  # sessions of small models leave nothing behind that is worth the time
        patch.setattr(plugins, "entry_points", _entry_points)
        patch.setattr(provenance, "version", _version)
        patch.setattr(threadpoolctl, "ThreadpoolController", _libraries)
        patch.setattr(
            onnx.version_converter,
            "convert_version",
            lambda model, version: onnx.ModelProto.FromString(_converted(model.SerializeToString(), version)),
        )
        yield


@pytest.fixture(scope="module")
def own_kernels(machine: None) -> Iterator[None]:
    """The kernels of this machine, whatever they saturate: for comparisons with what other processes compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "session", _session)
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies are measured for 20 ms."""
    latency = runtimes.latency
    monkeypatch.setattr(runtimes, "latency", lambda runners, feed, seconds=1.0: latency(runners, feed, 0.02))


@pytest.fixture
def onnxq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, quick: None) -> Callable[..., Ran]:
    """Runs the command line in an empty folder, without installed plugins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli.console, "out", Console(soft_wrap=True, width=300))  # tables would wrap at 80

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["onnxq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ran(int(caught.value.code or 0), *capsys.readouterr())

    return call
