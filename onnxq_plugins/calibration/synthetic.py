"""Synthetic inputs for a model: images, features and tokens, for calibration without data.

Calibration without data is a Calibration: the pass `data-free` puts one in place that answers from these samples or from
statistics (`expected.py`, `propagation.py`), so that no other pass knows. Statistics follow the graph: `rescale` and
`permute` carry those of BatchNormalizations along."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxq_plugins.calibration.propagation import Distribution
from onnxq_plugins.data import Data, DataOptions, Input, batches, graph_inputs
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, Layer, channel_axis
from onnxq_plugins.graph.patches import patches
from onnxq_plugins.solvers.fractals import fractals
from onnxq_plugins.solvers.gaussian import clipped_moments
from onnxq_plugins.spec import Array

SYNTHETIC = "the synthetic data"  # `Data.where` of it

Kind = Literal["fractals", "noise"]
Range = tuple[Array, Array]  # lowest and highest value, one each or one per channel
_PIXELS, _TOKENS = 224, 128  # sizes of dynamic axes
_DEVIATION = 0.5  # of a first layer's outputs, if unknown: about the gamma of a trained BatchNormalization
_REACH = 3.0  # deviations from the middle of a declared range to its ends


@dataclass(frozen=True)
class Wish:
    """What to synthesize.

    kind      ``fractals``: images with the statistics of photographs; ``noise``: normal noise of their means and deviations
    count     number of samples
    options   their mean and std map RGB / 255 to image inputs
    ranges    declared ranges of inputs
    size      of dynamic axes other than the batch; 0: 224 for images, 128 for others
    """

    kind: Kind = "fractals"
    count: int = 64
    options: DataOptions = DataOptions()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one input.

    at             sample of a number, with a batch axis
    distribution   of its channels; None for integers and booleans
    source         the origin of the values, in words
    image          True for an image
    """

    at: Callable[[int], Array]
    distribution: Distribution | None
    source: str
    image: bool = False


def synthesize(graph: Graph, wish: Wish, rng: np.random.Generator) -> tuple[Data, dict[str, Samples]]:
    """Data for a graph, and the samples of each input.

    A 4-dimensional float input is an image; one with other than 1, 3 or 4 channels only if no range is declared. Other
    float inputs need a declared range. Integers need one too, unless a Gather picks rows of a table with them. Raises
    OnnxqError, for all inputs at once, if their values are not determined.
    """
    by_input: dict[str, Samples] = {}
    known = ", ".join(f"'{name}'" for name in graph.inputs)
    problems = [
        f"data-free: a range is declared for '{name}', but the model's inputs are {known}; use one of these names."
        for name in wish.ranges
        if name not in graph.inputs
    ]
    for target, child in zip(graph_inputs(graph), rng.spawn(len(graph.inputs)), strict=True):
        try:
            by_input[target.name] = _samples(graph, target, wish, child)
        except OnnxqError as error:
            problems += error.problems
    OnnxqError.check(problems)

    fixed = {i.name: (i.fixed or 1) if len(i.shape or ()) > 1 else 1 for i in graph_inputs(graph)}
    batch = max(fixed.values(), default=1)
    at = batches(wish.count, batch)

    def samples() -> Iterator[Mapping[str, Array]]:
        for chunk in at:
            yield {
                name: one.at(int(chunk[0]))
                if fixed[name] == 1
                else np.concatenate([one.at(int(n)) for n in chunk[: fixed[name]]])
                for name, one in by_input.items()
            }

    return Data(graph_inputs(graph), samples, SYNTHETIC, len(at), batch=batch), by_input


