"""LiteRT: .tflite files in the interpreter that ai-edge-litert ships, one thread, with its XNNPACK delegate."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.runtimes.runtime import Inspection, Runtime
from onnxq_plugins.runtimes.tflite import decoded, executed, fed, inputs, ports
from onnxq_plugins.runtimes.timing import milliseconds
from onnxq_plugins.spec import Array

INSTALL = "pip install 'onnxq-plugins[litert]'"


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    interpreter = _interpreter(file)
    names = {entry["index"]: entry["name"] for entry in interpreter.get_tensor_details()}
    rows = tuple(executed(interpreter._get_ops_details(), names))
    facts: dict[str, Any] = {"file kB": round(file.stat().st_size / 1e3)}
    if not samples:
        return Inspection((), rows, None, facts)
    given, made = ports(file)
    outputs = []
    for sample in samples:
        feed = fed(given, sample, file)
        for name, port in given.items():
            interpreter.set_tensor(port.index, feed[name])
        _invoke(interpreter, file)
        outputs.append(decoded(made, {name: interpreter.get_tensor(port.index) for name, port in made.items()}))
    return Inspection(tuple(outputs), rows, milliseconds(interpreter.invoke, float(settings.get("seconds", 0.3))), facts)


def _interpreter(file: Path) -> Any:
    try:
        module = importlib.import_module("ai_edge_litert.interpreter")
    except ImportError as error:
        raise OnnxqError(f"LiteRT is not installed; {INSTALL}.") from error
    try:
        with _silent():
            interpreter = module.Interpreter(model_path=str(file), num_threads=1)
            interpreter.allocate_tensors()
    except Exception as error:  # pybind11 passes on several types
        raise OnnxqError(f"LiteRT cannot load '{file}' ({_first(error)}).") from error
    return interpreter


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what LiteRT writes on stderr by itself, such as that it made a delegate; errors it raises, too."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _invoke(interpreter: Any, file: Path) -> None:
    try:
        interpreter.invoke()
    except Exception as error:
        raise OnnxqError(f"LiteRT cannot run '{file}' on this input ({_first(error)}).") from error


LITERT = Runtime(
    "litert",
    "LiteRT (TensorFlow Lite): its interpreter with XNNPACK, one thread",
    INSTALL,
    _inspect,
    module="ai_edge_litert",
    suffix=".tflite",
    inputs=inputs,
    settings={"seconds": 0.3},
)
