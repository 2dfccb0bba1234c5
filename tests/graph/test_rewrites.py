"""Rewrites of import: each applies where it should, keeps function and interface, and leaves nothing for a second run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.graph import load
from onnxq_plugins.graph.canonical import AFTER_FUNCTIONS
from tests.networks import feed_of, network, weight
from tests.zoo import examples

IMAGE = ["N", 4, 9, 8]


def outputs(model, feed, optimize):
    return runtimes.session(model, optimize=optimize).run(None, feed)


def imported(model, feeds=None):
    """The canonical graph, after checking that nothing that can be seen of the model changed."""
    graph = load(model)
    written = graph.model()
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(written, strict_mode=True))
    for feed in feeds or [feed_of(model), feed_of(model, seed=1)]:
        expected = outputs(model, feed, False)
        for optimize in (False, True):
            for a, b in zip(expected, outputs(written, feed, optimize), strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                if a.size and a.dtype.kind == "f":
                    largest = float(np.abs(a[np.isfinite(a)]).max(initial=1e-6))
                    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * largest)
                else:
                    np.testing.assert_array_equal(a, b)
    assert [v.name for v in written.graph.output] == [v.name for v in model.graph.output]
    assert [v.name for v in written.graph.input] == [v.name for v in model.graph.input]
    again = load(written)
    assert kinds(again) == kinds(graph) and not graph.touched
    return graph


def kinds(graph):
    return Counter(node.op for node in graph.nodes)


def ops(operators, shape=IMAGE, constants=(), **more):
    """Kinds of operators after import."""
    return kinds(imported(network(operators, shape, dict(constants), **more)))


def i64(*values):
    return np.array(values, np.int64)


def f32(values):
    return np.asarray(values, np.float32)


CONV = ("Conv", ["p", "w"], ["y"], {})
W = {"w": (5, 4, 3, 3)}
SPATIAL = i64(0, 0, 1, 2, 0, 0, 0, 1)
COLUMN = f32(np.linspace(0.5, 2, 4)).reshape(4, 1, 1)
OUT = f32(np.linspace(-1, 2, 5)).reshape(5, 1, 1)
NORM = {f"n{i}": f32(v) for i, v in enumerate(np.linspace(0.5, 2, 16).reshape(4, 4))}
NORM5 = {f"n{i}": f32(v) for i, v in enumerate(np.linspace(0.5, 2, 20).reshape(4, 5))}
LAST = {"perm": [0, 2, 3, 1]}
SECOND = {"perm": [0, 3, 1, 2]}

# name of a rewrite -> (operators, constants, shape, what remains); each is one place where it applies
CASES: dict[str, list[tuple]] = {
    "absorb_pad": [([("Pad", ["x", "pads"], ["p"], {}), CONV], {"pads": SPATIAL, **W}, IMAGE, {"Conv": 1})],
    "join_pads": [
        (
            [("Pad", ["x", "a"], ["p"], {}), ("Pad", ["p", "b"], ["y"], {})],
            {"a": i64(0, 1, 1, 0, 0, 0, 0, 0), "b": i64(0, 1, 0, 2, 0, 0, 0, 0)},
            IMAGE,
            {"Pad": 1},
        )
    ],
    "fold_batchnorm": [
        (
            [("Conv", ["x", "w"], ["c"], {}), ("BatchNormalization", ["c", "n0", "n1", "n2", "n3"], ["y"], {})],
            {**W, **NORM5},
            IMAGE,
            {"Conv": 1},
        ),
        (
            [("MatMul", ["x", "m"], ["c"], {}), ("BatchNormalization", ["c", "n0", "n1", "n2", "n3"], ["y"], {})],
            {"m": (6, 5), **NORM5},
            ["N", 6],
            {"Gemm": 1},
        ),
    ],
    "fold_behind": [
        ([("Conv", ["x", "w"], ["c"], {}), ("Mul", ["k", "c"], ["y"], {})], {**W, "k": OUT}, IMAGE, {"Conv": 1}),
        ([("Conv", ["x", "w"], ["c"], {}), ("Sub", ["k", "c"], ["y"], {})], {**W, "k": f32(2)}, IMAGE, {"Conv": 1}),
        (
            [("MatMul", ["x", "m"], ["c"], {}), ("Div", ["c", "k"], ["y"], {})],
            {"m": (6, 5), "k": f32(3)},
            ["N", 7, 6],
            {"MatMul": 1},
        ),
    ],
    "fold_behind_sum": [
        (
            [("MatMul", ["x", "m"], ["c"], {}), ("Add", ["c", "b"], ["s"], {}), ("Mul", ["s", "k"], ["y"], {})],
            {"m": (6, 5), "b": (5,), "k": OUT.ravel()},
            ["N", 7, "T", 6],
            {"MatMul": 1, "Add": 1},
        )
    ],
    "fold_into_sum": [
        (
            [
                ("MatMul", ["x", "m"], ["a"], {}),
                ("MatMul", ["x", "r"], ["b"], {}),
                ("Add", ["a", "b"], ["s"], {}),
                ("Add", ["s", "k"], ["t"], {}),
                ("Tanh", ["t"], ["y"], {}),
            ],
            {"m": (6, 5), "r": (6, 5), "k": (5,)},
            ["N", 6],
            {"MatMul": 1, "Gemm": 1, "Add": 1, "Tanh": 1},
        )
    ],
    "bound_by_constant": [
        ([("Max", ["zero", "x"], ["y"], {})], {"zero": f32(0)}, IMAGE, {"Relu": 1}),
        ([("Max", ["x", "k"], ["y"], {})], {"k": f32([[-0.5]])}, IMAGE, {"Clip": 1}),
        ([("Min", ["x", "k"], ["y"], {})], {"k": f32(0.5)}, IMAGE, {"Clip": 1}),
    ],
    "join_bounds": [
        (
            [("Max", ["x", "zero"], ["a"], {}), ("Min", ["a", "k"], ["b"], {}), ("Clip", ["b", "low"], ["y"], {})],
            {"zero": f32(0), "k": f32(1), "low": f32(-1)},
            IMAGE,
            {"Clip": 1},
        ),
        ([("Clip", ["x", "low"], ["a"], {}), ("Relu", ["a"], ["y"], {})], {"low": f32(-1)}, IMAGE, {"Relu": 1}),
    ],
    "share_slope": [
        ([("PRelu", ["x", "s"], ["y"], {})], {"s": np.full((4, 1, 1), 0.3, np.float32)}, IMAGE, {"LeakyRelu": 1}),
        ([("PRelu", ["x", "s"], ["y"], {})], {"s": f32([-0.5])}, IMAGE, {"LeakyRelu": 1}),
    ],
    "fold_ahead": [
        (
            [("Mul", ["x", "k"], ["p"], {}), ("Conv", ["p", "w"], ["y"], {"pads": [1] * 4})],
            {"k": COLUMN, **W},
            IMAGE,
            {"Conv": 1},
        ),
        ([("Sub", ["x", "k"], ["p"], {}), CONV], {"k": f32(127.5), **W}, IMAGE, {"Conv": 1}),
        ([("BatchNormalization", ["x", "n0", "n1", "n2", "n3"], ["p"], {}), CONV], {**NORM, **W}, IMAGE, {"Conv": 1}),
        (
            [
                ("BatchNormalization", ["x", "n0", "n1", "n2", "n3"], ["p"], {}),
                ("MatMul", ["p", "w"], ["y"], {}),
            ],
            {**NORM, "w": (4, 6)},
            ["N", 4],
            {"Gemm": 1},
        ),
    ],
    "factor_ahead": [
        (
            [
                ("Relu", ["x"], ["r"], {}),
                (op, ["r", "a"], ["s"], {}),
                (other, ["b", "s"], ["p"], {}),
                ("Conv", ["p", "w"], ["y"], {"pads": [1] * 4}),
            ],
            {"a": f32(3), "b": COLUMN, **W},
            IMAGE,
            {"Relu": 1, "Add": 1, "Conv": 1},
        )
        for op, other in (("Mul", "Add"), ("Div", "Sub"))
    ],
    "join_constants": [
        (
            [("Relu", ["x"], ["r"], {}), ("Mul", ["r", "a"], ["s"], {}), ("Div", ["s", "b"], ["y"], {})],
            {"a": f32(10), "b": COLUMN},
            IMAGE,
            {"Relu": 1, "Mul": 1},
        ),
        ([("Relu", ["x"], ["r"], {}), ("Sub", ["r", "a"], ["y"], {})], {"a": f32(0)}, IMAGE, {"Relu": 1}),
        (
            [("Sub", ["a", "x"], ["r"], {}), ("Add", ["r", "b"], ["s"], {}), ("Relu", ["s"], ["y"], {})],
            {"a": f32(3), "b": COLUMN},
            IMAGE,
            {"Sub": 1, "Relu": 1},
        ),
    ],
    "drop_identity": [([("Relu", ["x"], ["r"], {}), ("Identity", ["r"], ["y"], {})], {}, IMAGE, {"Relu": 1})],
    "drop_dropout": [
        ([("Relu", ["x"], ["r"], {}), ("Dropout", ["r", "ratio"], ["y"], {})], {"ratio": f32(0.5)}, IMAGE, {"Relu": 1})
    ],
    "drop_cast": [
        ([("Relu", ["x"], ["r"], {}), ("Cast", ["r"], ["y"], {"to": TensorProto.FLOAT})], {}, IMAGE, {"Relu": 1}),
        (
            [
                ("Relu", ["x"], ["r"], {}),
                ("Cast", ["r"], ["d"], {"to": TensorProto.DOUBLE}),
                ("Cast", ["d"], ["y"], {"to": TensorProto.FLOAT}),
            ],
            {},
            IMAGE,
            {"Relu": 1},
        ),
    ],
    "drop_trivial": [
        ([("Relu", ["x"], ["r"], {}), ("Concat", ["r"], ["y"], {"axis": 1})], {}, IMAGE, {"Relu": 1}),
        ([("Relu", ["x"], ["r"], {}), ("Split", ["r"], ["y"], {"axis": 1})], {}, IMAGE, {"Relu": 1}),
        ([("Relu", ["x"], ["r"], {}), ("Pad", ["r", "a"], ["y"], {})], {"a": i64(*[0] * 8)}, IMAGE, {"Relu": 1}),
        ([("Relu", ["x"], ["r"], {}), ("Tile", ["r", "a"], ["y"], {})], {"a": i64(1, 1, 1, 1)}, IMAGE, {"Relu": 1}),
        ([("Relu", ["x"], ["r"], {}), ("Expand", ["r", "a"], ["y"], {})], {"a": i64(1, 4, 1, 8)}, IMAGE, {"Relu": 1}),
        (
            [("Relu", ["x"], ["r"], {}), ("Slice", ["r", "a", "b", "c"], ["y"], {})],
            {"a": i64(0, 0), "b": i64(9, 2**62), "c": i64(2, -1)},
            IMAGE,
            {"Relu": 1},
        ),
    ],
    "drop_reshape": [
        (
            [
                ("Unsqueeze", ["x", "a"], ["u"], {}),
                ("Relu", ["u"], ["r"], {}),
                ("Squeeze", ["r", "a"], ["s"], {}),
                ("Unsqueeze", ["s", "b"], ["y"], {}),
            ],
            {"a": i64(1), "b": i64(0)},
            [3, 5],
            {"Unsqueeze": 1, "Relu": 1, "Reshape": 1},
        ),
        (
            [("Unsqueeze", ["x", "a"], ["u"], {}), ("Squeeze", ["u", "a"], ["s"], {}), ("Relu", ["s"], ["y"], {})],
            {"a": i64(1)},
            ["N", "T"],
            {"Relu": 1},
        ),
    ],
    "fold_target": [
        (
            [
                ("Shape", ["x"], ["s"], {}),
                ("Gather", ["s", "zero"], ["n"], {}),
                ("Unsqueeze", ["n", "zeros"], ["u"], {}),
                ("Concat", ["u", "rest"], ["t"], {"axis": 0}),
                ("Relu", ["x"], ["r"], {}),
                ("Reshape", ["r", "t"], ["y"], {}),
            ],
            {"zero": i64(0).reshape(()), "zeros": i64(0), "rest": i64(-1)},
            IMAGE,
            {"Relu": 1, "Reshape": 1},
        )
    ],
    "drop_expand": [
        (
            [
                ("Shape", ["x"], ["s"], {}),
                ("Relu", ["x"], ["r"], {}),
                ("Expand", ["r", "s"], ["e"], {}),
                ("Tanh", ["e"], ["y"], {}),
            ],
            {},
            ["N", "T", 5],
            {"Relu": 1, "Tanh": 1},
        )
    ],
    "fold_sizes": [
        (
            [
                ("Shape", ["x"], ["s"], {}),
                ("Slice", ["s", "a", "b"], ["n"], {}),
                ("Mul", ["n", "two"], ["t"], {}),
                ("Concat", ["head", "t"], ["all"], {"axis": 0}),
                ("Resize", ["x", "", "", "all"], ["y"], {"mode": "nearest"}),
            ],
            {"a": i64(2), "b": i64(4), "two": i64(2, 3), "head": i64(2, 4)},
            [2, 4, 9, 8],
            {"Resize": 1},
        )
    ],
    "join_transposes": [
        (
            [("Transpose", ["x"], ["t"], LAST), ("Transpose", ["t"], ["u"], SECOND), ("Relu", ["u"], ["y"], {})],
            {},
            IMAGE,
            {"Relu": 1},
        ),
        (
            [("Transpose", ["x"], ["t"], LAST), ("Transpose", ["t"], ["y"], {"perm": [0, 2, 1, 3]})],
            {},
            IMAGE,
            {"Transpose": 1},
        ),
    ],
    "join_moved_units": [
        (
            [("Transpose", ["x"], ["t"], {"perm": [0, 3, 2, 1]}), ("Reshape", ["t", "s"], ["y"], {})],
            {"s": i64(0, 5, 7, 1)},
            ["N", 7, 1, 5],
            {"Transpose": 1},
        )
    ],
    "drop_units_first": [
        (
            [
                ("Conv", ["x", "w"], ["c"], {}),
                ("Transpose", ["c"], ["t"], LAST),
                ("Squeeze", ["t", "a"], ["s"], {}),
                ("Transpose", ["s"], ["u"], {"perm": [0, 2, 1]}),
                ("Softmax", ["u"], ["y"], {}),
            ],
            {"w": (5, 4, 1, 3), "a": i64(1)},
            ["N", 4, 1, 8],
            {"Conv": 1, "Squeeze": 1, "Softmax": 1},
        )
    ],
    "add_units_last": [
        (
            [
                ("Transpose", ["x"], ["s"], {"perm": [0, 2, 1]}),
                ("Unsqueeze", ["s", "a"], ["t"], {}),
                ("Transpose", ["t"], ["u"], SECOND),
                ("Conv", ["u", "w"], ["y"], {}),
            ],
            {"w": (5, 4, 1, 3), "a": i64(1)},
            ["N", 4, 8],
            {"Conv": 1, "Unsqueeze": 1},
        )
    ],
    "drop_units_later": [
        (
            [
                ("Conv", ["x", "w"], ["c"], {}),
                ("Squeeze", ["c", "a"], ["s"], {}),
                ("Add", ["s", "b"], ["t"], {}),
                ("Relu", ["t"], ["r"], {}),
                ("Mul", ["r", "r"], ["y"], {}),
            ],
            {"w": (5, 4, 1, 3), "a": i64(2), "b": (5, 1)},
            ["N", 4, 1, 8],
            {"Conv": 1, "Relu": 1, "Squeeze": 1, "Mul": 1},
        )
    ],
    "slices_to_depth": [
        (
            [
                *[("Slice", ["x", f"s{i}", "end", "h", "two"], [f"r{i}"], {}) for i in (0, 1)],
                *[("Slice", [f"r{i}", f"s{j}", "end", "v", "two"], [f"q{i}{j}"], {}) for i in (0, 1) for j in (0, 1)],
                ("Concat", ["q00", "q10", "q01", "q11"], ["p"], {"axis": 1}),
                CONV,
            ],
            {"s0": i64(0), "s1": i64(1), "end": i64(2**62), "h": i64(2), "v": i64(3), "two": i64(2), "w": (5, 12, 3, 3)},
            ["N", 3, 8, 10],
            {"SpaceToDepth": 1, "Conv": 1},
        )
    ],
}


@pytest.mark.parametrize("name, at", [(name, at) for name, cases in CASES.items() for at in range(len(cases))])
def test_rewrite(name, at):
    operators, constants, shape, remains = CASES[name][at]
    assert ops(operators, shape, constants) == remains


def test_every_rewrite_has_a_case():
    assert {entry.name for entry in AFTER_FUNCTIONS} == set(CASES) and len({e.name for e in AFTER_FUNCTIONS}) == len(
        AFTER_FUNCTIONS
    )
    assert all(entry.apply.__doc__ for entry in AFTER_FUNCTIONS)


def test_names_of_layers_stay():
    for cases in CASES.values():
        for operators, constants, shape, _ in cases:
            model = network(operators, shape, constants)
            layers = {n.name for n in model.graph.node if n.op_type in ("Conv", "MatMul")}
            assert {layer.name for layer in load(model).layers} == layers


# ---- where rewrites must not apply ----------------------------------------------------------------------------------------


def conv_on(pads, mode="constant", **constants):
    return [("Pad", ["x", "pads", *constants], ["p"], {"mode": mode}), CONV], {"pads": i64(*pads), **W, **constants}


@pytest.mark.parametrize(
    "pads, mode, value, absorbed",
    [
        ((0, 0, 1, 1, 0, 0, 1, 1), "constant", 0.0, True),
        ((0, 0, 1, 1, 0, 0, 1, 1), "constant", 0.5, False),
        ((0, 0, 1, 1, 0, 0, 1, 1), "reflect", 0.0, False),
        ((0, 0, 1, 1, 0, 0, 1, 1), "edge", 0.0, False),
        ((0, 0, -1, 1, 0, 0, 1, 1), "constant", 0.0, False),
        ((1, 0, 1, 1, 0, 0, 1, 1), "constant", 0.0, False),
    ],
)
def test_pads_that_a_conv_takes(pads, mode, value, absorbed):
    operators, constants = conv_on(pads, mode, value=f32(value))
    assert ops(operators, IMAGE, constants) == {"Conv": 1} | ({} if absorbed else {"Pad": 1})


def test_pads_of_channels_stay():
    operators, constants = conv_on((0, 0, 1, 1, 0, 1, 1, 1))
    assert ops(operators, IMAGE, constants | {"w": (5, 5, 3, 3)}) == {"Conv": 1, "Pad": 1}


def test_pad_with_axes():
    operators = [("Pad", ["x", "pads", "", "axes"], ["p"], {}), CONV]
    graph = imported(network(operators, IMAGE, {"pads": i64(1, 2, 0, 1), "axes": i64(-1, 2), **W}, opset=18))
    assert kinds(graph) == {"Conv": 1} and graph.layers[0].attrs["pads"] == [2, 1, 1, 0]


def test_pad_that_others_read():
    operators = [("Pad", ["x", "pads"], ["p"], {}), CONV, ("Relu", ["p"], ["z"], {})]
    assert ops(operators, IMAGE, {"pads": SPATIAL, **W}, outputs=("y", "z")) == {"Conv": 1, "Pad": 1, "Relu": 1}
    graph = imported(network(operators[:2], IMAGE, {"pads": SPATIAL, **W}, outputs=("y", "p")))
    assert kinds(graph) == {"Conv": 1, "Pad": 1} and graph.layers[0].input == "x"


def test_computed_pads():
    """As efficientnet's padding is exported: from the sizes of its input."""
    operators = [
        ("Shape", ["x"], ["s"], {}),
        ("Slice", ["s", "a", "b"], ["n"], {}),
        ("Sub", ["n", "seven"], ["d"], {}),
        ("Concat", ["none", "none", "none", "d"], ["pads"], {"axis": 0}),
        ("Pad", ["x", "pads"], ["p"], {}),
        CONV,
    ]
    constants = {"a": i64(2), "b": i64(4), "seven": i64(8, 7), "none": i64(0, 0), **W}
    assert ops(operators, IMAGE, constants) == {"Conv": 1}


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attrs", [{}, {"ceil_mode": 1}, {"pads": [1, 0, 0, 1]}, {"auto_pad": "SAME_UPPER"}, {"count": 1, "pads": [1] * 4}]
)
@pytest.mark.parametrize("behind", ["x", "r"])
@pytest.mark.parametrize("value", [0.0, -np.inf, 1.0])
def test_pad_before_pooling(op, attrs, behind, value):
    attrs = dict(attrs)
    count = attrs.pop("count", 0)
    if op == "AveragePool" and (count or np.isinf(value)):
        if np.isinf(value):
            return
        attrs["count_include_pad"] = count
    operators = [
        ("Relu", ["x"], ["r"], {}),
        ("Pad", [behind, "pads", "v"], ["p"], {}),
        (op, ["p"], ["y"], {"kernel_shape": [4, 4], "strides": [2, 2], **attrs}),
    ]
    found = ops(operators, IMAGE, {"pads": SPATIAL, "v": f32(value)})
    plain = "ceil_mode" not in attrs and "auto_pad" not in attrs
    if op == "MaxPool":
        absorbed = plain and (np.isinf(value) or (value == 0 and behind == "r"))
    else:
        absorbed = plain and value == 0 and ("pads" not in attrs or count)
    assert ("Pad" not in found) is bool(absorbed)


