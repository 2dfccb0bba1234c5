"""Export: a float graph and a solved plan become a QDQ model. The only maker of Q/DQ nodes (law L2).

What fuses is in docs/runtime.md. In short: unsigned activations with an output Q on every convolution, weights whose
zero point is exactly 0, an int32 bias at s_x * s_w, one scale on both sides of operators that only move values, and
never a float layer between a DQ and a Q.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.storage import Layout, codes_type, int8_codes, multiplier_type, narrow_channels, settle, shifts
from onnxq_plugins.files import DataFile
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import bias_scale, bias_values
from onnxq_plugins.spec import Array, Block, Plan, QuantSpec
from onnxq_plugins.targets import Rule, Target, granularity_of

# What onnxruntime fuses a Gemm or MatMul with before it looks for integer kernels.
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

    coded   planned activations that are written in codes, and read so by all, though what makes them may not be planned:
            one part of a larger plan then does what it does there
    data    takes the large constants as they are made

    The graph is left alone. Inputs, outputs, metadata and names of operators are those of the float model.
    """
    return Writer(graph, plan, target, coded, data).write()


class Writer:
    """Writes the operators of a QDQ model in order; `export` runs it to the end, a sweep layer by layer.

    plan         entries of weights may be replaced until their layer is written
    nodes        what is written so far
    made         constants made so far
    floats       float constants by name
    dequantized  tensor -> the output of its DequantizeLinear
    """

    def __init__(
        self, graph: Graph, plan: Plan, target: Target, coded: Collection[str] = (), data: DataFile | None = None
    ) -> None:
        self.graph, self.plan, self.target, self.coded, self.data = graph, plan, target, coded, data
        self.planned = Planned(graph, plan, target)  # which operators are integer does not change while weights are solved
        self.integer, self.carried = self.planned.integer, self.planned.carriers
        self.layers = {layer.name: layer for layer in graph.layers}
        self.floats: dict[str, Array] = {}  # most are replaced by codes: only what stays float is copied, at the end
        self.model = graph.model(self.floats)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[Any, ...], str] = {}  # content -> name: equal constants are stored once
        self.made: list[TensorProto] = []
        proto = self.model.graph
        self.names = {n for node in proto.node for n in (*node.input, *node.output)} | {n.name for n in proto.node}
        self.names |= {t.name for t in proto.initializer}
        self.outputs = {o.name for o in proto.output} | subgraph_reads(proto.node)  # read by name: the DQ must bear it
        self.dequantized: dict[str, str] = {}  # tensor -> the output of its DQ

    def write(self) -> onnx.ModelProto:
        for _ in self.layer_by_layer():
            pass
        return self._finish()

    def layer_by_layer(self) -> Iterator[Layer]:
        """Write the operators, stopping in front of each planned layer: the entry of its weight is read after that."""
        for tensor in self.graph.inputs:
            self._quantize_after(tensor)
        for node in list(self.model.graph.node):
            written = list(node.output)
            if node.name in self.layers and self.layers[node.name].weight in self.plan:
                yield self.layers[node.name]
                self._layer(node, self.layers[node.name])
                if self._apart(node, self.layers[node.name]):
                    self._separate(written[0])
            else:
                self._read_inputs(node)
                if node.name in self.layers and node.input[0] in self.dequantized.values():
                    self._separate(written[0])
            for name in written:
                self._quantize_after(name)

    def _finish(self) -> onnx.ModelProto:
        proto = self.model.graph
        del proto.node[:]
        proto.node.extend(self.nodes)
        used = {name for node in proto.node for name in node.input} | self.outputs
        kept = [
            self._stored(self.floats[t.name], t.name) if t.name in self.floats else t
            for t in proto.initializer
            if t.name in used
        ]
        del proto.initializer[:]
        proto.initializer.extend(kept)
        proto.initializer.extend(self.made)
        del proto.value_info[:]  # onnxruntime infers them again; stale ones would be refused
        found = {y.name: shifts(y, self.plan[y.weight]) for y in self.layers.values() if y.weight in self.plan}
        if table := {name: "".join(f"{n:x}" for n in values) for name, values in found.items() if values is not None}:
            self.model.metadata_props.add(key="onnxq.shifts", value=json.dumps(table))  # a hexadecimal digit per channel
        return self.model

    # ---- activations ---------------------------------------------------------------------------------------------------

    def _quantize_after(self, name: str) -> None:
        """Q and DQ behind a tensor, if it is planned or moved by an operator that carries codes."""
        key = self.planned.source(name)
        maker = self.graph.producer(name)
        carried = maker is not None and maker.name in self.carried
        if not key or (name not in self.plan and not carried) or name in self.dequantized:
            return
        integer_readers = any(n.name in self.integer or n.name in self.carried for n in self.graph.consumers(name))
        if not integer_readers and not self._made_by_integer(name):
            return
        source = name
        renamed = name in self.outputs and maker is not None
        if renamed:
            source = self._fresh(f"{name}_float")
            for node in self.nodes:
                for i, o in enumerate(node.output):
                    if o == name:
                        node.output[i] = source
                for i, o in enumerate(node.input):
                    if o == name:
                        node.input[i] = source
        spec = self.plan[key]
        scale = self._constant(f"{key}_scale", np.asarray(spec.scale, np.float32))
        zero = self._constant(f"{key}_zero_point", np.asarray(spec.zero_point).astype(_code_type(spec)))
        codes = self._fresh(f"{name}_quantized")
        values = name if renamed else self._fresh(f"{name}_dequantized")
        if spec.bits < 8:  # codes are uint8, which would go on beyond the grid
            source = self._clipped(name, source, spec)
        self._add("QuantizeLinear", [source, scale, zero], [codes])
        self._add("DequantizeLinear", [codes, scale, zero], [values])
        self.dequantized[name] = values

    def _clipped(self, name: str, source: str, spec: QuantSpec) -> str:
        """A tensor held within the grid of its codes. Not 4-bit codes: few operators of onnxruntime take them."""
        assert spec.scale is not None and spec.zero_point is not None
        ends = [np.asarray(spec.scale * (code - spec.zero_point), np.float32) for code in spec.grid]
        bounds = [self._constant(f"{name}_{what}", end) for what, end in zip(("low", "high"), ends, strict=True)]
        made = self._fresh(f"{name}_clipped")
        self._add("Clip", [source, *bounds], [made])
        return made

    def _made_by_integer(self, name: str) -> bool:
        """True if an integer operator writes the tensor, perhaps through the Relu or Clip it absorbs, or would."""
        node = maker_of(self.graph, name)
        return name in self.coded or (node is not None and (node.name in self.integer or node.name in self.carried))

    def _read_inputs(self, node: onnx.NodeProto) -> None:
        """Point a node at the dequantized form of its inputs where it should read that, and emit it."""
        for i, name in enumerate(node.input):
            if name in self.dequantized and self.reads_codes(node.name, name):
                node.input[i] = self.dequantized[name]
        self.nodes.append(node)

    def reads_codes(self, node: str, name: str) -> bool:
        """True if an operator reads the quantized form of a tensor, where that has one."""
        return node in self.integer or node in self.carried or self._made_by_integer(name)

    def _rule(self, layer: Layer) -> tuple[Rule, str]:
        """The form a planned layer is written in, and the planned activation it reads, "" for float."""
        key = self.planned.source(layer.input) if layer.name in self.integer else ""
        rule = self.target.rule(layer, self.plan[layer.weight], self.plan[key].bits if key else 0)
        if rule is None:
            raise OnnxqError(
                f"layer '{layer.name}': its weight is planned, but its output '{layer.result}' is not; plan "
                "both, or take the weight out of the plan."
            )
        return rule, key

    def _apart(self, node: onnx.NodeProto, layer: Layer) -> bool:
        """True if a planned layer must be kept apart from what reads it: one that runs in float from a Q behind it, a
        quantized Gemm or MatMul from what would draw it into a float kernel."""
        rule = self._rule(layer)[0]
        storage = rule.storage
        if storage == "float":
            return node.input[0] in self.dequantized.values()
        if rule.activations > 8:  # it runs in float anyway, and its weight is no float constant
            return False
        if layer.op == "Conv" or storage == "blocked":
            return layer.op != "Conv"  # weight-only: a Q behind would do, even beyond a Reshape
        readers = self.graph.consumers(layer.output)
        alone = len(readers) == 1 and layer.output not in self.graph.outputs
        absorbed = alone and (
            readers[0].name in self.integer
            or (readers[0].op in ("Relu", "Clip") and readers[0].outputs[0].name in self.plan)
        )
        return layer.output not in self.plan and not absorbed and any(n.op in _FUSED_IN_FLOAT[layer.op] for n in readers)

    def _separate(self, output: str) -> None:
        """Keep the node just written apart from what follows, by a Sum of one operand: it changes nothing, costs a copy,
        and is not optimized away. Without it onnxruntime would, without a word, quantize the weight of a layer that is
        to stay float between a DQ and a Q (per tensor), or fuse a quantized Gemm with a float Relu into a float kernel."""
        node = self.nodes[-1]
        if node.op_type == "Sum":  # the bias of a weight-only layer does it already
            return
        node.output[0] = self._fresh(f"{output}_apart")
        self._add("Sum", [node.output[0]], [output], name=self._fresh(f"{node.name}_apart"))

    # ---- weights -------------------------------------------------------------------------------------------------------

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        rule, key = self._rule(layer)
        spec, factor = settle(layer, self.plan[layer.weight], rule)
        if rule.storage == "blocked":
            self._weight_only(node, layer, spec)
            return
        if rule.storage == "float":
            weight = self._decoded(layer, spec)
            bias = self._float_bias(layer, spec)
        else:
            weight = self._weight(layer, spec, rule)
            bias = self._bias(layer, spec, self.plan[key], factor)
        self._read_inputs(node)
        node.input[1] = weight
        if bias:
            del node.input[2:]
            node.input.append(bias)
        if factor is not None:
            output, node.output[0] = node.output[0], self._fresh(f"{node.output[0]}_enlarged")
            shape = (1, -1, *(1,) * (len(layer.shape) - 2)) if layer.op.startswith("Conv") else (-1,)
            factors = self._constant(f"{layer.name}_shift", factor.reshape(shape))
            self._add("Mul", [node.output[0], factors], [output], name=self._fresh(f"{node.name}_shift"))

    def _weight(self, layer: Layer, spec: QuantSpec, rule: Rule) -> str:
        """INT8 -> DequantizeLinear, or a chain from INT4 to DequantizeLinear, which the runtime folds at load."""
        assert spec.codes is not None and spec.scale is not None
        name = layer.weight
        if rule.storage == "int4":
            codes = self._int4_codes(layer, spec)
        elif self.graph.opset >= 21 and (narrow := narrow_channels(layer, spec, rule)) is not None:
            codes = self._mixed_codes(layer, spec, narrow)
        else:
            codes = self._constant(f"{name}_codes", int8_codes(layer, spec))
        scale_values = np.asarray(spec.scale, np.float32)
        attrs: dict[str, Any] = {}
        if granularity_of(layer, spec) == "channel":
            scale_values, attrs = scale_values.reshape(-1), {"axis": layer.out_axis}
        if rule.activations > 8 and layer.op != "Conv":
            # Otherwise onnxruntime makes a MatMulNBits of it, which without a word rounds the 16-bit input to 8 bits. It
            # leaves scales of shape [1] and axes counted from the end alone, which say the same.
            scale_values = scale_values.reshape(-1)
            attrs = {"axis": layer.out_axis - len(layer.shape)}
        scale = self._constant(f"{name}_scale", scale_values)
        zero = self._constant(f"{name}_zero_point", np.zeros(scale_values.shape, np.int8))
        values = self._fresh(f"{name}_dequantized")
        self._add("DequantizeLinear", [codes, scale, zero], [values], **attrs)
        return values

    def _int4_codes(self, layer: Layer, spec: QuantSpec) -> str:
        """INT4 -> Cast(INT8), or with multipliers INT4 -> Cast(INT32) -> Mul(multiplier) -> Cast(INT8): int8 codes."""
        assert spec.codes is not None
        name = layer.weight
        made = self._fresh(f"{name}_int8")
        if spec.multiplier is None:
            stored = self._constant(f"{name}_codes", spec.codes.astype(ml_dtypes.int4))
            self._add("Cast", [stored], [made], to=TensorProto.INT8)
            return made
        factors = spec.multiplier.astype(multiplier_type(spec.multiplier))
        product = self._product(layer, spec.codes.astype(ml_dtypes.int4), factors, spec.sub_block, TensorProto.INT32)
        self._add("Cast", [product], [made], to=TensorProto.INT8)
        return made

    def _mixed_codes(self, layer: Layer, spec: QuantSpec, narrow: Array) -> str:
        """int8 codes of which some output channels are stored in 4 bits: Concat, and where they are mixed, Gather."""
        assert spec.codes is not None
        name, axis, parts = layer.weight, layer.out_axis, []
        for chosen, kind in ((~narrow, np.int8), (narrow, ml_dtypes.int4)):
            if chosen.any():
                stored = self._constant(f"{name}_codes", np.compress(chosen, spec.codes, axis=axis).astype(kind))
                parts.append(stored)
                if kind is not np.int8:
                    parts[-1] = self._fresh(f"{name}_int8")
                    self._add("Cast", [stored], [parts[-1]], to=TensorProto.INT8)
        if len(parts) == 1:
            return parts[0]
        made, lies = self._fresh(f"{name}_joined"), np.argsort(narrow, kind="stable")  # the channel that lies at each place
        self._add("Concat", parts, [made], axis=axis)
        if (np.diff(lies) < 0).any():
            joined, made = made, self._fresh(f"{name}_ordered")
            self._add("Gather", [joined, self._constant(f"{name}_order", np.argsort(lies))], [made], axis=axis)
        return made

    def _decoded(self, layer: Layer, spec: QuantSpec) -> str:
        """Codes -> Cast(FLOAT) -> Mul(scale): a float weight, decoded once at load."""
        assert spec.codes is not None
        codes: Array = spec.codes.astype(codes_type(spec))
        scale = np.asarray(spec.scale, np.float32)
        if spec.multiplier is None:
            return self._product(layer, codes, scale, spec.block, TensorProto.FLOAT)
        factors = spec.multiplier.astype(multiplier_type(spec.multiplier))
        fine = self._product(layer, codes, factors, spec.sub_block, TensorProto.FLOAT)
        made, coarse = self._fresh(f"{layer.weight}_decoded"), self._constant(f"{layer.weight}_scale", scale)
        self._add("Mul", [fine, coarse], [made])  # per tensor or channel: it broadcasts as it is
        return made

    def _product(self, layer: Layer, codes: Array, factors: Array, block: Block | None, kind: int) -> str:
        """Codes times one factor per block, as `kind`. Each divided axis is stored as two, [blocks, size of a block] against
        [blocks, 1], so that nothing is repeated on disk; filled up where the blocks do not divide it."""
        name, shape = layer.weight, layer.shape
        lies = Layout.of(shape, block)
        filled = np.zeros(lies.whole, codes.dtype)
        filled[tuple(slice(n) for n in shape)] = codes
        stored = self._constant(f"{name}_codes", filled.reshape(lies.split))
        factor = self._constant(f"{name}_factor", factors.reshape(lies.counts) if factors.ndim else factors)
        wide, fine = self._fresh(f"{name}_wide"), self._fresh(f"{name}_fine")
        self._add("Cast", [stored], [wide], to=kind)
        self._add("Cast", [factor], [fine], to=kind)
        made = self._fresh(f"{name}_product")
        self._add("Mul", [wide, fine], [made])
        if lies.split != shape:
            joined = self._fresh(f"{name}_joined")
            self._add("Reshape", [made, self._constant(f"{name}_shape", np.array(lies.whole, np.int64))], [joined])
            made = joined
        if lies.whole != shape:
            cut, axes = self._fresh(f"{name}_cut"), np.arange(len(shape))
            ends = [self._constant(f"{name}_cut", np.array(v, np.int64)) for v in (0 * axes, shape, axes)]
            self._add("Slice", [made, *ends], [cut])
            made = cut
        return made

    def _float_bias(self, layer: Layer, spec: QuantSpec) -> str:
        """The bias of a layer that runs in float: as it is, or with the planned shift."""
        if spec.shift is None:
            return layer.bias or ""
        bias = bias_values(self.graph, layer, spec)
        assert bias is not None
        return self._constant(f"{layer.bias or layer.name}_shifted", bias.astype(np.float32))

    def _bias(self, layer: Layer, spec: QuantSpec, activation: QuantSpec, factor: Array | None) -> str:
        """int32 codes at s_x * s_w: the integer kernel adds them to its accumulator, before a factor behind the layer.
        Beside 16-bit inputs that can be too fine for int32: the bias then has a scale of its own, weights keep theirs."""
        bias = bias_values(self.graph, layer, spec)
        if bias is None:
            return ""
        bias = bias if factor is None else bias / factor
        scale = bias_scale(layer, spec, activation)
        if activation.bits > 8:
            least = np.abs(bias) / 2.0**30
            scale = np.maximum(scale, least if scale.ndim else least.max()).astype(np.float32)
        codes = np.clip(np.rint(bias / scale), -(2.0**31), 2.0**31 - 1).astype(np.int32)
        name = layer.bias or f"{layer.name}_bias"
        stored = self._constant(f"{name}_codes", codes)
        scales = self._constant(f"{name}_scale", scale)
        values = self._fresh(f"{name}_dequantized")
        axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
        self._add("DequantizeLinear", [stored, scales], [values], **axis)
        return values

    def _weight_only(self, node: onnx.NodeProto, layer: Layer, spec: QuantSpec) -> None:
        """Blocked DequantizeLinear -> MatMul, which runs as MatMulNBits. Gemm does not fuse: it becomes MatMul and
        Sum (not Add, which onnxruntime would make a Gemm of again)."""
        assert spec.codes is not None and spec.scale is not None and spec.block is not None
        codes, scales = spec.codes, np.asarray(spec.scale, np.float32)
        if layer.out_axis == 0:
            codes, scales = codes.T, scales.T
        codes = np.ascontiguousarray(codes)
        kind = ml_dtypes.int4 if spec.bits == 4 else np.int8
        stored = self._constant(f"{layer.weight}_codes", codes.astype(kind))
        scale = self._constant(f"{layer.weight}_scale", np.ascontiguousarray(scales))
        values = self._fresh(f"{layer.weight}_dequantized")
        self._add("DequantizeLinear", [stored, scale], [values], axis=0, block_size=spec.block[layer.in_axis])
        self._read_inputs(node)
        self.nodes.pop()
        x, output = node.input[0], node.output[0]
        if x in self.dequantized.values():  # DQ, DQ -> MatMul would be taken for an integer MatMul, and then fail
            copy = self._fresh(f"{x}_apart")
            self._add("Sum", [x], [copy], name=self._fresh(f"{node.name}_input_apart"))
            x = copy
        bias = bias_values(self.graph, layer, spec)
        if bias is not None:
            product = self._fresh(f"{output}_product")
            stored = self._float_bias(layer, spec)
            self._add("MatMul", [x, values], [product], name=node.name)
            self._add("Sum", [product, stored], [output], name=f"{node.name}_bias")
        else:
            self._add("MatMul", [x, values], [output], name=node.name)

    # ---- small helpers -------------------------------------------------------------------------------------------------

    def _constant(self, name: str, values: Array) -> str:
        values = np.ascontiguousarray(values) if values.ndim else values
        content = (str(values.dtype), values.shape, hashlib.sha256(values.tobytes()).digest())
        if content not in self.constants:
            self.constants[content] = self._fresh(name)
            self.made.append(self._stored(values, self.constants[content]))
        return self.constants[content]

    def _stored(self, values: Array, name: str) -> TensorProto:
        tensor = numpy_helper.from_array(values, name)
        if self.data is not None:
            self.data.take(tensor)
            self.graph.mapped.release()
        return tensor

    def _add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attrs: Any) -> None:
        name = name or self._fresh(f"{outputs[0]}_node")
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name, **attrs))

    def _fresh(self, name: str) -> str:
        candidate, i = name, 1
        while candidate in self.names:
            candidate, i = f"{name}_{i}", i + 1
        self.names.add(candidate)
        return candidate


def _code_type(spec: QuantSpec) -> Any:
    """The integer type of an activation's codes."""
    return (np.int8 if spec.symmetric else np.uint8) if spec.bits <= 8 else (np.int16 if spec.symmetric else np.uint16)


def subgraph_reads(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Names that control-flow bodies read from outside."""
    found: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                found |= {name for inner in body.node for name in inner.input} | {o.name for o in body.output}
                found |= subgraph_reads(body.node)
    return found
