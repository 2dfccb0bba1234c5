"""Where the time of a result goes, beside the user's own model's, for the report's page and its JSON."""

from __future__ import annotations

from typing import Any

from onnxq_plugins.data import Data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.job import Outcome
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.changes import what_to_change
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.runtimes.spending import Spent, classes

_SECONDS = 0.5  # of runs in turn


def timed(result: Outcome, data: Data) -> Audit | None:
    """Both models profiled on the first sample; None where that says nothing about the target, or where they do
    not run on it."""
    if not result.target.here and result.target.integer:
        return None
    try:
        audit = audit_model(result.model, result.original, _SECONDS, data=[next(iter(data))])
    except OnnxqError:
        return None
    return audit if audit.spending else None


def changes(result: Outcome, audit: Audit) -> tuple[str, ...]:
    """What to change first, in sentences."""
    return what_to_change(audit, result.recipe.provides("placement"))


def time_table(result: Outcome, audit: Audit | None) -> dict[str, Any]:
    """For the JSON: the ``shapes``, the time of ``float`` and ``quantized`` by class, and ``changes``; {} without times."""
    if audit is None:
        return {}
    before, after = (spending.to_dict() for spending in audit.spending)
    return {"shapes": audit.timed, "float": before, "quantized": after, "changes": list(changes(result, audit))}


def time_context(result: Outcome, audit: Audit | None) -> dict[str, Any] | None:
    """For the page; None without times."""
    if audit is None:
        return None
    rows = []
    for name in classes(audit.spending):
        before, after = (spending.of_class(name) for spending in audit.spending)
        ops = ", ".join(f"{count} {op}" for op, count in (after.ops or before.ops).items())
        rows.append({"name": name, "cells": [*_cells(before), *_cells(after)], "ops": ops})
    texts = [f"{kind}: {one.text}" for kind, one in zip(("float", "quantized"), audit.spending, strict=True)]
    return {"rows": rows, "shapes": audit.timed, "conversions": texts, "changes": changes(result, audit)}


def _cells(row: Spent) -> tuple[str, str, str]:
    if not row.count and not row.microseconds:
        return ("", "", "")
    return (str(row.count or ""), f"{row.microseconds:.1f}", f"{100 * row.share:.0f}")
