"""LiteRT: .tflite files in the interpreter that ai-edge-litert ships, one thread, with its XNNPACK delegate."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Kind, Runtime
from onnxq_plugins.runtimes.timing import milliseconds
from onnxq_plugins.spec import Array

INSTALL = "pip install 'onnxq-plugins[litert]'"
PORTS = "onnxq.ports"  # metadata of files of ours: the order of axes of inputs and outputs
_MOVES = {
    *("QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "CONCATENATION"),
    *("PAD", "PADV2", "MIRROR_PAD", "GATHER", "GATHER_ND", "TILE", "CAST", "SQUEEZE", "EXPAND_DIMS", "PACK", "UNPACK"),
    *("SHAPE", "BROADCAST_TO", "DEPTH_TO_SPACE", "SPACE_TO_DEPTH", "REVERSE_V2"),
}
_NO_CODES = {  # operators whose kernels take floats alone (tensorflow/lite/kernels)
    *("DIV", "EXP", "LOG", "SQRT", "POW", "SIN", "COS", "ELU", "FLOOR", "CEIL", "ROUND", "SIGN", "NEG", "RSQRT", "SQUARE"),
    *("SQUARED_DIFFERENCE", "REDUCE_PROD", "GELU"),
}


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    interpreter = _interpreter(file)
    rows = tuple(_executed(interpreter))
    facts: dict[str, Any] = {"file kB": round(file.stat().st_size / 1e3)}
    if not samples:
        return Inspection((), rows, None, facts)
    ports, orders = _ports(interpreter), _orders(file)
    outputs = []
    for sample in samples:
        _set(interpreter, ports[0], orders, sample, file)
        _invoke(interpreter, file)
        outputs.append(_decoded(interpreter, ports[1], orders))
    return Inspection(tuple(outputs), rows, milliseconds(interpreter.invoke, float(settings.get("seconds", 0.3))), facts)


def _interpreter(file: Path) -> Any:
    try:
        module = importlib.import_module("ai_edge_litert.interpreter")
    except ImportError as error:
        raise OnnxqError(f"LiteRT is not installed; {INSTALL}.") from error
    try:
        interpreter = module.Interpreter(model_path=str(file), num_threads=1)
        interpreter.allocate_tensors()
    except Exception as error:  # pybind11 passes on several types
        raise OnnxqError(f"LiteRT cannot load '{file}' ({_first(error)}).") from error
    return interpreter


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _ports(interpreter: Any) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Inputs and outputs by the names of the signature, or of the tensors where there is none: what the interpreter says of
    their tensors."""
    known = {entry["index"]: entry for entry in (*interpreter.get_input_details(), *interpreter.get_output_details())}
    signatures = list(interpreter._get_full_signature_list().values())
    if signatures:
        inputs, outputs = ({name: known[i] for name, i in signatures[0][which].items()} for which in ("inputs", "outputs"))
        return inputs, outputs
    inputs = {entry["name"]: entry for entry in interpreter.get_input_details()}
    return inputs, {entry["name"]: entry for entry in interpreter.get_output_details()}


def _invoke(interpreter: Any, file: Path) -> None:
    try:
        interpreter.invoke()
    except Exception as error:
        raise OnnxqError(f"LiteRT cannot run '{file}' on this input ({_first(error)}).") from error


def _orders(file: Path) -> dict[str, list[int]]:
    """The order of axes that a file of ours notes for its inputs and outputs; ONNX's for others."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(file.read_bytes(), 0)
    for place in range(model.MetadataLength()):
        entry = model.Metadata(place)
        if entry.Name() == PORTS.encode():
            known: dict[str, list[int]] = json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
            return known
    return {}


def _set(
    interpreter: Any,
    inputs: Mapping[str, Mapping[str, Any]],
    orders: Mapping[str, list[int]],
    sample: Mapping[str, Array],
    file: Path,
) -> None:
    """Give the file a sample: axes in its order, values as its codes."""
    missing = [name for name in inputs if name not in sample]
    there = ", ".join(sample)
    OnnxqError.check(f"'{file}' has an input '{name}' that the sample lacks; it has {there}." for name in missing)
    for name, entry in inputs.items():
        values = np.asarray(sample[name])
        order = orders.get(name, range(values.ndim))
        if len(order) == values.ndim:
            values = np.ascontiguousarray(values.transpose(tuple(order)))
        if tuple(values.shape) != tuple(entry["shape"]):
            raise OnnxqError(
                f"input '{name}' of '{file}' is {[*map(int, entry['shape'])]}, not {list(values.shape)}; a .tflite file has "
                "fixed sizes: give samples of that shape, or write another file."
            )
        scale, zero = entry["quantization"]
        if scale and values.dtype.kind == "f":
            limits = np.iinfo(entry["dtype"])
            values = np.clip(np.rint(values / np.float32(scale)) + zero, limits.min, limits.max)
        interpreter.set_tensor(entry["index"], values.astype(entry["dtype"]))


def _decoded(
    interpreter: Any, outputs: Mapping[str, Mapping[str, Any]], orders: Mapping[str, list[int]]
) -> dict[str, Array]:
    """Outputs in ONNX's order of axes, as numbers."""
    found = {}
    for name, entry in outputs.items():
        values = interpreter.get_tensor(entry["index"])
        scale, zero = entry["quantization"]
        if scale:
            values = (values.astype(np.float32) - zero) * np.float32(scale)
        found[name] = values.transpose(np.argsort(orders[name])) if values.ndim and name in orders else values
    return found


