"""Qualcomm's HTP through onnxruntime's QNN provider.

It takes an operator to the NPU whose inputs and outputs all have Q/DQ, and cuts the network at any other. Activations are
unsigned, as its own tools make them."""

from __future__ import annotations

from dataclasses import replace

from onnxq_plugins.runtimes.qnn import QNN as RUNTIME
from onnxq_plugins.targets.target import Rule, Target, dense_rules

_LAYERS = ("Conv", "Gemm", "MatMul")

QNN = Target(
    "qnn",
    "Qualcomm HTP through onnxruntime's QNN provider: the whole network in integers",
    (
        *(replace(r, narrow=False) for op in _LAYERS for n in (8, 16) for r in dense_rules(op, f"W8A{n} on the NPU", n)),
        *(
            Rule("ConvTranspose", f"W8A{n} on the NPU", n, tuple(range(2, 9)), ("tensor", "channel"), "int8")
            for n in (8, 16)
        ),
    ),
    frozenset(
        {
            "Add",
            "AveragePool",
            "Clip",
            "Concat",
            "Div",
            "Gelu",
            "GlobalAveragePool",
            "HardSwish",
            "LayerNormalization",
            "LeakyRelu",
            "MatMul",
            "Mul",
            "PRelu",
            "Pad",
            "ReduceMean",
            "Relu",
            "Resize",
            "Sigmoid",
            "Softmax",
            "Sub",
            "Tanh",
        }
    ),
    output_scale=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
    opsets=(20, 0),  # LayerNormalization and Gelu are single operators
    whole=True,
    static=True,
    apart=False,
    runtime=RUNTIME,
    settings={"soc_model": 60, "htp_arch": 73},
)
