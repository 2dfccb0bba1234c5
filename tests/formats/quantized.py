"""Small QDQ models around one operator, and how far LiteRT is from onnxruntime on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins.formats.tflite import write
from onnxq_plugins.runtimes.litert import LITERT
from onnxq_plugins.runtimes.runtime import Inspection

OPSET = 21
TYPES = {
    "uint8": (TensorProto.UINT8, 0, 255),
    "int8": (TensorProto.INT8, -128, 127),
    "int16": (TensorProto.INT16, -32768, 32767),
}


class Maker:
    """A model whose activations are quantized, all of them."""

    def __init__(self, type: str = "uint8", opset: int = OPSET) -> None:
        self.type, self.opset = type, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.grids: dict[str, tuple[np.float32, int]] = {}

    def input(self, values: np.ndarray, quantized: bool = True, name: str = "") -> str:
        name = name or f"x{len(self.inputs)}"
        self.inputs[name] = values
        return self.encoded(name, values) if quantized else name

    def constant(self, values: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values)
        return name

    def weight(self, values: np.ndarray, axis: int | None = 0) -> str:
        """int8 codes with a scale per slice along an axis."""
        others = tuple(a for a in range(values.ndim) if a != axis)
        scale = np.maximum(np.abs(values).max(axis=others if axis is not None else None), 1e-3) / 127
        wide = scale.reshape([-1 if a == axis else 1 for a in range(values.ndim)]) if axis is not None else scale
        codes = np.clip(np.rint(values / wide), -127, 127).astype(np.int8)
        more = {} if axis is None else {"axis": axis}
        return self.node("DequantizeLinear", [self.constant(codes), self.constant(np.float32(scale))], **more)

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attrs: Any) -> Any:
        names = [f"{op.lower()}{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attrs))
        return names[0] if outputs == 1 else names

    def encoded(self, name: str, values: np.ndarray) -> str:
        """Q and DQ on the grid that just holds the values."""
        kind, first, last = TYPES[self.type]
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0, 1e-3)
        if self.type == "int16":
            scale, zero = np.float32(max(-low, high) / 32767), 0
        else:
            scale = np.float32((high - low) / 255)
            zero = int(np.clip(round(first - low / float(scale)), first, last))
        grid = [self.constant(scale), self.constant(np.asarray(zero, helper.tensor_dtype_to_np_dtype(kind)))]
        codes = self.node("QuantizeLinear", [name, *grid])
        decoded = self.node("DequantizeLinear", [codes, *grid])
        self.grids[decoded] = scale, zero
        return decoded

    def op(self, op: str, inputs: Sequence[str], **attrs: Any) -> str:
        """An operator whose output is quantized."""
        name = self.node(op, inputs, **attrs)
        return self.encoded(name, self.values(name))

    def values(self, name: str) -> np.ndarray:
        return run(self.model([name]), self.inputs)[name]

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for n, x in self.inputs.items()
            ],
            [onnx.ValueInfoProto(name=n) for n in outputs],
            [numpy_helper.from_array(x, n) for n, x in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def run(model: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the QDQ model means: every operator in floats, between codes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def lite(
    model: onnx.ModelProto, feed: Mapping[str, np.ndarray], folder: Path, settings: Mapping[str, Any] | None = None
) -> Inspection:
    """The model's .tflite file, run once."""
    path = folder / "model.tflite"
    shapes = {name: list(x.shape) for name, x in feed.items()}
    path.write_bytes(write(model, {"shapes": shapes, **(settings or {})}))
    return LITERT.inspect(path, [feed], {"seconds": 0.0})


def steps(maker: Maker, output: str, folder: Path, settings: Mapping[str, Any] | None = None) -> tuple[float, Inspection]:
    """Largest difference between the two runtimes in steps of the output's grid, and what LiteRT made of the file."""
    model = maker.model([output])
    mine = run(model, maker.inputs)[output]
    inspection = lite(model, maker.inputs, folder, settings)
    got = inspection.outputs[0][output]
    assert got.shape == mine.shape
    scale = maker.grids.get(output, (np.float32(1e-4 * max(1.0, float(np.abs(mine).max()))), 0))[0]
    return float(np.abs(got.astype(np.float64) - mine).max() / scale), inspection


def kinds(inspection: Inspection, *ops: str) -> set[str]:
    """How operators ran."""
    return {each.kind for each in inspection.operators if each.op in ops}
