"""Commands that judge, on outputs that are no classes: every kind is said what it is, none ends in a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

FLOAT, VALUE = TensorProto.FLOAT, helper.make_tensor_value_info


def save(steps: list[tuple], inputs: list, outputs: list, **arrays) -> None:
    """Write m.onnx of steps (operator, inputs, outputs, attributes)."""
    graph = helper.make_graph(
        [helper.make_node(op, i.split(), o.split(), **attributes) for op, i, o, attributes in steps],
        "g",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), "m.onnx")


def weight(*shape: int) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


LAYERS = [("MatMul", "x w", "a", {}), ("Relu", "a", "r", {}), ("MatMul", "r v", "y", {})]
LABEL = {"keys_int64s": [0, 1, 2, 3], "values_strings": list("abcd"), "domain": "ai.onnx.ml"}
NAMES = {"classlabels_int64s": [0, 1, 2, 3], "domain": "ai.onnx.ml"}
TYPES = helper.make_tensor_sequence_value_info("q", FLOAT, None)
KINDS = {
    "rows that vary": (
        [*LAYERS[:2], ("MatMul", "r v", "z", {}), ("ReduceMax", "z", "m", {"axes": [1], "keepdims": 0}),
         ("Greater", "m", "k", {}), ("Compress", "z k", "y", {"axis": 0})],
        [VALUE("y", FLOAT, ["K", 4])],
    ),
    "strings": (
        [*LAYERS, ("ArgMax", "y", "n", {"axis": 1, "keepdims": 0}), ("LabelEncoder", "n", "s", LABEL)],
        [VALUE("s", TensorProto.STRING, [None])],
    ),
    "sequence": ([*LAYERS, ("SequenceConstruct", "y r", "q", {})], [TYPES]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_is_judged(kind, onnxq):
    steps, outputs = KINDS[kind]
    steps = [(op, "m limit" if op == "Greater" else i, o, a) for op, i, o, a in steps]
    save(steps, [VALUE("x", FLOAT, ["N", 8])], outputs, w=weight(8, 16), v=weight(16, 4), limit=np.float32(0.2))
    np.savez("d.npz", x=np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    code, _, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "q.onnx")
    assert code == 0, err
    for words in (
        ["compare", "m.onnx", "q.onnx"],
        ["diagnose", "m.onnx", "--measured", "2"],
        ["auto", "m.onnx", "-r", "int8", "-o", "a.onnx", "--max-drop", "100", "--min-sqnr", "-99"],
        ["quantize", "m.onnx", "-r", "mixed", "-o", "x.onnx", "--report", "r.html", "--set", "mixed-precision.curve=2"],
    ):
        code, out, err = onnxq(*words, "--data", "d.npz")
        assert code == 0, (words, out, err)


def test_maps_of_probabilities_are_classes(onnxq):
    """What scikit-learn's classifiers are exported with."""
    row = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
    outputs = [helper.make_value_info("q", helper.make_sequence_type_proto(row))]
    steps = [*LAYERS, ("Softmax", "y", "p", {}), ("ZipMap", "p", "q", NAMES)]
    save(steps, [VALUE("x", FLOAT, ["N", 8])], outputs, w=weight(8, 16), v=weight(16, 4))
    np.savez("d.npz", x=np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    code, out, _ = onnxq("compare", "m.onnx", "m.onnx", "--data", "d.npz")
    assert code == 0 and "200.00" in out and "100.00%" in out and "class (axis -1)" in out


def table(outputs: int) -> np.ndarray:
    steps = [("Gemm", "x w", "a", {}), ("Relu", "a", "r", {}), ("Gemm", "r v", "y", {})]
    save(steps, [VALUE("x", FLOAT, ["N", 8])], [VALUE("y", FLOAT, ["N", outputs])], w=weight(8, 16), v=weight(16, outputs))
    return np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)


@pytest.mark.parametrize("outputs", [1, 3])
def test_auto_does_not_keep_a_destroyed_regression(outputs, onnxq):
    x = table(outputs)
    np.savez("good.npz", x=x)
    np.savez("bad.npz", x=x / 100)  # ranges far too small
    code, out, _ = onnxq("auto", "m.onnx", "--data", "good.npz", "-r", "int8", "--min-sqnr", "10")
    assert code == 0 and "SQNR, of the worst output, is what counts" in out
    code, out, err = onnxq("auto", "m.onnx", "--data", "bad.npz", "--test", "good.npz", "-r", "int8", "--try", "0")
    assert code == 1 and "no recipe stays at 20 dB" in err and Path("m.auto.onnx").exists()
    code, *_ = onnxq("auto", "m.onnx", "--data", "bad.npz", "--test", "good.npz", "-r", "int8", "--min-sqnr", "-100")
    assert code == 0


def test_labels_that_are_no_classes_are_said(onnxq):
    x = table(1)
    np.savez("d.npz", x=x, labels=np.arange(32))
    code, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "-r", "int8", "--min-sqnr", "0")
    assert code == 0 and "labels are not classes of any output" in err
    code, out, err = onnxq("compare", "m.onnx", "m.auto.onnx", "--data", "d.npz")
    assert code == 0 and "labels are not classes of any output" in err and "%" not in out.replace("5 %", "")


def test_a_random_model_is_called_so(onnxq):
    steps = [("Conv", "x w", "c", {}), ("RandomNormalLike", "c", "z", {}), ("Add", "c z", "s", {}), ("Conv", "s v", "y", {})]
    save(
        steps,
        [VALUE("x", FLOAT, ["N", 3, 6, 6])],
        [VALUE("y", FLOAT, ["N", 2, 2, 2])],
        w=weight(8, 3, 3, 3),
        v=weight(2, 8, 3, 3),
    )
    np.savez("d.npz", x=np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32))
    code, _, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "q.onnx", "--verify")
    assert code == 0 and "is random" in err
    for words in (["compare", "m.onnx", "q.onnx"], ["diagnose", "m.onnx"], ["auto", "m.onnx", "-r", "int8"]):
        _, out, err = onnxq(*words, "--data", "d.npz")
        assert "random" in out + err


def test_pixels_of_the_same_class(onnxq):
    save(
        [("Conv", "x w", "y", {"kernel_shape": [1, 1]})],
        [VALUE("x", FLOAT, ["N", 3, 6, 6])],
        [VALUE("y", FLOAT, ["N", 4, 6, 6])],
        w=weight(4, 3, 1, 1),
    )
    x = np.random.default_rng(0).standard_normal((4, 3, 6, 6)).astype(np.float32)
    truth = np.einsum("oi,nihw->nohw", weight(4, 3, 1, 1)[:, :, 0, 0], x).argmax(1)
    truth[:, 0] = (truth[:, 0] + 1) % 4
    np.savez("d.npz", x=x, labels=truth)
    code, out, _ = onnxq("compare", "m.onnx", "m.onnx", "--data", "d.npz")
    assert code == 0 and "100.00%" in out and "class (axis -3)" in out and f"top1: {500 / 6:.2f} -> {500 / 6:.2f}" in out
