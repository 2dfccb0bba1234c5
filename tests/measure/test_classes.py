"""Which outputs are classes, and along which axis."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import OnnxqError
from onnxq_plugins.measure.metrics import percent_agreement, top1, worst_sqnr
from onnxq_plugins.measure.samples import Samples

PICTURE = ["N", 3, 8, 8]


def net(
    nodes: list[tuple], outputs: dict[str, list], shape: list = PICTURE, opset: int = 17, **weights: tuple
) -> onnx.ModelProto:
    """A model of (operator, inputs, outputs, attributes) with random weights of these shapes."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(size).astype(np.float32) if isinstance(size, tuple) else size
        for name, size in weights.items()
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, i.split(), o.split(), **attributes) for op, i, o, attributes in nodes],
        "g",
        [value("x", TensorProto.FLOAT, shape)],
        [value(name, TensorProto.FLOAT, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SAME = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
CONV = ("Conv", "x w", "c", SAME)
FLAT = [("GlobalAveragePool", "c", "p", {}), ("Flatten", "p", "f", {}), ("Gemm", "f v", "y", {})]


def samples(model: onnx.ModelProto, count: int = 12, **options) -> Samples:
    rng = np.random.default_rng(1)
    dims = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return Samples.of(model, [{"x": rng.standard_normal(dims).astype(np.float32)} for _ in range(count)], **options)


TO_NHWC, TO_NCHW = {"perm": [0, 2, 3, 1]}, {"perm": [0, 3, 1, 2]}
CASES = {
    "classifier": (net([CONV, *FLAT], {"y": ["N", 5]}, w=(6, 3, 3, 3), v=(6, 5)), [-1]),
    "regressor": (net([CONV, *FLAT], {"y": ["N", 1]}, w=(6, 3, 3, 3), v=(6, 1)), [None]),
    "embedding": (net([CONV, *FLAT], {"y": ["N", 128]}, w=(6, 3, 3, 3), v=(6, 128)), [None]),
    "table": (net([("MatMul", "x w", "y", {})], {"y": ["N", 4]}, ["N", 9], w=(9, 4)), [None]),
    "probabilities": (
        net([("MatMul", "x w", "a", {}), ("Softmax", "a", "y", {})], {"y": ["N", 4]}, ["N", 9], w=(9, 4)),
        [-1],
    ),
    "scores, probabilities": (
        net([("MatMul", "x w", "a", {}), ("LogSoftmax", "a", "y", {})], {"a": ["N", 4], "y": ["N", 4]}, ["N", 9], w=(9, 4)),
        [-1, -1],
    ),
    "symbols": (net([("MatMul", "x w", "a", {}), ("Softmax", "a", "y", {})], {"y": [1, 6, 4]}, [1, 6, 9], w=(9, 4)), [-1]),
    "one vector": (net([("MatMul", "x w", "a", {}), ("Softmax", "a", "y", {})], {"y": [4]}, [9], w=(9, 4)), [-1]),
    "segmentation": (net([("Conv", "x w", "y", SAME)], {"y": ["N", 5, 8, 8]}, w=(5, 3, 3, 3)), [-3]),
    "segmentation, channels last": (
        net(
            [("Transpose", "x", "t", TO_NCHW), ("Conv", "t w", "c", SAME), ("Transpose", "c", "y", TO_NHWC)],
            {"y": ["N", 8, 8, 5]},
            ["N", 8, 8, 3],
            w=(5, 3, 3, 3),
        ),
        [-1],
    ),
    "picture": (net([("Conv", "x w", "y", SAME)], {"y": ["N", 3, 8, 8]}, w=(3, 3, 3, 3)), [None]),
    "depth": (net([("Conv", "x w", "y", SAME)], {"y": ["N", 1, 8, 8]}, w=(1, 3, 3, 3)), [None]),
    "heat maps": (
        net([("Conv", "x w", "y", {**SAME, "strides": [2, 2]})], {"y": ["N", 5, 4, 4]}, w=(5, 3, 3, 3)),
        [None],
    ),
    "larger": (
        net([CONV, ("DepthToSpace", "c", "y", {"blocksize": 2})], {"y": ["N", 2, 16, 16]}, w=(8, 3, 3, 3)),
        [None],
    ),
    "squashed": (net([CONV, ("Tanh", "c", "y", {})], {"y": ["N", 5, 8, 8]}, w=(5, 3, 3, 3)), [None]),
    "boxes and classes": (
        net([CONV, *FLAT[:2], ("Gemm", "f v", "b", {}), ("Gemm", "f u", "s", {}), ("Softmax", "s", "y", {})],
            {"b": ["N", 4], "y": ["N", 3]}, w=(6, 3, 3, 3), v=(6, 4), u=(6, 3)),
        [None, -1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_classes_are_found(name):
    model, axes = CASES[name]
    assert samples(model).axes == axes


def test_an_axis_of_the_user_comes_first():
    model, _ = CASES["picture"]
    assert samples(model, class_axis=1).axes == [-3]
    assert samples(CASES["embedding"][0], class_axis=-1).axes == [-1]
    for axis, wrong in ((1, "regressor"), (4, "picture")):
        with pytest.raises(OnnxqError, match="class axis"):
            samples(CASES[wrong][0], class_axis=axis)


def test_labels_say_which_axis_is_left_out():
    model, labels = CASES["picture"][0], np.random.default_rng(2).integers(0, 3, (12, 8, 8))
    known = samples(model, labels=labels)
    assert known.axes == [-3]
    answers = np.concatenate(known.reference[0]).argmax(1)
    assert known.score(top1) == pytest.approx(100 * np.mean(answers == labels))
    labels[:, :4] = 255  # void
    assert known.score(top1) == pytest.approx(100 * np.mean((answers == labels)[:, 4:]))
    known = samples(CASES["boxes and classes"][0], labels=np.zeros(12, int))
    assert known.axes == [None, -1] and known.score(top1) == 100 * np.mean(np.concatenate(known.reference[1]).argmax(1) == 0)


def test_pixels_and_symbols_are_counted():
    known = samples(CASES["segmentation"][0])
    other = [[np.roll(y, 1, axis=1) if n < 3 else y for n, y in enumerate(known.reference[0])]]
    assert known.score(percent_agreement, other) == 75 and known.answers == 12 * 64
    (row,) = known.table(other)
    assert row.same == 75 and row.worst < row.sqnr == known.score(worst_sqnr, other)


def test_an_answer_that_never_changes_says_nothing():
    model, _ = CASES["classifier"]
    bias = helper.make_node("Add", ["z", "b"], ["y"])
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(bias)
    model.graph.initializer.append(numpy_helper.from_array(np.float32([0, 99, 0, 0, 0]), "b"))
    known = samples(model)
    assert known.axes == [-1] and known.classes and not known.telling
    assert samples(CASES["segmentation"][0]).telling and not samples(CASES["regressor"][0]).classes


def test_a_random_model_is_recognised():
    steps = [("RandomNormalLike", "x", "r", {}), ("Add", "x r", "y", {})]
    assert samples(net(steps, {"y": ["N", 4]}, ["N", 4])).random
    assert not samples(CASES["segmentation"][0]).random
