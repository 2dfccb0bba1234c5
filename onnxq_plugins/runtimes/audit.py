"""What a runtime really executes: for every layer of a model the kernel that runs it, and if that is a float kernel,
why. Read off the runtime's own optimized graph, on this machine."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from onnxq_plugins import runtimes
from onnxq_plugins.data import Input, model_inputs
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.core import LAYER_OPS
from onnxq_plugins.runtimes.accumulators import Need, needs

QUANTIZED = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "QAttention",
    "int8",
}

_PRODUCT = 'a product of two activations; [[layer]] op = "Attention" quantize = true makes it integer'


@dataclass(frozen=True)
class LayerAudit:
    """One layer: its operator, whether its weight is constant, the kernel that runs it, and why it is float.

    product       it multiplies two activations, as attention does: no layer, but multiply-adds all the same
    accumulator   bits of the smallest signed accumulator that no input overflows (without the bias); None where the model
                  does not hold the layer's weight as integer codes beside an 8-bit input
    saturates     two products can exceed the 16-bit sums that AVX2 makes of them
    """

    name: str
    op: str
    constant_weight: bool
    kernel: str
    quantized: bool
    why: str = ""
    accumulator: int | None = None
    saturates: bool = False
    product: bool = False


@dataclass(frozen=True)
class Audit:
    """The layers of a model as a runtime runs them; `speedup` is float time / this model's time, if measured."""

    layers: tuple[LayerAudit, ...]
    other: dict[str, int]
    speedup: float | None = None
    milliseconds: tuple[float, float] | None = None

    def counts(self) -> dict[str, int]:
        """Kernel -> number of layers."""
        return dict(Counter(layer.kernel for layer in self.layers))

    def products(self) -> list[str]:
        """Names of the products of two activations that run in float."""
        return [layer.name for layer in self.layers if layer.product and not layer.quantized]

    def summary(self) -> str:
        """One line: how many layers of each operator run quantized, in what, and how many products of two activations do
        not."""
        parts = []
        for op in LAYER_OPS:
            rows = [layer for layer in self.layers if layer.op == op and layer.constant_weight]
            if rows:
                kernels = Counter(layer.kernel for layer in rows if layer.quantized)
                names = ", ".join(f"{n} {k}" if len(kernels) > 1 else k for k, n in kernels.most_common())
                done = sum(layer.quantized for layer in rows)
                parts.append(f"{done}/{len(rows)} {op}" + (f" as {names}" if names else " in integer kernels"))
        parts = parts or ["no layer with a constant weight"]
        if n := len(self.products()):
            parts.append(f"{n} product{'s' * (n > 1)} of two activations stay{'s' * (n == 1)} float")
        return "; ".join(parts)

    def accumulators(self) -> str:
        """One line: what accumulators the quantized layers need, and how many depend on VNNI; "" if none is known."""
        rows = [layer for layer in self.layers if layer.quantized and layer.accumulator is not None]
        if not rows:
            return ""
        bits = sorted({layer.accumulator for layer in rows if layer.accumulator is not None})
        over = sum(layer.saturates for layer in rows)
        pairs = (
            "never saturate"
            if not over
            else (f"can saturate in {over} layer{'s' * (over > 1)} (target ort-cpu-avx2 avoids that)")
        )
        span = f"{bits[0]}..{bits[-1]}" if len(bits) > 1 else f"{bits[0]}"
        return f"accumulators: {span} bits; on AVX2 without VNNI 16-bit pair sums {pairs}"


def audit_model(
    model: onnx.ModelProto | str | Path,
    against: str | Path | onnx.ModelProto | None = None,
    seconds: float = 2.0,
    folder: Path | None = None,
) -> Audit:
    """Audit a model in onnxruntime.

    model     QDQ (or any) model
    folder    where the external data of a ModelProto lie
    against   the float model: the latency ratio at batch 1 is measured too, interleaved, one thread

    Raises OnnxqError if onnxruntime cannot load or run it.
    """
    proto = onnx.load(str(model)) if isinstance(model, (str, Path)) else model
    named = proto
    if not all(node.name for node in proto.graph.node):
        named = onnx.ModelProto()
        named.CopyFrom(proto)
        for i, node in enumerate(named.graph.node):
            node.name = node.name or f"{node.op_type}_{node.output[0] if node.output else i}"
    with tempfile.TemporaryDirectory() as scratch:
        dump = Path(scratch) / "optimized.onnx"
        session = runtimes.session(named, dump=dump, folder=folder)
        optimized = onnx.load(str(dump), load_external_data=False)
    found = tuple(_layers(named.graph, optimized.graph, needs(named, folder)))
    other = Counter(n.op_type for n in optimized.graph.node if n.op_type not in QUANTIZED)
    if against is None:
        return Audit(found, dict(other))
    reference = onnx.load(str(against)) if isinstance(against, (str, Path)) else against
    if not _alike(own := model_inputs(proto), theirs := model_inputs(reference)):
        raise OnnxqError(
            f"the two models cannot be timed on the same input, one reads {_shapes(own)}, the other "
            f"{_shapes(theirs)}; give the float model that this one was made of."
        )
    feed = example(proto)
    try:
        before = runtimes.session(reference)
        slow, fast = runtimes.latency([before, session], [runtimes.wanted(before, feed), feed], seconds)
    except Exception as error:  # onnxruntime's run() raises its own types
        reason = " ".join(str(error).split())[:200].partition("; check that")[0]
        raise OnnxqError(
            f"the two models cannot be timed on the same input: {reason}; give the float model that this one was made of."
        ) from error
    return Audit(found, dict(other), slow / fast, (slow, fast))


