"""Widths without a search: coding length and orthogonality."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, audit_model, load, quantize
from onnxq_plugins.solvers.coding_length import coding_length, widths_of
from onnxq_plugins.solvers.orthogonality import importance, likeness
from tests.zoo import ZOO, cnn, examples, feeds, inception, kinds, mlp, mobilenet, slowly, transformer

PASSES = ("coding-length", "orthogonality")


def orthogonal(n, rng):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@examples(60)
def test_coding_length_does_not_see_turns_and_order_and_falls_with_the_distortion(n, m, seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(2, n, m))
    length = coding_length(w, 0.01)
    assert coding_length(w @ orthogonal(m, rng), 0.01) == pytest.approx(length, rel=1e-9)
    assert coding_length(orthogonal(n, rng) @ w, 0.01) == pytest.approx(length, rel=1e-9)
    assert coding_length(w[:, rng.permutation(n)][:, :, rng.permutation(m)], 0.01) == pytest.approx(length, rel=1e-9)
    assert coding_length(w, 0.02) < length < coding_length(2 * w, 0.01)
    assert coding_length(0 * w, 0.01) == 0
    assert coding_length(np.concatenate([w, w]), 0.01) == pytest.approx(2 * length)


def test_coding_length_is_the_determinant():
    w = np.random.default_rng(0).normal(size=(1, 3, 7))
    n, m, distortion = 3, 7, 0.05
    sign, logarithm = np.linalg.slogdet(np.eye(n) + n / (m * distortion) * w[0] @ w[0].T)
    assert sign == 1 and coding_length(w, distortion) == pytest.approx((m + n) / 2 * logarithm / np.log(2))


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.floats(0.3, 1.2),
)
@examples(100)
def test_levels_fit_the_budget_and_leave_no_room_for_one_more(items, levels, share):
    score = np.array([s for s, _ in items])
    cost = np.array([[size * (2 + 2 * k) for k in range(levels)] for _, size in items], float)
    limit = share * cost[:, -1].sum()
    found = widths_of(score, cost, limit)
    if found is None:
        assert cost[:, 0].sum() > limit
        return
    spent = cost[np.arange(len(found)), found]
    assert spent.sum() <= limit
    for i, level in enumerate(found):
        assert level == levels - 1 or spent.sum() - spent[i] + cost[i, level + 1] > limit


def test_longer_codes_get_more_bits():
    score, cost = np.array([1.0, 1.1, 5.0, 5.2, 9.0]), np.tile([4.0, 6.0, 8.0], (5, 1))
    assert widths_of(score, cost, 28.0) == [0, 0, 1, 1, 2]


@given(st.integers(2, 6), st.integers(0, 2**31))
@examples(60)
def test_likeness_is_symmetric_and_does_not_see_turns_and_scales(count, seed):
    rng = np.random.default_rng(seed)
    features = [rng.normal(size=(9, int(rng.integers(3, 20)))) for _ in range(count)]
    found = likeness(features)
    assert np.allclose(found, found.T) and np.allclose(np.diag(found), 1) and found.min() >= 0 and found.max() <= 1
    turned = [7 * f @ orthogonal(f.shape[1], rng) + 3 for f in features]
    assert np.allclose(likeness(turned), found)


def test_a_layer_said_twice_counts_less():
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=(30, 50)) for _ in range(3))
    weight = importance(likeness([a, b, c, c]), 10.0)
    assert importance(likeness([a, b, c]), 10.0)[2] > weight[2]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("build", [mobilenet, mlp, transformer, *slowly(cnn, inception)])
def test_plans_within_the_budget_run(build, name):
    model = build()
    result = quantize(model, {"pass": [{"use": name, "limit": 0.7}, {"use": "ranges"}]}, feeds(model, 6), workers=1)
    graph = load(model)
    sizes = {y.name: float(np.prod(y.shape)) for y in graph.layers if y.weight in result.plan}
    bits = {y.name: result.plan[y.weight].bits for y in graph.layers if y.weight in result.plan}
    assert sum(sizes[n] * bits[n] for n in sizes) <= 0.7 * 8 * sum(sizes.values()) and len(set(bits.values())) > 1
    report = result.report["steps"][0]["result"]
    json.dumps(report)
    assert set(report["widths"].values()) <= {"W4A8", "W6A8", "W8A8"}
    assert audit_model(result.model).counts() == audit_model(quantize(model, {}, feeds(model, 6), workers=1).model).counts()


@pytest.mark.parametrize("name", PASSES)
def test_budgets_and_pins(name):
    model = cnn()
    last = load(model).layers[-1]
    rules = [{"position": "last", "weights": {"bits": 8}}]
    result = quantize(model, {"pass": [{"use": name, "limit": 0.8}], "layer": rules}, feeds(model, 6), workers=1)
    assert result.plan[last.weight].bits == 8
    with pytest.raises(OnnxqError, match=r"cannot fall to 0\.1"):
        quantize(model, {"pass": [{"use": name, "limit": 0.1}]}, feeds(model, 6), workers=1)
    bops = quantize(model, {"pass": [{"use": name, "budget": "bops", "limit": 0.6}]}, feeds(model, 6), workers=1)
    assert any(spec.bits < 8 for key, spec in bops.plan.items() if load(model).is_constant(key))


def test_who_needs_data():
    model = mlp()
    with pytest.raises(OnnxqError, match="orthogonality compares outputs"):
        quantize(model, {"pass": [{"use": "orthogonality"}]})
    steps = [{"use": "coding-length", "limit": 0.7}, {"use": "data-free", "inputs": {"x": [-3, 3]}}]
    without = quantize(model, {"pass": steps})
    given_data = quantize(model, {"pass": steps[:1]}, feeds(model, 4))
    graph = load(model)
    assert [without.plan[y.weight].bits for y in graph.layers] == [given_data.plan[y.weight].bits for y in graph.layers]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("network", kinds(ZOO, "no_layer", "control_flow"))
def test_any_network_comes_through(network, name):
    model = ZOO[network]()
    quantize(model, {"pass": [{"use": name, "limit": 1.0}]}, feeds(model, 3), workers=1)
