"""The result of a run in numbers: a row for each layer, sizes, kernels, and a one-line summary."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import files
from onnxq_plugins.errors import OnnxqError, Reason, counted
from onnxq_plugins.export.provenance import version_of
from onnxq_plugins.export.weights import stored_bits
from onnxq_plugins.graph import Graph, constants
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.graph.reading import bytes_on_disk
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.branches import Inside
from onnxq_plugins.layers.float_inputs import shared_codes
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import adapted
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.constants import describe_held
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.search.quantizers import share_of_work
from onnxq_plugins.spec import Array


def describe(job: Job, model: onnx.ModelProto, data: files.DataFile | None, before: int, inner: Inside) -> None:
    """Complete the report of a job with what follows from its model.

    data     large constants of the model that are written beside it; None if there are none
    before   bytes of the user's own model
    inner    what is inside control flow
    """
    report, planned = job.report, Planned.of(job)
    if data is not None:
        data.flush()
    with job.graph.mapped.reading():
        audit = _audited(job, model, data.path.parent if data is not None else None)
    audit = replace(audit, total=before)
    products: list[str] = []
    if not job.target.own_kernels:
        products = [n for n in audit.products() if n not in report.floats or report.floats[n].kind != "quality"]
    if products and planned.activations:
        job.note(_products_note(job.graph, products))
    for text in (*adapted(job), *_inputs_notes(job, planned)):
        job.note(text)
    job.report["floats"] = _floats(job, planned, model)
    after = files.size_of(model) + (data.size if data is not None else 0)
    rows = _rows(job, planned, audit, report.pop("added", {}))
    outside = [row for row in _constants(job) if not {*row["readers"]} <= inner.operators] + inner.constants
    report |= {
        "recipe_name": job.recipe.name,
        "recipe": job.recipe.to_dict(),
        "layers": [*rows, *inner.layers],
        "constants": outside,
        "bytes": {"float": before, "quantized": after},
        "kernels": dict(Counter(row["kernel"] for row in rows)) if job.target.own_kernels else audit.counts(),
        "float_products": products,
        "machine": {
            "python": platform.python_version(),
            "onnxruntime": version_of("onnxruntime"),
            "onnx": onnx.__version__,
        },
        "bits_per_weight": round(_bits_per_weight([*rows, *inner.layers, *outside]), 3),
    }
    report["summary"] = (
        f"{_kernels(job, planned, audit)} | {sizes(before, after)}, {report.bits_per_weight:.1f} bits per weight"
    )


def set_size(report: Report, size: int) -> None:
    """Tell the bytes of the file itself, where these are not those of the model that was described: another format, or
    shapes that were fixed since."""
    before, told = report["bytes"]["float"], report["bytes"]["quantized"]
    report["summary"] = report["summary"].replace(sizes(before, told), sizes(before, size), 1)
    report["bytes"] = {"float": before, "quantized": size}


def sizes(before: int, after: int) -> str:
    """Bytes of two files in words."""
    if before >= 1e6 and after >= 1e5:
        return f"{before / 1e6:.2f} -> {after / 1e6:.2f} MB"
    return f"{before / 1e3:.1f} -> {after / 1e3:.1f} kB"


def _audited(job: Job, model: onnx.ModelProto, folder: Path | None) -> Audit:
    """What runs in onnxruntime. It is only asked for its opinion about a file that is for integer kernels elsewhere."""
    try:
        return audit_model(model, folder=folder)
    except OnnxqError as error:
        if not job.target.foreign:
            raise
        job.note(f"the file is for target '{job.target.name}', and onnxruntime does not take it: {error}")
        return Audit((), {})


def _floats(job: Job, planned: Planned, model: onnx.ModelProto) -> dict[str, Reason]:
    """What stays float, as the last pass leaves it: without operators that are gone and layers that were quantized after
    all, with layers that passes took out of the plan. In the order of the network: equal runs say the same."""
    place = {str(node.name): n for n, node in enumerate(job.graph.nodes)}
    inner = (node.name for graph in all_graphs(model.graph) for node in graph.node)
    place |= {name: n for n, name in enumerate(dict.fromkeys(inner), len(place)) if name not in place}
    rules = {layer.name: planned.rule(layer) for layer in planned.layers}
    coded = {name for name, rule in rules.items() if rule is not None and rule.activations}
    floats = {name: reason for name, reason in job.report.floats.items() if name in place and name not in coded}
    for layer in job.graph.layers:
        if layer.name not in floats and layer.weight not in job.plan:
            floats[layer.name] = Reason("unquantized", "the passes left its weight out of the plan")
    return dict(sorted(floats.items(), key=lambda item: place[item[0]]))


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


_ROUNDED = "MatMulNBits of onnxruntime would round inputs to 8 bits per block, which costs more than rounded weights do"
_SHARED = "onnxruntime makes no MatMulNBits of weights that layers share, and would decode them in every run"


def _inputs_notes(job: Job, planned: Planned) -> Iterator[str]:
    """What becomes of the float inputs of weight-only layers (`layers.float_inputs`)."""

    def several(count: int, names: str, verb: str) -> str:
        return f"{count} weight-only layer{'s' * (count > 1)}{names} {verb}{'s' * (count == 1)}"

    decoded = [y for y in planned.layers if job.plan[y.weight].decoded and y.name not in job.report.floats]
    shared = shared_codes(job, decoded)
    for why in (_ROUNDED, _SHARED):
        layers = [y for y in decoded if (y.weight in shared) == (why is _SHARED)]
        if layers:
            names = ", ".join(f"'{y.name}'" for y in layers[:4]) + (" ..." if len(layers) > 4 else "")
            yield f"{several(len(layers), f' ({names})', 'compute')} in float, weights decoded at load: {why}"
    rules = {layer.weight: planned.rule(layer) for layer in planned.layers}
    bits = [job.plan[name].bits for name, rule in rules.items() if rule is not None and rule.storage == "blocked"]
    if bits and (max(bits) > 4 or not job.calibration.ready):  # beside 4-bit weights it is next to nothing
        cost = "about as much as weights in 8 bits do" if job.calibration.ready else "without data nobody knows how much"
        yield (
            f"{several(len(bits), '', 'run')} as MatMulNBits, in which onnxruntime rounds inputs to 8 bits per block; that "
            f"costs accuracy, {cost}; session option session.qdq_matmulnbits_accuracy_level = 1 keeps them float, but slows "
            "it down"
        )


def _bits_per_weight(rows: list[dict[str, Any]]) -> float:
    """Bits on disk of a weight, over all layers and constants outside them."""
    stored = sum(
        row["parameters"] * row.get("bits_per_weight", 8 * row.get("float_bytes", 4 * row["parameters"]) / row["parameters"])
        for row in rows
    )
    return float(stored / max(sum(row["parameters"] for row in rows), 1))


def _constants(job: Job) -> list[dict[str, Any]]:
    """A row for each constant outside layers (see `Report.constants`)."""
    rows = []
    for constant in constants(job.graph):
        spec = job.plan.get(constant.name)
        row: dict[str, Any] = {
            "name": constant.name,
            "op": constant.op,
            "readers": [name for name, _ in constant.readers],
            "parameters": constant.size,
            "float_bytes": constant.bytes,
        }
        if spec is not None:
            bits = (4 if spec.bits <= 4 else 8) + 32 * np.asarray(spec.scale).size / constant.size
            row |= {"weights": spec.describe(), "bits_per_weight": round(bits, 3)}
        else:
            reason = next((r for name in row["readers"] if (r := job.report.floats.get(name)) is not None), None)
            row |= {"why_float": str(reason), "why_float_kind": reason.kind} if reason is not None else {}
        rows.append(row)
    return rows


def _rows(job: Job, planned: Planned, audit: Audit, added: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each layer (see `Report.layers`).

    added   columns of passes -> layer -> value
    """
    kernels = {entry.name: entry for entry in audit.layers}
    shared = shared_codes(job, [y for y in planned.layers if job.plan[y.weight].decoded])
    rows = []
    for layer in job.graph.layers:
        spec, rule, entry = job.plan.get(layer.weight), planned.rule(layer), kernels.get(layer.name)
        if job.target.own_kernels:  # what onnxruntime runs says nothing
            kernel, why = rule.kernel if rule is not None else layer.op, None
        else:
            kernel, why = (entry.kernel, entry.reason) if entry is not None else ("removed", None)
        row: dict[str, Any] = {
            "name": layer.name,
            "op": layer.op,
            "kernel": kernel,
            "parameters": int(np.prod(layer.shape)),
        }
        if spec is not None:
            bits = stored_bits(layer, spec, rule) if rule is not None else 32.0
            row |= {"weights": spec.describe((layer.out_axis, layer.in_axis)), "bits_per_weight": round(bits, 3)}
        reason = job.report.floats.get(layer.name) or why
        if spec is not None and spec.decoded and layer.name not in job.report.floats:
            text = _SHARED if layer.weight in shared else "MatMulNBits would round its inputs to 8 bits per block"
            reason = Reason("float-inputs", f"{text}; its weight is decoded to float at load")
        if reason is not None:
            row |= {"why_float": str(reason), "why_float_kind": reason.kind}
        rows.append(row | {name: values[layer.name] for name, values in added.items() if layer.name in values})
    return rows


