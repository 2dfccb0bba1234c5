"""Bytes of small files: the float model, what onnxruntime's tools make of it, and recipe int8 with all names and with short
ones. Whether both compute the same to the last bit.

    python -m benchmarks.size FOLDER [MODEL ...] [--samples 6]

FOLDER as in `benchmarks.zoo`. The number of samples hardly matters for the size. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import onnxq_plugins
from benchmarks.zoo import Feeds, open_folder
from benchmarks.zoo_work import dynamic, static
from onnxq_plugins import runtimes

COLUMNS = ("network", "float", "onnxruntime static", "dynamic", "`--names keep`", "int8", "same outputs")


def row(name: str, path: Path, feeds: Feeds) -> list[str]:
    """One line of the table."""

    def kilobytes(make: Callable[[Path], object]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.onnx"
            try:
                make(out)
            except Exception:  # of many types
                return "fails"
            return f"{out.stat().st_size / 1e3:.0f}"

    theirs = [kilobytes(lambda out, tool=tool: tool(path, out, feeds)) for tool in (static, dynamic)]  # type: ignore[misc]
    keep, short = (onnxq_plugins.quantize(path, "int8", feeds, names=names).model for names in ("keep", "short"))
    one, other = (runtimes.session(model).run(None, feeds[0]) for model in (keep, short))
    same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True))
    ours = [f"{model.ByteSize() / 1e3:.0f}" for model in (keep, short)]
    return [name, f"{path.stat().st_size / 1e3:.0f}", *theirs, *ours, "yes" if same else "no"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--samples", type=int, default=6)
    args = parser.parse_args()
    folder = open_folder(args.folder)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in args.models or folder.names:
        feeds = list(folder.feeds(name, "calib"))[: args.samples]
        print(f"| {' | '.join(row(name, folder.path(name), feeds))} |", flush=True)


if __name__ == "__main__":
    main()
