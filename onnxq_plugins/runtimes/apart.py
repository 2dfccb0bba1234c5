"""Asking a runtime in another process: one of another Python, one of node, or one that may take its process with it.

A folder holds the question and the answer, so that neither side needs a package of the other: `job.json` and the samples as
raw arrays one way, `answer.json` and the outputs the other way."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

CHILDREN = Path(__file__).parent / "children"
Arrays = Mapping[str, Array]


def ask(
    command: Sequence[str | Path], who: str, file: Path, samples: Sequence[Arrays], seconds: float = 0, **settings: Any
) -> tuple[dict[str, Any], tuple[dict[str, Array], ...]]:
    """Run a program on a file and samples; its answer, and the outputs of each sample.

    command    the interpreter and the program; the folder follows
    who        the runtime, for messages
    seconds    after which it is stopped; 0: never
    settings   anything JSON holds

    The answer has what the program printed as "stdout" and "stderr". Raises OnnxqError with what the program says is wrong,
    and where it ends without an answer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        feeds = [_written(folder, f"sample{i}", feed) for i, feed in enumerate(samples)]
        (folder / "job.json").write_text(json.dumps({"file": str(file.resolve()), "samples": feeds, **settings}), "utf-8")
        try:
            done = subprocess.run(
                [*map(str, command), str(folder)],
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds or None,
                check=False,
            )
        except OSError as error:
            raise OnnxqError(f"{who}: '{command[0]}' cannot be started ({error.strerror}); give its path.") from error
        except subprocess.TimeoutExpired as error:
            raise OnnxqError(
                f"{who} did not end in {seconds:g} s on '{file.name}'; give fewer samples, or --set seconds=..."
            ) from error
        answer = folder / "answer.json"
        if not answer.is_file():
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            why = lines[-1][:300] if lines else "without a word"
            raise OnnxqError(f"{who} ended with code {done.returncode} on '{file.name}': {why.rstrip('.')}.")
        found: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        if "error" in found:
            found["error"] = " ".join(str(found["error"]).split())
        outputs = tuple(_read(folder, entry) for entry in found.pop("outputs", ()))
    return {**found, "stdout": done.stdout, "stderr": done.stderr}, outputs


def _written(folder: Path, prefix: str, feed: Arrays) -> dict[str, Any]:
    """Write arrays as files; what the other side needs to read them."""
    entries = {}
    for number, (name, value) in enumerate(feed.items()):
        if value.dtype.kind not in "fiub":
            raise OnnxqError(f"input '{name}' is of type {value.dtype}; other runtimes are asked with numbers alone.")
        file = folder / f"{prefix}_{number}.bin"
        file.write_bytes(np.ascontiguousarray(value).tobytes())
        entries[name] = {"file": str(file), "dtype": value.dtype.name, "shape": list(value.shape)}
    return entries


def _read(folder: Path, entries: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: np.fromfile(folder / entry["file"], np.dtype(entry["dtype"])).reshape(entry["shape"])
        for name, entry in entries.items()
    }
