"""Drawings of the report as inline SVG. Colours are CSS variables of the page, so that one drawing serves light and dark;
text is text, in the page's font."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from onnxq_plugins.report.diagnosis import Diagnosis

# Stand-ins that no drawing has by itself -> names of the page's colours.
_INK, _FAINT, _BLUE, _ORANGE, _GREY = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {_INK: "--ink", _FAINT: "--rule", _BLUE: "--blue", _ORANGE: "--orange", _GREY: "--grey"}
_WIDE = 9.2  # inches, at 72 points: what the page shows at full size


@dataclass(frozen=True)
class Plot:
    """A drawing with what it shows, in words, and the names behind its numbers where no table on the page has them."""

    title: str
    svg: str
    text: str
    names: tuple[str, ...] = ()


def plots(found: Diagnosis, order: Sequence[str], bits: Sequence[tuple[float, float]]) -> list[Plot]:
    """The drawings for a network.

    order   names of the layers along the depth: their numbers in the table
    bits    of weight and input of each; 32 for float
    """
    layers = {y.name: y for y in found.layers}
    made = [_sqnr(found, order)]
    if any(layers[name].share is not None for name in order):
        made.append(_shares(found, order))
    if found.activations:
        made.append(_ranges(found))
    return [*made, _bits(order, bits)] if len(set(bits)) > 1 else made  # where all are equal there is nothing to see


def _sqnr(found: Diagnosis, order: Sequence[str]) -> Plot:
    figure, axes = _axes(2.8, legend=True)
    by_name = {y.name: y for y in found.layers}
    x = np.arange(1, len(order) + 1)
    rows = [by_name[name] for name in order]
    for values, color, marker, label in (
        ([y.own.input if y.own else np.nan for y in rows], _BLUE, "v", "own, by rounding its input"),
        ([y.own.weight if y.own else np.nan for y in rows], _ORANGE, "^", "own, by rounding its weight"),
    ):
        kept = np.where(np.array(values, float) >= 200, np.nan, np.array(values, float))
        axes.plot(x, kept, linestyle="none", marker=marker, markersize=4.5, color=color, markeredgewidth=0, label=label)
    gathered = np.array([y.sqnr for y in rows])
    axes.plot(
        x,
        np.where(gathered >= 200, np.nan, gathered),
        color=_INK,
        linewidth=1.6,
        marker="o",
        markersize=3.5,
        label="gathered up to here",
    )
    for n, y in zip(x, rows, strict=True):
        if y.sqnr < 200:
            _hidden(
                axes,
                float(n),
                y.sqnr,
                f"{n} {y.name}: {y.sqnr:.1f} dB gathered" + (f", own {y.own.both:.1f} dB" if y.own else ""),
            )
    axes.set_ylabel("SQNR, dB")
    _depth(axes, len(order))
    _legend(axes)
    return Plot(
        "Error along the depth",
        _svg(figure, "sqnr"),
        "Signal to noise at each layer's output: line, in the "
        "quantized network, where all errors before it have gathered; marks, by this layer's own rounding alone. "
        "Higher is better.",
    )


def _shares(found: Diagnosis, order: Sequence[str]) -> Plot:
    figure, axes = _axes(2.1)
    by_name = {y.name: y for y in found.layers}
    worst = {y.name for y in found.layers[:5]}
    unit = "% of the noise" if found.adds_up else "% of the worst"
    values = [found.part(by_name[name]) or 0.0 for name in order]
    labelled: list[int] = []  # from the tallest on, where there is room beside others
    for n in sorted(range(1, len(order) + 1), key=lambda n: -values[n - 1]):
        if order[n - 1] in worst and values[n - 1] > 0 and all(abs(n - other) > len(order) / 40 for other in labelled):
            labelled.append(n)
            axes.annotate(f"{n}", (n, values[n - 1]), (0, 2), textcoords="offset points", ha="center", color=_INK, size=9)
    for n, (name, value) in enumerate(zip(order, values, strict=True), 1):
        (bar,) = axes.bar(n, value, width=0.72, color=_ORANGE if name in worst else _GREY)
        alone = by_name[name].alone
        bar.set_gid(_tooltip(f"{n} {name}: {value:.1f} {unit}; alone {alone:.1f} dB" if alone is not None else name))
    axes.set_ylabel(unit)
    axes.margins(y=0.15)
    _depth(axes, len(order))
    parts = (
        "in parts of the noise of the whole quantized network."
        if found.adds_up
        else ("beside the worst one's. They are no parts of the whole: layers here make up for each other's errors.")
    )
    return Plot(
        "Which layers hold the error",
        _svg(figure, "shares"),
        f"Noise of the outputs with one layer quantized alone, its weight and its input, {parts}",
    )


def _ranges(found: Diagnosis) -> Plot:
    names = list(found.activations)
    figure, axes = _axes(2.5)
    ends = [0.0, 1.0]
    axes.axhspan(-1, 1, color=_GREY, alpha=0.13, linewidth=0)
    for n, name in enumerate(names, 1):
        x = found.activations[name]
        first, last = x.grid
        unit = max(abs(first), abs(last)) or 1.0
        h = x.histogram
        low, high = (float(v) / unit for v in x.percentiles(0.1))
        inner = [float(v) / unit for v in x.percentiles(5)]
        axes.plot([n, n], [h.low / unit, h.high / unit], color=_BLUE, linewidth=1, solid_capstyle="butt")
        axes.bar(n, high - low, bottom=low, width=0.6, color=_BLUE, alpha=0.45)
        axes.bar(n, inner[1] - inner[0], bottom=inner[0], width=0.6, color=_BLUE)
        (bar,) = axes.bar(n, high - low, bottom=low, width=0.6, color=_BLUE, alpha=0)
        axes.plot([n - 0.38, n + 0.38], [first / unit] * 2, color=_INK, linewidth=1.2)
        axes.plot([n - 0.38, n + 0.38], [last / unit] * 2, color=_INK, linewidth=1.2)
        bar.set_gid(
            _tooltip(
                f"{n} {name}: values {h.low:.3g} to {h.high:.3g}, codes {first:.3g} to {last:.3g}, "
                f"clipped {100 * x.clipped:.3g} %"
            )
        )
        ends += [min(h.low, first) / unit, max(h.high, last) / unit]
    axes.set_ylim(max(min(ends), -3) * 1.05 - 0.04, min(max(ends), 3) * 1.05)  # what lies far beyond is cut off
    axes.set_ylabel("value / end of the codes")
    _depth(axes, len(names), "activation, in the order of the network")
    text = (
        "Values of the float network against the codes: thin line, all; pale bar, all but 0.1 % at each end; full bar, "
        "all but 5 %; ticks, where the codes end. What lies beyond the ticks is clipped; a short bar between wide ticks "
        "means that most codes serve few values. Point at a bar for its name."
    )
    return Plot("Ranges of activations", _svg(figure, "ranges"), text, tuple(names))


def _bits(order: Sequence[str], bits: Sequence[tuple[float, float]]) -> Plot:
    figure, axes = _axes(1.75, legend=True)
    x = np.arange(1, len(order) + 1)
    for n, (name, (weight, inner)) in enumerate(zip(order, bits, strict=True), 1):
        for at, value, color in ((n - 0.2, weight, _ORANGE), (n + 0.2, inner, _BLUE)):
            (bar,) = axes.bar(at, value, width=0.36, color=color)
            bar.set_gid(_tooltip(f"{n} {name}: weight {weight:g} bits, input {inner:g} bits"))
    axes.plot([], [], color=_ORANGE, linewidth=5, label="weight")
    axes.plot([], [], color=_BLUE, linewidth=5, label="input")
    axes.set_ylabel("bits")
    axes.set_yticks([b for b in (4, 8, 16, 32) if b <= max([8.0, *(max(pair) for pair in bits)])])
    axes.set_ylim(0, 1.08 * max([8.0, *(max(pair) for pair in bits)]))
    _depth(axes, len(x))
    _legend(axes, 1)
    return Plot(
        "Bits", _svg(figure, "bits"), "Bits of the weight's codes, and of the activation that the layer reads; 32 is float."
    )


def drawing(figure: Any, prefix: str, colors: dict[str, str]) -> str:
    """A figure of another module as inline SVG.

    colors   colours in it -> names of the page's
    """
    return _svg(figure, prefix, {key.lower(): f"--{name}" for key, name in colors.items()})


# ---- helpers --------------------------------------------------------------------------------------------------------------


def _axes(height: float, legend: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDE, height))  # margins by hand: matplotlib's own would draw everything twice
    left, low, top = 0.62, 0.43, 0.28 if legend else 0.08
    axes = figure.add_axes((left / _WIDE, low / height, 1 - (left + 0.04) / _WIDE, 1 - (low + top) / height))
    axes.yaxis.set_label_coords(-0.42 / (_WIDE - left), 0.5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
    axes.yaxis.label.set_color(_INK)
    axes.yaxis.label.set_fontsize(9)
    axes.xaxis.label.set_color(_INK)
    axes.xaxis.label.set_fontsize(9)
    return figure, axes


def _depth(axes: Any, count: int, text: str = "layer, by its number in the table") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.3, count + 0.7)
    if count <= 30:
        axes.set_xticks(range(1, count + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_xlabel(text)


def _legend(axes: Any, order: int = -1) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::order],
        labels[::order],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        borderaxespad=0,
        borderpad=0.2,
        handlelength=1.2,
        columnspacing=1.6,
    )


def _hidden(axes: Any, x: float, y: float, text: str) -> None:
    """A place of the drawing that tells something when pointed at."""
    (spot,) = axes.plot([x], [y], marker="o", markersize=13, color=_INK, alpha=0.0, linestyle="none")
    spot.set_gid(_tooltip(text))


def _tooltip(text: str) -> str:
    """An id that `_svg` turns into a title: hexadecimal, for any text would do as a name of a layer."""
    return f"tip-{text.encode().hex()}"


def _svg(figure: Any, prefix: str, colors: dict[str, str] | None = None) -> str:
    import matplotlib

    stream = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "onnxq", "text.parse_math": False}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, name in (_VARIABLES if colors is None else colors).items():
        text = re.sub(re.escape(color), f"var({name})", text, flags=re.IGNORECASE)
    text = re.sub(r'<g id="tip-([0-9a-f]*)">', lambda m: f"<g><title>{escape(bytes.fromhex(m[1]).decode())}</title>", text)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}-", text)
    head = r'<svg viewBox="\1" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, text, count=1, flags=re.DOTALL)