def test_pooling_that_would_read_padding_alone():
    operators = [
        ("Relu", ["x"], ["r"], {}),
        ("Pad", ["r", "pads"], ["p"], {}),
        ("MaxPool", ["p"], ["y"], {"kernel_shape": [2, 2]}),
    ]
    assert ops(operators, IMAGE, {"pads": i64(0, 0, 2, 0, 0, 0, 0, 0)})["Pad"] == 1


@pytest.mark.parametrize(
    "op, values, constant_first",
    [("Div", OUT + 20, True), ("Mul", f32(np.ones((1, 1, 7, 6))), False), ("Add", f32(np.ones((1, 1, 1, 1, 1))), False)],
)
def test_constants_that_stay(op, values, constant_first):
    operators = [
        ("Conv", ["x", "w"], ["c"], {}),
        (op, ["k", "c"] if constant_first else ["c", "k"], ["s"], {}),
        ("Tanh", ["s"], ["y"], {}),
    ]
    assert ops(operators, IMAGE, {**W, "k": values})[op] == 1


def test_constants_between_padded_layers():
    """A summand in front of a padded layer would be missing in its padding; behind ConvTranspose's input, at its edges."""
    padded = [("Relu", ["x"], ["r"], {}), ("Add", ["r", "k"], ["p"], {}), ("Conv", ["p", "w"], ["y"], {"pads": [1] * 4})]
    assert ops(padded, IMAGE, {"k": COLUMN, **W})["Add"] == 1
    same = [*padded[:2], ("Conv", ["p", "w"], ["y"], {"auto_pad": "SAME_LOWER"})]
    assert ops(same, IMAGE, {"k": COLUMN, **W})["Add"] == 1
    turned = [*padded[:2], ("ConvTranspose", ["p", "t"], ["y"], {})]
    assert ops(turned, IMAGE, {"k": COLUMN, "t": (4, 3, 2, 2)})["Add"] == 1
    scaled = [padded[0], ("Mul", ["r", "k"], ["p"], {}), ("ConvTranspose", ["p", "t"], ["y"], {})]
    assert ops(scaled, IMAGE, {"k": COLUMN, "t": (4, 3, 2, 2)}) == {"Relu": 1, "ConvTranspose": 1}


