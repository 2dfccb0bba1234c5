"""The last layer in few bits: recipe int4-storage as it is, and with its last layer in 4 and in 8 bits whatever the outputs
say.

    python -m benchmarks.last_layer [--shared FOLDER]

SQNR and top-1 on samples that calibration never saw; integers as they are written, whatever the machine's kernels do. Prints
Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import NAMES, load_case, shared_folder
from onnxq_plugins import measure, runtimes
from onnxq_plugins.job import LayerRule
from onnxq_plugins.passes import Widen
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.testing.exact import exact_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    args = parser.parse_args()
    recipe = load_recipe("int4-storage", find_plugins().passes)
    others = tuple(step for step in recipe.passes if not isinstance(step, Widen))
    wide = LayerRule(position="last", weights={"bits": 8})
    variants = {
        "int4-storage": recipe,
        "without widen": replace(recipe, passes=others),
        "last layer in 8 bits": replace(recipe, layers=(*recipe.layers, wide)),
    }
    print(f"{machine()}\n\n| model | recipe | SQNR dB | top-1 | kB |\n|---|---|---|---|---|")
    for name in NAMES:
        case = load_case(name, shared_folder(args.shared))
        feeds = [{case.input: x[None]} for x in case.test]
        reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
        for label, variant in variants.items():
            result = onnxq.quantize(case.path, variant, case.feeds())
            logits = runtimes.outputs(exact_session(result.model), feeds)[0]
            numbers = measure.sqnr(reference, logits), 100 * np.mean(logits.argmax(1) == case.labels)
            size = len(result.model.SerializeToString()) / 1e3
            print(f"| {name} | {label} | {numbers[0]:.2f} | {numbers[1]:.2f} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
