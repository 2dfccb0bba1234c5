"""What was done and what it gave, as one page of HTML that needs nothing beside it, and the same as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.data import Data, Source
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import write_file
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure import agreement
from onnxq_plugins.measure.metrics import mean_sqnr, top1
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.recipe import to_toml
from onnxq_plugins.report.curve import COLORS, Curve
from onnxq_plugins.report.diagnosis import Diagnosis, LayerError, diagnose, samples_of
from onnxq_plugins.report.plots import drawing, plots
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.runtimes.machine import machine_name

_MEASURED, _TESTED = 32, 512  # samples for the summary: of those it was calibrated with, of others
_SECONDS = 0.6  # of interleaved runs for the latencies
_COLUMNS = (
    ("#", "number"),
    ("layer", "name"),
    ("op", ""),
    ("weight", ""),
    ("input bits", "number"),
    ("gathered dB", "number"),
    ("own dB", "number"),
    ("weight dB", "number"),
    ("input dB", "number"),
    ("alone dB", "number"),
    ("noise %", "number"),
    ("kernel", ""),
    ("why float", "wide"),
)
_MADE_UP = "the synthetic data"  # `Data.where` of samples that a pass made
_SCALE = "6 dB are one bit; above 30 dB hardly any answer changes, below 10 dB many do."
_WORDS = {
    "largest_shift_relative_to_bias": "largest correction, as a part of the largest bias",
    "kept_share_of_range": "part of the range kept, least",
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
    """Write the report of a result. A name that ends in .html gives the page and, beside it, .json with the same in numbers;
    any other name gives what `Result.report` holds as JSON, without measuring anything.

    data      sample inputs to measure on, as for `quantize`; those it was calibrated with if not given, which flatter it
    name      of the model, for the title
    command   that made the result
    samples, attempts, workers   as for `diagnose`

    Cost: runs of both networks, up to 32 on calibration samples or 512 on others, 0.6 s of timing, and a diagnosis.
    Raises OnnxqError without the extra ``report``, without samples, or if a file cannot be written.
    """
    path = Path(path)
    if not is_page(path):
        return write_file((json.dumps(result.report, indent=2) + "\n").encode(), path)
    check_page()
    start = time.perf_counter()
    data = samples_of(result, data)
    measured = _measured(result, data)
    found = diagnose(result, data, samples=samples, attempts=attempts, workers=workers, track=track)
    level, verdict = _verdict(measured)
    made = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine_name()}
    table = {
        **result.report,
        "made": made,
        "verdict": {"level": level, "text": verdict},
        "measured": measured,
        "diagnosis": found.to_dict(),
        "activations": _activations(found),
    }
    page = _page(result, found, table, name, command, start)
    write_file((json.dumps(table, indent=2) + "\n").encode(), path.with_suffix(".json"))
    return write_file(page.encode(), path)


def _measured(result: Outcome, data: Data) -> dict[str, Any]:
    """Accuracy and latency of the quantized network beside the user's own model."""
    most = _MEASURED if data is result.data else _TESTED
    feeds, labels = data.spread(most), data.spread_labels(most)
    runners = [runtimes.session(result.original), runtimes.session(result.model)]
    exact, quantized = (runtimes.outputs(runner, (runtimes.wanted(runner, feed) for feed in feeds)) for runner in runners)
    found: dict[str, Any] = {
        "samples": len(feeds),
        "of": data.size,
        "where": data.where,
        "calibrated_on_them": data is result.data,
        "sqnr": round(mean_sqnr(exact, quantized), 2),
    }
    if exact[0].ndim > 1 and exact[0].shape[-1] > 1:
        found["agreement"] = round(100 * agreement(exact[0], quantized[0]), 2)
    if labels is not None:
        right = np.concatenate(labels)
        found["top1"] = {"float": round(top1(exact, exact, right), 2), "quantized": round(top1(exact, quantized, right), 2)}
    slow, fast = runtimes.latency(runners, [runtimes.wanted(runner, feeds[0]) for runner in runners], _SECONDS)
    found["milliseconds"] = {"float": round(slow, 4), "quantized": round(fast, 4), "machine": platform.machine()}
    return found


def _activations(found: Diagnosis) -> dict[str, Any]:
    made = {}
    for name, x in found.activations.items():
        low, high = x.percentiles(0.1)
        numbers = {
            "low": x.histogram.low,
            "high": x.histogram.high,
            "percentile_0.1": low,
            "percentile_99.9": high,
            "codes_low": x.grid[0],
            "codes_high": x.grid[1],
        }
        made[name] = {"bits": x.spec.bits, **{k: float(f"{v:.5g}") for k, v in numbers.items()}, "clipped": x.clipped}
    return made


# ---- the page -------------------------------------------------------------------------------------------------------------


