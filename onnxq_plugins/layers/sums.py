"""Layers that became sums of layers: the ranges that their terms need.

The range of a term leaves out what the range of the result clips whatever the other terms are. Convolutions can reach far
beyond the ReLU6 after them, and steps as wide as that would cost more than 4-bit weights do."""

from __future__ import annotations

from collections.abc import Sequence

from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import activation_spec


def narrow_ranges(job: Job, sums: Sequence[Sequence[str]]) -> None:
    """Narrow the range of a term where that of the result clips the sum anyway: with the other terms within [-r, r], values
    between low - r and high + r suffice. That leaves out half of a term's values behind a Relu, and more behind a Relu6.
    Terms with nothing to leave out stay open; without calibration data all do.

    sums   for each: names of the n terms, of the sums of the last n - 1, n - 2, ... 2, and of the result, all planned. The
           result may lie behind a Relu or Clip
    """
    if not sums or not job.calibration.ready:
        return
    exact = job.calibration.ranges(sorted({name for names in sums for name in names}))
    for *terms, result in sums:
        low, high = job.plan[result].value_range if job.plan[result].solved else exact[result]
        orders = terms[: (len(terms) + 2) // 2]  # then the partial sums, from the second term on, the third ...
        reach = [max(map(abs, exact[name])) for name in orders]
        for i, name in enumerate(terms):
            rest = sum(reach[j] for j in range(len(orders)) if (j != i if i < len(orders) else j < i - len(orders) + 1))
            lo, hi = exact[name]
            if low - rest < high + rest and (lo < low - rest or hi > high + rest):
                ends = min(max(lo, low - rest), 0.0), max(min(hi, high + rest), 0.0)
                job.plan |= {name: activation_spec(ends, job.plan[name])}
