"""Channels as single elements, and the groups that their links leave.

Every channel of every tensor axis is one element. Connected components are channels that share one fate, and components
that visit the same places in the same way can trade theirs: those form a group. `graph/groups.py` makes the links.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.spec import Array

Kind = Literal["permute", "rescale"]
Role = Literal["output", "input", "fixed"]
Key = tuple[str, int, Role, tuple[int, int] | None]


@dataclass(frozen=True, eq=False)
class Member:
    """One place of a group: channel c sits at positions index[c] of an axis of a tensor.

    index   [channels, positions per channel]
    role    how values follow when channel c is scaled by f: ``output`` multiplied by f (activations, output rows of
            a weight, biases), ``input`` divided by f (input columns of a weight), ``fixed`` unchanged
    rows    only these rows (axis 0) of the tensor take part: one group of a grouped convolution
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

    def order_by(self, tensor: str, axis: int, wanted: Array) -> Array | None:
        """The order, for `permute`, by which position p of an axis of a tensor gets the channel that is now at wanted[p];
        None if the group does not move every channel there by itself."""
        index = next((m.index for m in self.members if (m.tensor, m.axis, m.constant) == (tensor, axis, False)), None)
        if index is None or index.shape[1] != 1 or not np.array_equal(np.sort(index[:, 0]), np.arange(len(wanted))):
            return None
        at = index[:, 0]
        return np.asarray(np.argsort(at)[wanted[at]])


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
            size = size if isinstance(size, int) and size < 2**24 else 0  # no channels, but length of a signal
            self.start[key], self.count[key] = self.total, size
            self.total += size
            if rows is None:
                self.todo.append((tensor, axis))
        return np.arange(self.start[key], self.start[key] + self.count[key])

    def link(self, a: Array, b: Array) -> None:
        if len(a) != len(b):
            self.pinned += [a, b]
        else:
            self.links.append((a, b))

    def pin(self, tensor: gs.Tensor, axis: int) -> None:
        self.pinned.append(self.ids(tensor, axis))

    def cut(self) -> list[ChannelGroup]:
        from scipy.sparse import coo_array  # late: large, and only passes on channel groups need it
        from scipy.sparse.csgraph import connected_components

        if not self.links:
            return []
        a, b = (np.concatenate(side) for side in zip(*self.links, strict=True))
        matrix = coo_array((np.ones(len(a), bool), (a, b)), shape=(self.total, self.total))
        _, component = connected_components(matrix, directed=False)
        frozen = set(component[np.concatenate(self.pinned)].tolist()) if self.pinned else set()
        keys = list(self.start)
        place = np.repeat(np.arange(len(keys)), [self.count[key] for key in keys])
        # the how-manieth element of its component at its place: two components can trade places only if their links
        # run between the same ranks
        order = np.lexsort((np.arange(self.total), component, place))
        same = np.r_[False, (place[order][1:] == place[order][:-1]) & (component[order][1:] == component[order][:-1])]
        starts = np.maximum.accumulate(np.where(same, 0, np.arange(self.total)))
        rank_of = np.empty(self.total, np.int64)
        rank_of[order] = np.arange(self.total) - starts
        print_of = _fingerprints(component, place, rank_of, a, b)
        visits: dict[int, list[tuple[int, int]]] = defaultdict(list)  # component -> (place, how often)
        for at, key in enumerate(keys):
            found, counts = np.unique(component[self.start[key] : self.start[key] + self.count[key]], return_counts=True)
            for c, n in zip(found.tolist(), counts.tolist(), strict=True):
                visits[c].append((at, n))
        alike: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = defaultdict(list)
        for c, visited in visits.items():
            if c not in frozen:
                alike[int(print_of[c]), tuple(visited)].append(c)
        groups = []
        for (_, places), components in alike.items():
            members = []
            rank = {c: i for i, c in enumerate(components)}
            for at, times in places:
                name, axis, role, rows = keys[at]
                of = component[self.start[keys[at]] : self.start[keys[at]] + self.count[keys[at]]]
                index = np.empty((len(components), times), np.int64)
                filled = np.zeros(len(components), np.int64)
                for position, c in enumerate(of.tolist()):
                    if c in rank:
                        index[rank[c], filled[rank[c]]] = position
                        filled[rank[c]] += 1
                members.append(Member(name, axis, index, role, self.graph.is_constant(name), rows))
            if len(components) > 1 and any(m.constant for m in members):
                groups.append(ChannelGroup(len(components), self.kind, tuple(members)))
        return groups


def _fingerprints(component: Array, place: Array, rank: Array, a: Array, b: Array) -> Array:
    """One number per component: a hash of its links as (place, rank) pairs, whatever their order and direction."""
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
