"""Every kind of source gives the same samples."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, open_data, quantize
from onnxq_plugins.data import DataOptions, Input
from tests.zoo import Net, feeds

X = Input("x", np.dtype(np.float32), (None, 3))


def rows(data) -> np.ndarray:
    return np.concatenate([feed["x"] for feed in data])


VALUES = np.arange(18, dtype=np.float32).reshape(6, 3)


class Reader:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self) -> None:
        self.left = iter(VALUES)

    def get_next(self):
        row = next(self.left, None)
        return None if row is None else {"x": row[None]}


class Rewinding(Reader):
    def rewind(self) -> None:
        self.left = iter(VALUES)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: VALUES, id="array"),
        pytest.param(lambda: VALUES.astype(np.float64), id="float64"),
        pytest.param(lambda: {"x": VALUES}, id="mapping"),
        pytest.param(lambda: {"anything": VALUES}, id="single array"),
        pytest.param(lambda: [{"x": row[None]} for row in VALUES], id="list of feeds"),
        pytest.param(lambda: [row[None] for row in VALUES], id="list of arrays"),
        pytest.param(lambda: ({"x": row[None]} for row in VALUES), id="generator"),
        pytest.param(lambda: [{"x": row[None], "label": 1} for row in VALUES], id="more than needed"),
        pytest.param(Reader, id="reader"),
        pytest.param(Rewinding, id="rewinding reader"),
    ],
)
def test_sources_give_single_samples_every_time(source):
    data = open_data(source(), [X])
    for _ in range(2):
        assert [feed["x"].shape for feed in data] == [(1, 3)] * 6
        assert all(feed["x"].dtype == np.float32 and set(feed) == {"x"} for feed in data)
        np.testing.assert_array_equal(rows(data), VALUES)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_files_of_arrays(tmp_path, suffix):
    (np.save if suffix == ".npy" else np.savez)(tmp_path / f"data{suffix}", VALUES)
    np.testing.assert_array_equal(rows(open_data(tmp_path / f"data{suffix}", [X])), VALUES)


@pytest.mark.parametrize(("count", "numbers"), [(0, range(6)), (2, [0, 3]), (3, [0, 2, 4]), (6, range(6)), (9, range(6))])
def test_samples_are_spread_evenly(count, numbers):
    data = open_data(VALUES, [X], DataOptions(samples=count))
    np.testing.assert_array_equal(rows(data), VALUES[list(numbers)])
    assert data.size == len(numbers)


def test_several_inputs():
    inputs = [X, Input("length", np.dtype(np.int64), (None,))]
    data = open_data({"x": VALUES, "length": np.arange(6)}, inputs)
    assert [int(feed["length"][0]) for feed in data] == list(range(6))
    with pytest.raises(OnnxqError, match=r"differ in their number of samples.*'length': 5"):
        open_data({"x": VALUES, "length": np.arange(5)}, inputs)
    with pytest.raises(OnnxqError, match="no array for the model's input 'length'"):
        open_data({"x": VALUES}, inputs)


@pytest.mark.parametrize("source", [None, 5, object()])
def test_unsupported_sources(source):
    with pytest.raises(OnnxqError, match="is not supported"):
        open_data(source, [X])


def test_digest_distinguishes_data():
    one, same, other = (open_data(values, [X]).digest() for values in (VALUES, VALUES.copy(), VALUES + 1))
    assert one == same != other


def test_quantize_with_a_calibration_data_reader_of_a_fixed_batch():
    net = Net([4, 3, 12, 12])
    model = net.model(net.head(net.op("Relu", net.conv("x", 3, 8)), 8))

    images = np.concatenate([feed["x"] for feed in feeds(model, 1)])

    class Batches:
        def __init__(self) -> None:
            self.left = [{"x": images}, {"x": images * 2}]

        def get_next(self):
            return self.left.pop() if self.left else None

    result = quantize(model, "int8", Batches(), workers=1)
    both = np.concatenate([images, images * 2])
    assert float(result.plan["x"].scale) == pytest.approx((both.max() - both.min()) / 255, rel=1e-5)
