"""Connected components."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.spec import Array


def connected(count: int, a: Array, b: Array) -> Array:
    """The number of each element's component [count], in the order of their first elements.

    a, b   the ends of each link

    Roots of trees join the smallest root that a link leads to, and trees are made flat, again and again: some rounds of
    numpy. (scipy.sparse has it, too, but importing that takes longer than a small network's quantization.)
    """
    root = np.arange(count)
    while not (root[a] == root[b]).all():
        ends = root[a], root[b]
        for end in ends:
            np.minimum.at(root, end, np.minimum(*ends))
        while (root != root[root]).any():
            root = root[root]
    return np.unique(root, return_inverse=True)[1]
