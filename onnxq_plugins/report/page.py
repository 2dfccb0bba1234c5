"""What was done and how good the result is, as one self-contained page of HTML, and the same as JSON.

One file: matplotlib writes SVG whose colours are replaced by the page's variables. Names of layers are untrusted: jinja2
escapes them, ids of drawings contain none, and a Content-Security-Policy loads nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from onnxq_plugins.data import Data, Source
from onnxq_plugins.errors import PATH, OnnxqError, expects
from onnxq_plugins.files import write_file
from onnxq_plugins.job import Outcome, Report
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.recipe import to_toml
from onnxq_plugins.report.comparison import Comparison, compare
from onnxq_plugins.report.curve import COLORS, Curve
from onnxq_plugins.report.diagnosis import Diagnosis, diagnose, samples_of
from onnxq_plugins.report.plots import drawing, over_steps, plots
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.report.rows import LayerError, percent
from onnxq_plugins.report.times import time_context, time_table, timed
from onnxq_plugins.runtimes.machine import machine_name


class Column(NamedTuple):
    """A column of the table of layers.

    kind     its class in the style sheet: ``n`` for numbers
    """

    name: str
    kind: str = ""


_WHY = Column("why float", "wide")
_COLUMNS = (
    Column("#", "n"),
    Column("layer", "name"),
    Column("op"),
    Column("weight"),
    Column("input bits", "n"),
    Column("accumulated dB", "n"),
    Column("own dB", "n"),
    Column("weight dB", "n"),
    Column("input dB", "n"),
    Column("alone dB", "n"),
    Column("noise %", "n"),
    Column("kernel"),
    _WHY,
)
_SCALE = "6 dB correspond to one bit. Above 30 dB, predictions rarely change; below 10 dB, many do."
_WORDS = {
    "largest_shift_relative_to_bias": "largest correction relative to the largest bias",
    "kept_share_of_range": "smallest share of a range that was kept",
}


def check_page() -> None:
    """Raise OnnxqError if what the page is made with is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OnnxqError(
            f"a report as HTML needs {error.name}; pip install 'onnxq-plugins[report]', or give it a name that "
            "ends in .json."
        ) from error


def is_page(path: Path) -> bool:
    """True if a report of that name is a page rather than JSON."""
    return path.suffix.lower() in (".html", ".htm")


@expects(path=PATH)
def write_report(
    result: Outcome,
    path: str | Path,
    data: Source | Data | None = None,
    *,
    name: str = "",
    command: str = "",
    samples: int = 8,
    attempts: int = 0,
    workers: int | None = None,
    track: Track = silent,
) -> Path:
    """Write the report of a result. If the name ends in .html, this is the page and, beside it, a .json file with the same
    numbers; otherwise only `Result.report` as JSON, and nothing is measured.

    data      sample inputs to measure on, as for `quantize`; those it was calibrated with if not given, which flatter it
    name      of the model, for the title
    command   that made the result
    samples, attempts, workers   as for `diagnose`

    Cost: runs of both networks, up to 32 on calibration samples or 512 on others, 1.1 s of timing, and a diagnosis.
    Raises OnnxqError without the extra ``report``, without samples, or if a file cannot be written.
    """
    path = Path(path)
    if not is_page(path):
        return write_file((json.dumps(result.report, indent=2) + "\n").encode(), path)
    check_page()
    start = time.perf_counter()
    data = samples_of(result, data)
    comparison, audit = compare(result, data), timed(result, data)
    diagnosis = diagnose(result, data, samples=samples, attempts=attempts, workers=workers, track=track)
    made = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine_name()}
    table = {
        **result.report,
        "made": made,
        "verdict": {"level": comparison.grade, "text": comparison.verdict},
        "measured": comparison.to_dict(),
        "time": time_table(result, audit),
        "diagnosis": diagnosis.to_dict(),
        "activations": _activations(diagnosis),
    }
    context = _context(result, comparison, diagnosis, name)
    cost = _cost(diagnosis, comparison, time.perf_counter() - start)
    page = _render({**context, "time": time_context(result, audit), "made": made, "command": command, "cost": cost})
    write_file((json.dumps(table, indent=2) + "\n").encode(), path.with_suffix(".json"))
    return write_file(page.encode(), path)


def _activations(diagnosis: Diagnosis) -> dict[str, Any]:
    """Ranges and percentiles of each planned activation, for the JSON."""
    rows = {}
    for name, x in diagnosis.activations.items():
        low, high = x.percentiles(0.1)
        numbers = {
            "low": x.histogram.low,
            "high": x.histogram.high,
            "percentile_0.1": low,
            "percentile_99.9": high,
            "codes_low": x.grid[0],
            "codes_high": x.grid[1],
        }
        rows[name] = {"bits": x.spec.bits, **{k: float(f"{v:.5g}") for k, v in numbers.items()}, "clipped": x.clipped}
    return rows


# ---- the page -------------------------------------------------------------------------------------------------------------