def _kernels(job: Job, planned: Planned, audit: Audit) -> str:
    """The kernels that run, for the summary; layers that a pass keeps in float are left out."""
    reasons = job.report.floats
    count = sum(y.name not in reasons or reasons[y.name].kind != "pass" for y in job.graph.layers)
    quantized = {entry.name: entry.quantized for entry in audit.layers}
    rules = {y.name: planned.rule(y) for y in planned.layers}
    wide = sum(rule is not None and rule.activations > 8 and not quantized.get(name, True) for name, rule in rules.items())
    decoded = sum(rule is not None and rule.storage == "float" for rule in rules.values())
    if decoded and not job.target.integer:
        names = {layer.name for layer in job.graph.layers}
        outside = describe_held([held for held in audit.constants if held.name not in names], audit.total)
        kernels = "; ".join([f"{decoded}/{counted(count, 'layer')} decoded at load, run in float", *outside])
    elif job.target.own_kernels:
        return _quantized(job, planned, audit)
    else:
        kernels = audit.summary if job.target.here else _elsewhere(job, planned, audit, wide)
    return kernels + (f"; {wide}/{counted(count, 'layer')} with 16-bit activations run in float there" if wide else "")


def _elsewhere(job: Job, planned: Planned, audit: Audit, wide: int) -> str:
    """The summary for another runtime, whose kernels onnxruntime does not have; `onnxq audit` shows those.

    wide   layers with 16-bit activations that run in float in onnxruntime, which the summary mentions anyway
    """
    names = {y.name for y in planned.layers}
    floats = sum(entry.name in names and not entry.quantized for entry in audit.layers) - wide
    if floats <= 0 and (audit.layers or not job.graph.layers):
        return f"{audit.summary} in onnxruntime"
    return _quantized(job, planned, audit, f"{floats} run in float in onnxruntime" if audit.layers else "")


def _quantized(job: Job, planned: Planned, audit: Audit, there: str = "") -> str:
    """How many layers of each operator are quantized; what to say of them then; constants outside layers."""
    every, quantized = Counter(y.op for y in job.graph.layers), Counter(y.op for y in planned.layers)
    counts = "; ".join(f"{quantized[op]}/{n} {op}" for op, n in every.items()) or "no layer"
    return "; ".join([f"{counts} quantized for {job.target.name}", *([there] if there else []), *audit.outside()])
