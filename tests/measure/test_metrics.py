"""How far apart outputs are: ratios in dB, agreement, drift, labels."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, quantize, runtimes
from onnxq_plugins.measure import IDENTICAL, agreement, drift, sqnr
from onnxq_plugins.measure.metrics import percent_agreement
from tests.zoo import feeds, mlp

CURVE = {"pass": [{"use": "mixed-precision", "candidates": ["W4A8", "W8A8"], "curve": 2}]}


def test_sqnr_is_the_mean_ratio_of_the_samples_in_db():
    signal = np.array([[3.0, 4.0], [0.0, 2.0]])
    noise = np.array([[0.5, 0.0], [0.0, 0.02]])
    assert sqnr(signal, signal + noise) == pytest.approx((20 + 40) / 2)


def test_sqnr_leaves_out_samples_without_signal_and_is_bounded():
    signal = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert sqnr(signal, signal) == IDENTICAL
    assert sqnr(signal, signal + np.array([[0.1, 0.1], [9, 9]])) == pytest.approx(20)
    assert sqnr(0 * signal, signal) == IDENTICAL


def test_drift_is_relative_to_the_largest_value_of_each_output():
    outputs = [np.array([1.0, -10.0]), np.array([0.1])]
    assert drift(outputs, outputs) == 0
    assert drift(outputs, [outputs[0] + [0.5, 0], outputs[1]]) == pytest.approx(0.05)
    assert drift(outputs, [outputs[0], outputs[1] * 1.2]) == pytest.approx(0.2)
    assert drift(outputs, [outputs[0], np.array([np.nan])]) == np.inf


def test_agreement_is_a_share_and_as_a_metric_a_percentage():
    a = np.eye(4, dtype=np.float32)
    assert agreement(a, a) == 1 and agreement(a, a[[0, 1, 3, 2]]) == 0.5
    assert percent_agreement([a], [a]) == 100
    assert percent_agreement([a], [a[[0, 1, 3, 2]]]) == 50


def test_top1_needs_labels_that_fit():
    model = mlp()
    settings = ["mixed-precision.metric=top1"]
    with pytest.raises(OnnxqError, match="needs labels"):
        quantize(model, CURVE, feeds(model, 8), settings=settings)
    with pytest.raises(OnnxqError, match="8 samples and 7 labels"):
        quantize(model, CURVE, feeds(model, 8), settings=settings, labels=np.arange(7))
    reference = runtimes.outputs(runtimes.session(model), feeds(model, 8))[0].argmax(-1)
    search = quantize(model, CURVE, feeds(model, 8), settings=settings, labels=reference).report["steps"][0]["result"]
    assert (search["metric"], search["float"]) == ("top1", 100.0) and all(point["top1"] <= 100 for point in search["curve"])
