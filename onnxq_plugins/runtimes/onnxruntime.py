"""Audit in onnxruntime: from its own optimized graph, on this machine."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxq_plugins import runtimes
from onnxq_plugins.data import Input, Source, model_inputs, open_data
from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.files import LARGE, size_of
from onnxq_plugins.graph.bodies import with_bodies
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.models import as_model
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.accumulators import Need, needs
from onnxq_plugins.runtimes.apart import CHILDREN, ask
from onnxq_plugins.runtimes.audit import (
    Audit,
    LayerAudit,
    audited,
    chain,
    constants_of,
    is_product,
    kept_in_float,
    outside_kernels,
    readers_of,
)
from onnxq_plugins.runtimes.constants import constant_bytes
from onnxq_plugins.runtimes.examples import Shapes, examples, first_running, guesses, written
from onnxq_plugins.runtimes.kernels import coded, from_profile
from onnxq_plugins.runtimes.profiles import profile
from onnxq_plugins.runtimes.runtime import Inspection, Runtime
from onnxq_plugins.runtimes.speed import Speed
from onnxq_plugins.runtimes.spending import INTEGER, Spending
from onnxq_plugins.spec import Array

QUANTIZED = {*INTEGER, "int8"}

_PRODUCT = Reason("product", 'a product of two activations; [[layer]] op = "Attention" quantize = true makes it integer')


def audit_model(
    model: onnx.ModelProto | str | Path,
    against: str | Path | onnx.ModelProto | None = None,
    seconds: float = 1.0,
    folder: Path | None = None,
    data: Source | None = None,
    shapes: Shapes | None = None,
) -> Audit:
    """Audit a model in onnxruntime.

    model     QDQ (or any) model
    folder    of the external data of a ModelProto
    against   the float model: both are timed and profiled, in turn, one thread
    seconds   of that; a few runs of each in any case. Where both have more than 1 GB there is no profile
    data      sample inputs (see `onnxq_plugins.data.open_data`), whose first the models are timed on
    shapes    or the shapes of inputs, to time them on random numbers; without either, `examples` has sizes for open axes

    Raises OnnxqError if onnxruntime cannot load the model, if the two cannot have the same inputs, and if they do not run on
    the data or shapes. Where no example runs, `Audit.untimed` says so.
    """
    known: Any = as_model(model)
    proto = read(known) if isinstance(known, Path) else known
    named = _named(proto)
    with tempfile.TemporaryDirectory() as scratch:
        dump = Path(scratch) / "optimized.onnx"
        session = runtimes.session(named, dump=dump, folder=folder)
        optimized = onnx.load(str(dump), load_external_data=False)
    whole, known = with_bodies(optimized.graph), with_bodies(named.graph)
    kept = kept_in_float(named)
    layers = tuple(
        row if row.quantized or row.name not in kept else replace(row, reason=kept[row.name])
        for row in _layers(known, whole, needs(named, folder))
    )
    running = {name: node.name for name, node in kernels(known, whole).items()}
    told = {running.get(layer.name) for layer in layers if layer.computes}
    other = Counter(n.op_type for n in whole.node if n.op_type not in QUANTIZED and (not n.name or n.name not in told))
    audit = Audit(layers, dict(other), constants=outside_kernels(named.graph, layers), total=constant_bytes(named.graph))
    if against is None and data is None and shapes is None:
        return audit
    models, runners, folders = [named], [session], [folder]
    if against is not None:
        models = [onnx.load(str(against)) if isinstance(against, (str, Path)) else against, named]
        runners, folders = [runtimes.session(models[0]), session], [None, folder]
    timed = replace(audit, **_timing(models, runners, folders, seconds, data, shapes))
    return replace(timed, nodes=running, placed=None if _ours(proto) else False)


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name for every operator."""
    if all(node.name for node in model.graph.node):
        return model
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for i, node in enumerate(named.graph.node):
        node.name = node.name or f"{node.op_type}_{node.output[0] if node.output else i}"
    return named


def _ours(model: onnx.ModelProto) -> bool:
    """True if onnxq made the model, by passes that it does not name here."""
    return any(entry.key.startswith("onnxq.") for entry in model.metadata_props)


