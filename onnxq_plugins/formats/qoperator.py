"""Standard quantized operators: QDQ around Conv and MatMul becomes QLinearConv and QLinearMatMul, as ONNX has had them since
opset 10; whatever else is quantized stays QDQ, since QLinearAdd and its like are onnxruntime's own.

Exact: DequantizeLinear -> Conv -> QuantizeLinear is the definition of QLinearConv. An activation function in between goes
where the codes of the output cannot hold what it cuts off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq_plugins.spec import Array

_EIGHT = (np.dtype(np.int8), np.dtype(np.uint8))


def to_qoperator(model: onnx.ModelProto) -> onnx.ModelProto:
    """A QDQ model with QLinearConv and QLinearMatMul where these compute the same. The model is left as it is."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    work = _Work(changed.graph)
    nodes: list[onnx.NodeProto] = []
    gone: set[int] = set()
    for node in changed.graph.node:
        made = work.quantized(node) if node.op_type in ("Conv", "MatMul", "Gemm") and not node.domain else None
        if made is None:
            nodes.append(node)
        else:
            nodes.append(made[0])
            gone |= set(map(id, made[1]))
    kept = [node for node in nodes if id(node) not in gone]
    del changed.graph.node[:]
    changed.graph.node.extend(_read(kept, {value.name for value in model.graph.output}))
    used = {name for node in changed.graph.node for name in node.input} | {value.name for value in model.graph.output}
    tensors = [tensor for tensor in (*changed.graph.initializer, *work.made) if tensor.name in used]
    values = [value for value in changed.graph.value_info if value.name in used]
    del changed.graph.initializer[:], changed.graph.value_info[:]
    changed.graph.initializer.extend(tensors)
    changed.graph.value_info.extend(values)
    return changed


def write(model: onnx.ModelProto, settings: Mapping[str, Any]) -> bytes:
    """The file of target qoperator."""
    return bytes(to_qoperator(model).SerializeToString())


@dataclass(frozen=True)
class _Codes:
    """What a DequantizeLinear reads or a QuantizeLinear writes: names of codes, scale and zero point, and their values."""

    codes: str
    scale: str
    zero: str
    scales: Array
    zeros: Array


