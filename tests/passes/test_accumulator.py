"""Accumulators: widths are exact, bounded codes stay within, the audit reads what the kernels add."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from onnxq_plugins import OnnxqError, audit_model, hookimpl, load, quantize, runtimes
from onnxq_plugins.cli import app
from onnxq_plugins.export.weights import int8_codes
from onnxq_plugins.job import Pass
from onnxq_plugins.layers.problem import white_inputs
from onnxq_plugins.runtimes.accumulators import needs
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.openvino import audit_openvino
from onnxq_plugins.solvers.accumulator import (
    bounded,
    limit_of,
    project,
    saturates,
    sums,
    width,
    within,
    worst_inputs,
)
from onnxq_plugins.solvers.descent import descent
from onnxq_plugins.solvers.gram import row_loss
from onnxq_plugins.spec import encode, from_range, solve_minmax
from tests.zoo import ZOO, Net, cnn, conv_transpose, examples, feeds, grouped, mlp, mobilenet, run

CODES = st.lists(st.one_of(st.integers(-127, 127), st.sampled_from([-128, -64, 0, 64, 127])), min_size=1, max_size=12)
RANGES = st.sampled_from([(0, 255), (-128, 127), (0, 15), (-127, 127)])


def fits(total: object, bits: int) -> bool:
    return -(2 ** (bits - 1)) <= total <= 2 ** (bits - 1) - 1


def problem(seed, groups=1, outputs=3, size=9, bits=8):
    """Weights, a Gram matrix of correlated inputs, covering steps and the grid."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(groups, outputs, size)) * np.exp(rng.normal(size=(groups, outputs, 1)))
    x = np.maximum(rng.normal(size=(groups, size, size)) @ rng.normal(size=(groups, size, 4 * size)), 0)
    top = 2 ** (bits - 1) - 1
    return w, x @ x.swapaxes(1, 2) / x.shape[2], np.abs(w).max(axis=2, keepdims=True) / top, (-top, top)


# ---- widths ---------------------------------------------------------------------------------------------------------


@examples(300)
@given(codes=CODES, inputs=RANGES)
def test_the_worst_input_just_fits(codes, inputs):
    q = np.array(codes)
    bits = int(width(q, inputs))
    ends = [int(x @ q) for x in worst_inputs(q, inputs)]
    assert all(fits(total, bits) for total in ends)
    assert bits == 1 or not all(fits(total, bits - 1) for total in ends)


@examples(150)
@given(codes=CODES, inputs=RANGES, seed=st.integers(0, 999))
def test_no_partial_sum_in_any_order_overflows(codes, inputs, seed):
    rng, q = np.random.default_rng(seed), np.array(codes)
    bits = int(width(q, inputs))
    low, high = (int(x @ q) for x in worst_inputs(q, inputs))
    for x in (rng.integers(inputs[0], inputs[1] + 1, (20, len(q))), rng.choice(inputs, (20, len(q)))):
        for one in x:
            partial = np.cumsum(rng.permutation(one * q))
            assert fits(partial.min(), bits) and fits(partial.max(), bits)
            assert low <= partial.min() and partial.max() <= high


def test_widths_of_many_rows_and_of_large_ones():
    np.testing.assert_array_equal(width(np.array([[0, 0], [1, 0], [0, -1], [127, 127]])), [1, 9, 9, 17])
    assert width(np.full(5000, 127, np.int8)) == 29  # 5000 * 127 * 255 = 161 925 000 < 2^28
    assert width(np.full(7, -128, np.int8), (-128, 127)) == 18  # 7 * 2^14 = 114 688
    assert width(np.full(8, -128, np.int8), (-128, 127)) == 19  # 2^17 itself needs one more


@examples(200)
@given(codes=st.lists(st.integers(-128, 127), min_size=1, max_size=6))
def test_pairs_saturate_where_int16_does(codes):
    pairs = itertools.combinations(codes, 2)
    over = any(not fits(np.dot(x, pair), 16) for pair in pairs for x in itertools.product((0, 255), repeat=2))
    assert bool(saturates(np.array(codes, np.int8))) == over


