"""How far apart outputs are: ratios in dB, agreement, drift, labels."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, quantize, runtimes
from onnxq_plugins.measure import IDENTICAL, agreement, drift, sqnr
from onnxq_plugins.measure.arrays import energies, worst_decibels
from onnxq_plugins.measure.classes import probability_axis
from onnxq_plugins.measure.metrics import percent_agreement, score, worst_sqnr
from onnxq_plugins.measure.samples import output_score
from tests.zoo import feeds, mlp

CURVE = {"pass": [{"use": "mixed-precision", "candidates": ["W4A8", "W8A8"], "curve": 2}]}


def test_sqnr_is_all_signal_over_all_noise():
    signal = np.array([[3.0, 4.0], [0.0, 2.0]])
    noise = np.array([[0.5, 0.0], [0.0, 0.2]])
    wanted = 10 * np.log10(29 / 0.29)
    assert sqnr(signal, signal + noise) == pytest.approx(wanted)
    assert sqnr([*signal], [*(signal + noise)]) == pytest.approx(wanted)  # per feed
    assert sqnr([signal[0], signal[1, 1:]], [(signal + noise)[0], (signal + noise)[1, 1:]]) == pytest.approx(wanted)
    exact = np.ones((100, 4))
    noisy = exact + np.where(np.arange(100) < 90, 0, 1)[:, None]
    assert sqnr(exact, noisy) == pytest.approx(10)  # the mean of decibels would be 180


def test_sqnr_is_bounded_and_leaves_out_what_overflows_in_the_reference():
    signal = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert sqnr(signal, signal) == IDENTICAL and sqnr(0 * signal, signal) == IDENTICAL
    masked = np.array([[1.0, -np.inf], [np.nan, 3.0]])
    assert sqnr(masked, masked) == IDENTICAL
    assert sqnr(masked, np.nan_to_num(masked) + 0.1) == pytest.approx(10 * np.log10(10 / 0.02))
    assert sqnr(signal, np.where(signal > 0, np.nan, 0)) == -IDENTICAL
    assert worst_decibels(energies([signal, 2 * signal], [signal, signal])) == pytest.approx(10 * np.log10(4))


@pytest.mark.parametrize(
    ("exact", "other", "same"),
    [
        (np.array([1, 2, 3]), np.array([1, 2, 4]), 2 / 3),
        (np.array([True, False]), np.array([True, True]), 0.5),
        (["cat", "dog"], ["cat", "cow"], 0.5),
        ([np.array(["a", "b"], object)], [np.array(["a", "c"], object)], 0.5),
        ([np.zeros(4, int), np.zeros(2, int)], [np.zeros(4, int), np.zeros(3, int)], 4 / 6),
        ([[np.zeros(2, int), np.ones(1, int)], None], [[np.zeros(2, int), np.ones(1, int)], None], 1.0),
    ],
)
def test_what_is_no_number_agrees_or_does_not(exact, other, same):
    assert agreement(exact, other, None) == pytest.approx(same)
    score = output_score(
        "y", exact if isinstance(exact, list) else [exact], other if isinstance(other, list) else [other], None
    )
    assert score.sqnr is None and score.same == pytest.approx(100 * same)
    assert worst_sqnr([exact], [other]) == pytest.approx(min(IDENTICAL, -10 * np.log10(max(1 - same, 1e-20))))


def test_sequences_and_maps_are_judged_by_what_is_in_them():
    sequence = [[np.ones(3), np.ones((2, 2))]] * 4
    noisy = [[y * 1.1 for y in value] for value in sequence]
    assert sqnr(sequence, noisy) == pytest.approx(20)
    maps = [[{"a": 0.2, "b": 0.8}], [{"a": 0.6, "b": 0.4}]]
    assert probability_axis(maps) == -1 and sqnr(maps, maps) == IDENTICAL
    assert agreement(maps, [maps[0], maps[0]]) == 0.5


def test_lost_samples_are_told():
    y = [np.ones((2, 4)), np.ones((3, 4))]
    score = output_score("boxes", y, [y[0], y[0]], None)
    assert "another shape for 1 of 2" in score.note and score.sqnr == pytest.approx(10 * np.log10(20 / 12))
    assert "destroyed" in output_score("y", y, [y[0], y[1] * np.nan], None).note
    assert "0 everywhere" in output_score("y", [0 * y[0]], [y[0]], None).note


def test_a_metric_gets_arrays_where_outputs_can_be_joined():
    seen = []

    def by(reference, quantized, labels):
        seen.append((reference, labels))
        return 1.0

    labels = np.arange(2)
    columns = [[np.zeros((1, 3)), np.ones((1, 3))], [np.zeros((1, 3)), np.zeros((1, 4))], [np.float32(1), np.float32(2)]]
    assert score(by, columns, columns, labels, [None] * 3) == 1
    joined, ragged, scalars = seen[0][0]
    assert joined.shape == (2, 3) and scalars.tolist() == [1, 2] and isinstance(ragged, list) and seen[0][1] is labels
    for wrong in (lambda *_: None, lambda *_: 1 / 0, lambda *_: float("nan")):
        with pytest.raises(OnnxqError, match="metric '<lambda>'"):
            score(wrong, columns, columns, labels, [None] * 3)


def test_drift_is_relative_to_the_largest_value_of_each_output():
    outputs = [np.array([1.0, -10.0]), np.array([0.1])]
    assert drift(outputs, outputs) == 0
    assert drift(outputs, [outputs[0] + [0.5, 0], outputs[1]]) == pytest.approx(0.05)
    assert drift(outputs, [outputs[0], outputs[1] * 1.2]) == pytest.approx(0.2)
    assert drift(outputs, [outputs[0], np.array([np.nan])]) == np.inf
    assert drift([[np.array(["a"])], [np.array(-np.inf)]], [[np.array(["a"])], [np.array(-np.inf)]]) == 0
    assert drift([[np.zeros(2)]], [[np.zeros(3)]]) == drift([np.array(["a"])], [np.array(["b"])]) == np.inf


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
