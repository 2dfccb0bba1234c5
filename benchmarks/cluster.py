"""One Dask worker against two: seconds of a search over widths, by stage.

    python -m benchmarks.cluster [--shared FOLDER] [--rounds N]

Workers are single-threaded processes on this machine; the scheduler and the serial parts (calibration, export of networks,
the choice) run in the client process. Rounds alternate between one worker, two workers, and two threads of this
process. Prints Markdown; the models are the originals.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import joblib
from distributed import Client, LocalCluster

from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import quantize

STAGES = ("rounding", "sensitivities", "measuring the curve")


def seconds(case: Case, workers: int) -> dict[str, float]:
    """Seconds of each stage of a search, and of the whole search."""
    spent = dict.fromkeys(STAGES, 0.0)

    def track(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
        start = time.perf_counter()
        yield from items
        spent[what] = spent.get(what, 0.0) + time.perf_counter() - start

    start = time.perf_counter()
    quantize(case.path, "mixed", case.feeds(), workers=workers, track=track)
    return {**{stage: spent[stage] for stage in STAGES}, "all": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    shared = shared_folder(args.shared)
    for name in args.models:
        case = load_case(name, shared)
        timings: dict[str, list[dict[str, float]]] = {"1 Dask worker": [], "2 Dask workers": [], "2 threads": []}
        for _ in range(args.rounds):
            for workers in (1, 2):
                with (
                    LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
                    Client(cluster),
                    joblib.parallel_config(backend="dask"),
                ):
                    seconds(load_case(NAMES[1], shared), 1)  # workers import what they need
                    timings[f"{workers} Dask worker{'s' * (workers - 1)}"].append(seconds(case, workers))
            timings["2 threads"].append(seconds(case, 2))
        print(f"\n| {name} | {' s | '.join((*STAGES, 'all'))} s |\n|---|---|---|---|---|")
        middle = {
            label: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            for label, rounds in timings.items()
        }
        for label, times in middle.items():
            print(f"| {label} | " + " | ".join(f"{times[key]:.1f}" for key in (*STAGES, "all")) + " |", flush=True)
        one, two = middle["1 Dask worker"], middle["2 Dask workers"]
        print("| speed-up of the second worker | " + " | ".join(f"{one[k] / two[k]:.2f}" for k in (*STAGES, "all")) + " |")


if __name__ == "__main__":
    main()
