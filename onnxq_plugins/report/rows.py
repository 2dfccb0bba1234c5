"""Rows of a diagnosis: each layer, and each other quantizer with a share of its own, with errors, causes and remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxq_plugins import measure
from onnxq_plugins.graph import Layer, channel_axis, channel_groups, shifts
from onnxq_plugins.graph.activations import activation_of
from onnxq_plugins.graph.flow import maker_of, readers
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.plan.floats import FloatSets
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.report.causes import Activation, Cause, causes, constant_causes, tensor_causes
from onnxq_plugins.report.layer_errors import Own, accumulated_errors, own_errors
from onnxq_plugins.report.remedies import Remedy, Scene, listed
from onnxq_plugins.report.shares import Player, Run
from onnxq_plugins.spec import Array, decode

_MOST = 4  # layers that a remedy may make float
_LITTLE = 0.03  # part of the noise that is not worth words


@dataclass(frozen=True, eq=False)
class LayerError:
    """The error of one layer; of an activation that has a share of its own, since several layers read it or none does; of a
    constant outside layers.

    name      of the layer; "tensor NAME" for an activation, "constant NAME" for a constant
    at        tensor where `sqnr` is measured: the layer's output, after its Relu or Clip
    input     the planned activation that the layer reads, "" for float
    sqnr      dB there in the quantized network, which includes the errors of all layers before it
    own       dB there by this layer's quantizers alone, its weight's and its input's; None for a layer that stays float
    alone     dB of the network's worst output with only this layer quantized; None if not measured
    share     of the noise there, negative if it takes back errors of others: over all quantizers they add up to 1. None if
              it was measured only together with others (`Diagnosis.runs`)
    causes    of its own error, the largest first
    lone      noise there with only this layer quantized, as a part of all noise: what the share has beyond that arises with
              the other layers
    readers   operators that read an activation or a constant
    place     in the order of the network
    """

    name: str
    op: str
    at: str
    input: str
    sqnr: float
    own: Own | None
    alone: float | None = None
    share: float | None = None
    causes: tuple[Cause, ...] = ()
    lone: float | None = None
    readers: tuple[str, ...] = ()
    place: float = 0

    @property
    def badness(self) -> tuple[bool, float]:
        """Sorts the worst first: those with the largest shares, then by their own error."""
        own = self.own.both if self.own else IDENTICAL
        return (self.share is None, own if self.share is None else -self.share)

    @property
    def is_layer(self) -> bool:
        """False for an activation or a constant."""
        return self.at != self.input and not self.readers

    @property
    def remedies(self) -> list[Remedy]:
        """Those of all causes, the most promising first."""
        return list({remedy.typed: remedy for cause in self.causes for remedy in cause.remedies}.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, dB with two decimals."""
        own = self.own
        parts = {} if own is None else {"own_weight": own.weight, "own_input": own.input, "own": own.both}
        numbers = {"sqnr": self.sqnr, **parts, **({} if self.alone is None else {"alone": self.alone})}
        shares = {"share": self.share, "share_alone": self.lone}
        return {
            "name": self.name,
            "op": self.op,
            "input": self.input,
            **({"readers": list(self.readers)} if self.readers else {}),
            **{k: round(v, 2) for k, v in numbers.items()},
            **{k: round(v, 4) for k, v in shares.items() if v is not None},
            "causes": [
                {"kind": c.kind, "text": c.text, "gain_estimated": c.gain, "remedies": [r.to_dict() for r in c.remedies]}
                for c in self.causes
            ],
        }

    @property
    def text(self) -> str:
        """It in one paragraph: its error and its causes."""
        sentences = [_noise(self)] if self.share is not None else []
        if self.readers:
            kind = "tensor" if self.at == self.input else "constant"
            sentences.append(f"This {kind} is read by {listed(self.readers)}.")
        if self.own is not None and self.own.weight < IDENTICAL and self.own.input < IDENTICAL:
            sentences.append(
                f"At its own output, rounding its weight leaves {self.own.weight:.1f} dB and rounding its input "
                f"{self.own.input:.1f} dB."
            )
        return " ".join([*sentences, *(cause.text for cause in self.causes[:2])])


def _noise(layer: LayerError) -> str:
    """A layer's share in words, and what arises only together with others."""
    share, lone = layer.share or 0.0, layer.lone
    alone = "" if layer.alone is None or lone is None else f" Quantized alone, it leaves {layer.alone:.1f} dB at the outputs"
    if share < -_LITTLE:
        return f"It takes back {-share:.0%} of the noise: it compensates for errors of other layers." + (
            alone and f"{alone}."
        )
    text = f"It makes {round(100 * share)}% of the noise of the outputs."
    if not alone or lone is None:
        return text
    if lone < share / 2 and share > _LITTLE:
        return f"{text}{alone}, {lone:.0%} of the noise: most of its share arises only together with other layers."
    if lone > share + max(_LITTLE, share / 2):
        return f"{text}{alone}, {lone:.0%} of the noise: other layers take back a part."
    return f"{text}{alone}."


