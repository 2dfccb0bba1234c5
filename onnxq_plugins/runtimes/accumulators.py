"""The accumulators that a QDQ model's integer layers need, from the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.solvers.accumulator import saturates, width
from onnxq_plugins.solvers.gram import Grid
from onnxq_plugins.spec import Array

_INPUTS: dict[int, Grid] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}
_AT_ONCE = 2**22  # codes in one array


@dataclass(frozen=True)
class Need:
    """The smallest signed accumulator, in bits and without the bias, in which no input overflows a layer; and whether 16-bit
    sums of two products, as AVX2 makes them, can saturate."""

    bits: int
    saturates: bool


def needs(model: onnx.ModelProto, folder: Path | None = None) -> dict[str, Need]:
    """Output of a layer -> what it needs, for Conv, Gemm and MatMul whose 8-bit input and constant weight both come from a
    DequantizeLinear. 16-bit inputs, ConvTranspose, blocked scales and weights decoded to float are left out.

    folder   of its external data

    Weights that small operators decode (INT4 -> Cast -> Mul ...) are computed by onnxruntime, one at a time.
    """
    source = CodeSource(model, folder)
    by_output = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain:
            continue
        x, weight = source.producers.get(node.input[0]), source.producers.get(node.input[1])
        if x is None or weight is None or x.op_type != "DequantizeLinear" or weight.op_type != "DequantizeLinear":
            continue
        inputs = _INPUTS.get(source.code_type(x))
        blocked = any(a.name == "block_size" and a.i for a in weight.attribute)
        codes = source.values(weight.input[0]) if inputs is not None and not blocked else None
        if inputs is not None and codes is not None and codes.ndim > 1 and codes.size:
            by_output[node.output[0]] = _need(_rows(node, codes), inputs)
    return by_output


def _need(rows: Iterator[Array], inputs: Grid) -> Need:
    bits, over = 1, False
    for part in rows:
        bits = max(bits, int(width(part, inputs).max(initial=1)))
        signed = part.dtype.kind == "i"  # unsigned codes are not multiplied in pairs
        over = over or (signed and bool(saturates(part).any()))
    return Need(bits, over)


def _rows(node: onnx.NodeProto, codes: Array) -> Iterator[Array]:
    """The codes that are summed in each output, as rows, some at a time."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    if node.op_type == "Conv" or transposed:
        whole = codes.reshape(len(codes), -1)
    else:
        whole = np.swapaxes(codes, -1, -2).reshape(-1, codes.shape[-2])
    count = max(1, _AT_ONCE // max(whole.shape[1], 1))
    for first in range(0, len(whole), count):
        yield whole[first : first + count]


class CodeSource:
    """The origin of a model's tensors: constants, or the operators that compute them."""

    def __init__(self, model: onnx.ModelProto, folder: Path | None) -> None:
        self.model, self.folder = model, folder
        self.stored = {t.name: t for t in model.graph.initializer}
        self.producers = {o: n for n in model.graph.node for o in n.output}
        self.place = {o: i for i, n in enumerate(model.graph.node) for o in n.output}

    def code_type(self, node: onnx.NodeProto) -> int:
        """Type of the codes that a DequantizeLinear reads; 0 if it is not known."""
        for name in (node.input[2] if len(node.input) > 2 else "", node.input[0]):
            if name in self.stored:
                return int(self.stored[name].data_type)
        maker = self.producers.get(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            return 0
        if len(maker.input) > 2 and maker.input[2] in self.stored:
            return int(self.stored[maker.input[2]].data_type)
        return next((int(a.i) for a in maker.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)

    def values(self, name: str) -> Array | None:
        """8- or 4-bit codes of a constant, perhaps computed from others; None for anything else."""
        if name in self.stored:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(self.stored[name])  # to_array may read its data into it
            codes = numpy_helper.to_array(tensor, str(self.folder or ""))
            if self.stored[name].data_type in (TensorProto.INT4, TensorProto.UINT4):
                codes = codes.astype(np.int8)
        else:
            nodes = self._behind(name)
            codes = self._computed(nodes, name) if nodes else np.empty(0)
        return codes if codes.dtype in (np.int8, np.uint8) else None

    def _behind(self, name: str) -> list[onnx.NodeProto]:
        """The operators that compute a constant, in order; none if it depends on an input."""
        places: set[int] = set()
        pending = [name]
        while pending:
            one = pending.pop()
            if one in self.stored or not one:
                continue
            if one not in self.producers:
                return []
            if self.place[one] not in places:
                places.add(self.place[one])
                pending += self.producers[one].input
        return [self.model.graph.node[i] for i in sorted(places)]

    def _computed(self, nodes: list[onnx.NodeProto], name: str) -> Array:
        constants = dict.fromkeys(i for node in nodes for i in node.input if i in self.stored)
        graph = helper.make_graph(
            nodes, "codes", [], [helper.make_empty_tensor_value_info(name)], [self.stored[i] for i in constants]
        )
        model = helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=list(self.model.functions),
        )
        values: Array = runtimes.session(model, folder=self.folder).run(None, {})[0]
        return values
