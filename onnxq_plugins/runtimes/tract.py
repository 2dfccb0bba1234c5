"""tract: a runtime in Rust. Its profile tells the operators that ran, and of what type their products are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.kernels import coded, computed, conversions, layer_behind, moved
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime
from onnxq_plugins.runtimes.timing import milliseconds as timed
from onnxq_plugins.spec import Array

_INSTALL = "pip install 'onnxq-plugins[tract]'"
_TYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bool": "bool"}
_MOVES = [
    "AddAxis",
    "BroadcastTo",
    "Cast",
    "Concat",
    "Const",
    "DequantizeLinear",
    "Gather",
    "IntoShape",
    "LazyIm2col",
    "Im2Col",
    "Move",
    "MultiBroadcastTo",
    "OptMatMulPack",
    "Pad",
    "QuantizeLinear",
    "RemoveAxis",
    "Reshape",
    "RmAxis",
    "Slice",
    "Source",
    "StridedSlice",
    "Tile",
]


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    try:
        import tract
    except ImportError as error:
        raise OnnxqError(f"tract is not installed; {_INSTALL}.") from error
    proto = read(file)
    try:
        model = tract.onnx().load(str(file))
        names = [model.input_name(i) for i in range(model.input_count())]
        for number, name in enumerate(names) if samples else ():
            value = samples[0][name]
            kind = _TYPES.get(value.dtype.name, f"{value.dtype.kind}{8 * value.dtype.itemsize}")
            model.set_input_fact(number, ",".join([*map(str, value.shape), kind]))
        model.analyse()
        runnable = model.into_model().into_runnable()
        feeds = [[np.ascontiguousarray(sample[name]) for name in names] for sample in samples]
        results = [[each.to_numpy() for each in runnable.run(feed)] for feed in feeds]
        nodes = json.loads(runnable.profile_json(feeds[0]))["nodes"] if feeds else []
        milliseconds = timed(lambda: runnable.run(feeds[0])) if feeds else None
    except tract.TractError as error:
        raise OnnxqError(f"tract cannot run '{file.name}': {_cause(error)}.") from error
    outputs = [value.name for value in proto.graph.output]
    operators = _operators(nodes, proto.graph)
    made = tuple(dict(zip(outputs, result, strict=True)) for result in results)
    return Inspection(made, operators, milliseconds, {"version": tract.version()})


def _cause(error: Exception) -> str:
    """The innermost of the causes that tract prints one below the other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "stack backtrace" not in line.lower()]
    causes = [line.partition(": ")[2] for line in lines if line[:1].isdigit() and ": " in line]
    return " ".join((causes or lines or ["without a word"])[-1].split())[:300].rstrip(".")


def _operators(nodes: Sequence[Mapping[str, Any]], graph: onnx.GraphProto) -> tuple[Executed, ...]:
    """A layer, which may become several operators, is what the type of its multiply-adds says; what else computes is in
    float."""
    codes, still, layers = coded(graph), conversions(graph), layer_behind(graph)
    names = sorted({node.name for node in graph.node if node.name}, key=len, reverse=True)
    products: dict[tuple[str, str], list[str]] = {}
    rest: list[tuple[str, str]] = []
    for node in nodes:
        op, name = str(node["op_name"]), str(node["node_name"])
        own = next((each for each in names if name == each or name.startswith(each + ".")), name)
        layer = layers.get(own)
        key = (layer.name, layer.op_type) if layer is not None else (own, op)
        kinds = [kind for kind in node.get("cost", {}) if kind.startswith("FMA")]
        if kinds:
            products.setdefault(key, []).extend(kinds)
        elif "secs_per_iter" in node:
            rest.append((own, op))
    done = {name for name, _ in products}
    found = []
    for (name, op), kinds in products.items():
        integer = not any(kind.startswith("FMA(F") for kind in kinds)
        found.append(computed(name, op, integer, codes))
    for name, op in rest:
        layer = layers.get(name)
        nothing = op.startswith(tuple(_MOVES)) or name in still or (layer is not None and layer.name in done)
        found.append(moved(name, op) if nothing else computed(name, op, False, codes))
    return tuple(found)


TRACT = Runtime("tract", "tract, a runtime in Rust", _INSTALL, _inspect, module="tract")
