"""Feeds are used exactly as they are, whatever their axes mean."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxq_plugins import OnnxqError, open_data, quantize, runtimes
from onnxq_plugins.data import DataOptions, Input, graph_inputs, model_inputs
from onnxq_plugins.graph import load
from tests.zoo import Net, examples

F = np.dtype(np.float32)
TYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.UINT8: np.uint8,
    TensorProto.BOOL: np.bool_,
    TensorProto.STRING: object,
}


def passing(**ports: tuple[int, list | None]) -> onnx.ModelProto:
    """A model that returns its inputs: name -> (type, declared shape)."""
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ports],
        "passing",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in ports.items()],
        [helper.make_tensor_value_info(f"{name}_out", kind, None) for name, (kind, _) in ports.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def same(feeds, others) -> bool:
    return len(feeds) == len(others) and all(
        one.keys() == other.keys()
        and all(one[k].shape == np.shape(other[k]) and np.array_equal(one[k], other[k]) for k in one)
        for one, other in zip(feeds, others, strict=True)
    )


@st.composite
def cases(draw) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A model with random inputs, and feeds of unlike shapes that it takes."""
    symbols = {name: draw(st.integers(0, 4), label=name) for name in ("N", "T", "x")}
    ports, fixed = {}, {}
    for n in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(sorted(TYPES)))
        axes = draw(st.lists(st.sampled_from([1, 2, 3, "N", "T", "x", None]), max_size=4))
        declared = None if draw(st.integers(0, 9)) == 0 else axes
        ports[f"i{n}"], fixed[f"i{n}"] = (kind, declared), axes
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    feeds = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = {name: size if draw(st.booleans()) else draw(st.integers(1, 4)) for name, size in symbols.items()}
        feed = {}
        for name, (kind, _) in ports.items():
            shape = [sizes[n] if isinstance(n, str) else 2 if n is None else n for n in fixed[name]]
            values = np.asarray(rng.integers(0, 2, shape))
            feed[name] = np.asarray(
                values.astype(str).astype(object) if kind == TensorProto.STRING else values.astype(TYPES[kind])
            )
        feeds.append(feed)
    return passing(**ports), feeds


@given(cases())
@examples(40)
def test_no_feed_is_refused_that_onnxruntime_takes(case):
    model, feeds = case
    session = runtimes.session(model)
    for feed in feeds:
        session.run(None, feed)
    kinds = [value.type.tensor_type for value in model.graph.input]
    importable = all(kind.HasField("shape") and kind.elem_type != TensorProto.FLOAT16 for kind in kinds)
    for inputs in (model_inputs(model), *([graph_inputs(load(model))] if importable else [])):
        for source in (feeds, (feed for feed in feeds)):
            data = open_data(source, inputs)
            assert same(list(data), feeds) and same(data.spread(0), feeds)
            data.remarks()
            data.digest()


def test_sequences_of_unlike_length_stay_whole():
    """Time first: a sequence is one feed, not as many samples as it has steps."""
    net = Net(["T", "B", 16])
    model = net.model(net.op("Relu", net.linear("x", 16, 8)))
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal((steps, 1, 16)).astype(np.float32) for steps in (40, 7, 12)]
    data = open_data([{"x": x} for x in sequences], graph_inputs(load(model)))
    assert [feed["x"].shape[0] for feed in data] == [40, 7, 12]
    result = quantize(model, "int8", [{"x": x} for x in sequences], workers=1)
    every = np.concatenate([x.ravel() for x in sequences])
    assert float(result.plan["x"].scale) == pytest.approx(np.ptp(every) / 255, rel=1e-5)


class Reader:
    def __init__(self, feeds) -> None:
        self.left = iter(feeds)

    def get_next(self):
        return next(self.left, None)


class Loader:
    """A torch DataLoader that shuffles: each iteration has another order."""

    def __init__(self, batches) -> None:
        self.batches, self.rng = batches, np.random.default_rng(0)

    def __iter__(self):
        return iter([self.batches[n] for n in self.rng.permutation(len(self.batches))])


class Tensor:
    """What a tensor of PyTorch offers, one that requires gradients."""

    def __init__(self, values) -> None:
        self.values, self.shape, self.ndim = values, values.shape, values.ndim

    def detach(self):
        return Tensor(self.values)

    def cpu(self):
        return self.values

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def __iter__(self):
        return (Tensor(x) for x in self.values)

    def __len__(self):
        return len(self.values)


STATES = [Input("x", F, ("B", 6)), Input("h", F, (2, "B", 3)), Input("rate", np.dtype(np.int64), ())]


def steps(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.standard_normal((n + 1, 6)).astype(np.float32),
            "h": rng.standard_normal((2, n + 1, 3)).astype(np.float32),
            "rate": np.array(16000),
        }
        for n in range(count)
    ]


