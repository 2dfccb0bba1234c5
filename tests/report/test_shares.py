"""Shares of the noise: they add up, and say what each quantizer does to the whole."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from onnxq_plugins.measure.arrays import errors
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.report.diagnosis import diagnose
from onnxq_plugins.report.shares import Player, players, shares
from onnxq_plugins.search.subsets import Measured, Subsets
from tests.zoo import Net, feeds, inception, mobilenet, resnet20, transformer

RNG = np.random.default_rng(0)


class Sums:
    """Quantizers whose errors add up: a vector each."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.made, self.noise = vectors, 0, 1.0

    def measured(self, sets, what="", track=None):
        self.made += len(sets)
        whole = self.vectors.sum(axis=0)
        found = [self.vectors[[int(name) for name in names]].sum(axis=0) for names in sets]
        return [Measured(e @ e / (whole @ whole), e @ whole / (whole @ whole)) for e in found]


def parts(count: int) -> list[Player]:
    return [Player("layer", str(n), (str(n),), n) for n in range(count)]


def shapley(vectors: np.ndarray) -> np.ndarray:
    """The mean over all orders of what each adds to the squared length of the sum."""
    values, orders = np.zeros(len(vectors)), list(permutations(range(len(vectors))))
    for order in orders:
        lengths = np.square(np.cumsum(vectors[list(order)], axis=0)).sum(axis=1)
        values[list(order)] += np.diff(lengths, prepend=0)
    return values / len(orders) / np.square(vectors.sum(axis=0)).sum()


def test_where_errors_add_up_a_share_is_the_shapley_value():
    vectors = RNG.standard_normal((6, 5))
    found = shares(Sums(vectors), parts(6), 100)
    np.testing.assert_allclose([run.share for run in found], shapley(vectors))
    assert [run.names for run in found] == [(str(n),) for n in range(6)]


def test_what_takes_back_an_error_has_a_negative_share():
    error = RNG.standard_normal(8)
    first, second = shares(Sums(np.array([error, -0.9 * error])), parts(2), 100)
    assert second.share < 0 < first.share and first.share + second.share == pytest.approx(1)
    assert first.alone == pytest.approx(100)


def test_a_large_network_is_cut_where_the_noise_is():
    """A few networks find the culprits; the shares add up all the same, and are those of the whole search."""
    vectors = RNG.standard_normal((500, 50)) * 0.01
    vectors[[123, 124, 400]] += RNG.standard_normal((3, 50)) * 3
    subsets = Sums(vectors)
    found = shares(subsets, parts(500), 90, alone=3)
    assert subsets.made <= 90 and sum(run.share for run in found) == pytest.approx(1)
    assert [name for run in found for name in run.names] == [str(n) for n in range(500)]
    whole = shares(Sums(vectors), parts(500), float("inf"), alone=0)
    for n in (123, 124, 400):
        (run,) = [run for run in found if run.names == (str(n),)]
        assert run.share == pytest.approx(whole[n].share) and run.alone is not None
    assert sum(run.alone is not None for run in found) == 3


def test_without_noise_there_are_no_shares():
    subsets = Sums(np.zeros((3, 4)))
    subsets.noise = 0.0
    subsets.measured = lambda sets, *_: [Measured(0.0, 0.0)] * len(sets)
    assert [run.share for run in shares(subsets, parts(3), 100)] == [0, 0, 0]


@pytest.fixture(scope="module", params=["int8", "int8-rounded"])
def recipe(request) -> str:
    return request.param


@pytest.mark.parametrize("make", [mobilenet, inception, resnet20, transformer], ids=lambda f: f.__name__)
def test_shares_add_up_whatever_the_recipe_does(make, recipe):
    model = make()
    result = onnxq.quantize(model, recipe, feeds(model, 4), workers=1)
    found = players(Planned(result.graph, result.plan, result.target))
    assert sorted(entry for player in found for entry in player.entries) == sorted(result.plan)  # each quantizer once
    diagnosis = diagnose(result, samples=2, alone=0, workers=1)
    assert sum(y.share for y in diagnosis.layers if y.share is not None) == pytest.approx(1)
    assert len({y.place for y in diagnosis.layers}) == len(diagnosis.layers)


