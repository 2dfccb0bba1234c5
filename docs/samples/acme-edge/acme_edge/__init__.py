"""acme-edge: a target, and a log beside each model that is made for it."""

import hashlib
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from onnx import ModelProto
from onnxq_plugins import Job, Pass, Rule, Target, hookimpl

EDGE = Target(
    "acme.edge",
    "the Acme Edge NPU: int8 Conv and Gemm with a scale per output channel, int8 Add and pooling",
    rules=tuple(
        Rule(op, "AcmeInt8", 8, weights=(8,), granularity=("tensor", "channel"), storage="int8")
        for op in ("Conv", "Gemm")
    ),
    integer_ops=frozenset({"Add", "AveragePool", "GlobalAveragePool"}),
    output_scale=frozenset({"Conv", "Gemm"}),
    flatten=False,
)


@hookimpl
def onnxq_targets() -> list[Target]:
    return [EDGE]


@hookimpl(wrapper=True)
def onnxq_run_pass(step: Pass, job: Job) -> Generator[None, dict[str, Any], dict[str, Any]]:
    """Time the pass. What is in job.report is in the report of the run; it must be JSON."""
    start = time.perf_counter()
    told = yield
    if job.target is EDGE:
        seconds = round(time.perf_counter() - start, 4)
        job.report.setdefault("acme_seconds", []).append([step.name, seconds])
    return told


@hookimpl
def onnxq_exported(job: Job, model: ModelProto, path: Path | None) -> None:
    """Write the log. Without -o there is no file, hence no log."""
    if job.target is EDGE and path is not None:
        log = {
            "model": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "passes": job.report.get("acme_seconds", []),
        }
        path.with_suffix(".acme.json").write_text(json.dumps(log, indent=2) + "\n", "utf-8")
