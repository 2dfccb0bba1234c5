"""Files as a whole: what goes in and out, what is noted, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxq_plugins as onnxq
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.formats.tflite import CHOICES, write
from onnxq_plugins.formats.tflite.layouts import stored, through_reshape
from onnxq_plugins.runtimes.litert import LITERT
from tests.formats.quantized import Maker, kinds, lite, run, steps
from tests.zoo import ZOO, cnn, feeds

pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
pytest.importorskip("flatbuffers", reason="needs the extra litert")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(type="uint8", seed=0):
    """Two convolutions and a classifier."""
    m = Maker(type)
    x = m.input(noise(1, 3, 12, 12, seed=seed))
    x = m.op("Conv", [x, m.weight(noise(8, 3, 3, 3, seed=1)), m.constant(noise(8, seed=2))], strides=[2, 2], pads=[1] * 4)
    x = m.op("Conv", [x, m.weight(noise(8, 1, 3, 3, seed=3))], group=8)
    x = m.op("GlobalAveragePool", [x])
    x = m.node("Flatten", [x])
    return m, m.op("Gemm", [x, m.weight(noise(8, 4, seed=4), 1), m.constant(noise(4, seed=5))])


def opened(content):
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content)


def tensors(content, which):
    graph = opened(content).subgraphs[0]
    return {graph.tensors[i].name.decode(): graph.tensors[i] for i in getattr(graph, which)}


def operators(content):
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    model = opened(content)
    return [names[model.operatorCodes[op.opcodeIndex].builtinCode] for op in model.subgraphs[0].operators]


def test_the_codes_of_the_model_are_those_of_the_file(tmp_path):
    m, y = network()
    distance, inspection = steps(m, y, tmp_path)
    assert distance <= 1.01
    assert kinds(inspection, "CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "FULLY_CONNECTED") == {"integer"}
    weights = {c.tobytes() for c in m.constants.values() if c.dtype == np.int8 and c.ndim == 4}
    buffers = [b.data.tobytes() for b in opened(write(m.model([y]))).buffers if b.data is not None]
    first = next(c for c in m.constants.values() if c.ndim == 4 and c.dtype == np.int8)
    assert first.transpose(0, 2, 3, 1).tobytes() in buffers and weights
    scales = [t.quantization.scale for t in opened(write(m.model([y]))).subgraphs[0].tensors if t.quantization]
    for scale, _ in m.grids.values():
        assert any(len(s) == 1 and s[0] == scale for s in scales if s is not None)


def test_int8_in_and_out(tmp_path):
    m, y = network()
    content = write(m.model([y]), {"io": "int8", "layout": "native"})
    from ai_edge_litert.schema_py_generated import TensorType

    (x,), (out,) = tensors(content, "inputs").values(), tensors(content, "outputs").values()
    assert x.type == out.type == TensorType.INT8
    assert list(x.shape) == [1, 12, 12, 3]
    assert not {"QUANTIZE", "DEQUANTIZE", "TRANSPOSE"} & set(operators(content))
    inspection = lite(m.model([y]), m.inputs, tmp_path, {"io": "int8", "layout": "native"})
    assert np.abs(inspection.outputs[0][y] - run(m.model([y]), m.inputs)[y]).max() <= 1.01 * m.grids[y][0]


def test_int8_is_refused_for_what_is_not_quantized():
    m = Maker()
    y = m.node("Relu", [m.input(noise(2, 3), quantized=False)])
    with pytest.raises(OnnxqError, match="'x0' cannot be int8: the model does not quantize it") as caught:
        write(m.model([y]), {"io": "int8"})
    assert len(caught.value.problems) == 2


def test_names_signature_and_metadata(tmp_path):
    m, y = network()
    model = m.model([y])
    model.metadata_props.add(key="onnxq.recipe", value='{"target": "litert"}')
    content = write(model, {"labels": ["cat", "dog"]})
    file = opened(content)
    assert [*tensors(content, "inputs")] == ["x0"] and [*tensors(content, "outputs")] == [y]
    (signature,) = file.signatureDefs
    assert signature.signatureKey == b"serving_default"
    assert [e.name for e in signature.inputs] == [b"x0"] and [e.name for e in signature.outputs] == [y.encode()]
    notes = notes_of(content)
    assert json.loads(notes["onnxq"]) == {"onnxq.recipe": '{"target": "litert"}'}
    assert notes["labels.txt"] == b"cat\ndog"
    assert json.loads(notes["onnxq.ports"]) == {"x0": [0, 1, 2, 3], y: [0, 1]}


def test_data_lie_where_kernels_can_read_vectors():
    from ai_edge_litert import schema_py_generated as schema

    m, y = network()
    content = write(m.model([y]))
    model = schema.Model.GetRootAs(content, 0)
    for place in range(model.BuffersLength()):
        buffer = model.Buffers(place)
        if buffer.DataLength():
            tab = buffer._tab
            assert tab.Vector(tab.Offset(4)) % 16 == 0


def test_a_float_model_is_written_as_it_is(tmp_path):
    m = Maker()
    x = m.input(noise(1, 3, 9, 9), quantized=False)
    y = m.node("Relu", [m.node("Conv", [x, m.constant(noise(5, 3, 3, 3, seed=1))])])
    distance, inspection = steps(m, y, tmp_path)
    assert distance < 1.0 and set(inspection.counts()) == {"float", "moves"}


def test_outputs_that_are_inputs_constants_or_twice_the_same(tmp_path):
    m = Maker()
    x = m.input(noise(2, 3), quantized=False)
    outputs = [m.node("Identity", [x]), m.node("Identity", [m.constant(noise(2))]), *(m.node("Relu", [x]),) * 1]
    outputs.append(m.node("Identity", [outputs[-1]]))
    got = lite(m.model(outputs), m.inputs, tmp_path).outputs[0]
    mine = run(m.model(outputs), m.inputs)
    assert all(np.array_equal(got[name], mine[name]) for name in outputs)


def test_everything_that_litert_cannot_hold_is_told_at_once():
    m = Maker()
    x = m.input(noise(3, 1, 4), quantized=False)
    w, r = m.constant(noise(1, 12, 4, seed=1)), m.constant(noise(1, 12, 4, seed=2))
    h = m.node("GRU", [x, w, r], outputs=2, hidden_size=4)[1]
    k = m.node("GRU", [x, w, r], outputs=2, hidden_size=4)[1]
    y = m.node("Det", [m.input(noise(2, 2), quantized=False)])
    with pytest.raises(OnnxqError) as caught:
        write(m.model([m.node("Add", [h, k]), y]))
    (problem,) = caught.value.problems
    assert (
        problem == "LiteRT cannot hold the model: Det x1: LiteRT has no such operator; GRU x2: LiteRT has no such operator."
    )


@pytest.mark.parametrize("axis", [None, 0])
def test_weights_with_zero_points_are_refused(axis):
    m = Maker()
    codes = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3)).astype(np.uint8)
    zero = np.uint8(100)
    w = m.node("DequantizeLinear", [m.constant(codes), m.constant(np.float32(0.01)), m.constant(zero)])
    y = m.op("Conv", [m.input(noise(1, 3, 6, 6)), w])
    with pytest.raises(OnnxqError, match="Conv x1: its weight has a zero point"):
        write(m.model([y]))


def test_uint8_weights_around_128_are_int8_ones(tmp_path):
    m = Maker()
    codes = np.random.default_rng(0).integers(1, 256, (4, 3, 3, 3)).astype(np.uint8)
    w = m.node("DequantizeLinear", [m.constant(codes), m.constant(np.float32(0.01)), m.constant(np.uint8(128))])
    distance, inspection = steps(m, m.op("Conv", [m.input(noise(1, 3, 6, 6)), w]), tmp_path)
    assert distance <= 1.01 and kinds(inspection, "CONV_2D") == {"integer"}


def test_open_sizes_are_asked_for():
    m, y = network()
    model = m.model([y])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    with pytest.raises(OnnxqError, match="input 'x0' has open sizes") as caught:
        write(model)
    assert len(caught.value.problems) == 1
    assert write(model, {"shapes": {"x0": [1, 3, 12, 12]}})


@pytest.mark.parametrize("settings", [{"io": "uint8"}, {"layout": "nchw"}, {"int4": "yes"}, {"imput": 1}])
def test_unknown_settings_are_refused(settings):
    m, y = network()
    with pytest.raises(OnnxqError, match="known: "):
        write(m.model([y]), settings)


@pytest.mark.parametrize("op", ["Gemm", "Conv"])
@pytest.mark.parametrize("setting", ["none", "fast", "all"])
def test_weights_of_4_bits(op, setting, tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    m = Maker()
    shape = (15, 7) if op == "Gemm" else (7, 5, 3, 3)
    axis = 1 if op == "Gemm" else 0
    codes = np.random.default_rng(0).integers(-7, 8, shape).astype(np.int8)
    scale = np.linspace(0.01, 0.02, 7, dtype=np.float32)
    w = m.node("DequantizeLinear", [m.constant(codes), m.constant(scale)], axis=axis)
    y = m.op(op, [m.input(noise(4, 15) if op == "Gemm" else noise(1, 5, 8, 8)), w])
    distance, inspection = steps(m, y, tmp_path, {"int4": setting})
    assert distance <= 1.01 and kinds(inspection, "CONV_2D", "FULLY_CONNECTED") == {"integer"}
    types = {t.type for t in opened((tmp_path / "model.tflite").read_bytes()).subgraphs[0].tensors}
    assert (TensorType.INT4 in types) == (setting == "all" or (setting == "fast" and op == "Gemm"))


def test_models_in_either_order_of_axes_have_few_transposes(tmp_path):
    """What TensorFlow's exporters write: each convolution between two Transposes. None is left inside."""
    m = Maker()
    x = m.input(noise(1, 12, 12, 3))
    for k in range(3):
        x = m.node("Transpose", [x], perm=[0, 3, 1, 2])
        x = m.op("Conv", [x, m.weight(noise(3, 3, 3, 3, seed=k))], pads=[1, 1, 1, 1])
        x = m.node("Transpose", [x], perm=[0, 2, 3, 1])
    x = m.encoded(x, m.values(x))
    assert "TRANSPOSE" not in operators(write(m.model([x])))
    assert steps(m, x, tmp_path)[0] <= 1.01


