"""The engine: laws, hooks, repeatability, safe writing, and what the built-in passes gain."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, Pass, Result, hookimpl, load, measure, quantize, rescale, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.engine import writing
from onnxq_plugins.graph import channel_groups
from onnxq_plugins.job import Job
from onnxq_plugins.laws import LawBroken
from onnxq_plugins.report import summary
from onnxq_plugins.spec import encode, solve_minmax
from tests.zoo import ZOO, Net, cnn, feeds, grouped, kinds, mlp, mobilenet, slowly, some, transformer

FULL = {"pass": [{"use": "scale-inputs"}, {"use": "ranges"}, {"use": "bias-correct"}]}


class Bring:
    """A plugin with the given passes."""

    def __init__(self, *kinds: type[Pass]) -> None:
        self.kinds = kinds

    @hookimpl
    def onnxq_passes(self):
        return list(self.kinds)


@dataclass(frozen=True)
class Halve(Pass):
    """Breaks law L1: the function changes."""

    name: ClassVar[str] = "test.halve"

    def apply(self, job: Job) -> None:
        layer = job.graph.layers[0]
        job.graph.set_constant(layer.weight, job.graph.constant(layer.weight) / 2)


@dataclass(frozen=True)
class HalveAndSaySo(Halve):
    name: ClassVar[str] = "test.halve-and-say-so"
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class HalveBehindTheBack(Pass):
    """Changes a weight without telling the graph."""

    name: ClassVar[str] = "test.halve-behind-the-back"
    exact: ClassVar[bool] = False

    def apply(self, job: Job) -> None:
        tensor = job.graph.tensor(job.graph.layers[0].weight)
        tensor.values = tensor.values / 2


@dataclass(frozen=True)
class Solve(Pass):
    """Solves the first layer's weight with four times the smallest scale, after halving it if asked."""

    name: ClassVar[str] = "test.solve"
    exact: ClassVar[bool] = False
    halve: bool = False

    def apply(self, job: Job) -> None:
        layer = job.graph.layers[0]
        weight = job.graph.constant(layer.weight) / (2 if self.halve else 1)
        if self.halve:
            job.graph.set_constant(layer.weight, weight)
        spec = solve_minmax(weight, job.plan[layer.weight].request())
        spec = replace(spec, scale=4 * spec.scale)
        job.plan |= {layer.weight: replace(spec, codes=encode(weight, spec))}


@dataclass(frozen=True)
class Rescale(Pass):
    """Law-abiding: makes the activations of the first group ten times larger."""

    name: ClassVar[str] = "test.rescale"

    def apply(self, job: Job) -> None:
        group = channel_groups(job.graph, "rescale")[0]
        rescale(job.graph, group, np.full(group.size, 10.0))


PLUGIN = Bring(Halve, HalveAndSaySo, HalveBehindTheBack, Solve, Rescale)


def run(model, recipe="int8", n: int = 6, **options) -> Result:
    options = {"workers": 1, "plugins": [PLUGIN], **options}
    return quantize(model, recipe, feeds(model, n), **options)


def steps(*names: str | dict) -> dict:
    return {"pass": [name if isinstance(name, dict) else {"use": name} for name in names]}


def quality(model: onnx.ModelProto, result: Result) -> float:
    samples = feeds(model, 8, seed=1)
    pair = [runtimes.outputs(runtimes.session(m), samples)[0] for m in (model, result.model)]
    return measure.sqnr(*pair)


# ---- laws ---------------------------------------------------------------------------------------------------------------


def test_verify_catches_a_pass_that_changes_the_function():
    with pytest.raises(LawBroken, match=r"'test\.halve' changed the float function by .* exact = True"):
        run(cnn(), steps("test.halve"), verify=True)


def test_verify_needs_no_data():
    recipe = {**steps("test.halve"), "activations": {"bits": 32}, "weights": {"block": 32}}
    with pytest.raises(LawBroken):
        quantize(mlp(), recipe, plugins=[PLUGIN], verify=True)


def test_a_pass_that_declares_itself_inexact_goes_through_and_the_report_shows_it():
    result = run(cnn(), steps("ranges", "test.halve-and-say-so"), verify=True)
    assert [step.get("exact") for step in result.report["steps"]] == [True, False, None]
    assert result.report["steps"][0]["drift"] < 1e-4
    assert "drift" not in result.report["steps"][1]


def test_without_verify_nothing_is_checked():
    result = run(cnn(), steps("test.halve"))
    assert "drift" not in result.report["steps"][0]