def _render(context: Mapping[str, Any]) -> str:
    """page.html with its variables filled in; every variable must be there."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page: str = environment.from_string((Path(__file__).parent / "page.html").read_text("utf-8")).render(context)
    return page


def _context(result: Outcome, comparison: Comparison, diagnosis: Diagnosis, name: str) -> dict[str, Any]:
    """The variables of page.html that follow from what was measured.

    name   of the model
    """
    names = [y.name for y in sorted(diagnosis.layers, key=lambda y: y.place)]
    numbers = {name: number for number, name in enumerate(names, 1)}
    properties = {p.key: p.value for p in result.model.metadata_props}
    machine = [f"{key} {value}" for key, value in result.report["machine"].items()]
    return {
        "title": name or "Quantized model",
        "recipe": result.recipe_name or "of your own",
        "target": result.target.name,
        "summary": result.summary.replace("->", "→"),
        "verdict": {"level": comparison.grade, "text": comparison.verdict},
        "scale": _SCALE,
        "cards": _cards(result, comparison),
        "measured": comparison.method,
        "worst": [_explained(diagnosis, y, numbers) for y in diagnosis.explained],
        "tried": bool(diagnosis.tried),
        "overall": [_remedy(diagnosis, r) for r in diagnosis.overall],
        "shares": diagnosis.sharing,
        "output": f"output '{diagnosis.output}'" if diagnosis.output else "the outputs",
        "floats": [
            {
                "name": y.name,
                "op": y.op,
                "why": y.why,
                "work": f"{100 * y.work:.1f} %",
                "remedies": [_remedy(diagnosis, r) for r in y.remedies],
            }
            for y in diagnosis.floats
        ],
        "constants": [
            {
                "name": row["name"],
                "op": row["op"],
                "size": f"{row['float_bytes'] / 1e3:.1f}",
                "stored": row.get("weights", "float"),
                "why": row.get("why_float", ""),
            }
            for row in result.report.constants
        ],
        "plots": [
            *over_steps(comparison.outputs),
            *(plots(diagnosis, names, _bits(result, diagnosis)) if names else ()),
        ],
        "columns": _columns(diagnosis, result.report),
        "rows": _rows(diagnosis, result, numbers),
        "curve": _curve(result, name),
        "steps": _steps(result.report),
        "sections": result.report.sections,
        "warnings": result.report.warnings,
        "notes": result.report.notes,
        "seed": properties.get("onnxq.seed", "0"),
        "versions": ", ".join([*properties.get("onnxq.versions", "").split(), *machine]),
        "toml": to_toml(result.report.recipe),
    }


def _cards(result: Outcome, comparison: Comparison) -> list[dict[str, str]]:
    """The numbers on top of the page."""
    report, times = result.report, comparison.milliseconds
    layers = report.layers
    integer = sum("why_float" not in row for row in layers)
    kernels = ", ".join(f"{n} {kernel}" for kernel, n in Counter(row["kernel"] for row in layers).most_common(3))
    if n := len(report.float_products):
        kernels += f"; {n} product{'s' * (n > 1)} of two activations run{'s' * (n == 1)} in float"
    cards = [("SQNR of the outputs", f"{comparison.sqnr:.1f}", "dB", comparison.kind)]
    if comparison.agreement is not None:
        cards.append(("Same class as float", f"{comparison.agreement:.1f}", "%", comparison.kind))
    if (top1 := comparison.top1) is not None:
        cards.append(("Accuracy (top-1)", f"{top1.quantized:.1f}", "%", f"float {top1.reference:.1f} %; {comparison.kind}"))
    before, after = report.size("float") / 1e6, report.size("quantized") / 1e6
    unit, factor, digits = ("MB", 1, 2) if before >= 1 else ("kB", 1000, 0)
    size = f"float {before * factor:.{digits}f} {unit}: {after / before:.0%} of it"
    cards.append(("Size", f"{after * factor:.{digits}f}", unit, size))
    if not comparison.elsewhere:
        note = f"float {times.reference:.3g} ms: {comparison.speed:.2f} times the speed"
        cards.append(("Latency", f"{times.quantized:.3g}", "ms", note))
    where = f"quantized for {result.target.name}" if comparison.elsewhere else "in integer kernels"
    cards += [
        (f"Layers {where}", f"{integer}", f"of {len(layers)}", kernels),
        ("Bits per weight", f"{report.bits_per_weight:.2f}", "", _stored(result)),
    ]
    return [dict(zip(("name", "value", "unit", "note"), card, strict=True)) for card in cards]


def _stored(result: Outcome) -> str:
    """Why the bits per weight are not those of the recipe."""
    planned = [result.plan[y.weight].bits for y in result.graph.layers if y.weight in result.plan]
    if planned and result.report.bits_per_weight < min(planned):
        return "in the file; channels whose codes fit in 4 bits have 4"
    return "in the file, with scales and multipliers"


def _explained(diagnosis: Diagnosis, layer: LayerError, numbers: Mapping[str, int]) -> dict[str, Any]:
    """One of the worst layers in words."""
    return {
        "number": f"{numbers[layer.name]}. ",
        "name": layer.name,
        "op": layer.op if layer.is_layer else "",
        "kinds": [c.kind.replace("-", " ") for c in layer.causes[:2]],
        "text": layer.text,
        "remedies": [_remedy(diagnosis, r) for r in layer.remedies[:3]],
    }


def _remedy(diagnosis: Diagnosis, remedy: Remedy) -> dict[str, str]:
    attempt = next((t for t in diagnosis.tried if t.remedy.typed == remedy.typed), None)
    result = "" if attempt is None else f"tried, {attempt.verdict}"
    return {"text": remedy.text, "typed": remedy.typed, "result": result}


def _bits(result: Outcome, diagnosis: Diagnosis) -> dict[str, tuple[float, float]]:
    """Bits of each layer's weight and input; 32 for float."""
    plan = result.plan
    return {
        y.name: (float(plan[y.weight].bits) if y.weight in plan else 32.0, _input_bits(diagnosis, y.name))
        for y in result.graph.layers
    }