def _timing(
    models: Sequence[onnx.ModelProto],
    runners: Sequence[runtimes.Session],
    folders: Sequence[Path | None],
    seconds: float,
    data: Source | None,
    shapes: Shapes | None,
) -> dict[str, Any]:
    """The fields of an Audit that are about time."""
    inputs = [model_inputs(model) for model in models]
    if not _compatible(inputs[0], inputs[-1]):
        raise OnnxqError(
            f"the two models cannot be timed on the same input, one reads {_shapes(inputs[1])}, the other "
            f"{_shapes(inputs[0])}; give the float model that this one was made from."
        )
    guess = " (sizes guessed: --data or --shape sets them)" if data is None and guesses(models, shapes) else ""
    feeds = [next(iter(open_data(data, inputs[-1])))] if data is not None else examples(models, shapes)
    try:
        feed = first_running(feeds, runners)
    except OnnxqError as error:
        if data is not None or shapes is not None:
            raise OnnxqError(f"the model cannot be timed {error}; give other --data or --shape.") from error
        return {"untimed": f"not timed: the model does not run {error}; give --data or --shape"}
    if sum(map(size_of, models)) > LARGE:  # each profile needs another session
        times = runtimes.latency(runners, [runtimes.wanted(runner, feed) for runner in runners], seconds)
        ratio = {"speedup": times[0] / times[1]} if len(times) > 1 else {}
        return {**ratio, "milliseconds": tuple(times), "timed": written(feed) + guess}
    profiles, _ = profile(models, feed, seconds, plain=runners, folders=folders, brief=True)
    found: dict[str, Any] = {"spending": tuple(map(Spending.of, profiles)), "timed": written(feed) + guess}
    if len(profiles) == 1:
        return {**found, "milliseconds": (profiles[0].milliseconds,)}
    speed = Speed.of([(a / 1e3, b / 1e3) for a, b in zip(*(one.runs for one in profiles), strict=True)])
    return {**found, "speed": speed, "speedup": speed.ratio, "milliseconds": (speed.reference, speed.quantized)}


def _compatible(own: list[Input], theirs: list[Input]) -> bool:
    """True if one feed could serve both."""
    needed, others = ({i.name: i.shape for i in inputs if not i.optional} for inputs in (own, theirs))
    return set(needed) == set(others) and all(
        shape is None
        or (other := others[name]) is None
        or (
            len(shape) == len(other)
            and not any(isinstance(n, int) and isinstance(m, int) and n != m for n, m in zip(shape, other, strict=True))
        )
        for name, shape in needed.items()
    )


def _shapes(inputs: list[Input]) -> str:
    return ", ".join(f"'{i.name}' {['any' if n is None else n for n in i.shape or ()]}" for i in inputs)


