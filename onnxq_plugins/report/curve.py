"""The points that a search over widths measured: as a table, a drawing, and files from which each can be made again."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import check_writable, write_file
from onnxq_plugins.job import Outcome
from onnxq_plugins.search.quantizers import parse_widths
from onnxq_plugins.spec import Array

_SEARCH = "mixed-precision"  # the pass of points that name none: those of release 0.1
_OTHER = ("widths", "chosen")  # what a point holds beside numbers
_UNITS = {
    "sqnr": "SQNR, dB",
    "agreement": "same argmax as float, %",
    "size": "bits of the weights (8 bits everywhere: 1)",
    "stored": "weights in the file (8 bits everywhere: 1)",
    "bops": "bit operations (8 bits everywhere: 1)",
}
# Readable on white and on black: the drawings have no background.
_TEXT, _LINE, _CHOSEN = "#808080", "#3f88c5", "#e07a3f"
COLORS = {_TEXT: "soft", _LINE: "blue", _CHOSEN: "orange"}  # what they are on a page that has colours of its own


@dataclass(frozen=True)
class Curve:
    """The measured points of one search.

    model    name of the float model's file, "" if it came from none
    recipe   the recipe of the search, as plain values
    seed     of the search
    cost     the cost that was minimized: ``size``, ``bops`` or another number that the points have
    metric   the metric that was measured beside SQNR
    points   from the most to the least expensive, as in the report: costs, ``sqnr``, the metric, ``widths`` by group; the
             chosen one has ``chosen``
    step     name of the pass that searched
    """

    model: str
    recipe: Mapping[str, Any]
    seed: int
    cost: str
    metric: str
    points: tuple[Mapping[str, Any], ...]
    step: str = _SEARCH

    @classmethod
    def of(cls, result: Outcome, model: str = "") -> Curve | None:
        """The curve of a result; None if no search was run."""
        searches = [step for step in result.report.steps if step.get("result", {}).get("curve")]
        if not searches:
            return None
        search = searches[-1]["result"]
        points, metric = search["curve"], str(search.get("metric", "sqnr"))
        costs = [key for key in points[0] if key not in (*_OTHER, "sqnr", metric)]
        cost = search.get("cost", costs[0])
        seed = next((p.value for p in result.model.metadata_props if p.key == "onnxq.seed"), "0")
        points = sorted(points, key=lambda p: -float(p[cost]))
        return cls(model, result.report.recipe, int(seed), cost, metric, tuple(points), searches[-1]["pass"])

    @property
    def numbers(self) -> list[str]:
        """Names of the numbers that points have: costs first, then SQNR, then the metric."""
        known = list(dict.fromkeys(key for p in self.points for key in p if key not in _OTHER))
        scores = [key for key in dict.fromkeys(("sqnr", self.metric)) if key in known]
        return [key for key in known if key not in scores] + scores

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: number of the point, costs and scores, number of groups of each width, and which was chosen."""
        used = parse_widths({w for p in self.points for w in p["widths"].values()} or {"W8A8"})
        names = [str(w) for w in used]
        rows = []
        for number, point in enumerate(self.points, 1):
            counts = Counter(point["widths"].values())
            rows.append(
                [
                    str(number),
                    *(_shown(key, point.get(key)) for key in self.numbers),
                    *(str(counts[name] or "") for name in names),
                    "chosen" if point.get("chosen") else "",
                ]
            )
        return ["point", *({"sqnr": "SQNR dB", "stored": "file"}.get(key, key) for key in self.numbers), *names, ""], rows

    def files(self) -> tuple[dict[str, bytes], list[str]]:
        """Contents of all files by name, ``curve.json`` last, and notes: drawings need matplotlib."""
        digits = max(2, len(str(len(self.points))))
        names = [f"point-{number:0{digits}}.json" for number in range(1, len(self.points) + 1)]
        groups = list(self.points[0]["widths"]) if self.points else []
        common = {"model": self.model, "recipe": self.recipe, "pass": self.step, "seed": self.seed}
        numbers = [
            {key: p[key] for key in self.numbers if key in p} | {"chosen": bool(p.get("chosen"))} for p in self.points
        ]
        contents = {
            name: _json({**common, **n, "widths": p["widths"]})
            for name, n, p in zip(names, numbers, self.points, strict=True)
        }
        drawings, notes = self.drawings()
        listed = [{"file": name, **n} for name, n in zip(names, numbers, strict=True)]
        return {
            **contents,
            **drawings,
            "curve.json": _json({**common, "cost": self.cost, "metric": self.metric, "groups": groups, "points": listed}),
        }, notes

    def write(self, folder: str | Path) -> list[str]:
        """Write `files` into a folder, which is created if it does not exist; files of an earlier curve in it are replaced.
        Returns notes. Raises OnnxqError if the files cannot be written."""
        folder = Path(folder)
        check_folder(folder)
        contents, notes = self.files()
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            write_file(content, folder / name)
        for old in _earlier(folder):
            if old.name not in contents:
                old.unlink()
        return notes

    def drawings(self) -> tuple[dict[str, bytes], list[str]]:
        """``curve.png`` and ``curve.svg``, or a note that matplotlib is not installed."""
        try:
            import matplotlib
        except ImportError:
            return {}, ["the curve was not drawn, matplotlib is not installed: pip install onnxq-plugins[report]"]
        images = {}
        with matplotlib.rc_context({"svg.hashsalt": "onnxq", "font.size": 10}):
            figure = self.figure()
            for kind in ("png", "svg"):
                stream = BytesIO()
                dated = {"Date": None} if kind == "svg" else {}  # one curve, one file
                figure.savefig(stream, format=kind, transparent=True, dpi=160, metadata=dated)
                images[f"curve.{kind}"] = stream.getvalue()
        return images, []

    def figure(self) -> Any:
        """A matplotlib Figure: SQNR over the cost, and beside it the metric if that is another one. Needs matplotlib."""
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        scores = [key for key in dict.fromkeys(("sqnr", self.metric)) if any(key in p for p in self.points)]
        figure = Figure(figsize=(5.2 * max(len(scores), 1), 3.6), layout=ConstrainedLayoutEngine(wspace=0.06))
        for at, key in enumerate(scores, 1):
            axes = figure.add_subplot(1, len(scores), at)
            points = [(n, p) for n, p in enumerate(self.points, 1) if key in p and self.cost in p]
            places = np.array([(p[self.cost], p[key]) for _, p in points], float).reshape(-1, 2)
            x, y = places.T
            axes.plot(x, y, color=_LINE, linewidth=1.2, alpha=0.5, zorder=2)
            axes.scatter(x, y, s=28, color=_LINE, linewidths=0, zorder=3)
            for (number, p), numbered in zip(points, _numbered(places), strict=True):
                place = float(p[self.cost]), float(p[key])
                if p.get("chosen"):
                    axes.scatter(place[0], place[1], s=95, facecolors="none", edgecolors=_CHOSEN, linewidths=2, zorder=4)
                    axes.annotate(f"{number}, chosen", place, (9, -7), textcoords="offset points", color=_CHOSEN, va="top")
                elif numbered:
                    axes.annotate(str(number), place, (-6, 5), textcoords="offset points", color=_TEXT, ha="right", size=8)
            axes.set_xlabel(_UNITS.get(self.cost, self.cost), color=_TEXT)
            axes.set_ylabel(_UNITS.get(key, key), color=_TEXT)
            axes.margins(0.1)
            axes.grid(color=_TEXT, alpha=0.25, linewidth=0.6)
            axes.tick_params(colors=_TEXT, length=0)
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(_TEXT)
        return figure


