"""The model that ships, in as few bytes as possible; what it computes, and the kernels that it runs in, stay.

In small networks names are up to three quarters of the file: a tensor of an exported network is called
"/backbone/features/0/conv/Conv_output_0", and a weight is decoded under three names made of its own. So tensors and
constants get names of a letter or two. What people and programs refer to keeps its name: inputs and outputs, and operators,
by which audits, reports and profiles name layers. Operators that only the exporter added have no name.

A search never does this: it happens once, when a plan is final."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import files
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.graph.bodies import all_graphs, outer_reads, rename_reads

Names = Literal["short", "keep"]

_FIRST, _NEXT = string.ascii_letters, string.ascii_letters + string.digits
_SMALL = 2**10  # values at most of constants that shapes follow from
_COMPUTED = 8  # channels from which on a Mul takes less than the scales of a bias
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_TRACE = re.compile(r'^\s*File ".*", line \d+|^\S.*\.py\(\d+\): \S')  # a line of a stack trace, as torch writes it


def check_names(value: str) -> Names:
    """Raise OnnxqError for what is no way to name tensors."""
    found = next((names for names in get_args(Names) if names == value), None)
    if found is None:
        raise OnnxqError(f"names = '{value}' is unknown; {known(value, get_args(Names))}.")
    checked: Names = found
    return checked


def compact(model: onnx.ModelProto, own: Collection[str], names: Names = "short", folds: bool = True) -> dict[str, str]:
    """Make a QDQ model smaller, in place. Returns what its tensors are called now: old name -> new name, where they differ.

    own     names of the operators of the float model; those of others are dropped with ``short``
    names   ``keep`` leaves names and value_info as they are
    folds   the runtime folds constants when it loads the model
    """
    graph, taken = model.graph, _all_names(model.graph)
    for part in (*all_graphs(graph), *model.functions):
        _forget_traces(part)
    for part in reversed(list(all_graphs(graph))):  # bodies first: the operators around them are written anew
        if folds:
            _compute_bias_scales(part, taken)
        _share(part)
    if names == "keep":
        return {}
    _forget_operators(graph, own)
    _forget_known_shapes(model)
    return _shorten(graph)


def alike(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """True if the graphs of two models say the same, whatever things are called in them."""
    copies = [onnx.ModelProto(), onnx.ModelProto()]
    for copy, model in zip(copies, (one, other), strict=True):
        copy.CopyFrom(model)
        compact(copy, ())
    return bool(copies[0].graph == copies[1].graph)


# ---- traces ---------------------------------------------------------------------------------------------------------------


def _forget_traces(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Drop what says where in a program an operator was made: stack traces, which torch exports. Other text stays."""
    for node in graph.node:
        kept = [p for p in node.metadata_props if not p.key.endswith("stack_trace")]
        if len(kept) < len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        lines = node.doc_string.splitlines()
        if any(map(_TRACE.match, lines)):
            node.doc_string = "\n".join(_without_traces(lines)).strip()


def _without_traces(lines: list[str]) -> Iterator[str]:
    """Text without the lines of stack traces, each of which the lines of code that it quotes follow, further indented."""
    depth: int | None = None  # of the line of a trace that these follow
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if _TRACE.match(line):
            depth = indent
        elif depth is None or (line.strip() and indent <= depth):
            depth = None
            yield line


# ---- biases ---------------------------------------------------------------------------------------------------------------


