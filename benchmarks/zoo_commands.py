"""Every command of the command line on every model: how it ends, and whether it shows a traceback."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RECIPES = ("int8", "int8-rounded", "int4-storage")
_CALLABLE = """import pickle
from pathlib import Path


def {split}():
    return pickle.loads((Path(__file__).parent / "{split}.pickle").read_bytes())
"""


def commands(model: str, data: str, test: str) -> dict[str, list[str]]:
    """Column of the table -> arguments of onnxq, in an order in which each has the files it needs."""
    made = "int8.onnx"
    return {
        "check": ["check", "int8", model, "--data", data],
        **{r: ["quantize", model, "-r", r, "--data", data, "-o", f"{r}.onnx"] for r in RECIPES},
        "auto": ["auto", model, "--data", data, "-o", "auto.onnx"],
        "audit": ["audit", made, "--against", model],
        "audit --data": ["audit", made, "--against", model, "--data", data],
        "compare": ["compare", model, made, "--data", test],
        "diagnose": ["diagnose", model, "--data", data],
        "report": ["quantize", model, "--data", data, "-o", "r.onnx", "--report", "r.html", "--test", test],
    }


def write_source(feeds: list[dict[str, np.ndarray]], split: str, folder: Path) -> str:
    """Feeds as --data takes them: an .npz with the samples in front, or a callable where they cannot be stacked."""
    first = feeds[0]
    alike = all(
        {k: (v.shape, v.dtype) for k, v in f.items()} == {k: (v.shape, v.dtype) for k, v in first.items()} for f in feeds
    )
    if alike and all(x.dtype != object for x in first.values()):
        np.savez(folder / f"{split}.npz", **{key: np.stack([feed[key] for feed in feeds]) for key in first})
        return f"{split}.npz"
    (folder / f"{split}.pickle").write_bytes(pickle.dumps(feeds))
    (folder / f"feeds_{split}.py").write_text(_CALLABLE.format(split=split))
    return f"feeds_{split}:{split}"


def run_commands(folder: Any, names: list[str], samples: int, timeout: int) -> None:
    """Print a table of exit codes, T beside them for a traceback, and the last line of what failed."""
    columns = list(commands("", "", ""))
    print(f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}", flush=True)
    failures = []
    for name in names:
        codes, lines = _codes(folder, name, samples, timeout)
        print(f"| {name} | {' | '.join(codes)} |", flush=True)
        failures += lines
    print("\n" + "\n".join(failures or ["nothing failed"]))


def _codes(folder: Any, name: str, samples: int, timeout: int) -> tuple[list[str], list[str]]:
    """The cells of a model, and a line about each command that failed."""
    codes, lines = [], []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        try:
            sources = []
            for split in ("calib", "test"):
                feeds = [{k: np.asarray(v) for k, v in feed.items()} for feed in folder.feeds(name, split)]
                feeds = feeds[:: max(1, len(feeds) // samples)][:samples] if samples else feeds
                sources.append(write_source(feeds, split, scratch))
            calls = commands(str(folder.path(name).resolve()), *sources)
        except Exception as error:  # of the folder's own code
            return ["-"] * len(commands("", "", "")), [f"{name}: feeds: {type(error).__name__}: {error}"]
        for column, arguments in calls.items():
            code, text = _run(arguments, scratch, timeout)
            codes.append(f"{code}{' T' if 'Traceback' in text else ''}")
            if code != "0" or "Traceback" in text:
                said = [line for line in text.splitlines() if line.strip()] or [""]
                lines.append(f"{name}: {column}: {code}: {said[-1].strip()[:300]}")
    return codes, lines


def _run(arguments: list[str], folder: Path, timeout: int) -> tuple[str, str]:
    """Exit code and standard error of onnxq in a folder."""
    paths = [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "onnxq_plugins.cli", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return "stopped", f"after {timeout} s"
    return str(done.returncode), done.stderr
