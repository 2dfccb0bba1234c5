"""From an ONNX file or ModelProto to a Graph: refuse models that cannot be quantized, then bring it into canonical form.

What onnx would crash on is refused first: its shape inference aborts the process at a Slice of a negative size, so sizes
are checked beforehand, with Slices hidden, and weights are compared with their layers, since onnx's checker ignores
constants."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import skeleton
from onnxq_plugins.graph.canonical import canonicalize
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.graph.models import Model, as_model

# What onnxruntime 1.31 reads (docs/runtime.md), and the version from which int4 tensors, Gelu and LayerNormalization exist.
BEST_OPSET, OLDEST_OPSET, NEWEST_OPSET = 21, 7, 26
IR_OF_OPSET = {21: 10, 22: 10, 23: 11, 24: 11, 25: 12, 26: 13}
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
_INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError)
HALF = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def load(model: Model, *, float32: bool = False, flatten: bool = True) -> Graph:
    """Read a float model.

    model     path, ModelProto (left alone), its bytes, a Graph (copied), an ONNXProgram of torch, or an onnx_ir.Model
    float32   convert an fp16 or bf16 model to float32 first
    flatten   turn MatMul + Add on tokens into two-dimensional Gemms, which onnxruntime runs faster as integer

    Raises OnnxqError for files that cannot be read, half-precision, already quantized, invalid or too old or new
    models, and external data outside the model's folder.
    """
    model = as_model(model)
    if isinstance(model, Graph):
        return model.copy()
    mapped = MappedWeights()
    if isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
        where = "the given model"
    else:
        proto, where = read(model, mapped), f"'{model}'"
    try:
        return _imported(proto, where, float32, flatten, mapped)
    except UnicodeDecodeError as error:
        raise OnnxqError(f"{where} has names that are not text (corrupt?); export or download it again.") from error


def _imported(proto: onnx.ModelProto, where: str, float32: bool, flatten: bool, mapped: MappedWeights) -> Graph:
    notes: list[str] = []
    OnnxqError.check(_problems(proto, where, float32))
    if float32 and _half(proto):
        proto = _to_float32(proto)
        notes.append("half-precision weights were converted to float32")
    constants = {t.name for t in proto.graph.initializer}
    inputs = [i for i in proto.graph.input if i.name not in constants]  # initializers that a caller could override
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.ir_version = max(proto.ir_version, 4)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value < 0:  # onnxruntime reads it as dynamic
                size.Clear()
    _name_nodes(proto.graph)
    _check_sizes(_without_weights(proto), where)
    proto = _raise_opset(proto, where, notes)
    _name_nodes(proto.graph)  # those the converter added
    try:
        shell = _without_weights(proto)
        inferred = onnx.shape_inference.infer_shapes(shell, data_prop=True)
        onnx.checker.check_model(inferred)  # after inference: runtimes accept outputs without a shape, the checker does not
    except _INVALID as error:
        raise _invalid(where, error) from error
    for part in ("value_info", "output"):
        proto.graph.ClearField(part)
        getattr(proto.graph, part).extend(getattr(inferred.graph, part))
    header = shell
    for part in ("initializer", "input", "output", "value_info", "node"):
        header.graph.ClearField(part)
    header.graph.node.extend(onnx.NodeProto(name=n.name, doc_string=n.doc_string) for n in proto.graph.node if n.doc_string)
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR
    logging.getLogger("onnx_graphsurgeon").setLevel(logging.ERROR)
    imported = gs.import_onnx(proto)
    # a part of a protobuf message keeps the whole message in memory, weights included
    imported.import_domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in proto.opset_import]
    graph = Graph(imported, header, notes=notes, mapped=mapped)
    del proto, inferred
    graph.load_constants()
    OnnxqError.check(_misfits(graph, where))
    canonicalize(graph, flatten)
    return graph


def _invalid(where: str, error: Exception) -> OnnxqError:
    return OnnxqError(
        f"{where} is not a valid ONNX model: {_first_line(error)}; export it again and check it with "
        "onnx.checker.check_model."
    )


def bytes_on_disk(path: Path) -> int:
    """Size of a model's file and of the files beside it with its external data."""
    beside = {
        entry.value
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in beside)))


def read(path: Path, mapped: MappedWeights | None = None) -> onnx.ModelProto:
    """The file as a ModelProto with its external data. Raises OnnxqError in one sentence if that fails.

    mapped   receives the large float32 weights of external data, which then stay in their files: the ModelProto refers to
             them
    """
    if path.is_dir():
        raise OnnxqError(f"model '{path}' is a folder; give the path of an .onnx file.")
    if not path.is_file():
        raise OnnxqError(f"model '{path}' does not exist; give the path of an .onnx file.")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises several types for bytes that are not a model
        raise OnnxqError(
            f"'{path}' is not a readable ONNX model (corrupt or truncated?); export or download it again."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise OnnxqError(f"'{path}' holds no ONNX graph (corrupt, truncated or another format?); export it again.")
    try:
        _check_external(proto, path)
        in_files = [t for t in proto.graph.initializer if mapped is not None and mapped.take(t, path.parent)]
        for tensor in in_files:  # not to be loaded
            tensor.data_location = TensorProto.DEFAULT
        load_external_data_for_model(proto, str(path.parent.resolve()))
        for tensor in in_files:
            tensor.data_location = TensorProto.EXTERNAL
        for tensor in proto.graph.initializer:  # truncated raw_data is only noticed when it is read
            if tensor.HasField("raw_data"):
                _ = numpy_helper.to_array(tensor)
    except OnnxqError:
        raise
    except Exception as error:
        raise OnnxqError(
            f"'{path}': its weights cannot be read ({_first_line(error)}); export or download it again."
        ) from error
    return proto


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    """Raise OnnxqError if weights are in a file that is missing, or outside the model's folder."""
    folder = path.parent.resolve()
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor):
            location = next((e.value for e in tensor.external_data if e.key == "location"), "")
            shown = repr(location if len(location) < 200 else f"{location[:200]}...")
            try:
                file = (folder / location).resolve()
                exists = file.is_file()
            except (OSError, ValueError):  # too long, or with a zero byte
                file, exists = folder / "?", False
            if not file.is_relative_to(folder):
                raise OnnxqError(
                    f"'{path}': weight '{tensor.name}' points to {shown}, outside the model's folder; "
                    "for safety only files beside the model are read, so save the model again."
                )
            if not exists:
                raise OnnxqError(
                    f"'{path}': the file {shown} with the data of weight '{tensor.name}' is missing; "
                    "put it beside the model."
                )


