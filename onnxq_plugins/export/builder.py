"""Operators and constants of a model that is being written, each under a name that nothing else has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins.files import DataFile
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.spec import Array


class Builder:
    """Collects what is added to a model.

    nodes       operators, in order
    constants   initializers, equal ones once
    """

    def __init__(self, model: onnx.ModelProto, mapped: MappedWeights, data: DataFile | None) -> None:
        """
        model    whose names are taken
        mapped   weights of the float model that stay in files
        data     takes the large constants as they are added
        """
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._mapped, self._data = mapped, data
        self._known: dict[tuple[Any, ...], str] = {}  # content of a constant -> its name
        graph = model.graph
        self._names = {name for node in graph.node for name in (*node.input, *node.output, node.name)}
        self._names |= {tensor.name for tensor in graph.initializer}

    def add(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attrs: Any) -> None:
        """Append an operator."""
        name = name or self.fresh(f"{outputs[0]}_node")
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), name, **attrs))

    def constant(self, name: str, values: Array) -> str:
        """The name of a constant with these values: `name`, numbered if that is taken, or that of an equal one."""
        values = np.ascontiguousarray(values) if values.ndim else values
        content = _content(values)
        if content not in self._known:
            self._known[content] = self.fresh(name)
            self.constants.append(self.tensor(values, self._known[content]))
        return self._known[content]

    def matrix(self, name: str, values: Array) -> str:
        """`constant`; or the transpose of a constant that is there: the head of a language model has its table's codes."""
        alike = (str(values.dtype), values.shape[::-1])
        if values.ndim != 2 or not any(content[:2] == alike for content in self._known) or _content(values) in self._known:
            return self.constant(name, values)
        turned = self._known.get(_content(np.ascontiguousarray(values.T)))
        if turned is None:
            return self.constant(name, values)
        output = self.fresh(name)
        self.add("Transpose", [turned], [output], perm=[1, 0])
        return output

    def tensor(self, values: Array, name: str) -> TensorProto:
        """An initializer; the data of a large one go to the data file."""
        with self._mapped.reading():
            tensor = numpy_helper.from_array(values, name)
            if self._data is not None:
                self._data.take(tensor)
        return tensor

    def fresh(self, name: str) -> str:
        """`name`, numbered if it is taken; it is taken from now on."""
        candidate, i = name, 1
        while candidate in self._names:
            candidate, i = f"{name}_{i}", i + 1
        self._names.add(candidate)
        return candidate


def _content(values: Array) -> tuple[Any, ...]:
    """What constants must have in common to be one."""
    return str(values.dtype), values.shape, hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()
