"""OpenVINO's CPU plugin."""

from __future__ import annotations

from onnxq_plugins.runtimes.openvino import OPENVINO as RUNTIME
from onnxq_plugins.targets.target import CHAIN, DECODED, Rule, Target, dense_rules

# Weights beside float activations, which it keeps narrow in memory and decodes within the product.
_NARROW = tuple(
    rule
    for op in ("MatMul", "Gemm")
    for rule in (
        *(Rule(op, "FullyConnected", 0, (bits,), ("block",), "blocked", (16, 32, 64, 128, 256)) for bits in (4, 8)),
        Rule(op, "FullyConnected", 0, (8,), ("tensor", "channel"), "float"),
    )
)

OPENVINO = Target(
    "openvino",
    "OpenVINO on x86-64",
    (
        *dense_rules("Conv", "Convolution int8"),
        *dense_rules("Gemm", "FullyConnected int8"),
        *dense_rules("MatMul", "FullyConnected int8"),
        *_NARROW,
        DECODED,
    ),
    CHAIN,
    attention=1_000_000,
    decodes=True,
    plain=frozenset({"LSTM", "GRU", "RNN"}),  # 2026.4 fails to load them with computed weights
    flatten=False,
    runtime=RUNTIME,
)