def stored(folder, feeds):
    folder.mkdir()
    for n, feed in enumerate(feeds):
        np.savez(folder / f"{n:03}.npz", **feed)
    return folder


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda f, _: f, id="list"),
        pytest.param(lambda f, _: iter(f), id="iterator"),
        pytest.param(lambda f, _: Reader(f), id="reader"),
        pytest.param(lambda f, _: [tuple(one.values()) for one in f], id="batches"),
        pytest.param(lambda f, _: [{k: Tensor(x) for k, x in one.items()} for one in f], id="tensors"),
        pytest.param(lambda f, _: [[Tensor(x) for x in one.values()] for one in f], id="batches of tensors"),
        pytest.param(stored, id="folder of .npz"),
        pytest.param(lambda f, _: type("Nncf", (), {"get_inference_data": lambda self: f})(), id="nncf.Dataset"),
    ],
)
def test_every_source_of_feeds_leaves_them_alone(source, tmp_path):
    feeds = steps()
    made = source(tmp_path / "d", feeds) if source is stored else source(feeds, tmp_path)
    data = open_data(made, STATES)
    for _ in range(2):
        assert same(list(data), feeds)


def test_a_folder_of_npy_files_serves_a_single_input(tmp_path):
    for n in range(3):
        np.save(tmp_path / f"{n}.npy", np.full((2 + n, 1, 3), n, np.float32))
    data = open_data(tmp_path, [Input("x", F, ("T", "B", 3))], labels=np.arange(3))
    assert [feed["x"].shape[0] for feed in data] == [2, 3, 4] and data.size == 3
    with pytest.raises(OnnxqError, match="fit a model with one input"):
        open_data(tmp_path, STATES)


X = np.arange(24, dtype=np.float32).reshape(8, 3)
OPEN, SINGLE = [Input("x", F, ("N", 3))], [Input("x", F, (1, 3))]


@pytest.mark.parametrize(("inputs", "rows"), [(OPEN, [4, 4]), (SINGLE, [1] * 8)])
@pytest.mark.parametrize("labelled", [False, True])
def test_batches_of_a_loader(inputs, rows, labelled):
    y = np.arange(8)
    batches = [[X[n : n + 4], y[n : n + 4]][: 1 + labelled] for n in (0, 4)]
    data = open_data(Loader(batches), inputs)
    feeds, labels = data.spread(0), data.spread_labels(0)
    assert [len(feed["x"]) for feed in feeds] == rows
    if labelled:  # each row keeps its label, although the loader shuffles
        for feed, own in zip(feeds, labels, strict=True):
            np.testing.assert_array_equal(feed["x"][:, 0], 3 * own)
    else:
        assert labels is None


@pytest.mark.parametrize(("inputs", "rows"), [(OPEN, [4, 4]), (SINGLE, [1] * 8)])
def test_batches_of_mappings_with_labels(inputs, rows):
    """As loaders of Olive and Keras give them; what they hold beside the inputs is left out."""
    batches = [({"x": X[n : n + 4], "more": X[:4]}, np.arange(n, n + 4)) for n in (0, 4)]
    data = open_data(Loader(batches), inputs)
    assert [len(feed["x"]) for feed in data.spread(0)] == rows
    for feed, own in zip(data.spread(0), data.spread_labels(0), strict=True):
        np.testing.assert_array_equal(feed["x"][:, 0], 3 * own)
    assert [feed["x"].shape for feed in open_data([({"x": X[:2]}, 0)], OPEN)] == [(2, 3)]
    with pytest.raises(OnnxqError, match="no array for the model's input 'x'"):
        list(open_data([({"y": X}, np.arange(8))], OPEN))


@pytest.mark.parametrize("targets", [np.full((4, 2), 1), np.full(4, 0.5), np.full(4, -100)])
def test_targets_that_are_no_classes_are_ignored_aloud(targets):
    data = open_data([(X[:4], targets), (X[4:], targets)], OPEN)
    assert data.labels is None and [len(feed["x"]) for feed in data] == [4, 4]
    assert "give labels" in data.notes[0]


def test_classes_that_the_model_does_not_have_are_ignored_unless_given():
    net = Net(["N", 3])
    model = net.model(net.gemm("x", 3, 5))
    batches = [(X[:4], np.arange(4) + 9), (X[4:], np.arange(4))]
    result = quantize(model, "int8", batches, workers=1)
    assert any("ignored: label 9 of sample 0" in note for note in result.report["notes"]) and result.data.labels is None
    with pytest.raises(OnnxqError, match="label 9 of sample 0"):
        quantize(model, "int8", batches, labels=np.arange(8) + 9, workers=1)
    assert quantize(model, "int8", batches[1:], workers=1).data.labels.tolist() == [0, 1, 2, 3]