def _page(result: Outcome, found: Diagnosis, table: Mapping[str, Any], name: str, command: str, start: float) -> str:
    import jinja2

    report, measured = result.report, table["measured"]
    order = [y.name for y in result.graph.layers]
    number = {layer: n for n, layer in enumerate(order, 1)}
    rows = {row["name"]: row for row in report.layers}
    bits = [
        (float(result.plan[y.weight].bits) if y.weight in result.plan else 32.0, _input_bits(found, y.name))
        for y in result.graph.layers
    ]
    drawn = plots(found, order, bits) if order else []
    shown = found.explained
    curve = Curve.of(result, name)
    columns, points = curve.table() if curve is not None else ([], [])
    props = {p.key: p.value for p in result.model.metadata_props}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "page.html").read_text("utf-8"))
    made: str = template.render(
        title=name or "Quantized model",
        recipe=result.recipe_name or "of your own",
        target=result.target.name,
        summary=result.summary.replace("->", "→"),
        made=table["made"],
        verdict=table["verdict"],
        scale=_SCALE,
        cards=_cards(result, measured),
        measured=_sentence(measured),
        worst=[_explained(found, y, number) for y in shown],
        tried=bool(found.tried),
        adds_up=found.adds_up,
        floats=[
            {
                "name": y.name,
                "op": y.op,
                "why": y.why,
                "work": f"{100 * y.work:.1f} %",
                "remedies": [_way(found, r) for r in y.remedies],
            }
            for y in found.floats
        ],
        plots=drawn,
        columns=_columns(found),
        rows=_rows(found, rows, number, {y.name for y in shown}),
        curve=None
        if curve is None
        else {
            "svg": drawing(curve.figure(), "curve", COLORS),
            "columns": columns,
            "rows": points,
            "size": "half" if curve.metric == "sqnr" else "pair",
        },
        steps=[
            {
                "name": s["pass"],
                "seconds": f"{s['seconds']:.2f}",
                "told": _told(s.get("result", {})),
                "exact": "the same" if s.get("exact", True) else "changed",
            }
            for s in report.steps
        ],
        notes=report.notes,
        command=command,
        seed=props.get("onnxq.seed", "0"),
        versions=", ".join(
            [*props.get("onnxq.versions", "").split(), *(f"{key} {value}" for key, value in report["machine"].items())]
        ),
        toml=to_toml(report.recipe),
        cost=_cost(found, measured, start),
    )
    return made


def _columns(found: Diagnosis) -> list[dict[str, Any]]:
    """Headings of the table; the last one tells nothing where no layer is float."""
    return [
        {
            "name": found.part_of if name == "noise %" else name,
            "kind": {"number": "n"}.get(kind, kind),
            "number": kind == "number",
        }
        for name, kind in _COLUMNS
        if found.floats or kind != "wide"
    ]