def test_codes_within_64_never_saturate_and_rows_count_apart():
    assert not saturates(np.array([[64, 64, 64], [-64, -64, 3]], np.int8)).any()
    np.testing.assert_array_equal(
        saturates(np.array([[65, 0, 64], [65, 63, -128], [-65, 0, -64]], np.int8)), [True, False, True]
    )
    assert not saturates(np.array([[-128], [127]], np.int8)).any()


@pytest.mark.parametrize("bits", range(9, 33))
def test_the_limit_is_exact(bits):
    limit = limit_of(bits)
    assert fits(255 * limit, bits) and not fits(255 * (limit + 1), bits)
    assert fits(-255 * limit, bits) and not fits(-255 * (limit + 1), bits)


# ---- bounded codes --------------------------------------------------------------------------------------------------


@examples(100)
@given(seed=st.integers(0, 9999), limit=st.floats(0, 40))
def test_projection_is_the_nearest_point(seed, limit):
    x = np.random.default_rng(seed).normal(size=(4, 7)) * 5
    y = project(x, limit)
    assert (np.maximum(y, 0).sum(axis=1) <= limit + 1e-9).all() and (np.maximum(-y, 0).sum(axis=1) <= limit + 1e-9).all()
    for other in np.random.default_rng(seed + 1).normal(size=(50, 4, 7)) * 5:
        largest = np.maximum(np.maximum(other, 0).sum(axis=1), np.maximum(-other, 0).sum(axis=1))
        inside = other * np.minimum(1, limit / largest)[:, None]
        assert (((x - y) * (inside - y)).sum(axis=1) <= 1e-8).all()  # a convex set: the angle is never acute


@examples(150)
@given(
    seed=st.integers(0, 9999),
    bits=st.sampled_from([2, 3, 4, 8]),
    limit=st.integers(0, 300),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 4),
    size=st.integers(1, 14),
)
def test_bounds_always_hold(seed, bits, limit, groups, outputs, size):
    w, h, step, grid = problem(seed, groups, outputs, size, bits)
    codes = bounded(w, h, step, grid, limit)
    assert codes.shape == w.shape and (codes == np.rint(codes)).all()
    assert codes.min(initial=0) >= grid[0] and codes.max(initial=0) <= grid[1]
    assert max(part.max() for part in sums(codes)) <= limit and within(codes, limit).all()
    start = np.trunc(project(np.clip(w / step, *grid), limit))
    assert (row_loss(w - step * codes, h) <= row_loss(w - step * start, h) * (1 + 1e-9) + 1e-12).all()