def _samples(graph: Graph, target: Input, wish: Wish, rng: np.random.Generator) -> Samples:
    """The samples of one input. Raises OnnxqError if its values are not determined, or its declared range does not fit."""
    declared, shape = wish.ranges.get(target.name), _shape(target, wish.size)
    axis = _channel_axis(graph, target, shape)
    floats = target.dtype.kind == "f"
    if declared is not None and declared[0].size not in (1, shape[axis] if floats and shape else 1):
        wants = f"it has {shape[axis]} channels" if floats and shape else "it takes one range for all"
        raise OnnxqError(
            f"data-free: the range of input '{target.name}' is declared for {declared[0].size} channels, but "
            f"{wants}; give [LOW, HIGH], or a list of lows and a list of highs of that length."
        )
    bytes_ = target.dtype == np.uint8 and len(shape) == 4 and shape[axis] in (1, 3, 4)  # decoded images as they are
    if bytes_ or (floats and len(shape) == 4 and (declared is None or shape[axis] in (1, 3, 4))):
        return _images(graph, target, shape, axis, wish, rng)
    seeds = rng.integers(2**62, size=wish.count)
    if floats and declared is not None:
        return _features(graph, target, shape, axis, declared, seeds)
    if target.dtype.kind == "b" and declared is None:
        return Samples(lambda n: np.ones(shape, bool), None, "true everywhere")
    ends = _integers(graph, target, declared) if target.dtype.kind in "iub" else None
    if ends is None:
        raise OnnxqError(
            f"data-free: the values of input '{target.name}' ({target.dtype}) are unknown; declare their "
            f"range with --set 'data-free.inputs={{{_key(target.name)}=[LOW, HIGH]}}', or give samples with "
            "--data and a recipe without this pass."
        )
    low, high, source = ends
    return Samples(
        lambda n: np.random.default_rng(int(seeds[n])).integers(low, high + 1, shape).astype(target.dtype), None, source
    )


# ---- images ---------------------------------------------------------------------------------------------------------------


def _images(graph: Graph, target: Input, shape: tuple[int, ...], axis: int, wish: Wish, rng: np.random.Generator) -> Samples:
    """Fractal images, or noise with their statistics, on the scale of the input."""
    height, width = (n for a, n in enumerate(shape) if a not in (0, axis))
    drawn = np.stack(
        [
            np.rint(255 * image).astype(np.uint8)  # a quarter of the memory; photographs have no more levels
            for image in fractals(wish.count, height, width, shape[axis], rng)
        ]
    )
    values, planes = np.moveaxis(drawn, 3, axis), np.moveaxis(drawn, 3, 1)
    mean, deviation = _pixel_moments(planes)
    offset, slope, source = _scale(graph, target, wish, planes)
    spread = [shape[axis] if a == axis else 1 for a in range(4)]
    first, size = (np.broadcast_to(v, shape[axis]).reshape(spread).astype(np.float32) for v in (offset, slope))
    seeds = rng.integers(2**62, size=wish.count)

    def at(n: int) -> Array:
        pixels = values[n : n + 1].astype(np.float32) / np.float32(255)
        if wish.kind == "noise":
            noise = np.random.default_rng(int(seeds[n])).standard_normal(shape, np.float32)
            pixels = (mean.reshape(spread) + deviation.reshape(spread) * noise).astype(np.float32)
        x: Array = first + size * pixels
        return x if target.dtype.kind == "f" else np.clip(np.rint(x), 0, 255).astype(target.dtype)

    low, high = np.minimum(offset, offset + slope), np.maximum(offset, offset + slope)
    distribution = Distribution(offset + slope * mean, (slope * deviation) ** 2 + 0 * mean, low + 0 * mean, high + 0 * mean)
    return Samples(at, distribution, f"{wish.kind}, {source}", image=True)


def _pixel_moments(images: Array) -> tuple[Array, Array]:
    """Mean and deviation [C], on the scale of 0..1, of bytes [samples, C, h, w], without a copy of all of them."""
    counts = np.zeros((images.shape[1], 256))
    for image in images:
        counts += [np.bincount(plane.ravel(), minlength=256) for plane in image]
    share, level = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ level
    return mean, np.sqrt(np.maximum(share @ level**2 - mean**2, 0))


def _scale(graph: Graph, target: Input, wish: Wish, images: Array) -> tuple[Array, Array, str]:
    """Offset and slope [C] or [1] from pixels in 0..1 to the input, and their origin in words.

    images   bytes [samples, C, height, width]
    """
    if (declared := wish.ranges.get(target.name)) is not None:
        low, high = declared
        return low, high - low, "in the declared range"
    if target.dtype.kind != "f":
        return np.zeros(1), np.full(1, 255.0), "as bytes"
    mean, std = (np.array(values) / wish.options.range for values in (wish.options.mean, wish.options.std))
    size = images.shape[1]
    if 2 < max(*mean, *std) < np.inf:
        raise OnnxqError(
            f"data-free: --mean and --std are of RGB/255, so values up to 1 such as 0.485 and 0.229, but they are "
            f"{mean.tolist()} and {std.tolist()}: divide them by 255."
        )
    if mean.any() or (std != 1).any():
        if not np.isfinite(mean).all() or not np.isfinite(std).all() or not std.all():
            raise OnnxqError("data-free: --mean and --std must be finite, and --std not zero; give those of RGB / 255.")
        if {mean.size, std.size} - {1, size}:
            raise OnnxqError(
                f"data-free: input '{target.name}' has {size} channels, but --mean has {mean.size} values and "
                f"--std {std.size}; give one, or one per channel."
            )
        return -mean / std, 1 / std, "on the scale of mean and std"
    layer = next(
        (
            y
            for y in graph.layers
            if graph.root(y.input) == target.name
            and y.op == "Conv"
            and y.groups == 1
            and y.shape[1] == size
            and len(y.shape) == 4
        ),
        None,
    )
    if layer is None:
        return np.zeros(1), np.ones(1), "as RGB/255, since no mean and std are given and no convolution reads them"
    return _matched(graph, layer, images)


