"""What runtimes were asked and told, on the command line."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from onnxq_plugins.cli.console import echo, show
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.runtime import Executed, Proof

_NAMED = 5  # operators of a kind


def runtime_settings(given: list[str] | None, python: str = "") -> dict[str, str]:
    """Settings of a runtime. Raises OnnxqError for text without '='."""
    told = {"python": python} if python else {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise OnnxqError(f"--set {text}: give KEY=VALUE, such as --set soc_model=60.")
        told[key.strip()] = value.strip()
    return told


def show_proof(proof: Proof, audit: Audit | None) -> None:
    """Print how each kind of operator runs, and how near the outputs are; with an audit, what became of layers."""
    kinds = ("integer", "fake", "float")
    table = Table("operator", "where", *kinds, "not integer, or not where it should be", box=None, header_style="bold")
    groups: dict[tuple[str, str], list[Executed]] = {}
    for each in proof.inspection.operators:
        if each.kind != "moves":
            groups.setdefault((each.op, each.where), []).append(each)
    for (op, where), rows in groups.items():
        counts = [str(sum(row.kind == kind for row in rows) or "") for kind in kinds]
        rest = [row.name + (f" ({row.why})" if row.why else "") for row in rows if row.kind != "integer" or row.why]
        named = ", ".join(rest[:_NAMED]) + (", ..." if len(rest) > _NAMED else "")
        table.add_row(escape(op), where, *counts, escape(named), style="yellow" if rest else None)
    if audit is None:
        echo("")
    if groups:
        show(table)
    if moves := sum(each.kind == "moves" for each in proof.inspection.operators):
        echo(f"\nbeside them {moves} that compute nothing: conversions, copies, shapes")
    if audit is not None and audit.layers:
        echo(audit.summary)
    echo(f"{proof.runtime}: {proof.text}")
