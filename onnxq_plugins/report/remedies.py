"""What may be done about a layer's error: causes, and changes of the recipe that address them. Rules of thumb on what was
measured; nothing here has been tried. None undoes what the recipe says on purpose."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxq_plugins.calibration import Histogram
from onnxq_plugins.graph import Layer
from onnxq_plugins.report.layer_errors import grid
from onnxq_plugins.solvers.ranges import mse_range
from onnxq_plugins.spec import Array, QuantSpec, from_range, reduce_blocks
from onnxq_plugins.targets import Target
from onnxq_plugins.targets.target import granularities, granularity

# A pass that a remedy puts in comes in front of the first of these, or, if it is one of them, behind all but the last two.
_SOLVERS = (
    "ranges",
    "split-weights",
    "mixed-precision",
    "coding-length",
    "orthogonality",
    "sub-layer",
    "vector-scale",
    "shift-equalize",
    "subtensor",
    "round",
    "bound-accumulator",
    "bias-correct",
)
_LAST = ("bound-accumulator", "bias-correct")
_BIT = 20 * np.log10(2)  # dB
_FEW = 0.25  # of the channels that reach more than half of the range: they hold it


@dataclass(frozen=True)
class Remedy:
    """A change of a recipe: settings, or tables, so that what is typed belongs in one place.

    text       what it does, in words
    settings   for ``--set``
    passes     [[pass]] tables to put in
    layers     [[layer]] tables to add
    """

    text: str
    settings: tuple[str, ...] = ()
    passes: tuple[Mapping[str, Any], ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.settings and (self.passes or self.layers):
            raise ValueError("a remedy has settings or tables, not both")

    def on(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe (plain values) with the passes and layers of this remedy; `settings` are for `quantize(settings=)`."""
        steps = list(recipe.get("pass", []))
        for step in self.passes:
            before = _LAST if step["use"] in _SOLVERS else _SOLVERS
            steps = [s for s in steps if s.get("use") != step["use"]]
            at = next((i for i, s in enumerate(steps) if s.get("use") in before), len(steps))
            steps.insert(at, dict(step))
        return {
            **recipe,
            **({"pass": steps} if steps else {}),
            **({"layer": [*recipe.get("layer", []), *(dict(rule) for rule in self.layers)]} if self.layers else {}),
        }

    @property
    def typed(self) -> str:
        """What to type: options of the command line, or TOML for the recipe's file."""
        lines = [" ".join(f"--set {_quoted(setting)}" for setting in self.settings)] if self.settings else []
        for title, tables in (("pass", self.passes), ("layer", self.layers)):
            for table in tables:
                if title == "pass":
                    lines.append(
                        "# behind the others (bias-correct stays last)"
                        if table["use"] in _SOLVERS
                        else "# in front of ranges"
                    )
                lines += [f"[[{title}]]", *_lines(table)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "text": self.text,
            "type": self.typed,
            "settings": list(self.settings),
            "passes": [dict(p) for p in self.passes],
            "layers": [dict(rule) for rule in self.layers],
        }


