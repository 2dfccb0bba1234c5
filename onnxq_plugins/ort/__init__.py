"""onnxruntime's quantization functions, made by recipes: the same arguments, one changed import.

    from onnxq_plugins.ort import QuantType, quantize_static   # was: onnxruntime.quantization

docs/pipelines.md tells what becomes of each argument."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization as _theirs
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    DynamicQuantConfig,
    QuantFormat,
    QuantType,
    StaticQuantConfig,
    quant_pre_process,
)

from onnxq_plugins import engine, files
from onnxq_plugins.engine import Result
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.graph.models import as_model
from onnxq_plugins.graph.reading import read
from onnxq_plugins.job import Quality, Recipe
from onnxq_plugins.ort.arguments import Asked, as_settings, formats, options, types
from onnxq_plugins.ort.names import Names, choose, override
from onnxq_plugins.plugins import Plugins, find_plugins
from onnxq_plugins.spec import Array

__all__ = [
    "CalibrationDataReader",
    "CalibrationMethod",
    "DynamicQuantConfig",
    "QuantFormat",
    "QuantType",
    "StaticQuantConfig",
    "quant_pre_process",
    "quantize",
    "quantize_dynamic",
    "quantize_static",
]
_NARROW = 4  # bits of weights from which on down they need finer scales
# Weights in blocks beside float activations.
_DYNAMIC = {"weights": {"block": 128}, "activations": {"bits": 32}}
_DYNAMIC_NARROW = {"weights": {"bits": 4, "full": True, "block": 32}, "activations": {"bits": 32}}


def quantize_static(
    model_input: Any,
    model_output: Any,
    calibration_data_reader: Any = None,
    quant_format: Any = QuantFormat.QDQ,
    op_types_to_quantize: Any = None,
    per_channel: Any = False,
    reduce_range: Any = False,
    activation_type: Any = QuantType.QInt8,
    weight_type: Any = QuantType.QInt8,
    nodes_to_quantize: Any = None,
    nodes_to_exclude: Any = None,
    use_external_data_format: Any = False,
    calibrate_method: Any = CalibrationMethod.MinMax,
    calibration_providers: Any = None,
    extra_options: Any = None,
    calibration_cache_path: Any = None,
    *,
    recipe: Any = None,
    plugins: Iterable[object] = (),
    target: str | None = None,
) -> Result:
    """onnxruntime's `quantize_static`, by a recipe. Raises OnnxqError, with a sentence for each argument that cannot be had,
    before anything is written.

    calibration_data_reader   or any other data that `onnxq_plugins.quantize` takes
    calibration_cache_path    a folder, which keeps statistics
    recipe    by default int8, or int4-storage for weights of 4 bits; arguments that are not onnxruntime's defaults change it
    plugins   names of passes to add to the recipe, or plugin objects
    target    the runtime; the recipe's by default

    Returns what `onnxq_plugins.quantize` does. Nodes in `nodes_to_quantize` are quantized even where floats are faster.
    """
    asked, given = Asked(own=recipe is not None), _defaults("quantize_static")
    types(asked, weight_type, activation_type, given)
    asked.seven = bool(reduce_range)
    formats(asked, quant_format, calibrate_method, calibration_providers)
    _options(asked, extra_options)
    narrow = asked.settings.get("weights.bits", 8) <= _NARROW
    if calibration_cache_path is not None and Path(calibration_cache_path).is_file():
        asked.refuse(
            f"calibration_cache_path '{calibration_cache_path}' is a file with ranges of onnxruntime's tool; give "
            "the path of a folder, which may be new."
        )
    return _run(
        asked,
        model_input,
        model_output,
        _Strides(calibration_data_reader, asked.stride) if asked.stride else calibration_data_reader,
        recipe if recipe is not None else "int4-storage" if narrow else "int8",
        (op_types_to_quantize, nodes_to_quantize, nodes_to_exclude),
        extra_options,
        plugins,
        bool(per_channel),
        bool(use_external_data_format),
        target,
        cache=calibration_cache_path,
    )


def quantize_dynamic(
    model_input: Any,
    model_output: Any,
    op_types_to_quantize: Any = None,
    per_channel: Any = False,
    reduce_range: Any = False,
    weight_type: Any = QuantType.QInt8,
    nodes_to_quantize: Any = None,
    nodes_to_exclude: Any = None,
    use_external_data_format: Any = False,
    extra_options: Any = None,
    *,
    recipe: Any = None,
    plugins: Iterable[object] = (),
    target: str | None = None,
) -> Result:
    """onnxruntime's `quantize_dynamic`, by a recipe without data: weights of 8 bits in blocks of 128 inputs beside float
    activations, which no sum can saturate (so that `reduce_range` needs nothing). See `quantize_static`; for integer
    activations use that, or recipe="int8-data-free".

    recipe    by default this; blocks of 32 for weights of 4 bits (int4-weight-only is more accurate, and needs samples)
    """
    asked = Asked(own=recipe is not None)
    types(asked, weight_type, None, {**_defaults("quantize_dynamic"), "activation_type": None})
    _options(asked, extra_options)
    if recipe is None and asked.settings.pop("activations.symmetric", None):
        asked.refuse("extra_options: ActivationSymmetric: activations stay float, at any range; leave it out.")
    narrow = asked.settings.get("weights.bits", 8) <= _NARROW
    return _run(
        asked,
        model_input,
        model_output,
        None,
        recipe if recipe is not None else _DYNAMIC_NARROW if narrow else _DYNAMIC,
        (op_types_to_quantize, nodes_to_quantize, nodes_to_exclude),
        extra_options,
        plugins,
        bool(per_channel) and recipe is not None,
        bool(use_external_data_format),
        target,
    )


def quantize(
    model_input: Any,
    model_output: Any,
    quant_config: Any,
    *,
    recipe: Any = None,
    plugins: Iterable[object] = (),
    target: str | None = None,
) -> Result:
    """`quantize_static` or `quantize_dynamic`, whichever the config is for."""
    if isinstance(quant_config, StaticQuantConfig):
        call: Any = quantize_static
    elif isinstance(quant_config, DynamicQuantConfig):
        call = quantize_dynamic
    else:
        raise OnnxqError(
            f"a config of type {type(quant_config).__name__} is not known; give a StaticQuantConfig or a "
            "DynamicQuantConfig, or for weights alone recipe='int4-weight-only'."
        )
    taken = inspect.signature(call).parameters
    values = {key: value for key, value in vars(quant_config).items() if key in taken}
    return call(model_input, model_output, **values, recipe=recipe, plugins=plugins, target=target)  # type: ignore[no-any-return]


# ---- details --------------------------------------------------------------------------------------------------------------


class _Strides:
    """The samples of a reader that gives a range of them at a time."""

    def __init__(self, reader: Any, stride: int) -> None:
        self.reader, self.stride = reader, stride

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        for start in range(0, len(self.reader), self.stride):
            self.reader.set_range(start_index=start, end_index=start + self.stride)
            yield from iter(self.reader.get_next, None)


def _defaults(function: str) -> dict[str, Any]:
    """The defaults of the installed onnxruntime's function."""
    parameters = inspect.signature(getattr(_theirs, function)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _options(asked: Asked, extra: Any) -> None:
    if isinstance(extra, Mapping):
        options(asked, extra)
    elif extra is not None:
        asked.refuse(f"extra_options = {extra!r} must be a dictionary.")


def _run(
    asked: Asked,
    model: Any,
    output: Any,
    data: Any,
    recipe: Any,
    chosen: tuple[Any, Any, Any],
    extra: Any,
    plugins: Iterable[object],
    per_channel: bool,
    beside: bool,
    target: str | None,
    **options: Any,
) -> Result:
    """Quantize as asked.

    chosen   op_types_to_quantize, nodes_to_quantize, nodes_to_exclude
    beside   weights go to a file of their own
    """
    if not isinstance(output, (str, os.PathLike)):
        asked.refuse(f"model_output of type {type(output).__name__} is no path; give the path of the file to write.")
    overrides = (extra or {}).get("TensorQuantOverrides") if isinstance(extra, Mapping) else None
    if overrides is not None and not isinstance(overrides, Mapping):
        asked.refuse("TensorQuantOverrides must be a dictionary of lists.")
        overrides = None
    for key, names in zip(("op_types_to_quantize", "nodes_to_quantize", "nodes_to_exclude"), chosen, strict=True):
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            asked.refuse(f"{key} = {names!r} must be a list of names.")
            chosen = (None, None, None)
    if any(chosen) or overrides:
        names = Names(_proto(model))
        asked.by_hand = bool(chosen[1])
        choose(asked, names, *(list(some or ()) for some in chosen))
        override(asked, names, overrides or {})
    OnnxqError.check(asked.problems)
    extras = [plugin for plugin in plugins if not isinstance(plugin, str)]
    installed, adding = find_plugins(extras), [p for p in plugins if isinstance(p, str)]
    made, note = _recipe(asked, recipe, installed, adding, per_channel, target)
    result = engine.quantize(model, made, data, output=output, plugins=extras, **options)
    result.report.notes.extend(note)
    if beside and not result.missed:
        files.save_model(result.model, Path(output), beside=True)
    return result


def _recipe(
    asked: Asked, recipe: Any, installed: Plugins, passes: list[str], per_channel: bool, target: str | None
) -> tuple[Recipe, list[str]]:
    """The recipe as asked, and notes about it.

    passes   names of those to add
    """
    table = {"pass": [{"use": name} for name in passes]}
    made, more = installed.recipe(recipe, as_settings(asked)), installed.recipe(table).passes if passes else ()
    note: list[str] = []
    for step in more:
        made = made.adding(step)
    if per_channel and made.weights.block == "tensor":
        made = replace(made, weights=replace(made.weights, block="channel"))
    made = replace(made, target=target or made.target)
    if asked.seven:
        made = _narrower(made, installed)
    if asked.ranges or asked.by_hand:  # which a search for quality would overrule; the check in the end says what is bad
        made = replace(made, quality=Quality())
    if asked.ranges:
        steps = [step for step in made.passes if step.stage != "rewrite" or "placement" in step.provides]
        left = [step.name for step in made.passes if step not in steps]
        ranges = {name: list(ends) for name, ends in asked.ranges.items()}
        fixed = installed.recipe({"pass": [{"use": "fixed-ranges", "ranges": ranges}]}).passes
        made = replace(made, passes=(*fixed, *steps))
        if left:
            note.append(f"the ranges that are given hold for the model as it is: passes {', '.join(left)} are left out")
    return replace(made, layers=(*made.layers, *asked.rules), exclude=(*made.exclude, *asked.exclude)), note


def _narrower(recipe: Recipe, installed: Plugins) -> Recipe:
    """A recipe whose sums of two products do not saturate in 16 bits: for a target that runs the same with smaller codes, or
    with weights of 7 bits."""
    wide = installed.target(recipe.target)
    twins = (t for t in installed.targets.values() if t.rules == wide.rules and t.max_code < wide.max_code)
    if (twin := next(twins, None)) is not None:
        return replace(recipe, target=twin.name)
    return replace(recipe, weights=replace(recipe.weights, bits=7 if recipe.weights.bits == 8 else recipe.weights.bits))


def _proto(model: Any) -> onnx.ModelProto:
    """The model, without the contents of large files."""
    known = as_model(model)
    if isinstance(known, Path):
        return read(known, MappedWeights())
    return known if isinstance(known, onnx.ModelProto) else known.model()