@pytest.mark.parametrize("change", ["test.halve-and-say-so", "test.halve-behind-the-back"])
def test_stale_solutions_are_dropped(change):
    """Law L5: the scale solved for the old weight goes, bits and block stay, codes fit the new weight."""
    model = cnn()
    result = run(model, {**steps("test.solve", change), "weights": {"bits": 6}})
    layer = load(model).layers[0]
    weight = load(model).constant(layer.weight) / 2
    spec = result.plan[layer.weight]
    assert (spec.bits, spec.block) == (6, (1, 0, 0, 0))
    np.testing.assert_allclose(spec.scale, solve_minmax(weight, spec.request()).scale, rtol=1e-6)
    np.testing.assert_array_equal(spec.codes, encode(weight, spec))


@pytest.mark.parametrize("halve", [True, False])
def test_a_solution_that_came_with_the_new_weight_is_kept(halve):
    model = cnn()
    result = run(model, steps({"use": "test.solve", "halve": halve}))
    layer = load(model).layers[0]
    weight = load(model).constant(layer.weight) / (2 if halve else 1)
    smallest = solve_minmax(weight, result.plan[layer.weight].request()).scale
    np.testing.assert_allclose(result.plan[layer.weight].scale, 4 * smallest, rtol=1e-6)


def test_a_pass_that_changes_nothing_drops_nothing():
    model = cnn()
    weight = load(model).layers[0].weight
    alone, more = (run(model, steps("test.solve", *rest)) for rest in ((), ("ranges",)))
    np.testing.assert_array_equal(alone.plan[weight].scale, more.plan[weight].scale)


def test_ranges_of_rescaled_activations_are_measured_again():
    model = grouped()
    late, early = (
        run(model, steps(*order), verify=True) for order in (("test.rescale", "ranges"), ("ranges", "test.rescale"))
    )
    for name, spec in late.plan.items():
        np.testing.assert_allclose(early.plan[name].scale, spec.scale, rtol=1e-5, err_msg=name)
    assert quality(model, early) > 30


ORDERS = [order for n in range(4) for order in itertools.permutations(FULL["pass"], n)]


@pytest.mark.parametrize("chosen", [*ORDERS[:4], *ORDERS[-6:], *slowly(*((order,) for order in ORDERS[4:-6]))])
def test_any_pass_may_be_left_out_and_any_order_works(chosen):
    model = mobilenet()
    result = run(model, {"pass": list(chosen)}, verify=True)
    assert quality(model, result) > 30
    assert all(spec.solved for spec in result.plan.values())


@pytest.mark.parametrize("name", kinds(sorted(ZOO), "dead_channels", "no_layer"))
def test_an_empty_recipe_works(name):
    model = ZOO[name]()
    assert quality(model, run(model, {})) > 20


def test_all_problems_are_told_at_once():
    rules = [{"match": name, "weights": {"bits": 12}} for name in ("conv0", "gemm7")]
    with pytest.raises(OnnxqError) as caught:
        run(cnn(), {"layer": rules})
    (problem,) = caught.value.problems
    assert "int12 per channel" in problem
    for name, kernel in zip(("conv0", "gemm7"), ("QLinearConv", "QGemm"), strict=True):
        assert f"'{name}'" in problem and kernel in problem  # the choices that there are


def test_unmatched_rules_are_told_at_once():
    with pytest.raises(OnnxqError) as caught:
        run(cnn(), {"layer": [{"match": "nope*", "quantize": False}, {"match": "neither", "quantize": False}]})
    assert [("nope*" in p, "neither" in p, "conv0" in p) for p in caught.value.problems] == [
        (True, False, True),
        (False, True, True),
    ]


@pytest.mark.parametrize(
    ("activations", "words"), [({"bits": 16}, "uint16"), ({"symmetric": True}, "int8 per tensor"), ({"bits": 4}, "uint4")]
)
def test_activations_the_target_cannot_run_are_refused(activations, words):
    with pytest.raises(OnnxqError, match=words):
        run(mlp(), {"activations": activations})


def test_activations_without_data_are_refused():
    with pytest.raises(OnnxqError, match=r"needs? sample inputs.*give data \(--data"):
        quantize(cnn(), {})


# ---- hooks --------------------------------------------------------------------------------------------------------------


