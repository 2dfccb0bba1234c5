"""One scale per weight tensor: equalization, shifts and bias correction, alone and together; and what equalizing costs.

    python -m benchmarks.per_tensor [--shared FOLDER] [--models NAME ...]

Target `per-tensor`, 8 bits, min-max ranges from the calibration samples; accuracy and SQNR on samples that calibration
never saw. The last table times the pass `equalize` on MobileNetV1: the median of five, with the run over the data and with
cached statistics. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.int8 import machine
from benchmarks.models import Case, load_case, shared_folder
from onnxq_plugins import load, measure, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.job import Job, Recipe
from onnxq_plugins.passes import Equalize
from onnxq_plugins.plan.requests import request
from onnxq_plugins.targets.per_tensor import PER_TENSOR

NAMES = ("mobilenet_v1_0.75_224", "resnet20_cifar10", "kwt1_speechcommands12")
BEFORE, BEHIND = {"use": "scale-inputs"}, {"use": "ranges"}
EQUALIZE, SHIFT, CORRECT = ({"use": name} for name in ("equalize", "shift-equalize", "bias-correct"))
ABSORB = {"use": "absorb-bias", "margin": 0.0}
WORTH = {**SHIFT, "gain": 2.0}  # as in recipe int8-per-tensor
ROWS: dict[str, list[dict[str, Any]]] = {
    "plainly": [BEHIND],
    "bias-correct": [BEHIND, CORRECT],
    "equalize": [EQUALIZE, BEHIND],
    "equalize, bias-correct": [EQUALIZE, BEHIND, CORRECT],
    "equalize by powers of two, bias-correct": [{**EQUALIZE, "pow2": True}, BEHIND, CORRECT],
    "equalize, absorb-bias (margin 0), bias-correct": [EQUALIZE, ABSORB, BEHIND, CORRECT],
    "shift-equalize": [BEHIND, SHIFT],
    "shift-equalize, bias-correct": [BEHIND, SHIFT, CORRECT],
    "equalize, shift-equalize": [EQUALIZE, BEHIND, SHIFT],
    "equalize, shift-equalize, bias-correct": [EQUALIZE, BEHIND, SHIFT, CORRECT],
    "the same with shift-equalize.gain = 2 (recipe int8-per-tensor)": [EQUALIZE, BEHIND, WORTH, CORRECT],
}


def recipe(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"target": "per-tensor", "weights": {"block": "tensor"}, "pass": [BEFORE, *steps]}


def judge(case: Case, reference: np.ndarray, result: Any) -> str:
    """Top-1, loss, SQNR and share of layers with shifts."""
    feeds = [{case.input: x[None]} for x in case.test]
    logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
    top, whole = (100 * float(np.mean(y.argmax(1) == case.labels)) for y in (logits, reference))
    shifted = sum(spec.multiplier is not None for spec in result.plan.values())
    return f"{top:.2f} | {whole - top:.2f} | {measure.sqnr(reference, logits):.2f} | {shifted}"


def table(case: Case) -> None:
    runner = runtimes.session(case.path)
    reference = runtimes.outputs(runner, [{case.input: x[None]} for x in case.test])[0]
    print(
        f"\n| {case.name}, float top-1 {100 * np.mean(reference.argmax(1) == case.labels):.2f} | top-1 | loss | SQNR dB | "
        "layers with shifts |\n|---|---|---|---|---|"
    )
    for name, steps in ROWS.items():
        print(f"| {name} | {judge(case, reference, quantize(case.path, recipe(steps), case.feeds()))} |", flush=True)
    result = quantize(case.path, "int8", case.feeds())
    print(f"| for comparison: a scale per channel (recipe int8) | {judge(case, reference, result)} |", flush=True)


def speed(path: Path, case: Case) -> None:
    """Seconds of `equalize`, with data and with cached statistics."""
    taken: dict[str, list[float]] = {"with the run over the data": [], "statistics at hand": []}
    for _ in range(5):
        graph = load(path)
        data = open_data(case.feeds(), graph_inputs(graph))
        plan = request(graph, Recipe(), PER_TENSOR).plan
        job = Job(graph, plan, Calibration(graph, data, workers=2), PER_TENSOR, Recipe(), np.random.default_rng(0))
        copy = graph.copy()
        for name, seconds in taken.items():
            start = time.perf_counter()
            Equalize().apply(job)
            seconds.append(time.perf_counter() - start)
            for layer in copy.layers:  # the original weights, whose statistics are cached by now
                for constant in filter(None, (layer.weight, layer.bias)):
                    graph.set_constant(constant, copy.constant(constant))
            assert name in taken
    print(f"\n| equalize, {path.stem}, {len(case.calibration)} images | s |\n|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {median(seconds):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    args = parser.parse_args()
    shared = shared_folder(args.shared)
    print(machine())
    for name in args.models:
        table(load_case(name, shared))
    case = load_case(NAMES[0], shared, test=False)
    speed(case.path, case)


if __name__ == "__main__":
    main()
