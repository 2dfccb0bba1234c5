"""What may reduce an error: changes of a recipe, as values that can be printed, tried and tested. They are rules of thumb
about what was measured; nothing here has been tried. None undoes what the recipe says on purpose."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onnxq_plugins.errors import Reason
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import LayerRule, Pass, Recipe, Stage, changed, parameters
from onnxq_plugins.passes import Centre, Equalize, Ranges, Round, SplitChannels, SplitHeads, SplitOutliers
from onnxq_plugins.plan.floats import layer_rule
from onnxq_plugins.recipe import to_block
from onnxq_plugins.targets import Target

_EAGER = SplitOutliers(gain=1.0, worth=0.2)
_GOALS = (20, 25, 30)  # dB to ask for
# Stages before which a pass of some stage is inserted, and that place in words.
_LATER: dict[Stage, tuple[Stage, ...]] = {
    "rewrite": ("solve", "finish"),
    "solve": ("finish",),
    "finish": ("finish",),
}
_PLACES: dict[Stage, str] = {
    "rewrite": "# before ranges",
    "solve": "# after the others, but before bias-correct",
    "finish": "# after the others",
}


@dataclass(frozen=True)
class Remedy:
    """A change of a recipe: either settings or passes and layer rules, so that all lines to type belong in one place.

    text       what it does, in words
    settings   for ``--set``
    passes     to insert, each where its stage belongs, replacing one of the same name
    layers     rules to append
    """

    text: str
    settings: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = ()
    layers: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        if self.settings and (self.passes or self.layers):
            raise ValueError("a remedy has settings or tables, not both")

    def on(self, recipe: Recipe) -> Recipe:
        """A recipe with the passes and layer rules of this remedy; `settings` are for `quantize(settings=)`."""
        steps = list(recipe.passes)
        for step in self.passes:
            steps = [other for other in steps if other.name != step.name]
            at = next((i for i, other in enumerate(steps) if other.stage in _LATER[step.stage]), len(steps))
            steps.insert(at, step)
        return replace(recipe, passes=tuple(steps), layers=recipe.layers + self.layers)

    @property
    def typed(self) -> str:
        """What to type: options of the command line, or TOML for the recipe's file."""
        lines = [" ".join(f"--set {shlex.quote(setting)}" for setting in self.settings)] if self.settings else []
        for step in self.passes:
            lines += [_PLACES[step.stage], to_block("pass", {"use": step.name, **parameters(step)})]
        lines += [to_block("layer", changed(rule, LayerRule())) for rule in self.layers]
        return "\n".join(lines)

    @property
    def name(self) -> str:
        """It in a few words, as part of the name of a recipe."""
        steps = [
            " ".join([step.name, *(f"{key}={value}" for key, value in parameters(step).items())]) for step in self.passes
        ]
        rules = [f"{', '.join(rule.patterns)} {_rule_name(rule)}" for rule in self.layers[:2]]
        more = [f"{len(self.layers) - 2} more"] if len(self.layers) > 2 else []
        return ", ".join([*self.settings, *steps, *rules, *more])

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "text": self.text,
            "type": self.typed,
            "settings": list(self.settings),
            "passes": [{"use": step.name, **parameters(step)} for step in self.passes],
            "layers": [changed(rule, LayerRule()) for rule in self.layers],
        }


def _rule_name(rule: LayerRule) -> str:
    """What a rule does, in a few words."""
    if rule.quantize is False:
        return "in float"
    tables = {"weights": rule.weights, "activations": rule.activations}
    return " ".join(f"{table}.{key}={value}" for table, values in tables.items() for key, value in values.items())


@dataclass(frozen=True, eq=False)
class Scene:
    """What a remedy must fit.

    equalizable   activations whose channels can be rescaled
    centrable     activations whose channels can be shifted
    divisible     activations that float operators write and dense layers read, so that a few channels can stay float
    floating      activation -> the layers that must be float for it to be float; none if that is not possible
    """

    target: Target
    recipe: Recipe
    equalizable: frozenset[str] = field(default_factory=frozenset)
    centrable: frozenset[str] = field(default_factory=frozenset)
    divisible: frozenset[str] = field(default_factory=frozenset)
    floating: Callable[[str], tuple[str, ...]] = lambda _: ()

    def use(self, step: Pass, text: str) -> list[Remedy]:
        """The remedy that inserts a pass; none if the recipe has one of that name."""
        return [] if any(step.name == other.name for other in self.recipe.passes) else [Remedy(text, passes=(step,))]


def layer_remedy(layer: str, text: str, **settings: Any) -> Remedy:
    """Other settings for one layer."""
    return for_layers([layer], text, **settings)


def for_layers(names: Sequence[str], text: str, **settings: Any) -> Remedy:
    """Other settings for some layers, or for operators that read a constant."""
    return Remedy(text, layers=tuple(layer_rule(name, **settings) for name in names))


