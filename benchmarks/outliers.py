"""A transformer in which a few channels are far larger than all others: with and without the pass split-outliers.

    python -m benchmarks.outliers [--recipes int8 int8-rounded] [--seconds 1]

Untrained blocks of LayerNormalization, two MatMuls and a GELU; a few channels of the hidden layer are 40 times larger, and
their weights in the second MatMul as much smaller. SQNR on samples that calibration never saw, of the models as they are
written, and latency at batch 1, one thread, all in turn. Prints Markdown.
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

WIDTH, HIDDEN, BLOCKS, FACTOR = 256, 1024, 4, 40.0
WIDE = (0, 1, 4, 16, 256)  # large channels of a hidden layer


def transformer(wide: int) -> onnx.ModelProto:
    """Blocks x + W2 gelu(W1 norm(x)) on tokens [1, 64, WIDTH], then a projection."""
    net = Net([1, 64, WIDTH])
    factors = np.ones(HIDDEN)
    factors[net.rng.choice(HIDDEN, wide, replace=False)] = FACTOR
    x = "x"
    for _ in range(BLOCKS):
        first, second = net.rng.normal(size=(WIDTH, HIDDEN)) * factors / 16, net.rng.normal(size=(HIDDEN, WIDTH)) / 32
        y = net.op("MatMul", net.layernorm(x, WIDTH), net.constant(first))
        y = net.gelu_erf(net.op("Add", y, net.weight(HIDDEN)))
        y = net.op("MatMul", y, net.constant(second / factors[:, None]))
        x = net.op("Add", x, net.op("Add", y, net.weight(WIDTH)))
    return net.model(net.linear(x, WIDTH, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["int8", "int8-rounded"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per model")
    args = parser.parse_args()
    print(f"{machine()}\n")
    print("| large channels | recipe | dB | ms | float channels | kB |\n|---|---|---|---|---|---|")
    for wide in WIDE:
        model = transformer(wide)
        samples, fresh = feeds(model, 16), feeds(model, 8, seed=1)
        (reference,) = runtimes.outputs(runtimes.session(model), fresh)
        runners, cells = {"float": runtimes.session(model)}, {"float": f"- | {{}} | - | {model.ByteSize() // 1000}"}
        for recipe in args.recipes:
            whole = find_plugins().recipe(recipe)
            without = replace(whole, passes=tuple(step for step in whole.passes if step.name != "split-outliers"))
            for label, variant in ((f"{recipe} without split-outliers", without), (recipe, whole)):
                result = onnxq.quantize(model, variant, samples)
                (output,) = runtimes.outputs(runtimes.session(result.model, optimize=False), fresh)
                steps = (step["result"]["layers"] for step in result.report.steps if step["pass"] == "split-outliers")
                channels = sum(len(row["channels"]) for layers in steps for row in layers.values())
                runners[label] = runtimes.session(result.model)
                cells[label] = (
                    f"{measure.sqnr(reference, output):.1f} | {{}} | {channels} | {result.model.ByteSize() // 1000}"
                )
        times = runtimes.latency(list(runners.values()), fresh[0], args.seconds * len(runners))
        for label, ms in zip(runners, times, strict=True):
            print(f"| {wide} | {label} | {cells[label].format(f'{ms:.2f}')} |", flush=True)


if __name__ == "__main__":
    main()
