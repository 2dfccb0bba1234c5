"""Arguments of onnxruntime's quantization functions as changes of a recipe: each is mapped, or refused in a sentence.

An argument that has onnxruntime's default says nothing: the recipe decides. Flags about the form of onnxruntime's own file
(dedicated pairs, contrib operators) are refused, as a user who sets them relies on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType

from onnxq_plugins.errors import known
from onnxq_plugins.job import LayerRule

# Widths of the types. Signs do not matter: 128 less in codes and zero point is the same value; targets store what they run.
BITS = {"QInt4": 4, "QUInt4": 4, "QInt8": 8, "QUInt8": 8, "QInt16": 16, "QUInt16": 16}
_METHODS = {"Entropy": "kl", "Percentile": "percentile"}
_AXES = {"Conv": (0,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (1, -1)}  # where outputs are


@dataclass
class Asked:
    """What arguments ask of a recipe.

    own        the user gave it
    settings   changes of its keys
    rules      for single layers
    exclude    operators that stay float
    ranges     of activations
    seven      weights of 8 bits get 7, so that no sum of two products saturates
    by_hand    single operators are to be quantized
    stride     samples that a reader is asked for at a time, 0 for all
    problems   sentences about what cannot be done
    """

    own: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    rules: list[LayerRule] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    seven: bool = False
    by_hand: bool = False
    stride: int = 0
    problems: list[str] = field(default_factory=list)

    def refuse(self, text: str) -> None:
        self.problems.append(text)


def bits_of(asked: Asked, name: str, kind: Any) -> int:
    """The width of a type; 0, and a problem, for what is none or has no integer codes."""
    if not isinstance(kind, QuantType):
        asked.refuse(f"{name} = {kind!r} must be a QuantType, such as QuantType.QInt8.")
    elif kind.name not in BITS:
        asked.refuse(f"{name} = {kind.name}: targets run integer codes; use QuantType.QInt8, or recipe= for other widths.")
    return BITS.get(getattr(kind, "name", ""), 0)


def types(asked: Asked, weight: Any, activation: Any, defaults: Mapping[str, Any]) -> None:
    """Widths of weights and activations."""
    for name, kind, key in (("weight_type", weight, "weights.bits"), ("activation_type", activation, "activations.bits")):
        if kind is not defaults.get(name) and (bits := bits_of(asked, name, kind)):
            asked.settings[key] = bits


def formats(asked: Asked, quant_format: Any, method: Any, providers: Any) -> None:
    """Form of the file, and how ranges are found."""
    if quant_format != QuantFormat.QDQ:
        asked.refuse(f"quant_format = {quant_format}: files are QDQ, which runs in the same integer kernels; leave it out.")
    name = getattr(method, "name", method)
    if name in _METHODS:
        asked.settings["ranges.method"] = _METHODS[name]
    elif method != CalibrationMethod.MinMax:
        asked.refuse(
            f"calibrate_method = {name} is for 8-bit floats, which targets do not run; use CalibrationMethod.MinMax, "
            "Entropy or Percentile."
        )
    if providers is not None and "CPUExecutionProvider" not in providers:
        asked.refuse(f"calibration_providers = {providers}: samples run on the CPU; leave it out, the ranges are the same.")


# ---- extra options --------------------------------------------------------------------------------------------------------


def _symmetric(asked: Asked, key: str, value: Any) -> None:
    if value:
        asked.settings["activations.symmetric"] = True


def _constant_only(asked: Asked, key: str, value: Any) -> None:
    if value:
        asked.rules.append(LayerRule(op="Attention", quantize=False))


def _percentile(asked: Asked, key: str, value: Any) -> None:
    if value is not None:
        asked.settings["ranges.percentile"] = float(value)


def _stride(asked: Asked, key: str, value: Any) -> None:
    asked.stride = int(value or 0)


def _axis(asked: Asked, key: str, value: Any) -> None:
    wrong = {op: axis for op, axis in dict(value or {}).items() if axis not in _AXES.get(op, ())}
    if wrong:
        asked.refuse(f"extra_options: {key} = {wrong}: scales are along the outputs of a layer; leave it out.")


def _smooth(asked: Asked, key: str, value: Any) -> None:
    if value and asked.own:  # the default recipes do as much, with the strength that each layer needs
        asked.refuse(
            f"extra_options: {key} = {value!r}: passes even out channels; name them in the recipe, such as 'equalize'."
        )


# What is done, or need not be done. Keys that are absent here are in `_REFUSED`.
_MAPPED: dict[str, Callable[[Asked, str, Any], None]] = {
    "ActivationSymmetric": _symmetric,
    "CalibTensorRangeSymmetric": _symmetric,
    "MatMulConstBOnly": _constant_only,
    "CalibPercentile": _percentile,
    "CalibStridedMinMax": _stride,
    "QDQOpTypePerChannelSupportToAxis": _axis,
    "SmoothQuant": _smooth,
    "CalibMaxIntermediateOutputs": lambda asked, key, value: None,  # samples are streamed in any case
    "DefaultTensorType": lambda asked, key, value: None,  # types that ONNX cannot infer come from a run
    "EnableSubgraph": lambda asked, key, value: None,  # branches of an If are quantized in any case
}

# key -> the value that asks for nothing, and what to do in place of any other
_REFUSED: dict[str, tuple[Any, str]] = {
    "extra.Sigmoid.nnapi": (False, "no target has NNAPI's fixed grid of a Sigmoid; leave it out, or give fixed-ranges"),
    "ActivationRestrictedAsymmetric": (
        False,
        "zero points follow from the ranges; for 0 use ActivationSymmetric",
    ),
    "WeightSymmetric": (True, "integer kernels are exact only beside symmetric weights; leave it out"),
    "ForceQuantizeNoInputCheck": (
        False,
        "operators that only move values carry codes where both neighbours are integer, and floats elsewhere, which is "
        "faster; leave it out",
    ),
    "AddQDQPairToWeight": (False, "weights are stored as codes; leave it out"),
    "OpTypesToExcludeOutputQuantization": (
        [],
        "outputs are quantized only where an integer kernel needs it; to keep operators in float use nodes_to_exclude",
    ),
    "DedicatedQDQPair": (False, "readers share one pair, which runtimes fuse as well; leave it out"),
    "CalibMovingAverage": (False, "ranges must hold for all samples; against outliers use CalibrationMethod.Percentile"),
    "CalibMovingAverageConstant": (0.01, "there is no moving average; against outliers use CalibrationMethod.Percentile"),
    "QuantizeBias": (True, "integer kernels add biases of int32; to keep a layer in float use nodes_to_exclude"),
    "SmoothQuantAlpha": (0.5, "the strength is found for each layer; leave it out"),
    "SmoothQuantFolding": (True, "factors always move into the operator before; leave it out"),
    "UseQDQContribOps": (False, "operators are ONNX's own, in the opset that their types need; leave it out"),
    "MinimumRealRange": (None, "no target needs a least range; give single tensors one by TensorQuantOverrides"),
    "QDQKeepRemovableActivations": (False, "a Relu is kept wherever the grid behind it does not do the same; leave it out"),
    "QDQDisableWeightAdjustForInt32Bias": (False, "a bias that overflows int32 would be wrong; leave it out"),
    "BlockSize": (0, 'a recipe says it: recipe={"extends": "int4-weight-only", "weights": {"block": 32}}'),
}
OPTIONS = frozenset({*_MAPPED, *_REFUSED, "TensorQuantOverrides"})


def options(asked: Asked, extra: Mapping[str, Any]) -> None:
    """All of `extra_options` but TensorQuantOverrides."""
    for key, value in extra.items():
        if key in _MAPPED:
            _MAPPED[key](asked, key, value)
        elif key in _REFUSED and value not in (None, _REFUSED[key][0]):
            asked.refuse(f"extra_options: {key} = {value!r}: {_REFUSED[key][1]}.")
        elif key not in OPTIONS:
            asked.refuse(f"extra_options: '{key}' is no option; {known(str(key), sorted(OPTIONS))}.")


def as_settings(asked: Asked) -> list[str]:
    """The changes as texts, which `quantize` takes."""
    return [f"{key}={json.dumps(value)}" for key, value in asked.settings.items()]
