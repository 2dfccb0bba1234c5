"""One form for what ONNX allows to write in several ways, before a model is checked and read.

Model-local functions are inlined; ``ai.onnx`` is the empty domain; Constant operators and large constants of control-flow
bodies are initializers of the whole graph; sparse initializers are dense; operators are sorted and have unique names;
weights that are listed as inputs are constants; a branch that a constant decides is part of the graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.graph.bodies import all_graphs, bodies, outer_reads, rename_outer_reads, set_nodes
from onnxq_plugins.graph.layer import LAYER_OPS

_LARGE = 1024  # bytes of a constant in a body from which on it is moved out
_WEIGHTED = {*LAYER_OPS, "BatchNormalization", "LSTM", "GRU", "RNN", "LayerNormalization", "InstanceNormalization"}


def normalize(proto: onnx.ModelProto, where: str) -> tuple[onnx.ModelProto, list[str]]:
    """The model in that form, and notes about what its user should know. The argument is used up.

    where   the model in words, for errors

    Raises OnnxqError for operators in a circle, and functions that cannot be inlined.
    """
    notes: list[str] = []
    _one_domain(proto)
    if proto.functions:
        proto = _inlined(proto, where)
    for graph in all_graphs(proto.graph):
        _dense(graph)
        _constants_to_initializers(graph)
        for value in (*graph.input, *graph.output, *graph.value_info):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_value < 0:  # onnxruntime reads it as dynamic
                    size.Clear()
    _hoist(proto.graph)
    _constant_inputs(proto, notes)
    name_nodes(proto.graph)
    _sort(proto.graph, where)
    return proto, notes


def _one_domain(proto: onnx.ModelProto) -> None:
    """``ai.onnx`` written out is the empty domain."""
    for owner in (proto, *proto.functions):
        entries = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in owner.opset_import}
        del owner.opset_import[:]
        owner.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in entries.items())
    owners = [proto.graph, *proto.functions]
    for owner in owners:
        for node in owner.node:
            for each in (node, *(n for body in bodies(node) for g in all_graphs(body) for n in g.node)):
                if each.domain == "ai.onnx":
                    each.domain = ""


def _inlined(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Calls of model-local functions replaced by their bodies."""
    from onnx import inliner

    try:
        return inliner.inline_local_functions(proto, convert_version=True)
    except Exception as error:  # the inliner raises RuntimeError and its own types
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OnnxqError(
            f"{where}: its local functions cannot be inlined ({text[:200]}); export the model without functions."
        ) from error


def _dense(graph: onnx.GraphProto) -> None:
    """Sparse initializers as ordinary ones."""
    graph.initializer.extend(_dense_tensor(t, t.values.name) for t in graph.sparse_initializer)
    del graph.sparse_initializer[:]


def _dense_tensor(sparse: onnx.SparseTensorProto, name: str) -> TensorProto:
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 1:
        dense.reshape(-1)[places] = values
    else:
        dense[tuple(places.T)] = values
    return numpy_helper.from_array(dense, name)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constant operators, in every form of their attribute, as initializers."""
    nodes = []
    for node in graph.node:
        tensor = _constant_tensor(node) if node.op_type == "Constant" and not node.domain else None
        if tensor is None:
            nodes.append(node)
        else:
            graph.initializer.append(tensor)
    if len(nodes) < len(graph.node):
        set_nodes(graph, nodes)


def _constant_tensor(node: onnx.NodeProto) -> TensorProto | None:
    """The value of a Constant operator; None for a form that is unknown."""
    if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attribute, name = node.attribute[0], node.output[0]
    if attribute.name == "value" and attribute.type == AttributeProto.TENSOR:
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = name
        return tensor
    if attribute.name == "sparse_value":
        return _dense_tensor(attribute.sparse_tensor, name)
    value = helper.get_attribute_value(attribute)
    if attribute.name in ("value_string", "value_strings"):
        texts = [value] if attribute.name == "value_string" else list(value)
        return helper.make_tensor(name, TensorProto.STRING, [] if attribute.name == "value_string" else [len(texts)], texts)
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in dtypes:
        return None
    return numpy_helper.from_array(np.asarray(value, dtypes[attribute.name]), name)


def _hoist(graph: onnx.GraphProto) -> None:
    """Large constants of control-flow bodies move to the whole graph, whose values bodies see: there they can be stored like
    all others."""
    names = {n for g in all_graphs(graph) for node in g.node for n in (*node.input, *node.output)}
    names |= {t.name for g in all_graphs(graph) for t in g.initializer}
    names |= {v.name for g in all_graphs(graph) for v in g.input}

    def visit(body: onnx.GraphProto) -> None:
        renamed = {}
        kept = []
        for tensor in body.initializer:
            if len(tensor.raw_data) < _LARGE and np.prod(tensor.dims) * 4 < _LARGE:
                kept.append(tensor)
                continue
            first = tensor.name not in {t.name for t in graph.initializer} and tensor.name not in outer
            fresh = (c for i in itertools.count() if (c := f"{tensor.name}_body{i}" if i else tensor.name) not in names)
            new = tensor.name if first else next(fresh)
            names.add(new)
            renamed[tensor.name] = new
            graph.initializer.append(tensor)
            graph.initializer[-1].name = new
        if renamed:
            copies = [TensorProto.FromString(t.SerializeToString()) for t in kept]
            del body.initializer[:]
            body.initializer.extend(copies)
            holder = onnx.NodeProto()
            attribute = holder.attribute.add(name="body", type=AttributeProto.GRAPH)
            attribute.g.CopyFrom(body)
            rename_outer_reads(holder, renamed)
            body.CopyFrom(holder.attribute[0].g)
        for node in body.node:
            for inner in bodies(node):
                visit(inner)

    outer = {n for node in graph.node for n in node.output} | {v.name for v in graph.input}
    for node in graph.node:
        for body in bodies(node):
            visit(body)


def _constant_inputs(proto: onnx.ModelProto, notes: list[str]) -> None:
    """Constants that are listed among the inputs. Since IR version 4 callers may set them: those that operators take for
    weights, or all of them where an exporter lists every constant, become constants; others stay inputs with a default."""
    graph = proto.graph
    constants = {t.name for t in graph.initializer}
    listed = {v.name for v in graph.input} & constants
    if not listed:
        return
    weights = {
        name
        for node in graph.node
        if not node.domain and node.op_type in _WEIGHTED
        for name in node.input[1:]
        if name in listed
    }
    fixed = listed if proto.ir_version < 4 or len(listed) == len(constants) > 3 else weights
    kept = [v for v in graph.input if v.name not in fixed]
    copies = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in kept]
    del graph.input[:]
    graph.input.extend(copies)
    if fixed and proto.ir_version >= 4:
        notes.append(
            f"{counted(len(fixed), 'weight')} listed as inputs became constants: callers can no longer override them"
        )
    proto.ir_version = max(proto.ir_version, 4)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every operator a unique name: overrides, reports and the audit refer to operators by name."""
    taken: set[str] = set()
    for node in graph.node:
        name = node.name or f"{node.op_type}_{next((o for o in node.output if o), '')}"
        candidate, i = name, 1
        while candidate in taken:
            candidate, i = f"{name}_{i}", i + 1
        node.name = candidate
        taken.add(candidate)


