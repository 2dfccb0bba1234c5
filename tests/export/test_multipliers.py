"""Two-level scales on disk and at run time: 4-bit codes and multipliers that onnxruntime folds into int8 codes at load,
float scales that it folds into float weights, and the refusals of what a target cannot run."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxq_plugins import OnnxqError, Plan, QuantSpec, audit_model, load, measure, quantize, runtimes
from onnxq_plugins.export.qdq import export
from onnxq_plugins.export.weights import Layout, int8_codes, stored_bits
from onnxq_plugins.files import save_model
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.spec import block_shape, expand
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.refusals import problems
from tests.zoo import ZOO, Net, feeds, slowly, some

TILED = [
    "cnn",
    "mobilenet",
    "grouped",
    "inception",
    "mlp",
    "transformer",
    "conv1d",
    "no_bias",
    "dead_channels",
    "odd_channels",
    "shared_weights",
    "prelu",
    "resnet20",
]
MOST = ("mobilenet", "grouped", "inception", "mlp", "transformer", "dead_channels", "odd_channels", "shared_weights")
TARGETS = {target.name: target for target in BUILTIN}
INT4 = (TensorProto.INT4, TensorProto.UINT4)


def tiled(block="channel", sub_block=(1, 4), bits=4, **more) -> dict:
    return {"weights": {"bits": bits, "block": block, "sub_block": list(sub_block), **more}}


def agree(model: onnx.ModelProto, samples) -> None:
    """With and without optimization onnxruntime computes the same, but for codes that lie on the edge."""
    plain, fast = (runtimes.outputs(runtimes.session(model, optimize=o), samples) for o in (False, True))
    for a, b in zip(plain, fast, strict=True):
        assert measure.sqnr(a, b) > 30


def net(k: int = 1, groups: int = 1, cin: int = 24, cout: int = 24) -> onnx.ModelProto:
    made = Net(["N", 3, 8, 8])
    x = made.op("Relu", made.conv("x", 3, cin))
    x = made.op("Relu", made.conv(x, cin, cout, k, groups=groups))
    return made.model(made.head(x, cout))


# ---- integer kernels ------------------------------------------------------------------------------------------------------


FORMS = (
    ("ort-cpu", tiled("tensor", (4, 4))),
    ("ort-cpu", tiled(bits=5)),
    ("ort-cpu", tiled(pow2=True)),
    ("ort-cpu", tiled("tensor", (1, 0))),
    ("ort-cpu", tiled(bits=3, max_multiplier=42)),
    ("ort-cpu", tiled("channel", (1, 5))),
    ("ort-cpu", tiled(bits=2, max_multiplier=127)),
    ("ort-cpu-avx2", tiled()),
    ("ort-cpu-avx2", tiled("tensor", (3, 5))),
    ("openvino", tiled()),
)


@functools.cache
def plain_kernels(name: str, bits: int, target: str) -> dict[str, int]:
    model = ZOO[name]()
    return quantize(model, {"weights": {"bits": bits}}, feeds(model, 4), target=target, workers=1).report["kernels"]


@pytest.mark.parametrize(
    ("name", "target", "recipe"),
    [
        *some(((name, "ort-cpu", tiled()) for name in TILED), *((name, "ort-cpu", tiled()) for name in MOST)),
        *((("mobilenet", "transformer")[i % 2], target, recipe) for i, (target, recipe) in enumerate(FORMS)),
        *slowly(*((("transformer", "mobilenet")[i % 2], target, recipe) for i, (target, recipe) in enumerate(FORMS))),
        *slowly(*((name, target, recipe) for name in ("grouped", "odd_channels") for target, recipe in FORMS)),
    ],
    ids=str,
)
def test_multipliers_run_in_integer_kernels(name, target, recipe):
    model = ZOO[name]()
    samples = feeds(model, 4)
    result = quantize(model, recipe, samples, target=target, workers=1)
    assert result.report["kernels"] == plain_kernels(name, recipe["weights"]["bits"], target)
    agree(result.model, samples)
    for layer in load(model, flatten=TARGETS[target].flatten).layers:
        spec = result.plan.get(layer.weight)
        if spec is not None and spec.multiplier is not None:
            folded = spec.codes * np.broadcast_to(weight_values(layer, spec) != 0, layer.shape)  # zero weights may have any
            assert np.abs(int8_codes(layer, spec)).max() <= TARGETS[target].max_code
            assert (np.sign(int8_codes(layer, spec)) == np.sign(folded)).all()
            assert set(np.unique(spec.multiplier)) <= set(spec.multipliers.tolist())


@pytest.mark.parametrize(
    ("k", "groups", "cin", "sub"), [(1, 1, 24, 16), (3, 1, 24, 16), (3, 2, 24, 8), (1, 1, 20, 8), (3, 4, 24, 5)]
)
def test_what_the_kernel_computes_with_is_the_plan(tmp_path, k, groups, cin, sub):
    """The int8 initializer in the optimized model holds codes * multiplier."""
    model = net(k, groups, cin)
    result = quantize(model, tiled(sub_block=(1, sub)), feeds(model, 4), workers=1)
    runtimes.session(result.model, dump=tmp_path / "o.onnx")
    ran = onnx.load(str(tmp_path / "o.onnx"))
    found = [numpy_helper.to_array(t) for t in ran.graph.initializer if t.data_type == TensorProto.INT8]
    layer = load(model).layers[1]
    spec = result.plan[layer.weight]
    assert spec.multiplier is not None and len(np.unique(spec.multiplier)) > 1
    wanted = np.sort(int8_codes(layer, spec).reshape(-1))
    assert any(a.size == wanted.size and np.array_equal(np.sort(a.reshape(-1)), wanted) for a in found)
    assert not any(t.data_type in INT4 for t in ran.graph.initializer)


def test_openvino_runs_multipliers_as_integer(tmp_path):
    ov = pytest.importorskip("openvino", reason="needs the extra openvino")
    from onnxq_plugins.runtimes.openvino import audit_openvino

    for recipe in (tiled(sub_block=(1, 16)), tiled("tensor", (8, 5)), tiled(pow2=True)):
        model = net(3)
        samples = feeds(model, 6)
        result = quantize(model, recipe, samples, target="openvino", workers=1)
        path = save_model(result.model, tmp_path / "m.onnx")
        assert all(layer.quantized for layer in audit_openvino(path).layers)
        runner = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        theirs = np.concatenate([runner([s["x"]])[0] for s in samples])
        assert measure.sqnr(runtimes.outputs(runtimes.session(result.model), samples)[0], theirs) > 25


def test_finer_scales_have_less_error():
    model = net(1, cin=64, cout=64)
    samples, other = feeds(model, 16), feeds(model, 16, seed=1)
    wanted = runtimes.outputs(runtimes.session(model), other)[0]
    found = [
        measure.sqnr(wanted, runtimes.outputs(runtimes.session(quantize(model, r, samples, workers=1).model), other)[0])
        for r in ({"weights": {"bits": 4, "block": "tensor"}}, {"weights": {"bits": 4}}, tiled(sub_block=(1, 8)))
    ]
    assert found[0] < found[1] < found[2]


# ---- on disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "kind"), [(15, TensorProto.UINT4), (18, TensorProto.UINT8)])
def test_multipliers_have_the_smallest_type(most, kind):
    model = net(1, cin=64, cout=64)
    made = tiled(max_multiplier=most)
    result = quantize(model, made, feeds(model, 2), workers=1, names="keep")
    factors = {t.data_type for t in result.model.graph.initializer if "_factor" in t.name}
    assert factors == {kind}
    assert {int(np.max(s.multiplier)) for s in result.plan.values() if s.multiplier is not None} == {most}


@pytest.mark.parametrize(
    "recipe",
    [
        tiled(sub_block=(1, 16)),
        tiled("tensor", (16, 16)),
        {"weights": {"bits": 4}},
        {"weights": {"bits": 4, "block": [16, 16]}, "target": "storage"},
        {"weights": {"bits": 8, "block": [1, 16]}, "target": "storage"},
    ],
    ids=str,
)
def test_bits_per_weight_are_those_of_the_file(recipe):
    """Codes, factors and scales of the weights, counted in the file."""
    model = net(1, cin=72, cout=40)
    result = quantize(model, recipe, feeds(model, 2), workers=1, names="keep")
    graph = load(model)
    counted = 0
    for layer in graph.layers:
        mine = [t for t in result.model.graph.initializer if t.name.startswith(f"{layer.weight}_")]
        sizes = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.FLOAT: 32}
        counted += sum(
            int(np.prod(t.dims)) * sizes[t.data_type] for t in mine if t.data_type in sizes and "zero_point" not in t.name
        )
    weights = sum(int(np.prod(layer.shape)) for layer in graph.layers)
    assert result.report["bits_per_weight"] == pytest.approx(counted / weights, abs=2e-3)
    assert f"{result.report['bits_per_weight']:.1f} bits per weight" in result.summary


def test_storage_is_smaller():
    model = net(1, cin=256, cout=256)
    size = {
        name: quantize(model, {"weights": {"bits": 4}} | recipe, feeds(model, 2), workers=1).model.ByteSize()
        for name, recipe in {"int8": {"weights": {"bits": 8}}, "int4": {}, "two": tiled(sub_block=(1, 16))}.items()
    }
    assert size["int4"] < size["two"] < 0.75 * size["int8"]


@pytest.mark.parametrize(
    ("shape", "block", "whole", "split", "counts"),
    [
        ((40, 20, 3, 3), (1, 16, 0, 0), (40, 32, 3, 3), (40, 2, 16, 3, 3), (40, 2, 1, 1, 1)),
        ((40, 20), (16, 16), (48, 32), (3, 16, 2, 16), (3, 1, 2, 1)),
        ((40, 3, 3, 3), (16, 16, 0, 0), (48, 3, 3, 3), (3, 16, 3, 3, 3), (3, 1, 1, 1, 1)),  # one block covers all inputs
        ((4, 4), None, (4, 4), (4, 4), (1, 1)),
    ],
)
def test_layout(shape, block, whole, split, counts):
    found = Layout.of(shape, block)
    assert (found.whole, found.split, found.counts) == (whole, split, counts)
    rng = np.random.default_rng(0)
    codes, factors = rng.normal(size=shape), rng.normal(size=block_shape(shape, block))
    filled = np.zeros(whole)
    filled[tuple(slice(n) for n in shape)] = codes
    product = (filled.reshape(split) * factors.reshape(counts)).reshape(whole)[tuple(slice(n) for n in shape)]
    np.testing.assert_array_equal(product, codes * expand(factors, shape, block))


# ---- float scales: target storage -------------------------------------------------------------------------------------


WEIGHTS = [
    {"bits": 4, "block": [4, 4]},
    {"bits": 3, "block": [1, 5]},
    {"bits": 8, "block": [3, 0]},
    {"bits": 4, "block": "channel", "sub_block": [1, 4]},
    {"bits": 6, "block": "tensor"},
    {"bits": 4, "block": [2, 4], "pow2": True},
    {"bits": 6, "block": "tensor", "sub_block": [4, 4]},
]


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        *(("conv_transpose", weights, 32) for weights in WEIGHTS),
        *((("mobilenet", "transformer")[i % 2], weights, 32) for i, weights in enumerate(WEIGHTS)),
        *slowly(*((("transformer", "mobilenet")[i % 2], weights, 32) for i, weights in enumerate(WEIGHTS))),
        *((name, WEIGHTS[0], 32) for name in ("inception", "mlp", "dead_channels", "odd_channels", "shared_weights")),
        *slowly(*((name, WEIGHTS[0], 32) for name in ("cnn", "grouped", "conv1d", "no_bias", "prelu", "resnet20"))),
        *slowly(*((name, WEIGHTS[0], 8) for name in TILED), *(("grouped", weights, 32) for weights in WEIGHTS[1:])),
        *(("odd_channels", weights, 8) for weights in WEIGHTS[1:]),
    ],
    ids=str,
)
def test_storage_computes_with_the_planned_weights(name, weights, activations):
    """Weight-only: a float network whose weights were replaced gives the same. Beside 8-bit activations: layers run in
    float, and onnxruntime does not quantize their weights once more."""
    model = ZOO[name]()
    samples = feeds(model, 3)
    recipe = {"target": "storage", "weights": weights, "activations": {"bits": activations}}
    result = quantize(model, recipe, samples, workers=1)
    assert not any(layer.quantized for layer in audit_model(result.model).layers if layer.constant_weight)
    assert all(row["why_float"] for row in result.report["layers"])
    if activations == 32:
        graph = load(model, flatten=False)
        for layer in graph.layers:
            graph.set_constant(layer.weight, weight_values(layer, result.plan[layer.weight]))
        wanted = runtimes.outputs(runtimes.session(graph.model()), samples)
        assert measure.drift(wanted, runtimes.outputs(runtimes.session(result.model), samples)) < 1e-4
    else:
        agree(result.model, samples)


def test_the_summary_tells_that_storage_runs_in_float():
    result = quantize(net(), {"target": "storage", "weights": {"bits": 4, "block": [16, 16]}}, feeds(net(), 2), workers=1)
    assert result.summary.startswith("3/3 layers decoded at load, run in float |")


def test_storage_keeps_a_shift():
    model = net(1)
    recipe = {"target": "storage", "weights": {"bits": 3, "block": [4, 4]}, "pass": [{"use": "bias-correct"}]}
    samples = feeds(model, 8)
    result = quantize(model, recipe, samples, workers=1)
    assert any(spec.shift is not None for spec in result.plan.values())
    plain = quantize(model, recipe | {"pass": []}, samples, workers=1)
    wanted = runtimes.outputs(runtimes.session(model), samples)[0]
    errors = [measure.sqnr(wanted, runtimes.outputs(runtimes.session(r.model), samples)[0]) for r in (plain, result)]
    assert errors[1] > errors[0]


# ---- refusals ---------------------------------------------------------------------------------------------------------


def refused(model, recipe, **options) -> str:
    with pytest.raises(OnnxqError) as caught:
        quantize(model, recipe, feeds(model, 2), workers=1, **options)
    return str(caught.value)


def test_free_tiles_are_refused_with_the_alternative():
    text = refused(net(), {"weights": {"bits": 4, "block": [16, 16]}})
    assert "weights.sub_block = [16, 16]" in text and 'weights.block = "tensor"' in text and "'storage'" in text
    text = refused(net(), {"weights": {"bits": 4, "block": [1, 16]}})
    assert "weights.sub_block = [1, 16]" in text and 'weights.block = "channel"' in text


def test_the_alternative_works():
    assert quantize(net(), tiled("tensor", (16, 16)), feeds(net(), 2), workers=1).report["kernels"]["QLinearConv"] == 2


def test_multipliers_of_weight_only_layers_are_refused_with_the_alternative():
    made = Net(["N", 64])
    model = made.model(made.gemm("x", 64, 8))
    text = refused(model, tiled() | {"activations": {"bits": 32}})
    assert "leave weights.sub_block out" in text and "per 16, 32, 64, 128 or 256 inputs" in text and "weights.block" in text


def test_multipliers_under_tiles_are_refused():
    text = refused(net(), tiled([4, 4], (1, 4)))
    assert 'set weights.block to "channel" or "tensor"' in text


def test_a_plan_that_overflows_int8_is_refused():
    model = net()
    graph, target = load(model), TARGETS["ort-cpu-avx2"]
    layer = graph.layers[0]
    spec = QuantSpec(4, block=(1, 0, 0, 0), sub_block=(1, 1, 0, 0), max_multiplier=15)
    key = layer.input
    plan = Plan({layer.weight: spec, key: QuantSpec(8, symmetric=False)})
    (problem,) = problems(target, graph, plan, {layer.name: key})
    assert "reach 105" in problem and "up to 64" in problem and "max_multiplier = 9" in problem
    assert not problems(TARGETS["ort-cpu"], graph, plan, {layer.name: key})


@pytest.mark.parametrize("key", ["block", "sub_block"])
@pytest.mark.parametrize("sizes", [0, -4, [-1, 16], [1, -16]])
def test_sizes_below_one_are_refused(key, sizes):
    text = refused(net(), {"weights": {"bits": 4, key: sizes}})
    assert f"{key} = {sizes} must hold sizes of 1 or more" in text and "[1, 16]" in text


@pytest.mark.parametrize("value", [0, 128])
def test_multipliers_out_of_range_are_refused(value):
    assert "1..127" in refused(net(), tiled(max_multiplier=value))


# ---- plans by hand ----------------------------------------------------------------------------------------------------


def test_a_plan_by_hand_exports_without_a_pass():
    """What a guest's pass may do: multipliers of its own."""
    model = net(1)
    graph = load(model)
    layer = graph.layers[1]
    result = quantize(model, "int8", feeds(model, 4), workers=1)
    rng = np.random.default_rng(0)
    spec = QuantSpec(
        4,
        block=(1, 0, 0, 0),
        sub_block=(1, 8, 0, 0),
        scale=np.full((24, 1, 1, 1), 0.01, np.float32),
        multiplier=rng.integers(1, 16, (24, 3, 1, 1)),
        codes=rng.integers(-7, 8, layer.shape),
    )
    made = export(graph, result.plan | {layer.weight: spec}, TARGETS["ort-cpu"])
    agree(made, feeds(model, 3))
    assert stored_bits(layer, spec, TARGETS["ort-cpu"].rule(layer, spec, 8)) == pytest.approx(4 + 4 / 8 + 32 / 24)
    codes = next(t for t in made.graph.initializer if t.name.startswith(f"{layer.weight}_codes"))
    assert numpy_helper.to_array(codes).astype(ml_dtypes.int4).reshape(layer.shape).tolist() == spec.codes.tolist()
