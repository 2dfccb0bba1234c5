"""Calibration without data against calibration on 64 real samples: fractal images, noise, statistics.

    python -m benchmarks.data_free [--shared FOLDER] [--models NAME ...] [--seeds 3]

Recipe `int8-data-free` against `int8`, which is the same without the pass `data-free`. Accuracy and SQNR on samples that
calibration never saw, averaged over seeds if there is randomness; `overlap` is the mean over activations of intersection
over union of their range with that of the real samples, `width` the median ratio of widths. Images: with the model's mean
and std given, and without ("matched": to the first layer). KWT-1 reads cepstra: their range is declared from the extremes of
the calibration samples, once for all coefficients and once per coefficient. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.int8 import machine
from benchmarks.models import Case, load_case, shared_folder
from onnxq_plugins import measure, quantize, runtimes

SCALES = {"mobilenet": ("[0.5]", "[0.5]"), "resnet20": ("[0.485,0.456,0.406]", "[0.229,0.224,0.225]")}
MODELS = ("mobilenet_v1_0.75_224_bn", "mobilenet_v1_0.75_224", "resnet20_cifar10", "kwt1_speechcommands12")
REAL = 64


def variants(case: Case) -> Iterator[tuple[str, list[str]]]:
    """Label and settings of each row."""
    sources = ("fractals", "noise", "statistics")
    if case.name.startswith("kwt"):
        ends = np.stack([case.calibration.min(axis=(0, 1)), case.calibration.max(axis=(0, 1))]).astype(float)
        declared = {"one range": [float(ends[0].min()), float(ends[1].max())], "a range per coefficient": ends.tolist()}
        for label, value in declared.items():
            for source in sources[1:]:
                yield (
                    f"{source}, {label}",
                    [f"data-free.inputs={{{case.input}={json.dumps(value)}}}", f"data-free.source={source}"],
                )
        return
    mean, std = next(scale for key, scale in SCALES.items() if case.name.startswith(key))
    for label, given in (("mean and std", [f"data.mean={mean}", f"data.std={std}"]), ("matched", [])):
        for source in sources:
            yield f"{source}, {label}", [*given, f"data-free.source={source}"]


def judge(case: Case, reference: np.ndarray, model: Any) -> tuple[float, float]:
    """Top-1 and SQNR."""
    feeds = [{case.input: x[None]} for x in case.test]
    logits = runtimes.outputs(runtimes.session(model), feeds)[0]
    return 100 * float(np.mean(logits.argmax(1) == case.labels)), measure.sqnr(reference, logits)


def table(case: Case, seeds: int) -> None:
    reference = runtimes.outputs(runtimes.session(case.path), [{case.input: x[None]} for x in case.test])[0]
    real = case.feeds()
    real = [real[n * len(real) // REAL] for n in range(REAL)] if len(real) > REAL else real
    whole = 100 * float(np.mean(reference.argmax(1) == case.labels))
    top, sqnr = judge(case, reference, quantize(case.path, "int8", real).model)
    print(
        f"\n| {case.name}, float top-1 {whole:.2f} | top-1 | loss to real | SQNR dB | overlap | width | `auto` |\n"
        f"|---|---|---|---|---|---|---|\n| {len(real)} real samples | {top:.2f} | - | {sqnr:.2f} | 1 | 1 | |",
        flush=True,
    )
    for label, settings in variants(case):
        rows = []
        for seed in range(seeds):
            result = quantize(case.path, "int8-data-free", real, settings=settings, seed=seed)
            ranges = result.report["steps"][0]["result"]["against_real_data"]
            rows.append([*judge(case, reference, result.model), ranges["overlap_mean"], ranges["width_ratio_median"]])
        auto = quantize(case.path, "int8-data-free", settings=settings[:-1]).report["steps"][0]["result"]["source"]
        accuracy, error, overlap, width = np.mean(rows, axis=0)
        print(
            f"| {label} | {accuracy:.2f} | {top - accuracy:.2f} | {error:.2f} | {overlap:.2f} | {width:.2f} | "
            f"{'this' if label.startswith(auto) else ''} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    for name in args.models:
        table(load_case(name, shared_folder(args.shared)), args.seeds)


if __name__ == "__main__":
    main()
