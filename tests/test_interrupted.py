"""Runs that are killed, and runs that share a cache: the next one gives the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.files import load_arrays, save_arrays
from tests import zoo

ROOT = Path(__file__).parent.parent
MIXED = ["mixed-precision.curve=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with their data."""
    made = tmp_path_factory.mktemp("inputs")
    for name in ("mobilenet", "inception"):
        model = zoo.ZOO[name]()
        (made / f"{name}.onnx").write_bytes(model.SerializeToString())
        np.savez(made / f"{name}.npz", **zoo.batch(zoo.feeds(model, 48)))
    return made


def start(folder: Path, output: Path, cache: Path, name: str = "mobilenet") -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "onnxq_plugins.cli",
            "quantize",
            str(folder / f"{name}.onnx"),
            "--data",
            str(folder / f"{name}.npz"),
            "-o",
            str(output),
            "--workers",
            "2",
            "-r",
            "mixed",
            *(part for setting in MIXED for part in ("--set", setting)),
            "--cache",
            str(cache),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(run: subprocess.Popen) -> None:
    errors = run.communicate()[1]
    assert run.returncode == 0, errors.decode()


@pytest.fixture(scope="module")
def wanted(own_kernels: None, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What undisturbed runs without a cache write."""
    written = {}
    for name in ("mobilenet", "inception"):
        path = tmp_path_factory.mktemp("wanted") / "m.onnx"
        quantize(folder / f"{name}.onnx", "mixed", folder / f"{name}.npz", settings=MIXED, output=path, workers=2)
        written[name] = path.read_bytes()
    return written


def files(cache: Path, end: str) -> int:
    return len(list(cache.glob(f"*{end}")))


MOMENTS: dict[str, Callable[[Path, Path], bool]] = {
    "within calibration": lambda cache, out: files(cache, ".part.npz") > 0,
    "after calibration": lambda cache, out: files(cache, "-ranges.npz") > 0,
    "first codes": lambda cache, out: files(cache, "-codes.npz") > 0,
    "most codes": lambda cache, out: files(cache, "-codes.npz") > 12,
    "first scores": lambda cache, out: files(cache, "-scores.npz") > 0,
    "export": lambda cache, out: any(out.iterdir()),
}


FEW = ["first codes", "export"]


@pytest.mark.parametrize("moments", [FEW, pytest.param(list(MOMENTS), marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_rerun_gives_the_same_bytes(
    folder: Path, wanted: dict[str, bytes], tmp_path: Path, moments: list[str]
) -> None:
    """One cache through all kills: each run goes on where the one before was killed."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    killed = 0
    for moment in (MOMENTS[name] for name in moments):
        run = start(folder, out / "m.onnx", cache)
        while run.poll() is None and not moment(cache, out):
            time.sleep(0.001)
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            killed += 1
        run.communicate()
        made = out / "m.onnx"
        assert not made.exists() or made.read_bytes() == wanted["mobilenet"]  # all or nothing
        made.unlink(missing_ok=True)
    assert killed >= len(moments) - 1  # the last moment may pass too quickly
    finish(start(folder, out / "m.onnx", cache))
    assert (out / "m.onnx").read_bytes() == wanted["mobilenet"]


def test_processes_that_share_a_cache_do_not_disturb_each_other(
    folder: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    names = ["mobilenet", "inception", "mobilenet"]
    runs = [start(folder, tmp_path / f"{i}.onnx", cache, name) for i, name in enumerate(names)]
    for run in runs:
        finish(run)
    for i, name in enumerate(names):
        assert (tmp_path / f"{i}.onnx").read_bytes() == wanted[name]
    assert not [f.name for f in cache.iterdir() if f.name.startswith(".") or f.name.endswith(".part.npz")]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["cache", *(f"{i}.onnx" for i in range(len(names)))])


def test_threads_that_write_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    file, failures = tmp_path / "a.npz", []

    def write(number: int) -> None:
        try:
            for _ in range(30):
                save_arrays(file, {"a": np.full(20000, number)})
                found = load_arrays(file)
                assert found and len(set(found["a"].tolist())) == 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    class Bad:
        def __array__(self, *args: object, **more: object) -> np.ndarray:
            raise OSError(28, "No space left on device")

    with pytest.raises(OnnxqError, match="No space left"):
        save_arrays(tmp_path / "a.npz", {"a": Bad()})
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_runs_in_a_cache_are_removed_once_old(tmp_path: Path) -> None:
    """A killed writer leaves its temporary file; a later run clears it away, but not that of a writer at work."""
    model, data = zoo.mlp(), zoo.feeds(zoo.mlp(), 3)
    old, new = tmp_path / ".x.npz.abc.part", tmp_path / ".y.npz.def.part"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 90000,) * 2)
    (tmp_path / "mine.txt").write_text("kept")
    quantize(model, "int8", data, cache=tmp_path)
    assert not old.exists() and new.exists() and (tmp_path / "mine.txt").exists()
