"""An activation as one thing, whatever it is written as: SiLU is x * Sigmoid(x), Mish is x * Tanh(Softplus(x)), and either
is one function of one tensor.

Operators that compute, from a tensor and scalar constants alone, one tensor that others read are such a function. It is
evaluated operator by operator, so that no list of known activations is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.functions import erf
from onnxq_plugins.spec import Array

_MOST = 8  # operators


def _softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def _sigmoid(x: Array) -> Array:
    return np.exp(-_softplus(-x))


_UNARY: dict[str, Callable[[gs.Node, Array], Array]] = {
    "Sigmoid": lambda _, x: _sigmoid(x),
    "Tanh": lambda _, x: np.tanh(x),
    "Softplus": lambda _, x: _softplus(x),
    "Softsign": lambda _, x: x / (1 + np.abs(x)),
    "Erf": lambda _, x: erf(x),
    "Relu": lambda _, x: np.maximum(x, 0),
    "LeakyRelu": lambda n, x: np.where(x < 0, n.attrs.get("alpha", 0.01) * x, x),
    "Elu": lambda n, x: np.where(x < 0, n.attrs.get("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x),
    "HardSigmoid": lambda n, x: np.clip(n.attrs.get("alpha", 0.2) * x + n.attrs.get("beta", 0.5), 0, 1),
    "Swish": lambda n, x: x * _sigmoid(n.attrs.get("alpha", 1.0) * x),
    "HardSwish": lambda _, x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Gelu": lambda _, x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "Mish": lambda _, x: x * np.tanh(_softplus(x)),
}
_BINARY: dict[str, Callable[..., Array]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
_NAMES: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("SiLU", lambda x: x * _sigmoid(x)),
    ("QuickGELU", lambda x: x * _sigmoid(1.702 * x)),
    ("HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("Mish", lambda x: x * np.tanh(_softplus(x))),
    ("GELU", lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
)


@dataclass(frozen=True, eq=False)
class Activation:
    """A function of one tensor.

    input, output   names of tensors
    inner           names of the tensors in between
    nodes           its operators, in topological order
    """

    input: str
    output: str
    inner: tuple[str, ...]
    nodes: tuple[gs.Node, ...]

    def __call__(self, x: Array) -> Array:
        """Its values at some points, float64."""
        known: dict[str, Array] = {self.input: np.asarray(x, np.float64)}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                inputs = [known[t.name] if t.name in known else np.asarray(t.values.item()) for t in node.inputs]
                known[node.outputs[0].name] = (
                    np.asarray(_UNARY[node.op](node, inputs[0])) if node.op in _UNARY else _BINARY[node.op](*inputs)
                )
        return known[self.output]

    @property
    def name(self) -> str:
        """What it is called: SiLU, GELU ... or its operators."""
        grid = np.linspace(-8, 8, 65)
        known = next((name for name, f in _NAMES if np.allclose(self(grid), f(grid), atol=1e-4)), "")
        return known or " x ".join(node.op for node in self.nodes)


def activation_of(graph: Graph, name: str) -> Activation | None:
    """The activation that alone reads a tensor; None if others read it, or what reads it is no such function."""
    if name in graph.outputs:
        return None
    inside: dict[str, gs.Node] = {}
    tensors = {name}
    while len(inside) <= _MOST:
        open_ends = {t: [n for n in graph.consumers(t) if n.name not in inside] for t in tensors}
        open_ends = {t: nodes for t, nodes in open_ends.items() if nodes or t in graph.outputs}
        if len(open_ends) == 1 and inside and name not in open_ends:
            (output,) = open_ends
            nodes = tuple(n for n in graph.nodes if n.name in inside)
            return Activation(name, output, tuple(sorted(tensors - {name, output})), nodes)
        more = [n for t, nodes in open_ends.items() for n in nodes if _scalar(graph, n, tensors)]
        if not more:
            return None
        inside |= {n.name: n for n in more}
        tensors |= {n.outputs[0].name for n in more}
    return None


def _scalar(graph: Graph, node: gs.Node, tensors: set[str]) -> bool:
    """True if an operator computes one value from each value of some tensors and scalars."""
    if node.domain or node.op not in (*_UNARY, *_BINARY) or len(node.outputs) != 1:
        return False
    return all(
        t.name in tensors or (isinstance(t, gs.Constant) and t.values.size == 1 and t.values.dtype.kind == "f")
        for t in node.inputs
    )
