"""What a .tflite file says of itself: its inputs, the order of their axes, its operators and the types of their tensors.

Read through the schema classes of ai-edge-litert, or of tflite-micro where that alone is installed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data import Input
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.runtimes.runtime import Executed, Kind
from onnxq_plugins.spec import Array

PORTS = "onnxq.ports"  # metadata of files of ours: the order of axes of inputs and outputs
_SCHEMAS = ("ai_edge_litert.schema_py_generated", "tflite_micro.tensorflow.lite.micro.python.schema_py_generated")
_INSTALL = "pip install 'onnxq-plugins[litert]'"
_TYPES = {  # TensorType of the schema -> NumPy
    **{0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 6: np.bool_, 7: np.int16, 9: np.int8},
    **{10: np.float64, 12: np.uint64, 15: np.uint32, 16: np.uint16, 17: np.int8},
}
_MOVES = {
    *("QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "CONCATENATION"),
    *("PAD", "PADV2", "MIRROR_PAD", "GATHER", "GATHER_ND", "TILE", "CAST", "SQUEEZE", "EXPAND_DIMS", "PACK", "UNPACK"),
    *("SHAPE", "BROADCAST_TO", "DEPTH_TO_SPACE", "SPACE_TO_DEPTH", "REVERSE_V2"),
}
_NO_CODES = {  # operators whose kernels take floats alone (tensorflow/lite/kernels)
    *("DIV", "EXP", "LOG", "SQRT", "POW", "SIN", "COS", "ELU", "FLOOR", "CEIL", "ROUND", "SIGN", "NEG", "RSQRT", "SQUARE"),
    *("SQUARED_DIFFERENCE", "REDUCE_PROD", "GELU"),
}


def schema() -> Any:
    """The module of schema classes. Raises OnnxqError if no package that has one is installed."""
    for name in _SCHEMAS:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise OnnxqError(f"LiteRT is not installed; {_INSTALL}.")


def _model(file: Path) -> Any:
    content = file.read_bytes()
    if content[4:8] != b"TFL3":
        raise OnnxqError(f"'{file}' is no .tflite file.")
    return schema().Model.GetRootAs(content, 0)


def _orders(file: Path) -> dict[str, list[int]]:
    """The order of axes that a file of ours notes for its inputs and outputs; ONNX's for others."""
    model = _model(file)
    for place in range(model.MetadataLength()):
        entry = model.Metadata(place)
        if entry.Name() == PORTS.encode():
            known: dict[str, list[int]] = json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
            return known
    return {}


@dataclass(frozen=True)
class Port:
    """An input or output of a file.

    index, place  of its tensor, and its number among the file's inputs or outputs
    shape, type   as the file has them
    scale, zero   of its codes; 0.0 where it has values
    order         of its axes by their number in the ONNX model; None if the file does not tell
    """

    index: int
    place: int
    shape: tuple[int, ...]
    type: np.dtype[Any]
    scale: float
    zero: int
    order: tuple[int, ...] | None


def ports(file: Path) -> tuple[dict[str, Port], dict[str, Port]]:
    """Inputs and outputs of a file by the names of its signature, or of the tensors where there is none.

    Raises OnnxqError for what is no .tflite file, and if no schema is installed.
    """
    try:
        model, known = _model(file), _orders(file)
        graph = model.Subgraphs(0)
        ends = (graph.InputsAsNumpy, graph.InputsLength), (graph.OutputsAsNumpy, graph.OutputsLength)
        numbers = [[int(i) for i in (a() if n() else ())] for a, n in ends]
        places = [{i: graph.Tensors(i).Name().decode() for i in side} for side in numbers]
        if model.SignatureDefsLength():
            entry = model.SignatureDefs(0)
            given = [entry.Inputs(n) for n in range(entry.InputsLength())]
            made = [entry.Outputs(n) for n in range(entry.OutputsLength())]
            places = [{each.TensorIndex(): each.Name().decode() for each in side} for side in (given, made)]
        sides = [
            {name: _port(graph.Tensors(i), i, side.index(i), known.get(name)) for i, name in names.items()}
            for side, names in zip(numbers, places, strict=True)
        ]
        return sides[0], sides[1]
    except OnnxqError:
        raise
    except Exception as error:  # flatbuffers raises several types for bytes that are cut off
        raise OnnxqError(f"'{file}' is no readable .tflite file (corrupt or truncated?).") from error


