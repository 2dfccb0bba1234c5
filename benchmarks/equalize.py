"""Passes `centre` and `equalize` by activations, with a scale per channel: real networks, and synthetic ones with linear
residual streams.

    python -m benchmarks.equalize [--shared FOLDER] [--models NAME ...]

Recipe `int8` without them, with either and with both. SQNR on samples that calibration never saw, of models that run as they
are written, the same on every machine. The synthetic networks have MobileNetV2's inverted bottlenecks with ReLU6 and random
weights. Trained streams have some channels that are far larger than the rest, and channels that lie far from 0: one in 16
channels is 20 times larger, and channels have offsets of up to 4 times their size. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.int8 import machine
from benchmarks.models import NAMES, load_case, shared_folder
from onnxq_plugins import measure, quantize, runtimes

CORRECTED = [{"use": "scale-inputs"}, {"use": "ranges"}, {"use": "bias-correct"}]
CENTRE, EQUALIZE = {"use": "centre"}, {"use": "equalize", "by": "activations"}
VARIANTS: tuple[list[dict[str, Any]], ...] = ([], [CENTRE], [EQUALIZE], [CENTRE, EQUALIZE])


def bottlenecks(blocks: int = 6, width: int = 32, expansion: int = 4, seed: int = 0) -> onnx.ModelProto:
    """Inverted bottlenecks with linear residual streams whose channels differ in size; input [N, 3, 32, 32], 10 outputs."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[TensorProto] = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("low", 0), ("high", 6))]
    size = np.where(np.arange(width) % 16 == 5, 20.0, 1.0)
    offset = np.zeros(width)  # of the stream, which the biases of its readers take back

    def conv(
        x: str, name: str, shape: tuple[int, ...], rows: Any = 1.0, columns: Any = 1.0, clip: bool = True, **attrs: Any
    ) -> str:
        w = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) * np.sqrt(2.0)
        w = w * np.reshape(rows, (-1, 1, 1, 1)) / np.reshape(columns, (1, -1, 1, 1))
        b = 0.2 * rng.standard_normal(shape[0]) * np.broadcast_to(np.reshape(rows, -1), shape[0])
        if np.ndim(columns):
            b = b - w[:, :, 0, 0] @ offset
        if np.ndim(rows):
            more = 4.0 * size * rng.uniform(-1, 1, width)
            offset[:], b = offset + more, b + more
        weights.extend(numpy_helper.from_array(v.astype(np.float32), f"{name}_{n}") for n, v in (("w", w), ("b", b)))
        nodes.append(helper.make_node("Conv", [x, f"{name}_w", f"{name}_b"], [name], name, **attrs))
        if clip:
            nodes.append(helper.make_node("Clip", [name, "low", "high"], [f"{name}_6"], f"{name}_clip"))
        return f"{name}_6" if clip else name

    x = conv("input", "stem", (width, 3, 3, 3), size, clip=False, pads=[1] * 4, strides=[2, 2])
    wide = width * expansion
    for i in range(blocks):
        y = conv(x, f"expand{i}", (wide, width, 1, 1), columns=size)
        y = conv(y, f"depthwise{i}", (wide, 1, 3, 3), pads=[1] * 4, group=wide)
        y = conv(y, f"project{i}", (width, wide, 1, 1), size, clip=False)
        nodes.append(helper.make_node("Add", [x, y], [f"stream{i}"], f"add{i}"))
        x = f"stream{i}"
    x = conv(x, "last", (64, width, 1, 1), columns=size)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flat"))
    weights += [numpy_helper.from_array(rng.standard_normal((64, 10)).astype(np.float32), "classes")]
    nodes.append(helper.make_node("Gemm", ["flat", "classes"], ["logits"], "classifier"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", ["N", 3, 32, 32]), ("logits", ["N", 10]))
    ]
    graph = helper.make_graph(nodes, "bottlenecks", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


Feeds = list[dict[str, np.ndarray]]


def networks(names: list[str], shared: Any) -> Iterator[tuple[str, Any, Feeds, Feeds]]:
    """Name, model, calibration and test feeds."""
    for name in names:
        case = load_case(name, shared)
        yield name, case.path, case.feeds(), [{case.input: x[None]} for x in case.test]
    rng = np.random.default_rng(1)
    for seed in range(3):
        feeds = [{"input": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(192)]
        yield f"synthetic bottlenecks {seed + 1}", bottlenecks(seed=seed), feeds[:64], feeds[64:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    args = parser.parse_args()
    print(
        f"{machine()}\n\n| network | without dB | centre dB | equalize dB | both dB | gain dB | drift |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, model, calibration, test in networks(args.models, shared_folder(args.shared)):
        reference = runtimes.outputs(runtimes.session(model), test)
        sqnrs = []
        for steps in VARIANTS:
            result = quantize(model, {"pass": [CORRECTED[0], *steps, *CORRECTED[1:]]}, calibration, verify=True)
            sqnrs.append(
                measure.sqnr(reference[0], runtimes.outputs(runtimes.session(result.model, optimize=False), test)[0])
            )
        drift = max(step.get("drift") or 0.0 for step in result.report["steps"])
        cells = " | ".join(f"{value:.2f}" for value in sqnrs)
        print(f"| {name} | {cells} | {sqnrs[3] - sqnrs[0]:+.2f} | {drift:.0e} |", flush=True)


if __name__ == "__main__":
    main()