@pytest.mark.parametrize(
    ("order", "old", "new", "expected"),
    [
        ((0, 2, 3, 1), (1, 8, 1, 1), (1, 8), (0, 1)),
        ((0, 2, 3, 1), (1, 8, 4, 5), (1, 8, 20), (0, 2, 1)),
        ((0, 2, 3, 1), (1, 8, 4, 5), (1, 2, 4, 4, 5), (0, 3, 4, 1, 2)),
        ((0, 2, 3, 1), (1, 8, 4, 5), (1, 160), None),
        ((0, 1, 2, 3), (1, 8, 4, 5), (1, 160), (0, 1)),
        ((1, 0), (3, 4), (3, 2, 2), (1, 2, 0)),
    ],
)
def test_reshapes_where_the_data_lie(order, old, new, expected):
    assert through_reshape(order, old, new) == expected
    if expected is not None:
        data = np.arange(np.prod(old)).reshape(old)
        assert np.array_equal(data.transpose(order).reshape(stored(new, expected)), data.reshape(new).transpose(expected))


NETWORKS = [name for name in ZOO if name not in ("control_flow", "lstm", "gru", "rnn")]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_quantized_for_litert(name, tmp_path):
    """Networks of each kind, quantized by us, are as near to float as in onnxruntime."""
    model = ZOO[name]()
    result = onnxq.quantize(model, {"target": "litert"}, feeds(model, 8))
    sample = feeds(model, 1)[0]
    try:
        inspection = lite(result.model, sample, tmp_path)
    except OnnxqError as error:
        assert "LiteRT has no such operator" in str(error)
        pytest.skip(str(error))
    floats, mine = run(model, sample), run(result.model, sample)
    for key, value in floats.items():
        noise_mine = np.sqrt(np.mean((mine[key] - value) ** 2))
        noise_lite = np.sqrt(np.mean((inspection.outputs[0][key] - value) ** 2))
        assert noise_lite <= 1.5 * noise_mine + 0.005 * np.abs(value).max()
    assert "integer" in inspection.counts() or "Conv" not in {n.op_type for n in model.graph.node}


