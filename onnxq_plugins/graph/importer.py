"""From an ONNX file or ModelProto to a Graph: refuse models that cannot be quantized, then bring it into canonical form.

Whatever onnxruntime loads is taken: where onnx's checker or shape inference objects, onnxruntime is asked."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import skeleton
from onnxq_plugins.graph.beside import header_of, split
from onnxq_plugins.graph.canonical import canonicalize
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.folding import fold_constants
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.graph.models import Model, as_model
from onnxq_plugins.graph.normalize import inline_branches, name_nodes, node_names, normalize
from onnxq_plugins.graph.opsets import OWN_OPSET, QDQ_OPSET, opset_of, raise_opset
from onnxq_plugins.graph.reading import first_line, read
from onnxq_plugins.graph.refusals import INVALID, check_sizes, half_type, invalid, misfits, problems_of
from onnxq_plugins.graph.widen import to_float32

_BRANCHES = 8  # branches within branches that are decided one after the other


def load(model: Model, *, float32: bool = False, flatten: bool = True) -> Graph:
    """Read a float model.

    model     path, ModelProto (left alone), its bytes, a Graph (copied), an ONNXProgram of torch, or an onnx_ir.Model
    float32   convert an fp16, bf16 or float64 model to float32 first
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
    OnnxqError.check(problems_of(proto, where, float32))
    versions, names = (opset_of(proto), proto.ir_version), node_names(proto.graph)
    proto, notes = normalize(proto, where)
    if float32:
        kind = half_type(proto)
        if to_float32(proto):
            notes.append(f"{'half-precision' if kind else 'float64'} weights were converted to float32")
    names |= node_names(proto.graph)
    if not proto.graph.node:
        raise OnnxqError(f"{where} has no operator but constants, so there is nothing to quantize.")
    proto = _newer(proto, where)
    name_nodes(proto.graph)  # those the converter added
    header = header_of(proto)
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    logging.getLogger("onnx_graphsurgeon").setLevel(logging.CRITICAL)
    for attempt in range(_BRANCHES):
        _infer(proto, where)
        graph = Graph(*split(proto, header), notes=notes, mapped=mapped, versions=versions, imported=names)
        del proto
        graph.load_constants()
        if not attempt:
            OnnxqError.check(misfits(graph, where))
        fold_constants(graph)
        if not (decided := graph.decided_branches()):
            break
        proto = graph.model()
        inline_branches(proto, decided)
    canonicalize(graph, flatten)
    return graph


def _infer(proto: onnx.ModelProto, where: str) -> None:
    """Add inferred shapes to a model. Raises OnnxqError if it is invalid for onnx and for onnxruntime."""
    try:
        check_sizes(_without_weights(proto), where)
        inferred = onnx.shape_inference.infer_shapes(_without_weights(proto), data_prop=True)
        onnx.checker.check_model(inferred)  # after inference: runtimes accept outputs without a shape, the checker does not
    except INVALID as error:
        if not _loads(proto):
            raise invalid(where, error) from error
        return
    for part in ("value_info", "output"):
        proto.graph.ClearField(part)
        getattr(proto.graph, part).extend(getattr(inferred.graph, part))


def _loads(proto: onnx.ModelProto) -> bool:
    """True if onnxruntime loads a model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises a dozen types, protobuf its own for 2 GB
        return False
    return True


def _newer(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model in an opset that has scales per channel; those that have are left alone."""
    opset = opset_of(proto)
    if opset < OWN_OPSET:
        proto = _converted(proto, where, opset)
    if opset < QDQ_OPSET:
        own = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in proto.graph.value_info]
        try:
            inferred = onnx.shape_inference.infer_shapes(_without_weights(proto))
        except INVALID as error:
            raise invalid(where, error) from error
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(inferred.graph.value_info)  # how many axes a tensor has
        raise_opset(proto, QDQ_OPSET)
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(own)
    return proto


def _converted(proto: onnx.ModelProto, where: str, opset: int) -> onnx.ModelProto:
    """The model in the oldest opset that `raise_opset` reads, by onnx's converter, and what that loses."""
    try:
        converted = onnx.version_converter.convert_version(_without_weights(proto), OWN_OPSET)
    except Exception as error:  # the converter raises RuntimeError and its own types
        raise OnnxqError(
            f"{where} uses opset {opset}, and onnx cannot convert it to {OWN_OPSET} ({first_line(error)}); export it with "
            f"opset {QDQ_OPSET} or newer."
        ) from error
    small = {t.name for t in converted.graph.initializer}
    converted.graph.initializer.extend(t for t in proto.graph.initializer if t.name not in small)
    names = {i.name for i in proto.graph.input}
    kept = [i for i in converted.graph.input if i.name in names]
    del converted.graph.input[:]
    converted.graph.input.extend(kept)
    lost = skeleton(proto)
    for field in ("node", "input", "output", "value_info", "initializer"):
        lost.graph.ClearField(field)
    for field in ("opset_import", "functions"):
        lost.ClearField(field)
    lost.graph.ClearField("name")
    lost.ir_version = max(lost.ir_version, 4)
    converted.MergeFrom(lost)
    documented = {n.name: n for n in proto.graph.node}
    for node in converted.graph.node:
        if node.name in documented:
            node.doc_string = documented[node.name].doc_string
            node.metadata_props.extend(documented[node.name].metadata_props)
    return converted


def _without_weights(proto: onnx.ModelProto, limit: int = 1024) -> onnx.ModelProto:
    """The model with its larger weights as inputs: onnx's tools copy their argument several times."""
    shell = skeleton(proto)
    listed = {v.name for v in shell.graph.input}
    for tensor in proto.graph.initializer:
        if np.prod(tensor.dims) > limit or tensor.data_location == TensorProto.EXTERNAL:
            if tensor.name not in listed:
                shell.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            shell.graph.initializer.append(tensor)
    return shell
