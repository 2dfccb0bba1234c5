"""What was done and what it gave, as one page of HTML that needs nothing beside it, and the same as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq_plugins import runtime
from onnxq_plugins.calibration import Track, silent
from onnxq_plugins.curve import COLORS, Curve
from onnxq_plugins.data import Data, Source
from onnxq_plugins.diagnose import Diagnosis, LayerError, diagnose, samples_of
from onnxq_plugins.engine import Result, write_file
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.measure import sqnr, top1
from onnxq_plugins.remedies import Remedy, recipe_toml

if TYPE_CHECKING:
    from onnxq_plugins.plots import Plot

_MEASURED = 32  # samples for the summary
_SECONDS = 0.6  # of interleaved runs for the latencies
_SHOWN = 5  # layers that are explained
_COLUMNS = (("#", "number"), ("layer", ""), ("op", ""), ("weight", ""), ("bits per weight", "number"),
            ("input bits", "number"), ("gathered dB", "number"), ("own dB", "number"), ("weight dB", "number"),
            ("input dB", "number"), ("alone dB", "number"), ("noise %", "number"), ("kernel", ""), ("integer", ""),
            ("why float", "wide"))


def check_page() -> None:
    """Raise OnnxqError if what the page is made with is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OnnxqError(f"a report as HTML needs {error.name}; pip install 'onnxq-plugins[report]', or give it a name that "
                         "ends in .json.") from error


def is_page(path: Path) -> bool:
    """True if a report of that name is a page rather than JSON."""
    return path.suffix.lower() in (".html", ".htm")


def write_report(result: Result, path: str | Path, data: Source | Data | None = None, *, name: str = "", command: str = "",
                 samples: int = 8, attempts: int = 0, workers: int | None = None, track: Track = silent) -> Path:
    """Write the report of a result. A name that ends in .html gives the page and, beside it, .json with the same in numbers;
    any other name gives what `Result.report` holds as JSON, without measuring anything.

    data      sample inputs to measure on, as for `quantize`; those it was calibrated with if not given
    name      of the model, for the title
    command   that made the result
    samples, attempts, workers   as for `diagnose`

    Cost: up to 32 runs of both networks, 0.6 s of timing, and a diagnosis. Raises OnnxqError without the extra ``report``,
    without samples, or if a file cannot be written.
    """
    path = Path(path)
    if not is_page(path):
        return write_file((json.dumps(result.report, indent=2) + "\n").encode(), path)
    check_page()
    start = time.perf_counter()
    data = samples_of(result, data)
    measured = _measured(result, data)
    found = diagnose(result, data, samples=samples, attempts=attempts, workers=workers, track=track)
    table = {**result.report, "measured": measured, "diagnosis": found.to_dict(), "activations": _activations(found)}
    page = _page(result, found, measured, name, command, start)
    write_file((json.dumps(table, indent=2) + "\n").encode(), path.with_suffix(".json"))
    return write_file(page.encode(), path)


def _measured(result: Result, data: Data) -> dict[str, Any]:
    """Accuracy and latency of the quantized network beside the user's own model."""
    feeds, labels = data.spread(_MEASURED), data.spread_labels(_MEASURED)
    runners = [runtime.session(result.original), runtime.session(result.model)]
    exact, quantized = (runtime.outputs(runner, (runtime.wanted(runner, feed) for feed in feeds)) for runner in runners)
    found: dict[str, Any] = {"samples": len(feeds), "of": data.size, "where": data.where,
                             "calibrated_on_them": data is result.data, "sqnr": round(sqnr(exact, quantized), 2)}
    if exact[0].ndim > 1 and exact[0].shape[-1] > 1:
        found["agreement"] = round(100 * runtime.agreement(exact[0], quantized[0]), 2)
    if labels is not None:
        right = np.concatenate(labels)
        found["top1"] = {"float": round(top1(exact, exact, right), 2), "quantized": round(top1(exact, quantized, right), 2)}
    slow, fast = runtime.latency(runners, [runtime.wanted(runner, feeds[0]) for runner in runners], _SECONDS)
    found["milliseconds"] = {"float": round(slow, 4), "quantized": round(fast, 4), "machine": platform.machine()}
    return found


