"""Granularity of 4- and 3-bit weights: layer, channel and tiles, in order or reordered, with three kinds of scales.

    python -m benchmarks.granularity [--shared FOLDER] [--models ...] [--bits 4 3] [--out rows.jsonl]
    python -m benchmarks.granularity --plot rows.jsonl docs/granularity.png

First, last and depthwise layers have 8 bits per channel, activations 8 bits everywhere. "PTQ-SL": pass sub-layer, nearest
codes, biases corrected. "learned": pass round (GPTQ, on each layer's actual inputs). free: a float scale per tile, which no
integer kernel takes: weights are decoded to float at load, and the network runs in float between quantized activations.
integer, pow2: multipliers of one scale per layer (tiles of several outputs) or per channel (1 x 16), folded into int8 codes.
For layer and channel, pow2 means scales that are powers of two.

scales, bits/weight: of the tiled layers. ms: relative to the int8 model, both in turn, one thread, batch 1. Measured on
samples that calibration never saw. Rows are appended to --out as they are measured; existing rows are not measured
again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import runtimes
from onnxq_plugins.measure import sqnr
from onnxq_plugins.targets.ort_cpu import ORT_CPU
from onnxq_plugins.targets.storage import STORAGE

TILES = ([32, 32], [16, 16], [8, 16], [1, 16])
STORED = 4  # bits that a 4- or 3-bit code takes on disk
SOLVERS = {
    "PTQ-SL": [{"use": "sub-layer", "shift": True}, {"use": "bias-correct"}],
    "learned": [{"use": "round", "method": "gptq"}],
}


class FloatTiles:
    """A target for the comparison: float scales per tile with onnxruntime's form of the graph."""

    target = replace(STORAGE, name="benchmark.float-tiles", flatten=ORT_CPU.flatten)

    @onnxq.hookimpl
    def onnxq_targets(self) -> list[onnxq.Target]:
        return [self.target]


def variants() -> Iterator[tuple[str, str, bool, dict[str, Any], str]]:
    """Granularity, kind of scale, reordered, weights table, target."""
    for block in ("tensor", "channel"):
        label = {"tensor": "layer"}.get(block, block)
        yield label, "free", False, {"block": block}, "ort-cpu"
        yield label, "pow2", False, {"block": block, "pow2": True}, "ort-cpu"
    for tile in TILES:
        coarse = "channel" if tile[0] == 1 else "tensor"
        for reorder in (False, True):
            label = f"{tile[0]}x{tile[1]}"
            yield label, "free", reorder, {"block": tile}, FloatTiles.target.name
            yield label, "integer", reorder, {"block": coarse, "sub_block": tile}, "ort-cpu"
            yield label, "pow2", reorder, {"block": coarse, "sub_block": tile, "pow2": True}, "ort-cpu"


def recipe(bits: int, weights: dict[str, Any], target: str, reorder: bool, solver: str) -> dict[str, Any]:
    """The recipe of one row."""
    kept = [
        {"weights": {"bits": 8, "block": "channel", "pow2": False}, key: value}
        for key, value in (("kind", "depthwise"), ("position", "first"), ("position", "last"))
    ]
    steps = [*([{"use": "reorder"}] if reorder else []), {"use": "scale-inputs"}, {"use": "ranges", "method": "mse"}]
    return {"target": target, "weights": {"bits": bits, **weights}, "pass": steps + SOLVERS[solver], "layer": kept}


def counted(result: onnxq.Result, bits: int) -> tuple[int, float]:
    """Scales and multipliers, and bits per weight, of the layers that have `bits`."""
    rows = [row for row in result.report["layers"] if row.get("weights", "").startswith(f"int{bits} ")]
    stored = sum(row["bits_per_weight"] * row["parameters"] for row in rows)
    scales = sum(
        np.size(spec.scale if spec.multiplier is None else spec.multiplier)
        for spec in result.plan.values()
        if spec.codes is not None and spec.bits == bits
    )
    return scales, stored / sum(row["parameters"] for row in rows)


