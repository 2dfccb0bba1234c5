"""How well the table of costs predicts whole networks, and what placement by it gains.

    python -m benchmarks.placement FOLDER [MODEL ...] [--seconds 1] [--table NAME]

For each model under FOLDER (as in benchmarks.zoo): milliseconds of the network with all operators integer that can be, as
placed, and in float with weights stored in 8 bits, predicted and measured, in turn, one thread, on the first sample; and
what placement with its check on this machine would take. Prints Markdown.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.int8 import machine
from benchmarks.zoo import open_folder
from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.passes import placement

CHOICES = ("integer", "placed", "float")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a model")
    parser.add_argument("--table", default="", help="of costs, as the pass takes it")
    args = parser.parse_args()
    recipe = {"pass": [{"use": "placement", "least": 0.0, "table": args.table}]}
    placement._SECONDS = args.seconds
    folder = open_folder(args.folder)
    heads = "".join(f" {name} ms |" for name in CHOICES)
    print(f"{machine()}\n\npredicted / measured\n\n| model |{heads} chosen | float operators |\n|{'---|' * 6}")
    errors, ratios = [], []
    for name in args.models or folder.names:
        try:
            result = quantize(folder.path(name), recipe, folder.feeds(name, "calib")[:2], check=False)
        except OnnxqError as error:
            print(f"| {name} | {error} | | | | |")
            continue
        told = result.report.steps[0]["result"] or {}
        predicted, timed = told.get("predicted", {}), told.get("timed", {})
        cells = []
        for choice in CHOICES:
            both = predicted.get(choice), timed.get(choice)
            cells.append(" / ".join("" if value is None else f"{value / 1e3:.3f}" for value in both))
            if both[0] and both[1]:
                errors.append(both[0] / both[1] - 1)
        known = [choice for choice in CHOICES if choice in predicted and choice in timed]
        ratios += [predicted[a] / predicted[b] / (timed[a] / timed[b]) - 1 for a, b in pairwise(known)]
        print(f"| {name} | {' | '.join(cells)} | {told.get('choice', '')} | {len(told.get('float', []))} |", flush=True)
    for what, values in (("times", errors), ("ratios of two of them", ratios)):
        if values:
            sizes = 100 * np.abs(values)
            print(f"\nprediction of {what}: median error {np.median(sizes):.0f} %, worst {sizes.max():.0f} %")


if __name__ == "__main__":
    main()
