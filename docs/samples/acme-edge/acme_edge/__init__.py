"""acme-edge: an NPU with symmetric int8 activations: its target, the format of its files, its
simulator, and what its compiler wants beside a model."""

import hashlib
import json
import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, numpy_helper
from onnxq_plugins import Job, OnnxqError, Pass, Rule, Target, hookimpl
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime

MAGIC = b"ACME2"


def write(model: ModelProto, settings: Mapping[str, Any]) -> bytes:
    """A file of the NPU: a mark, and the packed network."""
    return MAGIC + zlib.compress(model.SerializeToString())


def simulate(
    file: Path, samples: Sequence[Mapping[str, np.ndarray]], settings: Mapping[str, Any]
) -> Inspection:
    """Run samples. A real NPU would bring a simulator: this one lets onnxruntime compute."""
    content = file.read_bytes()
    if not content.startswith(MAGIC):
        raise OnnxqError(
            f"'{file.name}' is no file of the Acme NPU; write one with --target acme.edge."
        )
    model = onnx.load_from_string(zlib.decompress(content[len(MAGIC) :]))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    outputs = tuple(
        dict(zip(names, session.run(names, dict(sample)), strict=True)) for sample in samples
    )
    decoded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    operators = [
        Executed(
            node.name, node.op_type, "integer" if decoded >= set(node.input[:2]) else "float", "NPU"
        )
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul")
    ]
    return Inspection(outputs, tuple(operators))


SIMULATOR = Runtime(
    "acme-sim", "the Acme Edge NPU's simulator", "pip install acme-edge", simulate, suffix=".acme"
)

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
    suffix=".acme",
    write=write,
    runtime=SIMULATOR,
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
