"""Orders of axes. A tensor's `order` lists, axis by axis as the file stores it, which axis of the ONNX tensor stands there:
(0, 2, 3, 1) is NHWC. A Transpose of the model only changes the order; one is written where an operator needs another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq_plugins.spec import Array

Order = tuple[int, ...]


def plain(rank: int) -> Order:
    """ONNX's own order."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """Axis 1 at the end."""
    return (0, *range(2, rank), 1) if rank > 2 else plain(rank)


def stored(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """The shape in the file."""
    return tuple(int(shape[axis]) for axis in order)


def moves_data(shape: Sequence[int], one: Order, other: Order) -> bool:
    """True if two orders of a tensor differ by more than places of axes of size 1."""
    return [a for a in one if shape[a] != 1] != [a for a in other if shape[a] != 1]


def through_reshape(order: Order, old: Sequence[int], new: Sequence[int]) -> Order | None:
    """The order of a reshaped tensor whose data stay as they are stored, or None if they have to move.

    Both shapes are cut into the smallest groups of axes with the same number of elements. A group whose axes are stored one
    after the other, in turn, can be reshaped where it is.
    """
    groups = _groups(old, new)
    if groups is None:
        return None
    place = {axis: at for at, axis in enumerate(axis for axis in order if old[axis] != 1)}
    for before, _ in groups:
        places = [place[axis] for axis in before]
        if places != list(range(places[0], places[0] + len(places))):
            return None
    found = [axis for _, after in sorted(groups, key=lambda group: place[group[0][0]]) for axis in after]
    for known in (plain(len(new)), channels_last(len(new))):
        if [axis for axis in known if new[axis] != 1] == found:
            return known
    for axis in (axis for axis in range(len(new)) if new[axis] == 1):  # before the axis that follows it in ONNX's order
        later = [at for at, other in enumerate(found) if other > axis]
        found.insert(later[0] if later else len(found), axis)
    return tuple(found)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Axes of `old` and of `new` with as many elements, axes of size 1 left out; None for tensors without elements."""
    if 0 in old:
        return None
    before, after = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (old, new))
    groups: list[tuple[list[int], list[int]]] = []
    while before and after:
        one, other = [before.pop(0)], [after.pop(0)]
        sizes = [old[one[0]], new[other[0]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                one.append(before.pop(0))
                sizes[0] *= old[one[-1]]
            else:
                other.append(after.pop(0))
                sizes[1] *= new[other[-1]]
        groups.append((one, other))
    return groups


def widened(order: Order, rank: int) -> Order:
    """The order of a tensor that got axes of size 1 in front."""
    more = rank - len(order)
    return (*range(more), *(axis + more for axis in order))


def turned(values: Array, order: Order) -> Array:
    """Constant values as the file stores them."""
    return np.ascontiguousarray(values.transpose(order)) if values.ndim else values