def _verdict(measured: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the network is any good: ``good``, ``fair`` or ``poor``, and a sentence with the reasons. Accuracy counts more
    than agreement with the float network, that more than noise."""
    level, facts = _level(measured["sqnr"], 30, 10), [f"{measured['sqnr']:.1f} dB at the outputs"]
    if "top1" in measured:
        right = measured["top1"]
        level = _level(right["quantized"] - right["float"], -1, -3)
        facts.insert(0, f"accuracy {right['quantized']:.1f} %, float {right['float']:.1f} %")
    elif "agreement" in measured:
        level = _level(measured["agreement"], 99, 95)
        facts.insert(0, f"{measured['agreement']:.1f} % of the answers are the float model's")
    times = measured["milliseconds"]
    speed = times["float"] / times["quantized"]
    if speed < 0.97:
        facts.append(f"slower than the float model on this machine: {speed:.2f} times its speed")
        level = "fair" if level == "good" else level
    else:
        facts.append("as fast as the float model" if speed < 1.05 else f"{speed:.2f} times the speed of the float model")
    words = {"good": "Good", "fair": "Usable, with care", "poor": "Poor"}
    return level, f"{words[level]}: {'; '.join(facts)}; on {_on(measured)}."


def _level(value: float, good: float, fair: float) -> str:
    return "good" if value >= good else "fair" if value >= fair else "poor"


def _on(measured: Mapping[str, Any]) -> str:
    """The samples that numbers are from, in words."""
    kind = "made-up " if measured["where"] == _MADE_UP else "calibration " if measured["calibrated_on_them"] else "other "
    return f"{measured['samples']} {kind}samples"


def _cards(result: Outcome, measured: Mapping[str, Any]) -> list[dict[str, str]]:
    report, times = result.report, measured["milliseconds"]
    layers = report.layers
    integer = sum("why_float" not in row for row in layers)
    kernels = ", ".join(f"{n} {kernel}" for kernel, n in Counter(row["kernel"] for row in layers).most_common(3))
    if n := len(report.float_products):
        kernels += f"; {n} product{'s' * (n > 1)} of two activations run{'s' * (n == 1)} in float"
    on = _on(measured)
    cards = [("SQNR of the outputs", f"{measured['sqnr']:.1f}", "dB", on)]
    if "agreement" in measured:
        cards.append(("Same argmax as float", f"{measured['agreement']:.1f}", "%", on))
    if "top1" in measured:
        right = measured["top1"]
        cards.append(("Accuracy (top-1)", f"{right['quantized']:.1f}", "%", f"float {right['float']:.1f} %; {on}"))
    before, after = report.size("float") / 1e6, report.size("quantized") / 1e6
    unit, factor = ("MB", 1) if before >= 1 else ("kB", 1000)
    digits = 2 if unit == "MB" else 0
    cards += [
        (
            "Size",
            f"{after * factor:.{digits}f}",
            unit,
            f"float {before * factor:.{digits}f} {unit}: {after / before:.0%} of it",
        ),
        (
            "Latency",
            f"{times['quantized']:.3g}",
            "ms",
            f"float {times['float']:.3g} ms: {times['float'] / times['quantized']:.2f} times the speed",
        ),
        ("Layers in integer kernels", f"{integer}", f"of {len(layers)}", kernels),
        ("Bits per weight", f"{report.bits_per_weight:.2f}", "", _stored(result)),
    ]
    return [dict(zip(("name", "value", "unit", "note"), card, strict=True)) for card in cards]


def _stored(result: Outcome) -> str:
    """Why the bits per weight are not those of the recipe."""
    planned = [result.plan[y.weight].bits for y in result.graph.layers if y.weight in result.plan]
    if planned and result.report.bits_per_weight < min(planned):
        return "in the file; channels whose codes fit in 4 bits have 4"
    return "in the file, with scales and multipliers"


def _sentence(measured: Mapping[str, Any]) -> str:
    of = f"{measured['samples']} of {measured['of']} samples" if measured["of"] else f"{measured['samples']} samples"
    if measured["where"] == _MADE_UP:
        told = f"Numbers of quality are from {of} that were made up, for lack of data: they say little about real ones. "
    elif measured["calibrated_on_them"]:
        where = "" if measured["where"] == "the data" else f" of {measured['where']}"
        told = f"Numbers of quality are from {of}{where} that the network was calibrated with, which flatter it. "
    else:
        told = f"Numbers of quality are from {of}, {measured['where']}, given for this report. "
    more = "--test PATH measures on others. " if measured["calibrated_on_them"] else ""
    return f"{told}{more}Latency: onnxruntime, batch 1, one thread, median of runs in turn with the float model."


def _explained(found: Diagnosis, layer: LayerError, number: Mapping[str, int]) -> dict[str, Any]:
    at = f"{number[layer.name]}. " if layer.name in number else ""
    op = "" if layer.at == layer.input else layer.op
    return {
        "number": at,
        "name": layer.name,
        "op": op,
        "kinds": [c.kind.replace("-", " ") for c in layer.causes[:2]],
        "text": found.told(layer),
        "remedies": [_way(found, r) for r in layer.remedies[:3]],
    }


def _way(found: Diagnosis, remedy: Remedy) -> dict[str, str]:
    tried = next((t for t in found.tried if t.remedy.typed == remedy.typed), None)
    result = "" if tried is None else f"tried, {tried.verdict(found.sqnr)}"
    return {"text": remedy.text, "typed": remedy.typed, "result": result}


def _rows(
    found: Diagnosis, rows: Mapping[str, Mapping[str, Any]], number: Mapping[str, int], worst: set[str]
) -> list[dict[str, Any]]:
    layers = sorted(found.layers, key=lambda y: number.get(y.name, len(number) + 1))
    made, columns = [], _columns(found)
    for y in layers:
        row = rows.get(y.name, {})
        own, part = y.own, found.part(y)
        cells = [
            str(number.get(y.name, "")),
            y.name,
            y.op if row else "",
            row.get("weights", "float" if row else ""),
            f"{_input_bits(found, y.name):g}" if row else f"{found.activations[y.input].spec.bits}",
            _db(y.sqnr),
            _db(own.both if own else None),
            _db(own.weight if own and row else None),
            _db(own.input if own and row else None),
            _db(y.alone),
            "" if part is None else f"{part:.1f}",
            row.get("kernel", ""),
            row.get("why_float", ""),
        ]
        made.append({"worst": y.name in worst, "cells": list(zip(cells, columns, strict=False))})
    return made


def _db(value: float | None) -> str:
    return "" if value is None or value >= 200 else f"{value:.1f}"


def _input_bits(found: Diagnosis, name: str) -> float:
    layer = next(y for y in found.layers if y.name == name)
    return float(found.activations[layer.input].spec.bits) if layer.input else 32.0


def _told(told: Mapping[str, Any]) -> str:
    """What a pass gave, in a line: long lists and tables as their length."""
    parts = []
    for key, value in told.items():
        words = _WORDS.get(key, key.replace("_", " "))
        value = float(f"{value:.3g}") if isinstance(value, float) else value
        if isinstance(value, (list, tuple, Mapping)) and len(str(value)) > 60:
            parts.append(f"{words}: {len(value)} entries")
        elif value not in ({}, [], ""):
            parts.append(f"{words}: {json.dumps(value) if isinstance(value, (list, tuple, Mapping)) else value}")
    return ", ".join(parts)


def _cost(found: Diagnosis, measured: Mapping[str, Any], start: float) -> str:
    return (
        f"This report took {time.perf_counter() - start:.1f} s: the summary is from {measured['samples']} samples, the "
        f"layers are from {found.samples}, those with one layer alone from {min(found.samples, 4)} of these."
    )
