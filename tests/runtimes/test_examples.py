"""What models are timed on without data: known sizes first, then guesses that run, and never a size in silence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxq_plugins as onnxq
from onnxq_plugins import OnnxqError, runtimes
from onnxq_plugins.runtimes.examples import examples, first_running, guesses
from onnxq_plugins.testing.models import Net, cnn

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model_of(*inputs: onnx.ValueInfoProto, **metadata: str) -> onnx.ModelProto:
    """A model that passes its inputs on."""
    nodes = [helper.make_node("Identity", [i.name], [f"{i.name}_out"]) for i in inputs]
    outputs = [helper.make_empty_tensor_value_info(f"{i.name}_out") for i in inputs]
    model = helper.make_model(
        helper.make_graph(nodes, "g", list(inputs), outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    helper.set_model_props(model, metadata)
    return onnx.shape_inference.infer_shapes(model)


def tensor(name: str, *shape: int | str | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def listening(taps: int = 400) -> onnx.ModelProto:
    """A network of [batch, time] that is too short below `taps`."""
    net = Net(("N", "T"))
    x = net.op("Unsqueeze", "x", net.constant([1], np.int64))
    x = net.op("Conv", x, net.weight(4, 1, taps, fan_in=taps), strides=[8])
    return net.model(net.op("Relu", net.op("Conv", x, net.weight(4, 4, 1, fan_in=4))))


def shapes_of(*models: onnx.ModelProto, **shapes: list[int]) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in next(examples(models, shapes)).items()}


def test_sizes_come_from_the_best_source():
    pair = model_of(tensor("x", "N", 3, "T"), tensor("mask", "N", "T", kind=INT64), tensor("state", 2, "N", 8))
    assert shapes_of(pair, x=[2, 3, 80]) == {"x": [2, 3, 80], "mask": [2, 80], "state": [2, 2, 8]}
    fixed = model_of(tensor("x", 1, 3, 50), tensor("mask", 1, "T", kind=INT64), tensor("state", 2, 1, 8))
    assert shapes_of(pair, fixed) == shapes_of(fixed, pair) == {"x": [1, 3, 50], "mask": [1, 50], "state": [2, 1, 8]}
    noted = model_of(tensor("x", "N", "T"), tensor("y", "T", "N"), **{"onnxq.shapes": '{"x": [4, 33]}'})
    assert shapes_of(noted) == {"x": [4, 33], "y": [33, 4]} and not guesses([noted])
    for broken in ("[[1]]", '{"x": 3}', '{"x": ["a"]}', "nonsense"):
        assert shapes_of(model_of(tensor("x", "N", 7), **{"onnxq.shapes": broken, "imgsz": broken})) == {"x": [1, 7]}


def test_images_have_sizes_of_images():
    assert shapes_of(model_of(tensor("x", "N", 3, "H", "W"))) == {"x": [1, 3, 224, 224]}
    assert shapes_of(model_of(tensor("x", None, None, None, 3))) == {"x": [1, 224, 224, 3]}
    assert shapes_of(model_of(tensor("x", "N", 3, "H", "W"), imgsz="[480, 640]")) == {"x": [1, 3, 480, 640]}
    assert shapes_of(model_of(tensor("x", 1, 3, 32, 48), imgsz="[480, 640]")) == {"x": [1, 3, 32, 48]}


def test_every_kind_of_input_has_an_example():
    kinds = (FLOAT, INT64, TensorProto.BOOL, TensorProto.STRING, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)
    model = model_of(*(tensor(f"i{kind}_{rank}", *[2] * rank, kind=kind) for kind in kinds for rank in (0, 1, 2)))
    feed = first_running(examples([model]), [runtimes.session(model)])
    assert len(feed) == 3 * len(kinds)
    sequence = helper.make_tensor_sequence_value_info("s", FLOAT, None)
    assert not list(examples([model_of(sequence)]))
    assert "an input is no tensor" in onnxq.audit_model(model_of(sequence), model_of(sequence)).untimed


@pytest.mark.parametrize(
    ("shapes", "words"), [({"z": [1]}, "no input 'z'"), ({"x": [1]}, "[any, 3]"), ({"x": [1, 4]}, "[any, 3]")]
)
def test_shapes_that_do_not_fit(shapes, words):
    with pytest.raises(OnnxqError) as error:
        examples([model_of(tensor("x", "N", 3))], shapes)
    assert words in str(error.value)


# ---- audit and check ------------------------------------------------------------------------------------------------------


def test_a_guess_that_is_too_short_grows_and_is_said(onnxq):
    onnx.save(listening(), "m.onnx")
    code, out, _ = onnxq("audit", "m.onnx", "--against", "m.onnx")
    assert code == 0 and "timed on x [1, 512] (sizes guessed: --data or --shape sets them)" in out
    code, out, _ = onnxq("audit", "m.onnx", "--against", "m.onnx", "--shape", "x=1,800")
    assert code == 0 and out.endswith("timed on x [1, 800]\n")
    np.savez("d.npz", x=np.ones((8, 700), np.float32))
    code, out, _ = onnxq("audit", "m.onnx", "--data", "d.npz")
    assert code == 0 and out.endswith("ms, 1 thread, timed on x [1, 700]\n") and "speed" not in out
    code, _, err = onnxq("audit", "m.onnx", "--against", "m.onnx", "--shape", "x=1,8")
    assert code == 2 and "cannot be timed on x [1, 8]" in err and "give other --data or --shape" in err
    assert onnxq("audit", "m.onnx", "--shape", "x").code == 2


def test_the_size_of_the_samples_is_kept_in_the_model(onnxq):
    onnx.save(listening(), "m.onnx")
    np.savez("d.npz", x=np.random.default_rng(0).standard_normal((8, 800)).astype(np.float32))
    assert onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "q.onnx").code == 0
    code, out, _ = onnxq("audit", "q.onnx", "--against", "m.onnx")
    assert code == 0 and out.splitlines()[-1].endswith("timed on x [1, 800]")
    keys = {p.key for p in onnxq_model(cnn()).metadata_props}
    assert "onnxq.recipe" in keys and "onnxq.shapes" not in keys  # only a batch is open


def onnxq_model(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnxq.quantize(model, "int8", next(examples([model]))).model


def test_what_runs_on_no_guess_is_counted_without_times(onnxq):
    net = Net(("N", "T"))
    model = net.model(net.gemm(net.op("Reshape", "x", net.constant([1, 7 * 131], np.int64)), 7 * 131, 5))
    onnx.save(model, "m.onnx")
    code, out, err = onnxq("audit", "m.onnx", "--against", "m.onnx")
    assert code == 0 and "0/1 Gemm" in out and "speed" not in out
    assert "not timed" in err and "x [1, 128]" in err and "give --data or --shape" in err and "made from" not in err
    code, out, err = onnxq("check", "int8", "m.onnx", "--shape", "x=7,131")
    assert code == 0 and "it runs on x [7, 131]" in out and not err
    code, out, err = onnxq("check", "int8", "m.onnx", "--shape", "x=1,2")
    assert code == 0 and "note: the model does not run on x [1, 2]" in err
    np.savez("d.npz", x=np.ones((2, 3, 4), np.float32))
    code, _, err = onnxq("check", "int8", "m.onnx", "--data", "d.npz")
    assert code == 0 and err.startswith("note: ")
