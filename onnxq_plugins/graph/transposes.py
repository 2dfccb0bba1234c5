"""Transposes in a row: one remains, or none."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.redundant import drops
from onnxq_plugins.graph.rewriting import Rewrite, rank_of, rewrite_of


def perm_of(node: gs.Node) -> list[int] | None:
    """The order of axes of a Transpose; None if it is not known."""
    perm = node.attrs.get("perm")
    if perm is None:
        rank = rank_of(node.inputs[0])
        return None if rank is None else list(range(rank))[::-1]
    return list(perm)


def transpose_of(tensor: gs.Tensor) -> tuple[gs.Node, list[int]] | None:
    """The Transpose that writes a tensor, and its order."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op != "Transpose" or node.domain or isinstance(node.inputs[0], gs.Constant):
        return None
    perm = perm_of(node)
    return None if perm is None else (node, perm)


@rewrite_of("Transpose")
def join_transposes(graph: Graph, node: gs.Node) -> bool:
    """A Transpose in the order that its input has goes; of two in a row one remains, or none."""
    perm, before = perm_of(node), transpose_of(node.inputs[0])
    if perm is None:
        return False
    if perm == sorted(perm):
        return drops(graph, node)
    if before is None:
        return False
    first, order = before
    node.inputs[0] = first.inputs[0]
    node.attrs["perm"] = [order[axis] for axis in perm]
    if node.attrs["perm"] == sorted(perm):
        drops(graph, node)
    return True


TRANSPOSES: tuple[Rewrite, ...] = (join_transposes,)
