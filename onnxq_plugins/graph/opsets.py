"""Versions of the ai.onnx operator set: models from one to a newer one, and operators that a model's own version lacks.

The user's version stays unless something in the result needs a newer one, since runtimes on devices are older than the
quantizer. onnx's own converter loses metadata and stops at operators of other domains, so it converts only what is older
than opset 11."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq_plugins.graph.bodies import all_graphs, set_nodes
from onnxq_plugins.spec import Array

# Oldest and newest that are read; QDQ with a scale per channel needs 13; int4 and int16 codes and blocks need 21.
OLDEST_OPSET, NEWEST_OPSET, QDQ_OPSET, NARROW_OPSET = 7, 26, 13, 21
OWN_OPSET = 11  # oldest that `raise_opset` reads
IR_OF_OPSET = {21: 10, 22: 10, 23: 11, 24: 11, 25: 12, 26: 13}  # the IR version that came with an opset
_AXES_INPUTS = {  # operators whose attribute `axes` became an input, by opset
    13: {"Squeeze", "Unsqueeze", "ReduceSum"},
    18: {f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")},
}
_LOGISTIC = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1}
_FIRST = {
    "HardSwish": 14,
    "LayerNormalization": 17,
    "Gelu": 20,
    "Swish": 24,
}  # operators that import introduces -> first opset
CONTRIB = "com.microsoft"  # domain of onnxruntime's own operators
Constants = Callable[[str, Array], str]  # name and values -> the name of a constant that holds them


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ai.onnx that a model imports; 0 if none."""
    return max((o.version for o in model.opset_import if not o.domain), default=0)


def raise_opset(model: onnx.ModelProto, version: int) -> None:
    """Rewrite a model of opset 11 or newer, in place and exactly, for a newer opset up to 21; its IR version follows."""
    before = opset_of(model)
    if before >= version:
        return
    for graph in all_graphs(model.graph):
        nodes = []
        names = {t.name for t in graph.initializer} | {n for node in graph.node for n in (*node.input, *node.output)}
        for node in graph.node:
            nodes += _raised(graph, names, node, before, version)
        if len(nodes) != len(graph.node):
            set_nodes(graph, nodes)
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = version
    model.ir_version = max(model.ir_version, IR_OF_OPSET.get(version, 4))


