"""Peak memory of calibration compared with plain inference on 256 images, each in its own process.

python -m benchmarks.calibration_memory [--shared FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.models import peak_memory, shared_folder

COUNT = 256


def images(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The first 256 images, one at a time, so that the data itself takes no memory."""
    from PIL import Image

    for file in sorted(f for f in folder.iterdir() if f.suffix == ".jpg")[:COUNT]:
        pixels = np.asarray(Image.open(file).convert("RGB"), np.float32)
        yield {"input": (pixels.transpose(2, 0, 1) / 127.5 - 1)[None]}


class Images:
    """`images` as a re-iterable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return images(self.folder)


def child(what: str, shared: Path) -> None:
    model, folder = shared / "models" / "mobilenet_v1_0.75_224.onnx", shared / "data" / "imagenet500"
    start = time.perf_counter()
    if what.startswith("inference"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1 if what.endswith("1 thread") else 2
        runner = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for feed in images(folder):
            runner.run(None, feed)
    else:
        from onnxq_plugins import Calibration, load, open_data
        from onnxq_plugins.data import graph_inputs

        graph = load(model)
        data = open_data(Images(folder), graph_inputs(graph))
        calibration = Calibration(graph, data, workers=1 if what.endswith("1 worker") else 2)
        names = list(dict.fromkeys([*(y.input for y in graph.layers), *(y.result for y in graph.layers)]))
        if what.startswith("ranges"):
            calibration.ranges(names)
        else:
            calibration.histograms(names)
    print(f"{peak_memory():.0f} {time.perf_counter() - start:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shared = shared_folder(args.shared)
    if args.child:
        child(args.child, shared)
        return
    print(f"MobileNetV1 0.75, {COUNT} images\n\n| what | peak MB | ratio | seconds |\n|---|---|---|---|")
    base = 0.0
    for what in (
        "inference, 1 thread",
        "inference, 2 threads",
        "ranges, 1 worker",
        "histograms, 1 worker",
        "histograms, 2 workers",
    ):
        command = [sys.executable, "-m", "benchmarks.calibration_memory", "--shared", str(shared), "--child", what]
        peak, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        base = base or float(peak)
        print(f"| {what} | {peak} | {float(peak) / base:.2f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
