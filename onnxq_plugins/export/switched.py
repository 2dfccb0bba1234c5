"""One network for every set of quantizers of a plan: activations are rounded, or not, as an input says; weights are inputs.

A search that asks what single quantizers cost, or some together, needs no export and no session for each set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxq_plugins.export.qdq import Writer
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.plan.values import bias_values, weight_values
from onnxq_plugins.spec import Array, Plan, QuantSpec, decode
from onnxq_plugins.targets import Target


class Switched(Writer):
    """Writes Q and DQ of an activation into one branch of an If, and makes inputs of all constants that are planned.

    switches   planned activation -> the input, a bool, that says whether it is rounded
    """

    def __init__(self, graph: Graph, plan: Plan, target: Target, coded: Collection[str] = ()) -> None:
        super().__init__(graph, plan, target, coded)
        self._constants, self.stored, self.tables = self.stored, {}, set()
        self._inputs = {layer.weight for layer in self.planned.layers} | {*self._constants}
        for name in self._inputs:  # equal ones are not merged, and no value is copied
            self.floats.pop(name, None)
        self.switches: dict[str, str] = {}
        self._biases: dict[str, str] = {}  # layer whose bias is shifted -> its input

    def write(self) -> onnx.ModelProto:
        model = super().write()
        constants = [t for t in model.graph.initializer if t.name not in self._inputs]
        for tensor in model.graph.initializer:
            if tensor.name in self._inputs:
                self._input_of(tensor.name, tensor.data_type, list(tensor.dims))
        del model.graph.initializer[:]
        model.graph.initializer.extend(constants)
        return model

    def states(self, names: Collection[str]) -> dict[str, Array]:
        """The inputs with which some entries of the plan are quantized, and all others are not."""
        plan, states = self.plan, dict(self._plain)
        states |= {switch: np.array(True) for key, switch in self.switches.items() if key in names}
        for layer in self.planned.layers:
            if layer.weight in names:
                states[layer.weight] = weight_values(layer, plan[layer.weight])
                states |= self._bias_state(layer, plan[layer.weight])
        for name, spec in self._constants.items():
            if name in names and spec.codes is not None:
                states[name] = decode(spec.codes, spec).astype(states[name].dtype)
        return states

    @cached_property
    def _plain(self) -> dict[str, Array]:
        """The inputs with which nothing is quantized."""
        states = {switch: np.array(False) for switch in self.switches.values()}
        states |= {name: self.graph.constant(name) for name in self._inputs}
        for layer in self.planned.layers:
            states |= self._bias_state(layer, self.plan[layer.weight].request())
        return states

    def _bias_state(self, layer: Layer, spec: QuantSpec) -> dict[str, Array]:
        """The bias of a layer whose weight has an entry, if it is an input."""
        if layer.name not in self._biases:
            return {}
        bias = bias_values(self.graph, layer, spec)
        bias = np.zeros(layer.channels) if bias is None else bias
        return {self._biases[layer.name]: bias.astype(np.float32)}

    def _pair(self, key: str, source: str, grid: list[str], codes: str, values: str) -> None:
        if key not in self.switches:
            self.switches[key] = self._input_of(self.builder.fresh(f"{key}_switch"), TensorProto.BOOL, [])
        rounded, plain = self.builder.fresh(f"{values}_rounded"), self.builder.fresh(f"{values}_plain")
        pair = [
            helper.make_node("QuantizeLinear", [source, *grid], [codes]),
            helper.make_node("DequantizeLinear", [codes, *grid], [rounded]),
        ]
        on, off = (
            helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
            for name, nodes in ((rounded, pair), (plain, [helper.make_node("Identity", [source], [plain])]))
        )
        self.builder.add("If", [self.switches[key]], [values], then_branch=on, else_branch=off)

    def _operands(self, node: onnx.NodeProto, beside: QuantSpec) -> Mapping[str, str]:
        return {}

    def _input_of(self, name: str, kind: int, shape: list[int]) -> str:
        self.model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        self._append(node)
        if self.plan[layer.weight].shift is not None:
            bias = self._input_of(self.builder.fresh(f"{layer.name}_bias"), TensorProto.FLOAT, [layer.channels])
            self._biases[layer.name] = bias
            del node.input[2:]
            node.input.append(bias)

    def _apart(self, node: onnx.NodeProto, layer: Layer) -> bool:
        return False

    def _separate(self, output: str) -> None:
        pass
