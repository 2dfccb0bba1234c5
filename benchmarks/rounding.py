"""Solver against solver, at few bits: what each method of rounding weights gains and costs.

    python -m benchmarks.rounding [--shared FOLDER] [--bits 4 3 2] [--models ...] [--alone] [--multipliers 16]

Recipe int4-rounded with other methods and widths: first, last and depthwise layers at 8 bits, activations at 8. The rows
"plain" are the smallest scale without clipping and the nearest codes, without and with bias correction; "nearest" has the
searched scales, the solved biases and the weights fitted to the quantized inputs, but rounds to nearest, so that the rows
below it show what learned rounding itself adds. --all quantizes first and last layers like the others; --alone solves each
layer on float inputs (sequential = false). --multipliers N refines the scale of each channel by an integer for every N
inputs, and adds the methods by which pass vector-scale chooses them. Measured on samples that calibration never saw.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import runtimes
from onnxq_plugins.measure import agreement, sqnr

METHODS = ("nearest", "gpfq", "gptq", "descent", "attention", "adaround", "auto")


def recipe(bits: int, passes: list[dict[str, Any]], everywhere: bool, multipliers: int) -> dict[str, Any]:
    """Weights at `bits`, first, last and depthwise layers at 8 unless `everywhere`."""
    weights = {"bits": bits, **({"sub_block": multipliers} if multipliers else {})}
    kept = [{"kind": "depthwise", "weights": {"bits": 8}}]
    kept += [] if everywhere else [{"position": end, "weights": {"bits": 8}} for end in ("first", "last")]
    start = [{"use": "scale-inputs"}, {"use": "ranges", "method": "mse"}]
    return {"weights": weights, "pass": start + passes, "layer": kept}


def variants(alone: bool, multipliers: bool) -> dict[str, list[dict[str, Any]]]:
    """Label -> passes after the ranges."""
    extra = {"sequential": False} if alone else {}
    vectors = (
        {
            f"vector-scale {method} + bias": [{"use": "vector-scale", "method": method}, {"use": "bias-correct"}]
            for method in ("minmax", "mse")
        }
        if multipliers
        else {}
    )
    return {
        "plain": [],
        "plain + bias": [{"use": "bias-correct"}],
        **vectors,
        "scales + bias": [{"use": "sub-layer", "shift": True}, {"use": "bias-correct"}],
        **{method: [{"use": "round", "method": method, **extra}] for method in METHODS},
    }


def measure(case: Case, passes: dict[str, Any]) -> tuple[float, float, float, float]:
    """SQNR, agreement and top-1 in percent, seconds."""
    start = time.perf_counter()
    result = onnxq.quantize(case.path, passes, case.feeds())
    seconds = time.perf_counter() - start
    feeds = [{case.input: x[None]} for x in case.test]
    reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
    logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
    return (
        sqnr(reference, logits),
        100 * agreement(reference, logits),
        100 * float(np.mean(logits.argmax(1) == case.labels)),
        seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--methods", nargs="*", default=list(variants(False, True)))
    parser.add_argument("--multipliers", type=int, default=0)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    print(f"{machine()}\n")
    columns = [f"{bits} bits: SQNR dB | agree | top-1 | s" for bits in args.bits]
    for name in args.models:
        case = load_case(name, shared_folder(args.shared))
        print(f"| {name} | {' | '.join(columns)} |\n|---|{'---|' * 4 * len(columns)}")
        for label, passes in variants(args.alone, bool(args.multipliers)).items():
            if label in args.methods:
                figures = [measure(case, recipe(bits, passes, args.all, args.multipliers)) for bits in args.bits]
                cells = [f"{db:.2f} | {agree:.1f} | {top1:.2f} | {seconds:.1f}" for db, agree, top1, seconds in figures]
                print(f"| {label} | {' | '.join(cells)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