def test_as_many_arrays_as_inputs_are_no_labels():
    inputs = [*OPEN, Input("n", np.dtype(np.int64), ("N",))]
    (feed,) = open_data([(X, np.arange(8))], inputs)
    np.testing.assert_array_equal(feed["n"], np.arange(8))
    with pytest.raises(OnnxqError, match="batch of 4 arrays does not fit the model's inputs 'x', 'n'"):
        list(open_data([(X, X, X, X)], inputs))


@pytest.mark.parametrize("labels", [np.arange(8), np.array([0, 4])])
def test_labels_are_per_row_or_per_feed(labels):
    data = open_data([{"x": X[:4]}, {"x": X[4:]}], OPEN, labels=labels)
    assert [one.tolist() for one in data.spread_labels(0)] == [part.tolist() for part in np.array_split(labels, 2)]
    with pytest.raises(OnnxqError, match="8 samples and 5 labels"):
        open_data([{"x": X[:4]}, {"x": X[4:]}], OPEN, labels=np.arange(5)).spread_labels(0)


def test_labels_of_the_samples_that_are_used():
    for feeds, labels in (
        ([{"x": X[:4]}, {"x": X[4:]}], np.arange(8)),
        ([{"x": X[n : n + 4]} for n in (0, 4)], np.array([0, 4])),
    ):
        data = open_data(feeds, OPEN, DataOptions(samples=1), labels)
        assert [one.tolist() for one in data.spread_labels(0)] == [labels[: len(labels) // 2].tolist()]


def test_optional_inputs_may_be_left_out_of_some_feeds():
    inputs = [*OPEN, Input("gain", F, (1,), optional=True)]
    feeds = [{"x": X[:1]}, {"x": X[1:2], "gain": np.ones(1, np.float32)}]
    assert same(list(open_data(feeds, inputs)), feeds)
    open_data(feeds, inputs).remarks()
    assert same(list(open_data(X[:2], inputs)), [{"x": X[:1]}, {"x": X[1:2]}])


def test_a_default_may_be_overridden_in_every_command(onnxq):
    """A gain that callers may leave out: calibrated, compared and audited with it and without."""
    net = Net(["N", 8])
    y = net.linear(net.op("Mul", net.linear("x", 8, 8), "gain"), 8, 4)
    net.constants.append(onnx.numpy_helper.from_array(np.array([2.0], np.float32), "gain"))
    model = net.model(y)
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, [1]))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 8)).astype(np.float32)} for _ in range(8)]
    feeds += [{**feed, "gain": np.array([9], np.float32)} for feed in feeds]
    result = quantize(model, "int8", feeds, workers=1)
    assert [i.name for i in result.model.graph.input] == ["x", "gain"]
    default = quantize(model, "int8", feeds[:8], workers=1)
    read = result.graph.layers[1].input
    assert float(result.plan[read].scale) > 4 * float(default.plan[read].scale)
    onnx.save(model, "m.onnx"), onnx.save(result.model, "q.onnx")
    np.savez("d.npz", x=np.concatenate([feed["x"] for feed in feeds]))
    for command in (["compare", "m.onnx", "q.onnx", "--data", "d.npz"], ["audit", "q.onnx", "--against", "m.onnx"]):
        assert onnxq(*command)[0] == 0


@pytest.mark.parametrize(
    ("feed", "phrase"),
    [
        ({"x": X, "h": X}, "no array for the model's input 'rate'"),
        ({**steps(1)[0], "rate": np.float32(1)}, "'rate' wants int64, the data is float32; convert it with"),
        ({**steps(1)[0], "h": np.zeros((3, 1, 3), np.float32)}, r"'h' wants shape \[2, B, 3\], the data has \[3, 1, 3\]"),
        ({**steps(1)[0], "x": np.full((1, 6), np.nan, np.float32)}, "'x' has NaN"),
        ({**steps(1)[0], "x": [[1.0], [2.0, 3.0]]}, "'x': a list cannot become an array"),
        ({**steps(1)[0], "x": np.array([["a"] * 6])}, "'x' wants float32, the data is <U1"),
    ],
)
def test_feeds_that_are_wrong_get_one_sentence(feed, phrase):
    with pytest.raises(OnnxqError, match=phrase):
        list(open_data([feed], STATES))


def test_the_float_model_is_blamed_only_after_it_failed():
    """x + y is run with axes that do not match: no declared shape could tell."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in "xy"]
    nodes = [helper.make_node("Add", ["x", "y"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["z"])]
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "g", ports, [helper.make_empty_tensor_value_info("z")], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feed = {"x": np.ones((2, 4), np.float32), "y": np.ones((3, 4), np.float32)}
    with pytest.raises(OnnxqError, match=r"sample 0: onnxruntime .*check that the float model runs on it"):
        quantize(model, "int8", [feed], workers=1)
    with pytest.raises(OnnxqError) as error:
        runtimes.session(model).run(None, feed)
    assert "float model" not in str(error.value)