def audit_openvino(model: str | Path) -> Audit:
    """The same for OpenVINO: precision of each layer in its execution graph. Needs the extra ``openvino``."""
    try:
        import openvino
    except ImportError as error:
        raise OnnxqError("OpenVINO is not installed; pip install 'onnxq-plugins[openvino]'.") from error
    proto = onnx.load(str(model))
    try:
        compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:300]
        raise OnnxqError(f"OpenVINO cannot load '{model}' ({reason}); quantize it with --target openvino.") from error
    ran: dict[str, tuple[str, str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        names, kind, precision = (
            info[key].astype(str) if key in info else "" for key in ("originalLayersNames", "layerType", "runtimePrecision")
        )
        if kind in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution"):
            for name in names.split(","):
                ran[name.partition("/")[0]] = (kind, precision)
    constants, known, readers = _constants(proto.graph), needs(proto), _readers(proto.graph)
    found = []
    for node in proto.graph.node:
        if node.op_type in LAYER_OPS:
            kind, precision = next(
                (ran[name] for n in _chain(node, readers) for name in (n.name, *n.output) if name in ran), ("", "")
            )
            integer = precision in ("i8", "u8")
            found.append(
                LayerAudit(
                    node.name,
                    node.op_type,
                    node.input[1] in constants,
                    f"{kind or node.op_type} {precision or 'unknown'}",
                    integer,
                    "" if integer else "OpenVINO runs it in floating point",
                    *_accumulator(known.get(node.output[0])),
                    _product(node, constants),
                )
            )
    return Audit(tuple(found), {})


def example(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """One random feed of batch 1 for timing; dynamic axes become 1, whole-number inputs 0."""
    rng = np.random.default_rng(0)
    constants = {t.name for t in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            shape = [d.dim_value or 1 for d in kind.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            floats = np.dtype(dtype).kind == "f"
            feed[value.name] = rng.standard_normal(shape).astype(dtype) if floats else np.zeros(shape, dtype)
    return feed


def _alike(own: list[Input], theirs: list[Input]) -> bool:
    """True if one feed could serve both."""
    others = {i.name: i.shape for i in theirs}
    return {i.name for i in own} == set(others) and all(
        len(i.shape) == len(others[i.name])
        and all(n is None or m is None or n == m for n, m in zip(i.shape, others[i.name], strict=True))
        for i in own
    )


def _shapes(inputs: list[Input]) -> str:
    return ", ".join(f"'{i.name}' {[n if n is not None else 'any' for n in i.shape]}" for i in inputs)


def _accumulator(need: Need | None) -> tuple[int | None, bool]:
    return (None, False) if need is None else (need.bits, need.saturates)


def kernels(graph: onnx.GraphProto, optimized: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Layers of a model by name -> the node of the runtime's optimized graph that runs them, where one is found.

    graph   every node has a name
    """
    by_name: dict[str, onnx.NodeProto] = {}
    by_output: dict[str, onnx.NodeProto] = {}
    for node in optimized.node:
        by_name.setdefault(plain_name(node.name), node)
        if node.name.endswith("_nchwc"):  # such nodes bear the name of what they write
            by_output[plain_name(node.name)] = node
        for output in node.output if node.op_type != "ReorderOutput" else ():
            by_output.setdefault(plain_name(output), node)
    readers = _readers(graph)
    found = {}
    for node in graph.node:
        if node.op_type in LAYER_OPS and not node.domain:
            kernel = by_name.get(node.name) or by_name.get(node.output[0]) or _fused_into(node, readers, by_output)
            if kernel is not None:
                found[node.name] = kernel
    return found


def plain_name(name: str) -> str:
    """A name in an optimized graph without what moving to another memory layout adds to it."""
    return re.sub(r"_token_\d+$|_nchwc$", "", name)


def _layers(graph: onnx.GraphProto, optimized: onnx.GraphProto, known: dict[str, Need]) -> list[LayerAudit]:
    ran = kernels(graph, optimized)
    constants = _constants(graph)
    found = []
    for node in graph.node:
        if node.op_type not in LAYER_OPS or node.domain:
            continue
        kernel = ran[node.name].op_type if node.name in ran else "unknown"
        quantized = kernel in QUANTIZED
        found.append(
            LayerAudit(
                node.name,
                node.op_type,
                node.input[1] in constants,
                kernel,
                quantized,
                "" if quantized else _why(graph, node),
                *_accumulator(known.get(node.output[0])),
                _product(node, constants),
            )
        )
    return found


def _product(node: onnx.NodeProto, constants: set[str]) -> bool:
    return node.op_type == "MatMul" and not any(name in constants for name in node.input)


def _fused_into(
    node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], by_output: dict[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The operator that took a layer and its only readers (a bias, a scale, a Q) over, found by what it writes."""
    return next((by_output[n.output[0]] for n in _chain(node, readers) if n.output[0] in by_output), None)


def _chain(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    """A node and its only reader, and the only reader of that, some steps on."""
    yield node
    for _ in range(3):
        after = readers.get(node.output[0], [])
        if len(after) != 1:
            return
        node = after[0]
        yield node


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Initializers and what is computed from constants alone (dequantized weights among it)."""
    known = {t.name for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(i in known or not i for i in node.input)):
            known |= set(node.output)
    return known


def _why(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """The first reason why onnxruntime cannot take a layer as integer."""
    made = {o: n for n in graph.node for o in n.output}
    types = {t.name: t.data_type for t in graph.initializer}
    readers = [n for n in graph.node if node.output[0] in n.input]
    while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = [n for n in graph.node if readers[0].output[0] in n.input]
    if node.op_type == "ConvTranspose":
        return "onnxruntime has no integer ConvTranspose"
    weight, source = made.get(node.input[1]), made.get(node.input[0])
    decoded = any(n is not None and n.op_type == "DequantizeLinear" for n in (weight, source))
    if _product(node, _constants(graph)) and not decoded:
        return _PRODUCT
    if source is None or source.op_type != "DequantizeLinear":
        origin = f"operator '{source.name or source.op_type}'" if source is not None else "the model's input"
        if weight is None or weight.op_type != "DequantizeLinear":
            return f"neither its input (from {origin}) nor its weight is quantized"
        return f"its input, from {origin}, is float"
    codes = source.input[0]
    if _sixteen(types, source):
        return f"its input '{codes}' has 16-bit codes, for which there is no integer kernel"
    if any(_sixteen(types, n) for n in readers if n.op_type == "QuantizeLinear"):
        return "its output is quantized to 16-bit codes, for which there is no integer kernel"
    if weight is None or weight.op_type != "DequantizeLinear":
        return (
            "its weight is decoded to float at load"
            if node.input[1] in _constants(graph) and weight is not None
            else ("its weight is not quantized")
        )
    if any(a.name == "block_size" and a.i for a in weight.attribute):
        return "its weight has blocked scales; use one scale per output channel"
    if types.get(weight.input[0]) in (TensorProto.INT4, TensorProto.UINT4):
        return "its 4-bit weight goes straight into DequantizeLinear; put a Cast to INT8 between"
    if node.op_type == "Conv" and (not readers or any(n.op_type != "QuantizeLinear" for n in readers)):
        other = next((n.name or n.op_type for n in readers if n.op_type != "QuantizeLinear"), "the model's output")
        if len(readers) == 1 and _shifts(graph, readers[0]):
            return (
                f"Mul '{other}' shifts its channels, as target per-tensor has it for one scale per weight, which "
                "onnxruntime runs in float"
            )
        return f"its output is read in float by {other}; quantize it"
    return "onnxruntime did not fuse it (check zero points and the bias scale s_x * s_w)"


def _shifts(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """True if a node multiplies by constant powers of two."""
    found = [
        onnx.numpy_helper.to_array(t)
        for t in graph.initializer
        if node.op_type == "Mul" and t.name in node.input and t.data_location != TensorProto.EXTERNAL
    ]
    return bool(found) and bool((np.frexp(found[0])[0] == 0.5).all())


def _sixteen(types: dict[str, int], node: onnx.NodeProto) -> bool:
    """True if a QuantizeLinear writes, or a DequantizeLinear reads, 16-bit codes."""
    return len(node.input) > 2 and types.get(node.input[2]) in (TensorProto.UINT16, TensorProto.INT16)
