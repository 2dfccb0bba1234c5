"""bias-correct: what a bias takes back, with padding, and what a small network as a whole says to it."""

from __future__ import annotations

import numpy as np

from onnxq_plugins import quantize
from onnxq_plugins.passes import bias_correct
from onnxq_plugins.plan.values import weight_values
from onnxq_plugins.search.judge import Judge
from tests.zoo import Net, batch, feeds, mobilenet

RECIPE = {"weights": {"bits": 4}, "pass": [{"use": "ranges"}, {"use": "bias-correct"}]}


def test_taps_that_read_padding_count_less(monkeypatch):
    """On three frames half of what a kernel of five reads is padding: the shift is the mean error all the same."""
    monkeypatch.setattr(bias_correct, "_WORK", 0)
    net = Net(["N", 8, 3])
    model = net.model(net.conv(net.op("Relu", net.conv("x", 8, 16, 1, rank=1)), 16, 12, 5, rank=1))
    samples = feeds(model, 32)
    result = quantize(model, RECIPE, samples, workers=1)
    layer = result.graph.layers[1]
    error = result.graph.constant(layer.weight) - weight_values(layer, result.plan[layer.weight])
    first = result.graph.layers[0]
    inputs = np.einsum("oi,nit->not", result.graph.constant(first.weight)[:, :, 0], batch(samples)["x"])
    inputs = np.maximum(inputs + result.graph.constant(first.bias)[:, None], 0)
    padded = np.pad(inputs, ((0, 0), (0, 0), (2, 2)))
    errors = np.stack([np.einsum("oik,nik->no", error, padded[:, :, t : t + 5]) for t in range(3)])
    np.testing.assert_allclose(result.plan[layer.weight].shift, errors.mean(axis=(0, 1)), rtol=0.2, atol=0.02)


def test_a_small_network_that_loses_by_it_keeps_its_biases(monkeypatch):
    model = mobilenet()
    for values, kept in (((20.0, 30.0), False), ((30.0, 20.0), True)):
        answers = iter(values)
        monkeypatch.setattr(Judge, "each", lambda judge, plan, answers=answers: np.full(4, next(answers)))
        result = quantize(model, RECIPE, feeds(model, 8), workers=1)
        shifts = [result.plan[layer.weight].shift for layer in result.graph.layers]
        assert all((shift is not None) == kept for shift in shifts)
        assert any("bias-correct lowers the outputs" in note for note in result.report["notes"]) != kept