@examples(60)
@given(seed=st.integers(0, 9999), pieces=st.integers(2, 4), limit=st.integers(0, 400), size=st.integers(5, 17))
def test_bounds_hold_over_blocks_of_a_wide_layer(seed, pieces, limit, size):
    w, _, step, grid = problem(seed, 2, 3, size)
    width_of_piece = -(-size // pieces)
    h = problem(seed + 1, 2 * pieces, 1, width_of_piece)[1]
    assert within(bounded(w, h, step, grid, limit), limit).all()


@examples(40)
@given(seed=st.integers(0, 9999), bits=st.sampled_from([3, 4, 8]))
def test_a_limit_that_does_not_bind_is_descent_from_truncation(seed, bits):
    w, h, step, grid = problem(seed, 2, 3, 11, bits)
    plain = descent(w, h, step, grid, start=np.trunc(w / step))
    np.testing.assert_array_equal(bounded(w, h, step, grid, 11 * grid[1]), plain)


@examples(60)
@given(seed=st.integers(0, 9999), limit=st.integers(0, 9), size=st.integers(1, 5))
def test_without_correlations_no_codes_are_better(seed, limit, size):
    w, _, step, grid = problem(seed, 1, 1, size, 3)
    h = np.eye(size)[None]
    everything = np.array(
        [q for q in itertools.product(range(grid[0], grid[1] + 1), repeat=size) if within(np.array(q), limit)]
    )
    best = ((w[0] - step[0] * everything) ** 2).sum(axis=1).min()
    assert row_loss(w - step * bounded(w, h, step, grid, limit), h).item() == pytest.approx(best, rel=1e-9, abs=1e-12)


@examples(60)
@given(seed=st.integers(0, 9999), limit=st.integers(1, 200))
def test_descent_within_limits_never_raises_the_loss(seed, limit):
    w, h, step, grid = problem(seed, 2, 3, 10)
    codes = np.trunc(project(w / step, limit))
    limits = (np.full(w.shape[:2], float(limit)), np.full(w.shape[:2], float(limit)))
    for _ in range(4):
        made = descent(w, h, step, grid, start=codes, sweeps=1, limits=limits)
        assert within(made, limit).all()
        assert (row_loss(w - step * made, h) <= row_loss(w - step * codes, h) * (1 + 1e-9) + 1e-12).all()
        codes = made


def test_spending_pays_with_correlated_inputs():
    w, h, step, grid = problem(0, 1, 16, 64, 4)
    limit = 20
    start = np.trunc(project(w / step, limit))
    losses = [row_loss(w - step * q, h).sum() for q in (start, bounded(w, h, step, grid, limit))]
    assert losses[1] < 0.8 * losses[0]


def test_dead_inputs_get_no_codes_of_their_own():
    w, h, step, grid = problem(3, 1, 4, 8)
    h[:, 2], h[:, :, 2] = 0, 0
    assert within(bounded(w, h, step, grid, 30), 30).all()


# ---- the pass -------------------------------------------------------------------------------------------------------


def recipe(bits, weights=8, before=(), **more):
    return {"weights": {"bits": weights, **more}, "pass": [*before, {"use": "bound-accumulator", "bits": bits}]}


def told(result):
    return next(step["result"] for step in result.report["steps"] if step["pass"] == "bound-accumulator")


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-avx2", "openvino"])
@pytest.mark.parametrize(
    "name",
    ["cnn", "mobilenet", "grouped", "mlp", "transformer", "conv1d", "no_bias", "dead_channels", "odd_channels", "resnet20"],
)
def test_every_layer_fits(name, target):
    model = ZOO[name]()
    weights = 4 if target == "openvino" else 8
    result = quantize(model, recipe(14, weights), feeds(model, 4), target=target)
    audit = audit_model(result.model)
    found = [y for y in audit.layers if y.constant_weight and y.accumulator is not None]
    assert len(found) == sum(y.constant_weight for y in audit.layers) and max(y.accumulator for y in found) <= 14
    seen = told(result)
    assert not seen["left_alone"] and seen["fit"] + len(seen["bounded"]) == len(found)
    assert all(y["before"] > 14 >= y["after"] and y["outputs"] for y in seen["bounded"].values())
    assert all(np.isfinite(y).all() for feed in feeds(model, 2) for y in run(result.model, feed))
    assert json.loads(json.dumps(result.report)) == result.report


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "mlp"])
def test_what_fits_is_left_as_it_is(name):
    model, data = ZOO[name](), feeds(ZOO[name](), 4)
    plain = quantize(model, {"pass": []}, data)
    free = quantize(model, recipe(32), data)
    assert not told(free)["bounded"]
    for tensor, spec in plain.plan.items():
        if spec.codes is not None:
            np.testing.assert_array_equal(free.plan[tensor].codes, spec.codes)
            assert free.plan[tensor].shift is None
    need = max(y.accumulator for y in audit_model(plain.model).layers)
    tight = quantize(model, recipe(need - 1), data)
    for tensor, spec in tight.plan.items():
        assert np.array_equal(spec.scale, plain.plan[tensor].scale)
    changed = told(tight)["bounded"]
    assert changed and all(y["outputs"] > 0 and y["before"] == need for y in changed.values())