def shared() -> onnxq.Result:
    """Two layers that read one tensor, and an Add that reads it, too."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    joined = net.op("Add", net.op("Add", net.conv(x, 8, 8), net.conv(x, 8, 8)), x)
    model = net.model(net.head(net.op("Relu", joined), 8))
    return onnxq.quantize(model, "int8", feeds(model, 4), workers=1)


def test_what_several_layers_read_has_a_share_of_its_own():
    result = shared()
    rows = {y.name: y for y in diagnose(result, samples=2).layers}
    planned = Planned(result.graph, result.plan, result.target)
    first, second = [y for y in result.graph.layers if y.input == result.graph.layers[1].input]
    row = rows[f"tensor {planned.input(first)}"]
    assert row.readers == (first.name, second.name) and row.share is not None and not row.is_layer
    assert f"read by {first.name} and {second.name}" in diagnose(result, samples=2, alone=0).describe(row)
    assert row.place < min(rows[y.name].place for y in (first, second))
    assert all(cause.kind.endswith("weights") or "weight" in cause.text for cause in rows[first.name].causes)


def test_all_quantizers_together_are_the_quantized_network():
    """Whatever is left out of a set is float: with none the network is exact, with all it is what ships."""
    result = shared()
    samples = Samples.of(result.graph.model(), result.data.spread(4))
    subsets = Subsets(Planned(result.graph, result.plan, result.target), samples)
    nothing, everything = subsets.measured([[], list(result.plan)])
    assert nothing.noise < 1e-6 and abs(nothing.along) < 1e-3  # sums in another order
    assert everything.along == pytest.approx(1) and everything.noise == pytest.approx(1)
    assert -10 * np.log10(subsets.noise) == pytest.approx(diagnose(result, samples=4, alone=0).sqnr, abs=1)


def test_a_shared_activation_rounds_for_its_layers_alone():
    """A reader whose weight is float reads codes all the same."""
    result = shared()
    planned = Planned(result.graph, result.plan, result.target)
    samples = Samples.of(result.graph.model(), result.data.spread(2))
    key = planned.input(result.graph.layers[1])
    (alone,) = Subsets(planned, samples).measured([[key]])
    assert alone.noise > 0.001


def lstm() -> onnxq.Result:
    net = Net(["N", 6, 8])
    x = net.op("Transpose", "x", perm=[1, 0, 2])
    w, r = net.weight(1, 64, 8), net.weight(1, 64, 16)
    net.op("LSTM", x, w, r, outputs=2, hidden_size=16)
    model = net.model(net.op("MatMul", net.nodes[-1].output[1], net.weight(16, 4)))
    return onnxq.quantize(model, "int8", feeds(model, 4), workers=1)


def test_constants_outside_layers_have_shares():
    result = lstm()
    constants = Planned(result.graph, result.plan, result.target).constants
    assert constants
    diagnosis = diagnose(result, samples=2)
    rows = {y.name: y for y in diagnosis.layers if y.name.startswith("constant ")}
    assert set(rows) == {f"constant {name}" for name in constants}
    assert sum(row.share for row in rows.values()) > 0.05
    row = max(rows.values(), key=lambda row: row.share)
    remedy = row.remedies[-1]
    made = result.again(remedy.on(result.recipe))
    assert not set(made.plan) & set(constants) and "in float" in remedy.text
    assert "This constant is read by" in diagnosis.describe(row)


def test_errors_of_what_is_lost():
    y = [np.array([[1.0, 2.0, np.inf]], np.float32), np.array([[3.0, 4.0]], np.float32)]
    z = [np.array([[1.5, np.nan, 7.0]], np.float32), np.array([[3.0]], np.float32)]
    first, second = errors(y, z)
    np.testing.assert_array_equal(first, [[0.5, -2.0, 0.0]])
    np.testing.assert_array_equal(second, [[-3.0, -4.0]])
    (words,) = errors([np.array([1, 2, 3])], [np.array([1, 5, 3])])
    np.testing.assert_array_equal(words, [0, 1, 0])


def test_a_network_of_classes_alone():
    """An ArgMax as the only output: shares of the answers that differ."""
    model = mobilenet()
    output = model.graph.output[0].name
    model.graph.node.append(helper.make_node("ArgMax", [output], ["answer"], axis=1, keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("answer", TensorProto.INT64, ["N"]))
    recipe = {"pass": [{"use": "ranges"}], "weights": {"bits": 2}}
    diagnosis = diagnose(onnxq.quantize(model, recipe, feeds(model, 8), workers=1), samples=8, alone=0)
    total = sum(y.share for y in diagnosis.layers if y.share is not None)
    assert total == pytest.approx(1) or total == 0


def test_a_lost_part_of_an_output_is_what_is_measured():
    """Boxes and scores in one output: pooled over both, that the scores are lost shows nowhere."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    weight = net.weight(6, 8, 1, 1, fan_in=8)
    model = net.model(net.op("Conv", x, weight, net.weight(6)))
    values = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == weight)).copy()
    values[:4] *= 1000
    next(t for t in model.graph.initializer if t.name == weight).CopyFrom(numpy_helper.from_array(values, weight))
    result = onnxq.quantize(model, {"pass": [{"use": "ranges"}]}, feeds(model, 4), workers=1)
    found = diagnose(result, samples=4, workers=1)
    assert found.output == f"{result.graph.outputs[0]}[:, 4:]" and found.sqnr > 20
    assert found.layers[0].name.startswith("tensor") and found.layers[0].share > 0.9
