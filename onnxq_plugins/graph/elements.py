"""Channels as single elements, and the groups that follow from their links.

Every channel of every tensor axis is one element. The elements of a connected component must move together; components that
occupy the same places in the same way are interchangeable and form a group. `graph/groups.py` makes the links.

Single channels, rather than whole tensors, are what is linked, so that residual additions, grouped convolutions,
concatenation, Flatten with spatial extent and attention heads need no cases of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.solvers.connected import connected
from onnxq_plugins.spec import Array

Kind = Literal["permute", "rescale", "shift"]
Role = Literal["output", "input", "fixed"]
Key = tuple[str, int, Role, tuple[int, int] | None]


@dataclass(frozen=True, eq=False)
class Member:
    """One place of a group: channel c is at positions index[c] of an axis of a tensor.

    index   [channels, positions per channel]
    role    what happens to the values when channel c is scaled by f: ``output`` multiplied by f (activations, output rows
            of a weight, biases), ``input`` divided by f (input columns of a weight), ``fixed`` unchanged
    rows    only these rows (axis 0) of the tensor belong to it: one group of a grouped convolution; None: all
    """

    tensor: str
    axis: int
    index: Array
    role: Role
    constant: bool
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can be reordered among themselves (`permute`) or scaled one by one (`rescale`)."""

    size: int
    kind: Kind
    members: tuple[Member, ...]

    @property
    def tensors(self) -> list[str]:
        """Names of the activations in the group."""
        return [m.tensor for m in self.members if not m.constant]

    @property
    def weights(self) -> list[Member]:
        """The constants in the group."""
        return [m for m in self.members if m.constant]

    def order_by(self, tensor: str, axis: int, positions: Array) -> Array | None:
        """The order, for `permute`, that moves the channel at positions[p] of an axis of a tensor to position p; None if the
        group does not move each channel there individually."""
        index = next((m.index for m in self.members if (m.tensor, m.axis, m.constant) == (tensor, axis, False)), None)
        if index is None or index.shape[1] != 1 or not np.array_equal(np.sort(index[:, 0]), np.arange(len(positions))):
            return None
        at = index[:, 0]
        return np.asarray(np.argsort(at)[positions[at]])


class Elements:
    """The elements of a graph, collected axis by axis."""

    def __init__(self, graph: Graph, kind: Kind) -> None:
        self.graph, self.kind = graph, kind
        self.start: dict[Key, int] = {}  # first element of an axis
        self.count: dict[Key, int] = {}
        self.total = 0
        self.links: list[tuple[Array, Array]] = []
        self.pinned: list[Array] = []
        self.todo: list[tuple[gs.Tensor, int]] = []  # axes whose operators have not been visited

    def ids(self, tensor: gs.Tensor, axis: int, role: Role = "output", rows: tuple[int, int] | None = None) -> Array:
        """Element numbers of one axis; the first call puts it on the list to visit."""
        key: Key = (tensor.name, axis, role, rows)
        if key not in self.start:
            size = tensor.shape[axis] if tensor.shape is not None and -1 < axis < len(tensor.shape) else None
            size = size if isinstance(size, int) and size < 2**24 else 0  # larger: the length of a signal, not channels
            self.start[key], self.count[key] = self.total, size
            self.total += size
            if rows is None:
                self.todo.append((tensor, axis))
        return np.arange(self.start[key], self.start[key] + self.count[key])

    def link(self, a: Array, b: Array) -> None:
        """Tie elements pairwise; pin them if their numbers differ."""
        if len(a) != len(b):
            self.pinned += [a, b]
        else:
            self.links.append((a, b))

    def pin(self, tensor: gs.Tensor, axis: int) -> None:
        """The channels of an axis stay where they are."""
        self.pinned.append(self.ids(tensor, axis))

    def cut(self) -> list[ChannelGroup]:
        """The groups of at least two components, none of them pinned, with a constant among their places."""
        if not self.links:
            return []
        a, b = (np.concatenate(side) for side in zip(*self.links, strict=True))
        component = self.components()
        free = np.ones(int(component.max()) + 1, bool)
        free[component[np.concatenate([np.arange(0), *self.pinned])]] = False
        moving = free[component[a]]  # long signals are pinned, mostly: nothing is asked of them
        a, b = a[moving], b[moving]
        keys = list(self.start)
        place = np.repeat(np.arange(len(keys)), [self.count[key] for key in keys])
        rank = _ranks(component, place)
        fingerprint = _fingerprints(component, place, rank, a, b)
        visits: dict[int, list[tuple[int, int]]] = defaultdict(list)  # component -> (place, number of its elements there)
        for at, key in enumerate(keys):
            here = component[self._slice(key)]
            names, counts = np.unique(here[free[here]], return_counts=True)
            for c, n in zip(names.tolist(), counts.tolist(), strict=True):
                visits[c].append((at, n))
        alike: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = defaultdict(list)
        for c, places in visits.items():
            alike[int(fingerprint[c]), tuple(places)].append(c)
        groups = []
        for (_, shared), components in alike.items():
            members = tuple(self._member(keys[at], component, components, count) for at, count in shared)
            if len(components) > 1 and any(m.constant for m in members):
                groups.append(ChannelGroup(len(components), self.kind, members))
        return groups

    def components(self) -> Array:
        """The number of the component of each element [elements]."""
        a, b = (np.concatenate([np.arange(0), *(pair[end] for pair in self.links)]) for end in (0, 1))
        return connected(self.total, a, b)

    def _slice(self, key: Key) -> slice:
        return slice(self.start[key], self.start[key] + self.count[key])

    def _member(self, key: Key, component: Array, components: Sequence[int], count: int) -> Member:
        """The place `key` in a group of components, each of which has `count` elements there."""
        here = component[self._slice(key)]
        order = np.argsort(here, kind="stable")
        index = order[np.searchsorted(here[order], components)[:, None] + np.arange(count)]
        name, axis, role, rows = key
        return Member(name, axis, index, role, self.graph.is_constant(name), rows)


def _ranks(component: Array, place: Array) -> Array:
    """The rank of each element among those of its component at its place: two components can trade places only if their
    links join the same ranks."""
    numbers = np.arange(len(place))
    order = np.lexsort((numbers, component, place))
    same = np.r_[False, (place[order][1:] == place[order][:-1]) & (component[order][1:] == component[order][:-1])]
    rank = np.empty(len(place), np.int64)
    rank[order] = numbers - np.maximum.accumulate(np.where(same, 0, numbers))
    return rank


def _fingerprints(component: Array, place: Array, rank: Array, a: Array, b: Array) -> Array:
    """A hash per component of its links as pairs of (place, rank), independent of their order and direction."""
    ends = np.stack([place, rank], axis=1).astype(np.uint64)

    def mix(x: Array) -> Array:  # splitmix64
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))

    with np.errstate(over="ignore"):
        own = mix(mix(ends[:, 0] + np.uint64(1)) + ends[:, 1])
        low, high = np.minimum(own[a], own[b]), np.maximum(own[a], own[b])
        links = np.unique(np.stack([component[a].astype(np.uint64), mix(mix(low) + high)], axis=1), axis=0)
        prints = np.zeros(int(component.max()) + 1, np.uint64)
        np.add.at(prints, links[:, 0].astype(np.int64), links[:, 1])
    return prints
