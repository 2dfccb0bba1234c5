"""The bytes of a .tflite file: tensors, operators and buffers, through the schema classes of ai-edge-litert.

Source: tensorflow/lite/schema/schema.fbs, of which ``ai_edge_litert.schema_py_generated`` is the generated form."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

INSTALL = "pip install 'onnxq-plugins[litert]'"
TYPES = {  # numpy's name -> name in TensorType
    "float32": "FLOAT32",
    "int32": "INT32",
    "uint8": "UINT8",
    "int64": "INT64",
    "bool": "BOOL",
    "int16": "INT16",
    "int8": "INT8",
    "int4": "INT4",
}
_ALIGNMENT = 16  # of the data of buffers: `force_align` in the schema, which the generated Python code leaves out
_LARGEST = 2**31 - 2**20  # bytes that offsets of a flatbuffer reach
# Versions of operators by the type of their first input; 1 otherwise (tensorflow/compiler/mlir/lite/tools/versioning).
_INT8 = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"), 3),
    **dict.fromkeys(("ADD", "SUB", "MUL", "CONCATENATION", "AVERAGE_POOL_2D", "MAX_POOL_2D", "PAD", "PADV2", "MEAN"), 2),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE", "STRIDED_SLICE", "SPLIT", "TRANSPOSE"), 2),
    **dict.fromkeys(("SOFTMAX", "LOGISTIC", "TANH", "GATHER", "MAXIMUM", "MINIMUM", "BATCH_MATMUL", "LEAKY_RELU"), 2),
    **dict.fromkeys(("DEQUANTIZE", "QUANTIZE", "SUM", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6", "ABS"), 2),
    "FULLY_CONNECTED": 4,
}
_INT16 = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"), 5),
    **dict.fromkeys(("SOFTMAX", "LOGISTIC", "TANH", "CONCATENATION", "AVERAGE_POOL_2D", "MAX_POOL_2D", "MEAN"), 3),
    **dict.fromkeys(("PAD", "PADV2", "BATCH_MATMUL", "DEQUANTIZE"), 3),
    **dict.fromkeys(("ADD", "MUL", "SUB", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "STRIDED_SLICE", "TRANSPOSE"), 4),
    "FULLY_CONNECTED": 7,
}


@dataclass(frozen=True)
class Grid:
    """The codes of a tensor: x = scale * (code - zero).

    type    of codes: int8, int16, int4, int32, int64
    scale   one, or one per slice of the ONNX tensor along `axis`
    zero    zero point, the same for all slices
    """

    type: str
    scale: tuple[float, ...]
    zero: int = 0
    axis: int | None = None

    @property
    def activation(self) -> bool:
        """True if kernels take it for activations: one scale, codes of int8 or int16."""
        return self.axis is None and self.type in ("int8", "int16")

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        bits = {"int4": 4, "int8": 8, "int16": 16, "int32": 32, "int64": 64}[self.type]
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value of an activation."""
        low, high = self.codes
        return self.scale[0] * (low - self.zero), self.scale[0] * (high - self.zero)

    def encode(self, x: Array) -> Array:
        """Codes of values, rounded half to even and kept within the type; int8 for int4."""
        codes = np.rint(np.asarray(x, np.float64) / self.steps(x.ndim)) + self.zero
        stored: Array = np.clip(codes, *self.codes).astype("int8" if self.type == "int4" else self.type)
        return stored

    def decode(self, codes: Array) -> Array:
        """Float32 values of codes."""
        return ((codes.astype(np.float64) - self.zero) * self.steps(codes.ndim)).astype(np.float32)

    def steps(self, rank: int) -> Array:
        """The scales, broadcastable to a tensor of `rank` axes."""
        scales = np.asarray(self.scale, np.float64)
        return scales[0] if self.axis is None else scales.reshape([-1 if a == self.axis else 1 for a in range(rank)])


