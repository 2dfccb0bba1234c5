"""What a file has that a target does not, read from the file alone, whoever made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.graph.opsets import opset_of
from onnxq_plugins.targets.target import Target

_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4), 4),
    **dict.fromkeys((TensorProto.UINT8, TensorProto.INT8), 8),
    **dict.fromkeys((TensorProto.UINT16, TensorProto.INT16), 16),
}
_SIGNED = (TensorProto.INT4, TensorProto.INT8, TensorProto.INT16)
_CODERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def misfits(target: Target, model: onnx.ModelProto) -> list[str]:
    """What a file has that a target does not, as ends of sentences ("the file ..."); [] if it fits: opset, operators, types
    and zero points of activations, biases, alignment of channels, scales of weights."""
    graphs = [*all_graphs(model.graph)]
    nodes = [node for graph in graphs for node in graph.node]
    stored = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    makers = {name: node for node in nodes for name in node.output}
    layers = [node for node in nodes if _coded(node, makers)]
    return [
        *_opset(target, model),
        *_operators(target, nodes),
        *_activations(target, nodes, stored),
        *_biases(target, layers, makers),
        *_unaligned(target, layers, stored, makers),
        *_scales(target, layers, stored, makers),
    ]


def _opset(target: Target, model: onnx.ModelProto) -> Iterator[str]:
    (low, high), opset = target.opsets, opset_of(model)
    if opset < low or 0 < high < opset:
        yield f"has opset {opset}, not {low or 'any'} to {high or 'any'}"


def _operators(target: Target, nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    have = target.operators | _CODERS
    left = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes if n.domain or n.op_type not in have)
    if left and target.operators:
        yield f"has operators that the target has not: {', '.join(f'{op} ({n})' for op, n in left.most_common())}"


def _activations(target: Target, nodes: Iterable[onnx.NodeProto], stored: Mapping[str, TensorProto]) -> Iterator[str]:
    """Codes of activations that are of another type, or have another zero point."""
    types, zeros, widths = dict[str, list[str]](), list[tuple[str, int]](), set(target.activation_bits)
    for node in nodes:
        if node.op_type != "QuantizeLinear":
            continue
        zero = stored.get(node.input[2]) if len(node.input) > 2 else TensorProto(data_type=TensorProto.UINT8)
        if zero is None or zero.data_type not in _BITS:  # computed, or codes of floats
            continue
        bits, signed = _BITS[zero.data_type], zero.data_type in _SIGNED
        value = int(numpy_helper.to_array(zero).reshape(-1)[0]) if len(node.input) > 2 else 0
        free = target.either and signed and value == 0
        if (signed != target.signed and not free) or (widths and bits > max(widths)):
            kind = TensorProto.DataType.Name(zero.data_type).lower()
            types.setdefault(kind, []).append(node.input[0])
        elif target.centred(bits) and value != (0 if signed else 2 ** (bits - 1)):
            zeros.append((node.input[0], value))
    for kind, names in types.items():
        yield f"has {kind} codes of {_some(names)}"
    if zeros:
        more = f", and such for {len(zeros) - 1} more" if len(zeros) > 1 else ""
        yield f"has a zero point of {zeros[0][1]} for '{zeros[0][0]}'{more}"


def _biases(target: Target, layers: Iterable[onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    wrong = []
    for node in layers:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
            maker = makers.get(node.input[2])
            if (maker is not None and maker.op_type == "DequantizeLinear") != (target.bias == "int32"):
                wrong.append(node.name)
    if wrong:
        yield f"has {'float' if target.bias == 'int32' else 'coded'} biases of {_some(wrong)}, not {target.bias}"


def _unaligned(
    target: Target, layers: Iterable[onnx.NodeProto], stored: Mapping[str, TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    if target.aligned == 1:
        return
    wrong = []
    for node in layers:
        weight = stored.get(_codes(node, makers))
        if weight is None:
            continue
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv":
            sizes = [weight.dims[0], weight.dims[0] if groups > 1 and weight.dims[1] == 1 else weight.dims[1]]
        else:
            sizes = list(weight.dims[-2:])
        if any(size % target.aligned for size in sizes):
            wrong.append(node.name)
    if wrong:
        yield f"has coded layers whose channels are no multiples of {target.aligned}: {_some(wrong)}"


def _scales(
    target: Target, layers: Iterable[onnx.NodeProto], stored: Mapping[str, TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    wrong = []
    for node in layers:
        known = target.granularities(node.op_type)
        scale = stored.get(makers[node.input[1]].input[1])
        if known == {"tensor"} and scale is not None and int(np.prod(scale.dims)) > 1:
            wrong.append(node.name)
    if wrong:
        yield f"has several scales for the weights of {_some(wrong)}, where the target has one"


def _coded(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """True for a layer that reads an activation and a weight in codes."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain or len(node.input) < 2:
        return False
    both = [makers.get(name) for name in node.input[:2]]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in both)


def _codes(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor of a layer's weight codes, seen through what decodes narrow ones."""
    name = str(makers[node.input[1]].input[0])
    while name in makers and makers[name].op_type == "Cast":
        name = str(makers[name].input[0])
    return name


def _some(names: list[str]) -> str:
    """Up to three names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more