def kernels(graph: onnx.GraphProto, optimized: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Layers of a model by name -> the node of the runtime's optimized graph that runs them, if there is one.

    graph   every node has a name
    """
    by_name: dict[str, onnx.NodeProto] = {}
    by_output: dict[str, onnx.NodeProto] = {}
    for node in optimized.node:
        by_name.setdefault(plain_name(node.name), node)
        if node.name.endswith("_nchwc"):  # such nodes have the name of their output
            by_output[plain_name(node.name)] = node
        for output in node.output if node.op_type != "ReorderOutput" else ():
            by_output.setdefault(plain_name(output), node)
    readers = readers_of(graph)
    running = {}
    for node in graph.node:
        if node.op_type in LAYER_OPS and not node.domain:
            kernel = by_name.get(node.name) or by_name.get(node.output[0]) or _fused_into(node, readers, by_output)
            if kernel is not None:
                running[node.name] = kernel
    return running


def plain_name(name: str) -> str:
    """A name in an optimized graph without the suffix that a change of memory layout adds."""
    return re.sub(r"_token_\d+$|_nchwc$", "", name)


def _layers(graph: onnx.GraphProto, optimized: onnx.GraphProto, known: dict[str, Need]) -> list[LayerAudit]:
    running = kernels(graph, optimized)
    constants = constants_of(graph)
    rows = []
    for node in graph.node:
        if node.op_type not in LAYER_OPS or node.domain:
            continue
        kernel = running[node.name].op_type if node.name in running else "unknown"
        quantized = kernel in QUANTIZED
        reason = None if quantized else _reason(graph, node)
        rows.append(audited(node, constants, kernel, quantized, reason, known.get(node.output[0])))
    return rows


def _fused_into(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], by_output: dict[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The operator that a layer and its only readers (a bias, a scale, a Q) were fused into, by its output."""
    return next((by_output[n.output[0]] for n in chain(node, readers) if n.output[0] in by_output), None)


def _reason(graph: onnx.GraphProto, node: onnx.NodeProto) -> Reason:
    """The first reason why onnxruntime cannot run a layer as integer."""
    producers = {o: n for n in graph.node for o in n.output}
    types = {t.name: t.data_type for t in graph.initializer}
    readers = [n for n in graph.node if node.output[0] in n.input]
    while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = [n for n in graph.node if readers[0].output[0] in n.input]
    if node.op_type == "ConvTranspose":
        return Reason("unsupported", "onnxruntime has no integer ConvTranspose")
    weight, source = producers.get(node.input[1]), producers.get(node.input[0])
    constants = constants_of(graph)
    if any(
        n is not None and n.op_type != "DequantizeLinear" and n.output[0] in constants
        for n in (weight, source if node.op_type in ("Gemm", "MatMul") else None)
    ):
        return Reason("decoded", "its weight is decoded to float at load")
    decoded = any(n is not None and n.op_type == "DequantizeLinear" for n in (weight, source))
    if is_product(node, constants) and not decoded:
        return _PRODUCT
    if source is None or source.op_type != "DequantizeLinear":
        origin = f"operator '{source.name or source.op_type}'" if source is not None else "the model's input"
        if weight is None or weight.op_type != "DequantizeLinear":
            return Reason("unquantized", f"neither its input (from {origin}) nor its weight is quantized")
        return Reason("float-input", f"its input, from {origin}, is float")
    if _sixteen(types, source):
        origin = _origin(source, producers)
        return Reason("wide-codes", f"its input, {origin}, has 16-bit codes, for which there is no integer kernel")
    if any(_sixteen(types, n) for n in readers if n.op_type == "QuantizeLinear"):
        return Reason("wide-codes", "its output is quantized to 16-bit codes, for which there is no integer kernel")
    if weight is None or weight.op_type != "DequantizeLinear":
        return Reason("float-weight", "its weight is not quantized")
    if any(a.name == "block_size" and a.i for a in weight.attribute):
        return Reason("blocked", "its weight has blocked scales; use one scale per output channel")
    if types.get(weight.input[0]) in (TensorProto.INT4, TensorProto.UINT4):
        return Reason("undecoded", "its 4-bit weight goes straight into DequantizeLinear; insert a Cast to INT8")
    if node.op_type == "Conv" and (not readers or any(n.op_type != "QuantizeLinear" for n in readers)):
        other = next((n.name or n.op_type for n in readers if n.op_type != "QuantizeLinear"), "the model's output")
        if len(readers) == 1 and _shifts(graph, readers[0]):
            return Reason(
                "shifted",
                f"Mul '{other}' shifts its channels, as target per-tensor needs for one scale per weight, which "
                "onnxruntime runs in float",
            )
        return Reason("float-output", f"its output is read in float by {other}; quantize it")
    return Reason("runtime", "onnxruntime did not fuse it (check zero points and the bias scale s_x * s_w)")


def _origin(source: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> str:
    """What computes the values that a DequantizeLinear has from codes, in words."""
    node: onnx.NodeProto | None = source
    while node is not None and (not node.name or node.op_type in ("QuantizeLinear", "DequantizeLinear")):
        node = producers.get(node.input[0]) if node.input else None
    return f"from operator '{node.name}'" if node is not None else "from the model's input"


def _shifts(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """True if a node multiplies by constant powers of two."""
    factors = [
        onnx.numpy_helper.to_array(t)
        for t in graph.initializer
        if node.op_type == "Mul" and t.name in node.input and t.data_location != TensorProto.EXTERNAL
    ]
    return bool(factors) and bool((np.frexp(factors[0])[0] == 0.5).all())


def _sixteen(types: dict[str, int], node: onnx.NodeProto) -> bool:
    """True if a QuantizeLinear writes, or a DequantizeLinear reads, 16-bit codes."""
    return len(node.input) > 2 and types.get(node.input[2]) in (TensorProto.UINT16, TensorProto.INT16)


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    python = str(settings["python"]) or sys.executable
    program: list[str | Path] = [python, CHILDREN / "ort.py"]
    answer, outputs = ask(program, "onnxruntime", file, samples, settings["seconds"], qnn=None, dims={}, times=0.3)
    version = answer.get("version", "")
    if "ModuleNotFoundError" in answer.get("error", ""):
        raise OnnxqError(f"onnxruntime is not installed in '{python}' ({answer['error']}); pip install onnxruntime there.")
    if "error" in answer:
        raise OnnxqError(f"onnxruntime {version} cannot run '{file.name}': {answer['error'][:300].rstrip('.')}.")
    operators = from_profile(answer["events"], coded(read(file).graph))
    return Inspection(outputs, tuple(operators), answer["milliseconds"], {"version": version})


ONNXRUNTIME = Runtime(
    "onnxruntime",
    "onnxruntime's CPU provider, here or (--python) of another version in another Python",
    "pip install onnxruntime",
    _inspect,
    settings={"python": "", "seconds": 600.0},
)
