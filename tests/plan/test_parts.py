"""Where a tensor that float operators write is quantized: at its root, or behind the slices of it that layers read."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import quantize, runtimes
from onnxq_plugins.measure import sqnr
from tests.networks import feed_of, network, weight

COLUMNS = 16


def sliced(parts):
    """Slices of axis 1 of a tensor [1, 4, 16], each read by a MatMul of its own."""
    operators, constants, outputs = [("Tanh", ["x"], ["t"], {})], {}, []
    for n, (first, last) in enumerate(parts):
        constants |= {f"s{n}": np.int64([first]), f"e{n}": np.int64([last]), f"w{n}": (COLUMNS, 8)}
        operators += [
            ("Slice", ["t", f"s{n}", f"e{n}", "axis"], [f"p{n}"], {}),
            ("Transpose", [f"p{n}"], [f"q{n}"], {"perm": [1, 0, 2]}),
            ("MatMul", [f"q{n}", f"w{n}"], [f"y{n}"], {}),
        ]
        outputs.append(f"y{n}")
    return network(operators, [1, 4, COLUMNS], constants | {"axis": np.int64([1])}, outputs=outputs)


def planned(model):
    result = quantize(model, {}, [feed_of(model, seed) for seed in range(4)], workers=1)
    return {name for name in result.plan if not result.graph.is_constant(name)}, result


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(0, 1)], {"p0"}),
        ([(0, 1), (1, 2)], {"p0", "p1"}),
        ([(0, 2), (2, 4)], {"t"}),  # all of it is read: one quantizer
        ([(0, 3), (1, 4)], {"t"}),  # overlapping slices are more values than the whole
    ],
)
def test_parts_that_are_less_than_the_whole_have_grids_of_their_own(parts, expected):
    assert planned(sliced(parts))[0] == expected


def test_what_no_layer_reads_costs_the_others_nothing():
    model = sliced([(0, 1), (1, 2)])
    samples = [feed_of(model, seed) for seed in range(8)]
    for x in samples:
        x["x"][:, 2:] *= 1000  # cell states beside hidden ones
    result = quantize(model, {}, samples[:6], workers=1)
    for x in samples[6:]:
        pair = (runtimes.session(m, optimize=False).run(None, x) for m in (model, result.model))
        assert min(sqnr(a, b) for a, b in zip(*pair, strict=True)) > 30


def test_parts_of_what_an_integer_kernel_writes_share_its_grid():
    constants = {
        "w": weight((8, 3, 3, 3)),
        **{f"v{n}": weight((4, 4, 1, 1), n) for n in range(2)},
        **{"s0": np.int64([0]), "e0": np.int64([4]), "s1": np.int64([4]), "e1": np.int64([8]), "axis": np.int64([1])},
    }
    operators = [("Conv", ["x", "w"], ["c"], {})]
    for n in range(2):
        operators += [("Slice", ["c", f"s{n}", f"e{n}", "axis"], [f"p{n}"], {}), ("Conv", [f"p{n}", f"v{n}"], [f"y{n}"], {})]
    model = network(operators, [1, 3, 8, 8], constants, outputs=["y0", "y1"])
    assert planned(model)[0] == {"x", "c", "y0", "y1"}
