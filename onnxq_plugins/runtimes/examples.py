"""Feeds for timing models without data: sizes that are known anywhere, and guesses for the others, the likeliest first."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.runtimes.sessions import Feed, Session, wanted
from onnxq_plugins.spec import Array

Shapes = Mapping[str, Sequence[int]]  # input -> its shape
SHAPES_KEY = "onnxq.shapes"  # of a model's metadata: the shapes of its first calibration sample, as JSON
_Axis = tuple[str, int]  # an input and the number of an axis
_LADDER = (64, 32, 16, 8, 4, 2, 1, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SEQUENCE, _IMAGE = (128, *_LADDER), (224, *_LADDER)  # sizes to try for an open axis
_MOST = 2**24  # elements of an input


def examples(models: Sequence[onnx.ModelProto], shapes: Shapes | None = None) -> Iterator[Feed]:
    """Random feeds of one sample for models that have the same inputs; none where an input is no tensor.

    shapes   of inputs, where the caller knows them

    The size of an open axis is the first of: that in `shapes`, the fixed size that another of the models has there, what the
    metadata say, 1 for the first axis (the batch), a guess; axes of one name have one size. Integers are 1, mostly a valid
    index and no padding, or else 0. Raises OnnxqError for shapes that do not fit.
    """
    sizes, inputs = _sizes(models, shapes or {}), _inputs(models[0])
    tensors = all(value.type.WhichOneof("value") == "tensor_type" for value in inputs.values())
    return _random(models[0], sizes) if tensors else iter(())


def _random(model: onnx.ModelProto, sizes: Mapping[_Axis, int]) -> Iterator[Feed]:
    """Feeds of the sizes that are known, and of one guess after the other for the others."""
    inputs = _inputs(model)
    names = {axis: name or str(axis) for axis, _, name in _axes(model) if axis not in sizes}
    pixels = {names.get(axis) for pair in _pixels(inputs) for axis in pair}
    integers = any(_dtype(value).kind in "iu" for value in inputs.values())
    ladder = zip(_SEQUENCE, _IMAGE, strict=True) if names else [(1, 1)]
    for (sequence, image), whole in itertools.product(ladder, (1, 0) if integers else (1,)):
        filled = {**sizes, **{axis: image if name in pixels else sequence for axis, name in names.items()}}
        dims = {name: [size for (owner, _), size in sorted(filled.items()) if owner == name] for name in inputs}
        if all(math.prod(shape) <= _MOST for shape in dims.values()):
            yield {name: _values(_dtype(value), dims[name], whole) for name, value in inputs.items()}


def guesses(models: Sequence[onnx.ModelProto], shapes: Shapes | None = None) -> bool:
    """True if `examples` guesses the size of an axis."""
    return not {axis for axis, _, _ in _axes(models[0])} <= set(_sizes(models, shapes or {}))


def first_running(feeds: Iterable[Feed], runners: Sequence[Session]) -> Feed:
    """The first feed that all sessions run. Raises OnnxqError with the reason of the first of them if there is none."""
    first = reason = ""
    count = 0
    for feed in feeds:
        try:
            for runner in runners:
                runner.run(None, dict(wanted(runner, feed)))
            return feed
        except OnnxqError as error:
            first, reason = first or written(feed), reason or _cause(error)
            count += 1
    if not first:
        raise OnnxqError("on an example: an input is no tensor")
    raise OnnxqError(f"on {first}{f', nor on {count - 1} others that were tried' if count > 1 else ''}: {reason}")


def written(feed: Feed) -> str:
    """The shapes of a feed in words."""
    return ", ".join(f"{name} {list(x.shape)}" for name, x in feed.items())


def _cause(error: OnnxqError) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")


def _inputs(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    constants = {t.name for t in model.graph.initializer}
    return {value.name: value for value in model.graph.input if value.name not in constants}


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _axes(model: onnx.ModelProto) -> Iterator[tuple[_Axis, int | None, str]]:
    """Each axis of each input, its size if it is fixed, and its name."""
    for name, value in _inputs(model).items():
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            yield (name, axis), dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None, dim.dim_param


def _sizes(models: Sequence[onnx.ModelProto], shapes: Shapes) -> dict[_Axis, int]:
    """The sizes that are known, from the best source of each."""
    sizes: dict[_Axis, int] = {}
    fixed = [{axis: size for axis, size, _ in _axes(model) if size is not None} for model in models]
    first = {axis: 1 for axis, _, _ in _axes(models[0]) if axis[1] == 0}
    for source in (_checked(models[0], shapes), *fixed, *map(_noted, models), first):
        sizes = source | sizes
        for model in models:  # axes of one name have one size
            named = {name: sizes[axis] for axis, _, name in _axes(model) if name and axis in sizes}
            sizes = {axis: named[name] for axis, _, name in _axes(model) if name in named} | sizes
    return sizes


def _checked(model: onnx.ModelProto, shapes: Shapes) -> dict[_Axis, int]:
    """Shapes as sizes of axes. Raises OnnxqError where they do not fit the model's inputs."""
    inputs = _inputs(model)
    for name, shape in shapes.items():
        if name not in inputs:
            raise OnnxqError(f"--shape: the model has no input '{name}'; {known(name, inputs)}.")
        if not inputs[name].type.tensor_type.HasField("shape"):
            continue
        own = [size for axis, size, _ in _axes(model) if axis[0] == name]
        if len(shape) != len(own) or any(n is not None and n != m for n, m in zip(own, shape, strict=True)):
            wants = ", ".join("any" if n is None else str(n) for n in own)
            raise OnnxqError(f"--shape: input '{name}' wants shape [{wants}], not {list(shape)}.")
    return {(name, axis): size for name, shape in shapes.items() for axis, size in enumerate(shape)}


def _noted(model: onnx.ModelProto) -> dict[_Axis, int]:
    """Sizes in a model's metadata: ours, and the height and width that exporters of detectors write."""
    metadata, inputs = {p.key: p.value for p in model.metadata_props}, _inputs(model)
    sizes: dict[_Axis, int] = {}
    with suppress(ValueError, TypeError, AttributeError):  # anybody may have written anything
        sides = json.loads(metadata.get("imgsz", "[]"))
        for pair in _pixels(inputs):
            sizes |= zip(pair, map(int, [sides] * 2 if isinstance(sides, int) else sides), strict=True)
    with suppress(ValueError, TypeError, AttributeError):
        for name, shape in json.loads(metadata.get(SHAPES_KEY, "{}")).items():
            sizes |= {(name, axis): int(size) for axis, size in enumerate(shape) if name in inputs}
    return sizes


def _pixels(inputs: Mapping[str, onnx.ValueInfoProto]) -> list[tuple[_Axis, _Axis]]:
    """Height and width of inputs that are images: four axes, one of them with 1, 3 or 4 channels."""
    pairs = []
    for name, value in inputs.items():
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if len(dims) == 4 and (dims[1] in (1, 3, 4) or dims[3] in (1, 3, 4)):
            height = 2 if dims[1] in (1, 3, 4) else 1
            pairs.append(((name, height), (name, height + 1)))
    return pairs


def _values(dtype: np.dtype, shape: Sequence[int], whole: int) -> Array:
    """An array of random numbers, of the whole number, of False or of empty text."""
    if dtype.kind in "iu":
        return np.full(shape, whole, dtype)
    if dtype.kind == "O":
        return np.full(shape, "", dtype)
    if dtype.kind == "b":
        return np.zeros(shape, dtype)
    return np.asarray(np.random.default_rng(0).standard_normal(shape)).astype(dtype)
