"""Export: a float graph and a solved plan become a QDQ model. The only maker of Q/DQ nodes (law L2).

What fuses is in docs/runtime.md. In short: unsigned activations with an output Q on every convolution, weights whose
zero point is exactly 0, an int32 bias at s_x * s_w, one scale on both sides of operators that only move values, and
never a float layer between a DQ and a Q.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.helper import np_dtype_to_tensor_dtype

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.builder import Builder
from onnxq_plugins.export.operands import write_operands, zero_point
from onnxq_plugins.export.weights import (
    shifts,
    stored_form,
    write_blocked,
    write_constant,
    write_decoded,
    write_quantized,
    write_rows,
)
from onnxq_plugins.files import DataFile
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.bodies import outer_reads
from onnxq_plugins.graph.constants import tables
from onnxq_plugins.graph.flow import activation_inputs, maker_of, readers
from onnxq_plugins.graph.lowering import lower_opset
from onnxq_plugins.graph.opsets import CONTRIB, NARROW_OPSET, NEWEST_OPSET, expand, opset_of, raise_opset, tuned
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import bias_scale, bias_values
from onnxq_plugins.spec import Array, Plan, QuantSpec
from onnxq_plugins.targets import Rule, Target
from onnxq_plugins.targets.refusals import needs_narrow

# Operators that onnxruntime fuses with a Gemm or MatMul before it looks for integer kernels.
_FUSED_IN_FLOAT = {
    "Gemm": frozenset(
        {
            "Clip",
            "Elu",
            "HardSigmoid",
            "LeakyRelu",
            "Relu",
            "Selu",
            "Sigmoid",
            "Softplus",
            "Softsign",
            "Tanh",
            "ThresholdedRelu",
        }
    ),
    "MatMul": frozenset({"Add", "Clip", "Relu"}),
}


def export(
    graph: Graph, plan: Plan, target: Target, coded: Collection[str] = (), data: DataFile | None = None
) -> onnx.ModelProto:
    """The QDQ model of a plan in which every entry is solved and which `target.problems` accepts.

    coded   planned activations that are stored as codes for every reader, although the operators that compute them may not
    be
            planned: a part of a larger plan then has the effect that it has there
    data    takes the large constants as they are added

    The graph is not changed. Inputs, outputs, metadata and names of operators are those of the float model.
    """
    return Writer(graph, plan, target, coded, data).write()


class Writer:
    """Writes the operators of a QDQ model in order; `export` runs it to the end, a sweep layer by layer.

    plan         entries of weights may be replaced until their layer is written
    model        the float model, with placeholders for its large constants
    floats       large float constants by name
    builder      the operators and constants written so far
    dequantized  tensor -> the output of its DequantizeLinear
    """

    def __init__(
        self, graph: Graph, plan: Plan, target: Target, coded: Collection[str] = (), data: DataFile | None = None
    ) -> None:
        self.graph, self.plan, self.target, self.coded = graph, plan, target, coded
        self.planned = Planned(graph, plan, target)  # which operators are integer does not change while weights are solved
        self.integer, self.carried = self.planned.integer, self.planned.carriers
        self.layers = {layer.name: layer for layer in graph.layers}
        self.floats: dict[str, Array] = {}  # most are replaced by codes: only what stays float is copied, at the end
        self.model = graph.model(self.floats, expand=False)
        lowest, highest = target.opsets
        raise_opset(self.model, max(graph.output_opset, lowest, NARROW_OPSET if needs_narrow(target, plan) else 0))
        lower_opset(self.model, highest or NEWEST_OPSET, target.name)
        self.builder = Builder(self.model, graph.mapped, data)
        proto = self.model.graph
        self.captured = {name for node in proto.node for name in outer_reads(node)}
        self.outputs = {o.name for o in proto.output} | self.captured  # read by name: their values must bear it
        self.dequantized: dict[str, str] = {}
        self.stored = {name: spec for name, spec in self.planned.constants.items() if spec.codes is not None}
        self.tables = {name for name in tables(graph) if name in self.stored and _by_row(self.stored[name])}

    def write(self) -> onnx.ModelProto:
        for _ in self.layer_by_layer():
            pass
        return self._finish()

    def layer_by_layer(self) -> Iterator[Layer]:
        """Write the operators, pausing before each planned layer: the entry of its weight is read only then."""
        for name, spec in self.stored.items():
            if name not in self.tables:
                write_constant(self.builder, name, spec, self._kind(name))
        for tensor in self.graph.inputs:
            self._quantize_after(tensor)
        for node in list(self.model.graph.node):
            written = list(node.output)
            if node.name in self.layers and self.layers[node.name].weight in self.plan:
                yield self.layers[node.name]
                self._layer(node, self.layers[node.name])
                if self._apart(node, self.layers[node.name]):
                    self._separate(written[0])
            elif node.op_type == "Gather" and node.input[0] in self.tables:
                table = node.input[0]
                write_rows(self.builder, table, self.stored[table], node, self._kind(table))
            else:
                self._append(node)
                if node.name in self.layers and self._between(node, self.layers[node.name]):
                    self._separate(written[0])
            for name in filter(self.graph.__contains__, written):  # an older opset's form of a node has more tensors
                self._quantize_after(name)

    def _finish(self) -> onnx.ModelProto:
        proto = self.model.graph
        del proto.node[:]
        proto.node.extend(self.builder.nodes)
        read = {name for node in proto.node for name in node.input} | self.outputs
        kept = {name: values for name, values in self.floats.items() if name in read and name not in self.stored}
        first = _first_of_equal(kept, self.outputs)
        for node in proto.node:
            for i, name in enumerate(node.input):
                node.input[i] = first.get(name, name)
        constants = [
            self.builder.tensor(self.floats[t.name], t.name) if t.name in self.floats else t
            for t in proto.initializer
            if t.name in read and t.name not in first and t.name not in self.stored
        ]
        del proto.initializer[:]
        proto.initializer.extend(constants)
        proto.initializer.extend(self.builder.constants)
        written = {name for node in proto.node for name in node.output}
        del proto.value_info[:]  # the user's own; onnxruntime infers the rest
        proto.value_info.extend(value for value in self.graph.value_info if value.name in written)
        bits = {layer.name: shifts(layer, self.plan[layer.weight]) for layer in self.planned.layers}
        if table := {name: "".join(f"{n:x}" for n in values) for name, values in bits.items() if values is not None}:
            self.model.metadata_props.add(key="onnxq.shifts", value=json.dumps(table))  # a hexadecimal digit per channel
        return self.model

    def _kind(self, name: str) -> int:
        """The type of a constant."""
        return int(np_dtype_to_tensor_dtype(self.graph.constant(name).dtype))

    # ---- activations ---------------------------------------------------------------------------------------------------

    def _quantize_after(self, name: str) -> None:
        """Write Q and DQ behind a tensor that is planned, or that an operator carrying codes moves."""
        if name not in self.graph:  # of an operator that an older opset writes in several
            return
        key = self.planned.source(name)
        maker = self.graph.producer(name)
        carried = maker is not None and maker.name in self.carried
        if not key or (name not in self.plan and not carried) or name in self.dequantized:
            return
        integer_readers = any(n.name in self.integer or n.name in self.carried for n in self.graph.consumers(name))
        if not integer_readers and not self._written_in_codes(name):
            return
        build, spec = self.builder, self.plan[key]
        renamed = name in self.outputs and maker is not None and (self.target.apart or name not in self.captured)
        source = self._renamed(name) if renamed else name
        scale = build.constant(f"{key}_scale", np.asarray(spec.scale, np.float32))
        zero = build.constant(f"{key}_zero_point", zero_point(spec, self.target))
        codes = build.fresh(f"{name}_quantized")
        apart = renamed and name in self.captured
        values = build.fresh(f"{name}_dequantized") if apart or not renamed else name
        if self.target.apart and self._reaches_across(name):
            apart_from = source
            build.add("Sum", [apart_from], [source := build.fresh(f"{name}_apart")])
        if spec.bits < 8:  # codes are uint8, which would go on beyond the grid
            source = self._clipped(name, source, spec)
        self._pair(key, source, [scale, zero], codes, values)
        if apart:  # onnxruntime 1.32 aborts the process where control flow reads the output of a DequantizeLinear
            build.add("Sum", [values], [name], name=build.fresh(f"{name}_apart"))
        self.dequantized[name] = values

    def _reaches_across(self, name: str) -> bool:
        """True if onnxruntime would make the float operator before a Q integer: it moves a Q in front of a MaxPool, which is
        slow on codes in plain order, and fuses operators between a DQ and a Q."""
        node = maker_of(self.graph, name)
        if node is None or node.name in self.integer or not self.target.tuned:
            return False
        inputs = activation_inputs(self.graph, node)
        if node.op == "MaxPool":
            return inputs[0] not in self.dequantized
        fused = node.op in self.target.integer_ops and node.name not in self.layers
        return fused and all(self._input(str(node.name), t) in self.dequantized.values() for t in inputs)

    def _pair(self, key: str, source: str, grid: list[str], codes: str, values: str) -> None:
        """Write the two operators of a planned activation."""
        self.builder.add("QuantizeLinear", [source, *grid], [codes])
        self.builder.add("DequantizeLinear", [codes, *grid], [values])

    def _renamed(self, name: str) -> str:
        """A new name for a tensor in everything written so far; the old one is free for its dequantized form."""
        new = self.builder.fresh(f"{name}_float")
        for node in self.builder.nodes:
            for names in (node.output, node.input):
                for i, old in enumerate(names):
                    if old == name:
                        names[i] = new
        return new

    def _clipped(self, name: str, source: str, spec: QuantSpec) -> str:
        """A tensor clipped to the values of its codes. (4-bit codes are no way out: few operators of onnxruntime take
        them.)"""
        low, high = (
            self.builder.constant(f"{name}_{side}", np.asarray(end, np.float32))
            for side, end in zip(("low", "high"), spec.value_range, strict=True)
        )
        clipped = self.builder.fresh(f"{name}_clipped")
        self.builder.add("Clip", [source, low, high], [clipped])
        return clipped

    def _written_in_codes(self, name: str) -> bool:
        """True if an integer operator writes the tensor, perhaps through the Relu or Clip it absorbs, or is taken to."""
        node = maker_of(self.graph, name)
        return name in self.coded or (node is not None and (node.name in self.integer or node.name in self.carried))

    def _input(self, node: str, name: str) -> str:
        """The name under which an operator reads a tensor: that of its dequantized form, where it reads codes."""
        return self.dequantized[name] if name in self.dequantized and self.reads_codes(node, name) else name

    def _append(self, node: onnx.NodeProto) -> None:
        """Write an operator of the float model, on the dequantized form of the inputs that it reads in codes."""
        operands: Mapping[str, str] = {}
        if self.target.whole and node.name in self.integer and node.name not in self.layers:
            beside = next(key for name in node.input if name in self.graph and (key := self.planned.source(name)))
            operands = self._operands(node, self.plan[beside])
        for i, name in enumerate(node.input):
            node.input[i] = operands.get(name) or self._input(node.name, name)
        self.builder.nodes += self._tuned(node) or expand(node, opset_of(self.model), self.builder.constant)

    def _operands(self, node: onnx.NodeProto, beside: QuantSpec) -> Mapping[str, str]:
        """Constants beside codes -> their dequantized forms."""
        return write_operands(self.builder, self.graph, self.target, node, beside)

    def _tuned(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """An activation in the form that the target prefers to that of the float model; None for any other operator."""
        if not self.target.tuned:
            return None
        slopes = node.input[1] if node.op_type == "PRelu" else ""
        nodes = tuned(node, self.graph.constant(slopes) if slopes and self.graph.is_constant(slopes) else None)
        if nodes and any(n.domain for n in nodes) and not any(o.domain == CONTRIB for o in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return nodes

    def reads_codes(self, node: str, name: str) -> bool:
        """True if an operator reads the quantized form of a tensor, where that has one."""
        return node in self.integer or node in self.carried or self._written_in_codes(name)

    def _rule(self, layer: Layer) -> tuple[Rule, str]:
        """The rule by which a planned layer is written, and the planned activation it reads, "" for float."""
        key = self.planned.source(layer.input) if layer.name in self.integer else ""
        rule = self.planned.rule_for(layer, self.plan[layer.weight], self.plan[key].bits if key else 0)
        if rule is None:
            raise OnnxqError(
                f"layer '{layer.name}': its weight is planned, but its output '{layer.result}' is not; plan "
                "both, or take the weight out of the plan."
            )
        return rule, key

    def _apart(self, node: onnx.NodeProto, layer: Layer) -> bool:
        """True if a planned layer must be kept apart from its readers: one that runs in float from a Q behind it, a
        quantized Gemm or MatMul from operators that it would be fused with into a float kernel."""
        rule = self._rule(layer)[0]
        storage = rule.storage
        if storage == "float":
            return self._between(node, layer)
        if rule.activations > 8:  # it runs in float anyway, and its weight is no float constant
            return False
        if layer.op == "Conv" or storage == "blocked":
            return layer.op != "Conv"  # weight-only: a Q behind it has that effect, even beyond a Reshape
        readers = self.graph.consumers(layer.output)
        alone = len(readers) == 1 and layer.output not in self.graph.outputs
        absorbed = alone and (
            readers[0].name in self.integer
            or (readers[0].op in ("Relu", "Clip") and readers[0].outputs[0].name in self.plan)
        )
        return (
            layer.output not in self.plan
            and not absorbed
            and any(n.op in _FUSED_IN_FLOAT.get(layer.op, ()) for n in readers)
        )

    def _between(self, node: onnx.NodeProto, layer: Layer) -> bool:
        """True if a layer that runs in float stands between a DQ and a Q, perhaps behind operators that a Q moves across."""
        return node.input[0] in self.dequantized.values() and (
            bool(self.planned.source(layer.result)) or not readers(self.graph, layer.result).isdisjoint(self.integer)
        )

    def _separate(self, output: str) -> None:
        """Keep the last node apart from the next ones by a Sum of one operand: it changes nothing, costs a copy, and is not
        optimized away. Without it onnxruntime would silently quantize the weight of a layer that is to stay float between a
        DQ and a Q (per tensor), or fuse a quantized Gemm with a float Relu into a float kernel."""
        node = self.builder.nodes[-1]
        if not self.target.apart or (self.target.operators and "Sum" not in self.target.operators):
            return
        if node.op_type == "Sum":  # the bias of a weight-only layer already does so
            return
        node.output[0] = self.builder.fresh(f"{output}_apart")
        self.builder.add("Sum", [node.output[0]], [output], name=self.builder.fresh(f"{node.name}_apart"))

    # ---- weights -------------------------------------------------------------------------------------------------------

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        rule, key = self._rule(layer)
        spec, factor = stored_form(layer, self.plan[layer.weight], rule)
        if rule.storage == "blocked":
            self._weight_only(node, layer, spec)
            return
        if rule.storage == "float":
            weight = write_decoded(self.builder, layer, spec)
            bias = self._float_bias(layer, spec)
        else:
            weight = write_quantized(self.builder, layer, spec, rule)
            bias = self._bias(layer, spec, self.plan[key], factor)
        self._append(node)
        node.input[1] = weight
        if bias:
            del node.input[2:]
            node.input.append(bias)
        if factor is not None:
            output, node.output[0] = node.output[0], self.builder.fresh(f"{node.output[0]}_enlarged")
            shape = (1, -1, *(1,) * (len(layer.shape) - 2)) if layer.op.startswith("Conv") else (-1,)
            factors = self.builder.constant(f"{layer.name}_shift", factor.reshape(shape))
            self.builder.add("Mul", [node.output[0], factors], [output], name=self.builder.fresh(f"{node.name}_shift"))

    def _float_bias(self, layer: Layer, spec: QuantSpec) -> str:
        """The bias of a layer that runs in float: as it is, or with the planned shift."""
        if spec.shift is None:
            return layer.bias or ""
        bias = bias_values(self.graph, layer, spec)
        assert bias is not None
        return self.builder.constant(f"{layer.bias or layer.name}_shifted", bias.astype(np.float32))

    def _bias(self, layer: Layer, spec: QuantSpec, activation: QuantSpec, factor: Array | None) -> str:
        """int32 codes at s_x * s_w: the integer kernel adds them to its accumulator, before a factor behind the layer.
        Beside 16-bit inputs that scale can be too fine for int32: the bias then has one of its own, weights keep theirs."""
        bias = bias_values(self.graph, layer, spec)
        if bias is None:
            return ""
        bias = bias if factor is None else bias / factor
        if self.target.bias == "float":
            return self.builder.constant(f"{layer.bias or layer.name}_float", bias.astype(np.float32))
        scale = bias_scale(layer, spec, activation)
        if activation.bits > 8:
            least = np.abs(bias) / 2.0**30
            scale = np.maximum(scale, least if scale.ndim else least.max()).astype(np.float32)
        codes = np.clip(np.rint(bias / scale), -(2.0**31), 2.0**31 - 1).astype(np.int32)
        name = layer.bias or f"{layer.name}_bias"
        stored = self.builder.constant(f"{name}_codes", codes)
        scales = self.builder.constant(f"{name}_scale", scale)
        values = self.builder.fresh(f"{name}_dequantized")
        axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
        self.builder.add("DequantizeLinear", [stored, scales], [values], **axis)
        return values

    def _weight_only(self, node: onnx.NodeProto, layer: Layer, spec: QuantSpec) -> None:
        """Blocked DequantizeLinear -> MatMul, which runs as MatMulNBits. Gemm does not fuse: it becomes MatMul and Sum (an
        Add would be turned back into a Gemm by onnxruntime)."""
        build = self.builder
        weight = write_blocked(build, layer, spec)
        x, output = self._input(node.name, node.input[0]), node.output[0]
        # DQ, DQ -> MatMul would be taken for an integer MatMul, and then fail
        if x in self.dequantized.values() and self.target.apart:
            copy = build.fresh(f"{x}_apart")
            build.add("Sum", [x], [copy], name=build.fresh(f"{node.name}_input_apart"))
            x = copy
        if layer.bias is not None or spec.shift is not None:
            product = build.fresh(f"{output}_product")
            bias = self._float_bias(layer, spec)
            build.add("MatMul", [x, weight], [product], name=node.name)
            build.add("Sum" if self.target.apart else "Add", [product, bias], [output], name=f"{node.name}_bias")
        else:
            build.add("MatMul", [x, weight], [output], name=node.name)


def _by_row(spec: QuantSpec) -> bool:
    """True if a table has int8 codes and one scale per row."""
    return spec.bits > 4 and spec.block is not None and spec.block[0] == 1 and not any(spec.block[1:])


def _first_of_equal(floats: Mapping[str, Array], fixed: Collection[str]) -> dict[str, str]:
    """Float constant -> an equal one that is kept in its place: layers that share a weight have copies of it.

    fixed   names that stay
    """
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    same = {}
    for name, values in floats.items():
        kept = first.setdefault((values.shape, hashlib.sha256(np.ascontiguousarray(values).data).digest()), name)
        if kept != name and name not in fixed:
            same[name] = kept
    return same