class Watch:
    def __init__(self) -> None:
        self.seen: list = []

    @hookimpl(wrapper=True)
    def onnxq_run_pass(self, step, job):
        self.seen.append(("before", step.name, len(job.graph.layers)))
        told = yield
        self.seen.append(("after", step.name, sorted(told)))
        return {**told, "watched": True}

    @hookimpl
    def onnxq_exported(self, job, model, path):
        self.seen.append(("exported", type(model).__name__, path, path is not None and path.exists()))


def test_hooks_see_every_pass_in_order_and_the_exported_model(tmp_path):
    watch, path = Watch(), tmp_path / "made.onnx"
    result = run(cnn(), FULL, plugins=[watch], output=path)
    assert [entry[:2] for entry in watch.seen] == [
        ("before", "scale-inputs"),
        ("after", "scale-inputs"),
        ("before", "ranges"),
        ("after", "ranges"),
        ("before", "bias-correct"),
        ("after", "bias-correct"),
        ("exported", "ModelProto"),
    ]
    assert watch.seen[-1][2:] == (path, True)
    assert [step["result"]["watched"] for step in result.report["steps"][:3]] == [True] * 3


def test_exported_is_told_that_nothing_was_written():
    watch = Watch()
    run(cnn(), {}, plugins=[watch])
    assert watch.seen == [("exported", "ModelProto", None, False)]


def test_a_hook_can_veto():
    class Veto:
        @hookimpl
        def onnxq_run_pass(self, step, job):
            return {"vetoed": True} if step.name == "test.halve" else None

    result = run(cnn(), steps("test.halve", "ranges"), plugins=[PLUGIN, Veto()], verify=True)
    assert result.report["steps"][0]["result"] == {"vetoed": True}
    assert result.report["steps"][1]["result"]["method"] == "minmax"


# ---- repeatability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mobilenet, transformer])
def test_one_seed_one_result(make):
    first, again, parallel = (run(make(), FULL, workers=w).model.SerializeToString() for w in (1, 1, 2))
    assert first == again
    assert first == parallel


def test_the_seed_is_recorded():
    made = run(cnn(), {}, seed=7).model
    assert metadata(made)["onnxq.seed"] == "7"


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props}


@pytest.mark.parametrize("given", ["proto", "graph", "path"])
def test_the_model_given_is_left_alone(tmp_path, given):
    proto, path = mobilenet(), tmp_path / "model.onnx"
    onnx.save(proto, path)
    model = {"proto": proto, "graph": load(proto), "path": path}[given]

    def state() -> bytes:
        made = model.model() if given == "graph" else proto
        return path.read_bytes() if given == "path" else made.SerializeToString(deterministic=True)

    before = state()
    quantize(model, FULL, feeds(proto, 4), workers=1)
    assert state() == before


def test_metadata_can_make_the_model_again(tmp_path):
    recipe = {**FULL, "weights": {"bits": 4}, "layer": [{"match": "conv0", "weights": {"bits": 8}}]}
    first = run(mobilenet(), recipe, settings=["ranges.method=mse", "weights.pow2=true"], seed=3).model
    told = metadata(first)
    assert "onnxq-plugins==" in told["onnxq.versions"]
    file = tmp_path / "again.json"
    file.write_text(told["onnxq.recipe"])
    for source in (json.loads(told["onnxq.recipe"]), file):
        again = run(mobilenet(), source, seed=int(told["onnxq.seed"])).model
        assert again.SerializeToString() == first.SerializeToString()


def test_versions_name_the_plugins_that_took_part():
    told = metadata(run(cnn(), steps("test.solve")).model)["onnxq.versions"]
    assert "given in Python" in told
    assert "given in Python" not in metadata(run(cnn(), steps("ranges")).model)["onnxq.versions"]


def test_metadata_of_an_earlier_quantization_is_replaced():
    model = cnn()
    model.metadata_props.add(key="onnxq.seed", value="99")
    props = [p.value for p in run(model, {}).model.metadata_props if p.key == "onnxq.seed"]
    assert props == ["0"]


# ---- the result ---------------------------------------------------------------------------------------------------------


def test_result(tmp_path):
    result = run(cnn())
    assert result.summary.startswith("2/2 Conv as QLinearConv; 1/1 Gemm as QGemm | ")
    assert repr(result).startswith(f"<Result: {result.summary}") and repr(result).endswith(">")
    path = result.save(tmp_path / "made.onnx")
    assert onnx.load(path).SerializeToString() == result.model.SerializeToString()
    assert os.listdir(tmp_path) == ["made.onnx"]