def test_values_that_are_read_elsewhere_stay():
    conv = ("Conv", ["x", "w"], ["c"], {})
    read = [conv, ("Mul", ["c", "k"], ["y"], {}), ("Relu", ["c"], ["z"], {})]
    assert ops(read, IMAGE, {**W, "k": OUT}, outputs=("y", "z"))["Mul"] == 1
    assert ops(read[:2], IMAGE, {**W, "k": OUT}, outputs=("y", "c"))["Mul"] == 1
    both = [("Mul", ["x", "k"], ["p"], {}), CONV, ("Relu", ["p"], ["z"], {})]
    assert ops(both, IMAGE, {**W, "k": COLUMN}, outputs=("y", "z"))["Mul"] == 1
    assert ops(both[:2], IMAGE, {**W, "k": COLUMN}, outputs=("y", "p"))["Mul"] == 1


def test_one_factor_for_several_layers():
    operators = [("Mul", ["x", "k"], ["p"], {}), CONV, ("Conv", ["p", "w"], ["z"], {"pads": [1] * 4})]
    assert ops(operators, IMAGE, {**W, "k": COLUMN}, outputs=("y", "z")) == {"Conv": 2}


def test_bounds_that_stay():
    assert ops([("Max", ["x", "k"], ["y"], {})], IMAGE, {"k": COLUMN}) == {"Max": 1}
    assert ops([("Max", ["x", "k"], ["y"], {})], IMAGE, {"k": f32([[[[[0.0]]]]])}) == {"Max": 1}
    apart = [("Clip", ["x", "one"], ["a"], {}), ("Clip", ["a", "", "zero"], ["y"], {})]
    assert ops(apart, IMAGE, {"one": f32(1), "zero": f32(0)}) == {"Clip": 2}
    read = [("Relu", ["x"], ["r"], {}), ("Clip", ["r", "", "one"], ["y"], {}), ("Tanh", ["r"], ["z"], {})]
    assert ops(read, IMAGE, {"one": f32(1)}, outputs=("y", "z")) == {"Relu": 1, "Clip": 1, "Tanh": 1}


