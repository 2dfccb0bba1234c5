"""What edits of a graph have in common: what an operator reads, readers that get another tensor, and who makes the edit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import onnx_graphsurgeon as gs

from onnxq_plugins.errors import OnnxqError


def replace_reads(old: gs.Tensor, new: gs.Tensor) -> None:
    """Make all consumers of a tensor read another."""
    for consumer in list(old.outputs):
        for i, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[i] = new


def operand(named: Callable[[str], gs.Tensor], given: gs.Tensor | str | None) -> gs.Tensor:
    """What an operator is to read: a tensor by itself or by name, an empty one for None. Raises OnnxqError for others.

    named   a graph's tensor of a name
    """
    if given is None:
        return gs.Variable.empty()
    if isinstance(given, str):
        return named(given)
    if not isinstance(given, gs.Tensor):
        what = "an operator, not one of its outputs, such as node.outputs[0]" if isinstance(given, gs.Node) else "no tensor"
        raise OnnxqError(f"an input is {what} ({given!r:.60}); give tensors or their names; add_constant makes one.")
    return given


def caller() -> str:
    """The line outside this room that is being run, with its file and folder."""
    frame, room = sys._getframe(1), str(Path(__file__).parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(room):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}, line {frame.f_lineno}"