def node_names(graph: onnx.GraphProto) -> set[str]:
    """The names of a graph's operators, those inside of control flow included."""
    return {node.name for part in all_graphs(graph) for node in part.node if node.name}


def _sort(graph: onnx.GraphProto, where: str) -> None:
    """Put operators behind those whose outputs they read, where they are not."""
    place = {o: i for i, node in enumerate(graph.node) for o in node.output if o}
    above = {
        i: {place[name] for name in (*node.input, *outer_reads(node)) if name in place} for i, node in enumerate(graph.node)
    }
    if all(max(before, default=-1) < i for i, before in above.items()):
        return
    try:
        order = list(TopologicalSorter(above).static_order())
    except CycleError as error:
        name = graph.node[error.args[1][0]].name
        raise OnnxqError(f"{where}: operator '{name}' depends on its own output; export the model again.") from error
    set_nodes(graph, [graph.node[i] for i in order])


# ---- branches -------------------------------------------------------------------------------------------------------------


def inline_branches(proto: onnx.ModelProto, decided: Mapping[str, bool]) -> None:
    """Replace If operators whose condition is known by the branch that is taken, in place.

    decided   name of an If -> its condition
    """
    graph, nodes = proto.graph, []
    names = {n for g in all_graphs(graph) for node in g.node for n in (*node.input, *node.output)}
    names |= {t.name for g in all_graphs(graph) for t in g.initializer}
    for node in graph.node:
        if node.name in decided:
            taken = "then_branch" if decided[node.name] else "else_branch"
            body = next(a.g for a in node.attribute if a.name == taken)
            nodes += _branch(graph, node, body, names)
        else:
            nodes.append(node)
    set_nodes(graph, nodes)
    name_nodes(graph)


def _branch(graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto, names: set[str]) -> list[onnx.NodeProto]:
    """The operators of a branch under names of their own, and Identities that write the outputs of the If."""
    own = {o for n in body.node for o in n.output if o} | {t.name for t in body.initializer}
    renamed = {}
    for name in sorted(own):
        renamed[name] = next(
            c for i in itertools.count() if (c := f"{node.name}_{name}" + (f"_{i}" if i else "")) not in names
        )
        names.add(renamed[name])
    for tensor in body.initializer:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = renamed[tensor.name]
    nodes = []
    for inner in body.node:
        copy = onnx.NodeProto.FromString(inner.SerializeToString())
        for places in (copy.input, copy.output):
            for i, name in enumerate(places):
                places[i] = renamed.get(name, name)
        rename_outer_reads(copy, renamed)
        copy.name = f"{node.name}/{inner.name}" if inner.name else ""
        nodes.append(copy)
    for theirs, ours in zip(body.output, node.output, strict=False):
        if ours:
            source = renamed.get(theirs.name, theirs.name)
            nodes.append(helper.make_node("Identity", [source], [ours], f"{node.name}_{ours}"))
    return nodes
