"""Ranges of least squared error, through the activation behind them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxq_plugins import quantize
from onnxq_plugins.graph import load
from onnxq_plugins.graph.activations import activation_of
from onnxq_plugins.measure.arrays import sqnr
from onnxq_plugins.solvers.ranges import mse_range
from onnxq_plugins.testing.exact import exact_session
from tests.networks import network, weight


def gated(op, more=()):
    """A convolution read by a gate, and what else reads it."""
    operators = [("Conv", ["x", "w", "b"], ["a"], {"pads": [1] * 4}), (op, ["a"], ["y"], {}), *more]
    outputs = ["y", *(out for _, _, outs, _ in more for out in outs)]
    constants = {"w": 20 * weight((8, 3, 3, 3)), "b": np.linspace(-20, 5, 8, dtype=np.float32)}
    return network(operators, [1, 3, 12, 12], constants, outputs=outputs)


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "HardSigmoid", "Softsign", "Elu", "HardSwish"])
def test_an_activation_is_evaluated_as_onnxruntime_does(op):
    graph = load(gated(op))
    function = activation_of(graph, "a")
    model = graph.model()
    model.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, None))
    x = np.random.default_rng(0).standard_normal((1, 3, 12, 12)).astype(np.float32)
    y, a = exact_session(model).run(["y", "a"], {"x": x})
    assert function is not None and a.min() < -30 and a.max() > 10
    np.testing.assert_allclose(function(a), y, atol=1e-5)


def test_other_readers_need_the_values():
    assert activation_of(load(gated("Sigmoid", [("Add", ["a", "y"], ["z"], {})])), "a") is None


def test_a_saturated_end_is_clipped_freely():
    values = np.random.default_rng(0).uniform(-100, 4, 50000)
    counts, ends = np.histogram(values, 2048)[0].astype(float), (float(values.min()), float(values.max()))
    plain = mse_range(counts, *ends, 256)
    through = mse_range(counts, *ends, 256, through=lambda x: 1 / (1 + np.exp(-x)))
    assert plain[0] < -95 and -20 < through[0] < -3 and through[1] > 3


def test_logits_far_beyond_a_sigmoid_leave_it_its_codes():
    model = gated("Sigmoid")
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(16)]
    reference = exact_session(model)

    def decibels(method):
        result = quantize(model, {"pass": [{"use": "ranges", "method": method}]}, data[:8])
        quantized = exact_session(result.model)
        exact, rounded = zip(*((reference.run(None, f)[0], quantized.run(None, f)[0]) for f in data[8:]), strict=True)
        return sqnr(list(exact), list(rounded))

    assert decibels("mse") > decibels("minmax") + 2


def test_ranges_that_harm_the_network_are_not_kept():
    """Rare large values that alone reach the output: least squared error of the tensor clips them."""
    model = network(
        [
            ("Conv", ["x", "w", "b"], ["a"], {}),
            ("Relu", ["a"], ["r"], {}),
            ("Conv", ["r", "v", "c"], ["z"], {}),
            ("Relu", ["z"], ["y"], {}),
        ],
        [1, 1, 32, 32],
        {
            "w": np.ones((1, 1, 1, 1), np.float32),
            "b": np.zeros(1, np.float32),
            "v": np.ones((1, 1, 1, 1), np.float32),
            "c": np.full(1, -12.0, np.float32),
        },
    )
    rng = np.random.default_rng(0)
    data = []
    for _ in range(16):
        x = rng.uniform(0, 1, (1, 1, 32, 32)).astype(np.float32)
        x[0, 0, 3, rng.integers(32)] = rng.uniform(15, 30)
        data.append({"x": x})
    recipe = {"pass": [{"use": "ranges", "method": "percentile", "percentile": 99.0}]}
    judged = quantize(model, recipe, data)
    step = judged.report.steps[0]["result"]
    assert step["kept"] == "minmax" and step["sqnr"]["minmax"] > step["sqnr"]["percentile"] + 6
    assert any("replaced by the extremes" in note for note in judged.report.notes)
    recipe["pass"][0]["judged"] = False
    assert "kept" not in quantize(model, recipe, data).report.steps[0]["result"]
