"""Broken inputs of every kind: a result, or one sentence a problem; never a traceback, half a file, or a native crash."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes
from onnxq_plugins.data import Input, model_inputs, open_data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import load_arrays, save_arrays
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes, load_recipe
from onnxq_plugins.report.curve import point_recipe
from tests import zoo

LINES = ("error: ", "note: ", "float: ", "warning: ")


def examples(n: int) -> settings:
    """The same examples in every run; the generators filter much."""
    return settings(zoo.examples(n), suppress_health_check=list(HealthCheck))


# ---- models ----------------------------------------------------------------------------------------------------------


def batch(folder: Path, first: int, count: int) -> None:
    """Run broken models in a process of their own and hold each to the law."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutate", str(folder), str(first), str(count)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"broken model {lines[-1][:40]} took the process with it ({done.returncode}): {done.stderr[-800:]}"
    )
    found = [json.loads(line) for line in lines[1::2]]
    assert len(found) == count
    for one in found:
        told = [line for line in one["stderr"].splitlines() if line.strip()]
        if one["code"] == 0:
            assert one["left"] == ["made.onnx"] and one["runs"], one
        else:
            assert one["code"] == 2, one
            assert not one["left"], one
            assert told and all(line.startswith(LINES) for line in told), one
            assert any(line.startswith("error: ") and line.rstrip().endswith(".") for line in told), one
        assert one["grew"] < 600, one  # MB
    assert {one["code"] for one in found} == {0, 2}  # otherwise the mutations are too strong, or too weak


def test_broken_models_end_with_a_result_or_a_sentence(tmp_path: Path) -> None:
    batch(tmp_path, 0, 40)


def test_runtimes_write_nothing_on_standard_error(tmp_path: Path) -> None:
    """numpy warned of one of these, onnxruntime logged the other's failure beside the sentence."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutate", str(tmp_path), "1986", "1", "3466", "1"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    for one in map(json.loads, done.stdout.splitlines()[1::2]):
        assert one["code"] in (0, 2)
        assert all(line.startswith(LINES) for line in one["stderr"].splitlines() if line), one


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 5000, 400))
def test_many_broken_models(tmp_path: Path, first: int) -> None:
    batch(tmp_path, first, 400)


def broken(model: onnx.ModelProto, **more: object) -> str:
    """The complaint about a model."""
    with pytest.raises(OnnxqError) as caught:
        onnxq.quantize(model, "int8", zoo.feeds(model, 2), **more)
    assert all("\n" not in problem and problem for problem in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize("place", ["a\0b", "x" * 5000, "", ".", "nowhere.bin"])
def test_external_data_at_a_place_that_cannot_be(tmp_path: Path, place: str) -> None:
    model = zoo.mlp()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxqError, match="missing") as caught:
        onnxq.load(tmp_path / "m.onnx")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul", "ConvTranspose"])
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (5,), (), (4, 3), (0, 3, 3, 3)])
def test_a_weight_that_does_not_fit_its_layer_is_told(op: str, shape: tuple[int, ...]) -> None:
    image = op.startswith("Conv")
    net = zoo.Net(["N", 6, 9, 9] if image else ["N", 6])
    node = helper.make_node(op, ["x", net.constant(np.ones(shape))], ["y"], "layer")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "g", [net.input], [out], net.constants),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    with pytest.raises(OnnxqError, match=r"layer|not a valid"):
        onnxq.load(model)


def test_a_batchnorm_of_another_width_is_told() -> None:
    model = zoo.mobilenet()
    norm = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
    for tensor in model.graph.initializer:
        if tensor.name in norm.input:
            tensor.CopyFrom(numpy_helper.from_array(np.ones(5, np.float32), tensor.name))
    assert "onnxruntime" in broken(model) or "valid" in broken(model)


def test_an_enormous_constant_is_refused_before_it_is_computed() -> None:
    model = zoo.mlp()
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40], np.int64), "n"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["n"], ["big"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["big"], ["one"], keepdims=0))
    model.graph.node.append(helper.make_node("Mul", [model.graph.output[0].name, "one"], ["out"]))
    model.graph.output[0].name = "out"
    assert "too large" in broken(model)


@pytest.mark.parametrize("op", ["Conv", "Pad"])
def test_sizes_below_zero_are_told(op: str) -> None:
    """onnx's own shape inference aborts the process when it meets a Slice of such a tensor."""
    net = zoo.Net(["N", 3, 4, 4])
    y = (
        net.op("Conv", "x", net.weight(3, 3, 9, 9))
        if op == "Conv"
        else net.op("Pad", "x", net.constant([0, 0, 0, 0, 0, 0, -9, 0], np.int64))
    )
    y = net.op("Slice", y, *(net.constant([v], np.int64) for v in (0, 9, 2)))
    out = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
    with pytest.raises(OnnxqError, match="impossible shape"):
        onnxq.load(
            helper.make_model(
                helper.make_graph(net.nodes, "g", [net.input], [out], net.constants),
                opset_imports=[helper.make_opsetid("", 21)],
                ir_version=10,
            )
        )


