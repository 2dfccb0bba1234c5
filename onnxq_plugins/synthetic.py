"""Inputs made up for a model: images, features and tokens, for calibration without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.data import Data, DataOptions, Input, graph_inputs
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.moments import Moments
from onnxq_plugins.patches import patches
from onnxq_plugins.solvers.fractals import fractals
from onnxq_plugins.spec import Array

Kind = Literal["fractals", "noise"]
Range = tuple[Array, Array]  # lowest and highest value, one each or one per channel
_PIXELS, _TOKENS = 224, 128  # sizes of dynamic axes
_DEVIATION = 0.5  # of a first layer's outputs, about the gamma of a trained BatchNormalization, where nothing tells it
_REACH = 3.0  # deviations from the middle of a declared range to its ends


@dataclass(frozen=True)
class Wish:
    """What is to be made.

    kind      ``fractals``: images with the statistics of photographs; ``noise``: normal noise of their means and deviations
    count     samples
    options   its mean and std say how RGB / 255 becomes an image input
    ranges    declared ranges of inputs
    size      of dynamic axes other than the batch; 0: 224 for images, 128 for others
    """

    kind: Kind = "fractals"
    count: int = 64
    options: DataOptions = DataOptions()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, eq=False)
class Made:
    """One input's samples: `at(n)` is number n with a batch axis; moments per channel (floats); in words where values come
    from."""

    at: Callable[[int], Array]
    moments: Moments | None
    source: str


def synthesize(graph: Graph, wish: Wish, rng: np.random.Generator) -> tuple[Data, dict[str, Made]]:
    """Samples for every input of a graph, and what each input is made of.

    A 4-dimensional float input is an image; one with other than 1, 3 or 4 channels only where no range is declared. Other
    float inputs need a declared range. Whole numbers need one too, except where a Gather reads rows of a table with them.
    Raises OnnxqError, for all inputs at once, where nothing tells what they may be.
    """
    made: dict[str, Made] = {}
    problems = []
    for wanted, child in zip(graph_inputs(graph), rng.spawn(len(graph.inputs)), strict=True):
        declared, shape = wish.ranges.get(wanted.name), _shape(wanted, wish.size)
        image = len(shape) == 4 and (declared is None or shape[_channel_axis(graph, wanted, shape)] in (1, 3, 4))
        if wanted.dtype.kind == "f" and image:
            made[wanted.name] = _images(graph, wanted, shape, wish, child)
        elif wanted.dtype.kind == "f" and declared is not None:
            made[wanted.name] = _features(graph, wanted, shape, declared, child.integers(2**62, size=wish.count))
        elif (found := _integers(graph, wanted, shape, declared, child.integers(2**62, size=wish.count))) is not None:
            made[wanted.name] = found
        else:
            problems.append(f"data-free: nothing tells the values of input '{wanted.name}' ({wanted.dtype}); declare their "
                            f"range with --set 'data-free.inputs={{{wanted.name}=[LOW, HIGH]}}', or give samples with "
                            "--data and a recipe without this pass.")
    OnnxqError.check(problems)

    def samples() -> Iterator[Mapping[str, Array]]:
        for n in range(wish.count):
            yield {name: one.at(n) for name, one in made.items()}

    return Data(graph_inputs(graph), samples, "the synthetic data", wish.count), made


# ---- images ---------------------------------------------------------------------------------------------------------------


def _images(graph: Graph, wanted: Input, shape: tuple[int, ...], wish: Wish, rng: np.random.Generator) -> Made:
    """Fractal images, or noise like them, on the scale the model wants."""
    axis = _channel_axis(graph, wanted, shape)
    height, width = (n for a, n in enumerate(shape) if a not in (0, axis))
    drawn = np.stack([np.rint(255 * image).astype(np.uint8)  # a quarter of the memory; photographs have no more levels
                      for image in fractals(wish.count, height, width, shape[axis], rng)])
    values = np.moveaxis(drawn, 3, axis)
    along = tuple(a for a in range(4) if a != axis)
    mean, deviation = values.mean(axis=along) / 255, values.std(axis=along) / 255
    offset, slope, source = _scale(graph, wanted, wish, values, axis)
    spread = [shape[axis] if a == axis else 1 for a in range(4)]
    first, size = (np.broadcast_to(v, shape[axis]).reshape(spread).astype(np.float32) for v in (offset, slope))
    seeds = rng.integers(2**62, size=wish.count)

    def at(n: int) -> Array:
        pixels = values[n:n + 1].astype(np.float32) / np.float32(255)
        if wish.kind == "noise":
            noise = np.random.default_rng(int(seeds[n])).standard_normal(shape, np.float32)
            pixels = (mean.reshape(spread) + deviation.reshape(spread) * noise).astype(np.float32)
        made: Array = first + size * pixels
        return made

    low, high = np.minimum(offset, offset + slope), np.maximum(offset, offset + slope)
    moments = Moments(offset + slope * mean, (slope * deviation) ** 2 + 0 * mean, low + 0 * mean, high + 0 * mean)
    return Made(at, moments, f"{wish.kind}, {source}")


def _scale(graph: Graph, wanted: Input, wish: Wish, values: Array, axis: int) -> tuple[Array, Array, str]:
    """Offset and slope [C] or [1] from pixels in 0..1 to the input, and in words where they are from."""
    if (declared := wish.ranges.get(wanted.name)) is not None:
        low, high = declared
        return low, high - low, "in the declared range"
    mean, std = np.array(wish.options.mean), np.array(wish.options.std)
    if mean.any() or (std != 1).any():
        return -mean / std, 1 / std, "on the scale of mean and std"
    layer = next((y for y in graph.layers if y.input == wanted.name and y.op == "Conv" and y.groups == 1), None)
    if layer is None or axis != 1:
        return np.zeros(1), np.ones(1), "as RGB/255, since no mean and std are given and no convolution reads them"
    return _matched(graph, layer, values)


def _matched(graph: Graph, layer: Layer, values: Array) -> tuple[Array, Array, str]:
    """The scale at which the first layer sees what it was trained on.

    With statistics of its BatchNormalization: the input's mean per channel by least squares on the means beta of the
    outputs, and its deviation, alike for all channels, by the median of the deviations |gamma|. Without: mean 0, and a
    deviation at which the median output has `_DEVIATION`.
    """
    pixels = values.astype(np.float32) / np.float32(255)
    along = (0, 2, 3)
    mean, deviation = pixels.mean(axis=along, dtype=np.float64), pixels.std(dtype=np.float64)
    unit = (pixels - mean[:, None, None].astype(np.float32)) / np.float32(deviation)
    columns = np.concatenate([patches(layer, unit[n:n + 1], 256, n)[0] for n in range(len(unit))], axis=1)
    weight = layer.matrix(graph.constant(layer.weight))[0]
    output = (weight @ columns).std(axis=1, dtype=np.float64)
    norm = graph.batchnorms.get(layer.output)
    alive = output > 1e-2 * output.max()
    if norm is None or not alive.any():
        slope = _DEVIATION / max(float(np.median(output[alive])) if alive.any() else 0.0, 1e-12)
        return -mean * slope / deviation, np.array([slope / deviation]), (
            "on the scale at which the first layer's outputs have mean 0 and an ordinary deviation (no statistics, mean and "
            "std tell it)")
    gamma, bias = np.abs(norm.gamma.astype(np.float64)), np.zeros(1)
    if layer.bias is not None:
        bias = graph.constant(layer.bias).astype(np.float64)
    slope = float(np.median(gamma[alive] / output[alive]))
    sums = weight.reshape(len(weight), layer.shape[1], -1).sum(axis=2, dtype=np.float64) / gamma[:, None].clip(1e-6)
    wanted = (norm.beta - bias) / gamma.clip(1e-6)
    ridge = 1e-3 * np.sqrt(np.mean(sums[alive] ** 2)) * np.eye(layer.shape[1])
    centre = np.linalg.lstsq(np.vstack([sums[alive], ridge]), np.r_[wanted[alive], np.zeros(layer.shape[1])], rcond=None)[0]
    return centre - mean * slope / deviation, np.array([slope / deviation]), (
        "on the scale that the statistics of the first layer imply")


# ---- other inputs ---------------------------------------------------------------------------------------------------------


def _features(graph: Graph, wanted: Input, shape: tuple[int, ...], declared: Range,
              seeds: Array) -> Made:
    """Normal values within a declared range. Where it is one range for all channels, channels that the first layer
    multiplies with large weights get less of it: weights grow in inverse proportion to the features they read."""
    low, high = declared
    axis = _channel_axis(graph, wanted, shape)
    source = "normal noise in the declared ranges of the channels"
    share = np.ones(1)
    if low.size == high.size == 1:
        source = "normal noise in the declared range"
        layer = next((y for y in graph.layers if graph.root(y.input) == wanted.name and y.groups == 1
                      and y.op != "ConvTranspose"), None)
        if layer is not None and layer.shape[layer.in_axis] == shape[axis]:
            others = tuple(a for a in range(len(layer.shape)) if a != layer.in_axis)
            norm = np.sqrt(np.sum(graph.constant(layer.weight).astype(np.float64) ** 2, axis=others))
            share = norm[norm > 0].min(initial=np.inf) / np.where(norm > 0, norm, np.inf)
            source += ", divided among channels as the first layer's weights imply"
    spread = [shape[axis] if a == axis else 1 for a in range(len(shape))]
    bottom, top = (np.broadcast_to(v, shape[axis]).reshape(spread).astype(np.float32)
                   for v in (share * low, share * high))
    crosses = (bottom < 0) & (top > 0)  # features of both signs gather around 0, whatever their extremes
    centre, deviation = np.where(crosses, 0, (top + bottom) / 2), (top - bottom) / (2 * _REACH)

    def at(n: int) -> Array:
        noise = np.random.default_rng(int(seeds[n])).standard_normal(shape, np.float32)
        made: Array = np.clip(centre + deviation * noise, bottom, top).astype(wanted.dtype)
        rows = np.moveaxis(made, axis, 0).reshape(shape[axis], -1)  # each channel reaches its ends in some sample
        for shift, end in ((0, top), (len(seeds) // 2, bottom)):
            hit = (np.arange(shape[axis]) + shift) % len(seeds) == n
            rows[hit, 0] = end.reshape(-1)[hit]
        return np.moveaxis(rows.reshape([shape[axis], *(m for a, m in enumerate(shape) if a != axis)]), 0, axis)

    flat = [np.asarray(v, np.float64).reshape(-1) for v in (centre, deviation**2, bottom, top)]
    return Made(at, Moments(*flat), source)


def _integers(graph: Graph, wanted: Input, shape: tuple[int, ...], declared: Range | None,
              seeds: Array) -> Made | None:
    """Whole numbers, evenly over the declared range or the rows of the table they pick from; truth values: all true."""
    if wanted.dtype.kind == "b":
        return Made(lambda n: np.ones(shape, bool), None, "true everywhere")
    if wanted.dtype.kind not in "iu":
        return None
    tables = [node for node in graph.consumers(wanted.name) if node.op == "Gather" and node.inputs[1].name == wanted.name]
    rows = [int(graph.constant(node.inputs[0].name).shape[node.attrs.get("axis", 0)]) for node in tables
            if graph.is_constant(node.inputs[0].name)]
    if declared is not None:
        low, high = int(declared[0].min()), int(declared[1].max())
        source = f"whole numbers from {low} to {high}, as declared"
    elif rows:
        low, high = 0, min(rows) - 1
        source = f"whole numbers from 0 to {high}, the rows of the table they pick from"
    else:
        return None

    def at(n: int) -> Array:
        return np.random.default_rng(int(seeds[n])).integers(low, high + 1, shape).astype(wanted.dtype)

    return Made(at, None, source)


# ---- shapes ---------------------------------------------------------------------------------------------------------------


def _shape(wanted: Input, size: int) -> tuple[int, ...]:
    """The shape of one sample: batch 1, dynamic axes as asked for."""
    image = wanted.dtype.kind == "f" and len(wanted.shape) == 4
    default = size or (_PIXELS if image else _TOKENS)
    return tuple(1 if axis == 0 else n if n is not None else default for axis, n in enumerate(wanted.shape))


def _channel_axis(graph: Graph, wanted: Input, shape: tuple[int, ...]) -> int:
    """The axis of an input that holds its channels: images may come with them last."""
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
        return 3
    return channel_axis(graph, wanted.name)
