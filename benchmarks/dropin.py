"""One script for onnxruntime's quantize_static, run with its own import and with ours, on real networks.

    python -m benchmarks.dropin [--shared FOLDER] [--zoo FOLDER] [MODEL ...] [--samples 64]

The script: quant_pre_process, quantize_static per channel, uint8 activations, int8 weights, on up to so many samples. For
each import the SQNR of the worst output on test samples, the float model's time over the result's (in turn, one thread,
first test sample), kB, and whether inputs and outputs are those of the model. "their ranges": ours with the ranges that
onnxruntime's calibration found for tensors that ours quantizes, too, as TensorQuantOverrides, so by pass fixed-ranges.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, load_tensors_data

from benchmarks.int8 import machine
from benchmarks.models import NAMES, load_case, shared_folder
from benchmarks.zoo import open_folder
from benchmarks.zoo_work import _exact, _prepared, errors
from onnxq_plugins import runtimes
from onnxq_plugins.graph.reading import bytes_on_disk

Feeds = list[dict[str, np.ndarray]]


class Reader(CalibrationDataReader):
    def __init__(self, feeds: Feeds) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def script(module: str, prepared: Path, out: Path, feeds: Feeds, **options: Any) -> Any:
    """What is compared: one call, by the module of an import."""
    quantize_static = importlib.import_module(module).quantize_static
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return quantize_static(str(prepared), str(out), Reader(feeds), per_channel=True, **types, **options)


def networks(args: argparse.Namespace) -> Iterator[tuple[str, Path, Feeds, Feeds]]:
    """Name, file, samples to calibrate on and to test on."""
    shared = shared_folder(args.shared)
    zoo = open_folder(args.zoo) if args.zoo else None
    for name in args.models or [*NAMES, *(zoo.names if zoo else ())]:
        if name in NAMES:
            case = load_case(name, shared)
            yield name, case.path, case.feeds(), [{case.input: x[None]} for x in case.test[:64]]
        elif zoo is not None:
            yield name, zoo.path(name), list(zoo.feeds(name, "calib")), list(zoo.feeds(name, "test"))


def ports(path: Path) -> list[tuple[str, str]]:
    session = runtimes.session(path)
    return [(port.name, port.type) for port in (*session.get_inputs(), *session.get_outputs())]


def row(path: Path, out: Path, test: Feeds, bytes_: int) -> str:
    """The cells about one result."""
    exact, own = runtimes.session(path), runtimes.session(out)
    names = [output.name for output in exact.get_outputs()]
    reference = [exact.run(None, feed) for feed in test]
    quantized = runtimes.session(_exact(onnx.load(str(out))))
    sqnr = min(one["value"] for one in errors(names, reference, [quantized.run(None, feed) for feed in test]).values())
    times = runtimes.latency([exact, own], test[0], 1.0)
    return f"{sqnr:.1f} | {times[0] / times[1]:.2f} | {bytes_ / 1e3:.0f} | {'yes' if ports(path) == ports(out) else 'no'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--shared")
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    print(f"{machine()}\n\n| model | import | dB | x float | kB | same ports |\n|{'---|' * 6}")
    for name, path, calib, test in networks(args):
        feeds = calib[:: max(1, len(calib) // args.samples)][: args.samples]
        with tempfile.TemporaryDirectory() as temporary:
            theirs, ours, fixed, cache = (Path(temporary) / f for f in ("t.onnx", "o.onnx", "f.onnx", "ranges.json"))
            prepared = _prepared(path, theirs)
            script("onnxruntime.quantization", prepared, theirs, feeds, calibration_cache_path=str(cache))
            result = script("onnxq_plugins.ort", prepared, ours, feeds)
            found = load_tensors_data(cache)
            ranges = {
                n: [float(v[0]) for v in (found[n].lowest.ravel(), found[n].highest.ravel())] for n in list(found.keys())
            }
            known = {n: [{"rmin": r[0], "rmax": r[1]}] for n, r in ranges.items() if n in result.plan and r[0] < r[1]}
            script("onnxq_plugins.ort", prepared, fixed, feeds, extra_options={"TensorQuantOverrides": known})
            for label, out in (
                ("onnxruntime.quantization", theirs),
                ("onnxq_plugins.ort", ours),
                ("the same, their ranges", fixed),
            ):
                print(f"| {name} | {label} | {row(path, out, test, bytes_on_disk(out))} |", flush=True)


if __name__ == "__main__":
    main()
