"""A plan for onnxruntime's own quantization tool: arguments of `onnxruntime.quantization.quantize_static`, and its model.

The tool rounds weights to the nearest code. `ort_model` therefore holds the values that the plan's codes stand for, with
matching biases: rounded to the nearest they give the same codes, including those chosen by output error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxq_plugins.errors import Expected, OnnxqError, expects
from onnxq_plugins.export.weights import stored_form
from onnxq_plugins.graph import Layer
from onnxq_plugins.graph.flow import maker_of, result_of
from onnxq_plugins.graph.opsets import NARROW_OPSET, raise_opset
from onnxq_plugins.job import Outcome
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.values import bias_values, weight_values
from onnxq_plugins.spec import Array, QuantSpec
from onnxq_plugins.targets import granularity_of
from onnxq_plugins.targets.refusals import needs_narrow

_RESULT: Expected = ((Outcome,), "what quantize returns")
# Operators whose outputs get the scale of their input from quantize_static, whatever the overrides say.
_SHARES_SCALE = frozenset({"AveragePool"})


@expects(result=_RESULT)
def ort_overrides(result: Outcome) -> dict[str, Any]:
    """What `quantize_static` needs in order to quantize `ort_model(result)` as planned, as plain values that JSON can hold.

    TensorQuantOverrides                tensor -> a list with one dictionary, or one per output channel of a weight:
                                        ``quant_type`` such as "QInt4", ``scale``, ``zero_point``, ``axis``
    DedicatedQDQPair                    true where tensors have float readers, which then read them unrounded
    OpTypesToExcludeOutputQuantization  operators that write float
    nodes_to_quantize                   the nodes that read quantized activations, and those that only pass them on
    notes                               what the tool cannot express

    Names are those of `ort_model(result)` and `result.float_model`, not of the file that was quantized. `ort_arguments`
    converts it to the tool's own objects. Raises OnnxqError if the plan quantizes nothing that the tool could quantize.
    """
    graph, plan = result.graph, result.plan
    planned = Planned(graph, plan, result.target)
    integer = planned.integer
    if not integer:
        raise OnnxqError(
            "overrides: no layer reads quantized activations, and onnxruntime's tool does not quantize weights "
            "alone; plan activations, too (activations.bits = 8)."
        )
    notes = _Notes()
    tensors = {name: [_activation(plan[key], name, notes)] for name, key in _scales(planned).items()}
    for layer in graph.layers:
        if layer.name in integer:
            tensors[layer.weight] = _weight(result, layer, notes)
        elif layer.weight in plan:
            notes.add("stay float, since the tool does not quantize weights beside float activations", layer.name)
    nodes = _nodes(planned)
    return {
        "TensorQuantOverrides": tensors,
        "DedicatedQDQPair": _dedicated_pairs(planned, set(nodes), notes),
        "OpTypesToExcludeOutputQuantization": _float_outputs(planned, notes),
        "nodes_to_quantize": nodes,
        "notes": notes.lines(),
    }


@expects(result=_RESULT)
def ort_model(result: Outcome) -> onnx.ModelProto:
    """The float model for `quantize_static` with the overrides: `result.float_model` with weights on the grids of the plan,
    and biases with the planned shifts."""
    graph, plan, model = result.graph, result.plan, result.float_model
    integer, new = Planned(graph, plan, result.target).integer, dict[str, Array]()
    nodes = {node.name: node for node in model.graph.node}
    taken = {tensor.name for tensor in model.graph.initializer} | {name for node in model.graph.node for name in node.output}
    for layer in graph.layers:
        spec = _written(result, layer) if layer.name in integer else None
        if spec is None:
            continue
        new[layer.weight] = weight_values(layer, spec)
        bias = bias_values(graph, layer, spec)
        if bias is not None and spec.shift is not None:
            name = layer.bias or f"{layer.name}_bias"
            while layer.bias is None and name in taken:
                name += "_"
            new[name] = bias.astype(np.float32)
            nodes[layer.name].input[2:] = [name]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in new]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(numpy_helper.from_array(values, name) for name, values in new.items())])
    if needs_narrow(result.target, plan):
        raise_opset(model, NARROW_OPSET)
    return model


@expects(overrides=((Outcome, Mapping, str, Path), "what ort_overrides returns, a Result or a file"))
def ort_arguments(overrides: Outcome | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Keyword arguments of `onnxruntime.quantization.quantize_static` beside the model, the output and the data.

    overrides   a Result, what `ort_overrides` returned, or a file with it

    Raises OnnxqError if a file cannot be read.
    """
    from onnxruntime.quantization import QuantFormat, QuantType

    table: Any = overrides
    if isinstance(overrides, (str, Path)):
        try:
            table = json.loads(Path(overrides).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OnnxqError(f"overrides '{overrides}' cannot be read: {error}.") from error
    elif not isinstance(overrides, Mapping):
        table = ort_overrides(overrides)
    if not isinstance(table, Mapping) or "TensorQuantOverrides" not in table:
        raise OnnxqError("overrides: it has no TensorQuantOverrides; give what ort_overrides or --overrides wrote.")
    integers = {"QUInt8": np.uint8, "QUInt16": np.uint16, "QInt8": np.int8, "QInt16": np.int16, "QInt4": np.int8}

    def objects(entry: Mapping[str, Any]) -> dict[str, Any]:
        values = {**entry, "quant_type": QuantType[entry["quant_type"]]}
        if "scale" in entry:  # the tool wants arrays
            values["scale"] = np.array(entry["scale"], np.float32)
            values["zero_point"] = np.array(entry["zero_point"], integers[entry["quant_type"]])
        return values

    return {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "nodes_to_quantize": list(table["nodes_to_quantize"]),
        "extra_options": {
            "TensorQuantOverrides": {
                n: [objects(e) for e in entries] for n, entries in table["TensorQuantOverrides"].items()
            },
            "DedicatedQDQPair": bool(table["DedicatedQDQPair"]),
            "OpTypesToExcludeOutputQuantization": list(table["OpTypesToExcludeOutputQuantization"]),
        },
    }


class _Notes:
    """Remarks, each with the layers or tensors that it is about."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}  # text -> what it is about

    def add(self, text: str, name: str) -> None:
        self.names.setdefault(text, []).append(name)

    def lines(self) -> list[str]:
        return [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {text}"
            for text, names in self.names.items()
        ]


def _scales(planned: Planned) -> dict[str, str]:
    """Tensors with quantized activations -> the planned one whose scale they have, including carried ones."""
    keys = {name: name for name in planned.activations}
    for node in planned.graph.nodes:
        if node.name in planned.carriers:
            keys |= {tensor.name: planned.source(tensor.name) for tensor in node.outputs}
    return {name: key for name, key in keys.items() if key}


def _nodes(planned: Planned) -> list[str]:
    """The nodes for the tool to process, in the order of the graph. It drops a Relu or Clip behind a quantized layer."""
    graph, names = planned.graph, planned.integer | planned.carriers
    for node in graph.nodes:
        after = graph.elided_activation(node.outputs[0].name) if node.name in planned.integer else None
        if after is not None and after.outputs[0].name in planned.plan:
            names.add(after.name)
    return [str(node.name) for node in graph.nodes if node.name in names]


def _dedicated_pairs(planned: Planned, nodes: set[str], notes: _Notes) -> bool:
    """True if each reader should have Q and DQ of its own. In our export float readers of a tensor that is computed in float
    read it unrounded; with the tool they do so only with dedicated pairs, and only where at least two readers are
    quantized."""
    needed = False
    for name in planned.activations:
        maker = maker_of(planned.graph, name)
        if maker is not None and maker.name in nodes:
            continue
        quantized = [reader.name in nodes for reader in planned.graph.consumers(name)]
        if not all(quantized) and sum(quantized) > 1:
            needed = True
        elif not all(quantized):
            notes.add("have float readers that get the rounded values, too", name)
    return needed


def _float_outputs(planned: Planned, notes: _Notes) -> list[str]:
    """Operators whose outputs are not quantized: their readers quantize them where needed. Not those followed by a Relu or
    Clip, which the tool drops only behind a quantized output."""
    graph, plan = planned.graph, planned.plan
    bare: dict[str, list[str]] = {}
    followed = set()
    for node in graph.nodes:
        if node.name not in planned.integer:
            continue
        if node.op in _SHARES_SCALE:
            notes.add("get the scale of their input, whatever is planned", node.name)
        result = result_of(graph, node)
        if result not in plan:
            bare.setdefault(node.op, []).append(node.name)
        elif result != node.outputs[0].name:
            followed.add(node.op)
    for op in sorted(followed & set(bare)):
        for name in bare[op]:
            notes.add("get quantized outputs that the plan leaves in float; 8 bits, with a range of the tool's own", name)
    return sorted(set(bare) - followed)


def _written(result: Outcome, layer: Layer) -> QuantSpec | None:
    """The entry of a weight as the tool can write it; None if it takes more than one scale per tensor or output channel."""
    graph, plan, spec = result.graph, result.plan, result.plan[layer.weight]
    rule = Planned(graph, plan, result.target).rule(layer)
    assert rule is not None
    spec, factor = stored_form(layer, spec, rule)
    plain = granularity_of(layer, spec) in ("tensor", "channel") and spec.multiplier is None and factor is None
    return spec if plain else None


def _weight(result: Outcome, layer: Layer, notes: _Notes) -> list[dict[str, Any]]:
    """The override of one weight."""
    bits, spec = result.plan[layer.weight].bits, _written(result, layer)
    kind = {"quant_type": "QInt4" if bits <= 4 else "QInt8" if bits <= 8 else "QInt16"}
    if bits <= 4:
        notes.add("stored in 4 bits, run in float: onnxruntime has no integer kernel for what its tool writes", layer.name)
    if spec is None:
        notes.add("lose their tiles, blocks or multipliers; the tool computes one scale per output channel", layer.name)
        return [{**kind, "axis": layer.out_axis}]
    axis = {"axis": layer.out_axis} if spec.block is not None else {}
    return [{**kind, **axis, "scale": float(s), "zero_point": 0} for s in np.ravel(np.asarray(spec.scale))]


def _activation(spec: QuantSpec, name: str, notes: _Notes) -> dict[str, Any]:
    """The override of one activation."""
    assert spec.scale is not None and spec.zero_point is not None
    if spec.bits not in (8, 16):
        notes.add("have codes in the next wider type, where values beyond their own width are not clipped", name)
    kind = f"Q{'' if spec.symmetric else 'U'}Int{8 if spec.bits <= 8 else 16}"
    return {"quant_type": kind, "scale": float(spec.scale), "zero_point": int(spec.zero_point)}
