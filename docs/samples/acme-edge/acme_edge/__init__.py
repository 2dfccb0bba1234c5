"""acme-edge: an NPU with symmetric int8 activations, and what its compiler wants beside a model."""

import hashlib
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from onnx import ModelProto, numpy_helper
from onnxq_plugins import Job, Pass, Rule, Target, hookimpl

EDGE = Target(
    "acme.edge",
    "the Acme Edge NPU: symmetric int8 activations, int8 Conv and MatMul with a scale per output "
    "channel and int32 biases, no Gemm, opset 13",
    rules=tuple(
        Rule(op, "AcmeInt8", 8, weights=(8,), granularity=("tensor", "channel"), storage="int8")
        for op in ("Conv", "MatMul")
    ),
    integer_ops=frozenset({"Add", "AveragePool", "GlobalAveragePool"}),
    output_scale=frozenset({"Conv", "MatMul"}),
    signed=True,
    symmetric=True,
    bias="int32",
    opsets=(13, 13),
    operators=frozenset(
        {
            *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Max", "Min", "Greater", "Where", "Cast"),
            *("Relu", "PRelu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid"),
            *("Tanh", "Erf", "Softmax"),
            *("Conv", "ConvTranspose", "MatMul", "MaxPool", "AveragePool", "GlobalAveragePool"),
            *("ReduceMean", "ReduceMax", "Concat", "Split", "Slice", "Pad", "Gather", "Resize"),
            *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Shape"),
        }
    ),
    flatten=False,
    settings={"soc": 2, "cores": 1},
)


@hookimpl
def onnxq_targets() -> list[Target]:
    return [EDGE]


@hookimpl(wrapper=True)
def onnxq_run_pass(step: Pass, job: Job) -> Generator[None, dict[str, Any], dict[str, Any]]:
    """Time the pass. What is in job.report is in the report of the run; it must be JSON."""
    start = time.perf_counter()
    told = yield
    if job.target.name == EDGE.name:
        seconds = round(time.perf_counter() - start, 4)
        job.report.setdefault("acme_seconds", []).append([step.name, seconds])
    return told


@hookimpl
def onnxq_exporting(job: Job, model: ModelProto) -> ModelProto:
    """The compiler asks each file for its format."""
    if job.target.name == EDGE.name:
        model.metadata_props.add(key="acme.format", value="2")
    return model


@hookimpl
def onnxq_exported(job: Job, model: ModelProto, path: Path | None) -> None:
    """Write what the compiler wants to know. Without -o there is no file, hence no sidecar."""
    if job.target.name == EDGE.name and path is not None:
        sidecar = {
            "model": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            **job.target.settings,
            "scales": scales(model),
            "passes": job.report.get("acme_seconds", []),
        }
        path.with_suffix(".acme.json").write_text(json.dumps(sidecar, indent=2) + "\n", "utf-8")


def scales(model: ModelProto) -> dict[str, float]:
    """The scale of each activation that becomes codes; zero points are 0."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        node.input[0]: float(numpy_helper.to_array(constants[node.input[1]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