@pytest.mark.parametrize("name", ["mobilenet", "conv_transpose", "transformer", "no_layer", "dead_channels"])
def test_the_report_is_json(name):
    report = run(ZOO[name](), FULL, verify=True).report
    assert json.loads(json.dumps(report)) == report
    assert report["bytes"].keys() == {"float", "quantized"}
    assert report["seconds"] >= 0


def test_the_report_tells_of_every_layer():
    result = run(mobilenet(), "int8", settings=["weights.bits=4"])
    rows = result.report["layers"]
    assert [row["op"] for row in rows] == ["Conv"] * 7 + ["Gemm"]
    assert {row["kernel"] for row in rows} == {"QLinearConv", "QGemm"}
    assert all(row["weights"] == "int4 per channel" for row in rows)
    assert rows[0]["bits_per_weight"] == pytest.approx(4 + 32 / 27, abs=1e-3)  # 8 scales for 8 * 27 weights


def test_options_reach_the_recipe_and_the_data():
    model, seen = cnn(), []

    def track(items, what, total):
        seen.append((what, total))
        return items

    data = np.concatenate([feed["x"] for feed in feeds(model, 10)])
    result = quantize(model, "int8", data, samples=3, target="ort-cpu-avx2", workers=1, track=track)
    assert result.report["recipe"]["target"] == "ort-cpu-avx2"
    assert seen
    assert all(total == 3 and what.startswith("calibrating") for what, total in seen)


def test_data_may_come_from_the_recipe(tmp_path):
    model = cnn()
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in feeds(model, 4)]))
    result = quantize(model, {"data": {"path": str(tmp_path / "data.npz")}}, workers=1)
    np.testing.assert_array_equal(result.plan["x"].scale, run(model, {}, n=4).plan["x"].scale)


# ---- the cache ----------------------------------------------------------------------------------------------------------


