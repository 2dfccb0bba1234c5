"""This package and other tools in one run, on models given by name or path: accuracy, SQNR, size, latency, kernels, seconds
and peak memory.

    python -m benchmarks.peers [--shared FOLDER] [--models NAME ...] [--iterations 100] [--python TOOL=PATH ...]
    python -m benchmarks.peers --models model.onnx --data calibration.npz --test test.npz

Tools: onnxruntime (quantize_static, per channel, after its pre-process), onnxsim (quantize_full_qdq), nncf (nncf.quantize,
defaults), quark (AMD Quark) and aimet with AdaRound, and our recipes. PATH is the python that has a tool installed, if this
one does not: several need torch, or specific versions of onnx and onnxruntime. Tools that are not installed are skipped.
Each tool quantizes once in its own process, to int8 per channel and uint8 activations, on the same samples; the models are
measured here, on samples that none of them saw, as in benchmarks.int8. Quark and AIMET equalize across layers, then learn
each layer's rounding in `iterations` steps of one sample: their defaults are 1000 and 10000. Prints Markdown.

A model's test.npz holds its samples under the name of its input, and `labels`; it must have one input and classes as output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.int8 import judge, machine, quantize_with, reader
from benchmarks.models import NAMES, Case, load_case, peak_memory, shared_folder

PACKAGES = {
    "onnxruntime": "onnxruntime",
    "onnxsim": "onnxsim",
    "nncf": "nncf",
    "quark": "amd-quark",
    "aimet": "aimet-onnx",
    "onnxq int8": "onnx",
    "onnxq int8-rounded": "onnx",
}
COLUMNS = (
    "model",
    "tool",
    "top-1",
    "loss",
    "SQNR dB",
    "agree",
    "ms",
    "speed-up",
    "MB",
    "quantize s",
    "MB before",
    "peak MB",
    "kernels",
)


def with_nncf(case: Case, out: Path, iterations: int) -> float:
    """Quantize with NNCF's defaults; seconds of the call."""
    import nncf
    import onnx

    start = time.perf_counter()
    feeds = case.feeds()
    onnx.save(nncf.quantize(onnx.load(case.path), nncf.Dataset(feeds), subset_size=len(feeds)), str(out))
    return time.perf_counter() - start


def with_quark(case: Case, out: Path, iterations: int) -> float:
    """Quantize with AMD Quark; seconds of the call."""
    from quark import onnx as quark

    start = time.perf_counter()
    channels, ranges = quark.QuantGranularity.Channel, quark.CalibMethod.MinMax
    layers = quark.QLayerConfig(
        activation=quark.UInt8Spec(calibration_method=ranges),
        weight=quark.Int8Spec(calibration_method=ranges, quant_granularity=channels),
    )
    learn = quark.AdaRoundConfig(num_iterations=iterations)
    config = quark.QConfig(layers, algo_config=[quark.CLEConfig(), learn])  # ReplaceClip6Relu would change the function
    quark.ModelQuantizer(config).quantize_model(str(case.path), str(out), reader(case))
    return time.perf_counter() - start


def with_aimet(case: Case, out: Path, iterations: int) -> float:
    """Quantize with AIMET; seconds of the call."""
    import aimet_onnx
    import onnx
    from aimet_onnx.cross_layer_equalization import equalize_model

    start = time.perf_counter()
    model = onnx.load(case.path)
    equalize_model(model)
    sim = aimet_onnx.QuantizationSimModel(model, param_type=aimet_onnx.int8, activation_type=aimet_onnx.int8)
    aimet_onnx.apply_adaround(sim, case.feeds(), num_iterations=iterations)
    sim.compute_encodings(case.feeds())
    onnx.save(sim.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True), str(out))
    return time.perf_counter() - start