def test_outputs_that_fit_keep_learned_codes_and_shifts():
    model = mlp()
    before = [{"use": "ranges"}, {"use": "round", "method": "gptq"}]
    learned = quantize(model, {"pass": before}, feeds(model, 8))
    need = max(y.accumulator for y in audit_model(learned.model).layers)
    made = quantize(model, recipe(need - 1, before=before), feeds(model, 8))
    kept = changed = 0
    for name, spec in learned.plan.items():
        if spec.codes is not None:
            axis = 1 - int(np.argmax(np.array(spec.scale.shape) > 1))
            same = (made.plan[name].codes == spec.codes).all(axis=axis)
            np.testing.assert_array_equal(made.plan[name].shift[same], spec.shift[same])
            kept, changed = kept + int(same.sum()), changed + int((~same).sum())
    assert kept and changed == sum(y["outputs"] for y in told(made)["bounded"].values())


def test_the_bias_takes_the_mean_error():
    net = Net(["N", 16])
    x = net.op("Relu", net.gemm("x", 16, 24))
    model = net.model(net.gemm(x, 24, 8))
    data = feeds(model, 64)
    result = quantize(model, recipe(15), data)
    assert len(told(result)["bounded"]) == 2
    outputs = [runtimes.outputs(runtimes.session(m), data)[0] for m in (model, result.model)]
    bias = np.abs(np.mean(outputs[0] - outputs[1], axis=0)).max()
    assert bias < 0.15 * np.abs(outputs[0] - outputs[1]).mean()  # what the layer before adds is left


def test_what_it_costs_is_told():
    model = cnn()
    found = [told(quantize(model, recipe(bits, 4), feeds(model, 16)))["bounded"] for bits in (15, 13)]
    assert all(
        found[1][name]["loss_relative_to_nearest"] >= y["loss_relative_to_nearest"] >= 1 for name, y in found[0].items()
    )


def test_without_data_the_weights_count():
    @dataclass(frozen=True)
    class Fixed(Pass):
        name = "test.fixed"

        def apply(self, job):
            job.plan |= {n: from_range(-3.0, 3.0, s) for n, s in job.plan.items() if not job.graph.is_constant(n)}

    class Plugin:
        @hookimpl
        def onnxq_passes(self):
            return [Fixed]

    result = quantize(mlp(), recipe(14, before=[{"use": "test.fixed"}]), None, plugins=[Plugin()])
    assert len(told(result)["bounded"]) == 3
    assert {y.accumulator for y in audit_model(result.model).layers} == {14}
    assert all(spec.shift is None for spec in result.plan.values())


def test_white_inputs_inputs_are_blocks_of_the_identity():
    layer = load(mlp()).layers[1]
    assert white_inputs(layer, 4608).h.shape == (1, 24, 24)
    assert white_inputs(layer, 16).h.shape == (6, 4, 4) and white_inputs(layer, 16).mean.shape == (6, 4)


def test_multipliers_and_float_layers_are_left_and_told():
    model = mobilenet()
    result = quantize(model, recipe(15, 4, sub_block=2), feeds(model, 4))
    left = told(result)["left_alone"]
    assert left and all("multipliers" in why for why in left.values())
    assert any("multipliers" in note and f"left {len(left)} layers" in note for note in result.report["notes"])
    wide = {y.name for y in audit_model(result.model).layers if y.accumulator > 15}
    assert wide == set(left)
    stored = quantize(model, recipe(15), feeds(model, 4), target="storage")
    assert len(told(stored)["left_alone"]) == 8 and any("in float" in note for note in stored.report["notes"])
    only = quantize(mlp(), {**recipe(15, block=16), "activations": {"bits": 32}}, None)
    assert all("float inputs" in why for why in told(only)["left_alone"].values()) and told(only)["left_alone"]


@pytest.mark.parametrize("field", [{"bits": 8}, {"bits": 33}, {"positions": 0}, {"limit": 1}])
def test_senseless_settings_are_refused(field):
    with pytest.raises(OnnxqError, match=next(iter(field))):
        quantize(cnn(), {"pass": [{"use": "bound-accumulator", **field}]}, feeds(cnn(), 2))


# ---- the audit ------------------------------------------------------------------------------------------------------


