"""4-bit storage compared with int8: accuracy, latency, size, kernels, and the same files in OpenVINO.

    python -m benchmarks.storage [--shared FOLDER] [--models ...] [--seconds 20]
    python -m benchmarks.storage --seeds 8 --models mobilenet_v1_0.75_224

Recipes int8, int4-rounded, int4-storage, sub-layer; int4-storage with the last layer also at 4 bits; for transformers
int4-weight-only. ms: batch 1, one thread, all models in turn, many rounds. "OpenVINO" quantizes for target openvino and runs
the same file in both runtimes: layers that run as 8-bit integer there, and the share of test samples with the same argmax
(needs the extra openvino). Measured on samples that calibration never saw. --seeds: only int4-storage, repeated
with other seeds, which order channels differently: how much of its top-1 is chance. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import measure, runtimes
from onnxq_plugins.job import Recipe
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.runtimes.openvino import audit_openvino


def recipes() -> dict[str, Recipe]:
    """Label -> recipe."""
    passes = find_plugins().passes
    labelled = {name: load_recipe(name, passes) for name in ("int8", "int4-rounded", "int4-storage", "sub-layer")}
    table = labelled["int4-storage"].to_dict()
    table["layer"] = [rule for rule in table["layer"] if rule.get("position") != "last"]
    labelled["int4-storage, last layer too"] = load_recipe(table, passes)
    labelled["int4-weight-only"] = load_recipe("int4-weight-only", passes)
    return labelled


def openvino(case: Case, recipe: Recipe) -> str:
    """Integer layers and agreement of the two runtimes on one file."""
    try:
        import openvino as ov
    except ImportError:
        return "not installed"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnxq.quantize(case.path, recipe, case.feeds(), target="openvino", output=path)
        audit = audit_openvino(path)
        runner = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        theirs = np.concatenate([runner([x[None]])[0] for x in case.test])
        ours = runtimes.outputs(runtimes.session(path), [{case.input: x[None]} for x in case.test])[0]
    layers = [layer for layer in audit.layers if layer.constant_weight]
    return f"{sum(layer.quantized for layer in layers)}/{len(layers)} | {100 * measure.agreement(ours, theirs):.1f}"


def chance(case: Case, seeds: int) -> None:
    """int4-storage with several seeds."""
    feeds = [{case.input: x[None]} for x in case.test]
    reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
    print(f"{case.name}, float top-1 {_top1(reference, case):.2f}\n\n| seed | top-1 | SQNR dB | agree |\n|---|---|---|---|")
    accuracies = []
    for seed in range(seeds):
        model = onnxq.quantize(case.path, "int4-storage", case.feeds(), seed=seed).model
        logits = runtimes.outputs(runtimes.session(model), feeds)[0]
        accuracies.append(_top1(logits, case))
        print(
            f"| {seed} | {accuracies[-1]:.2f} | {measure.sqnr(reference, logits):.2f} | "
            f"{100 * measure.agreement(reference, logits):.1f} |",
            flush=True,
        )
    print(
        f"\nmean {np.mean(accuracies):.2f}, standard deviation {np.std(accuracies):.2f}, "
        f"loss {_top1(reference, case) - np.mean(accuracies):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing per model")
    parser.add_argument("--seeds", type=int, default=0)
    args = parser.parse_args()
    print(f"{machine()}\n")
    if args.seeds:
        for name in args.models:
            chance(load_case(name, shared_folder(args.shared)), args.seeds)
        return
    columns = (
        "model",
        "recipe",
        "top-1",
        "loss",
        "SQNR dB",
        "agree",
        "bits/weight",
        "MB",
        "of int8",
        "ms",
        "of int8",
        "quantize s",
        "kernels",
        "OpenVINO: integer layers",
        "same argmax",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in args.models:
        case = load_case(name, shared_folder(args.shared))
        feeds = [{case.input: x[None]} for x in case.test]
        runners: dict[str, Any] = {"float": runtimes.session(case.path)}
        reference = runtimes.outputs(runners["float"], feeds)[0]
        results = {}
        for label, recipe in recipes().items():
            if label == "int4-weight-only" and not name.startswith("kwt"):
                continue  # convolutions stay float
            results[label] = onnxq.quantize(case.path, recipe, case.feeds())
            runners[label] = runtimes.session(results[label].model)
        times = dict(zip(runners, runtimes.latency(list(runners.values()), feeds[0], args.seconds), strict=True))
        print(
            f"| {name} | float | {_top1(reference, case):.2f} | | | | 32 | {case.path.stat().st_size / 1e6:.2f} | | "
            f"{times['float']:.3f} | {times['float'] / times['int8']:.2f} | | | | |",
            flush=True,
        )
        size = results["int8"].model.ByteSize()
        for label, result in results.items():
            logits = runtimes.outputs(runners[label], feeds)[0]
            other = "- | -" if label == "int4-weight-only" else openvino(case, recipes()[label])
            print(
                f"| {name} | {label} | {_top1(logits, case):.2f} | {_top1(reference, case) - _top1(logits, case):.2f} | "
                f"{measure.sqnr(reference, logits):.2f} | {100 * measure.agreement(reference, logits):.1f} | "
                f"{result.report['bits_per_weight']:.2f} | {result.model.ByteSize() / 1e6:.3f} | "
                f"{100 * result.model.ByteSize() / size:.1f} % | {times[label]:.3f} | "
                f"{times[label] / times['int8']:.3f} | "
                f"{result.report['seconds']:.1f} | {result.summary.split(' | ')[0]} | {other} |",
                flush=True,
            )


def _top1(logits: np.ndarray, case: Case) -> float:
    return 100 * float(np.mean(logits.argmax(1) == case.labels))


if __name__ == "__main__":
    main()
