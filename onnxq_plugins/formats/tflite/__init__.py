"""QDQ ONNX -> .tflite, with the model's own scales: any QDQ model, without TensorFlow.

Every tensor that the model quantizes is one of codes in the file: activations int8 (uint8 codes less 128, which changes
nothing) or int16, weights int8 with a scale per tensor or output channel, biases int32 (int64) at the scale of the products.
An operator whose inputs and outputs are codes, and that LiteRT computes on codes, does so; others are computed in floats
between DEQUANTIZE and QUANTIZE. Softmax, Sigmoid and Tanh have grids that LiteRT prescribes: these take the place of the
model's.

Format: https://ai.google.dev/edge/litert, tensorflow/lite/schema/schema.fbs. Rules for codes: "LiteRT 8-bit quantization
specification", https://ai.google.dev/edge/litert/models/quantization_spec."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx

from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.formats.tflite.builder import Builder, Refused
from onnxq_plugins.formats.tflite.layouts import plain
from onnxq_plugins.formats.tflite.makers import MAKERS
from onnxq_plugins.formats.tflite.makers.layers import INT4
from onnxq_plugins.formats.tflite.reading import DQ, Node, Q, read_model
from onnxq_plugins.formats.tflite.schema import INSTALL

__all__ = ["CHOICES", "INSTALL", "PORTS", "SETTINGS", "write"]

PORTS, RECIPE, LABELS = "onnxq.ports", "onnxq", "labels.txt"  # names of metadata
SETTINGS: dict[str, Any] = {"io": "float", "layout": "onnx", "labels": [], "shapes": {}, "int4": "fast", "products": "float"}
CHOICES = {"io": ("float", "int8"), "layout": ("onnx", "native"), "int4": tuple(INT4), "products": ("float", "int8")}


def write(model: onnx.ModelProto, settings: Mapping[str, Any] | None = None) -> bytes:
    """The .tflite file of a QDQ (or float) model.

    settings   io        "float": inputs and outputs as in the model; "int8": the codes of those that are quantized
               layout    "onnx": inputs and outputs have the model's order of axes, so that what fed it feeds the file, too;
                         "native": the order in which the file computes (NHWC), which saves a TRANSPOSE at either end
               int4      where weights of 4 bits stay so: "fast": where LiteRT computes with them at no cost
                         (FULLY_CONNECTED); "all": in convolutions, too, which get slower; "none": int8 everywhere
               products  of two activations: "float": between DEQUANTIZE and QUANTIZE, which is faster on CPUs; "int8": as
                         the model has them
               labels    of the classes, stored as metadata ``labels.txt``
               shapes    of inputs whose sizes the model leaves open

    Raises OnnxqError, a sentence for each thing: what LiteRT cannot hold, operator by operator with counts and reasons; open
    sizes; unknown settings; ai-edge-litert is not installed.
    """
    chosen = {**SETTINGS, **(settings or {})}
    _check(chosen)
    source = read_model(model, chosen["shapes"])
    builder = Builder(source, chosen)
    for name in source.inputs:
        builder.model_input(name)
    refusals: Counter[tuple[str, str]] = Counter()
    lost: set[str] = set()
    for node in source.nodes:
        if node in builder.done:
            continue
        builder.at = node.outputs[0]
        if lost.intersection(node.inputs):
            lost |= set(node.outputs)
            if node.op not in (*MAKERS, Q, DQ):
                refusals[node.op, "LiteRT has no such operator"] += 1
            continue
        try:
            _make(builder, node)
        except Refused as reason:
            refusals[node.op, str(reason)] += 1
            lost |= {name for name in node.outputs if name}
    if refusals:
        what = "; ".join(f"{op} x{count}: {reason}" for (op, reason), count in sorted(refusals.items()))
        raise OnnxqError(f"LiteRT cannot hold the model: {what}.")
    outputs = {name: _output(builder, name) for name in source.outputs}
    _check_codes(builder, outputs)
    return _file(builder, outputs, model)


def _check(settings: Mapping[str, Any]) -> None:
    problems = [
        f"'{name}' is no setting of a .tflite file; {known(name, SETTINGS)}." for name in settings if name not in SETTINGS
    ]
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            problems.append(f"{name} = {settings[name]!r} is unknown; {known(str(settings[name]), choices)}.")
    OnnxqError.check(problems)


def _make(b: Builder, n: Node) -> None:
    if n.op == Q:
        _quantize(b, n)
    elif n.op == DQ:
        _dequantize(b, n)
    elif n.op in MAKERS:
        MAKERS[n.op](b, n)
    else:
        raise Refused("LiteRT has no such operator")


def _quantize(b: Builder, n: Node) -> None:
    """Codes: those that there are, or others. What is on a grid that LiteRT prescribes stays there."""
    x, grid = b.value(n.inputs[0]), b.source.grids.get(n.outputs[0])
    if grid is None:
        raise Refused("codes of a type, or with scales, that LiteRT has not for activations (8 and 16 bits, one scale)")
    kept = x.grid is not None and (x.grid == grid or x.prescribed)
    if kept or x.constant is not None:
        b.values[n.outputs[0]] = x
        return
    index = b.tensor(x, None, grid)
    b.values[n.outputs[0]] = b.computed(index, x.shape, x.order, grid)


def _dequantize(b: Builder, n: Node) -> None:
    """The values of codes are the tensor that the codes are."""
    x, grid = b.value(n.inputs[0]), b.source.grids.get(n.inputs[0])
    if x.grid is None and grid is not None and x.type in ("int8", "uint8", "int16", "uint16"):
        raise Refused("it decodes codes that the model does not quantize itself")
    if x.grid is None:
        raise Refused("codes of a type, or with scales, that LiteRT has not for activations (8 and 16 bits, one scale)")
    b.values[n.outputs[0]] = x


def _output(b: Builder, name: str) -> int:
    """The tensor of an output of the model, by its name in the file."""
    value, b.at = b.value(name), name
    order = plain(value.rank) if b.settings["layout"] == "onnx" or value.constant is not None else value.order
    codes = value.grid if b.settings["io"] == "int8" and value.grid is not None and value.constant is None else None
    index = b.tensor(value, order, codes)
    taken = index in {v.index for v in b.inputs.values()} or index in b.outputs or value.constant is not None
    if taken:  # an input, a constant or another output: a copy
        shape, kind = b.file.tensors[index].shape, value.type if codes is None else codes.type
        index = b.emit("RESHAPE", [index, b.ints(shape)], shape, kind, codes, kind="Reshape", newShape=list(shape))
    b.outputs[index] = name, value, order
    b.file.tensors[index].name = name
    return index


def _check_codes(b: Builder, outputs: Mapping[str, int]) -> None:
    """Raise OnnxqError for floats where codes are asked for."""
    if b.settings["io"] != "int8":
        return
    types = b.file.schema.TensorType
    ports = {name: value.index for name, value in b.inputs.items()} | dict(outputs)
    floats = [name for name, index in ports.items() if index >= 0 and b.file.tensors[index].type == types.FLOAT32]
    OnnxqError.check(
        f"'{name}' cannot be int8: the model does not quantize it; quantize inputs and outputs, or leave io = \"float\"."
        for name in floats
    )


def _file(b: Builder, outputs: Mapping[str, int], model: onnx.ModelProto) -> bytes:
    """The bytes, with the recipe of the model, the order of axes of what goes in and out, and labels."""
    for value in b.inputs.values():
        if value.index < 0:  # nothing reads it
            b.tensor(value, plain(value.rank), value.grid)
    inputs = {name: value.index for name, value in b.inputs.items()}
    ports = {name: list(value.order) for name, value in b.inputs.items()}
    ports |= {name: list(order) for name, _, order in b.outputs.values()}
    notes = {p.key: p.value for p in model.metadata_props}
    metadata = {PORTS: json.dumps(ports).encode(), RECIPE: json.dumps(notes).encode()}
    labels = chosen if (chosen := b.settings["labels"]) else notes.get("labels", "").splitlines()
    if labels:
        metadata[LABELS] = "\n".join(map(str, labels)).encode()
    return b.file.content(inputs, outputs, metadata, model.graph.name or "onnxq")
