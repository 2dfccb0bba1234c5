"""How long a run takes in a runtime that is not onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def milliseconds(run: Callable[[], object], seconds: float = 0.3) -> float:
    """First decile of the milliseconds of a few runs: what a run takes that nothing disturbed. Call it when the runtime is
    warm."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.quantile(taken, 0.1)) * 1e3