def test_a_condition_and_bounds_that_are_no_single_number_are_told() -> None:
    model = zoo.control_flow()
    branch = next(n for n in model.graph.node if n.op_type == "If")
    branch.input[0] = next(n for n in model.graph.node if n.op_type == "Conv").input[1]
    broken(model)
    model = zoo.mobilenet()
    clip = next(n for n in model.graph.node if n.op_type == "Clip")
    clip.input[1] = "low"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "low"))
    assert "Clip" in broken(model)


def test_an_empty_list_as_attribute_is_told() -> None:
    model = zoo.cnn()
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    next(a for a in pool.attribute if a.name == "kernel_shape").ClearField("ints")
    broken(model)


def test_types_that_no_float_model_has_are_told() -> None:
    model = zoo.mlp()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    with pytest.raises(OnnxqError, match="FLOAT8E4M3FN"):
        onnxq.load(model)


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    content = zoo.mlp().SerializeToString().replace(b"gemm2", b"g\xb5mm2")
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(OnnxqError):
        onnxq.load(tmp_path / "m.onnx")


def test_negative_sizes_mean_dynamic_as_in_onnxruntime() -> None:
    model = zoo.mlp()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert model_inputs(model)[0].shape == (None, 13)


def test_a_model_that_fails_when_it_runs_ends_with_a_sentence() -> None:
    net = zoo.Net(["N", 4])
    shape = net.op("Cast", net.op("Slice", "x", *(net.constant([v], np.int64) for v in (0, 1, 0))), to=TensorProto.INT64)
    y = net.op("Reshape", net.op("Relu", "x"), net.op("Reshape", shape, net.constant([-1], np.int64)))
    out = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(net.nodes, "g", [net.input], [out], net.constants),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    with pytest.raises(OnnxqError, match="cannot run") as caught:
        runtimes.session(model).run(None, {"x": np.full((1, 4), 9.0, np.float32)})
    assert len(caught.value.problems) == 1


# ---- recipes ---------------------------------------------------------------------------------------------------------

PASSES = find_plugins().passes
FIELDS = sorted({f for kind in PASSES.values() for f in kind.__dataclass_fields__})
KEYS = [
    "recipe",
    "target",
    "weights",
    "activations",
    "data",
    "pass",
    "layer",
    "use",
    "bits",
    "block",
    "sub_block",
    "match",
    "quantize",
    "samples",
    "mean",
    "path",
    "labels",
    "max_multiplier",
    "",
    *FIELDS,
]
WORDS = ["channel", "tensor", "none", "gptq", "int8", "*", "Conv", "W8A8", "ort-cpu", *PASSES]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 4, 8, 32]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(WORDS),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=8,
)
STEPS = st.builds(
    lambda name, table: {**table, "use": name},
    st.sampled_from(list(PASSES)),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2),
)
TABLES = st.builds(
    lambda table, steps: {**table, **({"pass": steps} if steps else {})},
    st.dictionaries(st.sampled_from(KEYS[:18]), VALUES, max_size=5),
    st.lists(STEPS, max_size=2),
)
MLP = zoo.mlp()


