"""How long a run takes in a runtime that is not onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def milliseconds(run: Callable[[], object], seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter) -> float:
    """First decile of the milliseconds of a few runs: what a run takes that nothing disturbed. Call it when the runtime is
    warm.

    clock   time.process_time leaves out what other programs take
    """
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = clock()
        run()
        taken.append(clock() - start)
    return float(np.quantile(taken, 0.1)) * 1e3