def measure(case: Case, variant: dict[str, Any], bits: int, reference: np.ndarray, int8: Any) -> dict[str, Any]:
    """One row."""
    result = onnxq.quantize(case.path, variant, case.feeds(), plugins=[FloatTiles()])
    runner = runtimes.session(result.model)
    feeds = [{case.input: x[None]} for x in case.test]
    logits = runtimes.outputs(runner, feeds)[0]
    base, ms = runtimes.latency([int8, runner], feeds[0], 1.5)
    scales, stored = counted(result, bits)
    return {
        "top1": 100 * float(np.mean(logits.argmax(1) == case.labels)),
        "sqnr": sqnr(reference, logits),
        "bits": stored,
        "scales": scales,
        "ms": ms / base,
        "mb": result.model.ByteSize() / 1e6,
        "s": result.report["seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table per model and width."""
    lines = []
    for model, bits in dict.fromkeys((r["model"], r["width"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["width"]) == (model, bits)]
        lines += [
            "",
            f"| {model}, {bits} bits, float top-1 {mine[0]['float']:.2f} "
            "| scales | reordered | number | bits/weight | PTQ-SL: SQNR dB | top-1 | "
            "learned: SQNR dB | top-1 | ms / int8 |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key in dict.fromkeys((r["granularity"], r["kind"], r["reordered"]) for r in mine):
            pair = {r["solver"]: r for r in mine if (r["granularity"], r["kind"], r["reordered"]) == key}
            some = next(iter(pair.values()))
            cells = [f"{pair[s]['sqnr']:.2f} | {pair[s]['top1']:.2f}" if s in pair else "- | -" for s in SOLVERS]
            time = np.median([r["ms"] for r in pair.values()])
            lines.append(
                f"| {key[0]} | {key[1]} | {'yes' if key[2] else ''} | {some['scales']} | {some['bits']:.2f} | "
                f"{' | '.join(cells)} | {time:.2f} |"
            )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """SQNR over what scales and multipliers take on disk: one panel per model and width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    panels = list(dict.fromkeys((r["model"], r["width"]) for r in rows))
    models = list(dict.fromkeys(m for m, _ in panels))
    widths = list(dict.fromkeys(w for _, w in panels))
    figure, axes = pyplot.subplots(len(widths), len(models), figsize=(4.6 * len(models), 3.6 * len(widths)), squeeze=False)
    styles = {"free": ("#1f77b4", "o"), "integer": ("#d62728", "s"), "pow2": ("#2ca02c", "^")}
    for (model, width), axis in ((p, axes[widths.index(p[1])][models.index(p[0])]) for p in panels):
        mine = [r for r in rows if (r["model"], r["width"], r["solver"]) == (model, width, "PTQ-SL")]
        for r in mine:
            color, marker = styles[r["kind"]]
            at = (r["bits"] - STORED, r["sqnr"])
            axis.plot(*at, marker, color=color, fillstyle="full" if r["reordered"] else "none", ms=7)
            if r["kind"] == "free" and (r["reordered"] or r["granularity"] in ("layer", "channel")):
                axis.annotate(r["granularity"], at, xytext=(-4, 6), fontsize=8, textcoords="offset points")
        channel = next(r for r in mine if r["granularity"] == "channel" and r["kind"] == "free")
        axis.axhline(channel["sqnr"], color="0.6", lw=0.8, ls=":")
        axis.set_title(f"{model.split('_')[0]}, {width} bits", fontsize=10)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(0.12, 0.12)
        axis.set_xlabel("bits per weight for scales and multipliers")
        axis.set_ylabel("output SQNR, dB")
        axis.grid(alpha=0.3)
    handles = [
        pyplot.Line2D([], [], color=c, marker=m, ls="", fillstyle=f, label=f"{kind}{', reordered' * (f == 'full')}")
        for kind, (c, m) in styles.items()
        for f in ("none", "full")
    ]
    handles.append(pyplot.Line2D([], [], color="0.6", lw=0.8, ls=":", label="one free scale per channel"))
    figure.legend(handles=handles, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--out", type=Path, default=Path("granularity.jsonl"))
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("ROWS", "IMAGE"))
    args = parser.parse_args()
    if args.plot:
        plot(read(args.plot[0]), args.plot[1])
        return
    done = {json.dumps(identity(r)) for r in read(args.out)}
    for name in args.models:
        case = load_case(name, shared_folder(args.shared))
        feeds = [{case.input: x[None]} for x in case.test]
        reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
        int8 = runtimes.session(onnxq.quantize(case.path, "int8", case.feeds()).model)
        for bits in args.bits:
            for label, kind, reorder, weights, target in variants():
                for solver in SOLVERS:
                    row = {
                        "model": name,
                        "width": bits,
                        "granularity": label,
                        "kind": kind,
                        "reordered": reorder,
                        "solver": solver,
                    }
                    if json.dumps(row) not in done:
                        row |= measure(case, recipe(bits, weights, target, reorder, solver), bits, reference, int8)
                        row["float"] = 100 * float(np.mean(reference.argmax(1) == case.labels))
                        with args.out.open("a") as stream:
                            stream.write(json.dumps(row) + "\n")
    print(f"{machine()}\n{table(read(args.out))}")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def identity(row: dict[str, Any]) -> dict[str, Any]:
    """What identifies a row."""
    return {key: row[key] for key in ("model", "width", "granularity", "kind", "reordered", "solver")}


if __name__ == "__main__":
    main()