@pytest.mark.parametrize("opset", [9, 10, 11])
def test_pads_of_old_opsets(opset):
    """There they are an attribute."""
    pads = [0, 0, 1, 2, 0, 0, 0, 1]
    pad = ("Pad", ["x", "pads"], ["p"], {}) if opset == 11 else ("Pad", ["x"], ["p"], {"pads": pads})
    model = network([pad, CONV], IMAGE, {**W, **({"pads": i64(*pads)} if opset == 11 else {})}, opset=opset)
    graph = imported(model)
    assert kinds(graph) == {"Conv": 1} and graph.layers[0].attrs["pads"] == [1, 2, 0, 1]


def test_large_summands_stay():
    """A timestamp minus the time of the start: the bias would hold nothing else."""
    operators = [("Sub", ["x", "k"], ["p"], {}), CONV]
    graph = load(network(operators, IMAGE, {**W, "k": f32(1.6e9)}))
    assert kinds(graph) == {"Sub": 1, "Conv": 1}


def captured(name):
    """An If whose branches read tensor `name` of the graph around, beside Conv - Mul and Pad - Conv."""
    branches = [
        helper.make_graph(
            [helper.make_node(op, [name], [f"{op}_o"])], op, [], [helper.make_tensor_value_info(f"{op}_o", 1, None)]
        )
        for op in ("Relu", "Neg")
    ]
    model = network(
        [
            ("Pad", ["x", "pads"], ["p"], {}),
            ("Conv", ["p", "w"], ["c"], {}),
            ("Mul", ["c", "k"], ["m"], {}),
            ("ReduceMax", ["m"], ["top"], {"keepdims": 0}),
            ("Greater", ["top", "zero"], ["big"], {}),
        ],
        IMAGE,
        {"pads": SPATIAL, **W, "k": OUT, "zero": f32(0)},
        outputs=("m", "y"),
    )
    model.graph.node.append(
        helper.make_node("If", ["big"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1])
    )
    return model