def _check_sizes(shell: onnx.ModelProto, where: str) -> None:
    """Raise OnnxqError for tensors too large for any machine, which value inference and constant folding would create, and
    for negative sizes, such as of a kernel larger than its input: onnx aborts the process when it infers a Slice of those,
    so Slices are hidden here."""
    shell.opset_import.add(domain="hidden", version=1)
    for node in shell.graph.node:
        if node.op_type == "Slice":
            node.domain = "hidden"
    try:
        inferred = onnx.shape_inference.infer_shapes(shell)
    except _INVALID as error:
        raise _invalid(where, error) from error
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


def _misfits(graph: Graph, where: str) -> list[str]:
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


def _problems(proto: onnx.ModelProto, where: str, float32: bool) -> list[str]:
    problems = []
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if not opset:
        problems.append(f"{where} imports no ai.onnx operators, so there is nothing to quantize.")
    elif opset < OLDEST_OPSET:
        problems.append(
            f"{where} uses opset {opset}, too old; export it with opset {OLDEST_OPSET} or newer ({BEST_OPSET} is best)."
        )
    elif opset > NEWEST_OPSET:
        problems.append(
            f"{where} uses opset {opset}, too new: onnxruntime reads up to {NEWEST_OPSET}; export it with "
            f"opset {BEST_OPSET}."
        )
    quantized = {n.op_type for n in proto.graph.node} & QUANTIZED_OPS
    if quantized:
        problems.append(
            f"{where} is already quantized (it has {', '.join(sorted(quantized))}); give the float model it was made from."
        )
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
    if (half := _half(proto)) and not float32:
        problems.append(f"{where} is an {half} model; quantize its float32 original, or pass --float32 to convert it first.")
    return problems


def _half(proto: onnx.ModelProto) -> str:
    """``fp16`` or ``bf16`` if a model has such tensors, else ""."""
    types = [t.data_type for t in proto.graph.initializer]
    types += [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)]
    types += [a.t.data_type for n in proto.graph.node for a in n.attribute if n.op_type == "Constant" and a.name == "value"]
    return next((name for code, name in HALF.items() if code in types), "")


def _to_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Weights, inputs, outputs and casts of a half-precision model in float32."""

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type in HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    for tensor in proto.graph.initializer:
        widen(tensor)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if value.type.tensor_type.elem_type in HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i in HALF:
                attribute.i = TensorProto.FLOAT
    return proto


def _raise_opset(proto: onnx.ModelProto, where: str, notes: list[str]) -> onnx.ModelProto:
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset < BEST_OPSET:
        try:
            converted = onnx.version_converter.convert_version(_without_weights(proto), BEST_OPSET)
        except Exception as error:  # the converter raises RuntimeError and its own types
            if opset < 13:
                raise OnnxqError(
                    f"{where} uses opset {opset}, and onnx cannot convert it to {BEST_OPSET} "
                    f"({_first_line(error)}); export it with opset 13 or newer."
                ) from error
            notes.append(f"opset {opset} was kept, since onnx could not convert it to {BEST_OPSET}: {_first_line(error)}")
        else:
            opset = BEST_OPSET
            small = {t.name for t in converted.graph.initializer}
            converted.graph.initializer.extend(t for t in proto.graph.initializer if t.name not in small)
            names = {i.name for i in proto.graph.input}
            inputs = [i for i in converted.graph.input if i.name in names]
            del converted.graph.input[:]
            converted.graph.input.extend(inputs)
            del converted.metadata_props[:]
            converted.metadata_props.extend(proto.metadata_props)
            for field in ("doc_string", "producer_name", "producer_version", "domain", "model_version"):
                setattr(converted, field, getattr(proto, field))
            converted.graph.doc_string = proto.graph.doc_string
            docs = {n.name: n.doc_string for n in proto.graph.node}
            for node in converted.graph.node:
                node.doc_string = docs.get(node.name, "")
            proto = converted
    proto.ir_version = max(min(proto.ir_version, 13), IR_OF_OPSET.get(opset, 10))
    return proto


def _without_weights(proto: onnx.ModelProto, limit: int = 1024) -> onnx.ModelProto:
    """The model with its larger weights as inputs: onnx's tools copy their argument several times."""
    shell = skeleton(proto)
    for tensor in proto.graph.initializer:
        if np.prod(tensor.dims) > limit or tensor.data_location == TensorProto.EXTERNAL:
            shell.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            shell.graph.initializer.append(tensor)
    return shell


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every operator a unique name: overrides, reports and the audit refer to operators by name."""
    taken: set[str] = set()
    for node in graph.node:
        name = node.name or f"{node.op_type}_{next((o for o in node.output if o), '')}"
        candidate, i = name, 1
        while candidate in taken:
            candidate, i = f"{name}_{i}", i + 1
        node.name = candidate
        taken.add(candidate)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".;: ")[:200]
