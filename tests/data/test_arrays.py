"""Arrays with the samples in front: what each axis means follows from the declared shapes of all inputs."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, open_data
from onnxq_plugins.data import DataOptions, Input

F = np.dtype(np.float32)


def inputs(**shapes) -> list[Input]:
    return [Input(name, F, shape) for name, shape in shapes.items()]


def filled(**shapes) -> dict[str, np.ndarray]:
    """Arrays whose values tell where they came from."""
    return {name: np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}


FORMS = [
    pytest.param({"x": ("N", 3)}, {"x": (6, 3)}, {"x": (1, 3)}, 6, id="rows"),
    pytest.param({"x": (1, 3)}, {"x": (6, 3)}, {"x": (1, 3)}, 6, id="batch of one"),
    pytest.param({"x": ("N", 3)}, {"x": (6, 1, 3)}, {"x": (1, 3)}, 6, id="one axis more"),
    pytest.param({"x": ("N", 3)}, {"x": (6, 4, 3)}, {"x": (4, 3)}, 6, id="feeds of four rows"),
    pytest.param({"x": ("T", "B", 8)}, {"x": (6, 40, 1, 8)}, {"x": (40, 1, 8)}, 6, id="sequences, time first"),
    pytest.param({"x": (54,)}, {"x": (6, 54)}, {"x": (54,)}, 6, id="no batch axis"),
    pytest.param({"x": (40, 5)}, {"x": (40, 5)}, {"x": (40, 5)}, 1, id="one sample without batch"),
    pytest.param({"x": ()}, {"x": (6,)}, {"x": ()}, 6, id="scalars"),
    pytest.param({"x": ()}, {"x": ()}, {"x": ()}, 1, id="one scalar"),
    pytest.param({"x": ("n", "n")}, {"x": (5, 5)}, {"x": (5, 5)}, 1, id="a square has one size"),
    pytest.param({"x": ("n", "n")}, {"x": (6, 5, 5)}, {"x": (5, 5)}, 6, id="squares"),
    pytest.param({"x": None}, {"x": (6, 3, 4)}, {"x": (1, 3, 4)}, 6, id="unknown rank"),
    pytest.param(
        {"x": ("B", 64), "h": (2, "B", 8), "rate": ()},
        {"x": (6, 1, 64), "h": (6, 2, 1, 8), "rate": (6,)},
        {"x": (1, 64), "h": (2, 1, 8), "rate": ()},
        6,
        id="states and a scalar",
    ),
    pytest.param(
        {"x": ("B", 64), "h": (2, "B", 8)}, {"x": (5, 64), "h": (2, 5, 8)}, {"x": (5, 64), "h": (2, 5, 8)}, 1, id="one batch"
    ),
    pytest.param(
        {"x": ("B", 64), "h": (2, "B", 8)},
        {"x": (5, 64), "h": (2, 1, 8)},
        {"x": (1, 64), "h": (2, 1, 8)},
        5,
        id="same state",
    ),
    pytest.param(
        {"x": ("B", "T"), "length": ("B",), "scales": (3,)},
        {"x": (6, 12), "length": (6,), "scales": (6, 3)},
        {"x": (1, 12), "length": (1,), "scales": (3,)},
        6,
        id="scales for each sample",
    ),
    pytest.param(
        {"x": ("B", "T"), "length": ("B",), "scales": (3,)},
        {"x": (6, 12), "length": (6,), "scales": (3,)},
        {"x": (1, 12), "length": (1,), "scales": (3,)},
        6,
        id="scales for all samples",
    ),
    pytest.param(
        {"nodes": ("N", 7), "edges": (2, "E")},
        {"nodes": (9, 7), "edges": (2, 30)},
        {"nodes": (9, 7), "edges": (2, 30)},
        1,
        id="one network of nodes and edges",
    ),
    pytest.param(
        {"q": ("Q", 8), "k": ("K", 8)}, {"q": (4, 8), "k": (9, 8)}, {"q": (4, 8), "k": (9, 8)}, 1, id="unlike lengths"
    ),
    pytest.param({"a": (3,), "b": (3, 3)}, {"a": (3,), "b": (3, 3)}, {"a": (3,), "b": (3, 3)}, 1, id="as they are"),
    pytest.param({"a": (3,), "b": (3, 3)}, {"a": (3, 3), "b": (3, 3, 3)}, {"a": (3,), "b": (3, 3)}, 3, id="stacked thrice"),
]


@pytest.mark.parametrize(("declared", "shapes", "feed", "count"), FORMS)
def test_the_first_axis_counts_samples_where_declared_shapes_allow(declared, shapes, feed, count):
    arrays = filled(**shapes)
    data = open_data(arrays, inputs(**declared))
    feeds = list(data)
    assert len(feeds) == data.size == count
    assert [{name: x.shape for name, x in one.items()} for one in feeds] == [feed] * count
    for name, whole in arrays.items():
        values = np.concatenate([one[name].ravel() for one in feeds])
        same = np.array_equal(values, whole.ravel()) or np.array_equal(values, np.tile(whole.ravel(), count))
        assert same  # nothing is lost, moved or made up


@pytest.mark.parametrize(
    ("declared", "shapes", "note"),
    [
        ({"x": ("T", "B", 8)}, {"x": (40, 1, 8)}, "the model calls it 'T'"),
        ({"x": ("N", 8)}, {"x": (40, 8)}, ""),
        ({"x": ("batch_size", "time", 8)}, {"x": (40, 5, 8)}, ""),
        ({"x": (None, None, 8)}, {"x": (40, 5, 8)}, ""),
        ({"x": (40, 5)}, {"x": (40, 5)}, "was read as one sample"),
        ({"x": (54,)}, {"x": (54,)}, ""),
        ({"x": None}, {"x": (6, 3)}, "rank of the input is unknown"),
        ({"x": ("B", 8), "scales": (3,)}, {"x": (6, 8), "scales": (3,)}, "each of the 6 samples has the same 'scales'"),
        ({"x": ("n", "n")}, {"x": (5, 5)}, "was read as one sample"),
    ],
)
def test_what_was_guessed_is_said(declared, shapes, note):
    notes = " ".join(open_data(filled(**shapes), inputs(**declared)).notes)
    assert note in notes and bool(note) == bool(notes)


def test_rows_for_a_fixed_batch_are_assembled_and_labels_with_them():
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    data = open_data({"x": x, "labels": np.arange(6)}, inputs(x=(4, 3)))
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in data]), x[[0, 1, 2, 3, 4, 5, 4, 5]])
    np.testing.assert_array_equal(np.concatenate(data.spread_labels(0)), [0, 1, 2, 3, 4, 5, 4, 5])
    assert data.size == 2 and "batches of 4" in data.notes[0]


@pytest.mark.parametrize(
    ("declared", "shapes", "phrase"),
    [
        ({"x": ("B", 3), "y": ("B", 3)}, {"x": (6, 3), "y": (5, 3)}, "differ in their number of samples"),
        ({"x": (3,), "y": (3,)}, {"x": (6, 3), "y": (5, 3)}, "differ in their number of samples"),
        ({"x": ("B", 3)}, {"x": (0, 3)}, "is empty"),
        ({"x": (54,)}, {"x": (53,)}, r"wants shape \[54\], the data has \[53\]"),
        ({"x": ("B", 3)}, {"x": (6, 4)}, r"wants shape \[B, 3\], the data has \[1, 4\]"),
        ({"x": (2, 3), "h": (2, 8)}, {"x": (2, 3), "h": (2, 7)}, r"'h' wants shape \[2, 8\]"),
    ],
)
def test_arrays_that_fit_no_reading_get_one_sentence(declared, shapes, phrase):
    with pytest.raises(OnnxqError, match=phrase):
        list(open_data(filled(**shapes), inputs(**declared)))


def test_samples_are_spread_over_what_is_in_front():
    data = open_data(filled(x=(8, 40, 1, 3)), inputs(x=("T", "B", 3)), DataOptions(samples=4), labels=np.arange(8))
    assert data.size == 4 and [feed["x"].shape for feed in data] == [(40, 1, 3)] * 4
    assert [int(one[0]) for one in data.spread_labels(0)] == [0, 2, 4, 6]


class Table:
    """What a DataFrame of pandas offers."""

    def __init__(self, **columns) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return self._columns[name]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("columns have types of their own")

    def to_numpy(self):
        return self.__array__()


def test_columns_of_a_table_serve_the_inputs_of_their_names():
    table = Table(age=np.arange(5), name=np.array(list("abcde"), object), width=np.linspace(0, 1, 5), unused=np.ones(5))
    wanted = [Input("age", F, (None, 1)), Input("name", np.dtype(object), (None, 1)), Input("width", F, (None,))]
    feeds = list(open_data(table, wanted))
    assert [feed["age"].tolist() for feed in feeds] == [[[n]] for n in range(5)]
    assert [feed["name"].tolist() for feed in feeds] == [[[c]] for c in "abcde"]
    assert feeds[0]["width"].shape == (1,) and feeds[0]["age"].dtype == F
    (feed,) = open_data(Table(a=np.arange(1), b=np.ones(1), labels=np.array([3])), inputs(x=(None, 2)))
    assert feed["x"].tolist() == [[0, 1]]
    with pytest.raises(OnnxqError, match="no column 'height'"):
        open_data(table, [*wanted, Input("height", F, (None, 1))])
