"""The function, and the model that it gives."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from onnxq_plugins import engine
from onnxq_plugins.data import Source
from onnxq_plugins.engine import Result
from onnxq_plugins.errors import OnnxqError, OnnxqWarning
from onnxq_plugins.graph import Model
from onnxq_plugins.measure.samples import OutputScore, Samples
from onnxq_plugins.openvino.arguments import ignored, refused
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.audits import file_or_proto
from onnxq_plugins.runtimes.openvino import audit_openvino

_JUDGED = 32  # samples at most
_POOR = 15.0  # dB below which an output is worth a warning


class QuantizedModel(openvino.Model):
    """A quantized network, to compile and save like any ov.Model. Files of OpenVINO keep `summary` and `sqnr` as runtime
    information under ``onnxq``.

    result   what `onnxq_plugins.quantize` returns: plan, report, the ONNX model
    audit    which layers OpenVINO's CPU plugin runs in integers
    scores   of each output, as OpenVINO computes it, against the float model in onnxruntime, on some of the samples; ()
             without samples
    """

    def __init__(self, model: openvino.Model, result: Result, audit: Audit, scores: Sequence[OutputScore]) -> None:
        super().__init__(model)
        self.result, self.audit, self.scores = result, audit, tuple(scores)
        self.set_rt_info(self.summary, ["onnxq", "summary"])
        if self.sqnr is not None:
            self.set_rt_info(f"{self.sqnr:.2f}", ["onnxq", "sqnr"])

    @property
    def sqnr(self) -> float | None:
        """dB of the worst output in OpenVINO; None without samples, or without an output of floats."""
        return min((score.sqnr for score in self.scores if score.sqnr is not None), default=None)

    @property
    def summary(self) -> str:
        """One line: what runs in integers, and how near the outputs are."""
        return self.audit.summary + ("" if self.sqnr is None else f" | {self.sqnr:.1f} dB in OpenVINO")


def quantize(
    model: Model,
    calibration_dataset: Source | None = None,
    *,
    mode: Any = None,
    preset: Any = None,
    target_device: Any = None,
    subset_size: int = 300,
    fast_bias_correction: bool = True,
    model_type: Any = None,
    ignored_scope: Any = None,
    advanced_parameters: Any = None,
    recipe: Any = "int8",
    **options: Any,
) -> QuantizedModel:
    """Quantize an ONNX model for OpenVINO, load it there, and judge it there. Raises OnnxqError, with a sentence for each
    argument that cannot be had.

    model      the ONNX file, or what else `onnxq_plugins.quantize` takes; not what OpenVINO made of it, which holds no ONNX
    calibration_dataset   nncf.Dataset, or any other samples
    preset     None or MIXED: weights are symmetric, activations are not
    target_device   ANY, CPU or CPU_SPR
    subset_size     how many of the samples are used, spread evenly where their number is known
    fast_bias_correction, mode, advanced_parameters   as by default: recipes say what they do
    model_type      says nothing here: recipes look at the graph
    ignored_scope   names and patterns of operators of the ONNX model, and types, in the words of OpenVINO or of ONNX
    recipe, options as of `onnxq_plugins.quantize`

    Warns (OnnxqWarning) where an output has less than 15 dB in OpenVINO.
    """
    problems = [*_no_onnx(model), *refused(mode, preset, target_device, fast_bias_correction, advanced_parameters)]
    OnnxqError.check(problems)
    source = file_or_proto(model)
    exclude = [*ignored(source, ignored_scope), *_several(options.pop("exclude", ()))]
    options = {"target": "openvino", "samples": subset_size, "check": False, **options}
    result = engine.quantize(model, recipe, calibration_dataset, exclude=exclude, **options)
    with tempfile.TemporaryDirectory() as folder:
        file = result.save(Path(folder) / "model.onnx")
        audit = audit_openvino(file)
        compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        scores = _scores(result, source, compiled)
        # read whole: the folder goes, and weights beside the file with it
        read = openvino.Core().read_model(str(file), config={"ENABLE_MMAP": False})
    made = QuantizedModel(read, result, audit, scores)
    if made.sqnr is not None and made.sqnr < _POOR:
        warnings.warn(
            f"an output has {made.sqnr:.1f} dB in OpenVINO; next: min_sqnr=20 keeps what costs it most in float",
            OnnxqWarning,
            stacklevel=2,
        )
    return made


def _no_onnx(model: Any) -> list[str]:
    """A sentence for what is OpenVINO's own model."""
    if isinstance(model, (openvino.Model, openvino.CompiledModel)):
        what = f"an {type(model).__name__} of OpenVINO"
    elif isinstance(model, (str, Path)) and Path(model).suffix.lower() in (".xml", ".bin"):
        what = f"'{model}', a file of OpenVINO,"
    else:
        return []
    return [f"{what} holds no ONNX, and OpenVINO writes none; give the ONNX file that it was made of."]


def _several(exclude: Any) -> list[Any]:
    return [exclude] if isinstance(exclude, str) else [*exclude]


def _scores(result: Result, source: Any, compiled: openvino.CompiledModel) -> list[OutputScore]:
    """How near each output is as OpenVINO computes it."""
    if result.data is None:
        return []
    known = Samples.of(source, result.data.spread(_JUDGED), class_axis=result.class_axis)
    ports = [next(port for port in compiled.outputs if name in port.get_names()) for name in known.names]
    names = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()
    rows = []
    for feed in known.feeds:
        values = request.infer({name: x for name, x in feed.items() if name in names})
        rows.append([np.array(values[port]) for port in ports])
    return known.table([list(column) for column in zip(*rows, strict=True)])
