"""Files that most runtimes load: plain QDQ of opset 13, and its older sister, standard quantized operators."""

from __future__ import annotations

from dataclasses import replace

from onnxq_plugins.formats import qoperator
from onnxq_plugins.runtimes.opencv import OPENCV
from onnxq_plugins.runtimes.tract import TRACT
from onnxq_plugins.targets.target import CHAIN, Rule, Target

PORTABLE = Target(
    "portable",
    "runtimes that read plain ONNX: opset 13, int8 codes, nothing but standard operators",
    tuple(
        Rule(op, "int8", 8, tuple(range(2, 9)), ("tensor", "channel"), "int8", multipliers=True)
        for op in ("Conv", "Gemm", "MatMul")
    ),
    CHAIN,
    flatten=False,
    opsets=(13, 13),
    static=True,
    apart=False,
    runtime=TRACT,
)
QOPERATOR = replace(
    PORTABLE,
    name="qoperator",
    doc="runtimes that know QLinearConv and QLinearMatMul, such as OpenCV's dnn; the rest is plain QDQ of opset 13",
    write=qoperator.write,
    runtime=OPENCV,
)
