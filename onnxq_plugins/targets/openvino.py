"""OpenVINO's CPU plugin."""

from __future__ import annotations

from onnxq_plugins.runtimes.openvino import OPENVINO as RUNTIME
from onnxq_plugins.targets.target import CHAIN, DECODED, Target, dense_rules

OPENVINO = Target(
    "openvino",
    "OpenVINO on x86-64",
    (
        *dense_rules("Conv", "Convolution int8"),
        *dense_rules("Gemm", "FullyConnected int8"),
        *dense_rules("MatMul", "FullyConnected int8"),
        DECODED,
    ),
    CHAIN,
    attention=1_000_000,
    decodes=True,
    plain=frozenset({"LSTM", "GRU", "RNN"}),  # 2026.4 fails to load them with computed weights
    flatten=False,
    runtime=RUNTIME,
)
