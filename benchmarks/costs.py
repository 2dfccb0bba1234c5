"""Fit the table of what kernels cost (onnxq_plugins/runtimes/costs.json) on this machine, and say how well it fits.

    python -m benchmarks.costs [--write NAME] [--rounds 24] [--seconds 1] [--seed 0]

Times single operators of random shapes (`onnxq_plugins.export.kernel_times`); half of the shapes only judge. Prints
Markdown; --write puts the coefficients into the package, under the name of an instruction set. For that of processors
without VNNI preload what `benchmarks/without_vnni.c` makes: it hides what is newer than AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

import onnxq_plugins
from benchmarks.int8 import machine
from onnxq_plugins.export.kernel_times import by_kind, errors, measured, table
from onnxq_plugins.runtimes.costs import FEATURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="NAME", help="put the coefficients into the package, for this instruction set")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    samples = measured(args.rounds, args.seconds, args.seed)
    print(f"{machine()}\n\n| kernels | shapes | median error | 90 % | {' | '.join(FEATURES)} |")
    print(f"|{'---|' * (4 + len(FEATURES))}")
    rows = table(samples)
    for kind, each in by_kind(samples).items():
        off = errors(each)
        cells = [f"{100 * np.median(off):.0f} %", f"{100 * np.quantile(off, 0.9):.0f} %", *map(str, rows[kind])]
        print(f"| {kind} | {len(each)} | {' | '.join(cells)} |")
    if args.write:
        write(args.write, rows)


def write(name: str, rows: dict[str, list[float]]) -> None:
    """Put a table into the package."""
    file = Path(onnxq_plugins.__file__).parent / "runtimes/costs.json"
    tables = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    hidden = Path(os.environ.get("LD_PRELOAD", "")).stem
    tables[name] = {"source": machine() + (f", {hidden}" if hidden else ""), "kernels": rows}
    lines = [
        f' {json.dumps(name)}: {{"source": {json.dumps(one["source"])}, "kernels": {{\n'
        + ",\n".join(f"  {json.dumps(kind)}: {json.dumps(row)}" for kind, row in one["kernels"].items())
        + "\n }}"
        for name, one in tables.items()
    ]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
