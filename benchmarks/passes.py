"""What each pass of a recipe gains: the recipe with one pass omitted at a time.

    python -m benchmarks.passes [--shared FOLDER] [--recipe int8]

SQNR and top-1 on samples that calibration never saw. Prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.models import NAMES, load_case, shared_folder
from onnxq_plugins import measure, runtimes
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--recipe", default="int8")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, find_plugins().passes)
    variants = {args.recipe: recipe, "no pass": replace(recipe, passes=())}
    variants |= {
        f"without {left.name}": replace(recipe, passes=tuple(p for p in recipe.passes if p is not left))
        for left in recipe.passes
    }
    print("| model | recipe | SQNR dB | top-1 |\n|---|---|---|---|")
    for name in NAMES:
        case = load_case(name, shared_folder(args.shared))
        feeds = [{case.input: x[None]} for x in case.test]
        reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
        for label, variant in variants.items():
            result = onnxq.quantize(case.path, variant, case.feeds())
            logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
            top1 = 100 * np.mean(logits.argmax(1) == case.labels)
            print(f"| {name} | {label} | {measure.sqnr(reference, logits):.2f} | {top1:.2f} |", flush=True)


if __name__ == "__main__":
    main()
