"""Numbers and sentences that users read are about their own files, and true."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxq_plugins import OnnxqError, cli, quantize, runtimes
from tests.zoo import cnn, feeds, mlp, mobilenet, transformer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    latency = runtimes.latency
    monkeypatch.setattr(runtimes, "latency", lambda runners, feed, seconds=1.0: latency(runners, feed, 0.01))


@pytest.fixture
def onnxq(monkeypatch, capsys, tmp_path):
    """The command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnxq", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def padded(model: onnx.ModelProto, size: int = 10_000) -> onnx.ModelProto:
    """The same function in a file that is larger: a constant that nothing reads."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(size, np.float32), "unused"))
    return model


def rows(model: onnx.ModelProto, n: int) -> np.ndarray:
    return np.concatenate([next(iter(feed.values())) for feed in feeds(model, n)])


# ---- size and speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "proto", "external"])
def test_sizes_are_those_of_the_files(kind, tmp_path):
    model, path = padded(mlp()), tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=kind == "external", size_threshold=0, location="weights")
    result = quantize(model if kind == "proto" else path, "int8", feeds(mlp(), 4), workers=1, output=tmp_path / "q.onnx")
    lying = sum(file.stat().st_size for file in tmp_path.iterdir() if file.name != "q.onnx")
    assert result.report["bytes"] == {"float": lying, "quantized": (tmp_path / "q.onnx").stat().st_size}
    assert lying > 40_000


def test_the_report_times_and_judges_against_the_users_own_file(tmp_path, monkeypatch):
    model, path, timed = mlp(), tmp_path / "m.onnx", []
    onnx.save(model, path)
    session = runtimes.session
    monkeypatch.setattr(runtimes, "session", lambda source, **more: timed.append(source) or session(source, **more))
    for given, expected in ((path, path), (model, model)):
        timed.clear()
        result = quantize(given, "int8", feeds(model, 4), workers=1)
        timed.clear()
        result.save_report(tmp_path / "r.html")
        assert any(source is expected or (isinstance(source, Path) and source == expected) for source in timed)
    path.unlink()
    assert quantize(model, "int8", feeds(model, 4)).original is model


def test_a_file_that_is_gone_is_replaced_by_what_was_made_of_it(tmp_path):
    onnx.save(mlp(), tmp_path / "m.onnx")
    result = quantize(tmp_path / "m.onnx", "int8", feeds(mlp(), 4), workers=1)
    assert result.original == tmp_path / "m.onnx"
    (tmp_path / "m.onnx").unlink()
    result.save_report(tmp_path / "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["measured"]["sqnr"] > 10


def test_a_model_that_is_written_over_is_not_taken_for_the_original(tmp_path):
    onnx.save(padded(mlp()), tmp_path / "m.onnx")
    size = (tmp_path / "m.onnx").stat().st_size
    result = quantize(tmp_path / "m.onnx", "int8", feeds(mlp(), 4), workers=1, output=tmp_path / "m.onnx")
    assert result.report["bytes"]["float"] == size and isinstance(result.original, onnx.ModelProto)


def test_half_precision_models_can_be_reported(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(mlp())
    result = quantize(half, "int8", feeds(mlp(), 4), float32=True, workers=1)
    result.save_report(tmp_path / "r.html")
    assert json.loads((tmp_path / "r.json").read_text())["measured"]["sqnr"] > 10


def test_compare_counts_external_data(onnxq):
    onnx.save(mlp(), "a.onnx")
    onnx.save(padded(mlp(), 10**6), "b.onnx", save_as_external_data=True, size_threshold=0, location="weights")
    np.savez("d.npz", x=rows(mlp(), 4))
    code, out, _ = onnxq("compare", "a.onnx", "b.onnx", "--data", "d.npz")
    assert code == 0 and "-> 4.0" in out


# ---- what runs in float ---------------------------------------------------------------------------------------------------


def test_products_of_two_activations_that_stay_float_are_told(onnxq):
    model = transformer()
    products = {
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not {t.name for t in model.graph.initializer} & set(node.input)
    }
    onnx.save(model, "m.onnx")
    name = model.graph.input[0].name
    np.savez("d.npz", **{name: rows(model, 4)})
    code, out, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "q.onnx")
    assert code == 0 and f"{len(products)} products of two activations stay float" in out
    assert f"products of two activations that run in float: {len(products)}, " in err and "% of the multiply-adds" in err
    _, out, _ = onnxq("audit", "q.onnx")
    assert out.count('[[layer]] op = "Attention" quantize = true') == len(products)
    Path("r.toml").write_text('[[layer]]\nop = "Attention"\nquantize = true\n')
    _, out, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-r", "r.toml", "-o", "q2.onnx")
    assert "product" not in out + err


def test_the_share_of_products_is_that_of_a_run():
    from onnxq_plugins.graph import load
    from onnxq_plugins.search.quantizers import multiply_adds, share_of_work

    model = transformer()
    graph, feed = load(model), feeds(model, 1)[0]
    products = [n for n in graph.nodes if n.op == "MatMul" and not any(graph.is_constant(t.name) for t in n.inputs)]
    layers = sum(multiply_adds(graph, feed).values())
    shown = graph.model()
    del shown.graph.output[:]
    wanted = [name for n in products for name in (n.inputs[0].name, n.outputs[0].name)]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    ran = dict(zip(wanted, runtimes.session(shown).run(None, feed), strict=True))
    work = sum(ran[n.inputs[0].name].shape[-1] * ran[n.outputs[0].name].size for n in products)
    assert products and share_of_work(graph, [n.name for n in products]) == pytest.approx(work / (work + layers))
    assert share_of_work(graph, []) == 0 and share_of_work(graph, ["no such node"]) is None


# ---- labels ---------------------------------------------------------------------------------------------------------------


def labelled(n: int = 40, wrong: bool = False) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """A model, samples, and what the model says of them, or never says."""
    model = mlp()
    outputs = runtimes.outputs(runtimes.session(model), feeds(model, n))[0]
    return model, rows(model, n), outputs.argmin(-1) if wrong else outputs.argmax(-1)


@pytest.mark.parametrize("command", ["quantize", "auto", "compare"])
@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (
            lambda y, n: np.where(np.arange(len(y)) == 3, n, y),
            "label {n} of sample 3, but output '{out}' has {n} classes, 0..{m}",
        ),
        (lambda y, n: y * 0 + n, "count from 1: subtract 1"),
        (lambda y, n: np.where(np.arange(len(y)) == 3, -1, y), "label -1"),
        (lambda y, n: np.eye(n)[y], "one-hot"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_any_output(onnxq, command, spoil, phrase):
    model, x, y = labelled()
    shape = runtimes.session(model).get_outputs()[0]
    onnx.save(model, "m.onnx")
    np.save("y.npy", spoil(y, shape.shape[-1]))
    np.savez("d.npz", x=x)
    given = {"quantize": ["-o", "q.onnx"], "auto": ["-o", "q.onnx"], "compare": ["m.onnx"]}[command]
    code, out, err = onnxq(command, "m.onnx", *given, "--data", "d.npz", "--labels", "y.npy")
    n = shape.shape[-1]
    assert code == 2 and not out and not Path("q.onnx").exists()
    assert phrase.format(n=n, m=n - 1, out=shape.name) in err


def test_labels_of_a_metric_of_ones_own_are_its_own_affair():
    model, x, y = labelled()
    quantize(model, "int8", {"x": x}, labels=y + 100, metric=lambda a, b, labels: 0.0, workers=1)
    quantize(model, "int8", {"x": x}, labels=np.stack([y, y], 1), workers=1)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_float_model_at_chance_is_told(onnxq, wrong):
    model, x, y = labelled(wrong=wrong)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=x, labels=y)
    _, _, err = onnxq("compare", "m.onnx", "m.onnx", "--data", "d.npz")
    assert ("'m.onnx' gets 0.0% of 40 labels right" in err) == wrong
    _, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--test", "d.npz", "-r", "int8", "--max-drop", "50")
    assert ("gets 0.0% of 40 labels right" in err) == wrong
    step = {"use": "mixed-precision", "metric": "top1", "method": "nearest", "curve": 2, "samples": 80}
    found = quantize(model, {"pass": [step]}, {"x": np.repeat(x, 2, 0)}, labels=np.repeat(y, 2), workers=1)
    assert any("gets 0.0% of 40 labels right" in note for note in found.report["notes"]) == wrong
    np.savez("d.npz", x=x[:20], labels=y[:20])
    assert "guessing" not in onnxq("compare", "m.onnx", "m.onnx", "--data", "d.npz")[2]


# ---- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (lambda x: x[:3], "has only 3 samples"),
        (lambda x: x[:1].repeat(12, 0), "are all equal"),
        (lambda x: np.arange(12, dtype=np.float32)[:, None, None, None] * np.ones_like(x), "are constant"),
        (lambda x: x, ""),
    ],
)
def test_samples_that_tell_little_are_remarked(spoil, phrase):
    x = np.random.default_rng(0).standard_normal((12, 3, 12, 12)).astype(np.float32)
    for data in (spoil(x), [{"x": one[None]} for one in spoil(x)]):
        told = " ".join(quantize(cnn(), "int8", data, workers=1).report["notes"])
        assert phrase in told and (phrase or not told)


@pytest.mark.parametrize(
    ("mean", "std", "right"),
    [("127.5", "127.5", "--mean 0.5 --std 0.5"), ("124,116,104", "1", "--mean 0.4863,0.4549,0.4078 --std 0.003922")],
)
def test_normalization_of_raw_pixels_is_refused_with_the_right_numbers(onnxq, mean, std, right):
    from PIL import Image

    Path("p").mkdir()
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save("p/a.png")
    onnx.save(cnn(), "m.onnx")
    code, _, err = onnxq("quantize", "m.onnx", "--data", "p", "--mean", mean, "--std", std)
    assert code == 2 and f"give {right}." in err and not list(Path().glob("*int8*"))


def test_all_broken_images_are_told_at_once(onnxq):
    from PIL import Image

    Path("p").mkdir()
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save("p/good.png")
    for n in range(7):
        Path(f"p/x{n}.png").write_bytes(b"no image")
    onnx.save(cnn(), "m.onnx")
    code, _, err = onnxq("quantize", "m.onnx", "--data", "p")
    assert code == 2 and "7 images cannot be read: 'p/x0.png' (" in err and "'p/x4.png'" in err and "x5" not in err
    assert "and 2 more" in err


@pytest.mark.parametrize(
    ("shape", "phrase"),
    [
        ((4, 12, 12, 3), "transpose to NCHW: x.transpose(0, 3, 1, 2)"),
        ((4, 8, 8, 3), "transpose to NCHW"),
        ((3, 12, 12), "add a batch axis: x[None]"),
        ((4, 3, 8, 8), "the data has [1, 3, 8, 8]."),
    ],
)
def test_shapes_that_nearly_fit_are_told_how_to(shape, phrase):
    with pytest.raises(OnnxqError) as told:
        quantize(cnn(), "int8", np.ones(shape, np.float32), workers=1)
    assert phrase in str(told.value)
    if len(shape) == 3:
        with pytest.raises(OnnxqError) as told:
            quantize(cnn(), "int8", [np.ones(shape, np.float32)], workers=1)
        assert phrase in str(told.value)


def test_files_that_cannot_be_used_are_told_plainly(onnxq):
    onnx.save(cnn(), "m.onnx")
    Path("t.npz").write_text("1,2")
    np.savez("o.npz", x=np.array([{}], object))
    np.savez("d.npz", x=np.zeros((9, 3, 12, 12), np.float32))
    for arguments, phrase in (
        (["--data", "d.npz", "--labels", "none.txt"], "labels 'none.txt' do not exist"),
        (["--data", "t.npz"], "not in numpy's format"),
        (["--data", "o.npz"], "contains Python objects"),
        (["--data", "d.npz", "--mean", "a"], "--mean 'a' must be a number"),
        ([], "give data (--data PATH)"),
    ):
        code, _, err = onnxq("quantize", "m.onnx", *arguments)
        assert code == 2 and phrase in err and "pickle" not in err


# ---- audit ----------------------------------------------------------------------------------------------------------------


def test_an_audit_against_another_model_is_refused(onnxq):
    onnx.save(cnn(), "m.onnx")
    onnx.save(mlp(), "other.onnx")
    code, _, err = onnxq("audit", "m.onnx", "--against", "other.onnx")
    assert code == 2 and "give the float model that this one was made from" in err and "check that" not in err
    code, _, err = onnxq("audit", "m.onnx", "--runtime", "openvino", "--against", "m.onnx")
    assert code == 2 and "leave it out beside --runtime openvino" in err


def test_shifts_for_other_targets_are_not_blamed(onnxq):
    model = mobilenet()
    for t in model.graph.initializer:  # channels of unequal ranges, so that there is something to shift
        if len(t.dims) == 4:
            w = onnx.numpy_helper.to_array(t)
            t.CopyFrom(
                onnx.numpy_helper.from_array(
                    (w * np.geomspace(1, 0.01, len(w)).reshape(-1, 1, 1, 1)).astype(np.float32), t.name
                )
            )
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=rows(model, 8))
    Path("r.toml").write_text('target = "per-tensor"\n[weights]\nblock = "tensor"\n[[pass]]\nuse = "shift-equalize"\n')
    code, out, _ = onnxq("quantize", "m.onnx", "-r", "r.toml", "--data", "d.npz", "-o", "q.onnx")
    convs = sum(n.op_type == "Conv" for n in model.graph.node)
    assert code == 0 and f"{convs}/{convs} Conv" in out and " quantized for per-tensor; " in out
    assert "run in float in onnxruntime" in out
    _, out, _ = onnxq("audit", "q.onnx")
    assert "shifts its channels, as target per-tensor needs" in out and "is read in float by" not in out


# ---- auto -----------------------------------------------------------------------------------------------------------------


def test_auto_tells_what_its_samples_can_decide(onnxq):
    model, x, _ = labelled(62)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=x)
    code, out, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--max-drop", "0")
    assert "one of 31 samples is 3.2 points, more than the drop of 0" in err and " kB" in out
    assert out.count("int8 ") == 1 and "int8  drop" not in err  # told once
    _, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--max-drop", "5", "-r", "int8", "-r", "nope")
    assert "points" not in err
    _, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--test", "./d.npz", "-r", "nope", "-r", "int8")
    assert "models are made with, which flatters" in err and "recipe 'nope' is not possible" in err
    code, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--metric", "sqnr", "--max-drop", "0")
    assert code == 2 and "has no drop" in err and Path("m.auto.onnx").exists()


def test_a_drop_below_zero_is_explained(onnxq, monkeypatch):
    model, x, _ = labelled(20)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=x)
    scores = iter([1.0, 3.0])
    Path("mine.py").write_text("scores = iter([1.0, 3.0])\ndef judge(*_):\n    return next(scores)\n")
    monkeypatch.syspath_prepend(Path().absolute())
    _, out, _ = onnxq("auto", "m.onnx", "--data", "d.npz", "--metric", "mine:judge")
    assert "-2.00" in out and "below 0: better than float on these samples" in out and next(scores) == 1


# ---- what was written -----------------------------------------------------------------------------------------------------


def test_what_was_written_and_how_long_it_took_is_told(onnxq):
    onnx.save(cnn(), "m.onnx")
    np.savez("d.npz", x=rows(cnn(), 8))
    _, out, _ = onnxq("quantize", "m.onnx", "--data", "d.npz", "--report", "r.html", "--overrides", "o.json")
    lines = out.splitlines()
    assert lines[-2].startswith("report: r.html, r.json (") and lines[-2].endswith(" s)")
    assert lines[-1] == "overrides: o.json, for o.onnx" and all(Path(f).exists() for f in ("r.html", "r.json", "o.onnx"))
    _, out, _ = onnxq("quantize", "m.onnx", "--data", "d.npz", "--report", "only.json")
    assert out.splitlines()[-1].startswith("report: only.json (")
    code, _, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "--report", "r.pdf", "-o", "none.onnx")
    assert code == 2 and "--report 'r.pdf': a report is a page or JSON" in err and not Path("none.onnx").exists()


# ---- widths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "told"), [(["W6A8", "W8A8"], True), (["W4A8", "W8A8"], False)])
def test_a_search_tells_what_its_widths_take_in_the_file(candidates, told):
    model = mlp()
    step = {"use": "mixed-precision", "candidates": candidates, "limit": 0.9, "method": "nearest", "curve": 3}
    result = quantize(model, {"pass": [step]}, feeds(model, 8), workers=1)
    (point,) = (p for p in result.report["steps"][0]["result"]["curve"] if p.get("chosen"))
    eight = quantize(model, "int8", feeds(model, 8), workers=1)
    counts = {y.weight: y.shape for y in result.graph.layers}

    def stored(made) -> float:
        types = {t.name: t.data_type for t in made.graph.initializer}
        sizes = {
            t.name: np.prod(t.dims) * (0.5 if types[t.name] == onnx.TensorProto.INT4 else 1)
            for t in made.graph.initializer
            if types[t.name] in (onnx.TensorProto.INT4, onnx.TensorProto.INT8) and len(t.dims) == 2
        }
        assert len(sizes) == len(counts)
        return float(sum(sizes.values()))

    assert point["stored"] == pytest.approx(stored(result.model) / stored(eight.model), abs=1e-4)
    assert point["size"] <= 0.9 and (point["stored"] == 1) == told
    assert any("codes of 5 to 7 bits take a byte" in note for note in result.report["notes"]) == told


def test_the_curve_shows_what_lies_in_the_file():
    from onnxq_plugins.report.curve import Curve

    model = mlp()
    step = {"use": "mixed-precision", "method": "nearest", "curve": 3}
    curve = Curve.of(quantize(model, {"pass": [step]}, feeds(model, 8), workers=1))
    assert curve is not None and curve.numbers[:3] == ["size", "stored", "bops"]
    columns, rows = curve.table()
    assert [row[columns.index("file")] for row in rows] == [f"{p['stored']:.3f}" for p in curve.points]
    assert all(p["stored"] >= p["size"] for p in curve.points)
