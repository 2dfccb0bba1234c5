"""Targets that quantize a network as a whole, and files that other runtimes load."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxq_plugins import OnnxqError, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.graph.opsets import opset_of
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.misfits import misfits
from onnxq_plugins.testing.targets import TARGET_CHECKS, Bench
from tests.networks import feed_of, network
from tests.zoo import cnn, conv_transpose, feeds, grouped, mlp, mobilenet, prelu, resnet20, transformer

TARGETS = {target.name: target for target in BUILTIN}
WHOLE = [target for target in BUILTIN if target.whole]
NEW = ("litert", "ethos-u", "qnn", "web", "portable", "qoperator")
FLOAT_IN_LITERT = {"LayerNormalization", "Gelu"}


def made(model, target, recipe="int8", **options):
    return quantize(model, recipe, feeds(model, 8), target=target, workers=1, **{"check": False, **options})


def by_name(target):
    return target.name


def ops(model):
    return Counter(node.op_type for node in model.graph.node)


def half_quantized(model, target):
    """Operators with an integer form that read or write floats."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {t.name for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.op_type not in target.integer_ops | {
            "Conv",
            "Gemm",
        }:
            continue
        read = [makers[name].op_type for name in node.input if name in makers]
        behind = readers.get(node.output[0], [])
        absorbed = len(behind) == 1 and behind[0].op_type in ("Relu", "Clip")
        read_by = [n.op_type for n in (readers.get(behind[0].output[0], []) if absorbed else behind)]
        inside = node.op_type in ("Relu", "Clip") and read and read[0] != "DequantizeLinear"
        if not inside and (set(read) != {"DequantizeLinear"} or set(read_by) != {"QuantizeLinear"}):
            found.append((node.op_type, read, read_by))
        names = [name for name in node.input if name in constants]
        if node.op_type in ("Add", "Mul", "Sub", "MatMul", "PRelu") and names:
            found.append((node.op_type, names))
    return found


@pytest.mark.parametrize("target", WHOLE, ids=by_name)
@pytest.mark.parametrize("build", [cnn, mobilenet, resnet20, mlp, prelu, grouped, transformer])
def test_everything_with_an_integer_form_is_between_codes(build, target):
    result = made(build(), target.name)
    assert not half_quantized(result.model, target)
    graph = result.model.graph
    assert {n.op_type for n in graph.node if set(n.input) & {v.name for v in graph.input}} == {"QuantizeLinear"}
    assert {n.op_type for n in graph.node if set(n.output) & {v.name for v in graph.output}} == {"DequantizeLinear"}
    float_model = build()
    samples = feeds(float_model, 8, seed=1)
    runs = [runtimes.outputs(runtimes.session(m, written=True), samples) for m in (float_model, result.model)]
    assert worst_sqnr(*runs) > 25


@pytest.mark.parametrize("target", [TARGETS["litert"], TARGETS["qnn"]], ids=by_name)
@pytest.mark.parametrize("build", [cnn, transformer])
def test_sixteen_bits_are_closer(build, target):
    narrow, wide = (made(build(), target.name, settings=[f"activations.bits={bits}"]) for bits in (8, 16))
    samples = feeds(build(), 8, seed=1)
    runs = [runtimes.outputs(runtimes.session(m, written=True), samples) for m in (build(), narrow.model, wide.model)]
    assert worst_sqnr(runs[0], runs[2]) > worst_sqnr(runs[0], runs[1]) + 1
    assert not misfits(target, wide.model) and not half_quantized(wide.model, target)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("check", TARGET_CHECKS)
def test_the_kit(check, name):
    if check != "check_target_declaration":  # names of guests have a vendor
        TARGET_CHECKS[check](TARGETS[name], Bench({}))


@pytest.mark.parametrize("target", [t for t in BUILTIN if t.integer], ids=by_name)
def test_eight_bits_are_stored_as_eight_bits(target):
    """INT4 constants keep other runtimes from loading a file."""
    for build in (cnn, mobilenet, resnet20, mlp, conv_transpose):
        result = made(build(), target.name)
        kinds = {t.data_type for t in result.model.graph.initializer}
        assert not kinds & {TensorProto.INT4, TensorProto.UINT4}


