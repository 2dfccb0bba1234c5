"""OpenVINO's CPU plugin."""

from __future__ import annotations

from onnxq_plugins.targets.target import CHAIN, Target, dense_rules

OPENVINO = Target(
    "openvino",
    "OpenVINO on x86-64",
    (
        *dense_rules("Conv", "Convolution int8"),
        *dense_rules("Gemm", "FullyConnected int8"),
        *dense_rules("MatMul", "FullyConnected int8"),
    ),
    CHAIN,
    attention=1_000_000,
    flatten=False,
)