def test_the_cache_spares_the_second_calibration(tmp_path, monkeypatch):
    recipe = {"pass": [{"use": "ranges", "method": "mse"}, {"use": "bias-correct"}]}
    first = run(mobilenet(), recipe, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_run", lambda *_: pytest.fail("calibrated again"))
        second = run(mobilenet(), recipe, cache=tmp_path / "cache")
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert not list((tmp_path / "cache").glob("*.part.npz"))
    other = run(mobilenet(), recipe, n=7, cache=tmp_path / "cache")  # other data: not from the cache
    assert other.model.SerializeToString() != first.model.SerializeToString()


def test_a_damaged_cache_is_computed_again(tmp_path):
    first = run(cnn(), "int8", cache=tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert run(cnn(), "int8", cache=tmp_path).model.SerializeToString() == first.model.SerializeToString()


# ---- writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("where", ["export", "replace", "audit"])
def test_a_crash_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, where, error):
    path = tmp_path / "made.onnx"
    path.write_bytes(b"precious")

    def crash(*_, **__):
        raise error

    owner, name = {"export": (writing, "export"), "replace": (os, "replace"), "audit": (summary, "audit_model")}[where]
    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(OnnxqError if where == "replace" and isinstance(error, OSError) else type(error)):
        run(cnn(), {}, output=path)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["made.onnx"]


def test_a_model_the_runtime_refuses_is_not_written(tmp_path, monkeypatch):
    real = writing.export

    def broken(*arguments, **more):
        model = real(*arguments, **more)
        model.graph.node[0].op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(writing, "export", broken)
    with pytest.raises(OnnxqError, match="cannot load the model"):
        run(cnn(), {}, output=tmp_path / "made.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("path", "words"), [("missing/made.onnx", "does not exist"), (".", "is a folder")])
def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path, path, words):
    with pytest.raises(OnnxqError, match=words):
        quantize("no such model.onnx", {}, output=tmp_path / path)
    with pytest.raises(OnnxqError, match=words):
        run(cnn(), {}).save(tmp_path / path)


# ---- what the built-in passes gain ------------------------------------------------------------------------------------


def test_int8_on_the_digits_model():
    data = digits_split()
    result = quantize(digits_model_path(), "int8", data["calibration_images"], workers=1)
    test = [{"image": data["test_images"]}]
    wanted, found = (runtimes.outputs(runtimes.session(m), test)[0] for m in (digits_model_path(), result.model))
    accuracy = [float(np.mean(y.argmax(1) == data["test_labels"])) for y in (wanted, found)]
    assert accuracy[0] > 0.95
    assert accuracy[1] > accuracy[0] - 0.01
    assert measure.sqnr(wanted, found) > 35
    assert set(result.report["kernels"]) == {"QLinearConv", "QGemm"}


@pytest.mark.parametrize(("groups", "outputs"), [(1, 6), (2, 6), (8, 8)])
def test_bias_correct_takes_back_the_mean_error_of_each_channel(groups, outputs):
    net = Net(["N", 8, 8, 8])
    model = net.model(net.conv("x", 8, outputs, 3, groups=groups, pads=[0] * 4))
    samples = [{"x": np.abs(feed["x"]) * np.arange(1, 9).reshape(8, 1, 1)} for feed in feeds(model, 8)]
    samples = [{"x": feed["x"].astype(np.float32)} for feed in samples]
    wanted = runtimes.outputs(runtimes.session(model), samples)[0]

    def mean_errors(recipe) -> np.ndarray:
        result = quantize(model, {**recipe, "weights": {"bits": 4}}, samples, workers=1)
        return np.abs((runtimes.outputs(runtimes.session(result.model), samples)[0] - wanted).mean((0, 2, 3)))

    before, after = mean_errors({}), mean_errors(steps("bias-correct"))
    assert after.max() < before.max() / 5
    assert np.all(after < before + 0.05)


def test_bias_correct_reports_and_needs_codes_first():
    result = run(mobilenet(), steps("bias-correct"))
    report = result.report["steps"][0]["result"]
    assert report["layers"] == 8
    assert report["largest_shift_relative_to_bias"] > 0


@pytest.mark.parametrize("make", ["mlp", "conv", "tokens"])
def test_scale_inputs_evens_out_channels(make):
    net = Net({"mlp": ["N", 16], "conv": ["N", 16, 6, 6], "tokens": ["N", 5, 16]}[make])
    first = {
        "mlp": lambda: net.gemm("x", 16, 24),
        "conv": lambda: net.conv("x", 16, 24),
        "tokens": lambda: net.linear("x", 16, 24),
    }[make]()
    x = net.op("Relu", first)
    model = net.model(net.head(x, 24) if make == "conv" else net.linear(x, 24, 10))
    loud = np.ones((16, 1, 1) if make == "conv" else 16, np.float32)
    loud[3] = 100
    samples = [{"x": feed["x"] * loud} for feed in feeds(model, 12)]
    weight = next(t for t in model.graph.initializer if t.name == "c0")  # what a trained model would have learnt
    values = onnx.numpy_helper.to_array(weight).copy()
    index = (slice(None), 3) if make in ("mlp", "conv") else (3,)
    values[index] /= 100
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "c0"))
    wanted = runtimes.outputs(runtimes.session(model), samples)[0]
    decibels = {}
    for name in ("ranges", "scale-inputs"):
        result = quantize(model, steps(name), samples, workers=1, verify=True)
        decibels[name] = measure.sqnr(wanted, runtimes.outputs(runtimes.session(result.model), samples)[0])
        muls = [n for n in result.model.graph.node if n.op_type == "Mul" and n.name]
        assert len(muls) == (name == "scale-inputs")
    assert decibels["scale-inputs"] > decibels["ranges"] + 10
    assert set(result.report["steps"][0]["result"]) == {"x"}


def test_scale_inputs_leaves_images_alone():
    model = cnn()
    samples = [{"x": feed["x"] * np.array([1, 1.2, 0.9], np.float32).reshape(3, 1, 1)} for feed in feeds(model, 8)]
    with_pass, without = (quantize(model, steps(*names), samples, workers=1) for names in (["scale-inputs"], []))
    assert with_pass.report["steps"][0]["result"] == {}
    assert with_pass.model.graph == without.model.graph


@pytest.mark.parametrize(
    ("make", "method"),
    some(
        itertools.product([mobilenet, transformer], ["minmax", "percentile", "mse", "kl"]),
        *[(mobilenet, "minmax"), (transformer, "percentile"), (transformer, "mse"), (mobilenet, "kl")],
    ),
)
def test_every_way_to_choose_ranges_works(method, make):
    model = make()
    result = run(model, steps({"use": "ranges", "method": method, "judged": False}), n=12)
    assert result.report["steps"][0]["result"]["method"] == method
    assert quality(model, result) > 25
    assert (result.report["steps"][0]["result"]["kept_share_of_range"] == {}) == (method == "minmax")


