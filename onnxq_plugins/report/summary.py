"""The result of a run in numbers: a row for each layer, sizes, kernels, and a one-line summary."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import files
from onnxq_plugins.export.provenance import version_of
from onnxq_plugins.export.weights import stored_bits
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.reading import bytes_on_disk
from onnxq_plugins.job import Job
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.search.quantizers import share_of_work
from onnxq_plugins.spec import Array


def describe(
    job: Job, model: onnx.ModelProto, data: files.DataFile | None, before: int, inner: Sequence[dict[str, Any]] = ()
) -> None:
    """Complete the report of a job with what follows from its model.

    data     large constants of the model that are written beside it; None if there are none
    before   bytes of the user's own model
    inner    rows of layers inside control flow
    """
    report, planned = job.report, Planned.of(job)
    if data is not None:
        data.flush()
    with job.graph.mapped.reading():
        audit = audit_model(model, folder=data.path.parent if data is not None else None)
    products = audit.products()
    if products and planned.activations:
        job.note(_products_note(job.graph, products))
    after = files.size_of(model) + (data.size if data is not None else 0)
    rows, bits = _rows(job, planned, audit)
    report |= {
        "recipe_name": job.recipe.name,
        "recipe": job.recipe.to_dict(),
        "layers": [*rows, *inner],
        "bytes": {"float": before, "quantized": after},
        "kernels": audit.counts(),
        "float_products": products,
        "machine": {
            "python": platform.python_version(),
            "onnxruntime": version_of("onnxruntime"),
            "onnx": onnx.__version__,
        },
        "bits_per_weight": round(bits, 3),
    }
    kernels = _kernels(job, planned, audit)
    size = f"{before / 1e6:.2f} -> {after / 1e6:.2f} MB"
    report["summary"] = f"{kernels} | {size}, {report.bits_per_weight:.1f} bits per weight"


def original_size(graph: Graph, source: Path | onnx.ModelProto | None) -> int:
    """Bytes of the user's own model; of the graph if there is none."""
    if isinstance(source, Path):
        return bytes_on_disk(source)
    if source is not None:
        return files.size_of(source)
    weights: dict[str, Array] = {}
    return int(graph.model(weights).ByteSize()) + sum(w.nbytes for w in weights.values())


def _products_note(graph: Graph, products: list[str]) -> str:
    share = share_of_work(graph, products)
    work = "" if share is None else f", {100 * share:.1f} % of the multiply-adds"
    return (
        f"products of two activations that run in float: {len(products)}{work}; at their size integer kernels rarely "
        'pay; [[layer]] op = "Attention" quantize = true quantizes them anyway'
    )


def _rows(job: Job, planned: Planned, audit: Audit) -> tuple[list[dict[str, Any]], float]:
    """A row for each layer (see `Report.layers`), and bits per weight on disk over all of them."""
    kernels = {entry.name: entry for entry in audit.layers}
    rows, stored = [], 0.0
    for layer in job.graph.layers:
        spec, rule, entry = job.plan.get(layer.weight), planned.rule(layer), kernels.get(layer.name)
        row: dict[str, Any] = {
            "name": layer.name,
            "op": layer.op,
            "kernel": entry.kernel if entry else "removed",
            "parameters": int(np.prod(layer.shape)),
        }
        bits = stored_bits(layer, spec, rule) if spec is not None and rule is not None else 32.0
        stored += row["parameters"] * bits
        if spec is not None:
            row |= {"weights": spec.describe((layer.out_axis, layer.in_axis)), "bits_per_weight": round(bits, 3)}
        reason = job.report.floats.get(layer.name) or (entry.reason if entry is not None else None)
        if reason is not None:
            row |= {"why_float": str(reason), "why_float_kind": reason.kind}
        rows.append(row)
    return rows, stored / max(sum(row["parameters"] for row in rows), 1)


def _kernels(job: Job, planned: Planned, audit: Audit) -> str:
    """The kernels that run, for the summary."""
    count = len(job.graph.layers)
    quantized = {entry.name: entry.quantized for entry in audit.layers}
    rules = {y.name: planned.rule(y) for y in planned.layers}
    wide = sum(rule is not None and rule.activations > 8 and not quantized.get(name, True) for name, rule in rules.items())
    decoded = sum(rule is not None and rule.storage == "float" for rule in rules.values())
    if decoded:
        kernels = f"{decoded}/{count} layers decoded at load, run in float"
    else:
        kernels = audit.summary() if job.target.here else _elsewhere(job, planned, audit, wide)
    return kernels + (f"; {wide}/{count} layers with 16-bit activations run in float there" if wide else "")


def _elsewhere(job: Job, planned: Planned, audit: Audit, wide: int) -> str:
    """The summary for another runtime, whose kernels onnxruntime does not have; `onnxq audit` shows those.

    wide   layers with 16-bit activations that run in float in onnxruntime, which the summary mentions anyway
    """
    ops = {y.name: y.op for y in planned.layers}
    floats = sum(entry.name in ops and not entry.quantized for entry in audit.layers) - wide
    if floats <= 0:
        return f"{audit.summary()} in onnxruntime"
    every, quantized = Counter(y.op for y in job.graph.layers), Counter(ops.values())
    counts = "; ".join(f"{quantized[op]}/{n} {op}" for op, n in every.items())
    return f"{counts} quantized for {job.target.name}; {floats} run in float in onnxruntime"