def _input_bits(diagnosis: Diagnosis, name: str) -> float:
    layer = next(y for y in diagnosis.layers if y.name == name)
    return float(diagnosis.activations[layer.input].spec.bits) if layer.input else 32.0


def _columns(diagnosis: Diagnosis, report: Report) -> list[Column]:
    """Columns of the table of layers, with those of passes; why a layer is float only if one is."""
    added = [Column(name, "n" if _numbers(report, name) else "wide") for name in report.columns]
    return [*_COLUMNS[:-1], *added, *([_WHY] if diagnosis.floats else [])]


def _numbers(report: Report, column: str) -> bool:
    """True if a column of a pass holds numbers alone."""
    return all(type(row.get(column, 0)) in (int, float) for row in report.layers)


def _cell(value: Any) -> str:
    """A value of a pass."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(diagnosis: Diagnosis, result: Outcome, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of the table of layers, in the order of the network."""
    by_name = {row["name"]: row for row in result.report.layers}
    worst = {y.name for y in diagnosis.explained}
    rows, columns = [], _columns(diagnosis, result.report)
    for y in sorted(diagnosis.layers, key=lambda y: y.place):
        row = by_name.get(y.name, {}) if y.is_layer else {}
        own = y.own
        cells = [
            str(numbers[y.name]),
            y.name,
            y.op if row else "",
            row.get("weights", "float" if row else ""),
            f"{_input_bits(diagnosis, y.name):g}" if row else f"{result.plan[y.name.partition(' ')[2]].bits}",
            _db(y.sqnr),
            _db(own.both if own else None),
            _db(own.weight if own and row else None),
            _db(own.input if own and row else None),
            _db(y.alone),
            percent(y.share),
            row.get("kernel", ""),
            *(_cell(row.get(name, "")) for name in result.report.columns),
            row.get("why_float", ""),
        ]
        rows.append({"worst": y.name in worst, "cells": list(zip(cells, columns, strict=False))})
    return rows


def _db(value: float | None) -> str:
    return "" if value is None or value >= IDENTICAL else f"{value:.1f}"


def _curve(result: Outcome, name: str) -> dict[str, Any] | None:
    """The points of a search, drawn and as a table; None if no search was run."""
    curve = Curve.of(result, name)
    if curve is None:
        return None
    columns, rows = curve.table()
    size = "half" if curve.metric == "sqnr" else "pair"
    return {"svg": drawing(curve.figure(), "curve", COLORS), "columns": columns, "rows": rows, "size": size}


def _steps(report: Report) -> list[dict[str, str]]:
    """The passes that were run."""
    return [
        {
            "name": step["pass"],
            "seconds": f"{step['seconds']:.2f}",
            "result": _short(step.get("result", {})),
            "exact": "unchanged" if step.get("exact", True) else "changed",
        }
        for step in report.steps
    ]


def _short(result: Mapping[str, Any]) -> str:
    """What a pass returned, in one line: long lists and tables as their length."""
    parts = []
    for key, value in result.items():
        words = _WORDS.get(key, key.replace("_", " "))
        value = float(f"{value:.3g}") if isinstance(value, float) else value
        if isinstance(value, (list, tuple, Mapping)) and len(str(value)) > 60:
            parts.append(f"{words}: {len(value)} {'entry' if len(value) == 1 else 'entries'}")
        elif value not in ({}, [], ""):
            parts.append(f"{words}: {json.dumps(value) if isinstance(value, (list, tuple, Mapping)) else value}")
    return ", ".join(parts)


def _cost(diagnosis: Diagnosis, comparison: Comparison, seconds: float) -> str:
    return (
        f"This report took {seconds:.1f} s. The summary was measured on {comparison.samples} samples, the layers on "
        f"{diagnosis.samples}, their shares of the noise on {min(diagnosis.samples, 4)} of these."
    )