def listed(names: Sequence[str]) -> str:
    """Names as part of a sentence."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def wider(layers: Sequence[Layer], activation: str, bits: int, scene: Scene) -> list[Remedy]:
    """More than 8 bits for an activation: 16 if the target supports them for the layers that read it, else float."""
    if bits > 8:
        return []
    if 16 in scene.target.activation_bits:
        which = "this layer" if len(layers) == 1 else "the layers that read it"
        text = f"16-bit activations for {which} (onnxruntime runs it in float, an NPU in integers)"
        return [for_layers([y.name for y in layers], text, activations={"bits": 16})] if layers else []
    # a float layer still reads what an integer layer rounded, so the latter must be float as well
    names = scene.floating(activation)
    text = f"{listed(names)} in float, so that nothing rounds '{activation}'; may be slower"
    return [Remedy(text, layers=tuple(layer_rule(name, quantize=False) for name in names))] if names else []


def in_float(layer: str) -> Remedy:
    """Leave a layer in float."""
    return layer_remedy(
        layer, "this layer in float, so that nothing rounds its weight; larger, and may be slower", quantize=False
    )


def ranges_by(method: str, scene: Scene, text: str) -> list[Remedy]:
    """Choose ranges by another method; none if another pass chooses them."""
    if any(isinstance(step, Ranges) for step in scene.recipe.passes):
        return [Remedy(text, (f"ranges.method={method}",))]
    step = Ranges(method=method)  # type: ignore[arg-type]
    return [] if scene.recipe.provides("ranges") else [Remedy(text, passes=(step,))]


def codes_by_error(scene: Scene, text: str) -> list[Remedy]:
    """Choose codes by the error they cause; none if a pass does so."""
    return [] if scene.recipe.provides("codes") else [Remedy(text, passes=(Round(method="gptq"),))]


def even_channels(scene: Scene) -> list[Remedy]:
    """Equalize channels by what activations hold; none if a pass does so."""
    step = Equalize(by="activations")
    chosen = any(isinstance(other, Equalize) and other.by == step.by for other in scene.recipe.passes)
    return [] if chosen else [Remedy("factors between layers that even out the channels of activations", passes=(step,))]


def centred(activation: str, scene: Scene) -> list[Remedy]:
    """Shift channels to the middle of the grid; none if a pass does so, or nothing can be shifted."""
    text = "constants taken off the channels and made up for in biases"
    return scene.use(Centre(), text) if activation in scene.centrable else []


def apart(activation: str, scene: Scene) -> list[Remedy]:
    """Compute the few largest channels in float beside the kernel; more of them than a pass of the recipe does."""
    if activation not in scene.divisible:
        return []
    known = next((step for step in scene.recipe.passes if isinstance(step, SplitOutliers)), None)
    if known is None:
        return scene.use(SplitOutliers(), "the few largest channels in float, beside the integer kernel")
    if known.gain <= _EAGER.gain and known.worth <= _EAGER.worth:
        return []
    settings = (f"split-outliers.gain={_EAGER.gain:g}", f"split-outliers.worth={_EAGER.worth:g}")
    return [Remedy("more of the largest channels in float, beside the integer kernel", settings)]


def grids(scene: Scene) -> list[Remedy]:
    """Grids of their own for unlike channels of what a layer writes; none if a pass does so."""
    return scene.use(SplitChannels(), "grids of their own for unlike channels, up to the next operator that mixes them")


def heads(scene: Scene) -> list[Remedy]:
    """Grids of their own for unlike channels of the last layers; none if a pass does so."""
    return scene.use(SplitHeads(), "grids of their own for unlike channels of the network's last layers")


def quality(sqnr: float, recipe: Recipe, goal: float | None = None) -> list[Remedy]:
    """The smallest part of the network in float that reaches a quality; none if that is asked for, or the outputs are good.

    sqnr   dB that they have
    goal   dB that they must have; None: the next better quality
    """
    goal = next((goal for goal in _GOALS if goal >= sqnr + 2), None) if goal is None else goal
    if goal is None or (recipe.quality.asked and (recipe.quality.sqnr or 0) >= goal):
        return []
    text = f"the smallest part of the network in 16 bits or float with which each output has {goal:g} dB; may be slower"
    return [Remedy(text, (f"quality.sqnr={goal:g}", f"quality.below={goal:g}"))]


def float_remedies(name: str, op: str, reason: Reason, target: Target, set_by_rules: frozenset[str]) -> tuple[Remedy, ...]:
    """What may move a float layer into an integer kernel; none if nothing can, or if that would undo what was chosen.

    set_by_rules   keys that [[layer]] rules of the recipe set for this layer, such as ``activations.bits``
    """
    kind = reason.kind
    chosen = ("wide-codes", "recipe", "search", "quality", "outliers", "pass")
    if kind in chosen or set_by_rules & {"quantize", "activations.bits"}:
        return ()
    if op != "ConvTranspose" and (kind == "decoded" or not target.integer):
        return (Remedy("a target with integer kernels", (f"target={Recipe.target}",)),)
    if kind == "blocked" and "weights.block" not in set_by_rules:
        return (layer_remedy(name, "a scale per output channel", weights={"block": "channel"}),)
    if op != "ConvTranspose" and kind in ("weight-only", "unquantized"):
        eight = {"weights": {"bits": 8}, "activations": {"bits": 8}}
        return (layer_remedy(name, "8-bit weights and activations", quantize=True, **eight),)
    return ()
