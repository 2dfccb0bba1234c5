"""Which quantizers make the noise of a quantized network's output: shares that add up to one.

A quantizer alone says little: errors amplify or cancel each other. So quantizers are added one after the other in the order
of the network, and each has as its share what its arrival adds to the error that there is in the end:

    share_i = <E(1..i) - E(1..i-1), E(1..n)> / |E(1..n)|^2

E(S) is the error of one output, as a vector over the samples, if only the quantizers S round. The shares add up to 1,
whatever E is. Where errors add up, E(S) = sum of e_i over S, a share is <e_i, sum of all e> / |sum of all e|^2: a layer's
own noise, and half of what each pair that it is in makes together, which is its Shapley value in the game v(S) = |E(S)|^2.
What a share has beyond the layer's noise alone is that interaction; a negative share is that of a layer that takes back
errors of others, as learned rounding does.

The network behind i is float, so that E(1..i) - E(1..i-1) is the effect of one quantizer on the inputs that it will have.
Quantizers taken away from the whole network instead would change the inputs of all that come behind: these round otherwise,
at random, and drown the effect of one.

Source: the Shapley value along one order: Castro, Gomez and Tejada, Polynomial calculation of the Shapley value based on
sampling (2009). Products in place of squares are our own.

Cost: a network a quantizer, and one for its noise alone, where that is a matter of seconds. Else the network is cut into
runs of quantizers, and those with more than a few percent of the noise into halves, again and again: the sum stays exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from onnxq_plugins.graph.flow import maker_of
from onnxq_plugins.parallel import Track, silent
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.subsets import Subsets

_RUNS = 16  # that a large network is cut into at first
_SMALL = 0.02  # share of the noise, below which a run is not cut


@dataclass(frozen=True)
class Player:
    """Quantizers that have a share together.

    kind      "layer", "tensor" or "constant"
    name      of the layer; "tensor NAME" for an activation, "constant NAME" for a constant outside layers
    entries   names in the plan
    place     in the order of the network
    readers   operators that read an activation or constant that has a share of its own, in the order of the network
    """

    kind: Literal["layer", "tensor", "constant"]
    name: str
    entries: tuple[str, ...]
    place: float
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Consecutive players that were measured together, mostly one.

    names   of the players
    share   of the noise, negative if they take back other errors
    alone   noise with nothing else quantized, as a part of all noise; None if not measured
    """

    names: tuple[str, ...]
    share: float
    alone: float | None = None


def players(planned: Planned) -> list[Player]:
    """The quantizers of a plan in the order of the network: the weight of each layer, with the activation that it reads if
    no other layer reads that; each other activation; each constant outside layers."""
    graph = planned.graph
    position = {str(node.name): n for n, node in enumerate(graph.nodes)}
    read_by: dict[str, list[str]] = defaultdict(list)
    for layer in planned.layers:
        read_by[planned.input(layer)].append(layer.name)
    found = []
    for layer in planned.layers:
        key = planned.input(layer)
        own = (key,) if key and len(read_by[key]) == 1 else ()
        found.append(Player("layer", layer.name, (layer.weight, *own), position[layer.name]))
    taken = {entry for player in found for entry in player.entries}
    for name in planned.plan:
        if name in taken:
            continue
        readers = sorted({str(node.name) for node in graph.consumers(name)}, key=lambda n: position[n])
        if graph.is_constant(name):
            at = min((position[n] for n in readers), default=0) - 0.25
            found.append(Player("constant", f"constant {name}", (name,), at, tuple(readers)))
        else:
            maker = maker_of(graph, name)
            at = -0.5 if maker is None else position[str(maker.name)] + 0.5
            readers = read_by.get(name) or readers
            found.append(Player("tensor", f"tensor {name}", (name,), at, tuple(readers)))
    return sorted(found, key=lambda player: player.place)


def shares(
    subsets: Subsets, parts: Sequence[Player], networks: float, alone: int | None = None, track: Track = silent
) -> list[Run]:
    """The share of each player in the noise of the worst output, in the order of the network; they add up to 1, or are 0 if
    there is no noise.

    networks   to measure, roughly; if these are too few for all players, those with little noise are measured in runs
    alone      how many runs, those with the largest shares, are also measured alone; None: all
    """
    cuts = _Cuts(subsets, parts, track)
    each = 2 if alone is None else 1
    if networks < each * len(parts):
        cuts.add([round(n * len(parts) / _RUNS) for n in range(1, _RUNS)])
        while places := cuts.halves(int(networks - subsets.made - (each - 1) * len(cuts.spans)) // each):
            cuts.add(places)
    else:
        cuts.add(range(1, len(parts)))
    return cuts.runs(alone)


class _Cuts:
    """What is known of a network that is quantized up to some places.

    along   number of players -> product of the error with only the first so many players and the error with all
    """

    def __init__(self, subsets: Subsets, parts: Sequence[Player], track: Track) -> None:
        self.subsets, self.parts, self.track = subsets, list(parts), track
        self.along = {0: 0.0, len(parts): 1.0 if subsets.noise > 0 else 0.0}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First player of each run, and of the next."""
        places = sorted(self.along)
        return list(pairwise(places))

    def share(self, span: tuple[int, int]) -> float:
        """Of a run."""
        return self.along[span[1]] - self.along[span[0]]

    def add(self, places: Sequence[int]) -> None:
        """Measure the players before each place."""
        new = sorted({place for place in places if 0 < place < len(self.parts)} - self.along.keys())
        measured = self.subsets.measured([self._entries((0, place)) for place in new], "quantized up to here", self.track)
        self.along |= {place: one.along for place, one in zip(new, measured, strict=True)}

    def halves(self, most: int) -> list[int]:
        """Where to cut next: in the middle of the runs with the most noise."""
        large = [span for span in self.spans if span[1] - span[0] > 1 and abs(self.share(span)) > _SMALL]
        large.sort(key=lambda span: -abs(self.share(span)))
        return [sum(span) // 2 for span in large[: max(most, 0)]]

    def runs(self, alone: int | None) -> list[Run]:
        """All of them, and the noise of some alone."""
        chosen = sorted(self.spans, key=lambda span: -self.share(span))[:alone]
        measured = self.subsets.measured([self._entries(span) for span in chosen], "alone", self.track)
        noises = {span: one.noise for span, one in zip(chosen, measured, strict=True)}
        return [
            Run(tuple(p.name for p in self.parts[slice(*span)]), self.share(span), noises.get(span)) for span in self.spans
        ]

    def _entries(self, span: tuple[int, int]) -> list[str]:
        return [entry for player in self.parts[slice(*span)] for entry in player.entries]