class File:
    """A file in the making: tensors and operators are numbered as they are added."""

    def __init__(self) -> None:
        try:
            self.schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
            self._flatbuffers: Any = importlib.import_module("flatbuffers")
        except ImportError as error:
            raise OnnxqError(f"a .tflite file needs ai-edge-litert, which is not installed; {INSTALL}.") from error
        self._aligned = _aligned_buffer(self.schema)
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self._codes: dict[tuple[str, int], int] = {}
        self._buffers: list[Any] = [self._aligned()]  # the first is empty, by convention
        self._stored: dict[tuple[str, tuple[int, ...], bytes, Grid | None], int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: str, grid: Grid | None = None, axis: int | None = None) -> int:
        """Add a tensor that is computed. `axis` is where the file's layout has the grid's axis."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = name, [int(size) for size in shape], True
        tensor.type, tensor.buffer = getattr(self.schema.TensorType, TYPES[dtype]), 0
        if grid is not None:
            tensor.quantization = self.schema.QuantizationParametersT()
            tensor.quantization.scale = np.asarray(grid.scale, np.float32)
            tensor.quantization.zeroPoint = np.full(len(grid.scale), grid.zero, np.int64)
            tensor.quantization.quantizedDimension = int(axis or 0)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, name: str, values: Array, grid: Grid | None = None, axis: int | None = None) -> int:
        """Add a tensor with values, or find the same one."""
        values = np.ascontiguousarray(values)
        dtype = grid.type if grid is not None else str(values.dtype)
        content = _nibbles(values) if dtype == "int4" else values.tobytes()
        key = (dtype, values.shape, content, grid)
        if key not in self._stored:
            self._stored[key] = self.tensor(name, values.shape, dtype, grid, axis)
            self.tensors[-1].buffer = self.buffer(content)
        return self._stored[key]

    def buffer(self, content: bytes) -> int:
        """Add bytes."""
        buffer = self._aligned()
        buffer.data = np.frombuffer(content, np.uint8)
        self._buffers.append(buffer)
        return len(self._buffers) - 1

    def operator(self, op: str, inputs: Sequence[int], outputs: Sequence[int], kind: str = "", **options: Any) -> None:
        """Add an operator.

        inputs    numbers of tensors, -1 for one that is left out
        kind      name of its table of options, such as "Conv2D"; "" for none
        options   its fields; words stand for the enumerations that have them (padding="SAME")
        """
        schema, code = self.schema, getattr(self.schema.BuiltinOperator, op)
        first = self.tensors[inputs[0]].type if inputs else -1
        versions = {schema.TensorType.INT8: _INT8, schema.TensorType.INT16: _INT16}.get(first, {})
        place = self._codes.setdefault((op, versions.get(op, 1)), len(self._codes))
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = place, list(inputs), list(outputs)
        if kind:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{kind}Options")
            operator.builtinOptions = getattr(schema, f"{kind}OptionsT")()
            for name, value in options.items():
                known = hasattr(operator.builtinOptions, name)
                assert known, f"{kind}Options has no field {name}"
                setattr(operator.builtinOptions, name, self._enumerated(name, value))
        assert code >= 0
        self.operators.append(operator)

    def _enumerated(self, name: str, value: Any) -> Any:
        tables = {"padding": "Padding", "fusedActivationFunction": "ActivationFunctionType", "mode": "MirrorPadMode"}
        return getattr(getattr(self.schema, tables[name]), value) if isinstance(value, str) else value

    def content(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], metadata: Mapping[str, bytes], name: str
    ) -> bytes:
        """The file. Raises OnnxqError if it is larger than a flatbuffer can be.

        inputs, outputs   names of the model's own -> tensors: they become its signature, ``serving_default``
        metadata          names -> bytes
        """
        schema = self.schema
        model, graph, signature = schema.ModelT(), schema.SubGraphT(), schema.SignatureDefT()
        graph.name, graph.tensors, graph.operators = "main", self.tensors, self.operators
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [self._mapped(*entry) for entry in inputs.items()]
        signature.outputs = [self._mapped(*entry) for entry in outputs.items()]
        model.version, model.description, model.subgraphs, model.signatureDefs = 3, name, [graph], [signature]
        model.metadata = [self._metadata(*entry) for entry in metadata.items()]
        model.operatorCodes, model.buffers = [self._code(*key) for key in self._codes], self._buffers
        if sum(len(b.data) for b in self._buffers if b.data is not None) > _LARGEST:
            raise OnnxqError("the model is larger than a .tflite file can be (2 GiB); quantize its weights, or split it.")
        builder = self._flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code(self, op: str, version: int) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.version = getattr(self.schema.BuiltinOperator, op), version
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # what readers from before 2020 look at
        return code

    def _mapped(self, name: str, tensor: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry

    def _metadata(self, name: str, content: bytes) -> Any:
        entry = self.schema.MetadataT()
        entry.name, entry.buffer = name, self.buffer(content)
        return entry


def _nibbles(codes: Array) -> bytes:
    """4-bit codes, two a byte, the first in the low half."""
    flat = codes.astype(np.int8).reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return bytes((flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes())


def _aligned_buffer(schema: Any) -> Any:
    """The class of buffers, whose data are aligned: kernels read vectors from a file that is mapped into memory."""

    class Buffer(schema.BufferT):  # type: ignore[misc]
        def Pack(self, builder: Any) -> Any:
            if self.data is not None and len(self.data):
                content = self.data.tobytes()
                builder.StartVector(1, len(content), _ALIGNMENT)
                builder.head -= len(content)
                builder.Bytes[builder.head : builder.head + len(content)] = content
                data = builder.EndVector()
            schema.BufferStart(builder)
            if self.data is not None and len(self.data):
                schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    return Buffer