def hand_made(op, codes, attributes=None, shape=(1, 4), kind=np.uint8, chain=None, opset=21):
    """Q -> DQ -> layer with given weight codes; `chain` makes more operators in front of the weight's DQ."""
    scale, zero = np.float32(0.1), kind(0)
    tensors = {"s": scale, "z": zero, "zw": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
    ]
    stored = [numpy_helper.from_array(codes, "codes")]
    name = "codes"
    if chain is not None:
        made, extra, name = chain
        nodes, stored = [*made, *nodes], stored + extra
    nodes += [
        helper.make_node("DequantizeLinear", [name, "s", "zw"], ["w"]),
        helper.make_node(op, ["xd", "w"], ["y"], name="layer", **(attributes or {})),
    ]
    stored += [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


ROWS = np.array([[1, -2, 3, 4], [100, -100, 100, -100]], np.int8)  # 8 * 255 and 200 * 255 = 51000: 17 bits


@pytest.mark.parametrize(
    ("op", "codes", "attributes", "shape"),
    [
        ("Gemm", ROWS, {"transB": 1}, (1, 4)),
        ("Gemm", ROWS.T.copy(), {}, (1, 4)),
        ("MatMul", ROWS.T.copy(), {}, (1, 4)),
        ("MatMul", ROWS.T.copy()[None], {}, (1, 1, 4)),
        ("Conv", ROWS.reshape(2, 1, 2, 2), {}, (1, 1, 3, 3)),
        ("Conv", ROWS.reshape(2, 4, 1, 1), {}, (1, 4, 3, 3)),
        ("Conv", np.concatenate([ROWS, ROWS]).reshape(4, 2, 2, 1), {"group": 2}, (1, 4, 3, 3)),
        ("Conv", ROWS.reshape(2, 1, 2, 2), {"group": 2}, (1, 2, 3, 3)),
    ],
)
def test_layouts(op, codes, attributes, shape):
    found = needs(hand_made(op, codes, attributes, shape))["y"]
    assert (found.bits, found.saturates) == (17, True)
    (audit,) = audit_model(hand_made(op, codes, attributes, shape)).layers
    assert (audit.accumulator, audit.saturates) == (17, True)
    small = needs(hand_made(op, np.clip(codes, -4, 4), attributes, shape))["y"]
    assert (small.bits, small.saturates) == (1 + (255 * 8).bit_length(), False)


def test_signed_inputs_reach_further_down():
    assert needs(hand_made("Gemm", np.full((1, 4), -128, np.int8), {"transB": 1}, kind=np.int8))["y"].bits == 18
    assert needs(hand_made("Gemm", np.full((1, 4), 127, np.int8), {"transB": 1}, kind=np.int8))["y"].bits == 17
    assert "y" not in needs(hand_made("Gemm", ROWS, {"transB": 1}, kind=np.uint16))


def test_chains_are_computed():
    codes = np.array([[1, -2, 3, 4], [7, -7, 7, -7]]).astype(ml_dtypes.int4)
    cast = ([helper.make_node("Cast", ["codes"], ["c"], to=TensorProto.INT8)], [], "c")
    assert needs(hand_made("Gemm", codes, {"transB": 1}, chain=cast))["y"].bits == 1 + (14 * 255).bit_length()
    product = (
        [
            helper.make_node("Cast", ["codes"], ["a"], to=TensorProto.INT32),
            helper.make_node("Cast", ["factor"], ["b"], to=TensorProto.INT32),
            helper.make_node("Mul", ["a", "b"], ["m"]),
            helper.make_node("Reshape", ["m", "shape"], ["r"]),
            helper.make_node("Cast", ["r"], ["c"], to=TensorProto.INT8),
        ],
        [
            numpy_helper.from_array(np.array([[15], [15]]).astype(ml_dtypes.uint4), "factor"),
            numpy_helper.from_array(np.array([2, 4]), "shape"),
        ],
        "c",
    )
    found = needs(hand_made("Gemm", codes, {"transB": 1}, chain=product))["y"]
    assert found.bits == 1 + (15 * 14 * 255).bit_length() and found.saturates
    rounded = ([helper.make_node("QuantizeLinear", ["codes", "s", "zw"], ["c"])], [], "c")
    floats = (ROWS * np.float32(0.1)).astype(np.float32)
    assert needs(hand_made("Gemm", floats, {"transB": 1}, chain=rounded))["y"].bits == 17


def test_what_is_no_integer_layer_has_no_accumulator():
    model = cnn()
    assert all(y.accumulator is None and not y.saturates for y in audit_model(model).layers)
    assert audit_model(model).accumulators() == "" and Audit((), {}).accumulators() == ""
    only = quantize(mlp(), {"weights": {"bits": 4, "block": 16}, "activations": {"bits": 32}}, None)
    assert all(y.accumulator is None for y in audit_model(only.model).layers)
    model = conv_transpose()
    made = {y.op: y.accumulator for y in audit_model(quantize(model, "int8", feeds(model, 2)).model).layers}
    assert made["ConvTranspose"] is None and made["Conv"] is not None


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "mlp", "transformer", "resnet20"])
def test_the_target_without_vnni_never_saturates(name):
    model = ZOO[name]()
    plain = audit_model(quantize(model, "int8", feeds(model, 2)).model)
    assert any(y.saturates for y in plain.layers)
    assert "target ort-cpu-avx2 avoids that" in plain.accumulators()
    safe = audit_model(quantize(model, "int8", feeds(model, 2), target="ort-cpu-avx2").model)
    assert not any(y.saturates for y in safe.layers) and safe.accumulators().endswith("never saturate")


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"bits": 4, "sub_block": 2}, {"bits": 3, "sub_block": [4, 4]}])
def test_the_audit_agrees_with_the_plan(settings):
    model = grouped()
    result = quantize(model, {"weights": settings, "pass": []}, feeds(model, 2))
    layers = {y.name: y for y in load(model).layers}
    for row in audit_model(result.model).layers:
        layer = layers[row.name]
        codes = layer.matrix(int8_codes(layer, result.plan[layer.weight]))
        assert row.accumulator == width(codes).max() and row.saturates == saturates(codes).any()


