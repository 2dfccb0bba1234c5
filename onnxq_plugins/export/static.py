"""Fixed shapes, for runtimes that plan their memory ahead.

Inputs get the shape of a sample where the model leaves axes open; what follows from shapes alone becomes constant, and every
tensor's shape is written into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import files, runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.bodies import outer_reads
from onnxq_plugins.spec import Array

_SMALL = 2**10  # values at most of constants from which shapes follow


def fix_shapes(model: onnx.ModelProto, sizes: Mapping[str, Sequence[int]], target: str, folder: Path | None = None) -> None:
    """Fix the shapes of a model in place. Raises OnnxqError where an axis other than the batch is open and there is no
    sample.

    sizes    shapes of a sample by input; without them an open first axis is 1
    target   for whom, in the error
    folder   of the model's external data
    """
    graph = model.graph
    given = {t.name for t in graph.initializer}
    shapes = {
        v.name: _fixed(v, sizes.get(v.name)) for v in graph.input if v.name not in given and v.type.HasField("tensor_type")
    }
    OnnxqError.check(
        f"target '{target}' needs fixed shapes, and the model leaves axes of input '{name}' open; give samples, or export "
        "the model with fixed shapes."
        for name, shape in shapes.items()
        if shape is None
    )
    inputs = {v.name: v for v in graph.input if v.name in shapes}
    closed = all(map(_whole, inputs.values()))
    for name, value in inputs.items():
        value.CopyFrom(helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, shapes[name]))
    if closed and not any(node.op_type in ("Shape", "Size") for node in graph.node):
        _infer(model)
        return
    kinds = {n: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for n, v in inputs.items()}
    sample = {n: np.zeros(shapes[n] or (), kind) for n, kind in kinds.items()}
    _fold_sizes(model, sample, folder)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    _infer(model)
    _run_for_rest(model, sample, folder)


def _fixed(value: onnx.ValueInfoProto, sizes: Sequence[int] | None) -> list[int] | None:
    """The shape that an input gets; None if it cannot be known."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None if sizes is None else list(sizes)
    known = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    if sizes is None:
        sizes = [1, *(-1 for _ in known[1:])] if known else []
    fixed = [size if n is None else n for n, size in zip(known, sizes, strict=True)]
    return None if -1 in fixed else [int(n) for n in fixed]


def _fold_sizes(model: onnx.ModelProto, sample: Mapping[str, Array], folder: Path | None) -> None:
    """Make what follows from shapes alone constant, by a run."""
    graph = model.graph
    known = {t.name for t in graph.initializer}
    derived: set[str] = set()
    for node in graph.node:
        plain = not node.domain and not outer_reads(node) and node.op_type not in ("DequantizeLinear", "QuantizeLinear")
        follows = any(name in derived for name in node.input) and all(n in known or n in derived for n in node.input if n)
        if node.op_type in ("Shape", "Size") or (plain and follows):
            derived.update(filter(None, node.output))
    ends = {name for node in graph.node if not derived.issuperset(node.output) for name in (*node.input, *outer_reads(node))}
    wanted = sorted(derived & ends)
    if not wanted:
        return
    for name, values in zip(wanted, _run(model, sample, wanted, folder), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    outputs = {v.name for v in graph.output}
    _keep(graph, [n for n in graph.node if not derived.issuperset(n.output) or outputs.intersection(n.output)])


def _keep(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Leave these operators, in the graph's order, and the constants that they read."""
    ids = {id(node) for node in nodes}
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node if id(node) in ids]
    del graph.node[:]
    graph.node.extend(copies)
    reads = {name for node in graph.node for name in (*node.input, *outer_reads(node))} | {v.name for v in graph.output}
    for at in reversed(range(len(graph.initializer))):
        if graph.initializer[at].name not in reads:
            del graph.initializer[at]


def _infer(model: onnx.ModelProto) -> None:
    """Add inferred shapes; large constants are left out of what onnx's tool copies."""
    shell = files.skeleton(model)
    for tensor in model.graph.initializer:
        small = tensor.data_location != TensorProto.EXTERNAL and int(np.prod(tensor.dims)) <= _SMALL
        shell.graph.initializer.append(
            tensor if small else TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        )
    try:
        inferred = onnx.shape_inference.infer_shapes(shell, data_prop=True)
    except Exception:  # onnx's own, of several types: a run tells then
        return
    for part in ("value_info", "output"):
        model.graph.ClearField(part)
        getattr(model.graph, part).extend(getattr(inferred.graph, part))


def _run_for_rest(model: onnx.ModelProto, sample: Mapping[str, Array], folder: Path | None) -> None:
    """Shapes that inference does not find, by a run."""
    graph = model.graph
    known = {v.name for v in (*graph.value_info, *graph.output) if _whole(v)}
    rest = [n for node in graph.node for n in node.output if n and n not in known]
    if not rest:
        return
    values = dict(zip(rest, _run(model, sample, rest, folder), strict=True))
    arrays = {n: x for n, x in values.items() if isinstance(x, np.ndarray)}
    inner = arrays.keys() - {o.name for o in graph.output}
    stated = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.value_info if v.name not in arrays]
    del graph.value_info[:]
    graph.value_info.extend([*stated, *(_stated(name, arrays[name]) for name in sorted(inner))])
    for value in graph.output:
        if value.name in arrays:
            value.CopyFrom(_stated(value.name, arrays[value.name]))


def _stated(name: str, value: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _whole(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)


def _run(model: onnx.ModelProto, sample: Mapping[str, Array], names: Sequence[str], folder: Path | None) -> Sequence[Array]:
    """Some tensors of a model in a run on one sample."""
    trial = onnx.ModelProto()
    trial.CopyFrom(model)
    del trial.graph.output[:]
    trial.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = runtimes.session(trial, optimize=False, lean=True, folder=folder)
    values: Sequence[Array] = session.run(list(names), dict(sample))
    return values
