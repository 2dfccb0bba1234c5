"""A detector's head that is one convolution for boxes and scores: with and without the pass split-heads.

    python -m benchmarks.heads [--recipes int8 int8-rounded] [--seconds 1]

A small untrained backbone; what counts is the grid of the head's output. SQNR of boxes and of scores (behind a Sigmoid) on
samples that calibration never saw, of the models as they are written, and latency at batch 1, one thread, all in turn.
Prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import onnx

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from onnxq_plugins import measure, runtimes
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.testing.models import Net, feeds

BOX, SCORE = (300.0, 100.0), (-2.0, 1.0)  # mean and size of the values in a channel
HEADS = {
    "4 boxes, 6 scores": [BOX] * 4 + [SCORE] * 6,
    "4 boxes, 81 scores": [BOX] * 4 + [SCORE] * 81,
    "3 anchors of 4 boxes, 7 scores": ([BOX] * 4 + [SCORE] * 7) * 3,
    "1 score, 4 boxes, 10 points": [SCORE] + [BOX] * 4 + [(0.0, 8.0)] * 10,
    "85 scores": [SCORE] * 85,
}


def detector(kinds: list[tuple[float, float]]) -> onnx.ModelProto:
    """Boxes [1, 1024, boxes], and the scores of the others [1, 1024, others], of pictures [1, 3, 64, 64]."""
    net = Net([1, 3, 64, 64])
    x = net.op("Relu", net.conv("x", 3, 32, strides=[2, 2]))
    x = net.op("Relu", net.conv(net.op("Relu", net.conv(x, 32, 64)), 64, 64))
    mean, size = np.array(kinds).T
    weight = net.rng.normal(size=(len(kinds), 64, 1, 1)) * size[:, None, None, None] / 8
    y = net.op("Conv", x, net.constant(weight), net.constant(mean))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 3, 1]), net.constant([1, -1, len(kinds)], np.int64))
    boxes, others = ([n for n, kind in enumerate(kinds) if (kind == BOX) == box] for box in (True, False))
    scores = net.op("Sigmoid", net.op("Gather", y, net.constant(others, np.int64), axis=2))
    return net.model(scores, *([net.op("Gather", y, net.constant(boxes, np.int64), axis=2)] if boxes else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["int8", "int8-rounded"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per model")
    args = parser.parse_args()
    print(f"{machine()}\n")
    print("| head | recipe | boxes dB | scores dB | ms | parts |\n|---|---|---|---|---|---|")
    for name, kinds in HEADS.items():
        model = detector(kinds)
        samples, fresh = feeds(model, 16), feeds(model, 8, seed=1)
        reference = runtimes.outputs(runtimes.session(model), fresh)
        runners, cells = {"float": runtimes.session(model)}, {"float": "- | - | {} | -"}
        for recipe in args.recipes:
            whole = find_plugins().recipe(recipe)
            without = replace(whole, passes=tuple(step for step in whole.passes if step.name != "split-heads"))
            for label, variant in ((f"{recipe} without split-heads", without), (recipe, whole)):
                result = onnxq.quantize(model, variant, samples)
                outputs = runtimes.outputs(runtimes.session(result.model, optimize=False), fresh)
                scores, *boxes = (f"{measure.sqnr(a, b):.1f}" for a, b in zip(reference, outputs, strict=True))
                steps = (step["result"]["layers"] for step in result.report.steps if step["pass"] == "split-heads")
                parts = " + ".join(str(part["channels"]) for layers in steps for rows in layers.values() for part in rows)
                runners[label] = runtimes.session(result.model)
                cells[label] = f"{(boxes or ['-'])[0]} | {scores} | {{}} | {parts or '-'}"
        times = runtimes.latency(list(runners.values()), fresh[0], args.seconds * len(runners))
        for label, ms in zip(runners, times, strict=True):
            print(f"| {name} | {label} | {cells[label].format(f'{ms:.2f}')} |", flush=True)


if __name__ == "__main__":
    main()
