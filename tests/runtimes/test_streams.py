"""Models whose outputs are inputs of the next step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq_plugins import OnnxqError, auto, load, open_data, quantize, runtimes
from onnxq_plugins.data import DataOptions, Input, model_inputs
from onnxq_plugins.data.streams import with_guesses
from tests.zoo import Net

F = np.dtype(np.float32)
STATE = {"h_out": "h"}


def recurrent() -> onnx.ModelProto:
    """h_out = tanh(x W + h V): a step of a recurrent network, with batches of any size."""
    net = Net(["B", 6])
    h = helper.make_node("Tanh", [net.op("Add", net.linear("x", 6, 8), net.linear("h", 8, 8))], ["h_out"])
    net.nodes.append(h)
    graph = helper.make_graph(
        [*net.nodes, helper.make_node("MatMul", ["h_out", "wy"], ["y"])],
        "recurrent",
        [net.input, helper.make_tensor_value_info("h", TensorProto.FLOAT, ["B", 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", size]) for n, size in (("y", 4), ("h_out", 8))],
        [*net.constants, onnx.numpy_helper.from_array(np.eye(8, 4, dtype=np.float32), "wy")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def steps(count: int, batch: int = 1, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((batch, 6)).astype(np.float32)} for _ in range(count)]


def by_hand(model: onnx.ModelProto, feeds, batch: int = 1) -> list[np.ndarray]:
    """The state before each step."""
    session, h, states = runtimes.session(model), np.zeros((batch, 8), np.float32), []
    for feed in feeds:
        h = feed.get("h", h)
        states.append(h)
        h = session.run(["h_out"], {"h": h, **feed})[0]
    return states


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_runs_on_its_own_states(batch):
    model, feeds = recurrent(), steps(6, batch)
    feeds[4]["h"] = np.full((batch, 8), 0.5, np.float32)  # a new stream
    run = list(runtimes.roll(runtimes.session(model), feeds, STATE))
    for (feed, outputs), own, h in zip(run, feeds, by_hand(model, feeds, batch), strict=True):
        np.testing.assert_array_equal(feed["h"], h)
        np.testing.assert_array_equal(feed["x"], own["x"])
        assert [y.shape for y in outputs] == [(batch, 4), (batch, 8)]


def test_samples_are_rolled_through_the_float_model_each_time():
    model = recurrent()
    feeds = steps(9)
    options = DataOptions(state=STATE)
    for source in (feeds, {"x": np.concatenate([feed["x"] for feed in feeds])}):
        data = runtimes.open_samples(source, load(model), options)
        for _ in range(3):
            for feed, h in zip(data, by_hand(model, feeds), strict=True):
                np.testing.assert_allclose(feed["h"], h, atol=1e-6)
        assert runtimes.rolled(data, lambda: pytest.fail("complete already")) is data
        assert [len(half.spread(0)) for half in data.halves()] == [5, 4]
        np.testing.assert_allclose(data.halves()[1].spread(0)[0]["h"], by_hand(model, feeds)[5], atol=1e-6)
    few = runtimes.open_samples(feeds, load(model), DataOptions(state=STATE, samples=4))
    assert len(few.spread(0)) == 4 and len(few.spread(2)) == 2
    np.testing.assert_array_equal(few.spread(2)[1]["x"], feeds[1]["x"])  # the next step, not one further away


def test_calibration_sees_the_states_of_the_stream():
    model, feeds = recurrent(), steps(24)
    states = np.stack(by_hand(model, feeds))
    result = quantize(model, "int8", feeds, state=STATE, workers=1)
    assert float(result.plan["h"].scale) * 255 == pytest.approx(np.ptp([states.min(), states.max()]), rel=0.02)
    assert result.report.recipe["data"]["state"] == STATE
    recipe = quantize(model, {"data": {"state": STATE}}, feeds, workers=1)
    assert float(recipe.plan["h"].scale) == float(result.plan["h"].scale)
    chosen = auto(model, feeds, state=STATE, recipes=["int8"], workers=1)
    assert [trial.met for trial in chosen.trials] == [True]


def test_streams_on_the_command_line(onnxq):
    model, feeds = recurrent(), steps(24)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=np.concatenate([feed["x"] for feed in feeds]))
    state = ("--data", "d.npz", "--state", "h_out=h")
    for command in (
        ["quantize", "m.onnx", "-o", "q.onnx", "--report", "r.html"],
        ["compare", "m.onnx", "q.onnx"],
        ["audit", "q.onnx", "--against", "m.onnx"],
        ["diagnose", "m.onnx"],
    ):
        code, out, err = onnxq(*command, *state)
        assert code == 0, err
        assert ("own states" in out and "..24" in out) == (command[0] == "compare")
    outputs = json.loads(Path("r.json").read_text())["measured"]["outputs"]
    assert [len(output["steps"]) for output in outputs] == [24, 24] and "Error over the steps" in Path("r.html").read_text()
    for options, phrase in (
        (["--state", "h"], "must be OUTPUT=INPUT"),
        (["--state", "h_out=g"], "no input 'g'"),
        (["--state", "z=h"], "no output 'z'"),
        ([], "no array for the model's input 'h'"),
        ([], "give --state h_out=h"),
    ):
        code, _, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "r.onnx", *options)
        assert code == 2 and phrase in err


def test_states_are_offered_where_they_are_zero_all_the_time():
    model = recurrent()
    (note,) = (note for note in with_state(model, np.zeros((1, 8))) if "h_out" in note)
    assert note.endswith("--state h_out=h calibrates on the model's own states")
    assert not [note for note in with_state(model, np.ones((1, 8))) if "h_out" in note]
    feeds = [{**feed, "h": np.zeros((1, 8), np.float32)} for feed in steps(8)]
    assert not open_data(feeds, model_inputs(model), DataOptions(state=STATE)).remarks()


def with_state(model: onnx.ModelProto, h: np.ndarray) -> list[str]:
    feeds = [{**feed, "h": h.astype(np.float32)} for feed in steps(8)]
    return open_data(feeds, model_inputs(model)).remarks()


A, B = (1, 1, 64), (2, 1, 8)


@pytest.mark.parametrize(
    ("inputs", "outputs", "pairs"),
    [
        ({"x": (1, 9), "state": A}, {"y": (1, 2), "stateN": A}, {"state": "stateN"}),
        ({"x": (1, 9), "h0": A, "c0": A}, {"y": (1, 2), "hn": A, "cn": A}, {"h0": "hn", "c0": "cn"}),
        ({"x": (1, 9), "h_0": A, "c_0": A}, {"y": (1, 2), "c_n": A, "h_n": A}, {"h_0": "h_n", "c_0": "c_n"}),
        ({"x": (1, 9), "h_0": A, "h_1": A}, {"h_1_out": A, "h_0_out": A}, {"h_0": "h_0_out", "h_1": "h_1_out"}),
        ({"x": (1, 9), "hIn": A}, {"y": (1, 2), "hOut": A}, {"hIn": "hOut"}),
        ({"x": (1, 9), "conv_cache": B}, {"y": (1, 2), "conv_cache_out": B}, {"conv_cache": "conv_cache_out"}),
        ({"x": (1, 9), "cached_len_0": B}, {"y": (1, 2), "new_cached_len_0": B}, {"cached_len_0": "new_cached_len_0"}),
        (
            {"ids": (1, "s"), "past_key_values.0.key": (1, 4, "p", 8)},
            {"logits": (1, "s", 9), "present.0.key": (1, 4, "q", 8)},
            {"past_key_values.0.key": "present.0.key"},
        ),
        ({"input_1": (1, 1, 257), "input_2": B}, {"Identity": (1, 1, 257), "Identity_1": B}, {"input_2": "Identity_1"}),
        ({"state": (1, 8), "action": (1, 2)}, {"next_state": (1, 8)}, {"state": "next_state"}),
        ({"image": (1, 3, 8, 8)}, {"image_out": (1, 3, 8, 8)}, {}),
        ({"audio_in": (1, 80), "rate": ()}, {"audio_out": (1, 80)}, {}),
        ({"q": A, "k": A, "v": A}, {"o": A}, {}),
        ({"x": (1, 9), "state": A}, {"y": (1, 2), "stateN": B}, {}),
    ],
)
def test_states_are_guessed_from_names_and_shapes(inputs, outputs, pairs):
    ports = [[Input(name, F, shape) for name, shape in one.items()] for one in (inputs, outputs)]
    assert {i.name: i.follows for i in with_guesses(*ports) if i.follows} == pairs


def test_a_state_that_overflows_is_told():
    net = Net([1, 2])
    grown = helper.make_node("Mul", [net.op("Add", "x", "h"), net.constant(1e30)], ["h_out"])
    net.nodes.append(grown)
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in ("x", "h", "h_out")]
    graph = helper.make_graph(net.nodes, "g", ports[:2], ports[2:], net.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = [{"x": np.full((1, 2), 1e5, np.float32)}] * 8
    with pytest.raises(OnnxqError, match=r"step 2: the state 'h' that the float model gives has NaN or Inf"):
        list(runtimes.open_samples(feeds, load(model), DataOptions(state=STATE)))
