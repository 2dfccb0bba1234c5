"""Products with a constant matrix in other words become MatMul or Gemm, the layers that have integer kernels.

Einsum, MatMul with a constant [1, K, N] and Gemm with transA compute nothing else, but no runtime has integer kernels for
them."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph


def rewrite_products(graph: Graph) -> None:
    """Apply the rewrites of this file, in place; a note tells how many Einsums became MatMuls."""
    rewritten = 0
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op == "Einsum":
            rewritten += einsum_to_matmul(graph, node)
        elif node.op == "MatMul":
            drop_unit_axes(graph, node)
        elif node.op == "Gemm":
            untranspose(graph, node)
    if rewritten:
        graph.notes.append(f"{rewritten} Einsum with a constant matrix {'are' if rewritten > 1 else 'is a'} MatMul")
    graph.tidy()


def einsum_to_matmul(graph: Graph, node: gs.Node) -> bool:
    """An Einsum that sums the last axes of an activation with a constant becomes a MatMul, between two Reshapes where these,
    or the new axes, are several.

    "tbd,de->tbe" with a constant [d, e] is x @ w; "bsd,hdk->bshk" is x @ w' with w' [d, h * k]; "bshk,hkd->bsd" is
    x' @ w' with x' [b, s, h * k]. Returns whether it is one.
    """
    if len(node.inputs) != 2 or not graph.opset >= 12:
        return False
    left, _, output = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")
    letters = left.split(",")
    at = next((i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)), -1)
    if at < 0 or isinstance(node.inputs[1 - at], gs.Constant) or not output or "." in left:
        return False
    constant, x, of_x, of_w = node.inputs[at], node.inputs[1 - at], letters[1 - at], letters[at]
    summed = "".join(c for c in of_x if c in of_w and c not in output)
    kept, new = of_x.removesuffix(summed), "".join(c for c in output if c not in of_x)
    plain = all(len(set(part)) == len(part) for part in (of_x, of_w, output)) and constant.dtype == np.float32
    if not (plain and summed and new and kept) or output != kept + new or sorted(of_w) != sorted(summed + new):
        return False
    weight = constant.values.transpose([of_w.index(c) for c in summed + new])
    sizes = weight.shape[len(summed) :]
    weight = graph.add_constant(f"{constant.name}_matrix", weight.reshape(-1, math.prod(sizes)))
    if len(summed) > 1:
        x = _reshaped(graph, node, x, f"{node.name}_joined", [*[0] * len(kept), weight.shape[0]])
    result = node.outputs[0]
    node.outputs.clear()
    if len(new) == 1:
        graph.add_node("MatMul", node.name, [x, weight], [result], before=node)
        return True
    product = graph.add_variable(f"{node.name}_product", like=result, shape=None)
    product.shape = None if x.shape is None else [*x.shape[:-1], weight.shape[1]]
    graph.add_node("MatMul", node.name, [x, weight], [product], before=node)
    shape = graph.add_constant(f"{node.name}_shape", np.array([*[0] * len(kept), *sizes], np.int64))
    graph.add_node("Reshape", f"{node.name}_split", [product, shape], [result], before=node)
    return True


def _reshaped(graph: Graph, node: gs.Node, x: gs.Tensor, name: str, sizes: list[int]) -> gs.Tensor:
    """A tensor behind a new Reshape; a size of 0 keeps the axis."""
    joined = graph.add_variable(name, like=x, shape=None)
    joined.shape = None if x.shape is None else [*x.shape[: len(sizes) - 1], sizes[-1]]
    shape = graph.add_constant(f"{name}_shape", np.array(sizes, np.int64))
    graph.add_node("Reshape", f"{name}_reshape", [x, shape], [joined], before=node)
    return joined


def drop_unit_axes(graph: Graph, node: gs.Node) -> None:
    """MatMul with a constant [1, ..., K, N] is one with [K, N], where the other operand has as many axes."""
    x, constant = node.inputs
    if not isinstance(constant, gs.Constant) or isinstance(x, gs.Constant) or x.shape is None:
        return
    shape = constant.shape
    if 2 < len(shape) <= len(x.shape) and set(shape[:-2]) == {1}:
        node.inputs[1] = graph.add_constant(f"{constant.name}_matrix", constant.values.reshape(shape[-2:]))
        graph.changed()


def untranspose(graph: Graph, node: gs.Node) -> None:
    """Gemm(x, w, transA=1) is Gemm(Transpose(x), w)."""
    x, weight = node.inputs[:2]
    if not node.attrs.get("transA", 0) or isinstance(x, gs.Constant) or not isinstance(weight, gs.Constant):
        return
    del node.attrs["transA"]
    turned = graph.add_variable(f"{node.name}_turned", like=x, shape=None)
    turned.shape = None if x.shape is None else list(x.shape[::-1])
    graph.add_node("Transpose", f"{node.name}_transpose", [x], [turned], before=node, perm=[1, 0])
    node.inputs[0] = turned
    graph.changed()
