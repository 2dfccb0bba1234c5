"""A head whose channels differ in range gets a grid for each kind, exactly and in integer kernels; nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import audit_model, quantize
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.measure import sqnr
from onnxq_plugins.solvers.grids import runs, split_channels
from onnxq_plugins.spec import QuantSpec
from tests.zoo import Net, feeds, run

BOX, SCORE, POINT = (300.0, 100.0), (-2.0, 1.0), (0.0, 8.0)  # mean and size of a channel
LAYOUTS = {
    "boxes, scores": [BOX] * 4 + [SCORE] * 6,
    "score, boxes, scores": [SCORE] + [BOX] * 4 + [SCORE] * 3,
    "three kinds": [BOX] * 4 + [POINT] * 6 + [(-0.1, 0.05)] * 2,
    "anchors": ([BOX] * 4 + [SCORE] * 2) * 3,
}
GRID = QuantSpec(symmetric=False)


def head(kinds, depthwise=False, more=None):
    """A convolution whose channels are of these kinds, its values moved about, and one output for each kind."""
    net = Net(["N", 3, 8, 8])
    mean, size = np.array(kinds).T
    features = len(kinds) if depthwise else 16
    x = net.op("Relu", net.conv("x", 3, features))
    weight = net.rng.normal(size=(len(kinds), features // (features if depthwise else 1), 1, 1))
    weight *= size[:, None, None, None] / np.sqrt(weight.shape[1])
    y = net.op("Conv", x, net.constant(weight), net.constant(mean), group=features if depthwise else 1)
    if more is not None:
        return net.model(*more(net, y))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 3, 1]), net.constant([0, -1, len(kinds)], np.int64))
    places = [[n for n, kind in enumerate(kinds) if kind == one] for one in dict.fromkeys(kinds)]
    return net.model(*(net.op("Gather", y, net.constant(at, np.int64), axis=2) for at in places))


def quality(model, result, samples):
    """SQNR of each output, of the model as it is written."""
    both = [[run(m, x, optimize=False) for x in samples] for m in (model, result.model)]
    return [sqnr(np.stack(a), np.stack(b)) for a, b in zip(*(zip(*one, strict=True) for one in both), strict=True)]


def recipe(*passes):
    return {"pass": [*({"use": use} for use in passes), {"use": "ranges"}]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_channel_keeps_its_values(layout):
    kinds = LAYOUTS[layout]
    model = head(kinds)
    samples, fresh = feeds(model, 8), feeds(model, 2, seed=1)
    plain, split = (quantize(model, recipe(*use), samples, verify=True, workers=1) for use in ((), ("split-heads",)))
    before, after = (quality(model, result, fresh) for result in (plain, split))
    assert min(before) < 15 and min(after) > 22, (before, after)
    assert all(b > a - 0.5 for a, b in zip(before, after, strict=True)), (before, after)
    audit = audit_model(split.model)
    parts = {"boxes, scores": 2, "anchors": 2}.get(layout, 3)
    assert audit.other["Concat"] == 1 and len(audit.layers) == 1 + parts and all(y.quantized for y in audit.layers)
    (rows,) = split.report.steps[0]["result"]["layers"].values()
    assert sum(row["channels"] for row in rows) == len(kinds) and all(row["sqnr_after"] > 25 for row in rows)
    for a, b in zip(run(split.model, fresh[0]), run(split.model, fresh[0], optimize=False), strict=True):
        assert sqnr(b, a) > 30


def test_a_depthwise_head():
    model = head(LAYOUTS["boxes, scores"], depthwise=True)
    result = quantize(model, recipe("split-heads"), feeds(model, 8), verify=True, workers=1)
    assert min(quality(model, result, feeds(model, 2, seed=1))) > 22
    assert len(audit_model(result.model).layers) == 3 and all(y.quantized for y in audit_model(result.model).layers)


def untouched():
    boxes = LAYOUTS["boxes, scores"]

    def chain(net, y):
        return [net.conv(y, len(boxes), 4)]

    def gemm(net, y):
        return [net.op("Softmax", net.head(y, len(boxes)))]

    yield "a convolution reads it", head(boxes, more=chain), {}
    yield "a Gemm follows", head(boxes, more=gemm), {}
    yield "one kind of channel", head([BOX] * 6), {}
    yield "a rule names it", head(boxes), {"layer": [{"match": "conv2", "weights": {"bits": 8}}]}


@pytest.mark.parametrize(("model", "more"), [pytest.param(*case, id=name) for name, *case in untouched()])
def test_others_stay_as_they_are_at_no_run_over_the_data(model, more, monkeypatch):
    count = []
    fold = Calibration._run
    monkeypatch.setattr(Calibration, "_run", lambda self, *args: count.append(1) or fold(self, *args))
    samples = feeds(model, 4)
    plain = quantize(model, {**recipe(), **more}, samples, workers=1)
    single = len(count)
    split = quantize(model, {**recipe("split-heads"), **more}, samples, workers=1)
    assert split.report.steps[0]["result"] == {"layers": {}}
    assert split.model.graph == plain.model.graph and len(count) == 2 * single


def test_channels_that_hardly_vary_count_nowhere():
    high = np.array([100.0, 90, 1e-3, 80, 0])
    assert len(split_channels(0 * high, high, GRID, 6, 25, 3)) == 1


def test_groups_hold_each_channel_once_and_runs_keep_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = 10 ** rng.uniform(-2, 2, rng.integers(1, 40))
        groups = split_channels(-size * rng.uniform(0, 1, size.shape), size, GRID, 6, 25, 3)
        assert len(groups) <= 3 and all((np.diff(group) > 0).all() for group in groups)
        for parts in (groups, runs(groups)):
            np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(size)))
        assert all((np.diff(run) == 1).all() for run in runs(groups))
