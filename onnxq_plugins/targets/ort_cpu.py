"""onnxruntime's CPU provider."""

from __future__ import annotations

from dataclasses import replace

from onnxq_plugins.runtimes.onnxruntime import ONNXRUNTIME
from onnxq_plugins.targets.target import CHAIN, DECODED, Rule, Target, dense_rules

_BLOCKED = tuple(
    Rule(op, "MatMulNBits", 0, (bits,), ("block",), "blocked", (16, 32, 64, 128, 256))
    for op in ("MatMul", "Gemm")
    for bits in (4, 8)
)

ORT_CPU = Target(
    "ort-cpu",
    "onnxruntime on x86-64 with VNNI, or on arm64",
    (
        *dense_rules("Conv", "QLinearConv"),
        *dense_rules("Gemm", "QGemm"),
        *dense_rules("MatMul", "QLinearMatMul"),
        *_BLOCKED,
        DECODED,
    ),
    CHAIN,
    attention=1_000_000,
    decodes=True,
    tuned=True,
    costs="avx512-vnni",
    here=True,
    runtime=ONNXRUNTIME,
)
ORT_CPU_AVX2 = replace(
    ORT_CPU,
    name="ort-cpu-avx2",
    max_code=64,
    costs="avx2",
    runtime=None,
    doc="onnxruntime on x86-64 without VNNI: weight codes within [-64, 64], since AVX2 adds two "
    "products in 16 bits and would saturate",
)