@dataclass(frozen=True)
class Cause:
    """A reason for a layer's own error.

    kind     ``few-bits``, ``outlier-weights``, ``uneven-weights``, ``outlier-channels``, ``uneven-channels``,
             ``heavy-tail``, ``clipped``, ``mean-error`` or ``rounding`` (none of these)
    text     one sentence, with the numbers it rests on
    gain     dB by which the layer's own error would fall without it: estimated, not measured
    """

    kind: str
    text: str
    gain: float
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True, eq=False)
class Activation:
    """What is known of one planned activation: its solved entry, histogram, least and largest value per channel [C] (None
    where channels are not known)."""

    name: str
    spec: QuantSpec
    histogram: Histogram
    channels: tuple[Array, Array] | None = None
    is_input: bool = False

    @property
    def grid(self) -> tuple[float, float]:
        """Lowest and highest value that the codes stand for."""
        return grid(self.spec)

    def percentiles(self, percent: float) -> tuple[float, float]:
        """The values that leave so many percent out at either end."""
        h = self.histogram
        edges = np.linspace(h.low, h.high, len(h.counts) + 1)
        share = np.concatenate([[0.0], np.cumsum(h.counts) / max(h.counts.sum(), 1.0)])
        return float(np.interp(percent / 100, share, edges)), float(np.interp(1 - percent / 100, share, edges))

    @property
    def clipped(self) -> float:
        """Share of the values beyond the grid, 0..1."""
        low, high = grid(self.spec)
        half = float(np.asarray(self.spec.scale)) / 2
        out = (self.histogram.centers < low - half) | (self.histogram.centers > high + half)
        return float(self.histogram.counts[out].sum() / max(self.histogram.counts.sum(), 1.0))

    @property
    def deviations(self) -> float:
        """Standard deviations that the codes reach across."""
        h, (low, high) = self.histogram, grid(self.spec)
        total = max(h.counts.sum(), 1.0)
        mean = float(h.centers @ h.counts / total)
        spread = float(np.sqrt(max(float((h.centers - mean) ** 2 @ h.counts / total), 0.0)))
        return (high - low) / spread if spread > 0 else 0.0

    def noise(self, low: float, high: float) -> tuple[float, float]:
        """Mean square error of this activation's grid over another range: by rounding, and by clipping."""
        spec = from_range(low, high, self.spec.request())
        (first, last), step = grid(spec), float(np.asarray(spec.scale))
        h, total = self.histogram, max(self.histogram.counts.sum(), 1.0)
        over = np.maximum(np.maximum(first - h.centers, h.centers - last), 0.0)
        over = np.where(over > step / 2 + (h.high - h.low) / len(h.counts), over, 0.0)  # what the bins can tell
        zero = 0.0 if h.low > 0 or h.high < 0 else float(h.counts[self._zero])  # exact zeros (Relu) are not rounded
        inside = float(h.counts[over == 0].sum()) - zero
        return step**2 / 12 * max(inside, 1.0) / total, float(over**2 @ h.counts / total)

    @property
    def _zero(self) -> int:
        h = self.histogram
        return min(int(-h.low / max(h.high - h.low, 1e-30) * len(h.counts)), len(h.counts) - 1)


@dataclass(frozen=True, eq=False)
class Scene:
    """What a remedy must fit.

    recipe        as plain values
    equalizable   activations whose channels can be rescaled
    floating      activation -> the layers that must be float for it to be float; none if that cannot be had
    """

    target: Target
    recipe: Mapping[str, Any]
    equalizable: frozenset[str] = field(default_factory=frozenset)
    floating: Callable[[str], tuple[str, ...]] = lambda _: ()

    def has(self, name: str) -> bool:
        """True if the recipe has a pass."""
        return any(step.get("use") == name for step in self.recipe.get("pass", []))

    def setting(self, name: str, key: str, default: Any) -> Any:
        """A parameter of the recipe's last pass of that name."""
        steps = [step for step in self.recipe.get("pass", []) if step.get("use") == name]
        return steps[-1].get(key, default) if steps else default


# ---- remedies -------------------------------------------------------------------------------------------------------------


def layer_rule(name: str, **settings: Any) -> dict[str, Any]:
    """A [[layer]] table for one layer, whatever characters its name has."""
    return {"match": glob.escape(name), **settings}


def _wider(layer: Layer | None, x: Activation, scene: Scene) -> list[Remedy]:
    """More than 8 bits for an activation: 16 where the target has them for the layer that reads it, float elsewhere."""
    if x.spec.bits > 8:
        return []
    if 16 in scene.target.activation_bits:
        text = "16-bit activations for this layer (onnxruntime runs it in float, an NPU in integers)"
        return [] if layer is None else [Remedy(text, layers=(layer_rule(layer.name, activations={"bits": 16}),))]
    # a layer in float still reads what an integer layer rounded: that one must write float, too
    names = scene.floating(x.name)
    text = f"{_these(names)} in float, so that nothing rounds '{x.name}'; may cost speed"
    return [Remedy(text, layers=tuple(layer_rule(name, quantize=False) for name in names))] if names else []


