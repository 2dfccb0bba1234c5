"""The steps of benchmarks.zoo, each in a process of its own: one tool quantizes one model, one result is measured."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, version_converter

import onnxq_plugins
from benchmarks.models import peak_memory
from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import bytes_on_disk
from onnxq_plugins.testing.exact import exact_model, saturates

ORT_TOOLS = ("ort-static", "ort-dynamic")
ORT_WEIGHT_ONLY = ("ort-rtn", "ort-k-quant", "ort-hqq")  # 4 bits in blocks of 32
_MOST = 200.0  # dB that stand for equality
_SECONDS = 1.0  # of latency measurement


def made_by(scratch: Path, tool: str) -> Path:
    """Where a tool's model is written."""
    return scratch / f"{tool.replace(' ', '_')}.onnx"


def make(scratch: Path, path: Path, tool: str) -> dict[str, Any]:
    """Quantize a model; seconds, MB at the peak (and before), and what our report says."""
    feeds = pickle.loads((scratch / "calib.pickle").read_bytes())
    out = made_by(scratch, tool)
    before, start, result = peak_memory(), time.perf_counter(), {}
    if tool in (*ORT_TOOLS, *ORT_WEIGHT_ONLY):
        import onnxruntime.quantization  # noqa: F401  not counted as work

        start = time.perf_counter()
        if tool in ORT_WEIGHT_ONLY:
            _weight_only(path, out, tool)
        else:
            (static if tool == "ort-static" else dynamic)(path, out, feeds)
    else:
        quantized = onnxq_plugins.quantize(path, tool.removeprefix("onnxq "), feeds, output=out)
        result = {"summary": quantized.summary.split(" | ")[0], "notes": quantized.report.notes}
    return {"seconds": round(time.perf_counter() - start, 3), "before": before, "peak": peak_memory(), **result}


def _prepared(path: Path, out: Path) -> Path:
    """The model after onnxruntime's own preparation, as far as that works."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_suffix(".pre.onnx")
    if max(o.version for o in onnx.load(path, load_external_data=False).opset_import if o.domain in ("", "ai.onnx")) < 13:
        try:  # scales per channel need it
            onnx.save(version_converter.convert_version(onnx.load(path), 13), str(out.with_suffix(".13.onnx")))
            path = out.with_suffix(".13.onnx")
        except Exception:  # onnx's own, and RuntimeError
            pass
    for options in ({}, {"skip_symbolic_shape": True}, {"skip_symbolic_shape": True, "skip_optimization": True}):
        try:
            quant_pre_process(str(path), str(prepared), **options)
            return prepared
        except Exception:  # of many types, an assertion among them
            continue
    return path


def static(path: Path, out: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantize_static(
        str(_prepared(path, out)),
        str(out),
        Reader(),
        per_channel=True,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def dynamic(path: Path, out: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = _prepared(path, out)
    quantize_dynamic(str(prepared), str(out), weight_type=QuantType.QInt8)
    try:
        runtimes.session(out)
    except OnnxqError:
        quantize_dynamic(str(prepared), str(out), weight_type=QuantType.QUInt8)


def _weight_only(path: Path, out: Path, tool: str) -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    configs = {
        "ort-rtn": lambda: tools.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=False, accuracy_level=4),
        "ort-k-quant": tools.KQuantWeightOnlyQuantConfig,
        "ort-hqq": lambda: tools.HQQWeightOnlyQuantConfig(block_size=32, bits=4),
    }
    quantizer = tools.MatMulNBitsQuantizer(
        onnx.load(str(path)), block_size=32, accuracy_level=4, algo_config=configs[tool]()
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def measure(scratch: Path, path: Path, tool: str) -> dict[str, Any]:
    """Error of each output on the test feeds, speed and size of a tool's model; of the float model time and size."""
    feeds = pickle.loads((scratch / "test.pickle").read_bytes())
    exact = runtimes.session(path)
    names = [output.name for output in exact.get_outputs()]
    reference = [exact.run(None, feed) for feed in feeds]
    if tool == "float":
        random = any(
            one["value"] < _MOST for one in errors(names, reference[:2], [exact.run(None, f) for f in feeds[:2]]).values()
        )
        times = runtimes.latency([exact], feeds[0], _SECONDS)
        return {"ms": times[0], "kB": bytes_on_disk(path) / 1e3, "remark": "its outputs are random" if random else ""}
    own = made_by(scratch, tool)
    result: dict[str, Any] = {"kB": bytes_on_disk(own) / 1e3}
    model = _exact(onnx.load(str(own)))
    optimized = runtimes.session(model)
    outputs = [optimized.run(None, feed) for feed in feeds]
    result["outputs"] = errors(names, reference, outputs)
    plain = runtimes.session(model, optimize=False)
    agreement = errors(names, [plain.run(None, feed) for feed in feeds], outputs)
    result["on_off"] = min(one["value"] for one in agreement.values())
    times = runtimes.latency([exact, runtimes.session(own)], feeds[0], _SECONDS)
    return result | {"ms": times[1], "speed": times[0] / times[1]}


def errors(names: Sequence[str], reference: Sequence[Sequence[Any]], outputs: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Output -> pooled SQNR in dB, or percent that agree, over feeds; -200 dB or 0 % where shapes differ or NaN is new."""
    return {name: _error([y[i] for y in reference], [z[i] for z in outputs]) for i, name in enumerate(names)}


def _error(reference: list[Any], outputs: list[Any]) -> dict[str, Any]:
    signal, noise, same, count, floats = 0.0, 0.0, 0, 0, False
    for value, other in zip(reference, outputs, strict=True):
        left, right = list(_arrays(value)), list(_arrays(other))
        if [y.shape for y in left] != [z.shape for z in right]:
            floats = floats or any(y.dtype.kind == "f" for y in left)
            noise, count = np.inf, count + 1
            continue
        for y, z in zip(left, right, strict=True):
            if y.dtype.kind == "f":
                finite = np.isfinite(y)
                y, z, floats = y[finite].astype(np.float64), z[finite].astype(np.float64), True
                signal, noise = signal + float(y @ y), noise + (float((y - z) @ (y - z)) if np.isfinite(z).all() else np.inf)
            else:
                same, count = same + int((y == z).sum()), count + y.size
    if not floats:
        return {"value": 100.0 * same / max(count, 1), "unit": "%"}
    decibels = 10 * np.log10(max(signal, 1e-300) / noise) if noise else _MOST
    return {"value": float(np.clip(decibels, -_MOST, _MOST)), "unit": "dB"}


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """The arrays of an output, which may be a sequence, a map or nothing."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _arrays(value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _arrays(part)
    elif value is not None:
        yield np.asarray(value)


def _exact(model: onnx.ModelProto) -> onnx.ModelProto:
    """`exact_model`, also for what quantize_dynamic writes."""
    if saturates():
        model = exact_model(model)
        _shift(model.graph, {})
    return model


def _shift(graph: onnx.GraphProto, outer: dict[str, onnx.TensorProto]) -> None:
    """Make int8 weights of integer products, bodies included, uint8 and 128 higher.

    outer   constants of the graphs around this one
    """
    constants = outer | {t.name: t for t in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _shift(body, constants)
        if node.op_type in ("MatMulInteger", "ConvInteger") and len(node.input) == 4:
            for tensor in (constants[name] for name in (node.input[1], node.input[3]) if name in constants):
                if tensor.data_type == onnx.TensorProto.INT8:
                    codes = numpy_helper.to_array(tensor).astype(np.int16) + 128
                    tensor.CopyFrom(numpy_helper.from_array(codes.astype(np.uint8), tensor.name))