def test_a_model_that_onnxruntime_quantized(tmp_path):
    """QDQ files of other tools: uint8 activations, weights beside QuantizeLinear or as codes, Relu behind the pair."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    model = cnn()
    samples = feeds(model, 8)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(samples)

        def get_next(self):
            return next(self.rest, None)

    onnx.save(model, tmp_path / "float.onnx")
    for types in ((QuantType.QUInt8, QuantType.QInt8), (QuantType.QInt8, QuantType.QInt8)):
        quantize_static(
            str(tmp_path / "float.onnx"),
            str(tmp_path / "int8.onnx"),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=types[0],
            weight_type=types[1],
            per_channel=True,
        )
        quantized = onnx.load(tmp_path / "int8.onnx")
        inspection = lite(quantized, samples[0], tmp_path)
        mine = run(quantized, samples[0])
        assert kinds(inspection, "CONV_2D", "DEPTHWISE_CONV_2D") == {"integer"}
        for name, value in mine.items():
            error = inspection.outputs[0][name] - value
            assert np.sqrt(np.mean(error**2)) <= 0.03 * np.sqrt(np.mean(value**2))


def test_what_is_no_tflite_file_is_one_sentence(tmp_path):
    (tmp_path / "bad.tflite").write_bytes(b"nothing of the kind")
    with pytest.raises(OnnxqError, match="LiteRT cannot load"):
        LITERT.inspect(tmp_path / "bad.tflite", [], {})
    with pytest.raises(OnnxqError, match="LiteRT cannot load"):
        LITERT.inspect(tmp_path / "none.tflite", [], {})


def test_samples_that_do_not_fit_are_one_sentence(tmp_path):
    m, y = network()
    (tmp_path / "m.tflite").write_bytes(write(m.model([y])))
    with pytest.raises(OnnxqError, match="file has fixed sizes"):
        LITERT.inspect(tmp_path / "m.tflite", [{"x0": noise(1, 3, 10, 10)}], {})
    with pytest.raises(OnnxqError, match="that the sample lacks"):
        LITERT.inspect(tmp_path / "m.tflite", [{"x": noise(1, 3, 12, 12)}], {})


def test_an_old_softmax_over_several_axes(tmp_path):
    m = Maker(opset=11)
    m.inputs["x0"] = noise(2, 3, 4)
    y = m.node("Softmax", ["x0"], axis=1)
    model = m.model([y])
    assert helper.printable_graph(model.graph)
    got = lite(model, m.inputs, tmp_path).outputs[0][y]
    assert np.allclose(got, run(model, m.inputs)[y], atol=1e-6)


@pytest.mark.parametrize("first", ["Pad", "SpaceToDepth", "Sub"])
def test_native_inputs_have_the_order_of_the_first_layer(first, tmp_path):
    m = Maker()
    x = m.input(noise(1, 3, 12, 12))
    if first == "Pad":
        x = m.node("Pad", [x, m.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1]))])
    elif first == "SpaceToDepth":
        x = m.node("SpaceToDepth", [x], blocksize=2)
    else:
        x = m.op("Sub", [x, m.weight(noise(3, 1, 1), None)])
    depth = 12 if first == "SpaceToDepth" else 3
    y = m.op("Conv", [x, m.weight(noise(4, depth, 3, 3, seed=1))])
    distance, _ = steps(m, y, tmp_path, {"layout": "native"})
    assert distance <= 1.01
    content = (tmp_path / "model.tflite").read_bytes()
    assert list(tensors(content, "inputs")["x0"].shape) == [1, 12, 12, 3]
    assert operators(content).count("TRANSPOSE") == (first == "SpaceToDepth")
    graph = opened(content).subgraphs[0]
    assert max(len(t.shape) for t in graph.tensors if t.shape is not None) <= (6 if first == "SpaceToDepth" else 4)


def test_native_inputs_that_are_no_images_keep_their_order():
    m = Maker()
    x = m.node("Transpose", [m.input(noise(1, 12, 12, 3))], perm=[0, 3, 1, 2])
    content = write(m.model([m.op("Conv", [x, m.weight(noise(4, 3, 3, 3, seed=1))])]), {"layout": "native"})
    assert list(tensors(content, "inputs")["x0"].shape) == [1, 12, 12, 3] and "TRANSPOSE" not in operators(content)


@pytest.mark.parametrize("setting", ["float", "int8"])
def test_products_of_activations_are_computed_where_it_is_faster(setting, tmp_path):
    m = Maker()
    y = m.op("MatMul", [m.input(noise(2, 5, 8)), m.input(noise(2, 8, 6, seed=1))])
    distance, inspection = steps(m, y, tmp_path, {"products": setting})
    assert distance <= 1.01
    assert kinds(inspection, "BATCH_MATMUL") == {"integer" if setting == "int8" else "fake"}


def test_the_page_loads_a_file_and_names_every_setting(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "edge-litert.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    m, y = network()
    (tmp_path / "model.tflite").write_bytes(write(m.model([y])))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == f"{{'{y}': (1, 4)}}\n"
    for name, choices in CHOICES.items():
        assert f"`{name}`" in page and all(f"`{choice}`" in page for choice in choices)


def test_targets_write_files_that_their_runtimes_load(tmp_path):
    model = cnn()
    result = onnxq.quantize(model, {"target": "litert"}, feeds(model, 4), settings=["target.litert.io=int8"])
    content = result.save(tmp_path / "net.tflite").read_bytes()
    from ai_edge_litert.schema_py_generated import TensorType

    assert {t.type for t in tensors(content, "inputs").values()} == {TensorType.INT8}
    assert "onnxq.recipe" in json.loads(notes_of(content)["onnxq"])
    assert kinds(LITERT.inspect(tmp_path / "net.tflite", [], {}), "CONV_2D") == {"integer"}


def notes_of(content):
    file = opened(content)
    return {e.name.decode(): file.buffers[e.buffer].data.tobytes() for e in file.metadata}