@pytest.mark.parametrize("target", [t for t in BUILTIN if not t.apart], ids=by_name)
@pytest.mark.parametrize("changes", [(), ("weights.bits=4",), ("activations.bits=8",)])
def test_nothing_but_standard_operators_and_no_sum_of_one_operand(target, changes):
    for build in (cnn, transformer, resnet20):
        model = build()
        middle = model.graph.node[len(model.graph.node) // 2].name
        result = made(model, target.name, settings=changes, exclude=[middle] if "activations.bits=8" in changes else ())
        assert "Sum" not in ops(result.model)
        assert not {n.domain for n in result.model.graph.node} - {""}


@pytest.mark.parametrize("name", ["portable", "qoperator"])
@pytest.mark.parametrize("recipe", ["int8", "int4-storage"])
def test_portable_files_are_plain(name, recipe):
    for build in (cnn, transformer, mobilenet):
        model = made(build(), name, recipe).model
        assert opset_of(model) == 13 and not misfits(TARGETS[name], model)
        assert {t.data_type for t in model.graph.initializer} <= {
            TensorProto.FLOAT,
            *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64),
        }
        constants = {t.name for t in model.graph.initializer}
        folded = [
            n for n in model.graph.node if n.input and n.op_type != "DequantizeLinear" and constants.issuperset(n.input)
        ]
        assert not folded


@pytest.mark.parametrize("target", WHOLE, ids=by_name)
def test_shifts_of_channels_join_the_scales(target):
    """A Mul behind a layer would be left to the CPU."""
    model = mobilenet()
    result = made(model, target.name, "int8-per-tensor")
    assert any(spec.multiplier is not None for spec in result.plan.values())
    assert ops(result.model)["Mul"] == ops(model)["Mul"] == 0