def _executed(interpreter: Any) -> Iterator[Executed]:
    """The operators as the interpreter lists them.

    Which kernel an operator has, in LiteRT and XNNPACK, follows from the types of its tensors alone: there is no fusion of
    Q/DQ pairs behind the file's back, and no kernel that takes codes computes in floats. So the types that the interpreter
    reports once it has planned the run are its own word.
    """
    listed = interpreter._get_ops_details()
    delegates = [op for op in listed if op["op_name"] == "DELEGATE"]
    operators = [op for op in listed if op["op_name"] != "DELEGATE"]
    producer = {int(index): op for op in operators for index in op["outputs"]}
    inside = {number for each in delegates for number in _inside(each, producer)}
    fake = _between_codes(operators, producer)
    names = {entry["index"]: entry["name"] for entry in interpreter.get_tensor_details()}
    for op in operators:
        kind = _kind(op, fake)
        if op["op_name"] == "DEQUANTIZE" and not any(int(i) in producer for i in op["inputs"]):
            kind = "moves"
        why = "" if kind in ("integer", "moves") else _why(op, kind)
        where = "XNNPACK" if op["index"] in inside else ""
        yield Executed(names.get(int(op["outputs"][0]), ""), op["op_name"], kind, where, why)


def _inside(delegate: Mapping[str, Any], producer: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Numbers of the operators that a delegate took: from its outputs back to its inputs."""
    known, found = {int(i) for i in delegate["inputs"]}, set()
    waiting = [int(i) for i in delegate["outputs"]]
    while waiting:
        op = producer.get(waiting.pop())
        if op is not None and op["index"] not in found:
            found.add(int(op["index"]))
            waiting += [int(i) for i in op["inputs"] if int(i) not in known and int(i) >= 0]
    return found


def _is_codes(type: object) -> bool:
    return type in (np.int8, np.int16, np.uint8)


def _kind(op: Mapping[str, Any], fake: set[int]) -> Kind:
    if op["op_name"] in _MOVES:
        return "moves"
    if _is_codes(op["result_types"][0]) or (op["operand_types"] and _is_codes(op["operand_types"][0])):
        return "integer"
    if op["result_types"][0] is not np.float32 and np.float32 not in op["operand_types"]:
        return "moves"  # sizes, masks
    return "fake" if op["index"] in fake else "float"


def _why(op: Mapping[str, Any], kind: Kind) -> str:
    if kind == "float":
        return "not quantized in the file"
    if op["op_name"] in _NO_CODES:
        return "LiteRT has no integer kernel for it"
    return "its neighbours are computed in float, or it is not quantized in the file"


def _between_codes(operators: Sequence[Mapping[str, Any]], producer: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Operators on floats that codes reach, and that reach codes: decoded, computed in float and encoded again."""
    before: set[int] = set()
    for op in operators:
        sources = [producer[int(i)] for i in op["inputs"] if int(i) in producer]
        if any(s["op_name"] == "DEQUANTIZE" or s["index"] in before for s in sources) and op["op_name"] != "QUANTIZE":
            before.add(int(op["index"]))
    behind: set[int] = set()
    for op in reversed(operators):
        if op["op_name"] == "QUANTIZE" or (op["index"] in behind and op["op_name"] != "DEQUANTIZE"):
            behind |= {int(producer[int(i)]["index"]) for i in op["inputs"] if int(i) in producer}
    return before & behind


LITERT = Runtime(
    "litert",
    "LiteRT (TensorFlow Lite): its interpreter with XNNPACK, one thread",
    INSTALL,
    _inspect,
    suffix=".tflite",
    settings={"seconds": 0.3},
)
