"""Quantization arithmetic against naive loops and onnxruntime."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.spec import (
    Plan,
    QuantSpec,
    block_shape,
    decode,
    encode,
    expand,
    fake,
    from_range,
    reduce_blocks,
    solve_minmax,
    step,
)
from tests.zoo import examples

few = examples(60)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def shapes_and_blocks(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    sizes = st.tuples(*(st.integers(0, n + 2) for n in shape))  # blocks that do not divide the axis, or exceed it
    return shape, draw(st.none() | sizes)


def entry(index, block):
    """Which block an element belongs to."""
    return () if block is None else tuple(i // b if b else 0 for i, b in zip(index, block, strict=True))


def values(seed, shape):
    """Magnitudes over many decades, with zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 4, shape)
    return np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)


@few
@given(shapes_and_blocks(), seeds)
def test_blocks_equal_naive_loops(case, seed):
    shape, block = case
    x = values(seed, shape)
    found = reduce_blocks(x, block, np.maximum)
    assert found.shape == block_shape(shape, block)
    naive = np.full(found.shape, -np.inf, np.float32)
    for index in np.ndindex(shape):
        naive[entry(index, block)] = max(naive[entry(index, block)], x[index])
    np.testing.assert_array_equal(found, naive)
    spread = np.broadcast_to(expand(found, shape, block), shape)
    assert all(spread[index] == naive[entry(index, block)] for index in np.ndindex(shape))


def test_block_of_the_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="2 axes"):
        block_shape((4, 3, 3), (1, 0))


@pytest.mark.parametrize(
    "block, shape",
    [(None, ()), ((1, 0, 0, 0), (64, 1, 1, 1)), ((16, 16, 0, 0), (4, 2, 1, 1)), ((48, 24, 2, 2), (2, 2, 2, 2))],
)
def test_block_shapes_of_the_documentation(block, shape):
    assert block_shape((64, 32, 3, 3), block) == shape


@few
@given(shapes_and_blocks(), seeds, st.integers(2, 9), st.booleans(), st.booleans(), st.booleans())
def test_minmax_grid_covers_all_values(case, seed, bits, symmetric, pow2, full):
    shape, block = case
    x = values(seed, shape)
    spec = solve_minmax(x, QuantSpec(bits, symmetric, block, pow2=pow2, full=full))
    assert spec.scale.shape == spec.zero_point.shape == block_shape(shape, block)
    assert spec.scale.dtype == np.float32
    codes, size = encode(x, spec), step(spec, shape)
    assert codes.min() >= spec.grid[0] and codes.max() <= spec.grid[1]
    assert np.all(np.abs(decode(codes, spec) - x) <= size * 0.5001)


@few
@given(shapes_and_blocks(), seeds, st.data())
def test_refining_a_block_never_increases_the_bound(case, seed, data):
    shape, block = case
    finer = tuple(
        data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        for n in ([b or n for n, b in zip(shape, block, strict=True)] if block else shape)
    )
    x = values(seed, shape)
    x[x == 0] = 1e-3  # a block of zeros gets scale 1
    coarse, fine = (step(solve_minmax(x, QuantSpec(4, block=b)), shape) for b in (block, finer))
    assert np.all(fine <= coarse)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_a_full_grid_has_one_more_code(bits):
    narrow, full = (QuantSpec(bits, full=full) for full in (False, True))
    assert full.grid == (narrow.grid[0] - 1, narrow.grid[1]) and full.top == narrow.top + 1
    x = np.array([-full.top, narrow.top], np.float32)
    assert np.array_equal(encode(x, solve_minmax(x, full)), x)  # both ends are codes
    assert solve_minmax(-x, full).scale == full.top / narrow.top  # the positive end reaches less far
    assert QuantSpec(8, full=True).grid == QuantSpec(8).grid == (-127, 127)


def test_per_channel_and_per_tensor_by_hand():
    x = np.random.default_rng(0).normal(size=(6, 5, 3, 3)).astype(np.float32)
    channel = solve_minmax(x, QuantSpec(block=(1, 0, 0, 0)))
    tensor = solve_minmax(x, QuantSpec())
    for c in range(6):
        scale = np.abs(x[c]).max() / np.float32(127)
        assert channel.scale[c, 0, 0, 0] == scale
        np.testing.assert_array_equal(encode(x, channel)[c], np.rint(x[c] / scale))
    assert tensor.scale == np.abs(x).max() / np.float32(127)
    assert channel.describe() == "int8 per channel" and tensor.describe() == "int8 per tensor"


def qdq(x, scale, zero):
    """Codes and values as onnxruntime computes them."""
    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in (("s", np.float32(scale)), ("z", zero))]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(zero).dtype)
    outputs = [helper.make_tensor_value_info("q", kind, [None]), helper.make_tensor_value_info("y", 1, [None])]
    graph = helper.make_graph(
        nodes, "qdq", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])], outputs, constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return runtimes.session(model, optimize=False).run(None, {"x": x})


@examples(25)
@given(seeds, st.booleans(), st.sampled_from([0.0, 0.3, 1.0]))
def test_codes_equal_onnxruntime(seed, symmetric, negative):
    x = np.random.default_rng(seed).normal(size=4000).astype(np.float32)
    x = np.where(x < 0, x * np.float32(negative), x)
    spec = solve_minmax(x, QuantSpec(symmetric=symmetric))
    zero = spec.zero_point.astype(np.int8 if symmetric else np.uint8)
    codes, back = qdq(x, spec.scale, zero)
    np.testing.assert_array_equal(encode(x, spec), codes)
    np.testing.assert_array_equal(decode(encode(x, spec), spec), back)
    np.testing.assert_array_equal(fake(x, spec), back)