def _matched(graph: Graph, layer: Layer, images: Array) -> tuple[Array, Array, str]:
    """The scale on which the first layer was trained, in the form of `_scale`.

    With statistics of its BatchNormalization: the input's mean per channel by least squares on the means beta of the
    outputs, and its deviation, equal for all channels, by the median of the deviations |gamma|. Without: mean 0, and the
    deviation that gives the median output `_DEVIATION`.
    """
    mean, deviations = _pixel_moments(images)
    deviation = max(float(np.sqrt(np.mean(deviations**2))), 1e-6)
    columns = np.concatenate(
        [
            patches(layer, ((image / 255 - mean[:, None, None]) / deviation).astype(np.float32)[None], 256, n)[0]
            for n, image in enumerate(images)
        ],
        axis=1,
    )
    weight = layer.matrix(graph.constant(layer.weight))[0]
    output = (weight @ columns).std(axis=1, dtype=np.float64)
    norm = graph.batchnorms.get(layer.output)
    alive = output > 1e-2 * output.max()
    if not alive.any():
        return np.zeros(1), np.ones(1), "as RGB/255, since the first layer's weights are zero"
    if norm is None:
        slope = _DEVIATION / float(np.median(output[alive]))
        source = (
            "on the scale at which the first layer's outputs have mean 0 and an ordinary deviation "
            "(there are no statistics, mean or std)"
        )
        return -mean * slope / deviation, np.array([slope / deviation]), source
    gamma, bias = np.abs(norm.gamma.astype(np.float64)), np.zeros(1)
    if layer.bias is not None:
        bias = graph.constant(layer.bias).astype(np.float64)
    slope = float(np.median(gamma[alive] / output[alive]))
    sums = weight.reshape(len(weight), layer.shape[1], -1).sum(axis=2, dtype=np.float64) / gamma[:, None].clip(1e-6)
    means = (norm.beta - bias) / gamma.clip(1e-6)
    ridge = 1e-3 * np.sqrt(np.mean(sums[alive] ** 2)) * np.eye(layer.shape[1])
    centre = np.linalg.lstsq(np.vstack([sums[alive], ridge]), np.r_[means[alive], np.zeros(layer.shape[1])], rcond=None)[0]
    return (
        centre - mean * slope / deviation,
        np.array([slope / deviation]),
        "on the scale that the statistics of the first layer imply",
    )


# ---- other inputs ---------------------------------------------------------------------------------------------------------


