"""Bodies of control flow (If, Loop, Scan ...) in ONNX protobufs: walking them, what they read from outside, renaming it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx

_GRAPHS = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS, onnx.AttributeProto.UNDEFINED}  # old models have no types


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs among a node's attributes."""
    attributes = [a for a in node.attribute if a.type in _GRAPHS]
    return [body for a in attributes for body in ([a.g] if a.HasField("g") else list(a.graphs))]


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and, recursively, the bodies of its nodes."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from all_graphs(body)


def set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Make these the operators of a graph. They may be its own, which deleting would empty: they are copied first."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def with_bodies(graph: onnx.GraphProto) -> onnx.GraphProto:
    """A graph that also lists the operators and constants of control-flow bodies, for whoever asks what there is; the graph
    itself if it has none."""
    inner = list(all_graphs(graph))[1:]
    if not inner:
        return graph
    whole = onnx.GraphProto()
    whole.CopyFrom(graph)
    for body in inner:
        whole.node.extend(body.node)
        whole.initializer.extend(body.initializer)
    return whole


def outer_reads(node: onnx.NodeProto) -> list[str]:
    """Names that the bodies of a node read from outside, each once, in order."""
    names: dict[str, None] = {}
    for body in bodies(node):
        own = _defined(body)
        for inner in body.node:
            names |= dict.fromkeys(name for name in (*inner.input, *outer_reads(inner)) if name and name not in own)
        names |= dict.fromkeys(o.name for o in body.output if o.name and o.name not in own)
    return list(names)


def rename_outer_reads(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Make the bodies of a node read other tensors from outside: old name -> new name."""
    for body in bodies(node):
        own = _defined(body)
        others = {old: new for old, new in names.items() if old not in own and old != new}
        if not others:
            continue
        rename_reads(body.node, others)
        for output in body.output:
            if output.name in others:  # the body yields an outer tensor as it is
                body.node.add(op_type="Identity", input=[others[output.name]], output=[output.name])


def rename_reads(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Make operators, and the bodies in them, read other tensors: old name -> new name."""
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        rename_outer_reads(node, names)


def _defined(body: onnx.GraphProto) -> set[str]:
    """Names of the tensors that a body defines itself."""
    return {
        *(v.name for v in body.input),
        *(t.name for t in body.initializer),
        *(t.values.name for t in body.sparse_initializer),
        *(o for n in body.node for o in n.output),
    }


def prune(model: onnx.ModelProto) -> None:
    """Drop operators that no output needs: onnxruntime would run them anyway; and constants that no operator reads."""
    producers = {o: i for i, n in enumerate(model.graph.node) for o in n.output if o}
    todo, needed = [o.name for o in model.graph.output], set[int]()
    while todo:
        at = producers.get(todo.pop())
        if at is not None and at not in needed:
            needed.add(at)
            todo += [*model.graph.node[at].input, *outer_reads(model.graph.node[at])]
    kept = [n for i, n in enumerate(model.graph.node) if i in needed]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in (*node.input, *outer_reads(node))}
    used |= {v.name for v in (*model.graph.input, *model.graph.output)}  # an input's constant is its default
    constants = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
