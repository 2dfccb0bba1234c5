"""LiteRT Micro: .tflite files in the interpreter for microcontrollers, as tflite-micro's wheel has it for this machine.

Its kernels here are the reference ones, which compute what those of a chip compute, slowly: no times are told. It runs in a
process of its own, since what it cannot do may end it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.runtimes.apart import CHILDREN, ask
from onnxq_plugins.runtimes.runtime import Inspection, Runtime
from onnxq_plugins.runtimes.tflite import decoded, executed, fed, inputs, operators, ports
from onnxq_plugins.spec import Array

INSTALL = "pip install tflite-micro (--python PATH names a Python that has it)"
_ARENA = 2**28  # bytes to allocate from; what a file needs of them is told
_WORDS = {"PADV2": "PadV2", "CUMSUM": "CumSum", "BATCH_MATMUL": "BatchMatMul"}  # the others: CONV_2D is Conv2D


def resolver(ops: Iterable[str]) -> str:
    """What MicroMutableOpResolver is told for these operators: its size, and a call for each."""
    words = {op: "".join(part.capitalize() for part in op.split("_")) for op in ops}
    names = sorted({_WORDS.get(op) or word.replace("2d", "2D").replace("3d", "3D") for op, word in words.items()})
    return f"MicroMutableOpResolver<{len(names)}>: " + " ".join(f"Add{name}();" for name in names)


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    python = str(settings["python"]) or sys.executable
    OnnxqError.check([why] if (why := MICRO.missing(settings)) else [])
    given, made = ports(file)
    listed, names = operators(file)
    feeds = [fed(given, sample, file) for sample in samples]
    places = [{name: port.place for name, port in side.items()} for side in (given, made)]
    program: list[str | Path] = [python, CHILDREN / "micro.py"]
    told: dict[str, Any] = {"inputs": places[0], "outputs": places[1], "arena": _ARENA}
    answer, outputs = ask(program, "LiteRT Micro", file, feeds, settings["seconds"], **told)
    if "ModuleNotFoundError" in answer.get("error", ""):
        raise OnnxqError(f"LiteRT Micro is not installed in '{python}' ({answer['error']}); {INSTALL}.")
    if "error" in answer:
        raise OnnxqError(f"LiteRT Micro cannot run '{file.name}': {_why(answer)}.")
    arena = re.search(r"Arena allocation total (\d+)", answer["stderr"])
    facts: dict[str, Any] = {"file kB": round(file.stat().st_size / 1e3)}
    if arena:
        facts["arena kB"] = round(int(arena[1]) / 1e3, 1)
    facts["resolver"] = resolver(op["op_name"] for op in listed)
    return Inspection(tuple(decoded(made, row) for row in outputs), tuple(executed(listed, names)), None, facts)


def _why(answer: Mapping[str, Any]) -> str:
    """What the interpreter printed before it gave up, or what it raised."""
    lines = [line.strip() for line in answer["stderr"].splitlines() if line.strip()]
    told = next((line for line in lines if "opcode" in line or ".cc" in line or "not supported" in line), answer["error"])
    return str(told)[:300].rstrip(".")


MICRO = Runtime(
    "litert-micro",
    "LiteRT Micro, the interpreter for microcontrollers: memory, the operators to add; reference kernels, no times",
    INSTALL,
    _inspect,
    module="tflite_micro",
    suffix=".tflite",
    settings={"python": "", "seconds": 600.0},
    inputs=inputs,
)