def _raised(
    graph: onnx.GraphProto, names: set[str], node: onnx.NodeProto, before: int, version: int
) -> list[onnx.NodeProto]:
    """The operators that replace a node; mostly itself, changed in place.

    names   of the graph's tensors
    """
    if node.domain:
        return [node]
    op, attributes = node.op_type, {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def to_input(name: str, place: int, dtype: type = np.int64) -> None:
        if name in attributes:
            _drop(node, name)
            while len(node.input) < place:
                node.input.append("")
            node.input.append(_constant(graph, names, f"{node.output[0]}_{name}", np.asarray(attributes[name], dtype)))

    for first, ops in _AXES_INPUTS.items():
        if before < first <= version and op in ops:
            to_input("axes", 1)
    if before < 13 <= version and op == "Split":
        to_input("split", 1)
    if before < 18 <= version and op == "Split" and (len(node.input) < 2 or not node.input[1]):
        node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    if before < 12 <= version and op == "Dropout":
        to_input("ratio", 1, np.float32)
    if before < 13 <= version and op in _LOGISTIC:
        return _along_last_axis(graph, node, attributes.get("axis", 1))
    if before < 11 <= version and op == "Scatter":
        node.op_type = "ScatterElements"
    if before < 20 <= version and op == "GridSample" and attributes.get("mode") in (b"bilinear", b"bicubic"):
        _drop(node, "mode")
        node.attribute.append(helper.make_attribute("mode", "linear" if attributes["mode"] == b"bilinear" else "cubic"))
    if before < 20 <= version and op == "DFT":
        _drop(node, "axis")
        while len(node.input) < 2:
            node.input.append("")
        node.input.append(_constant(graph, names, f"{node.output[0]}_axis", np.array(attributes.get("axis", 1), np.int64)))
    return [node]


def _along_last_axis(graph: onnx.GraphProto, node: onnx.NodeProto, axis: int) -> list[onnx.NodeProto]:
    """Softmax and the like of opset 12, over all axes from `axis` on, as that of opset 13, over one axis."""
    _drop(node, "axis")
    rank = _rank(graph, node.input[0])
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        node.attribute.append(helper.make_attribute("axis", -1))
        return [node]
    x, y = node.input[0], node.output[0]
    shape, flat, result = (f"{y}_{what}" for what in ("shape", "flat", "rows"))
    node.input[0], node.output[0] = flat, result
    node.attribute.append(helper.make_attribute("axis", -1))
    return [
        helper.make_node("Shape", [x], [shape], f"{node.name}_shape"),
        helper.make_node("Flatten", [x], [flat], f"{node.name}_flatten", axis=axis),
        node,
        helper.make_node("Reshape", [result, shape], [y], f"{node.name}_reshape"),
    ]


def _rank(graph: onnx.GraphProto, name: str) -> int | None:
    for value in itertools.chain(graph.value_info, graph.input, graph.output):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    return None


def _constant(graph: onnx.GraphProto, names: set[str], name: str, values: Array) -> str:
    """Add a constant to a graph under a name that is not among its `names`. Returns the name."""
    name = next(candidate for i in itertools.count() if (candidate := f"{name}_{i}" if i else name) not in names)
    names.add(name)
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _drop(node: onnx.NodeProto, attribute: str) -> None:
    kept = [a for a in node.attribute if a.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)


# ---- operators that import introduces, for versions that lack them --------------------------------------------------------


def expand(node: onnx.NodeProto, opset: int, constant: Constants) -> list[onnx.NodeProto]:
    """The node itself, or, where `opset` does not have its operator, elementary operators that compute the same, in the form
    that onnxruntime knows and fuses again."""
    return [node] if node.domain or opset >= _FIRST.get(node.op_type, 0) else _elementary(node, constant)


def lacks(op: str, opset: int) -> bool:
    """True if an opset does not have an operator that `expand` writes out."""
    return opset < _FIRST.get(op, 0)


def tuned(node: onnx.NodeProto, slopes: Array | None) -> list[onnx.NodeProto] | None:
    """An activation in the form that onnxruntime's CPU provider computes fastest beside quantized operators, exactly; None
    if that is the form it has.

    slopes   of a PRelu, where they are constant

    Gelu and Swish become single operators of its own domain: it fuses their elementary operators in float networks, but not
    where these read a DequantizeLinear, which it copies for each reader. A PRelu whose slopes are 1 at most is the larger
    of x and slope * x: a Mul and a Max, which are vectorized.
    """
    if node.domain or node.op_type not in ("Gelu", "Swish", "PRelu"):
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, y = node.input[0], node.output[0]
    if node.op_type == "Gelu":
        op = "FastGelu" if attributes.get("approximate") == b"tanh" else "Gelu"
        return [helper.make_node(op, [x], [y], node.name, domain=CONTRIB)]
    if node.op_type == "Swish":
        return [helper.make_node("QuickGelu", [x], [y], node.name, domain=CONTRIB, alpha=attributes.get("alpha", 1.0))]
    if slopes is not None and bool((slopes <= 1).all()):
        scaled = helper.make_node("Mul", [x, node.input[1]], [f"{y}_scaled"], f"{node.name}_scaled")
        return [scaled, helper.make_node("Max", [x, scaled.output[0]], [y], node.name)]
    return None


def _elementary(node: onnx.NodeProto, constant: Constants) -> list[onnx.NodeProto]:
    """The elementary operators of a function."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, y = node.input[0], node.output[0]
    steps: list[onnx.NodeProto] = []

    def step(op: str, inputs: list[str], output: str = "", **attrs: Any) -> str:
        output = output or f"{y}_{len(steps)}_{op.lower()}"
        steps.append(helper.make_node(op, inputs, [output], f"{node.name}_{len(steps)}", **attrs))
        return output

    def number(value: float, what: str) -> str:
        return constant(f"{node.name}_{what}", np.array(value, np.float32))

    if node.op_type == "Swish":
        alpha = attributes.get("alpha", 1.0)
        inner = x if alpha == 1.0 else step("Mul", [x, number(alpha, "alpha")])
        step("Mul", [x, step("Sigmoid", [inner])], y)
    elif node.op_type == "HardSwish":
        step("Mul", [x, step("HardSigmoid", [x], alpha=1 / 6, beta=0.5)], y)
    elif node.op_type == "Gelu" and attributes.get("approximate") == b"tanh":
        cube = step("Mul", [step("Pow", [x, number(3.0, "three")]), number(0.044715, "cubic")])
        inner = step("Mul", [step("Add", [x, cube]), number(math.sqrt(2 / math.pi), "factor")])
        gate = step("Add", [step("Tanh", [inner]), number(1.0, "one")])
        step("Mul", [step("Mul", [x, gate]), number(0.5, "half")], y)
    elif node.op_type == "Gelu":
        inner = step("Erf", [step("Div", [x, number(math.sqrt(2), "root")])])
        gate = step("Add", [inner, number(1.0, "one")])
        step("Mul", [step("Mul", [x, gate]), number(0.5, "half")], y)
    else:
        centred = step("Sub", [x, step("ReduceMean", [x], axes=[-1], keepdims=1)])
        square = step("Pow", [centred, number(2.0, "two")])
        variance = step("ReduceMean", [square], axes=[-1], keepdims=1)
        spread = step("Sqrt", [step("Add", [variance, number(attributes.get("epsilon", 1e-5), "epsilon")])])
        scaled = step("Mul", [step("Div", [centred, spread]), node.input[1]], "" if len(node.input) > 2 else y)
        if len(node.input) > 2:
            step("Add", [scaled, node.input[2]], y)
    return steps


def expand_all(model: onnx.ModelProto) -> None:
    """`expand` for the operators of a whole model, in place."""
    opset = opset_of(model)
    if not any(n.op_type in _FIRST and not n.domain and opset < _FIRST[n.op_type] for n in model.graph.node):
        return
    added: dict[str, onnx.TensorProto] = {}

    def constant(name: str, values: Array) -> str:
        added[name] = numpy_helper.from_array(values, name)
        return name

    nodes = [new for node in model.graph.node for new in expand(node, opset, constant)]
    set_nodes(model.graph, nodes)
    model.graph.initializer.extend(added.values())
