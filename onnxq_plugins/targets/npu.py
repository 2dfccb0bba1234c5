"""NPUs: 16-bit activations, and products of 4 bits."""

from __future__ import annotations

from onnxq_plugins.targets.target import CHAIN, Rule, Target, dense_rules

NPU = Target(
    "npu",
    "NPUs with 8- and 16-bit activations; in onnxruntime layers with 16-bit activations run in float",
    tuple(
        rule
        for op in ("Conv", "Gemm", "MatMul")
        for rule in (*dense_rules(op, "int8"), *dense_rules(op, "W2..8A16, float in onnxruntime", 16))
    ),
    CHAIN,
    either=True,
    flatten=False,
)
NPU4 = Target(
    "npu4",
    "hardware with 4-bit products: layers read activations of 4 bits with weights of up to 4 bits, or of 8 bits; their "
    "outputs are wider; in onnxruntime codes are uint8, and convolutions run in float",
    tuple(
        rule
        for op in ("Conv", "Gemm", "MatMul")
        for rule in (*dense_rules(op, "int8"), Rule(op, "4-bit products", 4, (2, 3, 4), ("tensor", "channel"), "int4"))
    ),
    output_scale=frozenset(),
    flatten=False,
)
