"""Transposes of converted networks: as few as compute the same, and nothing between them and the layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from onnxq_plugins.graph import load
from tests.graph.test_rewrites import f32, i64, imported, kinds
from tests.networks import network, weight
from tests.zoo import examples

LAST, SECOND = {"perm": [0, 2, 3, 1]}, {"perm": [0, 3, 1, 2]}


class Converted:
    """A network as tf2onnx writes it: channels last, each layer between two Transposes."""

    def __init__(self):
        self.operators, self.constants, self.count = [], {}, 0

    def constant(self, values):
        self.count += 1
        self.constants[f"c{self.count}"] = values
        return f"c{self.count}"

    def op(self, op, *inputs, **attrs):
        self.count += 1
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.operators.append((op, names, [f"t{self.count}"], attrs))
        return f"t{self.count}"

    def conv(self, x, inputs, outputs, kernel=3, norm=True, relu=True, **attrs):
        """Conv, bias, BatchNorm and Relu, the last three with channels last."""
        y = self.op("Transpose", x, **SECOND)
        y = self.op("Conv", y, weight((outputs, inputs, kernel, kernel), self.count) / kernel, **attrs)
        y = self.op("Add", self.op("Transpose", y, **LAST), weight((1, 1, 1, outputs), self.count))
        if norm:
            y = self.op("Sub", y, weight((1, 1, 1, outputs), self.count))
            y = self.op("Mul", y, np.abs(weight((outputs,), self.count)) + f32(0.5))
            y = self.op("Add", y, weight((outputs,), self.count))
        return self.op("Relu", y) if relu else y

    def block(self, x, inputs, middle, stride=1, shortcut=False):
        y = self.conv(x, inputs, middle, 1)
        if stride > 1:
            y = self.op("Pad", y, i64(0, 0, 0, 0, 0, 1, 1, 0))
            y = self.conv(y, middle, middle, strides=[2, 2])
        else:
            y = self.conv(y, middle, middle, pads=[1] * 4)
        y = self.conv(y, middle, 2 * middle, 1, relu=False)
        if shortcut:
            x = self.conv(x, inputs, 2 * middle, 1, relu=False, strides=[stride, stride])
        return self.op("Relu", self.op("Add", y, x))

    def model(self, y, shape, **more):
        self.operators.append(("Identity", [y], ["y"], {}))
        return network(self.operators, shape, self.constants, **more)


def residual(head="mean"):
    """A residual network of four blocks whose input has channels last."""
    net = Converted()
    x = net.op("Div", "x", f32(127.5))
    x = net.op("Sub", x, f32(1.0))
    x = net.op("Pad", x, i64(0, 1, 1, 0, 0, 1, 1, 0))
    x = net.conv(x, 3, 8, strides=[2, 2])
    x = net.op("Pad", x, i64(0, 0, 0, 0, 0, 1, 1, 0))
    x = net.op("Transpose", net.op("MaxPool", net.op("Transpose", x, **SECOND), kernel_shape=[3, 3], strides=[2, 2]), **LAST)
    x = net.block(x, 8, 4)
    x = net.block(x, 8, 4)
    x = net.block(x, 8, 8, stride=2, shortcut=True)
    x = net.block(x, 16, 8)
    if head == "mean":
        x = net.op("MatMul", net.op("ReduceMean", x, axes=[1, 2], keepdims=0), weight((16, 10)))
        x = net.op("Softmax", net.op("Add", x, weight((10,))))
    return net.model(x, ["N", 32, 32, 3])


def test_a_converted_residual_network():
    """What is left is what a network of that kind has: a Transpose of the input, as convolutions have channels second."""
    graph = imported(residual())
    # of Div, Sub and Pad in front of the first layer the factor and the padding are its own; the summand cannot be
    expected = {"Transpose": 1, "Conv": 14, "Relu": 13, "Add": 5, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1, "Softmax": 1}
    found = kinds(graph)
    assert found == expected


def test_an_output_with_channels_last():
    found = kinds(imported(residual("none")))
    assert found["Transpose"] == 2


def test_squeeze_and_excite():
    """The gate is of [N, 1, 1, C], or a Reshape of [N, C]."""
    for keep in (0, 1):
        net = Converted()
        x = net.conv("x", 3, 8, pads=[1] * 4)
        gate = net.op("ReduceMean", x, axes=[1, 2], keepdims=keep)
        if not keep:
            gate = net.op("Reshape", gate, i64(-1, 1, 1, 8))
        gate = net.op("Sigmoid", net.conv(gate, 8, 8, 1, norm=False, relu=False))
        x = net.conv(net.op("Mul", x, gate), 8, 4, 1)
        found = kinds(imported(net.model(x, ["N", 8, 8, 3])))
        assert found["Transpose"] == 2 and found["Conv"] == 3 and found["Add"] == found["Mul"] - 1 == 0


def test_swish_concat_split_and_resize():
    net = Converted()
    x = net.conv("x", 3, 8, relu=False, pads=[1] * 4)
    x = net.op("Mul", x, net.op("Sigmoid", x))
    net.operators.append(("Split", [x], ["left", "right"], {"axis": 3}))
    left = net.conv("left", 4, 4, 1)
    x = net.op("Concat", left, "right", axis=-1)
    x = net.op("Resize", x, "", f32([1, 2, 2, 1]), mode="nearest", coordinate_transformation_mode="asymmetric")
    x = net.op("Slice", x, i64(1, 1), i64(-1, -1), i64(1, 2))
    found = kinds(imported(net.model(net.conv(x, 8, 4, 1), ["N", 8, 8, 3])))
    assert found["Transpose"] == 2 and found["Conv"] == 3


def test_layers_over_time():
    """Conv1D of TensorFlow: an axis is added, and dropped behind the layer."""
    net = Converted()
    x = "x"
    for inputs, outputs in ((3, 8), (8, 8), (8, 4)):
        y = net.op("Conv", net.op("Transpose", net.op("Unsqueeze", x, i64(1)), **SECOND), weight((outputs, inputs, 1, 3)))
        y = net.op("Squeeze", net.op("Transpose", y, **LAST), i64(1))
        x = net.op("Relu", net.op("Add", y, weight((outputs,))))
    found = kinds(imported(net.model(x, ["N", 20, 3])))
    assert found == {"Transpose": 2, "Conv": 3, "Relu": 3, "Unsqueeze": 1, "Squeeze": 1}


def test_an_image_of_one_channel():
    """Its Transpose is a Reshape in converted networks."""
    net = Converted()
    x = net.op("Reshape", net.op("Pad", "x", i64(0, 1, 1, 0, 0, 1, 0, 0)), i64(-1, 1, 14, 9))
    found = kinds(imported(net.model(net.op("Conv", x, weight((4, 1, 3, 3))), ["N", 12, 8, 1])))
    assert found["Pad"] == 0 and found["Conv"] == 1 and sum(found.values()) == 2


def test_a_transpose_that_softmax_needs_stays():
    """Softmax along an inner axis costs more than it saves."""
    net = Converted()
    y = net.op("Transpose", net.op("Conv", "x", weight((5, 3, 1, 1))), **LAST)
    graph = imported(net.model(net.op("Softmax", y, axis=-1), ["N", 3, 8, 8]))
    assert [n.op for n in graph.nodes] == ["Conv", "Transpose", "Softmax"]


def test_attention_keeps_its_transposes():
    """Heads are split and joined by Transposes that undo nothing."""
    net = Converted()

    def heads(x, perm):
        return net.op("Transpose", net.op("Reshape", x, i64(0, -1, 2, 4)), perm=perm)

    q, k, v = (net.op("MatMul", "x", weight((8, 8), i)) for i in range(3))
    scores = net.op("MatMul", heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1]))
    y = net.op("MatMul", net.op("Softmax", net.op("Mul", scores, f32(0.5))), heads(v, [0, 2, 1, 3]))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), i64(0, -1, 8))
    assert kinds(imported(net.model(y, ["N", 6, 8])))["Transpose"] == 4


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE])
def test_other_types(kind):
    net = Converted()
    y = net.op("Transpose", net.op("Relu", net.op("Transpose", "x", **SECOND)), **LAST)
    assert kinds(imported(net.model(y, ["N", 4, 5, 3], kind=kind, output_kind=kind))) == {"Relu": 1}


# ---- random ---------------------------------------------------------------------------------------------------------------

ORDERS = {4: [[0, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1, 3], [1, 0, 3, 2]], 3: [[0, 2, 1], [2, 0, 1], [1, 2, 0]]}
UNARY = ["Relu", "Tanh", "Neg", "Identity", "LeakyRelu"]


@examples(150)
@given(st.data())
def test_random_networks(data):
    """Transposes of any order between operators that may or may not be turned; several readers, several outputs."""
    rank = data.draw(st.sampled_from([3, 4]))
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=rank, max_size=rank))
    net = Converted()
    made = [("x", shape)]

    def constant(size):
        part = size[data.draw(st.integers(0, rank - 1)) :]
        return f32(np.random.default_rng(len(made)).uniform(0.5, 2, [n if data.draw(st.booleans()) else 1 for n in part]))

    for _ in range(data.draw(st.integers(2, 10))):
        x, size = made[-1 - data.draw(st.integers(0, min(2, len(made) - 1)))]
        kind = data.draw(
            st.sampled_from(
                ["turn", "turn", "turn", "unary", "constant", "sum", "concat", "reduce", "pad", "slice", "units", "softmax"]
            )
        )
        if len(size) != rank:
            continue
        axis = data.draw(st.integers(0, rank - 1))
        if kind == "turn":
            perm = data.draw(st.sampled_from(ORDERS[rank]))
            made.append((net.op("Transpose", x, perm=perm), [size[a] for a in perm]))
        elif kind == "unary":
            made.append((net.op(data.draw(st.sampled_from(UNARY)), x), size))
        elif kind == "constant":
            made.append((net.op(data.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"])), x, constant(size)), size))
        elif kind == "sum":
            alike = [name for name, other in made if other == size]
            made.append((net.op("Add", x, data.draw(st.sampled_from(alike))), size))
        elif kind == "concat":
            alike = [
                (n, s)
                for n, s in made
                if len(s) == rank and all(a == b for i, (a, b) in enumerate(zip(s, size, strict=True)) if i != axis)
            ]
            name, other = data.draw(st.sampled_from(alike))
            made.append(
                (
                    net.op("Concat", x, name, axis=axis - rank),
                    [n + (other[axis] if i == axis else 0) for i, n in enumerate(size)],
                )
            )
        elif kind == "reduce":
            keep = data.draw(st.integers(0, 1))
            left = (
                [1 if i == axis else n for i, n in enumerate(size)] if keep else [n for i, n in enumerate(size) if i != axis]
            )
            made.append((net.op("ReduceMax", x, axes=[axis - rank], keepdims=keep), left))
        elif kind == "pad":
            pads = data.draw(st.lists(st.integers(0, 1), min_size=2 * rank, max_size=2 * rank))
            made.append((net.op("Pad", x, i64(*pads)), [n + pads[i] + pads[rank + i] for i, n in enumerate(size)]))
        elif kind == "slice" and size[axis] > 1:
            made.append((net.op("Slice", x, i64(1), i64(2**62), i64(axis)), [n - (i == axis) for i, n in enumerate(size)]))
        elif kind == "units":
            moved = data.draw(st.permutations(range(rank)))
            order = [size[a] for a in moved]
            if [n for n in order if n > 1] == [n for n in size if n > 1]:
                made.append((net.op("Reshape", x, i64(*order)), order))
        elif kind == "softmax":
            made.append((net.op("Softmax", x, axis=axis), size))
    seen = data.draw(st.lists(st.sampled_from([name for name, _ in made[1:]] or ["x"]), min_size=1, max_size=3, unique=True))
    net.operators += [("Identity", [name], [f"y{i}"], {}) for i, name in enumerate(seen)]
    model = network(
        net.operators,
        [n if i or rank == 3 else "N" for i, n in enumerate(shape)] if shape[0] == 3 else shape,
        net.constants,
        outputs=[f"y{i}" for i in range(len(seen))],
    )
    graph = imported(model)
    assert (
        kinds(graph)["Transpose"]
        <= kinds(load(model))["Transpose"]
        <= sum(op == "Transpose" for op, *_ in net.operators) + 2
    )


def test_a_turned_slice_keeps_the_type_of_its_indices():
    """jax2tf writes them in int32, and ONNX wants one type."""
    net = Converted()
    y = net.op("Slice", net.conv("x", 3, 8), np.int32([1, 1]), np.int32([7, 7]), np.int32([1, 2]), np.int32([1, 1]))
    model = net.model(net.conv(y, 8, 4), ["N", 8, 8, 3])
    graph = imported(model)
    assert "Slice" in kinds(graph)
    types = {t.values.dtype for node in graph.nodes if node.op == "Slice" for t in node.inputs[1:]}
    assert types == {np.dtype(np.int32)}
