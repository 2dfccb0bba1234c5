"""One network for every set of activations: each is rounded, or not, as an input of the network says. Weights are float.

A search that asks what single activations cost needs no export and no session for each of them."""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

from onnxq_plugins.export.qdq import Writer
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.spec import Plan
from onnxq_plugins.targets import Target


def switched(graph: Graph, plan: Plan, target: Target, coded: Collection[str] = ()) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A network with the activations of a solved plan, and planned activation -> the input that switches it: a bool. All else
    is as in `export.qdq.export`."""
    writer = Switched(graph, plan, target, coded)
    return writer.write(), writer.switches


class Switched(Writer):
    """Writes Q and DQ in one branch of an If, nothing in the other."""

    def __init__(self, graph: Graph, plan: Plan, target: Target, coded: Collection[str]) -> None:
        super().__init__(graph, plan, target, coded)
        self.stored, self.tables = {}, set()
        self.switches: dict[str, str] = {}

    def _pair(self, key: str, source: str, grid: list[str], codes: str, values: str) -> None:
        if key not in self.switches:
            self.switches[key] = self.builder.fresh(f"{key}_switch")
            self.model.graph.input.append(helper.make_tensor_value_info(self.switches[key], TensorProto.BOOL, []))
        rounded, plain = self.builder.fresh(f"{values}_rounded"), self.builder.fresh(f"{values}_plain")
        branches = (
            (
                rounded,
                [
                    helper.make_node("QuantizeLinear", [source, *grid], [codes]),
                    helper.make_node("DequantizeLinear", [codes, *grid], [rounded]),
                ],
            ),
            (plain, [helper.make_node("Identity", [source], [plain])]),
        )
        on, off = (
            helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
            for name, nodes in branches
        )
        self.builder.add("If", [self.switches[key]], [values], then_branch=on, else_branch=off)

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        self._append(node)

    def _apart(self, node: onnx.NodeProto, layer: Layer) -> bool:
        return False

    def _separate(self, output: str) -> None:
        pass
