"""Runtimes and NPUs with one scale per weight."""

from __future__ import annotations

from onnxq_plugins.targets.target import CHAIN, Rule, Target

PER_TENSOR = Target(
    "per-tensor",
    "runtimes and NPUs with only one scale per weight tensor; shifts of single channels "
    "become a power-of-two Mul behind the layer, and are listed in the model's metadata",
    tuple(Rule(op, "int8", 8, tuple(range(2, 9)), ("tensor",), "int8") for op in ("Conv", "Gemm", "MatMul")),
    CHAIN,
    either=True,
    flatten=False,
)
