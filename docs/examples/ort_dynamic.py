"""A script for onnxruntime's quantize_dynamic, its import changed: weights of a language model's layers, without data."""

import os
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins.ort import DynamicQuantConfig, QuantType, quantize, quantize_dynamic

rng = np.random.default_rng(0)
sizes, nodes, weights, tensor = (256, 1024, 1024, 256), [], [], "tokens"
for n, (inputs, outputs) in enumerate(pairwise(sizes)):
    values = rng.normal(scale=inputs**-0.5, size=(inputs, outputs))
    weights.append(numpy_helper.from_array(values.astype(np.float32), f"weight{n}"))
    nodes.append(helper.make_node("MatMul", [tensor, f"weight{n}"], [f"product{n}"], f"product{n}"))
    nodes.append(helper.make_node("Tanh", [f"product{n}"], [tensor := f"layer{n}"], f"tanh{n}"))
ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 256]) for name in ("tokens", tensor)]
graph = helper.make_graph(nodes, "layers", ports[:1], ports[1:], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "layers.onnx")

quantize_dynamic("layers.onnx", "layers.all.onnx", weight_type=QuantType.QInt8)
config = DynamicQuantConfig(weight_type=QuantType.QInt8, nodes_to_exclude=["product2"])
quantize("layers.onnx", "layers.some.onnx", config)

tokens = rng.normal(size=(8, 256)).astype(np.float32)
reference = None
for path in ("layers.onnx", "layers.all.onnx", "layers.some.onnx"):
    output = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"tokens": tokens})[0]
    reference = output if reference is None else reference
    noise = np.mean((output - reference) ** 2)
    sqnr = 10 * np.log10(np.mean(reference**2) / noise) if noise else np.inf
    print(f"{path}: {os.path.getsize(path)} bytes, SQNR {sqnr:.1f} dB")
