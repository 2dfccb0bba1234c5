"""Why rounding costs a layer so much: causes of its own error, each with its remedies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxq_plugins.calibration import Histogram
from onnxq_plugins.graph import Layer
from onnxq_plugins.graph.activations import Activation as Function
from onnxq_plugins.passes import ActivationRanges, BiasCorrect, Equalize, Ranges, ScaleInputs, ShiftEqualize, SplitWeights
from onnxq_plugins.report.remedies import (
    Remedy,
    Scene,
    apart,
    centred,
    codes_by_error,
    even_channels,
    for_layers,
    grids,
    heads,
    in_float,
    layer_remedy,
    ranges_by,
    wider,
)
from onnxq_plugins.solvers.ranges import mse_range
from onnxq_plugins.spec import Array, QuantSpec, from_range, reduce_blocks
from onnxq_plugins.targets import granularity_of

_BIT = 20 * np.log10(2)  # dB
_FEW = 0.25  # of the channels that reach more than half of the range: they hold it


KINDS = (
    "few-bits",
    "outlier-weights",
    "uneven-weights",
    "outlier-channels",
    "uneven-channels",
    "offset-channels",
    "heavy-tail",
    "clipped",
    "mean-error",
    "rounding",  # none of these
)


@dataclass(frozen=True)
class Cause:
    """A reason for a layer's own error.

    kind     one of `KINDS`
    text     one sentence, with the numbers it rests on
    gain     dB by which the layer's own error would fall without this cause: estimated, not measured
    """

    kind: str
    text: str
    gain: float
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True, eq=False)
class Activation:
    """What is known of one planned activation: its solved entry, its histogram, the lowest and highest value per channel [C]
    (None if its channels are unknown)."""

    name: str
    spec: QuantSpec
    histogram: Histogram
    channels: tuple[Array, Array] | None = None
    is_input: bool = False

    @property
    def grid(self) -> tuple[float, float]:
        """Lowest and highest value that the codes stand for."""
        return self.spec.value_range

    def percentiles(self, percent: float) -> tuple[float, float]:
        """The values that leave this many percent out at each end."""
        h = self.histogram
        edges = np.linspace(h.low, h.high, len(h.counts) + 1)
        share = np.concatenate([[0.0], np.cumsum(h.counts) / max(h.counts.sum(), 1.0)])
        return float(np.interp(percent / 100, share, edges)), float(np.interp(1 - percent / 100, share, edges))

    @property
    def clipped(self) -> float:
        """Share of the values beyond the grid, 0..1."""
        low, high = self.grid
        half = float(np.asarray(self.spec.scale)) / 2
        out = (self.histogram.centers < low - half) | (self.histogram.centers > high + half)
        return float(self.histogram.counts[out].sum() / max(self.histogram.counts.sum(), 1.0))

    @property
    def deviations(self) -> float:
        """Number of standard deviations that the codes span."""
        h, (low, high) = self.histogram, self.grid
        total = max(h.counts.sum(), 1.0)
        mean = float(h.centers @ h.counts / total)
        spread = float(np.sqrt(max(float((h.centers - mean) ** 2 @ h.counts / total), 0.0)))
        return (high - low) / spread if spread > 0 else 0.0

    def noise(self, low: float, high: float) -> tuple[float, float]:
        """Mean squared error if the grid covered another range: by rounding, and by clipping."""
        spec = from_range(low, high, self.spec.request())
        (first, last), step = spec.value_range, float(np.asarray(spec.scale))
        h, total = self.histogram, max(self.histogram.counts.sum(), 1.0)
        over = np.maximum(np.maximum(first - h.centers, h.centers - last), 0.0)
        over = np.where(over > step / 2 + (h.high - h.low) / len(h.counts), over, 0.0)  # what bins can resolve
        zero = 0.0 if h.low > 0 or h.high < 0 else float(h.counts[self._zero])  # exact zeros (Relu) are not rounded
        inside = float(h.counts[over == 0].sum()) - zero
        return step**2 / 12 * max(inside, 1.0) / total, float(over**2 @ h.counts / total)

    @property
    def _zero(self) -> int:
        h = self.histogram
        return min(int(-h.low / max(h.high - h.low, 1e-30) * len(h.counts)), len(h.counts) - 1)


def causes(
    layer: Layer,
    weight: Array,
    spec: QuantSpec,
    activation: Activation | None,
    shares: tuple[float, float],
    mean_share: float,
    scene: Scene,
) -> tuple[Cause, ...]:
    """Causes of one layer's own error, the largest first.

    weight       its float values
    spec         its solved entry
    activation   what it reads, if that is planned and no other layer reads it
    shares       parts of the noise that come from rounding the weight and the input
    mean_share   part of the weight's noise that is constant per channel
    """
    by_weight, by_input = (max(share, 0.0) / max(sum(shares), 1e-300) for share in shares)
    candidates: list[Cause] = []
    if by_weight > 0:
        candidates += [_lowered(cause, by_weight) for cause in _weight_causes(layer, weight, spec, scene)]
    if activation is not None and by_input > 0:
        it = f"its input '{activation.name}'"
        candidates += [_lowered(cause, by_input) for cause in _input_causes([layer], [weight], activation, it, scene)]
    solved = scene.recipe.provides("codes", "bias")  # solved together, they leave no mean error
    if mean_share > 0.2 and by_weight > 0 and not solved:
        candidates.append(_lowered(_mean_error(mean_share, scene), by_weight))
    return _largest_first(candidates) or (_plain(layer, by_weight, activation, scene),)


def tensor_causes(
    x: Activation, readers: Sequence[Layer], weights: Sequence[Array], scene: Scene, function: Function | None = None
) -> tuple[Cause, ...]:
    """Causes of the error of an activation that several layers read, or none, the largest first.

    readers    the layers
    weights    theirs, float values
    function   that alone reads it, whatever it is written as (`graph.activations`)
    """
    remedies = tuple(wider(readers, x.name, x.spec.bits, scene))
    plain = Cause("rounding", "Plain rounding: the codes are used evenly.", 0.0, remedies)
    it = "this tensor" if function is None else f"the input of {function.name}"
    found = _input_causes(readers, weights, x, it, scene)
    if function is not None:
        ranges = scene.use(ActivationRanges(), f"the range by the error behind {function.name}")
        found = [replace(c, remedies=(*ranges, *c.remedies)) if c.kind == "heavy-tail" else c for c in found]
    return _largest_first(found) or (plain,)


def constant_causes(spec: QuantSpec, readers: Sequence[str], scene: Scene) -> tuple[Cause, ...]:
    """The cause of the error of a constant outside layers, such as the weights of an LSTM.

    readers   operators that read it
    """
    few = spec.bits < 8
    text = f"It has {spec.bits} bits." if few else "Plain rounding of a constant."
    more = (for_layers(readers, "8 bits for this constant", weights={"bits": 8}),) if few else ()
    remedies = (*more, for_layers(readers, "this constant in float, as large as it was", quantize=False))
    return (Cause("few-bits" if few else "rounding", text, (8 - spec.bits) * _BIT if few else 0.0, remedies),)


def _largest_first(candidates: Sequence[Cause]) -> tuple[Cause, ...]:
    """Those that are worth mentioning."""
    return tuple(sorted((c for c in candidates if c.gain >= 0.5), key=lambda c: -c.gain))


def _lowered(cause: Cause, share: float) -> Cause:
    """The cause with its gain on one part of the noise converted into the gain on all of it."""
    rest = 1 - share + share * 10 ** (-cause.gain / 10)
    return Cause(cause.kind, cause.text, round(float(-10 * np.log10(max(rest, 1e-20))), 1), cause.remedies)


# ---- weights --------------------------------------------------------------------------------------------------------------


def _weight_causes(layer: Layer, weight: Array, spec: QuantSpec, scene: Scene) -> list[Cause]:
    candidates = [_few_bits(layer, spec, scene)] if spec.bits < 8 else []
    shape = granularity_of(layer, spec)
    if shape == "tensor" and spec.sub_block is None:
        candidates += _uneven_weights(layer, weight, scene)
    elif shape == "channel" and spec.sub_block is None:
        candidates += _outlier_weights(layer, weight, scene)
    return candidates


def _few_bits(layer: Layer, spec: QuantSpec, scene: Scene) -> Cause:
    more = min(8, scene.target.code_bits)
    multipliers = any(r.op == layer.op and r.multipliers and r.activations == 8 for r in scene.target.rules)
    divisible = spec.bits <= 4 and spec.sub_block is None and layer.shape[layer.in_axis] > 16
    remedies = [
        layer_remedy(layer.name, f"{more} bits for this layer's weight", weights={"bits": more}),
        *codes_by_error(scene, "codes by output error instead of the nearest ones"),
    ]
    if divisible and multipliers:
        text = "a multiplier for every 16 inputs, still in integer kernels"
        remedies.append(layer_remedy(layer.name, text, weights={"sub_block": [1, 16]}))
    text = f"Its weight has {spec.bits} bits, {2**spec.bits - 1} codes."
    return Cause("few-bits", text, (more - spec.bits) * _BIT, tuple(remedies))


def _uneven_weights(layer: Layer, weight: Array, scene: Scene) -> list[Cause]:
    """One scale for output channels of unequal ranges."""
    rows = np.abs(weight).max(axis=_other_axes(layer))
    if rows.size < 2 or not rows.max() > 0:
        return []
    gain = float(-10 * np.log10(np.mean((rows / rows.max()) ** 2)))
    if gain <= 3:
        return []
    remedies = tuple(_per_channel(layer, scene))
    if not _few(rows / rows.max()):
        text = (
            f"One scale serves all output channels, although their maxima range from {rows.min():.3g} to {rows.max():.3g}: "
            f"a scale for each would round its weight with {gain:.0f} dB less error."
        )
        return [Cause("uneven-weights", text, gain, remedies)]
    typical = float(np.median(rows))
    others = f"{rows.max() / typical:.0f} times the median channel's {typical:.3g}" if typical > 0 else "while most are 0"
    text = f"One scale serves all output channels, and channel {int(rows.argmax())} reaches {rows.max():.3g}, {others}."
    return [Cause("outlier-weights", text, gain, remedies)]


def _per_channel(layer: Layer, scene: Scene) -> list[Remedy]:
    if "channel" in scene.target.granularities(layer.op):
        return [layer_remedy(layer.name, "a scale per output channel", weights={"block": "channel"})]
    return [
        *scene.use(ShiftEqualize(), "a power-of-two shift per channel"),
        *scene.use(Equalize(), "factors between layers that equalize the channels"),
    ]


def _outlier_weights(layer: Layer, weight: Array, scene: Scene) -> list[Cause]:
    """Single weights that set the scale of their channel."""
    size, axes = np.abs(weight), _other_axes(layer)
    block = tuple(1 if a == layer.out_axis else 16 if a == layer.in_axis else 0 for a in range(size.ndim))
    fine = reduce_blocks(size, block, np.maximum)
    part = fine / np.maximum(fine.max(axis=axes, keepdims=True), 1e-30)
    gain = float(-10 * np.log10(max(float(np.mean(part**2)), 1e-20)))
    if gain <= 6:
        return []
    reach = size.max(axis=axes) / np.maximum(np.sqrt(np.mean(size**2, axis=axes)), 1e-30)
    text = (
        f"Single weights set the scale of their channel: the largest is {float(np.median(reach)):.0f} times the "
        "channel's root mean square."
    )
    taps = scene.use(SplitWeights(), "large taps in a separate part") if layer.op == "Conv" else []
    return [Cause("outlier-weights", text, gain, (*codes_by_error(scene, "scales and codes by output error"), *taps))]


def _other_axes(layer: Layer) -> tuple[int, ...]:
    """The axes of a weight except that of its output channels."""
    return tuple(axis for axis in range(len(layer.shape)) if axis != layer.out_axis)


def _few(reach: Array) -> bool:
    """True if few of the channels [C], with 1 for the largest, hold the range."""
    return int((reach > 0.5).sum()) <= max(_FEW * reach.size, 1)


def _mean_error(share: float, scene: Scene) -> Cause:
    text = f"{share:.0%} of the error of rounding its weight is constant per output channel, which a bias could cancel."
    remedies = [] if scene.recipe.provides("bias") else scene.use(BiasCorrect(), "biases that cancel mean errors")
    remedies += codes_by_error(scene, "codes and biases solved for the inputs that the quantized layers before produce")
    return Cause("mean-error", text, float(-10 * np.log10(max(1 - share, 1e-3))), tuple(remedies))


# ---- inputs ---------------------------------------------------------------------------------------------------------------


def _input_causes(layers: Sequence[Layer], weights: Sequence[Array], x: Activation, it: str, scene: Scene) -> list[Cause]:
    """Why rounding an activation costs so much.

    layers    that read it
    weights   theirs
    it        the activation in words
    """
    more_bits = wider(layers, x.name, x.spec.bits, scene)
    causes = []
    if x.spec.bits < 8:
        text, remedies = f"{it[0].upper()}{it[1:]} has {x.spec.bits} bits.", tuple[Remedy, ...]()
        if layers:
            remedies = (for_layers([y.name for y in layers], f"8 bits for {it}", activations={"bits": 8}),)
        causes.append(Cause("few-bits", text, (8 - x.spec.bits) * _BIT, remedies))
    low, high = x.grid
    rounding, clipping = x.noise(low, high)
    better, ranges = _better_ranges(x, rounding + clipping, scene)
    if clipping > rounding and better > 0.5:
        text = (
            f"{_percent(x.clipped)} of {it} is clipped: values range from {x.histogram.low:.3g} to {x.histogram.high:.3g}, "
            f"codes from {low:.3g} to {high:.3g}."
        )
        return [*causes, Cause("clipped", text, better, (*ranges, *more_bits))]
    causes += _offset_channels(x, it, scene, more_bits)
    causes += _uneven_channels(_energies(layers, weights, x), x, it, scene, [*([] if layers else heads(scene)), *more_bits])
    if (spread := x.deviations) > 16:
        text = (
            f"The range of {it}, {low:.3g} to {high:.3g}, spans {spread:.0f} standard deviations: most "
            "values share few codes."
        )
        remedies = (*(ranges if better > 0.5 else ()), *more_bits)
        causes.append(Cause("heavy-tail", text, float(20 * np.log10(spread / 10)), remedies))
    return causes


def _better_ranges(x: Activation, noise: float, scene: Scene) -> tuple[float, list[Remedy]]:
    """By how many dB the better of two methods to choose the range would lower the noise, and the remedy for it; none if
    the recipe uses that method."""
    h = x.histogram
    least = mse_range(h.counts, h.low, h.high, 2**x.spec.bits) if h.high > h.low else x.grid
    noises = {"minmax": sum(x.noise(h.low, h.high)), "mse": sum(x.noise(*least))}
    method = min(noises, key=lambda m: noises[m])
    gain = float(10 * np.log10(max(noise, 1e-300) / max(noises[method], 1e-300)))
    current = next((step.method for step in reversed(scene.recipe.passes) if isinstance(step, Ranges)), "minmax")
    text = "ranges by least squared error" if method == "mse" else "ranges that clip nothing"
    return gain, [] if current == method else ranges_by(method, scene, text)


def _offset_channels(x: Activation, it: str, scene: Scene, more_bits: list[Remedy]) -> list[Cause]:
    """Channels that lie at different places, where constants can be taken off them."""
    if x.channels is None or x.name not in scene.centrable:
        return []
    low, high = x.channels
    width, widest = max(float(high.max()), 0.0) - min(float(low.min()), 0.0), float((high - low).max())
    gain = float(20 * np.log10(max(width, 1e-30) / max(widest, 1e-30)))
    if gain <= 2:
        return []
    text = (
        f"The channels of {it} lie apart: together they span {width:.3g}, none by itself more than {widest:.3g}. The same "
        f"codes around the middle of each would round with {gain:.0f} dB less error."
    )
    return [Cause("offset-channels", text, gain, (*centred(x.name, scene), *more_bits))]


def _uneven_channels(energies: Array | None, x: Activation, it: str, scene: Scene, more_bits: list[Remedy]) -> list[Cause]:
    """Channels of an activation that use little of its range.

    energies    how much of an error in each channel reaches the readers' outputs [C]; None: of all alike
    it          the activation in words
    more_bits   remedies that help in any case
    """
    if x.channels is None or len(x.channels[0]) < 2:
        return []
    reach = np.maximum(np.abs(x.channels[0]), np.abs(x.channels[1]))
    part = reach / max(float(reach.max()), 1e-30)
    gain = float(-10 * np.log10(max(float(np.average(part**2, weights=energies)), 1e-20)))
    if gain <= 8:
        return []
    split = [] if x.is_input else grids(scene)
    remedies = (*_equalized(x, scene), *apart(x.name, scene), *split, *more_bits)
    if _few(part):
        few = int((part > 0.5).sum())
        text = (
            f"{few} of the {len(reach)} channels of {it} {'hold' if few > 1 else 'holds'} the "
            f"range; the median channel reaches {float(np.median(part)):.0%} of it."
        )
        return [Cause("outlier-channels", text, gain, remedies)]
    text = (
        f"The channels of {it} that weights amplify most use little of the range: with a scale for each channel "
        f"there would be {gain:.0f} dB less error than with one scale for all."
    )
    return [Cause("uneven-channels", text, gain, remedies)]


def _energies(layers: Sequence[Layer], weights: Sequence[Array], x: Activation) -> Array | None:
    """How much of an error in each channel of an activation reaches the outputs of its readers [C]: squares of the weights
    that read it, each layer counted alike. None if that is unknown."""
    total, count = None, 0 if x.channels is None else len(x.channels[0])
    for layer, weight in zip(layers, weights, strict=True):
        groups, outputs, _ = layer.matrix_shape
        per_group = layer.shape[layer.in_axis]
        if layer.op == "ConvTranspose" or groups * per_group != count:
            return None
        squares = np.square(layer.matrix(weight), dtype=np.float64).reshape(groups, outputs, per_group, -1)
        energies: Array = squares.sum(axis=(1, 3)).reshape(-1)
        if energies.sum() > 0:
            total = energies / energies.sum() + (0 if total is None else total)
    return total


def _equalized(x: Activation, scene: Scene) -> list[Remedy]:
    if x.is_input:
        return scene.use(ScaleInputs(), "a factor per input channel, undone in the first weights")
    return even_channels(scene) if x.name in scene.equalizable else []


# ---- neither --------------------------------------------------------------------------------------------------------------


def _plain(layer: Layer, by_weight: float, x: Activation | None, scene: Scene) -> Cause:
    if by_weight >= 0.5:
        text = f"Plain rounding of its weight ({by_weight:.0%} of its own error); no outlier, no clipping."
        remedies = (*codes_by_error(scene, "codes by output error instead of the nearest ones"), in_float(layer.name))
        return Cause("rounding", text, 0.0, remedies)
    name = f" '{x.name}'" if x is not None else ""
    text = f"Plain rounding of its input{name} ({1 - by_weight:.0%} of its own error); no outlier, no clipping."
    return Cause("rounding", text, 0.0, tuple(wider([layer], x.name, x.spec.bits, scene) if x is not None else ()))


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.01 else f"{share:.0%}"
