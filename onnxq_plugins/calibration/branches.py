"""Branches of an If as models of their own: what they read from outside are inputs, with samples from runs of the model.

A branch is quantized like a model, on the samples that take it, and put back; what passes between it and its surroundings is
float."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from onnxq_plugins import runtimes
from onnxq_plugins.graph import LAYER_OPS, Graph
from onnxq_plugins.graph.bodies import all_graphs, outer_reads, prune, rename_reads
from onnxq_plugins.graph.opsets import opset_of, raise_opset
from onnxq_plugins.spec import Array

_SIDES = {"then_branch": True, "else_branch": False}


@dataclass(frozen=True, eq=False)
class Branch:
    """One branch of an If.

    node     name of the If
    side     name of the attribute that holds it
    model    the branch as a model
    inputs   activations of the graph around it that it reads
    """

    node: str
    side: str
    model: onnx.ModelProto
    inputs: tuple[str, ...]

    @property
    def words(self) -> str:
        """The branch in a sentence."""
        return f"the {self.side.partition('_')[0]} branch of If '{self.node}'"


def branches(graph: Graph) -> list[Branch]:
    """The branches that hold layers with constant weights."""
    if not any(node.op == "If" and graph.has_body(node) for node in graph.nodes):
        return []
    model = graph.model()
    constants = {t.name: t for t in model.graph.initializer}
    inner = []
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "If" and not node.domain else ():
            known = {t.name for body in all_graphs(attribute.g) for t in body.initializer} | set(constants)
            nodes = [n for body in all_graphs(attribute.g) for n in body.node]
            if any(n.op_type in LAYER_OPS and len(n.input) > 1 and n.input[1] in known for n in nodes):
                inner.append(_branch(graph, model, node, attribute, constants))
    return inner


def _branch(
    graph: Graph,
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    attribute: onnx.AttributeProto,
    constants: Mapping[str, onnx.TensorProto],
) -> Branch:
    reads = outer_reads(onnx.NodeProto(attribute=[attribute]))
    inputs = [name for name in reads if name not in constants]
    body = onnx.GraphProto()
    body.CopyFrom(attribute.g)
    body.initializer.extend(constants[name] for name in reads if name in constants)
    for name in inputs:
        tensor = graph.tensor(name)
        shape = None if tensor.shape is None else list(tensor.shape)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype or np.float32))
        body.input.append(helper.make_tensor_value_info(name, kind, shape))
    whole = helper.make_model(body, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    return Branch(node.name, attribute.name, whole, tuple(inputs))


class BranchFeeds:
    """The feeds of a branch: what its inputs hold for the samples that take it. Iterate as often as you like."""

    def __init__(self, graph: Graph, branch: Branch, feeds: Iterable[Mapping[str, Array]]) -> None:
        weights: dict[str, Array] = {}
        model = graph.model(weights)
        self._condition = next(n.input[0] for n in model.graph.node if n.name == branch.node)
        self._fetched = [self._condition, *branch.inputs]
        given = {i.name for i in model.graph.input}
        self._computed = [name for name in dict.fromkeys(self._fetched) if name not in given]
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in self._computed)
        prune(model)
        names = {t.name for t in model.graph.initializer}
        self._session = runtimes.session(model, weights={n: w for n, w in weights.items() if n in names}, lean=True)
        self._branch, self._feeds = branch, feeds

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for feed in self._feeds:
            values = {**feed, **dict(zip(self._computed, self._session.run(self._computed, dict(feed)), strict=True))}
            if bool(np.asarray(values[self._condition]).any()) == _SIDES[self._branch.side]:
                yield {name: values[name] for name in self._branch.inputs}


def put_back(model: onnx.ModelProto, branch: Branch, quantized: onnx.ModelProto) -> None:
    """Replace a branch of a model by its quantized form, in place; what nothing reads any longer is dropped."""
    raise_opset(model, opset_of(quantized))
    model.ir_version = max(model.ir_version, quantized.ir_version)
    known = {o.domain for o in model.opset_import}
    model.opset_import.extend(o for o in quantized.opset_import if o.domain not in known)
    node = next(n for n in model.graph.node if n.name == branch.node)
    attribute = next(a for a in node.attribute if a.name == branch.side)
    taken = {n for g in all_graphs(model.graph) for each in g.node for n in (*each.input, *each.output, each.name)}
    taken |= {t.name for g in all_graphs(model.graph) for t in g.initializer}
    own = {o.name for o in attribute.g.output}
    renamed: dict[str, str] = {}

    def fresh(name: str) -> str:
        if name and name not in renamed:
            candidates = (f"{name}_{branch.side[:4]}{i or ''}" for i in itertools.count())
            renamed[name] = name if name in own or name not in taken else next(c for c in candidates if c not in taken)
            taken.add(renamed[name])
        return renamed.get(name, name)

    body = quantized.graph
    for tensor in body.initializer:
        tensor.name = fresh(tensor.name)
    for inner in body.node:
        inner.name = fresh(inner.name)
        for i, name in enumerate(inner.output):
            inner.output[i] = fresh(name)
    rename_reads(body.node, {old: new for old, new in renamed.items() if old != new})
    del body.input[:], body.value_info[:]
    attribute.g.CopyFrom(body)
    prune(model)
