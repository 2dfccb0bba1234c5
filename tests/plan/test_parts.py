"""Where a tensor that float operators write is quantized: at its root, or behind the slices of it that layers read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import quantize, runtimes
from onnxq_plugins.measure import sqnr
from tests.networks import feed_of, network, weight

COLUMNS = 16


def sliced(parts):
    """Slices of axis 1 of a tensor [1, 4, 16], each read by a MatMul of its own."""
    operators, constants, outputs = [("Tanh", ["x"], ["t"], {})], {}, []
    for n, (first, last) in enumerate(parts):
        constants |= {f"s{n}": np.int64([first]), f"e{n}": np.int64([last]), f"w{n}": (COLUMNS, 8)}
        operators += [
            ("Slice", ["t", f"s{n}", f"e{n}", "axis"], [f"p{n}"], {}),
            ("Transpose", [f"p{n}"], [f"q{n}"], {"perm": [1, 0, 2]}),
            ("MatMul", [f"q{n}", f"w{n}"], [f"y{n}"], {}),
        ]
        outputs.append(f"y{n}")
    return network(operators, [1, 4, COLUMNS], constants | {"axis": np.int64([1])}, outputs=outputs)


def planned(model):
    result = quantize(model, {}, [feed_of(model, seed) for seed in range(4)], workers=1)
    return {name for name in result.plan if not result.graph.is_constant(name)}, result


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(0, 1)], {"p0"}),
        ([(0, 1), (1, 2)], {"p0", "p1"}),
        ([(0, 2), (2, 4)], {"t"}),  # all of it is read: one quantizer
        ([(0, 3), (1, 4)], {"t"}),  # overlapping slices are more values than the whole
    ],
)
def test_parts_that_are_less_than_the_whole_have_grids_of_their_own(parts, expected):
    assert planned(sliced(parts))[0] == expected


def test_what_no_layer_reads_costs_the_others_nothing():
    model = sliced([(0, 1), (1, 2)])
    samples = [feed_of(model, seed) for seed in range(8)]
    for x in samples:
        x["x"][:, 2:] *= 1000  # cell states beside hidden ones
    result = quantize(model, {}, samples[:6], workers=1)
    for x in samples[6:]:
        pair = (runtimes.session(m, optimize=False).run(None, x) for m in (model, result.model))
        assert min(sqnr(a, b) for a, b in zip(*pair, strict=True)) > 30


def test_parts_of_what_an_integer_kernel_writes_share_its_grid():
    constants = {
        "w": weight((8, 3, 3, 3)),
        **{f"v{n}": weight((4, 4, 1, 1), n) for n in range(2)},
        **{"s0": np.int64([0]), "e0": np.int64([4]), "s1": np.int64([4]), "e1": np.int64([8]), "axis": np.int64([1])},
    }
    operators = [("Conv", ["x", "w"], ["c"], {})]
    for n in range(2):
        operators += [("Slice", ["c", f"s{n}", f"e{n}", "axis"], [f"p{n}"], {}), ("Conv", [f"p{n}", f"v{n}"], [f"y{n}"], {})]
    model = network(operators, [1, 3, 8, 8], constants, outputs=["y0", "y1"])
    assert planned(model)[0] == {"x", "c", "y0", "y1"}


def lstm_step(size: int = 32, features: int = 16) -> onnx.ModelProto:
    """One step of an LSTM whose state [2, 1, size] holds h, within [-1, 1], and c, which is many times larger."""
    rng = np.random.default_rng(0)
    constants = {
        "w": (rng.standard_normal((features + size, 4 * size)) / (features + size) ** 0.5).astype(np.float32),
        "b": rng.standard_normal(4 * size).astype(np.float32),
        "axis": np.array([0], np.int64),
    }
    nodes = [
        helper.make_node("Split", ["state"], ["h2", "c2"], axis=0, num_outputs=2),
        helper.make_node("Squeeze", ["h2", "axis"], ["h"]),
        helper.make_node("Squeeze", ["c2", "axis"], ["c"]),
        helper.make_node("Concat", ["x", "h"], ["xh"], axis=1),
        helper.make_node("MatMul", ["xh", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["gates"]),
        helper.make_node("Split", ["gates"], ["i", "f", "o", "n"], axis=1, num_outputs=4),
        *(helper.make_node("Sigmoid", [gate], [f"{gate}_gate"]) for gate in "ifo"),
        helper.make_node("Tanh", ["n"], ["n_gate"]),
        helper.make_node("Mul", ["f_gate", "c"], ["kept"]),
        helper.make_node("Mul", ["i_gate", "n_gate"], ["new"]),
        helper.make_node("Add", ["kept", "new"], ["c_next"]),
        helper.make_node("Tanh", ["c_next"], ["squashed"]),
        helper.make_node("Mul", ["o_gate", "squashed"], ["y"]),
        helper.make_node("Unsqueeze", ["y", "axis"], ["h_up"]),
        helper.make_node("Unsqueeze", ["c_next", "axis"], ["c_up"]),
        helper.make_node("Concat", ["h_up", "c_up"], ["state_next"], axis=0),
    ]
    ports = [("x", [1, features]), ("state", [2, 1, size])], [("y", [1, size]), ("state_next", [2, 1, size])]
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in side] for side in ports)
    stored = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "lstm", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def stream(model: onnx.ModelProto, seed: int, steps: int = 8) -> list[dict[str, np.ndarray]]:
    rng, session, feeds = np.random.default_rng(seed), runtimes.session(model), []
    state = np.concatenate([np.zeros((1, 1, 32)), 15 * rng.standard_normal((1, 1, 32))]).astype(np.float32)
    for _ in range(steps):
        feeds.append({"x": 2 * rng.standard_normal((1, 16), dtype=np.float32), "state": state})
        state = runtimes.run(session, feeds[-1])[1]
    return feeds


@pytest.mark.parametrize(("target", "least"), [("ort-cpu", 25), ("litert", 17), ("qnn", 17)])
def test_a_state_is_not_lost_beside_a_larger_one_in_its_tensor(target, least):
    model = lstm_step()
    result = quantize(model, "int8", [feed for seed in range(8) for feed in stream(model, seed)], target=target, check=False)
    sessions = runtimes.session(model), runtimes.session(result.model, written=True)
    exact, rounded = (
        [runtimes.run(session, feed) for seed in range(8, 12) for feed in stream(model, seed)] for session in sessions
    )
    for part in (0, 1):
        y, z = (np.stack([outputs[1][part] for outputs in rows]) for rows in (exact, rounded))
        assert 10 * np.log10(np.square(y).sum() / np.square(y - z).sum()) > least