@pytest.mark.parametrize("symmetric, zero", [(True, 0), (False, 0), (False, 77), (False, 128)])
def test_ties_round_half_to_even_as_in_onnxruntime(symmetric, zero):
    spec = QuantSpec(symmetric=symmetric, scale=np.float32(0.25), zero_point=np.int64(zero))
    low, high = spec.grid
    x = (np.arange(low - zero, high - zero, dtype=np.float32) + np.float32(0.5)) * np.float32(0.25)
    codes, back = qdq(x, 0.25, np.asarray(zero, np.int8 if symmetric else np.uint8))
    np.testing.assert_array_equal(encode(x, spec), codes)
    np.testing.assert_array_equal(decode(encode(x, spec), spec), back)


@few
@given(st.floats(-1e5, 1e5, width=32), st.floats(-1e5, 1e5, width=32), st.integers(2, 16), st.booleans())
def test_affine_range_holds_zero_exactly(a, b, bits, pow2):
    spec = from_range(min(a, b), max(a, b), QuantSpec(bits, symmetric=False, pow2=pow2))
    assert 0 <= spec.zero_point <= 2**bits - 1
    assert fake(np.zeros(3, np.float32), spec).tolist() == [0, 0, 0]
    bottom, top = decode(np.array([0, 2**bits - 1]), spec)
    assert bottom <= min(a, b) + spec.scale * 0.501 and top >= max(a, b) - spec.scale * 0.501


@examples(300)
@given(st.floats(1e-20, 1e20), st.integers(2, 8))
def test_top_of_grid_stays_below_high(high, bits):
    spec = from_range(0.0, high, QuantSpec(bits, symmetric=False))
    top = np.float32(2**bits - 1)
    assert spec.scale * top <= np.float32(high) and float(spec.scale) * float(top) <= high
    assert float(spec.scale) * float(top) >= high * (1 - 1e-6)


@few
@given(seeds, st.integers(2, 8), st.booleans())
def test_pow2_scales(seed, bits, symmetric):
    x = values(seed, (5, 6))
    asked = QuantSpec(bits, symmetric, (1, 0))
    free, pow2 = solve_minmax(x, asked).scale, solve_minmax(x, replace(asked, pow2=True)).scale
    assert np.all(np.frexp(pow2)[0] == 0.5)
    assert np.all(pow2 >= free * 0.999999) and np.all(pow2 < free * 2.000001)


def test_pow2_with_sub_block_leaves_the_scale_free():
    x = np.array([[0.3, -0.7]], np.float32)
    spec = solve_minmax(x, QuantSpec(4, block=(1, 0), sub_block=(1, 1), pow2=True))
    assert spec.scale.item() == np.float32(np.float32(0.7) / np.float32(7) / 8)  # 8 = the largest power below 15
    assert spec.multiplier.tolist() == [[4, 8]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [None, (1, 0), (2, 3)])
def test_dead_tensors(symmetric, block):
    x = np.zeros((4, 6), np.float32)
    spec = solve_minmax(x, QuantSpec(symmetric=symmetric, block=block))
    assert np.all(spec.scale == 1) and not encode(x, spec).any() and not fake(x, spec).any()


def test_step_is_scale_times_multiplier():
    rng = np.random.default_rng(0)
    shape, block, sub_block = (5, 7), (1, 0), (1, 3)
    spec = QuantSpec(
        4,
        block=block,
        sub_block=sub_block,
        scale=rng.random((5, 1), np.float32),
        multiplier=rng.integers(1, 17, block_shape(shape, sub_block)),
    )
    size = step(spec, shape)
    for i, j in np.ndindex(shape):
        assert size[i, j] == pytest.approx(spec.scale[i, 0] * spec.multiplier[i, j // 3], rel=1e-6)
    codes = rng.integers(-7, 8, shape)
    np.testing.assert_array_equal(encode(decode(codes, spec), spec), codes)


def test_fake_uses_codes_that_are_given():
    spec = QuantSpec(codes=np.array([3, -2]), scale=np.float32(0.5))
    assert fake(np.array([1.0, 1.0], np.float32), spec).tolist() == [1.5, -1.0]


def test_spec_is_frozen_and_forgets_its_solution():
    spec = solve_minmax(np.ones(3, np.float32), QuantSpec(4, block=(1,)))
    with pytest.raises(FrozenInstanceError):
        spec.bits = 3
    asked = spec.request()
    assert spec.solved and not asked.solved and asked.zero_point is None and asked.codes is None
    assert asked.to_dict() == spec.to_dict() == {"bits": 4, "block": (1,)}


def test_plan_is_a_value():
    source = {"a": QuantSpec(8), "b": QuantSpec(4)}
    plan = Plan(source)
    source.clear()
    with pytest.raises(TypeError):
        plan["a"] = QuantSpec(2)
    with pytest.raises(TypeError):
        del plan["a"]
    more = plan | {"b": QuantSpec(2), "c": QuantSpec(3)}
    assert {name: spec.bits for name, spec in more.items()} == {"a": 8, "b": 2, "c": 3}
    fewer = more.without("a", "c", "unknown")
    assert isinstance(more, Plan) and isinstance(fewer, Plan) and list(fewer) == ["b"]
    assert {name: spec.bits for name, spec in plan.items()} == {"a": 8, "b": 4} and len(plan) == 2