@dataclass
class _Work:
    """A graph, looked at from its layers."""

    graph: onnx.GraphProto
    made: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.producers = {output: node for node in self.graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in self.graph.output}
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def quantized(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, list[onnx.NodeProto]] | None:
        """The operator on codes that a layer becomes, and the nodes that go with it; None if it has to stay."""
        x, w = self._decoded(node.input[0]), self._decoded(node.input[1])
        behind = self._encoded(node.output[0])
        if x is None or w is None or behind is None or x.scales.size != 1:
            return None
        y, gone = behind
        inputs = [*_three(x), *_three(w), y.scale, y.zero]
        if node.op_type != "Conv":
            return self._product(node, w, inputs, gone, y.codes)
        if not self._per_channel(w, 0):
            return None
        if len(node.input) > 2 and node.input[2]:
            bias = self._bias(node.input[2], x, w)
            if bias is None:
                return None
            inputs.append(bias)
        made = helper.make_node("QLinearConv", inputs, [y.codes], name=node.name)
        made.attribute.extend(node.attribute)
        if w.codes in self.tensors and not any(a.name == "kernel_shape" for a in node.attribute):
            # OpenCV 5.0 ends the process where the optional attribute is left out
            made.attribute.append(helper.make_attribute("kernel_shape", self.tensors[w.codes].dims[2:]))
        return made, gone

    def _product(
        self, node: onnx.NodeProto, w: _Codes, inputs: list[str], gone: list[onnx.NodeProto], output: str
    ) -> tuple[onnx.NodeProto, list[onnx.NodeProto]] | None:
        """MatMul, and Gemm where it is one: QLinearMatMul has no bias."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        factors = (attributes.get("alpha", 1.0), attributes.get("transA", 0))
        if factors != (1.0, 0) or (len(node.input) > 2 and node.input[2]):
            return None
        turned = bool(attributes.get("transB", 0))
        if w.scales.size > 1 and (w.codes not in self.tensors or not self._per_channel(w, 0 if turned else -1)):
            return None
        if turned:
            if w.codes not in self.tensors:
                return None
            inputs[3] = self._constant(f"{w.codes}_turned", numpy_helper.to_array(self.tensors[w.codes]).T)
        return helper.make_node("QLinearMatMul", inputs, [output], name=node.name), gone

    def _decoded(self, name: str) -> _Codes | None:
        node = self.producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return self._codes(node, node.input[0])

    def _codes(self, node: onnx.NodeProto, codes: str) -> _Codes | None:
        """The codes at a node; None unless they are of 8 bits, with constant scales, not in blocks."""
        if any(a.name == "block_size" and a.i for a in node.attribute) or node.input[1] not in self.tensors:
            return None
        scales = numpy_helper.to_array(self.tensors[node.input[1]])
        if len(node.input) > 2 and node.input[2]:
            if node.input[2] not in self.tensors:
                return None
            zero = node.input[2]
            zeros = numpy_helper.to_array(self.tensors[zero])
        else:
            kind = self.tensors[codes].data_type if codes in self.tensors else onnx.TensorProto.UINT8
            zeros = np.zeros(scales.shape, helper.tensor_dtype_to_np_dtype(kind))
            zero = self._constant(f"{codes}_zero", zeros) if zeros.dtype in _EIGHT else ""
        return _Codes(codes, node.input[1], zero, scales, zeros) if zeros.dtype in _EIGHT else None

    def _encoded(self, name: str) -> tuple[_Codes, list[onnx.NodeProto]] | None:
        """The codes that a layer's only readers make of its output, and these readers."""
        gone: list[onnx.NodeProto] = []
        while True:
            after = self.readers.get(name, [])
            if len(after) != 1 or name in self.outputs:
                return None
            gone.append(after[0])
            if after[0].op_type == "QuantizeLinear":
                break
            if after[0].op_type not in ("Relu", "Clip"):
                return None
            name = after[0].output[0]
        y = self._codes(gone[-1], gone[-1].output[0])
        if y is None or y.scales.size != 1 or not all(self._idle(node, y) for node in gone[:-1]):
            return None
        return y, gone

    def _idle(self, node: onnx.NodeProto, y: _Codes) -> bool:
        """True if an activation function cuts nothing off that the codes behind it hold."""
        span = np.iinfo(y.zeros.dtype)
        scale, zero = float(y.scales.reshape(-1)[0]), int(y.zeros.reshape(-1)[0])
        lowest, highest = (span.min - zero) * scale, (span.max - zero) * scale
        if node.op_type == "Relu":
            return lowest >= 0
        bounds = []
        for place, free in ((1, -np.inf), (2, np.inf)):
            given = len(node.input) > place and node.input[place]
            if given and node.input[place] not in self.tensors:
                return False
            bounds.append(float(numpy_helper.to_array(self.tensors[node.input[place]]).reshape(-1)[0]) if given else free)
        return bool(lowest >= bounds[0] - scale / 2 and highest <= bounds[1] + scale / 2)

    def _bias(self, name: str, x: _Codes, w: _Codes) -> str | None:
        """The int32 codes of a bias whose scale is that of the products; None for any other."""
        node = self.producers.get(name)
        if node is None or node.op_type != "DequantizeLinear" or any(n not in self.tensors for n in node.input[:2]):
            return None
        scales = numpy_helper.to_array(self.tensors[node.input[1]])
        whole = self.tensors[node.input[0]].data_type == onnx.TensorProto.INT32
        products = x.scales.reshape(-1)[0].astype(np.float64) * w.scales.astype(np.float64)
        return node.input[0] if whole and np.allclose(scales, products, rtol=1e-4, atol=0) else None

    def _per_channel(self, w: _Codes, axis: int) -> bool:
        """True if a weight has one scale, or one for each channel along an axis, and is constant then."""
        if w.scales.size == 1:
            return True
        shape = self.tensors[w.codes].dims if w.codes in self.tensors else ()
        return bool(shape) and w.scales.ndim == 1 and w.scales.size == shape[axis]

    def _constant(self, name: str, value: Array) -> str:
        if name not in {tensor.name for tensor in self.made}:
            self.made.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def _three(codes: _Codes) -> tuple[str, str, str]:
    return codes.codes, codes.scale, codes.zero


def _read(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Without the nodes that nobody reads any more."""
    counts = Counter(name for node in nodes for name in node.input)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if any(counts[name] or name in outputs for name in node.output):
            kept.append(node)
        else:
            counts.subtract(node.input)
    return kept[::-1]
