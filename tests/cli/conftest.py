"""The command line, run in an empty folder or beside a model and its samples."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from onnxq_plugins import cli, plugins, runtimes
from tests.cli.folder import Ran, write_data, write_model


@pytest.fixture
def onnxq(monkeypatch, capsys, tmp_path) -> Callable[..., Ran]:
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli.console, "out", Console(soft_wrap=True, width=300))  # tables would wrap at 80
    latency = runtimes.latency
    monkeypatch.setattr(runtimes, "latency", lambda runners, feed, seconds=1.0: latency(runners, feed, 0.02))

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["onnxq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ran(int(caught.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def ready(onnxq) -> Callable[..., Ran]:
    """The command line in a folder with model.onnx and data.npz."""
    write_model()
    write_data()
    return onnxq
