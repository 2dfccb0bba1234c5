"""Models that cannot be quantized, in sentences.

What onnx would crash on is refused first: its shape inference aborts the process at a Slice of a negative size, so sizes
are checked beforehand, with Slices hidden, and weights are compared with their layers, since onnx's checker ignores
constants."""

from __future__ import annotations

import math

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.opsets import NARROW_OPSET, NEWEST_OPSET, OLDEST_OPSET
from onnxq_plugins.graph.reading import first_line

QUANTIZED_OPS = {
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
    "QGemm",
    "MatMulNBits",
    "QLinearAdd",
}
INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError)
HALF = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def invalid(where: str, error: Exception) -> OnnxqError:
    """The error for a model that onnx's checker or its shape inference refuses."""
    return OnnxqError(
        f"{where} is not a valid ONNX model: {first_line(error)}; export it again and check it with "
        "onnx.checker.check_model."
    )


def check_sizes(shell: onnx.ModelProto, where: str) -> None:
    """Raise OnnxqError for tensors too large for any machine, which value inference and constant folding would create, and
    for negative sizes, such as of a kernel larger than its input: onnx aborts the process when it infers a Slice of those,
    so Slices are hidden here."""
    shell.opset_import.add(domain="hidden", version=1)
    for node in shell.graph.node:
        if node.op_type == "Slice":
            node.domain = "hidden"
    try:
        inferred = onnx.shape_inference.infer_shapes(shell)
    except INVALID as error:
        raise invalid(where, error) from error
    weights = {t.name for t in shell.graph.initializer}
    for values, limit in ((inferred.graph.input, 2**28), (inferred.graph.value_info, 2**31), (inferred.graph.output, 2**31)):
        for value in values:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            if min(shape, default=0) < 0:
                raise OnnxqError(
                    f"{where}: tensor '{value.name}' has the impossible shape {shape}; fix the operator that computes it."
                )
            if math.prod(n for n in shape if n) > limit and value.name not in weights:
                raise OnnxqError(
                    f"{where}: tensor '{value.name}' of shape {shape} is too large to compute; fix the shapes in the model."
                )


def misfits(graph: Graph, where: str) -> list[str]:
    """Layers whose weight, groups and input do not fit together: onnx's checker ignores the shapes of constants."""
    problems = []
    for node in graph.nodes:
        if node.op == "Clip" and any(isinstance(t, gs.Constant) and t.values.size != 1 for t in node.inputs[1:]):
            problems.append(
                f"{where}: Clip '{node.name}' cannot run: its bounds must be single numbers; export the model again."
            )
        if node.op not in LAYER_OPS or node.domain or len(node.inputs) < 2 or not isinstance(node.inputs[1], gs.Constant):
            continue
        x, weight, attrs = node.inputs[0], node.inputs[1].values.shape, node.attrs
        groups, inputs, at = attrs.get("group", 1), 0, -1
        if node.op.startswith("Conv"):
            fits = len(weight) > 2 and groups > 0 and weight[0] % groups == 0
            inputs, at = (weight[1] * groups if node.op == "Conv" else weight[0]) if fits else 0, 1
            kernel = attrs.get("kernel_shape")
            fits = (
                fits
                and (kernel is None or list(kernel) == list(weight[2:]))
                and (x.shape is None or len(x.shape) == len(weight))
                and min(weight, default=0) > 0
            )
        elif node.op == "Gemm":
            fits = len(weight) == 2
            inputs, at = weight[1 if attrs.get("transB", 0) else 0] if fits else 0, 0 if attrs.get("transA", 0) else 1
        else:
            fits = len(weight) > 0
            inputs = weight[max(len(weight) - 2, 0)] if fits else 0
        if fits and x.shape is not None:
            size = x.shape[at] if len(x.shape) > max(at, 0) else None
            fits = len(x.shape) > max(at, 0) and (not isinstance(size, int) or size == inputs)
        if not fits:
            problems.append(
                f"{where}: {node.op} '{node.name}' cannot run: its weight of shape {list(weight)} does not fit its "
                f"input of shape {x.shape} and its attributes; export the model again."
            )
    return problems


def problems_of(proto: onnx.ModelProto, where: str, float32: bool) -> list[str]:
    """Why a model cannot be quantized at all, one sentence each.

    where     the model in words
    float32   half-precision models are to be converted
    """
    problems = []
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if not opset:
        problems.append(f"{where} imports no ai.onnx operators, so there is nothing to quantize.")
    elif opset < OLDEST_OPSET:
        problems.append(
            f"{where} uses opset {opset}, too old; export it with opset {OLDEST_OPSET} or newer ({NARROW_OPSET} is best)."
        )
    elif opset > NEWEST_OPSET:
        problems.append(
            f"{where} uses opset {opset}, too new: onnxruntime reads up to {NEWEST_OPSET}; export it with "
            f"opset {NARROW_OPSET}."
        )
    quantized = sorted({n.op_type for n in proto.graph.node} & QUANTIZED_OPS)
    if not quantized and any(entry.key == "onnxq.recipe" for entry in proto.metadata_props):
        quantized = ["weights in codes, by onnxq-plugins"]
    if quantized:
        what = ", ".join(quantized)
        problems.append(f"{where} is already quantized (it has {what}); give the float model it was made from.")
    narrow = {
        TensorProto.DataType.Name(t)
        for t in (
            *(t.data_type for t in proto.graph.initializer),
            *(v.type.tensor_type.elem_type for v in proto.graph.input),
        )
        if t >= TensorProto.FLOAT8E4M3FN
    }
    if narrow:
        problems.append(
            f"{where} has tensors of type {', '.join(sorted(narrow))}, so it is not a float model; give the "
            "float32 model it was made from."
        )
    if not quantized and (half := half_type(proto)) and not float32:
        problems.append(f"{where} is an {half} model; quantize its float32 original, or pass --float32 to convert it first.")
    return problems


def half_type(proto: onnx.ModelProto) -> str:
    """``fp16`` or ``bf16`` if a model has such tensors, else ""."""
    types = [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)]
    for graph in all_graphs(proto.graph):
        types += [t.data_type for t in graph.initializer]
        types += [a.t.data_type for n in graph.node for a in n.attribute if n.op_type == "Constant" and a.name == "value"]
    return next((name for code, name in HALF.items() if code in types), "")