@pytest.mark.parametrize("bits, kind", [(8, TensorProto.UINT8), (16, TensorProto.INT16)])
def test_the_htp_takes_the_scale_of_a_normalization(bits, kind):
    """Beside an int32 bias it refuses one of uint16."""
    model = made(transformer(), "qnn", settings=[f"activations.bits={bits}"]).model
    types = {t.name: t.data_type for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert found
    for node in found:
        scale, bias = (types[makers[name].input[0]] for name in node.input[1:])
        assert (scale, bias) == (kind, TensorProto.INT32)


def test_settings_of_the_htp():
    result = made(cnn(), "qnn", settings=["target.qnn.soc_model=57"])
    assert result.target.settings == {"soc_model": 57, "htp_arch": 73}


@pytest.mark.parametrize("target", [t for t in BUILTIN if t.static], ids=by_name)
def test_shapes_are_fixed_and_known(target):
    operators = [
        ("Shape", ["x"], ["size"], {}),
        ("Gather", ["size", "first"], ["batch"], {}),
        ("Concat", ["batch", "rest"], ["shape"], {"axis": 0}),
        ("Conv", ["x", "w"], ["h"], {"pads": [1, 1, 1, 1]}),
        ("Reshape", ["h", "shape"], ["r"], {}),
        ("MatMul", ["r", "v"], ["y"], {}),
    ]
    constants = {"first": np.array([0]), "rest": np.array([-1, 32]), "w": (4, 3, 3, 3), "v": (32, 5)}
    model = network(operators, ["batch", 3, "h", 8], constants)
    samples = [feed_of(model, seed) for seed in range(4)]
    samples = [{"x": np.repeat(s["x"][:1], 4, axis=2)[:, :, :8]} for s in samples]
    result = quantize(model, "int8", samples, target=target.name, workers=1)
    graph = result.model.graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert shapes == {"x": [1, 3, 8, 8], "y": [1, 8, 5]}
    stated = {v.name for v in graph.value_info} | {v.name for v in graph.output}
    assert {name for node in graph.node for name in node.output} <= stated and "Shape" not in ops(result.model)
    onnx.checker.check_model(result.model, full_check=True)
    before = runtimes.outputs(runtimes.session(model), samples)
    assert worst_sqnr(before, runtimes.outputs(runtimes.session(result.model), samples)) > 25


def test_open_shapes_without_a_sample_are_refused():
    model = network([("Conv", ["x", "w"], ["y"], {})], ["n", 3, "height", 8], {"w": (4, 3, 3, 3)})
    with pytest.raises(OnnxqError, match="needs fixed shapes, and the model leaves axes of input 'x' open; give samples"):
        quantize(model, {"activations": {"bits": 32}}, target="litert")


@pytest.mark.parametrize("target", WHOLE, ids=by_name)
@pytest.mark.parametrize("bits", [8, 16])
def test_tables_have_their_own_grids(target, bits):
    """Softmax and Sigmoid write steps of 1/256 or 1/65536 (1/32768 around 0), Tanh twice that."""
    operators = [
        *(("Gemm", ["x", w], [w + "y"], {}) for w in "abc"),
        ("Softmax", ["ay"], ["s"], {"axis": -1}),
        ("Sigmoid", ["by"], ["g"], {}),
        ("Tanh", ["cy"], ["t"], {}),
        ("Mul", ["g", "t"], ["gt"], {}),
        ("Add", ["s", "gt"], ["y"], {}),
    ]
    model = network(operators, [2, 6], dict.fromkeys("abc", (6, 6)))
    samples = [feed_of(model, seed) for seed in range(4)]
    result = quantize(model, {"activations": {"bits": bits}}, samples, target=target.name, workers=1)
    values = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    quantizers = {n.input[0]: n for n in result.model.graph.node if n.op_type == "QuantizeLinear"}
    mirrored = target.centred(bits)
    for node in result.model.graph.node:
        if node.op_type in ("Softmax", "Sigmoid", "Tanh"):
            q = quantizers[node.output[0]]
            steps = 2.0 ** (bits - (mirrored or node.op_type == "Tanh"))
            assert values[q.input[1]] == np.float32(1 / steps)
            lowest = 0 if target.signed else 2 ** (bits - 1)
            assert values[q.input[2]] == lowest - (0 if mirrored or node.op_type == "Tanh" else 2 ** (bits - 1))


def test_swish_becomes_operators_that_have_integer_kernels():
    operators = [
        ("Conv", ["x", "w"], ["h"], {}),
        ("Sigmoid", ["h"], ["g"], {}),
        ("Mul", ["h", "g"], ["s"], {}),
        ("Conv", ["s", "v"], ["y"], {}),
    ]
    model = network(operators, [1, 3, 8, 8], {"w": (4, 3, 3, 3), "v": (5, 4, 1, 1)})
    result = quantize(model, "int8", [feed_of(model, seed) for seed in range(4)], target="litert", workers=1, check=False)
    assert ops(result.model)["Sigmoid"] == ops(result.model)["Mul"] == 1
    assert not half_quantized(result.model, TARGETS["litert"])


def test_all_that_a_target_cannot_hold_is_told_before_it_is_calibrated(monkeypatch):
    operators = [
        ("Gemm", ["x", "w"], ["h"], {}),
        ("Mish", ["h"], ["m"], {}),
        ("Gemm", ["m", "v"], ["y"], {}),
    ]
    model = network(operators, [2, 8], {"w": (8, 8), "v": (8, 8)}, opset=18)

    monkeypatch.setattr(Calibration, "ranges", lambda *_: pytest.fail("it was calibrated"))
    with pytest.raises(OnnxqError) as caught:
        quantize(model, {"weights": {"block": 4}}, [feed_of(model)], target="portable")
    told = " ".join(caught.value.problems)
    assert "Mish (1)" in told and "block" in told and len(caught.value.problems) == 2


@pytest.mark.parametrize("target", WHOLE, ids=by_name)
def test_constants_beside_codes_are_codes_of_the_same_width(target):
    for bits, op in itertools.product((8, 16), ("Add", "Mul", "Sub")):
        operators = [("Gemm", ["x", "w"], ["h"], {}), ("Tanh", ["h"], ["t"], {}), (op, ["t", "c"], ["y"], {})]
        model = network(operators, [4, 6], {"w": (6, 6), "c": (1, 6)})
        samples = [feed_of(model, seed) for seed in range(4)]
        result = quantize(model, {"activations": {"bits": bits}}, samples, target=target.name, workers=1)
        makers = {name: n for n in result.model.graph.node for name in n.output}
        values = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
        node = next(n for n in result.model.graph.node if n.op_type == op)
        codes = values[makers[node.input[1]].input[0]]
        zero = values[makers[node.input[1]].input[2]]
        assert codes.dtype == zero.dtype and codes.dtype.itemsize * 8 == bits
        assert (codes.dtype.kind == "i") == target.signed


def test_mask_of_infinities_stays_float():
    """No grid holds it."""
    operators = [("Gemm", ["x", "w"], ["h"], {}), ("Add", ["h", "c"], ["m"], {}), ("Softmax", ["m"], ["y"], {"axis": -1})]
    mask = np.array([[0, -np.inf, 0, 0, -np.inf, 0]], np.float32)
    model = network(operators, [4, 6], {"w": (6, 6), "c": mask})
    samples = [feed_of(model, seed) for seed in range(4)]
    result = quantize(model, "int8", samples, target="qnn", workers=1)
    reference, quantized = (runtimes.outputs(runtimes.session(m), samples)[0] for m in (model, result.model))
    assert np.abs(reference - quantized).max() < 0.05


@pytest.mark.parametrize("target", WHOLE, ids=by_name)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_normalization_between_others_is_a_layer(target, rank):
    operators = [
        ("Conv", ["x", "w"], ["h"], {}),
        ("Relu", ["h"], ["r"], {}),
        ("BatchNormalization", ["r", "gamma", "beta", "mean", "var"], ["n"], {"epsilon": 1e-3}),
        ("LeakyRelu", ["n"], ["l"], {}),
        ("Conv", ["l", "v"], ["y"], {}),
    ]
    constants = {"w": (4, 3, *[3] * rank), "v": (5, 4, *[1] * rank), "gamma": (4,), "beta": (4,), "mean": (4,)}
    model = network(operators, [1, 3, *[8] * rank], {**constants, "var": np.array([0.5, 1.0, 2.0, 3.0], np.float32)})
    samples = [feed_of(model, seed) for seed in range(4)]
    result = quantize(model, "int8", samples, target=target.name, workers=1, check=False)
    assert ops(result.model)["Conv"] == 3 and "BatchNormalization" not in ops(result.model)
    assert not half_quantized(result.model, target)
    before = runtimes.outputs(runtimes.session(model), samples)
    assert worst_sqnr(before, runtimes.outputs(runtimes.session(result.model), samples)) > 25


@pytest.mark.parametrize("target", [TARGETS["litert"], TARGETS["qnn"]], ids=by_name)
def test_learned_rounding_reads_codes_as_the_target_stores_them(target):
    """Signed codes have another zero point: with a wrong one inputs of layers are shifted, which no rounding survives."""
    model = mobilenet()
    samples = feeds(model, 8, seed=1)
    recipe = {"target": target.name, "weights": {"bits": 4}, "pass": [{"use": "ranges"}]}
    learned = {**recipe, "pass": [*recipe["pass"], {"use": "round", "method": "gptq"}]}
    nearest, rounded = (quantize(model, r, feeds(model, 8), workers=1, check=False).model for r in (recipe, learned))
    reference = runtimes.outputs(runtimes.session(model), samples)
    runs = [runtimes.outputs(runtimes.session(m, written=True), samples) for m in (nearest, rounded)]
    assert worst_sqnr(reference, runs[1]) > worst_sqnr(reference, runs[0]) + 1


def test_portable_files_have_shapes_of_some_axes():
    operators = [
        ("Conv", ["x", "w"], ["y"], {}),
        ("Shape", ["y"], ["some"], {"start": 1, "end": -1}),
        ("Cast", ["some"], ["z"], {"to": TensorProto.FLOAT}),
    ]
    model = network(operators, ["n", 3, "h", 8], {"w": (4, 3, 1, 1)}, outputs=("y", "z"))
    samples = [feed_of(model, seed) for seed in range(4)]
    result = quantize(model, "int8", samples, target="portable", workers=1, check=False)
    assert opset_of(result.model) == 13 and ops(result.model)["Slice"] == 1
    sizes = runtimes.session(result.model).run(["z"], samples[0])[0]
    assert sizes.tolist() == runtimes.session(model).run(["z"], samples[0])[0].tolist() == [4, 3]
