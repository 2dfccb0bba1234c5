"""onnxruntime's quantization functions by recipes: its signatures, and every argument mapped or refused."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import quantization as theirs
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType

from onnxq_plugins import OnnxqError, audit_model, measure, ort, quantize, runtimes
from onnxq_plugins.ort.arguments import _REFUSED, OPTIONS
from onnxq_plugins.plan.planned import Planned
from tests.zoo import Net, cnn, feeds, mlp, resnet20, transformer

OWN = ["recipe", "plugins", "target"]


class Reader(theirs.CalibrationDataReader):
    """Feeds, once."""

    def __init__(self, feeds):
        self.all, self.feeds = feeds, iter(feeds)

    def get_next(self):
        return next(self.feeds, None)

    def __len__(self):
        return len(self.all)

    def set_range(self, start_index, end_index):
        self.feeds = iter(self.all[start_index:end_index])


@pytest.fixture
def static(tmp_path):
    """`quantize_static` of a model, into a new folder, with feeds of noise."""

    def call(model, *, n=8, **options):
        options = {"calibration_data_reader": Reader(feeds(model, n)), **options}
        return ort.quantize_static(model, tmp_path / "q.onnx", **options)

    call.path = tmp_path / "q.onnx"
    return call


def refused(call, *args, **options) -> str:
    with pytest.raises(OnnxqError) as caught:
        call(*args, **options)
    assert all(text.endswith((".", "?")) and "\n" not in text for text in caught.value.problems)
    return str(caught.value)


def names_of(model, *ops) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in ops]


def integer(result) -> set[str]:
    return Planned(result.graph, result.plan, result.target).integer


# ---- signatures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantize_static", "quantize_dynamic", "quantize"])
def test_the_signature_is_that_of_the_installed_onnxruntime(name):
    own, other = (list(inspect.signature(getattr(module, name)).parameters.values()) for module in (ort, theirs))
    assert [(p.name, p.kind, p.default) for p in own[: len(other)]] == [(p.name, p.kind, p.default) for p in other]
    assert [p.name for p in own[len(other) :]] == OWN and all(p.kind is p.KEYWORD_ONLY for p in own[len(other) :])


def test_what_scripts_import_is_there():
    for name in set(ort.__all__) - {"quantize", "quantize_static", "quantize_dynamic"}:
        assert getattr(ort, name) is getattr(theirs, name)


def test_every_option_that_the_tool_documents_is_known():
    text = (theirs.quantize_static.__doc__ or "") + (theirs.StaticQuantConfig.__init__.__doc__ or "")
    documented = {word for line in text.splitlines() if " = " in line for word in [line.split(" = ")[0].strip()]}
    documented = {word for word in documented if word[:1].isalpha() and " " not in word and "'" not in word}
    source = Path(inspect.getsourcefile(theirs.quantize_static)).parent.rglob("*.py")
    used = {key for file in source for key in KEY.findall(file.read_text("utf-8"))}
    assert len(documented) > 15 and documented <= OPTIONS and len(used) > 15 and used <= OPTIONS


KEY = re.compile(r'extra_options(?:\.get\(|\[)\s*"([A-Z]\w+|extra\.\w+\.\w+)"')

# ---- quantize_static ------------------------------------------------------------------------------------------------------


def test_without_options_it_is_recipe_int8(static):
    model = cnn()
    result = static(model)
    assert result.report.recipe_name == "int8" and audit_model(static.path).counts() == {"QLinearConv": 2, "QGemm": 1}
    plain = quantize(model, "int8", feeds(model, 8))
    assert onnx.load(static.path).graph == plain.model.graph


@pytest.mark.parametrize("source", [str, Path, onnx.load, lambda p: Path(p).read_bytes()])
def test_models_in_any_form(tmp_path, source):
    model, path = cnn(), tmp_path / "m.onnx"
    onnx.save(model, path)
    for options in ({}, {"nodes_to_exclude": names_of(model, "Gemm")}):
        ort.quantize_static(source(str(path)), str(tmp_path / "q.onnx"), Reader(feeds(model, 8)), **options)
        counts = audit_model(tmp_path / "q.onnx").counts()
        assert counts["QLinearConv"] >= 2 and ("QGemm" in counts) == (not options)


def test_nodes_to_exclude_of_any_kind(static):
    model = resnet20()
    names = [names_of(model, op)[0] for op in ("Conv", "Add", "Gemm")]
    assert set(names) <= integer(static(model)) and set(names).isdisjoint(integer(static(model, nodes_to_exclude=names)))


def test_nodes_to_quantize_are_quantized_and_no_others(static):
    model = resnet20()
    names = [*names_of(model, "Conv")[:2], *names_of(model, "Add")[:1]]
    result = static(model, nodes_to_quantize=names, nodes_to_exclude=names[:1])
    assert integer(result) == {names[1]} and result.recipe.layers[-1].quantize


def test_nodes_to_quantize_are_quantized_even_if_that_is_slower(static):
    model = transformer()
    product = next(n.name for n in model.graph.node if n.op_type == "MatMul" and n.input[1].startswith("t"))
    assert product not in integer(static(model)) and product in integer(static(model, nodes_to_quantize=[product]))


def test_op_types_to_quantize(static):
    model = resnet20()
    result = static(model, op_types_to_quantize=["Conv"])
    assert integer(result) == set(names_of(model, "Conv"))
    result = static(transformer(), op_types_to_quantize=["MatMul"], extra_options={"MatMulConstBOnly": True})
    assert integer(result) <= set(names_of(transformer(), "MatMul")) and integer(result)


def test_nodes_without_a_name_are_left_out_where_others_are_chosen(static):
    model = cnn()
    names = names_of(model, "Conv")[:1]
    for node in model.graph.node:
        node.name = node.name if node.name in names else ""
    assert integer(static(model, nodes_to_quantize=names)) == set(names)


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_activations_of_8_bits_are_codes_of_the_target(static, kind):
    result = static(cnn(), activation_type=QuantType[kind], weight_type=QuantType[kind])
    assert {spec.bits for spec in result.plan.values()} == {8} and audit_model(static.path).counts()["QLinearConv"] == 2


@pytest.mark.parametrize(("kind", "bits"), [("QInt16", 16), ("QUInt16", 16), ("QInt4", 4), ("QUInt4", 4)])
def test_other_widths_of_activations_are_those_of_targets(static, kind, bits):
    text = refused(static, cnn(), activation_type=QuantType[kind])
    assert f"{bits}-bit" in text and "ort-cpu" in text and not static.path.exists()
    options = {"target": "npu"} if bits == 16 else {"target": "npu4", "weight_type": QuantType.QInt4, "recipe": "int8"}
    result = static(cnn(), activation_type=QuantType[kind], **options)
    assert bits in {result.plan[n].bits for n in Planned(result.graph, result.plan, result.target).activations}


@pytest.mark.parametrize("kind", ["QInt4", "QUInt4"])
def test_weights_of_4_bits_are_recipe_int4_storage(static, kind):
    result = static(mlp(), weight_type=QuantType[kind])
    assert result.report.recipe_name == "int4-storage"
    assert static(mlp(), weight_type=QuantType[kind], recipe="int8").recipe.weights.bits == 4


def test_weights_of_16_bits_are_refused_in_one_sentence(static):
    text = refused(static, cnn(), weight_type=QuantType.QInt16)
    assert "16" in text and "it runs" in text and not static.path.exists()


def test_reduce_range_is_7_bits(static):
    result = static(cnn(), reduce_range=True)
    weights = [result.plan[layer.weight] for layer in result.graph.layers]
    assert {spec.bits for spec in weights} == {7} and "never saturate" in audit_model(static.path).accumulators()
    narrow = static(mlp(), reduce_range=True, recipe="int4-storage")
    assert {narrow.plan[layer.weight].bits for layer in narrow.graph.layers} <= {4, 7}


def test_per_channel(static):
    assert static(cnn(), recipe="int8-per-tensor").recipe.weights.block == "tensor"
    assert static(cnn(), recipe="int8-per-tensor", target="ort-cpu", per_channel=True).recipe.weights.block == "channel"
    assert static(cnn()).recipe.weights.block == static(cnn(), per_channel=True).recipe.weights.block == "channel"


@pytest.mark.parametrize(("method", "own"), [("MinMax", "minmax"), ("Entropy", "kl"), ("Percentile", "percentile")])
def test_calibration_methods(static, method, own):
    options = {"CalibPercentile": 99.9} if method == "Percentile" else {}
    result = static(cnn(), calibrate_method=CalibrationMethod[method], extra_options=options)
    step = next(step for step in result.recipe.passes if step.name == "ranges")
    assert step.method == own and (method != "Percentile" or step.percentile == 99.9)


def test_symmetric_activations_are_refused_where_there_are_none(static):
    for key in ("ActivationSymmetric", "CalibTensorRangeSymmetric"):
        text = refused(static, cnn(), extra_options={key: True})
        assert "symmetric = false" in text and text.count("\n") == 0


def test_a_reader_that_gives_ranges_of_samples(static):
    reader = Reader(feeds(cnn(), 8))
    reader.feeds = iter(())
    result = static(cnn(), calibration_data_reader=reader, extra_options={"CalibStridedMinMax": 3})
    assert len(list(result.data)) == 8


def test_external_data(static):
    result = static(resnet20(), use_external_data_format=True)
    model = onnx.load(static.path, load_external_data=False)
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    feed = feeds(resnet20(), 1)
    written, made = (runtimes.outputs(runtimes.session(m), feed) for m in (static.path, result.model))
    assert all(np.array_equal(a, b) for a, b in zip(written, made, strict=True))


def test_statistics_are_kept_in_a_folder(static, tmp_path):
    for _ in range(2):
        static(cnn(), calibration_cache_path=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    (tmp_path / "ranges.json").write_text("{}")
    assert "is a file" in refused(static, cnn(), calibration_cache_path=tmp_path / "ranges.json")


def test_calibration_providers(static):
    static(cnn(), calibration_providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert "on the CPU" in refused(static, cnn(), calibration_providers=["CUDAExecutionProvider"])


# ---- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quant_format": QuantFormat.QOperator}, "files are QDQ"),
        ({"calibrate_method": CalibrationMethod.Distribution}, "8-bit floats"),
        ({"weight_type": QuantType.QFLOAT8E4M3FN}, "integer codes"),
        ({"activation_type": "int8"}, "must be a QuantType"),
        ({"op_types_to_quantize": ["Convolution"]}, "no operator is called 'Convolution'; use Conv"),
        ({"op_types_to_quantize": "Conv"}, "must be a list"),
        ({"nodes_to_exclude": ["nowhere"]}, "no node 'nowhere'"),
        ({"nodes_to_quantize": ["nowhere"]}, "no node 'nowhere'"),
        ({"extra_options": {"ActivationSymetric": True}}, "did you mean 'ActivationSymmetric'"),
        ({"extra_options": 3}, "must be a dictionary"),
        ({"extra_options": {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 0}}}, "along the outputs"),
        ({"extra_options": {"SmoothQuant": True}, "recipe": {}}, "name them in the recipe"),
        ({"extra_options": {"TensorQuantOverrides": {"nowhere": [{}]}}}, "no such tensor"),
        ({"calibration_data_reader": Reader([])}, "no sample"),
        ({"calibration_data_reader": None}, "data"),
        ({"calibration_data_reader": 3}, "data of type int"),
        ({"recipe": "int9"}, "neither a built-in nor a file"),
        ({"plugins": ["vendor.nothing"]}, "not a known pass"),
        ({"target": "moon"}, "target 'moon' is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_a_sentence_and_no_file(static, options, said):
    assert said in refused(static, cnn(), **options) and not static.path.exists()


@pytest.mark.parametrize("key", sorted(_REFUSED))
def test_an_option_is_refused_unless_it_asks_for_nothing(static, key):
    nothing = _REFUSED[key][0]
    other = {"OpTypesToExcludeOutputQuantization": ["Conv"], "MinimumRealRange": 1e-4, "BlockSize": 32}.get(key)
    other = other or (not nothing if isinstance(nothing, bool) else 0.9)
    assert f"{key} = {other!r}: " in refused(static, cnn(), extra_options={key: other}) and not static.path.exists()
    assert not static(cnn(), extra_options={key: nothing}).missed


@pytest.mark.parametrize("key", ["CalibMaxIntermediateOutputs", "EnableSubgraph", "SmoothQuant", "DefaultTensorType"])
def test_options_that_need_nothing(static, key):
    assert static(cnn(), extra_options={key: 1}).plan.keys() == static(cnn()).plan.keys()


@pytest.mark.parametrize(
    ("model", "output"), [(3, "q.onnx"), (None, "q.onnx"), (b"no model", "q.onnx"), ("gone.onnx", "q.onnx")]
)
def test_what_is_no_model(tmp_path, monkeypatch, model, output):
    monkeypatch.chdir(tmp_path)
    for call in (ort.quantize_dynamic, lambda m, o: ort.quantize_static(m, o, [], nodes_to_exclude=["a"])):
        refused(call, model, output)
    refused(ort.quantize_dynamic, cnn(), None)
    refused(ort.quantize, cnn(), "q.onnx", None)
    assert not list(tmp_path.iterdir())


# ---- quantize_dynamic, configs --------------------------------------------------------------------------------------------


def test_dynamic_stores_weights_in_8_bits(tmp_path):
    net = Net(["N", 64])
    model = net.model(net.linear(net.op("Relu", net.linear("x", 64, 128, False)), 128, 64, False))
    path, kinds = tmp_path / "q.onnx", {"weight_type": QuantType.QUInt8, "per_channel": True, "reduce_range": True}
    result = ort.quantize_dynamic(model, path, **kinds)
    assert audit_model(path).counts() == {"MatMulNBits": 2}
    theirs.quantize_dynamic(model, tmp_path / "t.onnx")
    feed = [{"x": np.concatenate([f["x"] for f in feeds(model, 16)])}]
    floats, own, other = (runtimes.outputs(runtimes.session(m), feed)[0] for m in (model, result.model, tmp_path / "t.onnx"))
    assert measure.sqnr(floats, own) > measure.sqnr(floats, other)
    names = names_of(model, "MatMul")
    result = ort.quantize_dynamic(model, path, nodes_to_exclude=names[:1])
    assert set(result.report.floats) == set(names[:1])
    ort.quantize_dynamic(model, path, weight_type=QuantType.QInt4)
    assert audit_model(path).counts() == {"MatMulNBits": 2} and path.stat().st_size < 12_000
    assert "stay float" in refused(ort.quantize_dynamic, model, "q", extra_options={"ActivationSymmetric": True})


def test_configs(tmp_path):
    model = resnet20()
    names = names_of(model, "Conv")[:1]
    config = theirs.StaticQuantConfig(Reader(feeds(model, 8)), nodes_to_exclude=names, reduce_range=True)
    result = ort.quantize(model, tmp_path / "s.onnx", config)
    assert names[0] not in integer(result) and 7 in {spec.bits for spec in result.plan.values()}
    config = theirs.DynamicQuantConfig(weight_type=QuantType.QInt4)
    assert ort.quantize(mlp(), tmp_path / "d.onnx", config).recipe.weights.bits == 4


def test_passes_and_plugins_by_name(static):
    result = static(cnn(), plugins=["reorder"])
    names = [step.name for step in result.recipe.passes]
    assert names.index("reorder") < names.index("ranges")


# ---- overrides of tensors -------------------------------------------------------------------------------------------------


def over(**tensors):
    return {"extra_options": {"TensorQuantOverrides": {name: [entry] for name, entry in tensors.items()}}}


def test_ranges_and_scales_of_activations_are_as_given(static):
    model = cnn()
    result = static(model, **over(x={"rmin": -8.0, "rmax": 8.0}))
    low, high = result.plan["x"].value_range
    assert low <= -7.9 and high >= 7.9 and high - low < 16.1 and any("left out" in note for note in result.report.notes)
    result = static(model, **over(x={"quant_type": QuantType.QInt8, "scale": np.float32(0.0625), "zero_point": np.int8(0)}))
    assert np.isclose(result.plan["x"].scale, 0.0625, rtol=1e-5) and result.plan["x"].zero_point == 128


def test_widths_of_single_tensors(static):
    model = resnet20()
    first, second = (
        node for node in model.graph.node if node.op_type == "Conv" and node.name in names_of(model, "Conv")[:2]
    )
    result = static(model, **over(**{first.input[1]: {"quant_type": QuantType.QInt4, "axis": 0}}))
    bits = {layer.name: result.plan[layer.weight].bits for layer in result.graph.layers}
    assert bits[first.name] == 4 and bits[second.name] == 8
    result = static(model, target="npu", **over(**{second.input[0]: {"quant_type": QuantType.QUInt16}}))
    planned = Planned(result.graph, result.plan, result.target)
    assert {y.name: planned.bits(y) for y in planned.layers}[second.name] == 16


@pytest.mark.parametrize(
    ("tensor", "entry", "said"),
    [
        ("x", {"rmin": 0.0}, "rmin and rmax"),
        ("x", {"scale": 1.0}, "scale and zero_point"),
        ("x", {"axis": 1}, "axis of an activation"),
        ("x", {"convert": {"quant_type": QuantType.QUInt16}}, "convert of an activation"),
        ("x", {"rmin": 2.0, "rmax": 1.0}, "must be [lowest, highest]"),
        ("c0", {"scale": 1.0, "zero_point": 0}, "scale of a weight"),
        ("c0", {"axis": 1}, "axis = 1 holds no outputs"),
        ("c0", {"symmetric": False}, "symmetric weights"),
        ("c1", {"quant_type": QuantType.QInt4}, "has this weight"),
    ],
    ids=str,
)
def test_overrides_that_cannot_be(static, tensor, entry, said):
    assert said in refused(static, cnn(), **over(**{tensor: entry})) and not static.path.exists()


def test_a_range_of_a_tensor_that_is_not_quantized(static):
    model = transformer()
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Softmax")
    assert "no quantized tensor" in refused(static, model, **over(**{name: {"rmin": 0.0, "rmax": 1.0}}))
