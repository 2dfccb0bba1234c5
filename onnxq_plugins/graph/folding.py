"""Constants that follow from constants and from known shapes are computed once, unless that makes the file larger or takes
chance out of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.core import Graph

_SLACK = 2**16  # bytes by which a constant may be larger than what it is computed from
_ROUNDS = 4  # a size that only the values of a constant show is known a round after that constant
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}
_BODIES, _HIDDEN = {"If", "Loop", "Scan", "SequenceMap"}, "|hidden"
_GROWING = {
    "ConstantOfShape",
    "Expand",
    "Tile",
    "Range",
    "EyeLike",
    "OneHot",
    "Pad",
    "Resize",
    "Upsample",
    "Gather",
    "Where",
}
_TEXT = {"StringNormalizer", "StringSplit", "StringConcat", "RegexFullMatch", "TfIdfVectorizer", "LabelEncoder"}


def fold_constants(graph: Graph) -> None:
    """Fold in place. Raises OnnxqError if the model cannot be folded, as for operators with impossible constants."""
    _fold_sizes(graph)
    for _ in range(_ROUNDS):
        waiting: set[str] = set()
        try:
            with _hidden_bodies(graph), _quiet_sessions():
                excluded = partial(_excluded, waiting)
                graph._graph.fold_constants(error_ok=True, size_threshold=2**31, should_exclude_node=excluded)
        except Exception as error:  # graphsurgeon makes assumptions
            raise OnnxqError(
                f"the constants of the model cannot be folded ({' '.join(str(error).split())[:200]}); check it "
                "with onnx.checker.check_model."
            ) from error
        graph.tidy()
        if not any(node.name in waiting and all(_constant(t) for t in node.inputs) for node in graph.nodes):
            return


@contextlib.contextmanager
def _quiet_sessions() -> Iterator[None]:
    """A context in which sessions without options, such as graphsurgeon's, do not log: their complaints are raised."""
    import onnxruntime as ort

    usual = ort.InferenceSession

    class Quiet(usual):  # type: ignore[misc, valid-type]
        def __init__(self, model: bytes, sess_options: ort.SessionOptions | None = None, **more: object) -> None:
            if sess_options is None:
                sess_options = ort.SessionOptions()
                sess_options.log_severity_level = 4
            super().__init__(model, sess_options, **more)

    ort.InferenceSession = Quiet
    try:
        yield
    finally:
        ort.InferenceSession = usual


@contextlib.contextmanager
def _hidden_bodies(graph: Graph) -> Iterator[None]:
    """A context in which graphsurgeon does not know operators with bodies, which it would look into."""
    nodes = [(node, node.op) for node in graph.nodes if node.op in _BODIES]
    for node, op in nodes:
        node.op = f"{op}{_HIDDEN}"
    try:
        yield
    finally:
        for node, op in nodes:
            node.op = op


def _constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or tensor.is_empty()


def _excluded(waiting: set[str], node: gs.Node) -> bool:
    """True if an operator on constants stays: it is random, it has a body or text, or its result is large.

    waiting   receives the names of operators whose results are of unknown size
    """
    if node.op in _RANDOM or node.op.endswith(_HIDDEN) or node.op in _TEXT or node.domain or "Sequence" in node.op:
        return True
    before = sum(_bytes(t) or 0 for t in node.inputs if not t.is_empty())
    sizes = [_bytes(t) for t in node.outputs if not t.is_empty()]
    if None in sizes:
        if node.op not in _GROWING:
            return False
        size = _size(node)
        if size is None:
            waiting.add(node.name)
            return True
        sizes = [size]
    return sum(size or 0 for size in sizes) > before + _SLACK


def _bytes(tensor: gs.Tensor) -> int | None:
    """Bytes of a tensor; None if its shape is unknown."""
    if isinstance(tensor, gs.Constant):
        return int(np.prod(tensor.shape, dtype=np.int64)) * 8 if tensor.values.dtype == object else int(tensor.values.nbytes)
    if tensor.shape is None or not all(isinstance(n, int) for n in tensor.shape):
        return None
    try:
        return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype or np.float32).itemsize
    except TypeError:
        return None


def _size(node: gs.Node) -> int | None:
    """Bytes that an operator's first output has at least, from the values of its constants; None if these are unknown."""
    if not all(isinstance(t, gs.Constant) for t in node.inputs if not t.is_empty()):
        return None
    values = [np.asarray(t.values) for t in node.inputs if not t.is_empty()]
    count: float | None = None
    with contextlib.suppress(Exception):  # values that do not fit: the operator fails where it runs
        if node.op == "ConstantOfShape":
            count = np.prod(values[0], dtype=np.float64)
        elif node.op == "Expand":
            count = np.prod(np.broadcast_shapes(values[0].shape, tuple(int(n) for n in values[1])), dtype=np.float64)
        elif node.op == "Tile":
            count = values[0].size * np.prod(values[1], dtype=np.float64)
        elif node.op == "Range":
            count = float((values[1] - values[0]) / values[2])
        elif node.op == "Gather":
            count = values[0].size / values[0].shape[node.attrs.get("axis", 0)] * values[1].size
        elif node.op == "Where":
            count = np.prod(np.broadcast_shapes(*(v.shape for v in values)), dtype=np.float64)
        else:
            count = sum(v.size for v in values)
    return None if count is None else int(8 * count)


def _fold_sizes(graph: Graph) -> None:
    """The number of axes, Size(Shape(x)) or Shape(Shape(x)), is known where single axes are not."""
    for node in graph.nodes:
        inner = node.inputs[0] if node.op in ("Size", "Shape") and not node.domain and node.inputs else None
        source = inner.inputs[0] if inner is not None and inner.inputs else None
        if source is None or source.op != "Shape" or source.attrs or node.attrs or source.inputs[0].shape is None:
            continue
        rank = np.array(len(source.inputs[0].shape), np.int64)
        constant = graph.add_constant(f"{node.outputs[0].name}_axes", rank if node.op == "Size" else rank.reshape(1))
        graph.bypass(node, constant)
    graph.tidy()