def _compute_bias_scales(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Where that is smaller, make scales of biases products of the scales of input and weight, which is what they are: a Mul
    that is folded when the model is loaded. (Codes of biases from float values would take as many bytes.)

    taken   names of tensors in the whole model
    """
    constants = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    makers = {name: node for node in graph.node for name in node.output}
    known: dict[tuple[str, str], str] = {}  # scales of input and weight -> that of the bias
    before: dict[str, onnx.NodeProto] = {}  # output of the first reader -> what computes a scale for it
    for node in graph.node:
        chain = [makers.get(name) for name in node.input]
        if len(chain) != 3 or not all(n is not None and n.op_type == "DequantizeLinear" for n in chain):
            continue
        x, weight, bias = (n for n in chain if n is not None)
        factors, old = (x.input[1], weight.input[1]), bias.input[1]
        if not all(name in constants for name in (*factors, old)):
            continue
        values = [numpy_helper.to_array(constants[name]) for name in (*factors, old)]
        if (
            values[0].size != 1
            or values[2].size < _COMPUTED
            or values[1].shape != values[2].shape
            or values[2].dtype != np.float32
        ):
            continue
        if not np.array_equal(values[0].reshape(()) * values[1], values[2]):
            continue
        if factors not in known:
            known[factors] = next(name for i in itertools.count() if (name := f"{old}_{i}") not in taken)
            taken.add(known[factors])
            before[bias.output[0]] = helper.make_node("Mul", list(factors), [known[factors]])
        bias.input[1] = known[factors]
    if before:
        _keep_nodes(graph, [n for node in graph.node for n in (before.get(node.output[0]), node) if n is not None])


def _keep_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Make these the operators of a graph, and drop the constants that none reads any more."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    reads, fixed = _reads(graph), {value.name for value in (*graph.input, *graph.output)}
    for at in reversed(range(len(graph.initializer))):
        if graph.initializer[at].name not in fixed and not reads[graph.initializer[at].name]:
            del graph.initializer[at]


def _reads(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is read, by bodies of control flow and as an output of the model, too."""
    reads = Counter(name for node in graph.node for name in (*node.input, *outer_reads(node)))
    reads.update(value.name for value in graph.output)
    return reads


def _all_names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a tensor in a graph and in its bodies."""
    names: set[str] = set()
    for part in all_graphs(graph):
        names |= {name for node in part.node for name in (*node.input, *node.output)}
        names |= {each.name for each in (*part.input, *part.output, *part.initializer)}
    return names


# ---- constants ------------------------------------------------------------------------------------------------------------


def _share(graph: onnx.GraphProto) -> None:
    """Keep one of each group of equal constants of a graph."""
    fixed = {value.name for value in (*graph.input, *graph.output)}
    sizes = Counter(map(_kind, graph.initializer))
    first: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    for tensor in graph.initializer:
        if sizes[_kind(tensor)] == 1 or tensor.data_location == TensorProto.EXTERNAL or tensor.name in fixed:
            continue
        kept = first.setdefault((*_kind(tensor), _content(tensor)), tensor.name)
        if kept != tensor.name:
            same[tensor.name] = kept
    if not same:
        return
    rename_reads(graph.node, same)
    for at in reversed(range(len(graph.initializer))):
        if graph.initializer[at].name in same:
            del graph.initializer[at]


def _kind(tensor: TensorProto) -> tuple[object, ...]:
    """What equal constants have in common, seen at once."""
    return tensor.data_type, tuple(tensor.dims)


def _content(tensor: TensorProto) -> bytes:
    """The values of a constant."""
    if tensor.HasField("raw_data"):
        return hashlib.sha256(tensor.raw_data).digest()
    bare = TensorProto()
    bare.CopyFrom(tensor)
    bare.ClearField("name")
    bare.ClearField("doc_string")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


# ---- names ----------------------------------------------------------------------------------------------------------------


def _candidates() -> Iterator[str]:
    """Names, the shortest first; each is an identifier in C."""
    for length in itertools.count():
        for first, *rest in itertools.product(_FIRST, *[_NEXT] * length):
            yield first + "".join(rest)


def _shorten(graph: onnx.GraphProto) -> dict[str, str]:
    """Give every tensor and constant but inputs and outputs a name as short as possible, those that are named most the very
    shortest. Returns old name -> new name. Bodies of control flow take part: what had one name has one name, so that they
    read what they read before."""
    kept = {"", *(value.name for value in (*graph.input, *graph.output))}
    uses: Counter[str] = Counter()
    for part in all_graphs(graph):
        uses.update(each.name for each in (*part.input, *part.initializer))
        uses.update(t.values.name for t in part.sparse_initializer)
        uses.update(name for node in part.node for name in (*node.input, *node.output))
        uses.update(each.name for each in (*part.output, *part.value_info))
    free = (name for name in _candidates() if name not in kept)
    names = {old: next(free) for old, _ in uses.most_common() if old not in kept}
    for part in all_graphs(graph):
        for each in (*part.input, *part.output, *part.initializer, *part.value_info):
            each.name = names.get(each.name, each.name)
        for sparse in part.sparse_initializer:
            sparse.values.name = names.get(sparse.values.name, sparse.values.name)
        for node in part.node:
            for ports in (node.input, node.output):
                for i, name in enumerate(ports):
                    ports[i] = names.get(name, name)
    return {old: new for old, new in names.items() if old != new}


def _forget_operators(graph: onnx.GraphProto, own: Collection[str]) -> None:
    """Take the names of operators that only the exporter knows; in bodies these are conversions."""
    for at, part in enumerate(all_graphs(graph)):
        for node in part.node:
            if node.op_type in _CONVERSIONS if at else node.name not in own:
                node.name = ""


def _forget_known_shapes(model: onnx.ModelProto) -> None:
    """Drop the types and shapes of inner tensors that follow from the model: whoever reads it infers them."""
    graph = model.graph
    written = {name for node in graph.node for name in node.output}
    stated = [value for value in graph.value_info if value.name in written]
    shell = files.skeleton(model)
    del shell.graph.value_info[:]
    for tensor in graph.initializer:
        small = tensor.data_location != TensorProto.EXTERNAL and int(np.prod(tensor.dims)) <= _SMALL
        kept = tensor if small else TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        shell.graph.initializer.append(kept)
    inferred: dict[str, onnx.TypeProto] = {}
    if stated:
        with contextlib.suppress(Exception):  # onnx's own, of several types: nothing is known then
            inferred = {v.name: v.type for v in onnx.shape_inference.infer_shapes(shell).graph.value_info}
    rest = [v for v in stated if v.metadata_props or v.doc_string or inferred.get(v.name) != v.type]
    rest = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in rest]
    del graph.value_info[:]
    graph.value_info.extend(rest)
