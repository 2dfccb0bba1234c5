"""Any runtime, for size alone.

Float tiles are decoded by Cast and Mul, not by a blocked DequantizeLinear: runtimes fold the former once at load and run
the latter at every call, and ONNX blocks have one axis only."""

from __future__ import annotations

from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.targets.target import CHAIN, Rule, Target

STORAGE = Target(
    "storage",
    "any runtime, for size on disk: every granularity is allowed, weights are decoded at load, and layers run in float",
    tuple(
        Rule(op, op, activations, tuple(range(2, 9)), ("tensor", "channel", "block", "tile"), "float", multipliers=True)
        for op in LAYER_OPS
        for activations in (8, 0)
    ),
    CHAIN,
    either=True,
    decodes=True,
    flatten=False,
)