def told(call: object, *args: object) -> object:
    """What a call returns; None if it complains, which is one line a problem."""
    try:
        return call(*args)
    except OnnxqError as error:
        assert error.problems and all(p and len(p.splitlines()) == 1 for p in error.problems), error.problems
        return None


@examples(150)
@given(TABLES)
def test_any_table_is_a_recipe_or_complaints(table: dict[str, object]) -> None:
    told(load_recipe, table, PASSES)


@examples(100)
@given(
    st.sampled_from(sorted(builtin_recipes())),
    st.lists(
        st.one_of(
            st.text(max_size=10),
            st.builds(
                lambda a, b, v: f"{a}.{b}={v}",
                st.sampled_from(["weights", "data", "ranges", ""]),
                st.sampled_from(KEYS),
                SCALARS,
            ),
        ),
        max_size=3,
    ),
)
@example("int8", ["a\nb"])
def test_any_setting_changes_a_recipe_or_is_told(name: str, changes: list[str]) -> None:
    told(load_recipe, name, PASSES, changes)


@examples(60)
@given(st.sampled_from(sorted(builtin_recipes())), st.integers(0, 2**32 - 1), st.sampled_from([".toml", ".json"]))
def test_a_damaged_recipe_file_is_told(tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, suffix: str) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(builtin_recipes()[name].read_bytes())
    if suffix == ".json":
        content = bytearray(json.dumps(tomllib.loads(content.decode())).encode())
    for at in rng.integers(len(content), size=3):
        content[at] = rng.integers(256)
    file = tmp_path_factory.mktemp("recipe") / f"r{suffix}"
    file.write_bytes(content[: rng.integers(1, len(content) + 1)])
    told(load_recipe, file, PASSES)


@examples(25)
@given(
    st.dictionaries(
        st.sampled_from(["weights", "activations"]),
        st.fixed_dictionaries(
            {},
            optional={
                "bits": st.sampled_from([2, 4, 8, 16, 32]),
                "symmetric": st.booleans(),
                "pow2": st.booleans(),
                "block": st.sampled_from(["tensor", "channel", 1, 2, 16, 1000, [2, 0], [0, 0], [1, 16], [3, 3, 3]]),
                "sub_block": st.sampled_from(["none", "channel", 1, 4, [2, 2], [1, 16]]),
                "max_multiplier": st.sampled_from([1, 15, 127]),
            },
        ),
    ),
    st.sampled_from(["ort-cpu", "openvino", "storage", "per-tensor", "npu"]),
)
def test_every_valid_recipe_gives_a_model_or_complaints(table: dict[str, object], target: str) -> None:
    result = told(onnxq.quantize, MLP, {**table, "target": target, "pass": [{"use": "ranges"}]}, zoo.feeds(MLP, 2))
    if result is not None:
        zoo.run(result.model, zoo.feeds(MLP, 1)[0])


@examples(100)
@given(
    st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {"recipe": st.one_of(VALUES, TABLES), "widths": VALUES}, optional={"seed": VALUES, "points": VALUES}
        ),
    )
)
def test_any_point_is_a_recipe_or_told(tmp_path_factory: pytest.TempPathFactory, point: object) -> None:
    file = tmp_path_factory.mktemp("point") / "point-01.json"
    file.write_text(json.dumps(point))
    report = told(point_recipe, file)
    if report is not None:
        told(load_recipe, report[0], PASSES)


# ---- data, labels, caches --------------------------------------------------------------------------------------------

INPUTS = [Input("x", np.dtype(np.float32), (None, 4))]


def read_all(path: Path, labels: Path | None = None) -> int:
    data = open_data(path, INPUTS, labels=labels)
    data.spread_labels(2)
    return sum(1 for _ in data)


