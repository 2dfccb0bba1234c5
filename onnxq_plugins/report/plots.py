"""Plots of the report as inline SVG. Colours are CSS variables of the page, so that one plot works in light and dark mode;
text stays text, in the page's font."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.measure.samples import OutputScore
from onnxq_plugins.report.diagnosis import Diagnosis

# Placeholders that matplotlib does not use by itself -> names of the page's colours.
_INK, _FAINT, _BLUE, _ORANGE, _GREY = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {_INK: "--ink", _FAINT: "--rule", _BLUE: "--blue", _ORANGE: "--orange", _GREY: "--grey"}
_LINES = 6  # that can be told apart
_WIDE = 9.2  # inches of 72 points: the full width of the page


@dataclass(frozen=True)
class Plot:
    """A plot, its caption, and the names for the numbers on its axis if no table on the page lists them."""

    title: str
    svg: str
    text: str
    names: tuple[str, ...] = ()


def plots(diagnosis: Diagnosis, order: Sequence[str], bits: Mapping[str, tuple[float, float]]) -> list[Plot]:
    """The plots of a network.

    order   names in the order of their numbers in the table
    bits    of weight and input of each layer; 32 for float
    """
    drawings = [_sqnr(diagnosis, order)]
    if diagnosis.runs:
        drawings.append(_shares(diagnosis, order))
    if diagnosis.activations:
        drawings.append(_ranges(diagnosis))
    return [*drawings, _bits(order, bits)] if len(set(bits.values())) > 1 else drawings  # equal bits need no plot


def _sqnr(diagnosis: Diagnosis, order: Sequence[str]) -> Plot:
    figure, axes = _axes(2.8, legend=1)
    by_name = {y.name: y for y in diagnosis.layers}
    x = np.arange(1, len(order) + 1)
    rows = [by_name[name] for name in order]
    for values, color, marker, label in (
        ([y.own.input if y.own else np.nan for y in rows], _BLUE, "v", "own, rounding its input"),
        ([y.own.weight if y.own else np.nan for y in rows], _ORANGE, "^", "own, rounding its weight"),
    ):
        finite = np.where(np.array(values, float) >= IDENTICAL, np.nan, np.array(values, float))
        axes.plot(x, finite, linestyle="none", marker=marker, markersize=4.5, color=color, markeredgewidth=0, label=label)
    accumulated = np.array([y.sqnr for y in rows])
    axes.plot(
        x,
        np.where(accumulated >= IDENTICAL, np.nan, accumulated),
        color=_INK,
        linewidth=1.6,
        marker="o",
        markersize=3.5,
        label="accumulated",
    )
    for n, y in zip(x, rows, strict=True):
        if y.sqnr < IDENTICAL:
            _hidden(
                axes,
                float(n),
                y.sqnr,
                f"{n} {y.name}: {y.sqnr:.1f} dB accumulated" + (f", own {y.own.both:.1f} dB" if y.own else ""),
            )
    axes.set_ylabel("SQNR, dB")
    _depth(axes, len(order))
    _legend(axes)
    return Plot(
        "Error along the depth",
        _svg(figure, "sqnr"),
        "Signal to noise at each layer's output. Line: in the quantized network, with the errors of all layers before it. "
        "Marks: with only this layer's weight or input rounded. Higher is better.",
    )


def _shares(diagnosis: Diagnosis, order: Sequence[str]) -> Plot:
    figure, axes = _axes(2.1)
    by_name, numbers = {y.name: y for y in diagnosis.layers}, {name: n for n, name in enumerate(order, 1)}
    worst = {y.name for y in diagnosis.layers[:5]}
    parts = {name: 100 * run.share / len(run.names) for run in diagnosis.runs for name in run.names}
    labelled: list[int] = []  # the tallest first, if no neighbour has a label
    for name in sorted(parts, key=lambda name: -parts[name]):
        n = numbers[name]
        if name in worst and parts[name] > 0 and all(abs(n - other) > len(order) / 40 for other in labelled):
            labelled.append(n)
            axes.annotate(f"{n}", (n, parts[name]), (0, 2), textcoords="offset points", ha="center", color=_INK, size=9)
    for run in diagnosis.runs:
        for name in run.names:
            n, y, lone = numbers[name], by_name[name], len(run.names) == 1
            (bar,) = axes.bar(
                n, parts[name], width=0.72, color=_ORANGE if name in worst else _GREY, alpha=1 if lone else 0.5
            )
            alone = "" if y.alone is None else f"; alone {y.alone:.1f} dB"
            text = (
                f"{parts[name]:.1f} % of the noise{alone}" if lone else f"{len(run.names)} together {100 * run.share:.1f} %"
            )
            bar.set_gid(_tooltip(f"{n} {name}: {text}"))
    axes.axhline(0, color=_INK, linewidth=0.7)
    axes.set_ylabel("% of the noise")
    axes.margins(y=0.15)
    _depth(axes, len(order))
    together = " Pale bars were measured together and share what they have." if len(diagnosis.runs) < len(parts) else ""
    return Plot(
        "Which layers hold the error",
        _svg(figure, "shares"),
        "What each layer's quantizers (its weight and its input) add to the error of the worst output. The bars add up to "
        f"100; bars below 0 take back errors of others.{together}",
    )


def _ranges(diagnosis: Diagnosis) -> Plot:
    names = list(diagnosis.activations)
    figure, axes = _axes(2.5)
    ends = [0.0, 1.0]
    axes.axhspan(-1, 1, color=_GREY, alpha=0.13, linewidth=0)
    for n, name in enumerate(names, 1):
        x = diagnosis.activations[name]
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
    axes.set_ylim(max(min(ends), -3) * 1.05 - 0.04, min(max(ends), 3) * 1.05)  # values far outside are cut off
    axes.set_ylabel("value / largest code")
    _depth(axes, len(names), "activation, in the order of the network")
    text = (
        "Values of the float network relative to the range of the codes. Thin line: all values; pale bar: all but 0.1 % at "
        "each end; full bar: all but 5 %; ticks: the ends of the codes. Values beyond the ticks are clipped; a short bar "
        "between distant ticks means that most codes serve few values. Hover over a bar for its name."
    )
    return Plot("Ranges of activations", _svg(figure, "ranges"), text, tuple(names))


def _bits(order: Sequence[str], bits: Mapping[str, tuple[float, float]]) -> Plot:
    figure, axes = _axes(1.75, legend=1)
    for n, name in enumerate(order, 1):
        if name not in bits:
            continue
        weight, inner = bits[name]
        for at, value, color in ((n - 0.2, weight, _ORANGE), (n + 0.2, inner, _BLUE)):
            (bar,) = axes.bar(at, value, width=0.36, color=color)
            bar.set_gid(_tooltip(f"{n} {name}: weight {weight:g} bits, input {inner:g} bits"))
    axes.plot([], [], color=_ORANGE, linewidth=5, label="weight")
    axes.plot([], [], color=_BLUE, linewidth=5, label="input")
    axes.set_ylabel("bits")
    axes.set_yticks([b for b in (4, 8, 16, 32) if b <= max([8.0, *(max(pair) for pair in bits.values())])])
    axes.set_ylim(0, 1.08 * max([8.0, *(max(pair) for pair in bits.values())]))
    _depth(axes, len(order))
    _legend(axes, 1)
    return Plot(
        "Bits", _svg(figure, "bits"), "Bits of the weight's codes and of the activation that the layer reads; 32 is float."
    )


def over_steps(outputs: Sequence[OutputScore]) -> list[Plot]:
    """The plot of the noise over the steps of streams, of the outputs with the most of it; none without streams."""
    streams = sorted((output for output in outputs if output.steps), key=lambda output: output.sqnr or 0.0)[:_LINES]
    if not streams:
        return []
    rows = -(-len(streams) // 3)
    figure, axes = _axes(2.2 + 0.2 * rows, legend=rows)
    for n, output in enumerate(streams):
        steps = np.array(output.steps)
        color, dashes = (_INK, _BLUE, _ORANGE, _GREY)[n % 4], ("-", "--", ":")[n // 4 % 3]
        x = np.arange(1, len(steps) + 1)
        axes.plot(x, np.where(steps >= IDENTICAL, np.nan, steps), dashes, color=color, linewidth=1.4, label=output.name)
    axes.set_ylabel("SQNR, dB")
    _depth(axes, max(len(output.steps) for output in streams), "step")
    _legend(axes, 1)
    text = (
        "Signal to noise of each output at each step, with both networks on their own states. A line that falls is an error "
        "that feeds back: what a step gets wrong, the next ones start from."
    )
    return [Plot("Error over the steps", _svg(figure, "steps"), text)]


def drawing(figure: Any, prefix: str, colors: dict[str, str]) -> str:
    """A figure of another module as inline SVG.

    colors   colours in it -> names of the page's colours
    """
    return _svg(figure, prefix, {key.lower(): f"--{name}" for key, name in colors.items()})


# ---- helpers --------------------------------------------------------------------------------------------------------------


def _axes(height: float, legend: int = 0) -> tuple[Any, Any]:
    """A figure with room for some rows of a legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDE, height))  # fixed margins: matplotlib's layout engines draw everything twice
    left, low, top = 0.62, 0.43, 0.08 + 0.2 * legend
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
    """An invisible spot of the plot with a tooltip."""
    (spot,) = axes.plot([x], [y], marker="o", markersize=13, color=_INK, alpha=0.0, linestyle="none")
    spot.set_gid(_tooltip(text))


def _tooltip(text: str) -> str:
    """An id that `_svg` turns into a title: hexadecimal, since names of layers may hold any text."""
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
