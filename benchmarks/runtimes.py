"""The matrix of runtimes and recipes of several networks: docs/runtimes.md.

    python -m benchmarks.runtimes FOLDER [MODEL ...] [--recipes int8] [--samples 8] [--set RUNTIME.KEY=VALUE]

FOLDER is as `benchmarks.models` and `benchmarks.zoo` want theirs: it holds models/ and data/, or a `zoo.py`, or both with
the latter under zoo/. Without a folder it is the digits network of `onnxq quickstart`, which needs nothing. It prints
Markdown. Samples to judge by come from the calibration split, the last ones, which are not calibrated with; `--recipes`
takes names and files. A runtime that is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.models import NAMES, load_case
from benchmarks.zoo import open_folder
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.cli.matrix import runtime_tables
from onnxq_plugins.edge.matrix import matrix
from onnxq_plugins.errors import OnnxqError

Feeds = list[dict[str, np.ndarray]]
INTRO = """# Runtimes

Each network by each recipe, written for each target and run in the runtime that the target is for: `onnxq matrix` of several
networks. integer, fake, float: operators that compute on codes, that decode codes and compute in float, or that the file has
in float, as the runtime itself tells (its profile, its graph, its list of kernels). same class: percent of samples with the
float model's class, where outputs are classes. dB: the worst output against onnxruntime on the same file (for .tflite on the
QDQ model that it was written from); dB float: against the float model. ms: one thread, on a machine that did other work
besides, so that only large differences mean anything; the simulator of QNN has none, and Vela compiles without running.
[edge.md](edge.md) tells how to get each runtime. `{command}` generates this page.

Read with it: target `ort-cpu` leaves in float what is no faster in integers by its table of costs, or costs too much
quality (`yunet`, `blazeface`: all of it); `web` has the same rules without the table. What Vela leaves to the CPU are the
QUANTIZE and DEQUANTIZE of float inputs and outputs, and what its reasons name. In the browser all codes of YuNet and
BlazeFace are those of onnxruntime; only YuNet's six Sigmoids, which are float, differ: by less than a millionth, which is
73 dB of scores that are nearly 0.
"""


def cases(folder: Path | None, chosen: list[str]) -> Iterator[tuple[str, Path, Feeds]]:
    """Names, files and calibration feeds of networks."""
    if folder is None:
        yield "digits", digits_model_path(), [{"image": x[None]} for x in digits_split()["calibration_images"]]
        return
    for name in NAMES if (folder / "models").is_dir() and (folder / "data").is_dir() else ():
        if not chosen or name in chosen:
            case = load_case(name, folder, test=False)
            yield name, case.path, case.feeds()
    zoo = folder / "zoo" if (folder / "zoo" / "zoo.py").is_file() else folder
    if (zoo / "zoo.py").is_file():
        found = open_folder(zoo)
        for name in found.names:
            if not chosen or name in chosen:
                yield name, found.path(name), found.feeds(name, "calib")


def split(feeds: Feeds, samples: int) -> tuple[Feeds, Feeds]:
    """Feeds to calibrate with, and the last ones to judge by, of the shapes of the first."""
    shapes = {name: x.shape for name, x in feeds[0].items()}
    like = [n for n, feed in enumerate(feeds) if n and {name: x.shape for name, x in feed.items()} == shapes]
    kept = like[-samples:] or [0]
    return [feed for n, feed in enumerate(feeds) if n not in kept or not like], [feeds[n] for n in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--recipes", default="int8")
    parser.add_argument("--runtimes", default="")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=64, help="samples to calibrate with at most")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    args = parser.parse_args()
    print(INTRO.format(command="python -m benchmarks.runtimes"))
    machine = ""
    for name, path, feeds in cases(args.folder, args.models):
        calibration, judged = split(feeds, args.samples)
        print(f"## {name}\n", flush=True)
        try:
            found = matrix(
                path,
                [*itertools.islice(calibration, args.calibration)],
                recipes=[n for n in args.recipes.split(",") if n],
                runtimes=[n for n in args.runtimes.split(",") if n],
                test=judged,
                settings=runtime_tables(args.settings),
                samples=args.samples,
            )
        except OnnxqError as error:
            print(f"{error}\n", flush=True)
            continue
        machine = found.machine
        print(f"{found.samples} samples.\n\n{found.markdown()}", flush=True)
    print(f"Made with {machine}, Python {sys.version.split()[0]}.")


if __name__ == "__main__":
    main()
