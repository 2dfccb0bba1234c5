"""Every model under a folder, by our recipes and by onnxruntime's tools in one run: error of each output, speed, size,
seconds and peak memory, and what stays float. With --commands: every command on every model, and how it ends.

    python -m benchmarks.zoo FOLDER [MODEL ...] [--recipes int8,int8-rounded] [--json out.json]
    python -m benchmarks.zoo FOLDER [MODEL ...] --commands

FOLDER holds a `zoo.py` with MODELS (names), path(name) and feeds(name, split) (a list of feeds as onnxruntime's `run` takes
them; split is "calib" or "test"), or NAME.onnx beside NAME_calib.npz and NAME_test.npz, every array with the samples in
front.

ort-static: quantize_static, per channel, QDQ, u8/s8, after quant_pre_process; ort-dynamic: quantize_dynamic with int8
weights, or uint8 ones where onnxruntime does not load those (Conv). With --tools also ort-rtn, ort-k-quant and ort-hqq:
MatMulNBitsQuantizer, 4 bits in blocks of 32 (needs onnx-ir; the last one torch). Models older than opset 13 are converted to
it for the first two, and quant_pre_process runs without its symbolic shape inference where that fails. Each tool quantizes
in a process of its own, on the same feeds; each result is measured in another, so that nothing ends the run.

`dB` is pooled SQNR on the test feeds: 10 log10 of all signal over all noise of an output, where the float model's values are
finite; integers, booleans and strings in percent that agree. `on/off` is the same between onnxruntime with and without graph
optimization, on the quantized model (worst output). Both are of the integers: where this machine's kernels saturate (x86-64
without VNNI), they run a copy whose weights have unsigned codes. `x float` is the float model's time over the result's, runs
in turn, one thread, on the first test feed, kernels as they are. Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.int8 import machine
from benchmarks.zoo_commands import run_commands
from benchmarks.zoo_work import ORT_TOOLS, make, measure
from onnxq_plugins.testing.exact import saturates

Feeds = list[dict[str, np.ndarray]]
COLUMNS = ("model", "tool", "dB", "on/off dB", "x float", "kB", "s", "peak MB", "kernels, or what went wrong")
_SHOWN = 4  # outputs in a cell, the worst


@dataclass(frozen=True)
class Folder:
    """Names of models, and where the file and the feeds of one are."""

    names: list[str]
    path: Callable[[str], Path]
    feeds: Callable[[str, str], Feeds]


def open_folder(folder: Path) -> Folder:
    """The models under a folder. Raises SystemExit if there is none."""
    if (folder / "zoo.py").is_file():
        spec = importlib.util.spec_from_file_location("models_of_a_folder", folder / "zoo.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return Folder(list(module.MODELS), lambda name: Path(module.path(name)), module.feeds)
    names = sorted(file.stem for file in folder.glob("*.onnx") if (folder / f"{file.stem}_calib.npz").is_file())
    if not names:
        raise SystemExit(f"{folder}: neither zoo.py nor NAME.onnx beside NAME_calib.npz")

    def feeds(name: str, split: str) -> Feeds:
        with np.load(folder / f"{name}_{split}.npz") as archive:
            arrays = {key: archive[key] for key in archive.files}
        return [{key: array[n] for key, array in arrays.items()} for n in range(len(next(iter(arrays.values()))))]

    return Folder(names, lambda name: folder / f"{name}.onnx", feeds)


def work(scratch: Path, step: str, path: Path, tool: str, seconds: int) -> dict[str, Any]:
    """What a step of one tool prints, in a process of its own; {"error": one line} if it fails.

    step   make or measure
    """
    command = [sys.executable, "-m", "benchmarks.zoo", str(scratch), "--step", step, str(path), tool]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, errors="replace")
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"ended with code {done.returncode}"]
    return {"error": said[-1].strip()[:200]}


def rows_of(name: str, folder: Folder, tools: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the float model and one for each tool."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch, path = Path(temporary), folder.path(name).resolve()
        for split in ("calib", "test"):
            feeds = folder.feeds(name, split)
            feeds = feeds[:: max(1, len(feeds) // args.samples)][: args.samples] if args.samples else list(feeds)
            (scratch / f"{split}.pickle").write_bytes(pickle.dumps(feeds))
        for tool in ("float", *tools):
            made = {} if tool == "float" else work(scratch, "make", path, tool, args.timeout)
            if "error" not in made:
                made |= work(scratch, "measure", path, tool, args.timeout)
            rows.append({"model": name, "tool": tool, **made})
            print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    outputs = sorted(row.get("outputs", {}).items(), key=lambda item: item[1]["value"])
    shown = [f"{one['value']:.1f}{'%' if one['unit'] == '%' else ''}" for _, one in outputs[:_SHOWN]]
    more = f" ... {outputs[-1][1]['value']:.1f} ({len(outputs)})" if len(outputs) > _SHOWN else ""
    numbers = [
        " ".join(shown) + more,
        f"{row['on_off']:.0f}" if "on_off" in row else "",
        f"{row['speed']:.2f}" if "speed" in row else f"{row['ms']:.3f} ms" if "ms" in row else "",
        f"{row['kB']:.0f}" if "kB" in row else "",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['peak']:.0f}" if "peak" in row else "",
        "; ".join(row[key] for key in ("summary", "remark", "error") if row.get(key)),
    ]
    return [row["model"], row["tool"], *(cell.replace("|", "/").replace("\n", " ") for cell in numbers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--recipes", default="int8,int8-rounded", help="ours, with commas between them")
    parser.add_argument(
        "--tools", default=",".join(ORT_TOOLS), help="the others, also ort-rtn, ort-k-quant, ort-hqq; empty for none"
    )
    parser.add_argument("--samples", type=int, default=0, help="feeds of each split, spread evenly; 0 for all")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that one step may take")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--commands", action="store_true", help="run every command instead")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "MODEL", "TOOL"), help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.step:
        step, path, tool = args.step
        print("\n" + json.dumps((make if step == "make" else measure)(args.folder, Path(path), tool)))
        return
    folder = open_folder(args.folder.resolve())
    if unknown := set(args.models) - set(folder.names):
        parser.error(f"{args.folder} has no {', '.join(sorted(unknown))}")
    names = args.models or folder.names
    kernels = (
        "kernels saturate here, so dB are of copies with unsigned weights" if saturates() else "kernels do not saturate here"
    )
    print(f"{machine()}; {kernels}\n", flush=True)
    if args.commands:
        run_commands(folder, names, args.samples, args.timeout)
        return
    tools = [tool for tool in args.tools.split(",") if tool] + [f"onnxq {r}" for r in args.recipes.split(",") if r]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            rows += rows_of(name, folder, tools, args)
        except Exception as error:  # of the folder's own code
            rows.append({"model": name, "tool": "feeds", "error": f"{type(error).__name__}: {error}"})
            print(f"| {' | '.join(cells(rows[-1]))} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "saturates": saturates(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
