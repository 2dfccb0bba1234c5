"""What the sample plugins of docs/samples gain, and what they cost.

    python -m benchmarks.guests side FOLDER [--model minilm] [--seconds 10]
    python -m benchmarks.guests npu FOLDER [MODEL ...]
    python -m benchmarks.guests loading [--other CHECKOUT] [--times 15]

side     int8 with acme.side-path beside int8: SQNR on samples that neither was made from, time of the processor, in turn
npu      files for acme.edge in onnxruntime beside the same plan exported for ort-cpu: SQNR of both on such samples
loading  milliseconds of the processor for importing the package and for `find_plugins`, here and in another checkout

FOLDER as in benchmarks.zoo. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.int8 import machine
from benchmarks.zoo import open_folder
from onnxq_plugins import OnnxqError, Result, quantize, runtimes
from onnxq_plugins.export.qdq import export
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.targets import ORT_CPU
from onnxq_plugins.targets.misfits import misfits

ROOT = Path(__file__).parents[1]
LOADING = """
import time
begin = time.process_time()
import onnxq_plugins
from onnxq_plugins.plugins import find_plugins
middle = time.process_time()
for _ in range(20):
    find_plugins()
print(1e3 * (middle - begin), 1e3 * (time.process_time() - middle) / 20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("side", "npu", "loading"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing")
    parser.add_argument("--other", type=Path, default=None, help="another checkout")
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args()
    print(f"{machine()}\n")
    if args.what == "loading":
        loading([ROOT, *([args.other] if args.other else [])], args.times)
        return
    for sample in ("acme-side", "acme-edge"):
        sys.path.insert(0, str(ROOT / "docs" / "samples" / sample))
    if args.what == "side":
        side(args.folder, args.model, args.seconds)
    else:
        npu(args.folder, args.models)


def side(folder: Path, name: str, seconds: float) -> None:
    """The side path beside int8."""
    import acme_side

    zoo = open_folder(folder)
    feeds, unseen = zoo.feeds(name, "calib"), zoo.feeds(name, "test")
    recipes = {"int8": "int8", "with acme.side-path": acme_side.onnxq_recipes()["acme.side"]}
    results = {
        key: quantize(zoo.path(name), recipe, feeds, plugins=[acme_side], check=False) for key, recipe in recipes.items()
    }
    runners = [runtimes.session(result.model) for result in results.values()]
    pairs = [tuple(runtimes.wanted(runner, feed) for runner in runners) for feed in unseen]
    spent = in_turn(runners, pairs, seconds)
    print(f"| {name} | dB | kB | ms | times int8's latency | layers split |\n|{'---|' * 6}")
    for key, result, milliseconds in zip(results, results.values(), spent, strict=True):
        ratio = milliseconds / spent[0]
        split = next((len(s["result"]["layers"]) for s in result.report.steps if s["pass"] == "acme.side-path"), 0)
        decibels, size = _sqnr(zoo.path(name), result.model, unseen), result.model.ByteSize() / 1e3
        print(f"| {key} | {decibels:.1f} | {size:.0f} | {milliseconds:.2f} | {ratio:.2f} | {split} |")


def in_turn(runners: Sequence[runtimes.Session], feeds: Sequence[tuple], seconds: float) -> list[float]:
    """Milliseconds of processor time of a run of each session on one thread; means over runs in turn, in
    which other processes do not count."""
    times: list[list[float]] = [[] for _ in runners]
    while sum(map(sum, times)) < seconds:
        for each in feeds:
            for runner, feed, spent in zip(runners, each, times, strict=True):
                begin = time.thread_time()
                runner.run(None, dict(feed))
                spent.append(time.thread_time() - begin)
    return [1e3 * float(np.mean(spent)) for spent in times]


def npu(folder: Path, names: Sequence[str]) -> None:
    """Files for the NPU beside the same plan for ort-cpu."""
    import acme_edge

    zoo = open_folder(folder)
    print(f"| model | acme.edge dB | same plan, ort-cpu dB | layers | file fits |\n|{'---|' * 5}")
    for name in names or zoo.names:
        feeds, unseen = zoo.feeds(name, "calib")[:32], zoo.feeds(name, "test")[:32]
        try:
            result = quantize(zoo.path(name), "int8", feeds, target="acme.edge", plugins=[acme_edge], check=False)
        except OnnxqError as error:
            print(f"| {name} | {str(error).splitlines()[0]} | | | |", flush=True)
            continue
        planned = sum(layer.weight in result.plan for layer in result.graph.layers)
        here = _sqnr(zoo.path(name), same_plan(result), unseen)
        fits = "; ".join(misfits(acme_edge.EDGE, result.model)) or "yes"
        cells = f"{_sqnr(zoo.path(name), result.model, unseen):.2f} | {here:.2f} | {planned}/{len(result.graph.layers)}"
        print(f"| {name} | {cells} | {fits} |", flush=True)


def same_plan(result: Result) -> object:
    """The plan of a result as a file for ort-cpu: uint8 codes of activations, whose zero point is 128."""
    return export(result.graph, result.plan, replace(ORT_CPU, symmetric=True))


def _sqnr(path: Path, model: object, feeds: Sequence[dict[str, np.ndarray]]) -> float:
    runners = runtimes.session(path), runtimes.session(model, written=True)
    reference, found = (
        [runtimes.joined(values) for values in runtimes.per_feed(runner, [runtimes.wanted(runner, x) for x in feeds])]
        for runner in runners
    )
    return worst_sqnr(reference, found)


def loading(checkouts: Sequence[Path], times: int) -> None:
    """Medians in turn."""
    found: dict[Path, list[list[float]]] = {checkout: [] for checkout in checkouts}
    for _ in range(times):
        for checkout in checkouts:
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            run = subprocess.run(
                [sys.executable, "-c", LOADING], env=environment, cwd=checkout, capture_output=True, text=True, check=True
            )
            found[checkout].append([float(text) for text in run.stdout.split()])
    print("| checkout | import ms | find_plugins ms | least |\n|---|---|---|---|")
    for checkout, rows in found.items():
        (begin, find), least = np.median(rows, axis=0), np.min(rows, axis=0)
        print(f"| {checkout.name} | {begin:.0f} | {find:.2f} | {least[0]:.0f}, {least[1]:.2f} |")


if __name__ == "__main__":
    main()
