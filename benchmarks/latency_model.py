"""How well times of groups add up to the latency of a network, and what a budget on latency buys.

    python -m benchmarks.latency_model [--shared FOLDER] [--models NAME ...] [--choices 8]

First table: times of groups, learned from networks of 8 bits, of 4 bits and float, against networks of widths drawn at random,
each measured, all in turn; in parts of what 8 bits everywhere take. Second: latency of the network with one layer alone in
float. Third: the choice within budgets on latency where layers may stay float. Prints Markdown.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import latency, load, planning, qdq, quantize, runtime
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.job import Job
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.quantizers import parse_widths
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.search import Widths

CANDIDATES = ("W4A8", "W8A8", "float")
BLOCKS: dict[str, Any] = {"weights": {"bits": 8, "block": 32}, "activations": {"bits": 32}}  # weight-only


def make_widths(case: Case, recipe: dict[str, Any]) -> Widths:
    """The widths of a network, weights rounded to the nearest."""
    found = find_plugins()
    made = load_recipe(recipe, found.passes, ())
    target = found.target(made.target)
    graph = load(case.path, flatten=target.flatten)
    asked = planning.request(graph, made, target)
    calibration = Calibration(graph, open_data(case.feeds(), graph_inputs(graph)), workers=2)
    job = Job(graph, asked.plan, calibration, target, made, np.random.default_rng(0), 2, {"floats": {}, "notes": []})
    widths = Widths(job, parse_widths(CANDIDATES), case.feeds()[0])
    assert calibration.data is not None
    widths.round("nearest", calibration.data)
    return widths


def errors(label: str, case: Case, widths: Widths, count: int) -> None:
    """Predicted against measured, for widths drawn at random."""
    feed, rng = case.feeds()[0], np.random.default_rng(0)
    times = widths.time(feed)
    choices = [widths.eight_bits, *(tuple(options[rng.integers(len(options))] for options in widths.options)
                                    for _ in range(count))]
    taken = latency.compared([widths.exported(choice) for choice in choices], feed, 10.0)
    measured = np.array(taken[1:]) / taken[0]
    predicted = np.array([widths.shares(choice)["latency"] for choice in choices[1:]])
    off = 100 * (predicted / measured - 1)
    kinds = {str(w) for options in widths.options for w in options}
    fixed = sum(len({w for w in options if w.weights > 16}) == 0 for options in widths.options)
    learned = " ".join(f"{100 * (b / a - 1):+.1f}" for a, b in times.networks)
    print(f"| {label} | {len(widths.groups)} ({len(widths.groups) - fixed}) | {len(kinds)} | {taken[0]:.3f} | "
          f"{measured.min():.3f} to {measured.max():.3f} | {np.abs(off).mean():.1f} | {off.min():+.1f} to {off.max():+.1f} | "
          f"{learned} |", flush=True)


def alone(case: Case, widths: Widths) -> None:
    """One layer's weight left float between codes, layer by layer."""
    plan = widths.plan(dict(enumerate(widths.eight_bits)))
    graph, target = widths.job.graph, widths.job.target
    plans = [plan, *(plan.without(y.weight) for y in graph.layers)]
    sessions = [runtime.session(qdq.export(graph, p, target)) for p in plans]
    taken = [latency.typical(own) for own in latency.in_turn(sessions, case.feeds()[0], 20.0)]
    ratio = np.array(taken[1:]) / taken[0]
    print(f"\n{case.name}, 8 bits everywhere but for one layer, whose weight is float: {ratio.min():.3f} to {ratio.max():.3f} of "
          f"the latency of 8 bits everywhere, median {np.median(ratio):.3f}; "
          f"{sum(ratio < 1)} of {len(ratio)} are faster")


def budgets(label: str, case: Case, recipe: dict[str, Any], limits: tuple[float, ...]) -> None:
    """What budgets on latency choose."""
    feeds = [{case.input: x[None]} for x in case.test]
    reference = runtime.outputs(runtime.session(case.path), feeds)[0]
    print(f"\n| {label}, at most | predicted | measured | size, of 8 bits | float layers | top-1 | SQNR dB |\n"
          "|---|---|---|---|---|---|---|")
    for limit in limits:
        step = {"use": "mixed-precision", "candidates": CANDIDATES, "budget": "latency", "limit": limit, "curve": 0}
        before = [{"use": "ranges"}] if "activations" not in recipe else []
        made = quantize(case.path, {**recipe, "pass": [*before, step]}, case.feeds())
        told = made.report["steps"][-2]["told"]
        point, = (p for p in told["curve"] if "chosen" in p)
        logits = runtime.outputs(runtime.session(made.model), feeds)[0]
        print(f"| {limit:g} | {told['latency']['predicted']:.3f} | {told['latency']['measured']:.3f} | {point['size']:.3f} | "
              f"{len(made.report['floats'])} of {len(made.report['layers'])} | "
              f"{100 * np.mean(logits.argmax(1) == case.labels):.2f} | {runtime.sqnr(reference, logits):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--choices", type=int, default=8)
    args = parser.parse_args()
    cases = {name: load_case(name, shared_folder(args.shared)) for name in args.models}
    print(f"{machine()}\n\n| model | groups (of which may be float) | widths | 8 bits, ms | {args.choices} random choices, of 8 "
          "bits | mean error % | errors % | errors on what was learned from % |\n|---|---|---|---|---|---|---|---|")
    made = {name: make_widths(case, {}) for name, case in cases.items()}
    for name, case in cases.items():
        errors(name, case, made[name], args.choices)
    attention = next((name for name in cases if name.startswith("kwt")), None)
    if attention:
        errors(f"{attention}, weight-only, blocks of 32", cases[attention], make_widths(cases[attention], BLOCKS), args.choices)
    for name, case in cases.items():
        if name != attention:
            alone(case, made[name])
    if attention:
        budgets(attention, cases[attention], {}, (1.0, 1.02, 1.05, 1.1, 1.2))
        budgets(f"{attention}, weight-only, blocks of 32", cases[attention], BLOCKS, (0.95, 0.8, 0.6))


if __name__ == "__main__":
    main()
