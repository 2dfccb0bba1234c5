"""What the forms of `residual-expansion` cost at run time, relative to the same layers with 8-bit weights.

    python -m benchmarks.expansion_cost [--seconds 1] [--rounds 5]

Chains of convolutions, each followed by a Relu, random weights, 8-bit activations, batch 1, one thread; all forms of a shape
are timed in turn, several rounds, and the least median of each is divided by that of int8. "Gather": channels stay in
place, as if they could not be moved. Prints Markdown.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from onnxq_plugins import runtimes

SHAPES: dict[str, tuple[int, list[tuple[int, int, int, int]]]] = {  # size; inputs, outputs, kernel, groups of each layer
    "3x3, 64 channels, 56x56": (56, [(64, 64, 3, 1)] * 3),
    "3x3, 128 channels, 28x28": (28, [(128, 128, 3, 1)] * 3),
    "3x3, 256 channels, 14x14": (14, [(256, 256, 3, 1)] * 3),
    "1x1, 96 -> 576 -> 96, 14x14": (14, [(96, 576, 1, 1), (576, 96, 1, 1)] * 2),
    "1x1, 256 channels, 14x14": (14, [(256, 256, 1, 1)] * 3),
    "depthwise 3x3, 144 channels, 56x56": (56, [(144, 144, 3, 144)] * 3),
}
FORMS: dict[str, dict[str, Any]] = {
    "folded": {"form": "folded"},
    "folded, 25 %": {"form": "folded", "share": 0.25},
    "sparse, 25 %": {"form": "sparse", "share": 0.25},
    "sparse, 25 %, Gather": {"form": "sparse", "share": 0.25},
    "sparse, 50 %": {"form": "sparse", "share": 0.5},
    "branches": {"form": "branches"},
    "branches, 3 orders": {"form": "branches", "orders": 3},
}


def chain(size: int, layers: list[tuple[int, int, int, int]]) -> onnx.ModelProto:
    """The layers in sequence, and a Gemm on the mean of the last one's output."""
    rng = np.random.default_rng(0)
    nodes, constants, name = [], [], "x"

    def constant(values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values.astype(np.float32), f"w{len(constants)}"))
        return str(constants[-1].name)

    for i, (inputs, outputs, kernel, groups) in enumerate(layers):
        fan_in = inputs // groups * kernel**2
        weight = constant(rng.normal(size=(outputs, inputs // groups, kernel, kernel)) / fan_in**0.5)
        nodes += [
            helper.make_node("Conv", [name, weight], [f"c{i}"], f"conv{i}", group=groups, pads=[kernel // 2] * 4),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"),
        ]
        name = f"r{i}"
    nodes += [
        helper.make_node("GlobalAveragePool", [name], ["mean"], "pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", constant(rng.normal(size=(layers[-1][1], 10)))], ["y"], "head"),
    ]
    ends = [
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape)
        for tensor, shape in (("x", [1, layers[0][0], size, size]), ("y", [1, 10]))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def recipe(step: dict[str, Any] | None) -> dict[str, Any]:
    """8-bit activations and weights of 8 bits, or expanded from 4; the head has 8 bits in both."""
    passes: list[dict[str, Any]] = [{"use": "ranges"}]
    if step is None:
        return {"pass": passes}
    return {
        "weights": {"bits": 4},
        "pass": [*passes, {"use": "residual-expansion", **step}],
        "layer": [{"match": "head", "weights": {"bits": 8}}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per model and round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{machine()}\n\n| layers | int8 ms | {' | '.join(FORMS)} |\n|{'---|' * (len(FORMS) + 2)}", flush=True)
    for shape, (size, layers) in SHAPES.items():
        model = chain(size, layers)
        feed = {"x": np.random.default_rng(1).normal(size=(1, layers[0][0], size, size)).astype(np.float32)}
        models = {"int8": onnxq.quantize(model, recipe(None), [feed]).model}
        for name, step in FORMS.items():
            if layers[0][3] > 1 and step["form"] == "sparse":
                continue
            fixed = mock.patch("onnxq_plugins.passes.residual_expansion.channel_groups", lambda *_: [])
            with fixed if "Gather" in name else nullcontext():
                models[name] = onnxq.quantize(model, recipe(step), [feed]).model
        runners = [runtimes.session(m) for m in models.values()]
        rounds = [runtimes.latency(runners, feed, args.seconds * len(models)) for _ in range(args.rounds)]
        times = dict(zip(models, np.min(rounds, axis=0), strict=True))
        base = times.pop("int8")
        ratios = (f"{times[name] / base:.2f}" if name in times else "-" for name in FORMS)
        print(f"| {shape} | {base:.2f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
