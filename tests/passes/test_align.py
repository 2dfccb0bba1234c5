"""Channels are filled up where that is faster by the table, and nobody sees it in the outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import load, quantize, runtimes
from onnxq_plugins.graph.align import align, alignable
from onnxq_plugins.runtimes import costs
from onnxq_plugins.runtimes.costs import Costs
from tests.zoo import Net, examples, feeds

CLASSES = {  # unaligned kernels take a hundred times as long
    ("Conv depthwise int", "Conv depthwise float"): 10.0,
    ("Conv depthwise unaligned int", "Conv depthwise plain float"): 1000.0,
    ("Add int", "Add float"): 0.0,
}
SLOW = {kind: (1.0, each, *(0.0,) * 6) for kinds, each in CLASSES.items() for kind in kinds}


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(
        costs, "tables", lambda: {"avx512-vnni": Costs("avx512-vnni", "", SLOW), "amx": Costs("amx", "", SLOW)}
    )


def inverted(net, x, channels, wide, gate=False, act="Relu", residual=True):
    """An inverted residual block, perhaps with squeeze and excite."""
    y = net.op(act, net.conv(x, channels, wide, 1))
    y = net.op(act, net.conv(y, wide, wide, groups=wide))
    if gate:
        s = net.op("Relu", net.conv(net.op("GlobalAveragePool", y), wide, 8, 1))
        y = net.op("Mul", y, net.op("HardSigmoid", net.conv(s, 8, wide, 1)))
    y = net.conv(y, wide, channels, 1)
    return net.op("Add", x, y) if residual else y


def network(wide=13, size=10, **options):
    net = Net([1, 3, size, size])
    x = net.op("Relu", net.conv("x", 3, 16))
    for _ in range(2):
        x = inverted(net, x, 16, wide, **options)
    return net.model(net.head(x, 16))


def same(model, other, count=2):
    for feed in feeds(model, count, seed=1):
        y, z = (runtimes.session(m).run(None, dict(feed))[0] for m in (model, other))
        np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


@given(st.integers(2, 40), st.booleans(), st.sampled_from(["Relu", "HardSwish", "Sigmoid", "PRelu"]), st.booleans())
@examples(12)
def test_the_function_stays(wide, gate, act, residual):
    if act == "PRelu":
        act = "LeakyRelu"
    model = network(wide, gate=gate, act=act, residual=residual)
    graph = load(model)
    groups = alignable(graph, 16)
    assert len(groups) == (2 if wide % 16 else 0)
    for group in groups:
        align(graph, group, 16)
    assert all(y.channels % 16 == 0 for y in graph.layers if y.kind == "depthwise")
    same(model, graph.model())
    assert not alignable(graph, 16)


def test_a_pass_fills_blocks_where_that_is_faster(slow):
    model = network(13, gate=True, act="HardSwish")
    result = quantize(model, {"pass": [{"use": "align"}, {"use": "ranges"}]}, feeds(model, 4), workers=1, verify=True)
    assert [y.channels for y in result.graph.layers if y.kind == "depthwise"] == [16, 16]
    groups = result.report.steps[0]["result"]["groups"]
    assert [(row["channels"], row["added"]) for row in groups] == [(13, 3)] * 2
    assert any("filled up to multiples of 16" in note for note in result.report.notes)
    for feed in feeds(model, 2, seed=1):
        y, z = (runtimes.session(m).run(None, dict(feed))[0] for m in (model, result.model))
        assert np.square(y - z).sum() < 1e-2 * np.square(y).sum()


def test_nothing_changes_where_bytes_or_times_say_no(slow):
    def depthwise(model, **options):
        steps = [{"use": "align", **options}, {"use": "ranges"}]
        result = quantize(model, {"pass": steps, "target": target}, feeds(model, 2), workers=1)
        return {y.channels for y in result.graph.layers if y.kind == "depthwise"}

    target = "ort-cpu"
    assert depthwise(network(13), gain=0.99) == {13}
    assert depthwise(network(32)) == {32}
    target = "openvino"
    assert depthwise(network(13)) == {13}


def test_channels_that_something_mixes_are_left_alone():
    def groups(*middle):
        net = Net([1, 3, 10, 10])
        x = net.op("Relu", net.conv("x", 3, 13))
        x = net.conv(x, 13, 13, groups=13)
        for op, attrs in middle:
            x = net.op(op, x, **attrs)
        return alignable(load(net.model(net.head(net.conv(x, 13, 16), 16))), 16)

    assert groups() and groups(("Relu", {}))
    assert not groups(("Softmax", {"axis": 1})) and not groups(("LRN", {"size": 3}))

    net = Net([1, 3, 10, 10])
    x = net.op("Relu", net.conv("x", 3, 13))
    y = net.conv(x, 13, 13, groups=13)
    both = net.op("Concat", x, y, axis=1)
    assert not alignable(load(net.model(net.head(net.conv(both, 26, 16), 16))), 16)
    net = Net([1, 13, 10, 10])  # the model's input
    assert not alignable(load(net.model(net.head(net.conv("x", 13, 13, groups=13), 13))), 16)
