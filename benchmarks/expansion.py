"""What the orders of `residual-expansion` gain: weights, activations, and ensembles, on real networks.

    python -m benchmarks.expansion [--shared FOLDER] [--models NAME ...] [--seconds 0.25]

Weights of 2, 3 and 4 bits in every layer, orders 1 to 4, the second and later ones on 25, 50 or 100 % of the output channels
(chosen without data), 8-bit activations, bias-correct as in recipe int8; first row int8 per channel with the same passes.
Second table: 4-bit activations with one and two orders, and 8-bit ones (target npu4). Third: ensembles. Accuracy and SQNR on
samples that calibration never saw. Bit operations: multiply-adds x bits of the weight x bits of the input, summed over
orders, relative to int8 everywhere: what hardware with such narrow products would do; onnxruntime computes in int8.
Latency: batch 1, one thread, all networks of a table in turn, relative to int8; the least of three medians each. Prints
Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import Result, load, measure, quantize, runtimes
from onnxq_plugins.search.quantizers import multiply_adds

BATCH = 16


@dataclass(frozen=True)
class Judge:
    """A network's labelled test samples, its float outputs, and the multiply-adds of its layers."""

    case: Case
    reference: np.ndarray
    work: Mapping[str, int]

    @staticmethod
    def of(case: Case) -> Judge:
        return Judge(case, outputs(case, case.path), multiply_adds(load(case.path), {case.input: case.test[:1]}))

    def cells(self, result: Result) -> str:
        """Top-1 and SQNR."""
        logits = outputs(self.case, result.model)
        return f"{self.accuracy(logits):.2f} | {measure.sqnr(self.reference, logits):.1f}"

    def stored(self, result: Result) -> float:
        """Bits on disk per weight of the float network."""
        count = sum(row["parameters"] for row in result.report["layers"])
        return (
            float(result.report["bits_per_weight"]) * count / sum(int(np.prod(y.shape)) for y in load(self.case.path).layers)
        )

    def accuracy(self, logits: np.ndarray) -> float:
        return 100 * float(np.mean(logits.argmax(1) == self.case.labels))

    def times(self, results: Sequence[Result], seconds: float) -> np.ndarray:
        """Milliseconds of each network, measured in turn."""
        runners = [runtimes.session(result.model) for result in results]
        feed = {self.case.input: self.case.test[:1]}
        return np.min([runtimes.latency(runners, feed, seconds / 3 * len(results)) for _ in range(3)], axis=0)

    def operations(self, result: Result, bits: int, activations: int = 8, inputs: int = 1) -> float:
        """Bit operations relative to int8. Layers that the pass left alone have one order of `bits`."""
        expansion = next((s["result"] for s in result.report["steps"] if s["pass"] == "residual-expansion"), {"layers": {}})
        spent = 0.0
        for name, work in self.work.items():
            row = expansion["layers"].get(name, {"bits": [bits], "channels": [1]})
            spent += work * sum(b * n / row["channels"][0] for b, n in zip(row["bits"], row["channels"], strict=True))
        return spent * activations * inputs / (64 * sum(self.work.values()))


def outputs(case: Case, model: Any) -> np.ndarray:
    runner = runtimes.session(model, threads=2)
    feeds = [{case.input: case.test[i : i + BATCH]} for i in range(0, len(case.test), BATCH)]
    return np.asarray(runtimes.outputs(runner, feeds)[0])


def make(case: Case, bits: int, step: dict[str, Any] | None = None, **more: Any) -> Result:
    """Recipe int8 with weights of other widths, and the pass inserted before its last one."""
    passes = [
        {"use": "scale-inputs"},
        *([step] if step and step["use"] == "residual-ensemble" else []),
        {"use": "ranges"},
        *([step] if step and step["use"] == "residual-expansion" else []),
        {"use": "bias-correct"},
    ]
    return quantize(case.path, {"weights": {"bits": bits}, "pass": passes, **more}, case.feeds())