def _activations(found: Diagnosis) -> dict[str, Any]:
    made = {}
    for name, x in found.activations.items():
        low, high = x.percentiles(0.1)
        numbers = {"low": x.histogram.low, "high": x.histogram.high, "percentile_0.1": low, "percentile_99.9": high,
                   "codes_low": x.grid[0], "codes_high": x.grid[1]}
        made[name] = {"bits": x.spec.bits, **{k: float(f"{v:.5g}") for k, v in numbers.items()}, "clipped": x.clipped}
    return made


# ---- the page -------------------------------------------------------------------------------------------------------------


def _page(result: Result, found: Diagnosis, measured: Mapping[str, Any], name: str, command: str, start: float) -> str:
    import jinja2

    from onnxq_plugins.plots import drawing, plots

    report = result.report
    order = [y.name for y in result.graph.layers]
    number = {layer: n for n, layer in enumerate(order, 1)}
    rows = {row["name"]: row for row in report["layers"]}
    bits = [(float(result.plan[y.weight].bits) if y.weight in result.plan else 32.0, _input_bits(found, y.name))
            for y in result.graph.layers]
    drawn: list[Plot] = plots(found, order, bits) if order else []
    shown = [y for y in found.layers if y.own is not None][:_SHOWN]
    curve = Curve.of(result, name)
    columns, points = curve.table() if curve is not None else ([], [])
    props = {p.key: p.value for p in result.model.metadata_props}
    machine = report["machine"]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "report.html").read_text("utf-8"))
    made: str = template.render(
        title=name or "Quantized model", recipe=result.recipe_name or "of your own", target=result.target.name,
        summary=result.summary.replace("->", "→"), cards=_cards(result, measured), measured=_sentence(measured),
        worst=[_explained(found, y, number) for y in shown], tried=bool(found.tried), adds_up=found.adds_up,
        floats=[{"name": y.name, "op": y.op, "why": y.why, "work": f"{100 * y.work:.1f} %",
                 "remedies": [_way(found, r) for r in y.remedies]} for y in found.floats],
        plots=drawn, columns=_columns(bool(found.floats)),
        rows=_rows(found, rows, number, {y.name for y in shown}),
        curve=None if curve is None else {"svg": drawing(curve.figure(), "curve", COLORS), "columns": columns,
                                          "rows": points, "size": "half" if curve.metric == "sqnr" else "pair"},
        steps=[{"name": s["pass"], "seconds": f"{s['seconds']:.2f}", "told": _told(s.get("told", {})),
                "exact": "unchanged" if s.get("exact", True) else "changed"} for s in report["steps"]],
        notes=report["notes"], command=command, seed=props.get("onnxq.seed", "0"), versions=", ".join(
            [*props.get("onnxq.versions", "").split(), *(f"{key} {value}" for key, value in machine.items())]),
        toml=recipe_toml(report["recipe"]), cost=_cost(found, measured, start))
    return made


def _columns(floats: bool) -> list[dict[str, Any]]:
    """Headings of the table; the last one tells nothing where no layer is float."""
    return [{"name": name, "number": kind == "number", "wide": kind == "wide"} for name, kind in _COLUMNS
            if floats or kind != "wide"]


def _cards(result: Result, measured: Mapping[str, Any]) -> list[dict[str, str]]:
    report, times = result.report, measured["milliseconds"]
    sizes, layers = report["bytes"], report["layers"]
    integer = sum("why_float" not in row for row in layers)
    kernels = ", ".join(f"{n} {kernel}" for kernel, n in sorted(report["kernels"].items(), key=lambda k: -k[1])[:3])
    on = f"{measured['samples']} {'calibration ' if measured['calibrated_on_them'] else ''}samples"
    cards = [("SQNR of the outputs", f"{measured['sqnr']:.1f}", "dB", on)]
    if "agreement" in measured:
        cards.append(("Same argmax as float", f"{measured['agreement']:.1f}", "%", on))
    if "top1" in measured:
        right = measured["top1"]
        cards.append(("Accuracy (top-1)", f"{right['quantized']:.1f}", "%", f"float {right['float']:.1f} %; {on}"))
    before, after = (sizes[key] / 1e6 for key in ("float", "quantized"))
    unit, factor = ("MB", 1) if before >= 1 else ("kB", 1000)
    digits = 2 if unit == "MB" else 0
    cards += [("Size", f"{after * factor:.{digits}f}", unit,
               f"float {before * factor:.{digits}f} {unit}: {after / before:.0%} of it"),
              ("Latency", f"{times['quantized']:.3g}", "ms",
               f"float {times['float']:.3g} ms: {times['float'] / times['quantized']:.2f} times the speed"),
              ("Layers in integer kernels", f"{integer}", f"of {len(layers)}", kernels),
              ("Bits per weight", f"{report['bits_per_weight']:.2f}", "", "as stored, multipliers included")]
    return [dict(zip(("name", "value", "unit", "note"), card, strict=True)) for card in cards]