def _features(graph: Graph, target: Input, shape: tuple[int, ...], axis: int, declared: Range, seeds: Array) -> Samples:
    """Normal values within a declared range. If it is one range around 0 for all channels, channels that the first layer
    multiplies with large weights get less of it: weights are inversely proportional to the features they read."""
    low, high = declared
    share, source = np.ones(1), "normal noise in the declared range"
    if low.size > 1:
        source = "normal noise in the declared ranges of the channels"
    elif shape and low[0] <= 0 <= high[0] and (norms := _weights_that_read(graph, target.name, shape[axis])) is not None:
        share = norms[norms > 0].min() / np.where(norms > 0, norms, np.inf)
        source += ", divided among channels as the first layer's weights imply"
    final, shape = shape, shape or (1,)  # a scalar
    spread = [shape[axis] if a == axis else 1 for a in range(len(shape))]
    bottom, top = (np.broadcast_to(v, shape[axis]).reshape(spread).astype(np.float32) for v in (share * low, share * high))
    crosses = (bottom < 0) & (top > 0)  # features of both signs gather around 0, whatever their extremes
    centre, deviation = np.where(crosses, 0, (top + bottom) / 2), (top - bottom) / (2 * _REACH)

    def at(n: int) -> Array:
        noise = np.random.default_rng(int(seeds[n])).standard_normal(shape, np.float32)
        x: Array = np.clip(centre + deviation * noise, bottom, top).astype(target.dtype)
        rows = np.moveaxis(x, axis, 0).reshape(shape[axis], -1)  # each channel reaches its ends in some sample
        for shift, position, end in ((0, 0, top), (len(seeds) // 2, -1, bottom)):
            hit = (np.arange(shape[axis]) + shift) % len(seeds) == n
            rows[hit, position] = end.reshape(-1)[hit]
        rows = rows.reshape([shape[axis], *(m for a, m in enumerate(shape) if a != axis)])
        return np.moveaxis(rows, 0, axis).reshape(final)

    middle, variance, lowest, highest = (np.asarray(v, np.float64).reshape(-1) for v in (centre, deviation**2, bottom, top))
    mean, variance = clipped_moments(middle, variance, lowest, highest)
    return Samples(at, Distribution(np.clip(mean, lowest, highest), variance, lowest, highest), source)


def _weights_that_read(graph: Graph, name: str, size: int) -> Array | None:
    """Norm of the weights that read each of `size` channels of an input; None if no layer does, or all weights are 0."""
    layer = next((y for y in graph.layers if graph.root(y.input) == name), None)
    if layer is None or layer.groups > 1 or layer.op == "ConvTranspose" or layer.shape[layer.in_axis] != size:
        return None
    others = tuple(a for a in range(len(layer.shape)) if a != layer.in_axis)
    norms: Array = np.sqrt(np.sum(graph.constant(layer.weight).astype(np.float64) ** 2, axis=others))
    return norms if norms.any() else None


def _integers(graph: Graph, target: Input, declared: Range | None) -> tuple[int, int, str] | None:
    """Lowest and highest integer, as declared or as the rows of the table they pick from, and the origin in words."""
    rows = min(_tables(graph, target.name), default=0)
    if declared is None:
        return (0, rows - 1, f"whole numbers from 0 to {rows - 1}, the rows of the table they pick from") if rows else None
    low, high = int(np.ceil(declared[0][0])), int(np.floor(declared[1][0]))
    lowest, highest = (
        (0, 1) if target.dtype.kind == "b" else (int(v) for v in (np.iinfo(target.dtype).min, np.iinfo(target.dtype).max))
    )
    if rows:
        lowest, highest = max(lowest, -rows), rows - 1
    if low > high or low < lowest or high > highest:
        raise OnnxqError(
            f"data-free: the range declared for input '{target.name}' ({target.dtype}), {low} to {high}, must "
            f"be whole numbers between {lowest} and {highest}"
            + (f", since they pick rows of a table of {rows}" if rows else "")
            + "; declare another."
        )
    return low, high, f"whole numbers from {low} to {high}, as declared"


def _tables(graph: Graph, name: str) -> list[int]:
    """Numbers of rows of the constant tables from which a tensor, possibly cast or reshaped first, picks."""
    rows = []
    for node in graph.consumers(name):
        if node.op == "Gather" and node.inputs[1].name == name:
            if graph.is_constant(node.inputs[0].name):
                rows.append(int(graph.constant(node.inputs[0].name).shape[node.attrs.get("axis", 0)]))
        elif node.op == "Cast" or graph.is_shape_only(node):
            for output in node.outputs:
                rows += _tables(graph, output.name)
    return rows


# ---- shapes ---------------------------------------------------------------------------------------------------------------


def _shape(target: Input, size: int) -> tuple[int, ...]:
    """The shape of one sample: batch 1, other dynamic axes of `size`. An input with one fixed axis has no batch."""
    shape = target.shape or ()
    image = target.dtype.kind == "f" and len(shape) == 4
    default = size or (_PIXELS if image else _TOKENS)
    if len(shape) == 1 and target.fixed:
        return (target.fixed,)
    return tuple(1 if axis == 0 else n if isinstance(n, int) else default for axis, n in enumerate(shape))


def _channel_axis(graph: Graph, target: Input, shape: tuple[int, ...]) -> int:
    """The axis of an input's channels: images may have them last. -1 for a scalar."""
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
        return 3
    return channel_axis(graph, target.name)


def _key(name: str) -> str:
    """A name as a TOML key: in quotes if needed, since input.1 would be a table in a table."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'