def _these(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _float(name: str) -> Remedy:
    return Remedy(
        "this layer in float, so that nothing rounds its weight; costs size and may cost speed",
        layers=(layer_rule(name, quantize=False),),
    )


def _range(scene: Scene, method: str, text: str) -> Remedy:
    if scene.has("ranges"):
        return Remedy(text, (f"ranges.method={method}",))
    return Remedy(text, passes=({"use": "ranges", "method": method},))


def _round(scene: Scene, text: str) -> list[Remedy]:
    return (
        []
        if scene.has("round") or scene.has("mixed-precision")
        else [Remedy(text, passes=({"use": "round", "method": "gptq"},))]
    )


# ---- causes ---------------------------------------------------------------------------------------------------------------


def causes(
    layer: Layer | None,
    weight: Array | None,
    spec: QuantSpec | None,
    activation: Activation | None,
    shares: tuple[float, float],
    mean_share: float,
    scene: Scene,
) -> tuple[Cause, ...]:
    """Causes of one layer's own error, those that hold most of it first.

    layer        or None for an activation that no layer reads
    weight       its float values
    spec         its solved entry
    activation   what the layer reads, if that is planned
    shares       parts of the noise that come from rounding the weight and the input
    mean_share   part of the weight's noise that is constant per channel
    """
    by_weight, by_input = (max(share, 0.0) / max(sum(shares), 1e-300) for share in shares)
    found = []
    if layer is not None and weight is not None and spec is not None and by_weight > 0:
        found += [_lowered(cause, by_weight) for cause in _weight_causes(layer, weight, spec, scene)]
    if activation is not None and by_input > 0:
        found += [_lowered(cause, by_input) for cause in _input_causes(layer, weight, activation, scene)]
    if layer is not None and mean_share > 0.2 and by_weight > 0 and not scene.has("round"):  # it solves biases, too
        found.append(_lowered(_mean_error(mean_share, scene), by_weight))
    found = sorted((c for c in found if c.gain >= 0.5), key=lambda c: -c.gain)
    if found:
        return tuple(found)
    if layer is None:
        ways = tuple(_wider(None, activation, scene)) if activation is not None else ()
        return (Cause("rounding", "Plain rounding: the codes are used evenly.", 0.0, ways),)
    return (_plain(layer, by_weight, activation, scene),)


def _lowered(cause: Cause, share: float) -> Cause:
    """What a gain on a part of the noise is worth on the whole of it."""
    rest = 1 - share + share * 10 ** (-cause.gain / 10)
    return Cause(cause.kind, cause.text, round(float(-10 * np.log10(max(rest, 1e-20))), 1), cause.remedies)


def _weight_causes(layer: Layer, weight: Array, spec: QuantSpec, scene: Scene) -> list[Cause]:
    found = []
    if spec.bits < 8:
        more = min(8, scene.target.code_bits)
        finer = (
            [
                Remedy(
                    "a multiplier for every 16 inputs, at integer speed",
                    layers=(layer_rule(layer.name, weights={"sub_block": [1, 16]}),),
                )
            ]
            if (
                spec.bits <= 4
                and spec.sub_block is None
                and layer.shape[layer.in_axis] > 16
                and any(r.op == layer.op and r.multipliers and r.activations == 8 for r in scene.target.rules)
            )
            else []
        )
        text = f"Its weight has {spec.bits} bits, {2**spec.bits - 1} codes."
        found.append(
            Cause(
                "few-bits",
                text,
                (more - spec.bits) * _BIT,
                (
                    Remedy(f"{more} bits for this layer's weight", layers=(layer_rule(layer.name, weights={"bits": more}),)),
                    *_round(scene, "codes by output error instead of the nearest ones"),
                    *finer,
                ),
            )
        )
    size = np.abs(weight)
    rows = size.max(axis=tuple(a for a in range(size.ndim) if a != layer.out_axis))
    shape = granularity(layer, spec)
    if shape == "tensor" and spec.sub_block is None and rows.size > 1 and rows.max() > 0:
        gain = -10 * np.log10(np.mean((rows / rows.max()) ** 2))
        typical = float(np.median(rows))
        if gain > 3:
            few = _few(rows / rows.max())
            text = (
                f"One scale serves all output channels, and channel {int(rows.argmax())} reaches {rows.max():.3g}, "
                + (
                    f"{rows.max() / typical:.0f} times the median channel's {typical:.3g}."
                    if typical > 0
                    else "while most are 0."
                )
                if few
                else f"One scale serves all output channels, though they reach from {rows.min():.3g} to {rows.max():.3g}: "
                f"a scale for each would round its weight with {gain:.0f} dB less error."
            )
            found.append(
                Cause("outlier-weights" if few else "uneven-weights", text, float(gain), tuple(_per_channel(layer, scene)))
            )
    elif shape == "channel" and spec.sub_block is None:
        fine = reduce_blocks(
            size, tuple(1 if a == layer.out_axis else 16 if a == layer.in_axis else 0 for a in range(size.ndim)), np.maximum
        )
        axes = tuple(a for a in range(size.ndim) if a != layer.out_axis)
        part = fine / np.maximum(fine.max(axis=axes, keepdims=True), 1e-30)
        gain = -10 * np.log10(max(float(np.mean(part**2)), 1e-20))
        if gain > 6:
            reach = rows / np.maximum(np.sqrt(np.mean(size**2, axis=axes)), 1e-30)
            text = (
                f"Single weights set the scale of their channel: the largest is {float(np.median(reach)):.0f} times the "
                "channel's root mean square."
            )
            found.append(
                Cause(
                    "outlier-weights",
                    text,
                    float(gain),
                    (
                        *_round(scene, "scales and codes by output error"),
                        *(
                            []
                            if scene.has("split-weights") or layer.op != "Conv"
                            else [Remedy("large taps as a part of their own", passes=({"use": "split-weights"},))]
                        ),
                    ),
                )
            )
    return found


def _few(reach: Array) -> bool:
    """True if few of the channels [C], with 1 for the largest, hold the range."""
    return int((reach > 0.5).sum()) <= max(_FEW * reach.size, 1)


def _per_channel(layer: Layer, scene: Scene) -> list[Remedy]:
    if "channel" in granularities(scene.target, layer.op):
        return [Remedy("a scale per output channel", layers=(layer_rule(layer.name, weights={"block": "channel"}),))]
    made = (
        []
        if scene.has("shift-equalize")
        else [Remedy("a power-of-two shift per channel", passes=({"use": "shift-equalize"},))]
    )
    return made + (
        []
        if scene.has("equalize")
        else [Remedy("factors between layers that even the channels out", passes=({"use": "equalize"},))]
    )


def _input_causes(layer: Layer | None, weight: Array | None, x: Activation, scene: Scene) -> list[Cause]:
    found: list[Cause] = []
    h, bits, (low, high) = x.histogram, x.spec.bits, grid(x.spec)
    rounding, clipping = x.noise(low, high)
    now, it = max(rounding + clipping, 1e-300), f"its input '{x.name}'" if layer is not None else "this tensor"
    wide = _wider(layer, x, scene)
    if bits < 8:
        text = f"{it[0].upper()}{it[1:]} has {bits} bits."
        found.append(
            Cause(
                "few-bits",
                text,
                (8 - bits) * _BIT,
                tuple(
                    [Remedy("8 bits for this layer's input", layers=(layer_rule(layer.name, activations={"bits": 8}),))]
                    if layer is not None
                    else []
                ),
            )
        )
    best = mse_range(h.counts, h.low, h.high, 2**bits) if h.high > h.low else (low, high)
    ways = {"minmax": sum(x.noise(h.low, h.high)), "mse": sum(x.noise(*best))}
    method = min(ways, key=lambda m: ways[m])
    better = float(10 * np.log10(now / max(ways[method], 1e-300)))
    ranged = scene.setting("ranges", "method", "minmax") != method
    worded = "ranges by least squared error" if method == "mse" else "ranges that clip nothing"
    ranges = [_range(scene, method, worded)]
    if clipping > rounding and better > 0.5:
        text = (
            f"{_percent(x.clipped)} of {it} is clipped: values reach {h.low:.3g} to {h.high:.3g}, codes "
            f"{low:.3g} to {high:.3g}."
        )
        found.append(Cause("clipped", text, better, tuple((ranges if ranged else []) + wide)))
        return found
    spread = x.deviations
    if x.channels is not None and len(x.channels[0]) > 1:
        reach = np.maximum(np.abs(x.channels[0]), np.abs(x.channels[1]))
        part = reach / max(float(reach.max()), 1e-30)
        gain = -10 * np.log10(max(float(np.average(part**2, weights=_energies(layer, weight, len(part)))), 1e-20))
        few = int((part > 0.5).sum())
        if gain > 8:
            text = (
                f"{few} of the {len(reach)} channels of {it} {'hold' if few > 1 else 'holds'} the "
                f"range; the median channel reaches {float(np.median(part)):.0%} of it."
                if _few(part)
                else f"The channels of {it} that its weights amplify most use little of the range: "
                f"a scale for each channel would leave {gain:.0f} dB less error, which one scale for all cannot."
            )
            found.append(
                Cause(
                    "outlier-channels" if _few(part) else "uneven-channels",
                    text,
                    float(gain),
                    tuple(_even_out(x, scene) + wide),
                )
            )
    if spread > 16:
        text = (
            f"The range of {it}, {low:.3g} to {high:.3g}, spans {spread:.0f} standard deviations: few "
            "codes are left for most values."
        )
        found.append(
            Cause(
                "heavy-tail",
                text,
                float(20 * np.log10(spread / 10)),
                tuple((ranges if ranged and better > 0.5 else []) + wide),
            )
        )
    return found


def _energies(layer: Layer | None, weight: Array | None, count: int) -> Array:
    """How much of an error in each input channel [count] reaches a layer's output: squares of the weights that read it."""
    equal = np.ones(count)
    if layer is None or weight is None or layer.op == "ConvTranspose":
        return equal
    groups, outputs, _ = layer.matrix_shape
    per_group = layer.shape[layer.in_axis]
    if groups * per_group != count:
        return equal
    squares = np.square(layer.matrix(weight), dtype=np.float64).reshape(groups, outputs, per_group, -1)
    found: Array = squares.sum(axis=(1, 3)).reshape(-1)
    return found if found.sum() > 0 else equal


def _even_out(x: Activation, scene: Scene) -> list[Remedy]:
    if x.is_input:
        return (
            []
            if scene.has("scale-inputs")
            else [Remedy("a factor per input channel, undone in the first weights", passes=({"use": "scale-inputs"},))]
        )
    if x.name not in scene.equalizable or scene.setting("equalize", "by", "") == "activations":
        return []
    return [Remedy("factors between layers, chosen by measured error", passes=({"use": "equalize", "by": "activations"},))]


def _mean_error(share: float, scene: Scene) -> Cause:
    text = (
        f"{share:.0%} of what rounding its weight costs is a constant error per output channel, which a bias could take "
        "back."
    )
    ways = (
        []
        if scene.has("bias-correct") or scene.has("round")
        else [Remedy("mean errors taken back by the bias", passes=({"use": "bias-correct"},))]
    )
    ways += _round(scene, "codes and biases by the inputs that the quantized layers before make")
    return Cause("mean-error", text, float(-10 * np.log10(max(1 - share, 1e-3))), tuple(ways))


def _plain(layer: Layer, by_weight: float, x: Activation | None, scene: Scene) -> Cause:
    if by_weight >= 0.5:
        text = f"Plain rounding of its weight ({by_weight:.0%} of its own error); no outlier, no clipping."
        ways = (*_round(scene, "codes by output error instead of the nearest ones"), _float(layer.name))
        return Cause("rounding", text, 0.0, ways)
    name = f" '{x.name}'" if x is not None else ""
    return Cause(
        "rounding",
        f"Plain rounding of its input{name} ({1 - by_weight:.0%} of its own error); no outlier, no clipping.",
        0.0,
        tuple(_wider(layer, x, scene) if x is not None else ()),
    )


# ---- layers in float ------------------------------------------------------------------------------------------------------


def float_remedies(name: str, op: str, why: str, target: Target, said: frozenset[str]) -> tuple[Remedy, ...]:
    """What may bring a layer that runs in float into an integer kernel; nothing where there is no way, or where that would
    undo what was chosen.

    said   keys that [[layer]] rules of the recipe set for this layer, such as ``activations.bits``
    """
    eight = layer_rule(name, quantize=True, weights={"bits": 8}, activations={"bits": 8})
    if (
        "16-bit" in why
        or why in ("the recipe leaves it float", "mixed-precision chose float")
        or (said & {"quantize", "activations.bits"})
    ):
        return ()
    if op != "ConvTranspose" and ("decoded to float" in why or target.name == "storage"):
        return (Remedy("a target with integer kernels", ("target=ort-cpu",)),)
    if "blocked scales" in why and "weights.block" not in said:
        return (Remedy("a scale per output channel", layers=(layer_rule(name, weights={"block": "channel"}),)),)
    if op != "ConvTranspose" and ("weight-only" in why or "neither its input" in why):
        return (Remedy("8-bit weights and activations", layers=(eight,)),)
    return ()


# ---- text -----------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.01 else f"{share:.0%}"


def _lines(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in table.items():
        one = [f"{prefix}{key} = {json.dumps(value)}"]
        lines += _lines(value, f"{prefix}{key}.") if isinstance(value, Mapping) else one
    return lines


def _quoted(setting: str) -> str:
    return shlex.quote(setting)


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """A recipe's plain values as a TOML file."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in recipe.items() if isinstance(value, (str, int))]
    for key, value in recipe.items():
        tables: list[Any] = value if isinstance(value, list) else [value] if isinstance(value, Mapping) else []
        for table in tables:
            lines += ["", f"[[{key}]]" if isinstance(value, list) else f"[{key}]", *_toml(table)]
    return "\n".join(lines) + "\n"


def _toml(table: Mapping[str, Any]) -> list[str]:
    """Keys of one table; tables in it inline, since their keys may be any text (names of groups)."""
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(k))} = {_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return json.dumps(value)
