"""OpenCV's dnn module on the CPU. The types of the layers that it made tell what runs: ``ConvolutionInt8`` and its like.

It runs in a process of its own, since there are networks that end it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.apart import CHILDREN, ask
from onnxq_plugins.runtimes.kernels import MOVES, coded, computed, moved
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime
from onnxq_plugins.spec import Array

_INSTALL = "pip install 'onnxq-plugins[opencv]'"
_MOVES = MOVES | {
    "Const",
    "Crop",
    "Dequantize",
    "Padding",
    "PaddingInt8",
    "Permute",
    "Quantize",
    "Requantize",
    "ReshapeInt8",
    "ShuffleChannel",
    "TransformLayout",
}


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    python = str(settings["python"]) or sys.executable
    if not settings["python"] and (sys.modules.get("cv2", 0) is None or importlib.util.find_spec("cv2") is None):
        raise OnnxqError(f"OpenCV is not installed; {_INSTALL}.")
    graph = read(file).graph
    told = {"names": [value.name for value in graph.output], "engine": str(settings["engine"]), "times": 0.3}
    program: list[str | Path] = [python, CHILDREN / "opencv.py"]
    answer, outputs = ask(program, "OpenCV", file, samples, settings["seconds"], **told)
    if "ModuleNotFoundError" in answer.get("error", ""):
        raise OnnxqError(f"OpenCV is not installed in '{python}' ({answer['error']}); {_INSTALL}.")
    if "error" in answer:
        text = re.sub(r"^.*error: ", "", answer["error"])[:300].rstrip(".")
        raise OnnxqError(f"OpenCV {answer.get('version', '')} cannot run '{file.name}': {text}.")
    codes = coded(graph)
    operators = tuple(_layer(name.rpartition("!")[2], kind, codes) for name, kind in answer["layers"])
    return Inspection(outputs, operators, answer["milliseconds"], {"version": answer["version"]})


def _layer(name: str, kind: str, codes: set[str]) -> Executed:
    if kind in _MOVES:
        return moved(name, kind)
    return computed(name, kind, kind.endswith("Int8"), codes)


OPENCV = Runtime(
    "opencv",
    "OpenCV's dnn module",
    _INSTALL,
    _inspect,
    module="cv2",
    settings={"engine": "classic", "python": "", "seconds": 600.0},
)
