"""How well times of groups add up to the latency of a network, and what a budget on latency gains.

    python -m benchmarks.latency_model [--shared FOLDER] [--models NAME ...] [--choices 8]

First table: times of groups, learned from networks of 8 bits, of 4 bits and float, against measured networks of random
widths, all in turn, relative to 8 bits everywhere; three sessions of that network show how much its own time varies. Second:
the latency of convolutional networks with a single layer in float. Last: what budgets on latency choose if layers may stay
float. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np

from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import load, measure, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.export import qdq
from onnxq_plugins.job import Job, Report
from onnxq_plugins.plan import requests
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.runtimes.profiles import interleaved, typical
from onnxq_plugins.search import latency
from onnxq_plugins.search.quantizers import parse_widths
from onnxq_plugins.search.widths import Widths

CANDIDATES = ("W4A8", "W8A8", "float")
BLOCKS: dict[str, Any] = {"weights": {"bits": 8, "block": 32}, "activations": {"bits": 32}}  # weight-only


def make_widths(case: Case, recipe: dict[str, Any]) -> Widths:
    """The widths of a network, weights rounded to nearest."""
    plugins = find_plugins()
    parsed = load_recipe(recipe, plugins.passes, ())
    target = plugins.target(parsed.target)
    graph = load(case.path, flatten=target.flatten)
    requested = requests.request(graph, parsed, target)
    calibration = Calibration(graph, open_data(case.feeds(), graph_inputs(graph)), workers=2)
    job = Job(graph, requested.plan, calibration, target, parsed, np.random.default_rng(0), 2, Report())
    widths = Widths(job, parse_widths(CANDIDATES), case.feeds()[0])
    assert calibration.data is not None
    widths.round("nearest", calibration.data)
    return widths


def errors(label: str, case: Case, widths: Widths, count: int) -> None:
    """Predicted against measured, for random widths."""
    feed, rng = case.feeds()[0], np.random.default_rng(0)
    widths.time(feed)
    drawn = [tuple(options[rng.integers(len(options))] for options in widths.options) for _ in range(count)]
    same = [widths.eight_bits] * 3
    taken = latency.compared([widths.exported(choice) for choice in (*same, *drawn)], feed, 12.0)
    eight = float(np.mean(taken[:3]))
    measured = np.array(taken[3:]) / eight
    off = 100 * (np.array([widths.shares(choice)["latency"] for choice in drawn]) / measured - 1)
    free = sum(any(w.weights > 16 for w in options) for options in widths.options)
    apart = 100 * (max(taken[:3]) / min(taken[:3]) - 1)
    print(
        f"| {label} | {free} of {len(widths.groups)} | {eight:.3f} | {apart:.1f} | "
        f"{measured.min():.3f} to {measured.max():.3f} | {np.abs(off).mean():.1f} | "
        f"{off.min():+.1f} to {off.max():+.1f} |",
        flush=True,
    )


def alone(case: Case, widths: Widths) -> None:
    """One layer's weight left float between codes, layer by layer."""
    plan = widths.plan(dict(enumerate(widths.eight_bits)))
    graph, target = widths.job.graph, widths.job.target
    plans = [plan, *(plan.without(y.weight) for y in graph.layers)]
    sessions = [runtimes.session(qdq.export(graph, p, target)) for p in plans]
    taken = [typical(own) for own in interleaved(sessions, case.feeds()[0], 20.0)]
    ratio = np.array(taken[1:]) / taken[0]
    print(
        f"| {case.name} | {ratio.min():.3f} to {ratio.max():.3f} | {np.median(ratio):.3f} | "
        f"{sum(ratio < 1)} of {len(ratio)} |",
        flush=True,
    )


def budgets(label: str, case: Case, recipe: dict[str, Any], limits: tuple[float, ...], cache: str) -> None:
    """What budgets on latency choose, all with the same times."""
    feeds = [{case.input: x[None]} for x in case.test]
    reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
    print(
        f"\n| {label}, at most | predicted | measured | size, of 8 bits | float layers | top-1 | SQNR dB |\n"
        "|---|---|---|---|---|---|---|"
    )
    for limit in limits:
        step = {"use": "mixed-precision", "candidates": CANDIDATES, "budget": "latency", "limit": limit, "curve": 0}
        before = [{"use": "ranges"}] if "activations" not in recipe else []
        result = quantize(case.path, {**recipe, "pass": [*before, step]}, case.feeds(), cache=cache)
        search = result.report["steps"][-2]["result"]
        (point,) = (p for p in search["curve"] if "chosen" in p)
        logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
        predicted, measured = (search["latency"][key] for key in ("predicted", "measured"))
        print(
            f"| {limit:g} | {predicted:.3f} | {measured:.3f} | {point['size']:.3f} | {len(result.report['floats'])} of "
            f"{len(result.report['layers'])} | {100 * np.mean(logits.argmax(1) == case.labels):.2f} | "
            f"{measure.sqnr(reference, logits):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--choices", type=int, default=8)
    args = parser.parse_args()
    cases = {name: load_case(name, shared_folder(args.shared)) for name in args.models}
    print(
        f"{machine()}\n\n| model | groups that may be float | 8 bits, ms | the same thrice, % apart | "
        f"{args.choices} random choices, of 8 bits | mean error % | errors % |\n|---|---|---|---|---|---|---|"
    )
    widths = {name: make_widths(case, {}) for name, case in cases.items()}
    for name, case in cases.items():
        errors(name, case, widths[name], args.choices)
    attention = [name for name in cases if name.startswith("kwt")]
    for name in attention:
        errors(f"{name}, weight-only", cases[name], make_widths(cases[name], BLOCKS), args.choices)
    for n, name in enumerate(name for name in cases if name not in attention):
        if n == 0:
            print(
                "\n| one layer float, all others 8 bits | latency, of 8 bits everywhere | median | faster |\n"
                "|---|---|---|---|"
            )
        alone(cases[name], widths[name])
    with tempfile.TemporaryDirectory() as cache:
        for name in attention:
            budgets(name, cases[name], {}, (1.0, 1.02, 1.05, 1.1, 1.2), cache)
            budgets(f"{name}, weight-only", cases[name], BLOCKS, (0.95,), cache)


if __name__ == "__main__":
    main()
