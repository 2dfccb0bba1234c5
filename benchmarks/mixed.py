"""Mixed precision against one width for all, how stable its sensitivities are, and what its strategies cost.

    python -m benchmarks.mixed [--shared FOLDER] [--models NAME ...]

First table: weights of 8, 6, 4 and 3 bits everywhere, and mixtures of these at sizes in between, all rounded with GPTQ on
the float network's inputs; accuracy and SQNR on samples that calibration never saw. Second, on MobileNetV1 with candidates
W4A8, W8A8 and W8A16 (target npu): seconds of the whole run, and Kendall's tau of the list of sensitivities from 63 images
against the same list from 256 others, and from fractal images. Third: networks that each strategy measures to meet an SQNR.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import Result, load, measure, quantize, runtimes
from onnxq_plugins.solvers.pareto import STRATEGIES

BEFORE = [{"use": "scale-inputs"}, {"use": "ranges"}]
ALL = ["W3A8", "W4A8", "W6A8", "W8A8"]
HIGH = ["W4A8", "W8A8", "W8A16"]


def search(
    case: Case, data: Any, before: list[dict[str, Any]] | None = None, target: str = "ort-cpu", **settings: Any
) -> tuple[Result, dict[str, Any], float]:
    """Quantize; the result, what the pass reports, seconds of the pass."""
    steps = [*(before or []), *BEFORE, {"use": "mixed-precision", **settings}]
    result = quantize(case.path, {"target": target, "pass": steps}, data)
    step = result.report["steps"][-2]
    return result, step["result"], step["seconds"]


def homogeneous(case: Case) -> None:
    runner = runtimes.session(case.path)
    feeds = [{case.input: x[None]} for x in case.test]
    reference = runtimes.outputs(runner, feeds)[0]
    whole = 100 * np.mean(reference.argmax(1) == case.labels)
    print(f"\n| {case.name}, float top-1 {whole:.2f} | size, of 8 bits | top-1 | SQNR dB | s |\n|---|---|---|---|---|")
    rows: list[tuple[str, dict[str, Any]]] = [
        (f"W{bits}A8 everywhere", {"candidates": [f"W{bits}A8"], "limit": 1.0}) for bits in (8, 6, 4, 3)
    ]
    rows += [(f"mixed, size {limit}", {"limit": limit, "candidates": ALL}) for limit in (0.9, 0.75, 0.6, 0.5, 0.4)]
    for label, settings in rows:
        result, details, seconds = search(case, case.feeds(), curve=0, **settings)
        logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
        size = next(p["size"] for p in details["curve"] if "chosen" in p)
        print(
            f"| {label} | {size:.3f} | {100 * np.mean(logits.argmax(1) == case.labels):.2f} | "
            f"{measure.sqnr(reference, logits):.2f} | {seconds:.1f} |",
            flush=True,
        )
    for name in ("coding-length", "orthogonality"):
        steps = [{"use": name, "limit": 0.75}, *BEFORE, {"use": "round", "method": "gptq", "sequential": False}]
        result = quantize(case.path, {"pass": steps}, case.feeds())
        logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
        sizes = [(float(y["parameters"]), y) for y in result.report["layers"]]
        bits = {y.name: result.plan[y.weight].bits for y in load(case.path).layers}
        size = sum(n * bits[y["name"]] for n, y in sizes) / sum(8 * n for n, _ in sizes)
        seconds = sum(step["seconds"] for step in result.report["steps"] if step["pass"] in (name, "round"))
        print(
            f"| {name}, size 0.75 | {size:.3f} | {100 * np.mean(logits.argmax(1) == case.labels):.2f} | "
            f"{measure.sqnr(reference, logits):.2f} | {seconds:.1f} |",
            flush=True,
        )


def ranking(case: Case) -> None:
    def listed(data: Any, before: list[dict[str, Any]] | None = None, samples: int = 64) -> tuple[dict[Any, float], float]:
        start = time.perf_counter()
        _, details, _ = search(case, data, before, "npu", candidates=HIGH, limit=1.0, samples=samples)
        return ({(s["group"], s["width"]): s["sqnr"] for s in details["sensitivities"]}, time.perf_counter() - start)

    first, seconds = listed(case.feeds())
    others = [{case.input: x[None]} for x in case.test[:256]]
    images = {
        "256 other images": listed(others, samples=256)[0],
        "64 fractal images": listed(None, [{"use": "data-free"}])[0],
    }
    print(
        f"\n{case.name}, {', '.join(HIGH)}, target npu, 63 images: {len(first)} sensitivities, curve and chosen point in "
        f"{seconds:.0f} s\n\n| list of 63 images against that of | Kendall's tau |\n|---|---|"
    )
    for label, others in images.items():
        keys = sorted(first)
        print(f"| {label} | {kendalltau([first[k] for k in keys], [others[k] for k in keys]).statistic:.3f} |", flush=True)


def strategies(case: Case, least: float) -> None:
    print(
        f"\n| {case.name}, least SQNR {least:g} dB | networks measured by the search | size | bops | SQNR dB |\n"
        "|---|---|---|---|---|"
    )
    for strategy in STRATEGIES:
        _, details, _ = search(case, case.feeds(), budget="sqnr", limit=least, strategy=strategy, curve=0)
        chosen = next(p for p in details["curve"] if "chosen" in p)
        print(
            f"| {strategy} | {details['networks_measured'] - len(details['sensitivities'])} | {chosen['size']} | "
            f"{chosen['bops']} | {chosen['sqnr']} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    args = parser.parse_args()
    shared = shared_folder(args.shared)
    print(machine())
    for name in args.models:
        homogeneous(load_case(name, shared))
    ranking(load_case(NAMES[0], shared))
    strategies(load_case(NAMES[1], shared), 28.0)


if __name__ == "__main__":
    main()
