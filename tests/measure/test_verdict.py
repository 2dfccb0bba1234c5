"""Whether an output is still worth something: destroyed, poor, idle or good, and what it is judged by."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxq_plugins.measure.verdict import Verdict, bounded_outputs, judge_outputs
from tests.zoo import examples

RNG = np.random.default_rng(0)


def samples(n: int = 8, *shape: int, scale: float = 1.0) -> list[np.ndarray]:
    return [(scale * RNG.standard_normal((1, *(shape or (10,))))).astype(np.float32) for _ in range(n)]


def verdict(reference: list, other: list, bounded: bool = False) -> Verdict:
    (found,) = judge_outputs(["y"], [reference], [other], ["y"] if bounded else [])
    return found


def noisy(values: list[np.ndarray], decibels: float) -> list[np.ndarray]:
    amplitude = np.sqrt(np.mean(np.square(np.concatenate([y.ravel() for y in values])))) * 10 ** (-decibels / 20)
    return [y + (amplitude * RNG.standard_normal(y.shape)).astype(np.float32) for y in values]


@pytest.mark.parametrize(("decibels", "grade"), [(40, "good"), (17, "good"), (10, "poor"), (5, "poor"), (0, "destroyed")])
def test_noise_alone_makes_the_grade(decibels, grade):
    y = samples()
    found = verdict(y, noisy(y, decibels))
    assert found.grade == grade and found.sqnr == pytest.approx(decibels, abs=1.5)
    assert ("dB" in found.why) == (grade != "good")


def test_nan_is_destroyed_only_where_float_has_none():
    y = samples()
    z = [x.copy() for x in y]
    z[2][0, 0] = np.nan
    found = verdict(y, z)
    assert found.grade == "destroyed" and "NaN" in found.why and "1 of 8" in found.why
    assert verdict(z, z).grade == "good"
    assert verdict(z, y).grade == "good"


def test_an_output_that_is_always_the_same_is_destroyed_whatever_its_decibels():
    """Ages around 40: the mean is right to 20 dB, and says nothing of any person."""
    y = [np.array([[40 + n]], np.float32) for n in range(-4, 5)]
    found = verdict(y, [np.array([[40]], np.float32)] * 9)
    assert found.sqnr > 15 and found.grade == "destroyed" and "same" in found.why
    assert verdict(y, [x + 0.1 for x in y]).grade == "good"


def test_rows_of_one_feed_are_samples_too():
    y = [(40 + np.arange(-4, 5)).astype(np.float32)[:, None]]
    assert verdict(y, [np.full((9, 1), 40, np.float32)]).grade == "destroyed"


def test_one_value_throughout_a_single_sample_is_destroyed():
    y = [(10 + np.arange(5)).astype(np.float32)[None]]
    assert verdict(y, [np.full((1, 5), 12, np.float32)]).grade == "destroyed"


def test_what_float_gives_always_may_be_the_same():
    y = [np.full((1, 5), 3.0, np.float32)] * 4
    assert verdict(y, y).grade == verdict(y, [x + 0.01 for x in y]).grade == "good"


def test_scores_next_to_nothing_are_idle_and_cry_no_wolf():
    y = [np.abs(x) * 0.004 for x in samples(8, 400, 1)]
    lost = [np.zeros_like(x) for x in y]
    found = verdict(y, lost, bounded=True)
    assert found.grade == "idle" and "hardly varies" in found.why and found.sqnr == pytest.approx(0, abs=0.1)
    assert verdict(y, lost).grade == "destroyed"  # of a logit nobody knows what is little
    y[3][0, 7] = 0.9
    assert verdict(y, lost, bounded=True).grade == "destroyed"  # a face, and it was lost


def test_idle_does_not_hide_what_jumps_up():
    y = [np.abs(x) * 0.004 for x in samples(8, 400, 1)]
    z = [x.copy() for x in y]
    z[5][0, 3] = 0.7
    assert verdict(y, z, bounded=True).grade == "destroyed"


def test_an_output_of_zeros_is_idle():
    y = [np.zeros((1, 4), np.float32)] * 3
    assert verdict(y, samples(3, 4)).grade == "idle"
    assert verdict(y, y).grade == "good"


def test_both_things_that_an_output_holds_are_judged():
    boxes, scores = samples(8, 20, 4, scale=100.0), samples(8, 20, 2, scale=0.5)
    y = [np.concatenate(pair, axis=-1) for pair in zip(boxes, scores, strict=True)]
    z = [np.concatenate([box, 0 * score], axis=-1) for box, score in zip(boxes, scores, strict=True)]
    verdicts = judge_outputs(["y"], [y], [z])
    assert [v.grade for v in verdicts] == ["good", "destroyed"]
    assert verdicts[1].name == "y[:, :, 4:]"


def test_outputs_of_varying_length_sequences_and_nothing():
    y = [samples(1, n)[0] for n in (3, 5, 7)]
    assert verdict(y, noisy(y, 30)).grade == "good"
    assert verdict(y, [0 * x for x in y]).grade == "destroyed"
    assert verdict(y, [x[:, :2] for x in y]).grade == "destroyed"  # another shape
    sequences = [samples(2), samples(2)]
    assert verdict(sequences, sequences).grade == "good"
    assert verdict([None, None], [None, None]).grade == "good"


def test_integers_and_strings_are_judged_by_what_is_equal():
    y = [RNG.integers(0, 9, (1, 8, 8)) for _ in range(4)]
    half = [np.where(RNG.random(x.shape) < 0.3, x + 1, x) for x in y]
    found = verdict(y, half)
    assert found.sqnr is None and found.grade == "poor" and 60 < found.same < 80
    assert verdict(y, [x + 1 for x in y]).grade == "destroyed"
    words = [np.array([["a", "b"]], object), np.array([["c", "d"]], object)]
    assert verdict(words, [np.array([["a", "a"]], object)] * 2).grade == "destroyed"
    assert verdict(words, words).grade == "good"
    assert verdict([np.array([n]) for n in (1, 2, 3, 4)], [np.array([n]) for n in (1, 2, 3, 3)]).grade == "good"  # of four


def test_indices_beside_floats_do_not_count():
    y, order = samples(), [RNG.permutation(64)[None] for _ in range(8)]
    verdicts = judge_outputs(["y", "i"], [y, order], [y, [x[:, ::-1] for x in order]])
    assert [v.grade for v in verdicts] == ["good", "good"]


@given(st.integers(0, 2**16), st.floats(-3, 3), st.sampled_from([0.01, 1.0, 1e4]))
@examples(30)
def test_equal_outputs_are_good_at_any_scale(seed, offset, scale):
    rng = np.random.default_rng(seed)
    y = [((rng.standard_normal((2, 3)) + offset) * scale).astype(np.float32) for _ in range(4)]
    assert verdict(y, [x.copy() for x in y]).grade == "good"


def test_probabilities_are_found_behind_what_moves_them():
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Reshape", ["s", "shape"], ["r"]),
        helper.make_node("Softmax", ["x"], ["m"]),
        helper.make_node("Concat", ["r", "m"], ["c"], axis=0),
        helper.make_node("Concat", ["r", "x"], ["d"], axis=0),
        helper.make_node("Mul", ["s", "x"], ["silu"]),
    ]
    outputs = [value(name, TensorProto.FLOAT, None) for name in ("r", "c", "d", "silu")]
    model = helper.make_model(helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, [1, 4])], outputs))
    assert isinstance(model, onnx.ModelProto) and bounded_outputs(model) == {"r", "c"}
