"""Networks of streams are judged on their own states, where errors feed back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq_plugins import runtimes
from onnxq_plugins.measure.samples import OutputScore, Samples
from onnxq_plugins.report.plots import over_steps

STATE = {"sum_out": "sum"}


def adder(gain: float) -> onnx.ModelProto:
    """sum_out = sum + gain x, y = 2 x: an error of the gain adds up in the sum, and only there."""
    port = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4])  # noqa: E731
    constants = {"gain": gain, "two": 2 * gain}
    nodes = [("Mul", ["x", "gain"], "scaled"), ("Add", ["sum", "scaled"], "sum_out"), ("Mul", ["x", "two"], "y")]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes],
        "adder",
        [port("x"), port("sum")],
        [port("y"), port("sum_out")],
        [onnx.numpy_helper.from_array(np.array(v, np.float32), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def streams(*lengths: int) -> list[dict[str, np.ndarray]]:
    """Complete feeds of some streams: ones and minus ones that sum to about nothing."""
    rng, feeds = np.random.default_rng(0), []
    for length in lengths:
        steps = [{"x": rng.choice([-1.0, 1.0], (1, 4)).astype(np.float32)} for _ in range(length)]
        steps[0]["sum"] = np.full((1, 4), 10.0, np.float32)
        feeds += [feed for feed, _ in runtimes.roll(runtimes.session(adder(1.0)), steps, STATE)]
    return feeds


def test_feeds_that_go_on_from_the_one_before_are_one_stream():
    samples = Samples.of(adder(1.0), streams(3, 1, 4), state=STATE)
    assert samples.places == [0, 1, 2, 0, 0, 1, 2, 3]
    assert Samples.of(adder(1.0), streams(3, 4)).places == [0] * 7  # nobody said that it is a stream
    assert Samples.of(adder(1.0), streams(9)[::2], state=STATE).places == [0] * 5  # steps are missing


def test_errors_feed_back_on_own_states_alone():
    samples, off = Samples.of(adder(1.0), streams(40, 40), state=STATE), runtimes.session(adder(1.5))
    (y, own), (_, forced) = samples.table(samples.outputs(off)), samples.table(samples.outputs(off, own=False))
    assert len(y.steps) == len(own.steps) == 40
    assert own.sqnr < forced.sqnr - 6
    assert np.median(own.steps[-10:]) < np.median(own.steps[:10]) - 6 and own.decline > 6
    assert np.ptp(y.steps) < 0.1 and y.sqnr == pytest.approx(6.02, abs=0.1)  # no state, no feedback
    assert own.to_dict()["steps"] == [round(step, 2) for step in own.steps]
    exact = samples.table(samples.outputs(runtimes.session(adder(1.0))))
    assert min(score.sqnr for score in exact) > 120


def test_steps_are_drawn():
    scores = [OutputScore(f"o{n}", 30.0 - n, 20.0, None, steps=tuple(np.linspace(40, 10 + n, 20))) for n in range(9)]
    (plot,) = over_steps([*scores, OutputScore("classes", None, None, 100.0)])
    assert plot.svg.count(">o") == 6 and "o8" in plot.svg and "o0" not in plot.svg
    assert not over_steps([OutputScore("y", 30.0, 20.0, None)])
    assert scores[0].decline > 15 and OutputScore("y", 30.0, 20.0, None, steps=(40.0, 10.0)).decline == 0


@pytest.mark.parametrize("state", [STATE, {}])
def test_any_number_of_workers(state):
    samples = Samples.of(adder(1.0), streams(3, 4, 2), state=state, workers=3)
    runner = runtimes.session(adder(0.9))
    one, more = (samples.outputs(runner, workers=n) for n in (1, 3))
    np.testing.assert_array_equal(one, more)
    alone = Samples.of(adder(1.0), streams(3, 4, 2), state=state)
    np.testing.assert_array_equal(alone.reference, samples.reference)