def _sentence(measured: Mapping[str, Any]) -> str:
    of = f"{measured['samples']} of {measured['of']} samples" if measured["of"] else f"{measured['samples']} samples"
    where = "" if measured["where"] == "the data" else f" ({measured['where']})"
    told = f"SQNR and argmax were measured on {of}{where}"
    told += (", the ones the network was calibrated on: they flatter it, so judge it on others with onnxq compare."
             if measured["calibrated_on_them"] else ".")
    machine = measured["milliseconds"]["machine"]
    return f"{told} Latency: onnxruntime, {machine}, batch 1, one thread, median of runs in turn with the float model."


def _explained(found: Diagnosis, layer: LayerError, number: Mapping[str, int]) -> dict[str, Any]:
    at = f"{number[layer.name]}. " if layer.name in number else ""
    return {"number": at, "name": layer.name, "op": layer.op, "kinds": [c.kind.replace("-", " ") for c in layer.causes[:2]],
            "text": found.told(layer), "remedies": [_way(found, r) for r in layer.remedies[:3]]}


def _way(found: Diagnosis, remedy: Remedy) -> dict[str, str]:
    tried = next((t for t in found.tried if t.remedy.typed == remedy.typed), None)
    result = "" if tried is None else f"tried: {tried.sqnr - found.sqnr:+.1f} dB" if tried.sqnr is not None else (
        f"tried and refused: {tried.refused}")
    return {"text": remedy.text, "typed": remedy.typed, "result": result}


def _rows(found: Diagnosis, rows: Mapping[str, Mapping[str, Any]], number: Mapping[str, int],
          worst: set[str]) -> list[dict[str, Any]]:
    layers = sorted(found.layers, key=lambda y: number.get(y.name, len(number) + 1))
    made, columns = [], _columns(bool(found.floats))
    for y in layers:
        row = rows.get(y.name, {})
        own = y.own
        float_ = "why_float" in row
        cells = [str(number.get(y.name, "")), y.name, y.op, row.get("weights", "float" if row else ""),
                 f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else "32" if row else "",
                 f"{_input_bits(found, y.name):g}" if row else f"{found.activations[y.input].spec.bits}",
                 _db(y.sqnr), _db(own.both if own else None), _db(own.weight if own and row else None),
                 _db(own.input if own and row else None), _db(y.alone), "" if y.share is None else f"{100 * y.share:.1f}",
                 row.get("kernel", ""), ("no" if float_ else "yes") if row else "", row.get("why_float", "")]
        made.append({"worst": y.name in worst, "cells": list(zip(cells, columns, strict=False))})
    return made


def _db(value: float | None) -> str:
    return "" if value is None or value >= 200 else f"{value:.1f}"


def _input_bits(found: Diagnosis, name: str) -> float:
    layer = next(y for y in found.layers if y.name == name)
    return float(found.activations[layer.input].spec.bits) if layer.input else 32.0


def _told(told: Mapping[str, Any]) -> str:
    """What a pass told, in a line: long lists and tables as their length."""
    parts = []
    for key, value in told.items():
        words = key.replace("_", " ")
        if isinstance(value, (list, tuple, Mapping)) and len(str(value)) > 60:
            parts.append(f"{words}: {len(value)} entries")
        elif value not in ({}, [], ""):
            parts.append(f"{words}: {json.dumps(value) if isinstance(value, (list, tuple, Mapping)) else value}")
    return ", ".join(parts)


def _cost(found: Diagnosis, measured: Mapping[str, Any], start: float) -> str:
    return (f"This report took {time.perf_counter() - start:.1f} s: the summary is from {measured['samples']} samples, the "
            f"layers are from {found.samples}, those with one layer alone from {min(found.samples, 4)} of these.")
