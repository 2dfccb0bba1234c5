"""What a structural change must leave: a graph that ONNX can hold. What can be mended is (order, names, what nothing needs);
the rest is said, with the line that made the operator it is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.opsets import lacks

Structure = list[tuple[gs.Node, tuple[Any, ...]]]  # the operators, and what each is; holds them, so that no id is used twice


def structure(graph: Graph) -> Structure:
    """The operators of a graph and how they are joined; values of constants do not count."""
    return [(node, _form(node)) for node in graph._graph.nodes]


def same_structure(before: Structure, graph: Graph) -> bool:
    """True if a graph still has that structure."""
    nodes = graph._graph.nodes
    return len(before) == len(nodes) and all(
        old is new and form == _form(new) for (old, form), new in zip(before, nodes, strict=True)
    )


def _form(node: gs.Node) -> tuple[Any, ...]:
    inputs = [(t.name, tuple(t.shape), str(t.dtype)) if isinstance(t, gs.Constant) else id(t) for t in node.inputs]
    attrs = [
        (key, repr(value) if isinstance(value, (int, float, str, list, tuple)) else id(value))
        for key, value in node.attrs.items()
    ]
    return node.op, node.domain, node.name, *inputs, None, *(id(t) for t in node.outputs), None, *attrs


def mend(graph: Graph, before: Structure) -> str:
    """Bring a graph whose structure has changed into order: operators sorted, what no output needs dropped, a name of its
    own for each operator. Returns what is wrong and cannot be mended, as the end of a sentence about the graph; "" if
    nothing.

    before   its structure before the change, whose operators keep their names
    """
    if problem := next(_names(graph), ""):  # graphsurgeon goes by names
        return problem
    try:
        if not _tidy(graph):
            graph._graph.cleanup()
        if problem := next(_broken_edges(graph), ""):
            return problem
        if not _tidy(graph):
            graph.tidy()
    except Exception as error:  # graphsurgeon raises its own kinds
        text = " ".join(str(error).split())[:200].rstrip(".")
        return f"cannot be put in order ({text or type(error).__name__}); do operators read each other in a circle?"
    _name_nodes(graph, before)
    if problem := next(_invalid_nodes(graph, before), ""):
        return problem
    _infer(graph, before)
    return ""


def _tidy(graph: Graph) -> bool:
    """True if the operators are in order and all needed: sorting them again would give another order of the same worth, and
    statistics that a pass carries over are known by the order."""
    inner = graph._graph
    outputs, place = {id(t) for t in inner.outputs}, {id(node): n for n, node in enumerate(inner.nodes)}
    return all(
        any(t.outputs or id(t) in outputs for t in node.outputs)
        and all(place.get(id(writer), n) < n for t in node.inputs for writer in t.inputs)
        for n, node in enumerate(inner.nodes)
    )


def _names(graph: Graph) -> Iterator[str]:
    """Tensors of one name."""
    named: dict[str, gs.Tensor] = {}
    for node in graph._graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if not tensor.is_empty() and named.setdefault(tensor.name, tensor) is not tensor:
                yield f"has two tensors named '{tensor.name}', one beside {describe(node)}; use job.graph.add_variable"


def _broken_edges(graph: Graph) -> Iterator[str]:
    """What no file can hold: tensors with several writers, or with none that are read."""
    inner = graph._graph
    inputs, beside = {id(t) for t in inner.inputs}, graph._beside.tensors
    for node in inner.nodes:
        for tensor in node.outputs:
            if len(tensor.inputs) > 1 or isinstance(tensor, gs.Constant) or id(tensor) in inputs:
                writers = " and ".join(describe(n) for n in tensor.inputs) or "the caller"
                yield f"has '{tensor.name}' written twice, by {writers}; clear the outputs of the operator that is replaced"
        for tensor in node.inputs:
            given = tensor.is_empty() or isinstance(tensor, gs.Constant) or tensor.inputs or id(tensor) in inputs
            if not given and tensor.name not in beside:
                yield f"has {describe(node)} read '{tensor.name}', which nothing computes"
    for tensor in inner.outputs:
        if not (tensor.inputs or id(tensor) in inputs or isinstance(tensor, gs.Constant) or tensor.name in beside):
            yield f"has nothing that computes the output '{tensor.name}'"


def _name_nodes(graph: Graph, before: Structure) -> None:
    """Give operators without a name, or with that of another, one of their own. Those that were there keep theirs."""
    old, nodes = {id(node) for node, _ in before}, graph._graph.nodes
    taken = {node.name for node in nodes if id(node) in old}
    for node in nodes:
        if id(node) not in old:
            if not node.name or node.name in taken:
                node.name = graph.fresh_node(node.name or node.op.lower(), taken)
            taken.add(node.name)
    graph.changed()


def _invalid_nodes(graph: Graph, before: Structure) -> Iterator[str]:
    """What onnx.checker says about operators that are new or changed. The user's own are as onnxruntime took them."""
    forms = {id(node): form for node, form in before}
    opset = max(graph.opset, graph.output_opset)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = max(int(graph._beside.header.ir_version), 4)
    domains = {o.domain: o.version for o in graph._beside.header.opset_import}
    for node in graph._graph.nodes:
        written_out = not node.domain and lacks(node.op, opset)
        if forms.get(id(node)) == _form(node) or node.name in graph._beside.rest or written_out:
            continue
        context.opset_imports = {**domains, node.domain or "": domains.get(node.domain, 1), "": opset}
        try:
            reads, writes = ([t.name for t in tensors] for tensors in (node.inputs, node.outputs))
            proto = helper.make_node(node.op, reads, writes, node.name, domain=node.domain, **node.attrs)
            onnx.checker.check_node(proto, context)
        except (onnx.checker.ValidationError, TypeError, ValueError) as error:
            text = " ".join(str(error).partition("==>")[0].split())[:200].rstrip(".")
            yield f"has {describe(node)}, which onnx.checker refuses: {text}"


def _infer(graph: Graph, before: Structure) -> None:
    """Shapes and types of what new operators write, as far as onnx infers them: passes that follow ask for channels."""
    old = {id(node) for node, _ in before}
    open_ = {t.name: t for n in graph._graph.nodes if id(n) not in old for t in n.outputs if not t.is_empty()}
    if all(t.shape is not None for t in open_.values()):
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(graph.model({}))
    except (onnx.shape_inference.InferenceError, OnnxqError, ValueError):
        return
    for value in inferred.graph.value_info:
        kind, tensor = value.type.tensor_type, open_.get(value.name)
        if tensor is None or not kind.elem_type:
            continue
        tensor.dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if tensor.shape is None and kind.HasField("shape"):
            tensor.shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]


def describe(node: gs.Node) -> str:
    """An operator, and the line that made it, if a pass did."""
    line = getattr(node, "made_in", "")
    return f"{node.op} '{node.name}'" + (f" (made in {line})" if line else "")


def newest_named(graph: Graph, before: Structure, text: str) -> str:
    """The operator that a change brought and a runtime's complaint names, for a sentence; "" if it names none."""
    old = {id(node) for node, _ in before}
    node = next((n for n in graph._graph.nodes if id(n) not in old and n.name in text), None)
    return "" if node is None else describe(node)
