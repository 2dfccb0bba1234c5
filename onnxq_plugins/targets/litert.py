"""LiteRT (TensorFlow Lite), and Arm's Ethos-U NPUs, which run what Vela compiles of the same files.

What its int8 kernels are: tensorflow.org/lite/performance/quantization_spec. Its activations are int8 with any zero point,
or int16 around 0 (16x8), its weights int8 around 0 with a scale per output channel, its biases integers at the scale of the
products."""

from __future__ import annotations

from dataclasses import replace

from onnxq_plugins.formats import tflite
from onnxq_plugins.runtimes.litert import LITERT as INTERPRETER
from onnxq_plugins.runtimes.vela import VELA
from onnxq_plugins.targets.target import Rule, Target, dense_rules

_LAYERS = ("Conv", "Gemm", "MatMul")
_KERNELS = {"Conv": "CONV_2D", "Gemm": "FULLY_CONNECTED", "MatMul": "FULLY_CONNECTED", "ConvTranspose": "TRANSPOSE_CONV"}

LITERT = Target(
    "litert",
    "LiteRT (TensorFlow Lite): signed activations, the whole network in integers",
    (
        *(replace(r, narrow=False) for op in _LAYERS for n in (8, 16) for r in dense_rules(op, _KERNELS[op], n)),
        *(Rule("ConvTranspose", "TRANSPOSE_CONV", n, tuple(range(2, 9)), ("tensor", "channel"), "int8") for n in (8, 16)),
    ),
    frozenset(
        {
            "Add",
            "AveragePool",
            "Clip",
            "Concat",
            "GlobalAveragePool",
            "HardSwish",
            "LeakyRelu",
            "MatMul",
            "Mul",
            "Pad",
            "PRelu",
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
    signed=True,
    symmetric=16,
    either=True,
    opsets=(20, 0),  # LayerNormalization and Gelu are single operators
    whole=True,
    static=True,
    apart=False,
    suffix=".tflite",
    write=tflite.write,
    runtime=INTERPRETER,
    settings={name: default for name, default in tflite.SETTINGS.items() if name != "shapes"},  # `static` knows them
)
ETHOS_U = replace(
    LITERT,
    name="ethos-u",
    doc="Arm Ethos-U NPUs: LiteRT's files, with weights stored in 8 bits and the operators that Vela places on the NPU",
    rules=tuple(
        Rule(op, kernel, n, tuple(range(2, 9)), ("tensor", "channel"), "int8", multipliers=op in _LAYERS)
        for op, kernel in _KERNELS.items()
        for n in (8, 16)
    ),
    integer_ops=LITERT.integer_ops - {"MatMul"},
    runtime=VELA,
    settings={**LITERT.settings, "io": "int8", "layout": "native", "int4": "none", "products": "int8"},
)