@examples(150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([".npz", ".npy"]))
def test_damaged_data_files_are_told(tmp_path_factory: pytest.TempPathFactory, seed: int, suffix: str) -> None:
    rng = np.random.default_rng(seed)
    file = tmp_path_factory.mktemp("data") / f"d{suffix}"
    x = rng.normal(size=(5, 4)).astype(np.float32)
    if suffix == ".npy":
        np.save(file, x)
    else:
        (np.savez_compressed if seed % 2 else np.savez)(file, x=x, labels=np.arange(5))
    content = bytearray(file.read_bytes())
    how = rng.integers(3)
    if how == 0:
        content = content[: rng.integers(len(content))]
    for at in rng.integers(max(len(content), 1), size=4 * how):
        content[at] = rng.integers(256)
    file.write_bytes(content)
    told(read_all, file)


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}, []], object),
        np.array(["a", "b"]),
        np.full((2, 4), np.nan),
        np.zeros((0, 4)),
        np.float32(3),
        np.zeros((3, 5), np.float32),
        np.zeros((2, 4), complex),
        np.zeros(2, [("a", int)]),
        np.array(["2020"], "M8[s]"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_data_of_odd_kinds_are_told(tmp_path: Path, array: np.ndarray, suffix: str) -> None:
    file = tmp_path / f"d{suffix}"
    np.save(file, array) if suffix == ".npy" else np.savez(file, x=array)
    with pytest.raises(OnnxqError) as caught:
        read_all(file)
    assert len(caught.value.problems) == 1 and len(str(caught.value).splitlines()) == 1


def test_a_header_that_promises_more_than_is_there_costs_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "d.npy"
    np.save(file, np.zeros((5, 4), np.float32))
    content = file.read_bytes().replace(b"(5, 4), }          ", b"(5000000000000, 4),}")
    assert content != file.read_bytes()
    file.write_bytes(content)
    assert told(read_all, file) is None
    np.savez(tmp_path / "d.npz", x=np.zeros(1))
    import zipfile

    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", content)
    assert told(read_all, tmp_path / "d.npz") is None


@examples(80)
@given(
    st.one_of(st.binary(max_size=40), st.text("0123456789 .-ex\n#", max_size=20).map(str.encode)),
    st.sampled_from(["l.txt", "l.npy", "l"]),
)
def test_any_labels_file_is_read_or_told(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("labels")
    (folder / name).write_bytes(content)
    np.save(folder / "d.npy", np.zeros((2, 4), np.float32))
    told(read_all, folder / "d.npy", folder / name)


def test_empty_labels_are_told(tmp_path: Path) -> None:
    (tmp_path / "l.txt").touch()
    with pytest.raises(OnnxqError, match=r"labels.*empty"):
        open_data(np.zeros((2, 4), np.float32), INPUTS, labels=tmp_path / "l.txt")


@examples(150)
@given(st.integers(0, 2**32 - 1))
def test_a_damaged_cache_file_counts_as_none(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    file = tmp_path_factory.mktemp("cache") / "c.npz"
    kept = {"a|low": rng.normal(size=3), "b|sum": np.arange(4)}
    save_arrays(file, kept)
    content = bytearray(file.read_bytes())
    if seed % 3 == 0:
        content = content[: rng.integers(len(content))]
    else:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    found = load_arrays(file)
    assert all(np.array_equal(found[k], kept[k]) and found[k].dtype == kept[k].dtype for k in found if k in kept)


def test_a_run_with_a_damaged_cache_equals_one_without(tmp_path: Path) -> None:
    model, data = zoo.cnn(), zoo.feeds(zoo.cnn(), 4)
    wanted = onnxq.quantize(model, "int8", data).model.SerializeToString()
    onnxq.quantize(model, "int8", data, cache=tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert files
    for content in (b"", b"PK\3\4", b"\0" * 1000):
        for file in files:
            file.write_bytes(content)
        assert onnxq.quantize(model, "int8", data, cache=tmp_path).model.SerializeToString() == wanted
