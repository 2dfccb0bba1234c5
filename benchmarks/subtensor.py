"""Subtensors on a network whose channels differ in range: one scale per tensor, a few, one per channel.

    python -m benchmarks.subtensor [--shared FOLDER] [--model mobilenet_v1_0.75_224] [--clusters 1 2 4 8]

SQNR and top-1 on samples that calibration never saw, kernels, and latency at batch 1, one thread, all models in turn. "as
channels" realises the subtensors as scales per channel with that many values, "as layers" as layers with one scale per
tensor.
Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import load_case, shared_folder
from onnxq_plugins import measure, runtimes


def recipe(block: str, *passes: dict[str, Any]) -> dict[str, Any]:
    """8-bit weights at some granularity, with `passes` between ranges and bias correction."""
    return {
        "weights": {"bits": 8, "block": block},
        "pass": [{"use": "ranges", "method": "mse"}, *passes, {"use": "bias-correct"}],
    }


def variants(counts: list[int], gains: list[float], balances: list[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and recipe of each row."""
    yield "one scale per tensor", recipe("tensor")
    for balance in balances:
        for k in counts:
            step = {"use": "subtensor", "clusters": k, "balance": balance}
            yield f"{k} as channels, balance {balance:g}", recipe("tensor", step)
    for gain in gains:
        for k in counts:
            yield (
                f"{k} as layers, gain {gain:g}",
                recipe("tensor", {"use": "subtensor", "clusters": k, "split": True, "gain": gain}),
            )
    yield "one scale per channel", recipe("channel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--model", default="mobilenet_v1_0.75_224")
    parser.add_argument("--clusters", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--gains", type=float, nargs="*", default=[2.0, 20.0], help="of the subtensors as layers")
    parser.add_argument("--balances", type=float, nargs="*", default=[0.0, 1.0], help="of the subtensors as channels")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per model")
    args = parser.parse_args()
    case = load_case(args.model, shared_folder(args.shared))
    feeds = [{case.input: x[None]} for x in case.test]
    runners = {"float": runtimes.session(case.path)}
    reference = runtimes.outputs(runners["float"], feeds)[0]
    cells = {"float": f"- | {_top1(reference, case.labels):.2f} | - | {case.path.stat().st_size / 1e6:.2f} | "}
    for label, variant in variants(args.clusters, args.gains, args.balances):
        result = onnxq.quantize(case.path, variant, case.feeds())
        runners[label] = runtimes.session(result.model)
        logits = runtimes.outputs(runners[label], feeds)[0]
        clustered = next((step["result"]["layers"] for step in result.report["steps"] if step["pass"] == "subtensor"), {})
        audit = onnxq.audit_model(result.model)
        movers = ", ".join(
            f"{audit.other[op]} {op}"
            for op in ("QLinearConcat", "Concat", "Gather", "Split", "Slice", "Transpose")
            if audit.other.get(op)
        )
        cells[label] = (
            f"{measure.sqnr(reference, logits):.2f} | {_top1(logits, case.labels):.2f} | {len(clustered)} | "
            f"{result.model.ByteSize() / 1e6:.2f} | {audit.summary}; {movers}"
        )
    times = runtimes.latency(list(runners.values()), feeds[0], args.seconds * len(runners))
    print(f"{machine()}\n\n{case.name}, {len(feeds)} test samples\n")
    print("| weights | SQNR dB | top-1 | layers clustered | MB | kernels | ms |\n|---|---|---|---|---|---|---|")
    for label, ms in zip(runners, times, strict=True):
        print(f"| {label} | {cells[label]} | {ms:.2f} |", flush=True)


def _top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(logits.argmax(1) == labels))


if __name__ == "__main__":
    main()