@pytest.mark.parametrize("name, remains", [("x", {}), ("p", {"Pad": 1}), ("c", {"Mul": 1}), ("m", {})])
def test_what_branches_read(name, remains):
    found = kinds(imported(captured(name)))
    assert found == {"Conv": 1, "ReduceMax": 1, "Greater": 1, "If": 1, **remains}


def test_operators_of_other_domains_are_left_alone():
    model = network(
        [("Relu", ["x"], ["r"], {}), ("Identity", ["r"], ["i"], {"domain": "acme"}), ("Relu", ["i"], ["y"], {})], IMAGE, {}
    )
    model.opset_import.append(helper.make_opsetid("acme", 1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, IMAGE))
    assert kinds(load(model)) == {"Relu": 2, "Identity": 1}


def test_double_precision_is_left_alone():
    double = np.linspace(1, 2, 4).reshape(4, 1, 1)
    operators = [("Mul", ["x", "k"], ["p"], {}), ("Div", ["p", "k"], ["y"], {})]
    assert ops(operators, IMAGE, {"k": double}, kind=TensorProto.DOUBLE, output_kind=TensorProto.DOUBLE) == {
        "Mul": 1,
        "Div": 1,
    }


def test_symbols_of_outputs_are_not_believed():
    """Exporters give axes of outputs the names of those of inputs, whatever their sizes."""
    operators = [("MaxPool", ["x"], ["p"], {"kernel_shape": [2, 2], "strides": [2, 2]}), ("Reshape", ["p", "s"], ["y"], {})]
    model = network(operators, ["N", 2, "H", "W"], {"s": i64(0, 2, -1, 1)})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["N", 2, "H", "W"]))
    feed = {"x": np.random.default_rng(0).standard_normal((3, 2, 8, 4)).astype(np.float32)}
    assert kinds(imported(model, [feed])) == {"MaxPool": 1, "Reshape": 1}


