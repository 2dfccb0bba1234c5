"""Recipes int8 and int8-rounded beside tools that learn the rounding with torch: AMD Quark and AIMET, in one run.

    python -m benchmarks.learned [--shared FOLDER] [--models ...] [--iterations 100] [--python TOOL=PATH ...]

TOOL is quark or aimet (or any other of the tools), PATH the python that has it installed: they need torch, and an onnx
and onnxruntime of their own liking. A tool that its python does not have is left out. Each tool quantizes once in a
process of its own, to int8 per channel and uint8 activations, on the same images; the models are judged here, as in
benchmarks.int8. The peers equalize across layers, then learn each layer's rounding in `iterations` steps of one image:
their defaults are 1000 (Quark) and 10000 (AIMET). Across Clip(0, 6), all that MobileNetV1 has, neither finds layers to
equalize. Prints Markdown.
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

from benchmarks.int8 import judge, machine, quantize_with, reader
from benchmarks.models import NAMES, Case, load_case, peak_memory, shared_folder

PACKAGES = {"onnxruntime": "onnxruntime", "onnxq int8": "onnx", "onnxq int8-rounded": "onnx", "quark": "amd-quark",
            "aimet": "aimet-onnx"}
COLUMNS = ("model", "tool", "top-1", "loss", "SQNR dB", "agree", "ms", "MB", "quantize s", "MB before", "peak MB", "kernels")


def with_quark(case: Case, out: Path, iterations: int) -> float:
    """Quantize with AMD Quark; seconds of the call."""
    from quark import onnx as quark

    start = time.perf_counter()
    channels, ranges = quark.QuantGranularity.Channel, quark.CalibMethod.MinMax
    layers = quark.QLayerConfig(activation=quark.UInt8Spec(calibration_method=ranges),
                                weight=quark.Int8Spec(calibration_method=ranges, quant_granularity=channels))
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


def child(tool: str, name: str, shared: Path, out: Path, iterations: int) -> None:
    """What the process of one tool does: quantize and print its figures."""
    case = load_case(name, shared, test=False)
    before = peak_memory()
    learned = {"quark": with_quark, "aimet": with_aimet}.get(tool)
    seconds = learned(case, out, iterations) if learned else quantize_with(tool, case, out)
    print("\n" + json.dumps({"seconds": seconds, "before": before, "peak": peak_memory()}))


def release(tool: str, python: str) -> str | None:
    """The version of a tool's package in that python, None if it is not there."""
    code = f"from importlib.metadata import version; print(version({PACKAGES[tool]!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--models", nargs="*", default=[NAMES[0]])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--python", nargs="*", action="extend", default=[], metavar="TOOL=PATH")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shared = shared_folder(args.shared)
    if args.child:
        child(args.child[0], args.child[1], shared, Path(args.child[2]), args.iterations)
        return
    pythons = dict.fromkeys(PACKAGES, sys.executable) | dict(given.split("=", 1) for given in args.python)
    if unknown := set(pythons) - set(PACKAGES):
        parser.error(f"--python knows {', '.join(PACKAGES)}, not {', '.join(sorted(unknown))}")
    releases = {tool: release(tool, pythons[tool]) for tool in PACKAGES}
    for tool in (t for t, found in releases.items() if found is None):
        print(f"{tool} left out: {pythons[tool]} has no {PACKAGES[tool]}", file=sys.stderr)
    peers = [f"{PACKAGES[t]} {releases[t]}" for t in ("quark", "aimet") if releases[t]]
    print(f"{', '.join([machine(), *peers])}; {args.iterations} iterations\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            case = load_case(name, shared)
            models, costs = {"float": case.path}, {}
            for tool in (t for t, found in releases.items() if found):
                out = Path(folder) / f"{tool.replace(' ', '_')}.onnx"
                command = [pythons[tool], "-m", "benchmarks.learned", "--shared", str(shared.resolve()), "--iterations",
                           str(args.iterations), "--child", tool, name, str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)
                if done.returncode or not out.is_file():
                    print(f"{tool} failed on {name}: {(done.stderr.strip() or '-').splitlines()[-1]}", file=sys.stderr)
                    continue
                models[tool] = out
                figures = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
                costs[tool] = f"{figures['seconds']:.2f} | {figures['before']:.0f} | {figures['peak']:.0f}"
            rows = judge(case, models)
        for tool, row in rows.items():
            print(f"| {name} | {tool} | {row['top1']:.2f} | {float(rows['float']['top1']) - float(row['top1']):.2f} | "
                  f"{row['sqnr']} | {row['agree']:.1f} | {row['ms']:.3f} | {row['mb']:.2f} | "
                  f"{costs.get(tool, '- | - | -')} | {row['kernels']} |", flush=True)


if __name__ == "__main__":
    main()