def load_any(name: str, shared: Path, data: str, test: str) -> Case:
    """A case by name, or a model by path with its samples; without test samples where `test` is ""."""
    if not name.endswith(".onnx"):
        return load_case(name, shared, test=bool(test))
    import onnx

    model = onnx.load(name, load_external_data=False)
    constants = {t.name for t in model.graph.initializer}
    key = next(i.name for i in model.graph.input if i.name not in constants)
    judged = np.load(test) if test else {key: np.zeros(0), "labels": np.zeros(0)}
    return Case(Path(name).stem, Path(name), key, np.load(data)[key], judged[key], judged["labels"])


def child(tool: str, case: Case, out: Path, iterations: int) -> None:
    """The process of one tool: quantize and print its figures."""
    before = peak_memory()
    own = {"quark": with_quark, "aimet": with_aimet, "nncf": with_nncf}.get(tool)
    seconds = own(case, out, iterations) if own else quantize_with(tool, case, out)
    print("\n" + json.dumps({"seconds": seconds, "before": before, "peak": peak_memory()}))


def release(tool: str, python: str) -> str | None:
    """The version of a tool's package in that python, None if it is not installed."""
    code = f"from importlib.metadata import version; print(version({PACKAGES[tool]!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--data", default="", help="calibration samples of a model given by path, .npz")
    parser.add_argument("--test", default="", help="its test samples and labels, .npz")
    parser.add_argument("--tools", nargs="*", default=list(PACKAGES))
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--python", nargs="*", action="extend", default=[], metavar="TOOL=PATH")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(name.endswith(".onnx") for name in args.models) and not (args.data and args.test):
        parser.error("a model given by path needs --data and --test")
    shared = shared_folder(args.shared)
    if args.child:
        tool, name, out = args.child
        child(tool, load_any(name, shared, args.data, ""), Path(out), args.iterations)
        return
    pythons = dict.fromkeys(PACKAGES, sys.executable) | dict(given.split("=", 1) for given in args.python)
    if unknown := set(pythons) - set(PACKAGES):
        parser.error(f"--python knows {', '.join(PACKAGES)}, not {', '.join(sorted(unknown))}")
    releases = {tool: release(tool, pythons[tool]) for tool in PACKAGES if tool in args.tools}
    for tool in (t for t, version in releases.items() if version is None):
        print(f"{tool} left out: {pythons[tool]} has no {PACKAGES[tool]}", file=sys.stderr)
    peers = [f"{PACKAGES[t]} {releases[t]}" for t in ("nncf", "quark", "aimet") if releases.get(t)]
    print(f"{', '.join([machine(), *peers])}; {args.iterations} iterations\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    data, test = (str(Path(given).resolve()) if given else "" for given in (args.data, args.test))
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            case = load_any(name, shared, data, test or "theirs")
            models, costs = {"float": case.path}, {}
            for tool in (t for t, version in releases.items() if version):
                out = Path(folder) / f"{tool.replace(' ', '_')}.onnx"
                command = [
                    pythons[tool],
                    "-m",
                    "benchmarks.peers",
                    "--shared",
                    str(shared.resolve()),
                    "--iterations",
                    str(args.iterations),
                    "--data",
                    data,
                    "--test",
                    test,
                    "--models",
                    "--child",
                    tool,
                    str(case.path.resolve()) if name.endswith(".onnx") else name,
                    str(out),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)
                if done.returncode or not out.is_file():
                    print(f"{tool} failed on {name}: {(done.stderr.strip() or '-').splitlines()[-1]}", file=sys.stderr)
                    continue
                models[tool] = out
                figures = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
                costs[tool] = f"{figures['seconds']:.2f} | {figures['before']:.0f} | {figures['peak']:.0f}"
            rows = judge(case, models)
        for tool, row in rows.items():
            loss, slow = (float(rows["float"][key]) for key in ("top1", "ms"))
            print(
                f"| {case.name} | {tool} | {row['top1']:.2f} | {loss - float(row['top1']):.2f} | {row['sqnr']} | "
                f"{row['agree']:.1f} | {row['ms']:.3f} | {slow / float(row['ms']):.2f} | {row['mb']:.2f} | "
                f"{costs.get(tool, '- | - | -')} | {row['kernels']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