def test_sizes_that_contradict_the_inputs_are_not_believed():
    """Of an exporter that wrote one sample's sizes, when the input was opened later."""
    model = network([("Relu", ["x"], ["r"], {}), ("Transpose", ["r"], ["y"], {"perm": [1, 0, 2]})], ["N", 3, 4], {})
    model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 3, 4]))
    graph = load(model)
    assert kinds(graph) == {"Relu": 1, "Transpose": 1} and graph.shape("r") == ("N", 3, 4)


def test_an_identity_between_input_and_output_stays():
    operators = [
        ("Identity", ["x"], ["y"], {}),
        ("Relu", ["x"], ["r"], {}),
        ("Identity", ["r"], ["z"], {}),
        ("Identity", ["r"], ["v"], {}),
    ]
    assert ops(operators, IMAGE, {}, outputs=("y", "z", "v")) == {"Identity": 2, "Relu": 1}


def test_duplicates_are_one():
    operators = [
        *[("Conv", ["x", "w"], [f"c{i}"], {}) for i in (0, 1)],
        *[("Sigmoid", ["x"], [f"s{i}"], {}) for i in (0, 1)],
        *[("Clip", [f"s{i}", f"low{i}"], [f"t{i}"], {}) for i in (0, 1)],
        ("Mul", ["t0", "t1"], ["m"], {}),
        ("ReduceMean", ["m"], ["y"], {}),
        ("Add", ["c0", "c1"], ["z"], {}),
    ]
    found = ops(operators, IMAGE, {**W, "low0": f32(0.25), "low1": f32(0.25)}, outputs=("y", "z"))
    assert found == {"Conv": 2, "Sigmoid": 1, "Clip": 1, "Mul": 1, "ReduceMean": 1, "Add": 1}


