"""widen: which layers of few bits get more."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.search.judge import Judge
from tests.zoo import Net, feeds

FOUR = {"bits": 4, "sub_block": [1, 16]}


def network():
    """A layer of few weights between two of many."""
    net = Net(["N", 64])
    hidden = net.op("Relu", net.gemm("x", 64, 128))
    return net.model(net.gemm(net.op("Relu", net.gemm(hidden, 128, 2)), 2, 512))


def bits(widen, **more):
    model = network()
    recipe = {"weights": FOUR, "pass": [{"use": "ranges"}, *([{"use": "widen", **more}] if widen else [])]}
    result = quantize(model, recipe, feeds(model, 16), workers=1)
    return [result.plan[layer.weight].bits for layer in result.graph.layers], result


@pytest.mark.parametrize(("few", "many", "last"), [(20.0, 22.0, 8), (20.0, 20.5, 4), (20.0, 10.0, 4)])
def test_the_last_layer_is_widened_where_the_outputs_gain(monkeypatch, few, many, last):
    answers = iter((few, many))
    monkeypatch.setattr(Judge, "sqnr", lambda judge, plan: next(answers))
    found, result = bits(True)
    assert found[0] == 4 and found[2] == last
    assert result.report.steps[1]["result"]["sqnr_of_few_and_more_bits"] == [few, many]


def test_layers_that_few_bits_do_not_make_smaller_are_widened():
    found, result = bits(True, loss=100.0)
    assert found == [4, 8, 4] and bits(False)[0] == [4, 4, 4]
    assert len(result.report.steps[1]["result"]["without_gain"]) == 1
    assert len(result.model.SerializeToString()) < len(bits(False)[1].model.SerializeToString())


def test_wider_codes_lower_the_error():
    errors = []
    for loss in (0.0, 100.0):
        _, result = bits(True, loss=loss)
        layer = result.graph.layers[2]
        spec = result.plan[layer.weight]
        size = np.asarray(spec.scale) * (1 if spec.multiplier is None else np.repeat(spec.multiplier, 16, axis=-1)[:, :4])
        errors.append(np.square(result.graph.constant(layer.weight) - size * spec.codes).sum())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("wrong", [{"bits": 2}, {"bits": 9}, {"loss": -1.0}])
def test_parameters_that_make_no_sense(wrong):
    with pytest.raises(Exception, match="must"):
        bits(True, **wrong)
