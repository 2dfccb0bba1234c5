"""How long a network takes that is written for one more target from its solved plan.

    python -m benchmarks.retarget MODEL.plan

The plan is one that `onnxq quantize --save-plan` wrote. Prints Markdown: seconds (median of three, the plan read each time),
and what became of its entries.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from onnxq_plugins.plugins import find_plugins


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.retarget MODEL.plan")
    plan = Path(sys.argv[1])
    print(f"{plan.name}, {plan.stat().st_size / 1e6:.1f} MB; {machine()}\n")
    print("| target | seconds | entries of the plan |\n| --- | --- | --- |")
    for target in find_plugins().targets:
        seconds = []
        try:
            for _ in range(3):
                start = time.perf_counter()
                made = onnxq.retarget(plan, target)
                made.to_bytes()
                seconds.append(time.perf_counter() - start)
        except onnxq.OnnxqError as error:
            print(f"| {target} | | refused: {error} |")
            continue
        print(f"| {target} | {median(seconds):.2f} | {made.changes} |")


if __name__ == "__main__":
    main()