def test_chance_is_not_shared():
    operators = [*[("RandomNormalLike", ["x"], [f"r{i}"], {}) for i in (0, 1)], ("Sub", ["r0", "r1"], ["y"], {})]
    assert kinds(load(network(operators, IMAGE, {})))["RandomNormalLike"] == 2


def test_a_gelu_is_recognised_before_its_factor_moves():
    operators = [
        ("Div", ["x", "root"], ["a"], {}),
        ("Erf", ["a"], ["b"], {}),
        ("Add", ["b", "one"], ["c"], {}),
        ("Mul", ["x", "c"], ["d"], {}),
        ("Mul", ["d", "half"], ["p"], {}),
        CONV,
    ]
    constants = {"root": f32(2**0.5), "one": f32(1), "half": f32(0.5), **W}
    assert ops(operators, IMAGE, constants, opset=20) == {"Gelu": 1, "Conv": 1}


# ---- random ---------------------------------------------------------------------------------------------------------------


@examples(60)
@given(st.data())
def test_padded_layers_of_any_kind(data):
    """Pads of all kinds before Conv and pooling of all kinds, of one to three spatial axes."""
    axes = data.draw(st.integers(1, 3))
    small = st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes)
    pads = data.draw(small)
    op = data.draw(st.sampled_from(["Conv", "MaxPool", "AveragePool"]))
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes))
    attrs = {"strides": data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes)), "kernel_shape": kernel}
    padding = data.draw(st.sampled_from(["none", "own", "VALID", "SAME_UPPER"]))
    if padding == "own":
        attrs["pads"] = [min(n, k - 1) for n, k in zip(data.draw(small), kernel * 2, strict=True)]
    elif padding != "none":
        attrs["auto_pad"] = padding
        attrs["strides"] = [1] * axes  # onnxruntime refuses others, larger than the kernel
    if op == "AveragePool":
        attrs["count_include_pad"] = data.draw(st.integers(0, 1))
    if op != "Conv" and padding in ("none", "own"):
        attrs["ceil_mode"] = data.draw(st.integers(0, 1))
    if op != "AveragePool" and "auto_pad" not in attrs:
        attrs["dilations"] = data.draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    value = data.draw(st.sampled_from([0.0, 0.0, 0.0, -1.0] + ([-np.inf] if op == "MaxPool" else [])))
    full = i64(*[0, 0, *pads[:axes], 0, 0, *pads[axes:]])
    operators = [
        (data.draw(st.sampled_from(["Relu", "Tanh"])), ["x"], ["r"], {}),
        ("Pad", ["r", "pads", "v"], ["p"], {}),
        (op, ["p", "w"] if op == "Conv" else ["p"], ["y"], attrs),
    ]
    constants = {"pads": full, "v": f32(value)} | ({"w": (3, 2, *kernel)} if op == "Conv" else {})
    imported(network(operators, ["N", 2, *(9, 8, 10)[:axes]], constants))


LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul3")


@examples(80)
@given(st.data())
def test_constants_around_layers_of_any_kind(data):
    """One to three constants of any shape that fits, before and behind a layer."""
    kind, group = data.draw(st.sampled_from(LAYERS)), data.draw(st.sampled_from([1, 2]))
    image = kind in ("Conv", "ConvTranspose")
    shape = ["N", 4, 6, 5] if image else ["N", 3, 4] if kind == "MatMul3" else ["N", 4]
    weights = {"Conv": (6, 4 // group, 3, 2), "ConvTranspose": (4, 6 // group, 3, 2), "Gemm": (4, 6)}
    attrs = {"group": group, "pads": [data.draw(st.integers(0, 1))] * 4} if image else {}
    operators, constants, at = [], {"w": weights.get(kind, (4, 6))}, "x"

    def more(where, channels):
        nonlocal at
        for i in range(data.draw(st.integers(0, 2))):
            op, first = (
                data.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "BatchNormalization"])),
                data.draw(st.booleans()),
            )
            name, out = f"{where}{i}", f"{where}{i}_out"
            if op == "BatchNormalization":
                if kind == "MatMul3":
                    continue
                values = np.random.default_rng(i).uniform(0.5, 2, (4, channels)).astype(np.float32)
                constants.update({f"{name}_{j}": v for j, v in enumerate(values)})
                operators.append((op, [at, *[f"{name}_{j}" for j in range(4)]], [out], {}))
            else:
                wide = data.draw(st.sampled_from([(), (1,), (channels,), (1, channels)]))
                wide = (*wide, 1, 1) if image and wide else wide
                constants[name] = np.random.default_rng(i).uniform(0.5, 2, wide).astype(np.float32)
                first = first and (op != "Div" or data.draw(st.booleans()))
                operators.append((op, [name, at] if first else [at, name], [out], {}))
            at = out

    operators.append(("Softplus", [at], ["s"], {}))  # never 0, which some divide by
    at = "s"
    more("a", 4)
    operators.append((kind.rstrip("3"), [at, "w"], ["layer"], attrs))
    at = "layer"
    more("b", 6)
    operators.append(("Identity", [at], ["y"], {}))
    model = network(operators, shape, constants)
    graph = load(model)
    feed = feed_of(model)
    (expected,), (found,) = outputs(model, feed, False), outputs(graph.model(), feed, False)
    largest = float(np.abs(expected).max())
    if np.isfinite(largest) and largest < 1e3:  # a constant divided by nearly nothing has any error
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * largest)
    assert (
        len(graph.layers) == 1
        and graph.layers[0].name == f"{kind.rstrip('3').lower()}_{[o[0] for o in operators].index(kind.rstrip('3'))}"
    )
    assert kinds(load(graph.model())) == kinds(graph)


def test_initializers_that_are_outputs_stay():
    model = network(
        [("Conv", ["x", "w"], ["c"], {}), ("Mul", ["c", "k"], ["y"], {})], IMAGE, {**W, "k": OUT}, outputs=("y", "w")
    )
    (_, w) = outputs(load(model).model(), feed_of(model), False)
    np.testing.assert_array_equal(w, numpy_helper.to_array(model.graph.initializer[0]))


def test_weights_below_the_normal_numbers_become_zero():
    """Some processors are many times slower with them."""
    values = weight((8, 3, 3, 3))
    values[::2] *= np.float32(1e-39)
    values[1, 0, 0, 0] = -1e-42
    model = network([("Conv", ["x", "w"], ["y"], {})], [1, 3, 12, 12], {"w": values})
    graph = load(model)
    kept = graph.constant(graph.layers[0].weight)
    assert not ((np.abs(kept) < np.finfo(np.float32).tiny) & (kept != 0)).any()
    assert np.array_equal(kept[1::2].ravel()[1:], values[1::2].ravel()[1:]) and not kept[::2].any()
    feed = {"x": np.ones((1, 3, 12, 12), np.float32)}
    y, z = (runtimes.session(m).run(None, feed)[0] for m in (model, graph.model()))
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-30)
