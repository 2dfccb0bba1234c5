"""Exact integer arithmetic on every machine. Kernels for x86-64 without VNNI add two products of an unsigned and a signed
code in 16 bits, which saturates; those for two unsigned codes are exact. So a comparison that is about the model and not
about the machine runs a copy whose weights have unsigned codes: the same numbers, through other kernels."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.graph.bodies import bodies
from onnxq_plugins.runtimes.accumulators import CodeSource
from onnxq_plugins.runtimes.machine import has_vnni
from onnxq_plugins.spec import Array

_LAYERS = ("Conv", "Gemm", "MatMul")


def exact_session(model: onnx.ModelProto, *, optimize: bool = True) -> runtimes.Session:
    """A session in which no kernel saturates. Unoptimized operators (`optimize` False) never do."""
    return runtimes.session(exact_model(model) if optimize else model, optimize=optimize)


def exact_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of the same numbers that no runtime on this machine saturates; the model itself where none does."""
    return unsigned_weights(model) if saturates() else model


@cache
def saturates() -> bool:
    """True if integer kernels of this machine can saturate."""
    return has_vnni() is False


def unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose int8 weights beside quantized inputs are uint8, codes and zero points 128 higher; the model itself if it
    has none."""
    if any(bodies(node) for node in model.graph.node):
        model = _with_exact_bodies(model)
    source = CodeSource(model, None)
    dequantizers = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    weights: dict[str, Array] = {}  # output of a weight's DequantizeLinear -> its codes
    for node in model.graph.node:
        if node.op_type in _LAYERS and not node.domain and node.input[0] in dequantizers:
            weight = dequantizers.get(node.input[1])
            if weight is not None and not any(a.name == "block_size" and a.i for a in weight.attribute):
                codes = source.values(weight.input[0])
                if codes is not None and codes.dtype == np.int8:
                    weights[node.input[1]] = codes
    if not weights:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in weights:
            name, scale = node.output[0], source.stored[node.input[1]]
            codes = (weights[name].astype(np.int16) + 128).astype(np.uint8)
            zeros = np.full(tuple(scale.dims), 128, np.uint8)
            new = [numpy_helper.from_array(codes, f"{name}|codes"), numpy_helper.from_array(zeros, f"{name}|zero")]
            copy.graph.initializer.extend(new)
            del node.input[2:]
            node.input[0] = new[0].name
            node.input.append(new[1].name)
    return copy


def _with_exact_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with `unsigned_weights` in the bodies of control flow."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for body in (body for node in copy.graph.node for body in bodies(node)):
        part = onnx.helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)
        body.CopyFrom(unsigned_weights(part).graph)
    return copy