def test_ranges_clip_a_stray_value_where_that_pays():
    """One value of 25 among 400 000 that are normal: the extremes would spend most codes on it."""
    net = Net(["N", 256, 32])
    model = net.model(net.linear("x", 32, 10, bias=False))
    samples = [{"x": feed["x"].clip(-4, 4)} for feed in feeds(model, 50)]
    wanted = runtimes.outputs(runtimes.session(model), samples)[0]
    samples[7]["x"][0, 0, 0] = 25.0
    error, kept = {}, {}
    for method in ("minmax", "mse", "percentile", "kl"):
        recipe = steps({"use": "ranges", "method": method, "judged": False}) | {"data": {"outliers": True}}
        result = quantize(model, recipe, samples, workers=1)
        found = runtimes.outputs(runtimes.session(result.model), samples)[0]
        error[method] = np.mean(np.delete(found - wanted, 7, axis=0) ** 2)
        kept[method] = result.report["steps"][0]["result"]["kept_share_of_range"].get("x", 1.0)
    assert kept["minmax"] == 1.0
    assert max(kept["mse"], kept["percentile"], kept["kl"]) < 0.7
    assert max(error["mse"], error["percentile"], error["kl"]) < 0.7 * error["minmax"]


@pytest.mark.parametrize("wrong", [{"percentile": 40}, {"bins": 10}, {"method": "best"}])
def test_ranges_refuses_parameters_that_make_no_sense(wrong):
    with pytest.raises(OnnxqError, match=f"pass 'ranges': .*{next(iter(wrong))}"):
        run(cnn(), steps({"use": "ranges", **wrong}))


def test_a_recipe_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strangers.py").write_text("raise SystemExit('imported')")
    with pytest.raises(OnnxqError, match="does not exist"):
        quantize(cnn(), {"data": {"path": "strangers:make"}})


@dataclass(frozen=True)
class Spoil(Pass):
    """Makes outputs NaN, which no comparison calls larger than a limit."""

    name: ClassVar[str] = "test.spoil"

    def apply(self, job):
        bias = job.graph.layers[-1].bias
        job.graph.set_constant(bias, np.full_like(job.graph.constant(bias), np.nan))


def test_outputs_that_become_nan_are_a_change():
    with pytest.raises(LawBroken, match=r"test\.spoil"):
        quantize(cnn(), {"pass": [{"use": "test.spoil"}]}, feeds(cnn(), 4), verify=True, plugins=[Bring(Spoil)])


@dataclass(frozen=True)
class DropOutputs(Pass):
    """Leaves the weight of the last convolution planned, but not what it writes."""

    name: ClassVar[str] = "test.drop"

    def apply(self, job):
        job.plan = job.plan.without([y.result for y in job.graph.layers if y.op == "Conv"][-1])


def test_a_plan_without_the_output_of_a_convolution_is_refused():
    net = Net(["N", 3, 8, 8])
    model = net.model(net.op("Tanh", net.conv("x", 3, 8)))
    with pytest.raises(OnnxqError, match="its output"):
        quantize(model, {"pass": [{"use": "test.drop"}]}, feeds(model, 4), plugins=[Bring(DropOutputs)])


def test_a_weight_only_layer_beside_an_integer_one_keeps_its_scales():
    """Its bias stays float, so no int32 bias asks for wider scales."""
    net = Net(["N", 32])
    x = net.op("Tanh", "x")
    tiny = net.constant(np.random.default_rng(0).normal(size=(32, 8)) * 1e-4)
    y = net.op("Gemm", x, tiny, net.constant(np.full(8, 1e6)))
    model = net.model(net.op("Add", y, net.gemm(x, 32, 8)))
    first, second = load(model).layers
    weight_only = {"match": first.name, "weights": {"block": 32}, "activations": {"bits": 32}}
    scales = [
        quantize(model, {"layer": [weight_only, {"match": second.name, "quantize": beside}]}, feeds(model, 4))
        .plan[first.weight]
        .scale
        for beside in (False, True)
    ]
    np.testing.assert_array_equal(*scales)


@pytest.mark.parametrize("wild", [1.0, 1e3])
def test_a_sample_unlike_all_others_is_named(wild):
    model = cnn()
    samples = feeds(model, 16)
    samples[5]["x"][0, 0, 0, 0] *= wild * 5
    notes = quantize(model, "int8", samples, workers=1).report["notes"]
    assert any("sample 5 reaches" in note for note in notes) == (wild > 1)


def test_symmetric_activations_are_refused_once_not_tensor_by_tensor():
    for target in ("ort-cpu", "openvino", "npu4"):
        with pytest.raises(OnnxqError) as caught:
            quantize(mobilenet(), {"target": target, "activations": {"symmetric": True}}, feeds(mobilenet(), 4))
        assert len(caught.value.problems) == 1 and "activations.symmetric = false" in str(caught.value)
