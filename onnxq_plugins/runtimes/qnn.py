"""QNN: Qualcomm's NPU (HTP) through onnxruntime's provider, in the simulator that its x86-64 wheel brings.

QNN's own graphs tell the type of every tensor, onnxruntime's profile tells what fell back to the CPU, and its log why. It
always runs in a process of its own: wheels are for Python 3.12 and newer, and what the simulator cannot do may end it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.apart import CHILDREN, ask
from onnxq_plugins.runtimes.kernels import coded, computed, from_profile, moved, plain
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime
from onnxq_plugins.spec import Array

_INSTALL = "pip install onnxruntime-qnn (Python 3.12 or newer; --python PATH names one that has it)"
_MOVES = frozenset(
    [
        "Batch",
        "Cast",
        "ChannelShuffle",
        "Concat",
        "Convert",
        "DepthToSpace",
        "Dequantize",
        "ExpandDims",
        "Gather",
        "GatherElements",
        "GatherNd",
        "Pack",
        "Pad",
        "Quantize",
        "Reshape",
        "ScatterNd",
        "Shape",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "StridedSlice",
        "Tile",
        "Transpose",
        "UnPack",
    ]
)
_INT, _UINT, _FLOAT, _SIGNED, _UNSIGNED, _BOOL = range(
    6
)  # the second byte of QNN's types: 0x0408 is an unsigned code of 8 bits


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    python = str(settings["python"]) or sys.executable
    if not settings["python"] and importlib.util.find_spec("onnxruntime_qnn") is None:
        raise OnnxqError(f"onnxruntime-qnn is not installed; {_INSTALL}.")
    told = {name: str(settings[name]) for name in ("soc_model", "htp_arch") if settings[name]}
    model = read(file)
    dims = open_axes(model, samples)
    program: list[str | Path] = [python, CHILDREN / "ort.py"]
    answer, outputs = ask(program, "QNN", file, samples, settings["seconds"], qnn=told, dims=dims, times=0)
    if "error" in answer:
        raise OnnxqError(_refused(answer, file, told))
    codes, why = coded(model.graph), _reasons(answer["stderr"])
    graphs = answer["graphs"]
    operators = [_placed(node, codes) for graph in graphs for node in graph]
    here = [each for each in from_profile(answer.get("events", ()), codes) if not each.op.startswith("QNNExecutionProvider")]
    operators += [replace(each, where="CPU", why=why.get(each.name, "")) for each in here]
    facts = {
        "partitions": len(graphs),
        "on the CPU": sum(each.kind != "moves" for each in here),
        "version": answer["version"],
    }
    return Inspection(outputs, tuple(operators), None, facts)


def open_axes(model: onnx.ModelProto, samples: Sequence[Mapping[str, Array]]) -> dict[str, int]:
    """Sizes of the axes that a model names, from the first sample."""
    sizes: dict[str, int] = {}
    for value in model.graph.input:
        if samples and value.name in samples[0]:
            dims = zip(value.type.tensor_type.shape.dim, samples[0][value.name].shape, strict=False)
            sizes |= {dim.dim_param: size for dim, size in dims if dim.dim_param}
    return sizes


def _placed(node: Sequence[Any], codes: set[str]) -> Executed:
    """A node of QNN's graph, with the types that it reads and writes: integer if it writes codes, and reads some."""
    name, op = plain(node[0]), str(node[1])
    kinds = [[(kind or 0) >> 8 for kind in types] for types in node[2:]]
    if op in _MOVES or (kinds[1] and all(kind in (_INT, _UINT, _BOOL) for kind in kinds[1])):
        return replace(moved(name, op), where="NPU")
    integer = all(any(kind in (_SIGNED, _UNSIGNED) for kind in side) for side in kinds)
    return replace(computed(name, op, integer, codes), where="NPU")


def _reasons(log: str) -> dict[str, str]:
    """Operator -> why QNN did not take it, as its log says."""
    found: dict[str, str] = {}
    for name, op, code in re.findall(r"failed for node `([^`]+)` of type `([^`]+)` with error code (\d+)", log):
        found[re.sub(r"_\d+$", "", plain(name))] = found[plain(name)] = f"QNN refuses its {op} (error {code})"
    for name, why in re.findall(_TOLD, log, re.IGNORECASE):
        found.setdefault(plain(name), why.strip()[:200])
    return found


_TOLD = r"node[: `']+([\w./:-]+)[`']?,? .*?((?:not supported|only supports?|must)[^\n\x1b]*)"


def _refused(answer: Mapping[str, Any], file: Path, told: Mapping[str, str]) -> str:
    if "ModuleNotFoundError" in answer["error"]:
        return f"onnxruntime-qnn is not installed in that Python ({answer['error']}); {_INSTALL}."
    text = f"QNN cannot run '{file.name}': {answer['error'][:300].rstrip('.')}"
    if re.search(r"1002|MEM_ALLOC", answer["error"] + answer["stderr"]) and "soc_model" not in told:
        return text + "; the default chip has too little memory for it: --set soc_model=60."
    return text + "."


QNN = Runtime(
    "qnn",
    "Qualcomm's NPU (HTP) in the simulator of onnxruntime-qnn",
    _INSTALL,
    _inspect,
    module="onnxruntime_qnn",
    settings={"python": "", "soc_model": 60, "htp_arch": 73, "seconds": 1800.0},
)