def test_the_command_shows_widths(tmp_path):
    model = cnn()
    result = quantize(model, "int8", feeds(model, 2), output=tmp_path / "m.onnx")
    ran = CliRunner().invoke(app, ["audit", str(tmp_path / "m.onnx")])
    assert ran.exit_code == 0 and "accumulator" in ran.output
    audit = audit_model(result.model)
    assert all(f"{y.accumulator} bits" in ran.output for y in audit.layers) and audit.accumulators() in ran.output


def test_openvino_tells_the_same(tmp_path):
    pytest.importorskip("openvino")
    model = cnn()
    result = quantize(model, "int8", feeds(model, 2), output=tmp_path / "m.onnx", target="openvino")
    expected = {y.name: (y.accumulator, y.saturates) for y in audit_model(result.model).layers}
    assert {y.name: (y.accumulator, y.saturates) for y in audit_openvino(tmp_path / "m.onnx").layers} == expected


def test_a_plan_with_codes_that_saturate_is_refused():
    """Whoever plans 8 bits for a target that runs codes up to 64 is told, unless the codes stay within."""

    @dataclass(frozen=True)
    class Widen(Pass):
        name: ClassVar[str] = "acme.widen"
        top: int = 0

        def apply(self, job):
            layer = job.graph.layers[0]
            spec = replace(job.plan[layer.weight].request(), bits=8)
            if self.top:
                spec = solve_minmax(job.graph.constant(layer.weight), replace(spec, bits=7))
                codes = np.clip(encode(job.graph.constant(layer.weight), spec), -self.top, self.top)
                spec = replace(spec, bits=8, codes=codes)
            job.plan |= {layer.weight: spec}

    class Vendor:
        @hookimpl
        def onnxq_passes(self):
            return [Widen]

    def run(**step):
        return quantize(
            cnn(),
            {"target": "ort-cpu-avx2", "pass": [{"use": "acme.widen", **step}]},
            feeds(cnn(), 4),
            plugins=[Vendor()],
            workers=1,
        )

    with pytest.raises(OnnxqError, match=r"8-bit codes up to 127, target 'ort-cpu-avx2' runs codes up to 64.*plan 7 bits\."):
        run()
    assert run(top=63).plan