def _port(tensor: Any, index: int, place: int, order: Sequence[int] | None) -> Port:
    shape = tuple(int(n) for n in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()
    grid, type = tensor.Quantization(), np.dtype(_TYPES.get(tensor.Type(), np.float32))
    coded = grid is not None and grid.ScaleLength() > 0
    scale, zero = (float(grid.Scale(0)), int(grid.ZeroPoint(0))) if coded else (0.0, 0)
    return Port(index, place, shape, type, scale, zero, None if order is None else tuple(order))


def inputs(file: Path) -> list[Input]:
    """What samples for a file hold: names, shapes in ONNX's order of axes, and types; floats where the file takes codes.
    Raises OnnxqError as `ports` does."""
    found = []
    for name, port in ports(file)[0].items():
        turns = port.order is not None and len(port.order) == len(port.shape)
        shape = tuple(port.shape[place] for place in np.argsort(port.order or ())) if turns else port.shape
        found.append(Input(name, np.dtype(np.float32) if port.scale else port.type, shape))
    return found


def fed(given: Mapping[str, Port], sample: Mapping[str, Array], file: Path) -> dict[str, Array]:
    """A sample as a file takes it: axes in its order, values as its codes. Raises OnnxqError where it does not fit."""
    missing = [name for name in given if name not in sample]
    there = ", ".join(sample)
    OnnxqError.check(f"'{file}' has an input '{name}' that the sample lacks; it has {there}." for name in missing)
    feed = {}
    for name, port in given.items():
        values = np.asarray(sample[name])
        if port.order is not None and len(port.order) == values.ndim:
            values = np.ascontiguousarray(values.transpose(port.order))
        if values.shape != port.shape:
            raise OnnxqError(
                f"input '{name}' of '{file}' is {[*port.shape]}, not {list(values.shape)}; a .tflite file has "
                "fixed sizes: give samples of that shape, or write another file."
            )
        if port.scale and values.dtype.kind == "f":
            limits = np.iinfo(port.type)
            values = np.clip(np.rint(values / np.float32(port.scale)) + port.zero, limits.min, limits.max)
        feed[name] = values.astype(port.type)
    return feed


def decoded(made: Mapping[str, Port], values: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs in ONNX's order of axes, as numbers."""
    found = {}
    for name, port in made.items():
        value = values[name]
        if port.scale:
            value = (value.astype(np.float32) - port.zero) * np.float32(port.scale)
        found[name] = value.transpose(np.argsort(port.order)) if port.order and value.ndim else value
    return found


def operators(file: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The operators of a file as LiteRT's interpreter lists them, and the names of its tensors."""
    module, model = schema(), _model(file)
    graph = model.Subgraphs(0)
    names = {code: name for name, code in vars(module.BuiltinOperator).items() if isinstance(code, int)}
    types = [_TYPES.get(graph.Tensors(i).Type(), np.void) for i in range(graph.TensorsLength())]
    listed = []
    for place in range(graph.OperatorsLength()):
        op = graph.Operators(place)
        code = model.OperatorCodes(op.OpcodeIndex())
        ends = [[int(i) for i in (a() if n() else ()) if i >= 0] for a, n in _ends(op)]
        kinds = [[types[i] for i in side] for side in ends]
        name = names.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "CUSTOM")
        row = {"index": place, "op_name": name, "inputs": ends[0], "outputs": ends[1]}
        listed.append(row | {"operand_types": kinds[0], "result_types": kinds[1]})
    return listed, {i: graph.Tensors(i).Name().decode() for i in range(graph.TensorsLength())}


def _ends(op: Any) -> list[tuple[Any, Any]]:
    return [(op.InputsAsNumpy, op.InputsLength), (op.OutputsAsNumpy, op.OutputsLength)]


def executed(listed: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Iterator[Executed]:
    """The operators as an interpreter lists them, delegates among them.

    Which kernel an operator has, in LiteRT, LiteRT Micro and XNNPACK, follows from the types of its tensors alone: there is
    no fusion of Q/DQ pairs behind the file's back, and no kernel that takes codes computes in floats. So the types that the
    interpreter reports once it has planned the run are its own word.
    """
    delegates = [op for op in listed if op["op_name"] == "DELEGATE"]
    rows = [op for op in listed if op["op_name"] != "DELEGATE"]
    producer = {int(index): op for op in rows for index in op["outputs"]}
    inside = {number for each in delegates for number in _inside(each, producer)}
    fake = _between_codes(rows, producer)
    for op in rows:
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
