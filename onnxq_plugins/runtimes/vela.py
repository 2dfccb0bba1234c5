"""Vela, Arm's compiler for Ethos-U NPUs: it says which operators of a .tflite file run on the NPU, in how much memory and in
how many cycles. It compiles only; the NPU is not here."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Kind, Runtime
from onnxq_plugins.runtimes.tflite import inputs
from onnxq_plugins.spec import Array

INSTALL = "pip install 'onnxq-plugins[ethos-u]'"
_MOVES = {"Reshape", "Transpose", "Memcpy", "MemoryCopy", "Concat", "Concatenation", "Slice", "StridedSlice", "Pad", "Split"}
_MOVES |= {"Quantize", "Dequantize", "Squeeze", "ExpandDims", "Gather", "Tile", "Cast", "Pack", "Unpack"}


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    """Samples are not run."""
    if importlib.util.find_spec("ethosu") is None:
        raise OnnxqError(f"Vela is not installed; {INSTALL}.")
    with tempfile.TemporaryDirectory() as folder:
        log = _compiled(file, Path(folder), str(settings.get("accelerator", "ethos-u55-128")))
        layers, summary = _table(Path(folder), "*_per-layer.csv"), _table(Path(folder), "*_summary_*.csv")
    rows = _operators(layers, _reasons(log))
    return Inspection((), rows, None, {**_placed(rows), **_costs(summary)})


def _compiled(file: Path, folder: Path, accelerator: str) -> str:
    """Compile into a folder; what Vela says. Raises OnnxqError if it fails."""
    command = [sys.executable, "-m", "ethosu.vela", str(file), "--accelerator-config", accelerator]
    command += ["--output-dir", str(folder), "--show-cpu-operations", "--verbose-performance"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in log.splitlines() if line.strip()]
        raise OnnxqError(f"Vela cannot compile '{file}' for {accelerator} ({lines[-1][:300] if lines else 'no word'}).")
    return log


def _table(folder: Path, pattern: str) -> list[dict[str, str]]:
    """The rows of a report of Vela's."""
    found = sorted(folder.glob(pattern))
    if not found:
        return []
    with found[0].open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _reasons(log: str) -> dict[str, str]:
    """Name of an output -> why its operator is not for the NPU, from Vela's warnings: a line that names it, then reasons."""
    reasons: dict[str, str] = {}
    name = ""
    for line in log.splitlines():
        if match := re.match(r"Warning.*operator: *\S+,? .*ofm: *'(.*)'", line):
            name = match[1]
        elif name and line.strip():
            text = re.sub(
                r" *\((?:ifm|ofm|[^ ()]*[/#][^ ()]*|input|output)\)", "", line.strip().removeprefix("Reason:").strip()
            )
            reasons[name] = f"{reasons[name]}: {text}" if name in reasons else text
        else:
            name = ""
    return reasons


def _operators(layers: Sequence[Mapping[str, str]], reasons: Mapping[str, str]) -> tuple[Executed, ...]:
    """Vela's list of operators as it runs them."""
    rows = []
    for layer in layers:
        op, name, where = layer["Original Operator"], layer["Name"], layer["Target"]
        kind: Kind = "moves" if op in _MOVES else "integer" if where == "NPU" else "float"
        why = "" if where == "NPU" else reasons.get(name, "Vela leaves it to the CPU")
        rows.append(Executed(name, op, kind, where, why))
    return tuple(rows)


def _placed(rows: Sequence[Executed]) -> dict[str, Any]:
    on = sum(row.where == "NPU" for row in rows)
    return {"operators on the NPU": on, "operators on the CPU": len(rows) - on}


def _costs(summary: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    if not summary:
        return {}
    row = summary[0]
    return {
        "accelerator": row["accelerator_configuration"],
        "SRAM kB": round(float(row["sram_memory_used"]) * 1.024, 1),
        "flash kB": round(float(row["off_chip_flash_memory_used"]) * 1.024, 1),
        "cycles": round(float(row["cycles_total"])),
        "ms at its clock": round(float(row["inference_time"]) * 1e3, 3),
    }


VELA = Runtime(
    "vela",
    "Vela, the compiler for Arm Ethos-U NPUs: operators on the NPU and on the CPU, memory, cycles; nothing is run",
    INSTALL,
    _inspect,
    module="ethosu",
    suffix=".tflite",
    inputs=inputs,
    settings={"accelerator": "ethos-u55-128"},
)
