"""Coarse and fine weight splitting on synthetic re-parameterised blocks: output SQNR with and without `split-weights`.

    python -m benchmarks.split_weights [--width 64] [--seeds 3]

Networks are built like RepVGG's (3x3, 1x1 and identity branches, each with a BatchNormalization that has the statistics of
the data flowing through it and gamma between 0.5 and 1.5) and folded into one 3x3 convolution per block; nothing else makes
the centre large. Weights and images are random. Activations "float": target `storage`, which isolates the error of the
weights. The second table shows where splitting pays off with 8-bit activations, over the SQNR of the unsplit weights of the
split layers. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from onnxq_plugins import runtimes
from onnxq_plugins.measure import sqnr

Array = np.ndarray
FLOAT: dict[str, Any] = {"target": "storage", "activations": {"bits": 32}}


def images(n: int, seed: int, channels: int = 3, size: int = 16) -> Array:
    """Random images [n, channels, size, size], smooth like photographs."""
    coarse = np.random.default_rng(seed).normal(size=(n, channels, size // 4, size // 4))
    fine = np.random.default_rng(seed + 1).normal(size=(n, channels, size, size))
    return (np.kron(coarse, np.ones((1, 1, 4, 4))) + 0.3 * fine).astype(np.float32)


def folded(
    rng: np.random.Generator, x: Array, width: int, *, stride: int = 1, depthwise: bool = False
) -> tuple[Array, Array]:
    """Weight and bias of one block with `width` outputs over the input x [N, C, H, W]: 3x3, 1x1 and, where the shape stays,
    identity branches, each normalized."""
    channels = 1 if depthwise else x.shape[1]
    branches = [rng.normal(size=(width, channels, 3, 3)), rng.normal(size=(width, channels, 1, 1))]
    if x.shape[1] == width and stride == 1:
        branches.append((np.ones((width, 1)) if depthwise else np.eye(width))[:, :, None, None])
    weight, bias = np.zeros((width, channels, 3, 3)), np.zeros(width)
    for kernel in branches:
        scaled, shift = normalized(rng, x, kernel, stride)
        at = slice(None) if kernel.shape[2] == 3 else slice(1, 2)
        weight[:, :, at, at] += scaled
        bias += shift
    return weight, bias


def normalized(rng: np.random.Generator, x: Array, weight: Array, stride: int = 1) -> tuple[Array, Array]:
    """A convolution of x followed by a BatchNormalization, folded: weight and bias."""
    y = convolve(x, weight, stride=stride)
    factor = rng.uniform(0.5, 1.5, len(weight)) / np.sqrt(y.var(axis=(0, 2, 3)) + 1e-5)
    return weight * factor[:, None, None, None], rng.normal(size=len(weight)) / 4 - y.mean(axis=(0, 2, 3)) * factor


def convolve(x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1) -> Array:
    """A convolution that keeps sizes at stride 1; depthwise if the weight has one input channel."""
    k = weight.shape[2]
    padded = np.pad(x, [(0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    if weight.shape[1] < x.shape[1]:
        y = np.einsum("nchwij,cij->nchw", windows, weight[:, 0])
    else:
        y = np.moveaxis(np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))), -1, 1)
    return y if bias is None else y + bias[None, :, None, None]


def network(blocks: int, width: int, *, seed: int = 0, depthwise: bool = False) -> onnx.ModelProto:
    """A stem with stride 2 and no identity branch, then `blocks` blocks that have one, each followed by a Relu. A
    depthwise block is followed by a pointwise convolution. The output is the last block's."""
    rng, x = np.random.default_rng(seed), images(16, seed + 100)
    nodes, constants, name = [], [], "x"
    for i in range(1 + blocks * (1 + depthwise)):
        stride, groups = 1 + (i == 0), width if depthwise and i % 2 else 1
        if depthwise and i and groups == 1:
            weight, bias = normalized(rng, x, rng.normal(size=(width, width, 1, 1)))
        else:
            weight, bias = folded(rng, x, width, stride=stride, depthwise=groups > 1)
        x = np.maximum(convolve(x, weight, bias, stride=stride), 0)
        constants += [numpy_helper.from_array(v.astype(np.float32), f"{n}{i}") for n, v in (("w", weight), ("b", bias))]
        nodes += [
            helper.make_node(
                "Conv",
                [name, f"w{i}", f"b{i}"],
                [f"c{i}"],
                f"conv{i}",
                strides=[stride] * 2,
                pads=[weight.shape[2] // 2] * 4,
                group=groups,
            ),
            helper.make_node("Relu", [f"c{i}"], [f"y{i}"], f"relu{i}"),
        ]
        name = f"y{i}"
    values = [
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["N", channels, f"{tensor}_H", f"{tensor}_W"])
        for tensor, channels in (("x", 3), (name, width))
    ]
    graph = helper.make_graph(nodes, "repvgg", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def measure(
    model: onnx.ModelProto, recipe: dict[str, Any], step: dict[str, Any] | None = None, seed: int = 0
) -> tuple[float, list[dict[str, float]]]:
    """Output SQNR in dB on images that calibration never saw, and what the pass reports of the layers that it split.

    step   parameters of `split-weights`; None to leave it out
    """
    passes = [] if step is None else [{"use": "split-weights", **step}]
    result = onnxq.quantize(model, {**recipe, "pass": passes}, images(32, seed + 200))
    feeds = [{"x": images(32, seed + 300)}]
    reference = runtimes.outputs(runtimes.session(model), feeds)[0]
    layers = [] if step is None else list(result.report["steps"][0]["result"]["layers"].values())
    return sqnr(reference, runtimes.outputs(runtimes.session(result.model), feeds)[0]), layers


def gains(blocks: list[int], width: int, seeds: int) -> None:
    """What the pass gains, with the error of the weights alone and together with that of 8-bit activations."""
    print("| blocks | activations | weights | plain dB | split dB | gain dB | layers split |\n|---|---|---|---|---|---|---|")
    for count in blocks:
        models = [network(count, width, seed=seed) for seed in range(seeds)]
        for label, more in (("float", FLOAT), ("8 bits", {})):
            for bits, block in itertools.product((8, 4), ("channel", "tensor")):
                recipe = {"weights": {"bits": bits, "block": block}, **more}
                plain = np.mean([measure(m, recipe, seed=i)[0] for i, m in enumerate(models)])
                split = [measure(m, recipe, {}, seed=i) for i, m in enumerate(models)]
                db, layers = np.mean([m[0] for m in split]), np.mean([len(m[1]) for m in split])
                print(
                    f"| {count} | {label} | {bits} bits per {block} | {plain:.1f} | {db:.1f} | {db - plain:+.1f} | "
                    f"{layers:.1f} of {count + 1} |",
                    flush=True,
                )


def break_even(seeds: int) -> None:
    """Where the error of the weights outweighs two more activation roundings: every layer with an odd kernel is split."""
    rows = []
    for depthwise, width in ((False, 8), (False, 16), (False, 32), (False, 64), (True, 32)):
        models = [network(2, width, seed=seed, depthwise=depthwise) for seed in range(seeds)]
        for bits, block in itertools.product((8, 7, 6, 5) if depthwise else (8, 7), ("channel", "tensor")):
            recipe = {"weights": {"bits": bits, "block": block}, "layer": [{"position": "first", "weights": {"bits": 8}}]}
            figures = [
                (measure(m, recipe, seed=i)[0], *measure(m, recipe, {"gain": 0.0, "below": 999.0}, seed=i))
                for i, m in enumerate(models)
            ]
            weights = np.mean([layer["weights_db_before"] for _, _, layers in figures for layer in layers[-2:]])
            rows.append(
                (
                    weights,
                    f"{'depthwise' if depthwise else 'dense'}, width {width}",
                    f"{bits} bits per {block}",
                    np.mean([row[0] for row in figures]),
                    np.mean([row[1] for row in figures]),
                )
            )
    print("| weights dB | blocks | weights | plain dB | split dB | gain dB |\n|---|---|---|---|---|---|")
    for weights, label, how, plain, db in sorted(rows, key=lambda row: -row[0]):
        print(f"| {weights:.1f} | {label} | {how} | {plain:.1f} | {db:.1f} | {db - plain:+.1f} |")


def cost(blocks: int, width: int, seconds: float) -> None:
    """Latency at batch 1, one thread, of float, int8 and int8 with the pass, in turn."""
    model = network(blocks, width)
    quantized = [onnxq.quantize(model, {"pass": step}, images(8, 200)).model for step in ([], [{"use": "split-weights"}])]
    times = runtimes.latency([runtimes.session(m) for m in (model, *quantized)], {"x": images(1, 300, size=64)}, 3 * seconds)
    print("| float ms | int8 ms | int8, split ms | split / int8 |\n|---|---|---|---|")
    print(f"| {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f} | {times[2] / times[1]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=3, help="networks that each row averages")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per model")
    args = parser.parse_args()
    print(f"{machine()}\n\nOutput SQNR, width {args.width}, mean of {args.seeds} networks\n")
    gains(args.blocks, args.width, args.seeds)
    print("\nEvery layer split, whether it pays or not; 8-bit activations, 2 blocks\n")
    break_even(args.seeds)
    print(f"\nLatency of {max(args.blocks)} blocks, width {args.width}, images of 64 x 64\n")
    cost(max(args.blocks), args.width, args.seconds)


if __name__ == "__main__":
    main()
