"""Models with external data: weights stay in their files, and the output is written constant by constant. The same code
runs at any size, so most of it is tested on small models with lower limits."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.large import chain, limit, measured
from onnxq_plugins import OnnxqError, files, quantize, runtimes
from onnxq_plugins.files import DataFile, origin
from onnxq_plugins.graph import load
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.report import summary
from tests import zoo

WEIGHTS = {"weights": {"bits": 4, "block": 32}, "activations": {"bits": 32}}
EIGHT = {"weights": {"bits": 8, "block": 32}, "activations": {"bits": 32}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so low that small models are large."""
    monkeypatch.setattr(MappedWeights, "least", 64)
    monkeypatch.setattr(files, "LARGE", 0)
    monkeypatch.setattr(DataFile, "least", 64)


def outside(model: onnx.ModelProto, folder: Path) -> Path:
    """The model with its weights as external data."""
    path = folder / "float.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


def answers(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return runtimes.session(path).run(None, feed)


@pytest.mark.parametrize(
    ("name", "recipe"),
    zoo.some(
        itertools.product(
            ["mlp", "cnn", "transformer", "conv_transpose", "control_flow", "no_layer"],
            ["int8", "weights", "eight", "storage"],
        ),
        *[("transformer", "weights"), ("transformer", "storage"), ("mlp", "eight"), ("mlp", "weights"), ("cnn", "int8")],
        *[("conv_transpose", "storage"), ("conv_transpose", "int8"), ("control_flow", "int8"), ("no_layer", "eight")],
    ),
)
def test_a_streamed_output_computes_what_one_in_memory_does(small: None, tmp_path: Path, name: str, recipe: str) -> None:
    model = zoo.ZOO[name]()
    data = zoo.feeds(model, 3)
    storage = {"target": "storage", "activations": {"bits": 32}}
    table = {"weights": WEIGHTS, "eight": EIGHT, "storage": storage}.get(recipe, recipe)
    wanted = quantize(model, table, data)
    result = quantize(outside(model, tmp_path), table, data, output=tmp_path / "q.onnx")
    for a, b in zip(zoo.run(wanted.model, data[0]), answers(tmp_path / "q.onnx", data[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert result.report["kernels"] == wanted.report["kernels"]
    assert result.report["bits_per_weight"] == wanted.report["bits_per_weight"]
    assert not [f for f in os.listdir(tmp_path) if f.startswith(".")]


def test_weights_in_files_equal_weights_in_memory(small: None, tmp_path: Path) -> None:
    model = zoo.mlp()
    inside, mapped = load(model), load(outside(model, tmp_path))
    assert mapped.mapped.arrays and not inside.mapped.arrays
    assert inside.digest() == mapped.digest()
    feed = zoo.feeds(model, 1)[0]
    for graph in (mapped, mapped.copy()):
        np.testing.assert_array_equal(zoo.run(inside, feed)[0], zoo.run(graph, feed)[0])
    mapped.mapped.release()
    assert inside.digest() == mapped.digest()


def test_sessions_map_weights_that_lie_in_files(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was changed in memory is handed over beside them."""
    graph = load(outside(zoo.cnn(), tmp_path))
    first, second = (layer.weight for layer in graph.layers[:2])
    file, start = origin(graph.constant(second)) or (None, -1)
    assert file == (tmp_path / "weights").resolve() and start >= 0
    stored = np.fromfile(file, np.float32, graph.constant(second).size, offset=start)
    np.testing.assert_array_equal(stored, graph.constant(second).ravel())
    assert origin(graph.constant(second).T) is None  # its order is another one
    graph.set_constant(first, graph.constant(first) * np.float32(2))
    assert origin(graph.constant(first)) is None
    found = []
    for least in (2**60, 0):
        monkeypatch.setattr(files, "LARGE", least)
        weights: dict[str, np.ndarray] = {}
        found.append(runtimes.session(graph.model(weights), weights=weights).run(None, zoo.feeds(zoo.cnn(), 1)[0])[0])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)  # kernels differ with packed weights


def test_external_data_of_the_wrong_size_is_told(small: None, tmp_path: Path) -> None:
    path = outside(zoo.mlp(), tmp_path)
    data = tmp_path / "weights"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(OnnxqError, match="cannot be read"):
        load(path)


def test_data_has_a_name_of_its_own_and_earlier_data_give_way(small: None, tmp_path: Path) -> None:
    path, output = outside(zoo.mlp(), tmp_path), tmp_path / "out" / "q.onnx"
    output.parent.mkdir()
    (output.parent / "q.onnx.data").touch()  # not ours
    names = []
    for recipe in (WEIGHTS, EIGHT, WEIGHTS):
        quantize(path, recipe, output=output)
        names.append({f.name for f in output.parent.iterdir()} - {"q.onnx", "q.onnx.data"})
        assert len(names[-1]) == 1 and (output.parent / "q.onnx.data").exists()
        locations = {
            e.value
            for t in onnx.load(output, load_external_data=False).graph.initializer
            for e in t.external_data
            if e.key == "location"
        }
        assert locations == names[-1]
    assert names[0] == names[2] != names[1]


def test_two_runs_write_the_same_bytes(small: None, tmp_path: Path) -> None:
    path = outside(zoo.mlp(), tmp_path)
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quantize(path, WEIGHTS, output=tmp_path / name / "q.onnx")
        made.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


def test_a_failed_run_leaves_no_data(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = outside(zoo.mlp(), tmp_path)
    (tmp_path / "out").mkdir()

    def fails(*args: object, **more: object) -> None:
        raise OnnxqError("no.")

    monkeypatch.setattr(summary, "audit_model", fails)
    with pytest.raises(OnnxqError):
        quantize(path, WEIGHTS, output=tmp_path / "out" / "q.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_a_streamed_result_is_not_saved_again_without_its_data(small: None, tmp_path: Path) -> None:
    result = quantize(outside(zoo.mlp(), tmp_path), WEIGHTS, output=tmp_path / "q.onnx")
    with pytest.raises(OnnxqError, match="copy both"):
        result.save(tmp_path / "again.onnx")


def test_a_model_too_large_for_a_message_is_saved_with_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one above 2 GB is."""
    model = zoo.mlp()
    result = quantize(model, "int8", zoo.feeds(model, 3))
    before = result.model.SerializeToString()
    monkeypatch.setattr(files, "LARGEST_MESSAGE", 100)
    monkeypatch.setattr(DataFile, "least", 64)
    result.save(tmp_path / "q.onnx")
    assert len(list(tmp_path.glob("q.onnx.*.data"))) == 1
    assert result.model.SerializeToString() == before
    monkeypatch.undo()
    feed = zoo.feeds(model, 1)[0]
    for a, b in zip(zoo.run(result.model, feed), answers(tmp_path / "q.onnx", feed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_onnxruntime_maps_a_large_model_that_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from a copy of all its bytes; the model stays as it is."""
    model = zoo.mlp()
    before, feed = model.SerializeToString(), zoo.feeds(model, 1)[0]
    monkeypatch.setattr("onnxq_plugins.runtimes.sessions._IN_MEMORY", 100)
    runner = runtimes.session(model)
    assert model.SerializeToString() == before
    for a, b in zip(runner.run(None, feed), zoo.run(model, feed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_size_of_counts_what_a_file_holds() -> None:
    for name in ("mlp", "cnn", "control_flow"):
        model = zoo.ZOO[name]()
        assert abs(files.size_of(model) - model.ByteSize()) < 0.05 * model.ByteSize() + 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "kernels"),
    [
        ("4", "12/12 MatMul as MatMulNBits"),
        ("8", "12/12 MatMul as MatMulNBits"),
        ("calibrated", "12/12 MatMul as 11 QLinearMatMul"),
    ],
)
def test_three_gigabytes_need_little_memory(tmp_path: Path, run: str, kernels: str) -> None:
    model = chain(tmp_path, 12, 8192)
    peak, own, _, summary = measured(model, run)
    assert (own if run == "calibrated" else peak) < limit(8192)
    assert kernels in summary
    feed = {"x": np.random.default_rng(1).standard_normal((1, 8192), dtype=np.float32)}
    assert np.isfinite(answers(tmp_path / "q.onnx", feed)[0]).all()
