"""Peak memory of quantizing a large model against a limit: one and a half times the largest layer plus 1 GB.

    python -m benchmarks.large [--layers 12] [--size 8192] [--runs 4 8 calibrated] [--folder FOLDER]

A chain of MatMuls of size x size with external data (4 * layers * size^2 bytes; 3.2 GB by default) is created in a
temporary folder, and each run has its own process: 4 or 8 bits, weights only; or ``calibrated``, 8 bits with activations, on
four samples. `own MB` excludes pages of files, which the system reclaims when others need memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import onnxq_plugins as onnxq
from benchmarks.int8 import machine

WEIGHTS = {"activations": {"bits": 32}}


def chain(folder: Path, layers: int, size: int) -> Path:
    """Write a chain of MatMul and Relu with its weights as external data, one layer at a time."""
    tile = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
    nodes, weights, x = [], [], "x"
    with open(folder / "weights.bin", "wb") as stream:
        for n in range(layers):
            weight = TensorProto(
                name=f"w{n}", data_type=TensorProto.FLOAT, dims=tile.shape, data_location=TensorProto.EXTERNAL
            )
            for key, value in (("location", "weights.bin"), ("offset", stream.tell()), ("length", tile.nbytes)):
                weight.external_data.add(key=key, value=str(value))
            stream.write(np.roll(tile, 7 * n, axis=0).data)
            weights.append(weight)
            nodes += [
                helper.make_node("MatMul", [x, f"w{n}"], [f"y{n}"], f"layer{n}"),
                helper.make_node("Relu", [f"y{n}"], [f"r{n}"], f"relu{n}"),
            ]
            x = f"r{n}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "float.onnx"
    onnx.save(model, path)
    return path


def child(model: str, output: str, run: str) -> None:
    """Quantize, and print the peaks in MB, seconds, and the summary."""
    start, own, done = time.perf_counter(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text("ascii")
            own[0] = max(own[0], int(status.partition("RssAnon:")[2].split()[0]) // 1024)

    threading.Thread(target=watch, daemon=True).start()
    recipe, data = WEIGHTS | {"weights": {"bits": int(run), "block": 32}} if run.isdigit() else "int8", None
    if run == "calibrated":
        size = onnx.load(model, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[1].dim_value
        data = np.random.default_rng(0).standard_normal((4, size), dtype=np.float32)
    result = onnxq.quantize(model, recipe, data, output=output)
    done.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{peak:.0f} {own[0]} {time.perf_counter() - start:.1f} {result.summary}")


def measured(model: Path, run: str) -> tuple[float, float, float, str]:
    """Peak in MB, the same without pages of files, seconds and summary of a run in its own process."""
    command = [sys.executable, "-m", "benchmarks.large", "--child", str(model), str(model.with_name("q.onnx")), run]
    figures = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    ).stdout.split(" ", 3)
    return float(figures[0]), float(figures[1]), float(figures[2]), figures[3].strip()


def limit(size: int) -> float:
    """One and a half times a layer plus 1 GB, in MB."""
    return 1.5 * 4 * size**2 / 2**20 + 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--runs", nargs="+", choices=["4", "8", "calibrated"], default=["4", "8", "calibrated"])
    parser.add_argument("--folder", help="where to create the temporary folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = chain(Path(folder), args.layers, args.size)
        print(f"{machine()}; {args.layers} layers of {4 * args.size**2 / 2**20:.0f} MB\n")
        print("| run | peak MB | own MB | limit MB | seconds | |\n|---|---|---|---|---|---|")
        for run in args.runs:
            peak, own, seconds, summary = measured(model, run)
            line = summary.replace("|", ",")
            label = f"{run} bits, weights only" if run.isdigit() else "8 bits, calibrated"
            print(f"| {label} | {peak:.0f} | {own:.0f} | {limit(args.size):.0f} | {seconds:.1f} | {line} |", flush=True)


if __name__ == "__main__":
    main()