def percent(share: float | None) -> str:
    """A share as a cell of a table."""
    return "" if share is None else f"{100 * share:.1f}"


def rows(
    result: Outcome,
    planned: Planned,
    feeds: Sequence[Mapping[str, Array]],
    activations: Mapping[str, Activation],
    parts: Sequence[Player],
) -> list[LayerError]:
    """Every layer, and every other quantizer with a share of its own, with its errors and causes."""
    graph, plan = planned.graph, planned.plan
    layers = {y.name: y for y in graph.layers}
    shared = [p.entries[0] for p in parts if p.kind == "tensor"]
    own = own_errors(planned, feeds, shared)
    sqnr = accumulated_errors(graph, result.model, [*(y.result for y in graph.layers), *shared], feeds, result.names)
    scene = _scene(result, planned)
    position = {node.name: n for n, node in enumerate(graph.nodes)}

    def of_layer(y: Layer) -> LayerError:
        key, error = planned.input(y), own.get(y.name)
        found = LayerError(y.name, y.op, y.result, key, sqnr[y.result], error, place=position[y.name])
        if error is None:
            return found
        mine = None if key in shared else activations.get(key)  # what others read, too, has a row for itself
        noises = (10 ** (-error.weight / 10), 10 ** (-error.input / 10) if mine is not None else 0.0)
        weight = graph.constant(y.weight)
        known = causes(y, weight, plan[y.weight], mine, noises, error.mean_share, scene)
        return replace(found, causes=_with_proposed(result, known, y))

    def of_tensor(p: Player) -> LayerError:
        name, maker = p.entries[0], maker_of(graph, p.entries[0])
        reading = [layers[n] for n in p.readers if n in layers]
        weights = [graph.constant(y.weight) for y in reading]
        known = tensor_causes(activations[name], reading, weights, scene, activation_of(graph, name))
        op, known = maker.op if maker is not None else "input", _with_proposed(result, known)
        return LayerError(p.name, op, name, name, sqnr[name], own[p.name], causes=known, readers=p.readers, place=p.place)

    def of_constant(p: Player) -> LayerError:
        name, spec = p.entries[0], plan[p.entries[0]]
        rounded = decode(spec.codes, spec) if spec.codes is not None else graph.constant(name)
        error = measure.sqnr(graph.constant(name), rounded.astype(np.float32))
        op = next((str(node.op) for node in graph.nodes if node.name in p.readers), "")
        own, known = Own(error, IDENTICAL, error, 0.0), _with_proposed(result, constant_causes(spec, p.readers, scene))
        return LayerError(p.name, op, name, "", error, own, causes=known, readers=p.readers, place=p.place)

    others = [(of_tensor if p.kind == "tensor" else of_constant)(p) for p in parts if p.kind != "layer"]
    return [*(of_layer(y) for y in graph.layers), *others]


def _with_proposed(result: Outcome, known: Sequence[Cause], layer: Layer | None = None) -> tuple[Cause, ...]:
    """Causes with the remedies that plugins propose, those of the built-in rules first."""
    propose = result.propose
    return tuple(known if propose is None else (replace(cause, remedies=propose(cause, layer)) for cause in known))


def _scene(result: Outcome, planned: Planned) -> Scene:
    """What remedies must fit."""
    graph = result.graph
    equalizable = {m.tensor for g in channel_groups(graph, "rescale", clips=True) for m in g.members if not m.constant}
    centrable = {
        name for (name, axis), at in shifts(graph).places.items() if axis == channel_axis(graph, name) and (at >= 0).all()
    }
    dense = {y.name for y in planned.layers if y.groups == 1 and y.op != "ConvTranspose"}
    divisible = {
        name
        for name in set(planned.activations) - planned.coded  # what an integer kernel writes is codes, and no more
        if (reading := readers(graph, name) & planned.integer) and reading <= dense
    }
    floating = FloatSets(graph, result.recipe, result.target, _MOST).names
    return Scene(result.target, result.recipe, frozenset(equalizable), frozenset(centrable), frozenset(divisible), floating)


def with_shares(layers: Sequence[LayerError], runs: Sequence[Run], noise: float) -> list[LayerError]:
    """The layers with what is known of their shares, the worst first.

    noise   of the output with all quantized, relative to its signal
    """
    known = {run.names[0]: run for run in runs if len(run.names) == 1}
    found = []
    for y in layers:
        run = known.get(y.name)
        if run is not None:
            lone = run.alone
            alone = None if lone is None else float(-10 * np.log10(np.clip(lone * noise, 10 ** (-IDENTICAL / 10), None)))
            y = replace(y, share=run.share, lone=lone, alone=alone)
        found.append(y)
    return sorted(found, key=lambda y: y.badness)