def point_recipe(point: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The recipe that makes a point of a curve again without a search, and its seed.

    point   a file that `Curve.write` wrote, or its contents

    Raises OnnxqError if it is not such a point.
    """
    if isinstance(point, Mapping):
        table, where = point, "the point"
    else:
        where = f"point '{point}'"
        try:
            table = json.loads(Path(point).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OnnxqError(f"{where} cannot be read: {error}.") from error
    recipe, widths = (table.get(key) if isinstance(table, Mapping) else None for key in ("recipe", "widths"))
    if isinstance(table, Mapping) and "points" in table:
        raise OnnxqError(f"{where} is a whole curve; give the file of one of its points, such as point-01.json.")
    if not isinstance(recipe, Mapping) or not isinstance(widths, Mapping):
        raise OnnxqError(f"{where} has no recipe and widths; give a file point-NN.json from quantize --curve.")
    steps = recipe.get("pass")
    steps = list(steps) if isinstance(steps, list) else []
    search = table.get("pass", _SEARCH)
    places = [i for i, step in enumerate(steps) if isinstance(step, Mapping) and step.get("use") == search]
    if not places:
        raise OnnxqError(f"{where}: its recipe has no pass '{search}' to set the widths of.")
    steps[places[-1]] = {**steps[places[-1]], "widths": dict(widths)}
    seed = table.get("seed", 0)
    return {**recipe, "pass": steps}, seed if isinstance(seed, int) else 0


def check_folder(folder: Path) -> None:
    """Raise OnnxqError if the files of a curve cannot be written into a folder, which need not exist."""
    if folder.is_dir():
        for name in ("curve.json", "curve.png", "curve.svg", "point-01.json", *(old.name for old in _earlier(folder))):
            check_writable(folder / name)
    elif os.path.lexists(folder):
        raise OnnxqError(f"folder '{folder}' for the curve is a file; give another path.")
    elif not folder.absolute().parent.is_dir():
        raise OnnxqError(f"folder '{folder}' for the curve: '{folder.parent}' does not exist; create it first.")
    elif not os.access(folder.absolute().parent, os.W_OK):
        raise OnnxqError(f"folder '{folder}' for the curve cannot be created: permission denied; give another path.")


def _earlier(folder: Path) -> Iterator[Path]:
    """The files of an earlier curve."""
    for pattern in ("point-[0-9][0-9].json", "point-[0-9][0-9][0-9].json", "curve.json", "curve.png", "curve.svg"):
        yield from folder.glob(pattern)


def _numbered(places: Array) -> list[bool]:
    """Which of some points [n, 2] get a number: those not too close to an earlier one that has a number."""
    spread = places / np.maximum(np.ptp(places, axis=0), 1e-9) if len(places) else places
    kept: list[int] = []
    for n, place in enumerate(spread):
        if all(np.hypot(*(place - spread[k])) > 0.07 for k in kept):
            kept.append(n)
    return [n in kept for n in range(len(places))]


def _shown(key: str, value: Any) -> str:
    """A number of a point, rounded."""
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.2f}" if key in ("sqnr", "agreement") else f"{value:.3f}"


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