def weights(judge: Judge, seconds: float) -> None:
    case, rows = judge.case, []
    settings = [(8, 1, 1.0)] + [
        (bits, orders, share)
        for bits in (4, 3, 2)
        for orders in (1, 2, 3, 4)
        for share in ((0.25, 0.5, 1.0) if orders > 1 else (1.0,))
    ]
    for bits, orders, share in settings:
        step = {"use": "residual-expansion", "orders": orders, "share": share, "data": False} if orders > 1 else None
        result = make(case, bits, step)
        expansion = next((s["result"] for s in result.report["steps"] if s["pass"] == "residual-expansion"), {"layers": {}})
        forms = [row["form"] for row in expansion["layers"].values()]
        used = ", ".join(f"{forms.count(f)} {f}" if len(set(forms)) > 1 else f for f in sorted(set(forms))) or "-"
        rows.append(
            (
                result,
                f"{bits} | {orders} | {f'{100 * share:.0f} %' if orders > 1 else '-'} | {judge.cells(result)} | "
                f"{judge.operations(result, bits):.2f} | {judge.stored(result):.1f}",
                used,
            )
        )
    times = judge.times([result for result, *_ in rows], seconds)
    columns = (
        f"{case.name}, float top-1 {judge.accuracy(judge.reference):.2f}",
        "orders",
        "share",
        "top-1",
        "SQNR dB",
        "bit operations",
        "bits stored",
        "latency",
        "form",
    )
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (_, cells, used), time in zip(rows, times, strict=True):
        print(f"| weights of {cells} | {time / times[0]:.2f} | {used} |")
    print(f"\nint8 latency {times[0]:.3f} ms", flush=True)


def activations(judge: Judge) -> None:
    columns = (f"{judge.case.name}, weights of 4 bits, 2 orders in branches", "top-1", "SQNR dB", "bit operations")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for bits, inputs, method in ((8, 1, "minmax"), (4, 1, "minmax"), (4, 1, "mse"), (4, 2, "minmax")):
        passes = [
            {"use": "scale-inputs"},
            {"use": "ranges", "method": method},
            {"use": "residual-expansion", "form": "branches", "activations": inputs},
            {"use": "bias-correct"},
        ]
        result = quantize(
            judge.case.path,
            {"target": "npu4", "weights": {"bits": 4}, "activations": {"bits": bits}, "pass": passes},
            judge.case.feeds(),
        )
        print(
            f"| activations of {bits} bits, {inputs} order{'s' * (inputs > 1)}, ranges {method} | {judge.cells(result)} | "
            f"{judge.operations(result, 4, bits, inputs):.2f} |",
            flush=True,
        )


def ensembles(judge: Judge, seconds: float) -> None:
    case, rows = judge.case, []
    for label, bits, step in (
        ("int8", 8, None),
        ("one network of 1 order", 4, None),
        ("sum of two networks of 1 order", 4, {"use": "residual-ensemble", "groups": [1, 1]}),
        ("sum of four networks of 1 order", 4, {"use": "residual-ensemble", "groups": [1, 1, 1, 1]}),
        ("one network of 2 orders (residual-expansion)", 4, {"use": "residual-expansion"}),
        ("sum of two networks of 2 orders", 4, {"use": "residual-ensemble", "groups": [2, 2]}),
    ):
        result = make(case, bits, step)
        ensemble = [s["result"]["ensemble_db"] for s in result.report["steps"] if s["pass"] == "residual-ensemble"]
        own = f"{ensemble[0]:.1f}" if ensemble else "-"
        rows.append((result, f"| {label} | {own} | {judge.cells(result)}"))
    times = judge.times([result for result, _ in rows], seconds)
    columns = (f"{case.name}, weights of 4 bits", "the ensemble itself, dB", "top-1", "SQNR dB", "latency")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (_, cells), time in zip(rows, times, strict=True):
        print(f"{cells} | {time / times[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per network")
    args = parser.parse_args()
    shared = shared_folder(args.shared)
    print(machine())
    judges = [Judge.of(load_case(name, shared)) for name in args.models]
    for judge in judges:
        weights(judge, args.seconds)
    for judge in judges:
        activations(judge)
    for judge in judges:
        if not judge.case.name.startswith("kwt"):  # its LayerNormalizations do not commute with sums
            ensembles(judge, args.seconds)


if __name__ == "__main__":
    main()
