"""What single operators gain from integer kernels on this machine: the evidence behind the targets' rules.

    python -m benchmarks.kernels

Each line times a float operator against its quantized form, one thread, in turn. Prints Markdown.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes


def _model(
    nodes: list[onnx.NodeProto], inputs: list[tuple[str, list[int]]], output: str, constants: list[onnx.TensorProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "operator",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def conv(channels: int, size: int, kernel: int, groups: int = 1, outputs: int = 0) -> onnx.ModelProto:
    """Three convolutions of one shape in a row (a chain, as in a network)."""
    rng = np.random.default_rng(0)
    outputs = outputs or channels
    weights = [rng.standard_normal((outputs, channels // groups, kernel, kernel)).astype(np.float32) / channels]
    nodes, name = [], "x"
    constants = [numpy_helper.from_array(weights[0], "w")]
    for i in range(3 if outputs == channels else 1):
        nodes.append(helper.make_node("Conv", [name, "w"], [f"c{i}"], f"conv{i}", group=groups, pads=[kernel // 2] * 4))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        name = f"r{i}"
    return _model(nodes, [("x", [1, channels, size, size])], name, constants)


def matmul(rows: int, inner: int, columns: int) -> onnx.ModelProto:
    """One matrix product with a constant weight."""
    weight = np.random.default_rng(0).standard_normal((inner, columns)).astype(np.float32) / inner**0.5
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")]
    return _model(nodes, [("x", [1, rows, inner])], "y", [numpy_helper.from_array(weight, "w")])


def attention(heads: int, rows: int, inner: int, columns: int) -> onnx.ModelProto:
    """One product of two activations."""
    nodes = [helper.make_node("MatMul", ["a", "b"], ["y"], "product")]
    return _model(nodes, [("a", [heads, rows, inner]), ("b", [heads, inner, columns])], "y", [])


CASES: tuple[tuple[str, onnx.ModelProto, dict[str, object]], ...] = (
    ("conv 3x3, 64 channels, 56x56", conv(64, 56, 3), {}),
    ("the same, 4-bit weights", conv(64, 56, 3), {"weights": {"bits": 4}}),
    ("conv 1x1, 96 -> 576, 14x14", conv(96, 14, 1, outputs=576), {}),
    ("depthwise 3x3, 144 channels, 56x56", conv(144, 56, 3, groups=144), {}),
    ("matmul 128x768x3072", matmul(128, 768, 3072), {}),
    ("the same, 4-bit weights", matmul(128, 768, 3072), {"weights": {"bits": 4}}),
    (
        "the same, 4-bit weight-only, block 32",
        matmul(128, 768, 3072),
        {"weights": {"bits": 4, "block": 32}, "activations": {"bits": 32}},
    ),
    (
        "matmul 1x768x3072, 4-bit weight-only, block 32",
        matmul(1, 768, 3072),
        {"weights": {"bits": 4, "block": 32}, "activations": {"bits": 32}},
    ),
    *(
        (f"activation product {n} x {m}x{k}x{p}", attention(n, m, k, p), {"layer": [{"op": "Attention", "quantize": True}]})
        for n, m, k, p in ((1, 99, 64, 99), (12, 128, 64, 128), (12, 384, 64, 384), (12, 384, 384, 64))
    ),
)


def main() -> None:
    print("| operator | runs as | float ms | quantized ms | ratio |\n|---|---|---|---|---|")
    for name, model, recipe in CASES:
        feed = {
            i.name: np.random.default_rng(1)
            .standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim])
            .astype(np.float32)
            for i in model.graph.input
        }
        result = onnxq.quantize(model, recipe, [feed])
        kernels = {layer.kernel for layer in onnxq.audit_model(result.model).layers}
        slow, fast = runtimes.latency([runtimes.session(model), runtimes.session(result.model)], feed, 1.5)
        print(f"| {name} | {', '.join(sorted(kernels))} | {slow:.3f} | {fast:.3f} | {slow / fast:.2f} |", flush=True)


if __name__ == "__main__":
    main()
