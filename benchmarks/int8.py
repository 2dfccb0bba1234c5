"""Recipes int8 and int8-rounded against onnxruntime's own tool, and onnxsim where installed, in one run.

    python -m benchmarks.int8 [--shared FOLDER] [--rounds 3]

Each tool quantizes in its own process, in turn, `rounds` times: wall seconds of the call (imports and data reading
excluded) and peak memory of the process are medians. Accuracy and SQNR are measured on images that calibration never saw;
latency at batch 1, one thread, all models in turn. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.models import NAMES, Case, load_case, peak_memory, shared_folder

TOOLS = ("onnxruntime", "onnxsim", "onnxq int8", "onnxq int8-rounded")


def reader(case: Case) -> Any:
    """The calibration samples as onnxruntime's CalibrationDataReader."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(case.feeds())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    return Reader()


def quantize_with(tool: str, case: Case, out: Path) -> float:
    """Quantize once; seconds of the call. "onnxq NAME" runs the recipe of that name."""
    if tool == "onnxruntime":
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        start = time.perf_counter()
        prepared = out.with_suffix(".pre.onnx")
        quant_pre_process(str(case.path), str(prepared))
        quantize_static(
            str(prepared),
            str(out),
            reader(case),
            per_channel=True,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return time.perf_counter() - start
    if tool == "onnxsim":
        import onnx
        from onnxsim.full_qdq import quantize_full_qdq

        start = time.perf_counter()
        onnx.save(quantize_full_qdq(str(case.path), case.feeds()), str(out))
        return time.perf_counter() - start
    import onnxq_plugins

    start = time.perf_counter()
    onnxq_plugins.quantize(case.path, tool.removeprefix("onnxq "), case.feeds(), output=out)
    return time.perf_counter() - start


def child(tool: str, name: str, shared: Path, out: Path) -> None:
    """The process of one tool: quantize and print its figures."""
    case = load_case(name, shared, test=False)
    before = peak_memory()
    seconds = quantize_with(tool, case, out)
    peak = peak_memory()
    print(json.dumps({"seconds": seconds, "peak": peak, "before": before}))


def judge(case: Case, models: dict[str, Path]) -> dict[str, dict[str, float | str]]:
    """Accuracy, SQNR, latency and kernels of each model, float first."""
    from onnxq_plugins import audit_model, measure, runtimes

    runners = {tool: runtimes.session(path) for tool, path in models.items()}
    times = dict(
        zip(models, runtimes.latency(list(runners.values()), {case.input: case.test[:1]}, 3.0 * len(models)), strict=True)
    )
    rows: dict[str, dict[str, float | str]] = {}
    reference = None
    for tool, path in models.items():
        feeds = [{case.input: case.test[i : i + 1]} for i in range(len(case.test))]
        logits = runtimes.outputs(runners[tool], feeds)[0]
        reference = logits if reference is None else reference
        rows[tool] = {
            "top1": 100 * float(np.mean(logits.argmax(1) == case.labels)),
            "sqnr": "-" if tool == "float" else f"{measure.sqnr(reference, logits):.2f}",
            "agree": 100 * measure.agreement(reference, logits),
            "ms": times[tool],
            "mb": path.stat().st_size / 1e6,
            "kernels": "" if tool == "float" else audit_model(path).summary,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shared = shared_folder(args.shared)
    if args.child:
        child(args.child[0], args.child[1], shared, Path(args.child[2]))
        return
    tools = [t for t in TOOLS if t != "onnxsim" or _installed("onnxsim")]
    print(f"{machine()}\n")
    columns = (
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
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            case = load_case(name, shared)
            costs: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
            models = {"float": case.path}
            for _ in range(args.rounds):
                for tool in tools:
                    out = Path(folder) / f"{name}.{tool.replace(' ', '_')}.onnx"
                    command = [sys.executable, "-m", "benchmarks.int8", "--shared", str(shared), "--child", tool, name]
                    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=False)
                    if done.returncode:
                        print(f"{tool} failed on {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                        continue
                    models[tool] = out
                    costs[tool].append(json.loads(done.stdout.strip().splitlines()[-1]))
            rows = judge(case, models)
            for tool, row in rows.items():
                cost = costs.get(tool) or []
                medians = [median(c[key] for c in cost) for key in ("seconds", "before", "peak")] if cost else []
                spent = f"{medians[0]:.2f} | {medians[1]:.0f} | {medians[2]:.0f}" if cost else "- | - | -"
                loss, faster = (float(rows["float"][k]) for k in ("top1", "ms"))
                print(
                    f"| {name} | {tool} | {row['top1']:.2f} | {loss - float(row['top1']):.2f} | {row['sqnr']} | "
                    f"{row['agree']:.1f} | {row['ms']:.3f} | {faster / float(row['ms']):.2f} | {row['mb']:.2f} | "
                    f"{spent} | {row['kernels']} |",
                    flush=True,
                )


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def machine() -> str:
    """CPU and versions."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    packages = [f"{p} {version(p)}" for p in ("onnxruntime", "onnx", "numpy", "onnxsim") if _installed(p)]
    return f"{cpu}, Python {platform.python_version()}, {', '.join(packages)}"


if __name__ == "__main__":
    main()
