"""Audit in OpenVINO: the precision of each layer in its execution graph."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxq_plugins.errors import OnnxqError, Reason
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.runtimes.audit import Audit, audited, chain, constants_of, outside_kernels, readers_of
from onnxq_plugins.runtimes.constants import constant_bytes


def audit_openvino(model: str | Path) -> Audit:
    """Audit a model in OpenVINO. Needs the extra ``openvino``. Raises OnnxqError if OpenVINO cannot load it."""
    try:
        import openvino
    except ImportError as error:
        raise OnnxqError("OpenVINO is not installed; pip install 'onnxq-plugins[openvino]'.") from error
    proto = onnx.load(str(model))
    try:
        compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        text = str(error).strip().splitlines()[-1][:300]
        raise OnnxqError(f"OpenVINO cannot load '{model}' ({text}); quantize it with --target openvino.") from error
    precisions: dict[str, tuple[str, str, str]] = {}  # name in the model -> what runs it, its precision, its kernel
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        keys = ("originalLayersNames", "layerType", "runtimePrecision", "primitiveType")
        names, kind, precision, primitive = (info[key].astype(str) if key in info else "" for key in keys)
        if kind in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution"):
            for name in names.split(","):
                precisions[name.partition("/")[0]] = (kind, precision, primitive)
    constants, known, readers = constants_of(proto.graph), needs(proto), readers_of(proto.graph)
    rows = []
    for node in proto.graph.node:
        if node.op_type in LAYER_OPS:
            kind, precision, primitive = next(
                (precisions[name] for n in chain(node, readers) for name in (n.name, *n.output) if name in precisions),
                ("", "", ""),
            )
            integer, reason = _judged(precision, primitive)
            kernel = f"{kind or node.op_type} {precision or 'unknown'}"
            rows.append(audited(node, constants, kernel, integer, reason, known.get(node.output[0])))
    return Audit(tuple(rows), {}, constants=outside_kernels(proto.graph, rows), total=constant_bytes(proto.graph))


def _judged(precision: str, primitive: str) -> tuple[bool, Reason | None]:
    """Whether a kernel computes on integers, and why not. The precision of one that multiplies floats by weights in few bits
    is that of the weights; the name of what it computes with ends it, as in brgemm_avx512_f32."""
    narrow = precision in _BITS
    if not narrow:
        return False, Reason("runtime", "OpenVINO runs it in floating point")
    if primitive.endswith(("f32", "f16", "bf16")) or _BITS[precision] < 8:
        return False, Reason("decoded", f"OpenVINO multiplies floats by weights that it keeps in {_BITS[precision]} bits")
    return True, None


_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4}
