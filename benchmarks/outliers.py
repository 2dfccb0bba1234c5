"""Networks in which one grid serves unlike values: with and without split-channels, split-outliers and activation-ranges.

    python -m benchmarks.outliers [--recipes int8 int8-rounded] [--seconds 1]

Untrained. "blocks": transformer blocks of LayerNormalization, two MatMuls and a GELU; some of 1024 channels of the hidden
layer are 40 times larger, and their weights in the second MatMul as much smaller. "stem": a convolution with 16 channels, a
SiLU and a depthwise layer, in which it is the same, and layers behind them. "tails": values in front of a SiLU, around 0 or
mostly below it. SQNR on samples that calibration never saw, of the models as they are written, and latency at batch 1, one
thread, all in turn. Prints Markdown.
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


def blocks(wide: int) -> onnx.ModelProto:
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


def stem(wide: int) -> onnx.ModelProto:
    """A detector's stem on pictures [1, 3, 128, 128], and two stages."""
    net = Net([1, 3, 128, 128])
    factors = np.where(np.arange(16) < wide, FACTOR, 1.0)[:, None, None, None]

    def silu(x: str) -> str:
        return net.op("Mul", x, net.op("Sigmoid", x))

    first, second = net.rng.normal(size=(16, 3, 3, 3)) * factors / 5, net.rng.normal(size=(16, 1, 3, 3)) / factors / 3
    x = silu(net.op("Conv", "x", net.constant(first), net.weight(16), pads=[1] * 4, strides=[2, 2]))
    x = silu(net.op("Conv", x, net.constant(second), net.weight(16), pads=[1] * 4, strides=[2, 2], group=16))
    x = silu(net.conv(silu(net.conv(x, 16, 64, 1)), 64, 64, strides=[2, 2]))
    return net.model(net.conv(x, 64, 32, 1))


def tails(mean: int) -> onnx.ModelProto:
    """Convolutions with a SiLU each, in front of which values are around `mean`."""
    net, x, size = Net([1, 3, 64, 64]), "x", 3
    for _ in range(4):
        weight = net.rng.normal(size=(32, size, 3, 3)) * 5 / np.sqrt(9 * size)
        y = net.op("Conv", x, net.constant(weight), net.constant(np.full(32, float(mean))), pads=[1] * 4)
        x, size = net.op("Mul", y, net.op("Sigmoid", y)), 32
    return net.model(net.conv(x, 32, 8, 1))


NETWORKS = {
    "blocks": (blocks, "split-outliers", (0, 1, 4, 16, 256)),
    "stem": (stem, "split-channels", (0, 1, 4, 8)),
    "tails": (tails, "activation-ranges", (0, -4, -8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["int8", "int8-rounded"])
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per model")
    args = parser.parse_args()
    print(machine())
    for network in args.networks:
        make, name, widths = NETWORKS[network]
        print(f"\n| {network} | recipe | dB | ms | kB |\n|---|---|---|---|---|")
        for wide in widths:
            model = make(wide)
            samples, fresh = feeds(model, 16), feeds(model, 8, seed=1)
            (reference,) = runtimes.outputs(runtimes.session(model), fresh)
            runners, cells = {"float": runtimes.session(model)}, {"float": f"- | {{}} | {model.ByteSize() // 1000}"}
            for recipe in args.recipes:
                whole = find_plugins().recipe(recipe)
                without = replace(whole, passes=tuple(step for step in whole.passes if step.name != name))
                for label, variant in ((f"{recipe} without {name}", without), (recipe, whole)):
                    result = onnxq.quantize(model, variant, samples)
                    (output,) = runtimes.outputs(runtimes.session(result.model, optimize=False), fresh)
                    runners[label] = runtimes.session(result.model)
                    cells[label] = f"{measure.sqnr(reference, output):.1f} | {{}} | {result.model.ByteSize() // 1000}"
            times = runtimes.latency(list(runners.values()), fresh[0], args.seconds * len(runners))
            for label, ms in zip(runners, times, strict=True):
                print(f"| {wide} | {label} | {cells[label].format(f'{ms:.2f}')} |", flush=True)


if __name__ == "__main__":
    main()
