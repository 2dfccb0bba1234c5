"""The sweep and the passes that solve weights by what their layers see."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxq_plugins as onnxq
from onnxq_plugins import OnnxqError, quantize, runtimes
from onnxq_plugins.calibration.propagation import propagate
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.graph import load
from onnxq_plugins.graph.patches import gram, split
from onnxq_plugins.layers import problem as layerwise
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.passes.round import shared_steps
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import parse
from onnxq_plugins.solvers.gaussian import clipped_moments
from onnxq_plugins.solvers.gram import nearest
from onnxq_plugins.targets.refusals import problems
from tests.jobs import LAYERED, distance, fetch, make_job
from tests.zoo import ZOO, Net, conv_transpose, feeds, mlp, mobilenet, no_bias, slowly, some, transformer


def rounding(**parameters) -> dict:
    return {"use": "round", "seconds": 0, **parameters}


# ---- the pass ---------------------------------------------------------------------------------------------------------


TOGETHER = ("mobilenet", "inception", "grouped", "mlp", "transformer", "dead_channels", "shared_weights")
ALONE = ("grouped", "transformer", "shared_weights", "control_flow")


@pytest.mark.parametrize(
    ("name", "sequential"),
    some(
        itertools.product(LAYERED, [True, False]),
        *((name, True) for name in TOGETHER),
        *((name, False) for name in ALONE),
    ),
)
def test_round_keeps_float_function_and_kernels(name, sequential):
    model = ZOO[name]()
    plain, learned = (
        quantize(model, {"weights": {"bits": 4}, "pass": steps}, feeds(model, 6), verify=True)
        for steps in ([], [rounding(sequential=sequential)])
    )
    assert learned.report["kernels"] == plain.report["kernels"]
    losses = learned.report["steps"][0]["result"]["loss_relative_to_nearest"]
    assert all(loss <= 1 + 1e-9 for loss in losses.values())
    assert len(losses) == len([y for y in load(model).layers if y.op != "ConvTranspose"])


def digits_at_3_bits(*steps: dict) -> float:
    """dB between the digits model and what a recipe makes of it."""
    data = digits_split()
    reference = onnx.load(digits_model_path())
    result = quantize(reference, {"weights": {"bits": 3}, "pass": list(steps)}, data["calibration_images"][:32])
    return distance(reference, result, [{"image": data["test_images"]}])


@pytest.fixture(scope="module")
def plain_digits() -> float:
    return max(digits_at_3_bits(), digits_at_3_bits({"use": "bias-correct"}))


@pytest.mark.parametrize("method", ["nearest", "gptq", "gpfq", "descent", "adaround", "attention", "auto"])
def test_every_method_beats_plain_rounding_on_the_digits_model(method, plain_digits):
    assert digits_at_3_bits(rounding(method=method, steps=150)) > plain_digits + 2


def test_int4_rounded_on_the_digits_model_and_its_storage():
    data = digits_split()
    result = quantize(digits_model_path(), "int4-rounded", data["calibration_images"][:64], settings=["round.seconds=0"])
    test = [{"image": data["test_images"]}]
    accuracy = [
        float(np.mean(runtimes.outputs(runtimes.session(m), test)[0].argmax(1) == data["test_labels"]))
        for m in (digits_model_path(), result.model)
    ]
    assert accuracy[1] > accuracy[0] - 0.02
    stored = [t for t in result.model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    inner = [y for y in load(digits_model_path()).layers[1:-1] if y.kind != "depthwise"]
    assert len(stored) == len(inner) > 0
    assert set(result.report["kernels"]) == {"QLinearConv", "QGemm"}


@pytest.mark.parametrize("block", ["tensor", "channel"])
def test_scales_lower_the_error_of_outlier_weights(block):
    model = mlp()
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.ndim == 2:
            values[:, ::5] /= 3
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    samples = feeds(model, 16)
    recipe = {"weights": {"bits": 3, "block": block}}
    plain, searched = (
        distance(model, quantize(model, {**recipe, "pass": steps}, samples), samples)
        for steps in ([], [{"use": "sub-layer"}])
    )
    assert searched > plain + 1


def test_scales_of_blocks_within_a_channel():
    net = Net(["N", 4, 64])
    model = net.model(net.linear("x", 64, 32))
    mixed = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)  # nothing is learned of white noise
    samples = [{"x": feed["x"] @ mixed} for feed in feeds(model, 64)]
    recipe = {"weights": {"bits": 4, "block": 16}, "activations": {"bits": 32}}
    made = [
        quantize(model, {**recipe, "pass": steps}, samples)
        for steps in ([], [{"use": "sub-layer"}], [rounding(method="gptq")], [rounding(method="gptq", sequential=False)])
    ]
    plain, searched, learned, alone = (distance(model, result, samples) for result in made)
    assert plain < searched < min(learned, alone)
    assert "MatMulNBits" in made[2].report["kernels"]


def test_a_scale_that_is_there_is_kept():
    model = mlp()
    job = make_job(model, {"weights": {"bits": 4}})
    complete(job)
    before = dict(job.plan)
    parse({"pass": [rounding(method="gptq")]}, find_plugins().passes).passes[0].apply(job)
    for layer in layerwise.solvable(job):
        assert np.array_equal(before[layer.weight].scale, job.plan[layer.weight].scale)
        assert not np.array_equal(before[layer.weight].codes, job.plan[layer.weight].codes)


def test_open_layers_are_solved_the_same_with_one_worker_or_two():
    model = mobilenet()
    recipe = {"weights": {"bits": 4}, "pass": [rounding(sequential=False, method="gptq")]}
    one, two = (quantize(model, recipe, feeds(model, 6), workers=n) for n in (1, 2))
    assert one.model.SerializeToString() == two.model.SerializeToString()


@pytest.mark.parametrize("backend", ["loky", *slowly("dask")])  # searches use dask in tests/search
def test_layers_are_solved_in_other_processes(backend):
    import joblib

    model = mlp()
    recipe = {"weights": {"bits": 4}, "pass": [rounding(sequential=False, method="gptq")]}
    here = quantize(model, recipe, feeds(model, 6), workers=2)
    if backend == "dask":
        distributed = pytest.importorskip("distributed", reason="needs dask's distributed")
        with (
            distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None),
            joblib.parallel_config(backend="dask"),
        ):
            there = quantize(model, recipe, feeds(model, 6), workers=2)
    else:
        with joblib.parallel_config(backend="loky"):
            there = quantize(model, recipe, feeds(model, 6), workers=2)
    for name, spec in here.plan.items():
        assert np.array_equal(spec.scale, there.plan[name].scale)
        if spec.codes is not None:
            assert np.array_equal(spec.codes, there.plan[name].codes)


@pytest.mark.parametrize("method", ["attention", "gptq"])
def test_one_seed_one_result(method):
    model = mobilenet()
    recipe = {"weights": {"bits": 3}, "pass": [rounding(method=method, steps=30)]}
    one, two, other = (quantize(model, recipe, feeds(model, 4), seed=s).plan for s in (1, 1, 2))
    codes = [[spec.codes for spec in plan.values() if spec.codes is not None] for plan in (one, two, other)]
    assert all(np.array_equal(a, b) for a, b in zip(codes[0], codes[1], strict=True))
    if method == "attention":
        assert not all(np.array_equal(a, b) for a, b in zip(codes[0], codes[2], strict=True))


@pytest.mark.parametrize("sequential", [True, False])
def test_wide_layers_get_blocks_on_the_diagonal(sequential):
    net = Net(["N", 150])
    model = net.model(net.gemm("x", 150, 12))
    samples = feeds(model, 400)
    db = {}
    for limit in (16, 64, 4608):
        recipe = {"weights": {"bits": 3}, "pass": [rounding(method="gptq", limit=limit, sequential=sequential)]}
        db[limit] = distance(model, quantize(model, recipe, samples), samples)
    plain = distance(model, quantize(model, {"weights": {"bits": 3}}, samples), samples)
    assert plain < db[16] < db[4608] + 0.5 and plain < db[64]


def test_blocks_of_columns_are_those_of_the_full_gram_matrix():
    x = np.random.default_rng(0).normal(size=(2, 10, 30))
    parts = split(x, 8)
    assert parts.shape == (10, 2, 30)
    assert np.allclose(gram(parts)[3], gram(x)[0, 6:8, 6:8])
    assert np.allclose(gram(parts)[7], gram(x)[1, 4:6, 4:6])
    ragged = split(x[:, :9], 8)
    assert ragged.shape == (10, 2, 30) and not ragged[4, 1].any()


def test_batches_of_grams_bound_memory(monkeypatch):
    job = make_job(mobilenet())
    layers = layerwise.solvable(job)
    everything = [name for batch in layerwise.float_inputs(job, layers, 256, 4608) for name, _ in batch]
    monkeypatch.setattr(layerwise, "_GRAMS", 1)
    batches = list(layerwise.float_inputs(job, layers, 256, 4608))
    assert [len(batch) for batch in batches] == [1] * len(layers)
    assert [batch[0][0] for batch in batches] == everything == layers


def test_conv_transpose_is_left_to_the_default_solver():
    model = conv_transpose()
    result = quantize(model, {"pass": [rounding()]}, feeds(model, 4))
    stored = [y for y in result.graph.layers if y.op == "ConvTranspose"]
    assert stored and all(result.plan[y.weight].solved for y in stored)


def test_round_without_data_is_one_sentence():
    with pytest.raises(OnnxqError, match="--data"):
        quantize(mlp(), {"activations": {"bits": 32}, "weights": {"bits": 4, "block": 16}, "pass": [rounding()]})


@pytest.mark.parametrize(
    ("key", "value"), [("seconds", -1), ("steps", 0), ("damping", 0.0), ("positions", 0), ("limit", 1), ("method", "best")]
)
def test_parameters_are_checked(key, value):
    with pytest.raises(OnnxqError, match=key):
        quantize(mlp(), {"pass": [{"use": "round", key: value}]}, feeds(mlp(), 2))


def test_steps_that_do_not_fit_the_time_are_left_out(monkeypatch):
    tried = []
    learn = layerwise.solve.__globals__["adaround"]
    monkeypatch.setitem(
        layerwise.solve.__globals__, "adaround", lambda *a, steps: tried.append(steps) or learn(*a, steps=min(steps, 10))
    )
    model = mlp()
    for seconds in (0, 1e-6, 1e6):
        quantize(model, {"weights": {"bits": 4}, "pass": [rounding(seconds=seconds)]}, feeds(model, 3))
    assert tried == [1000] * len(load(model).layers)


@given(st.lists(st.floats(1e-6, 10.0), max_size=8), st.integers(1, 2000), st.floats(0, 1e4))
def test_shared_steps(prices, most, budget):
    steps = shared_steps(prices, most, budget)
    assert sum(n * price for n, price in zip(steps, prices, strict=True)) <= budget * (1 + 1e-9)
    assert all(n == 0 or most / 4 <= n <= most for n in steps)
    if sum(prices) * most <= budget * (1 - 1e-9):
        assert steps == [most] * len(prices)  # what is enough for all is given to all
    first = [steps[i] for i in np.argsort(prices, kind="stable")]
    assert all(a >= b - 1 for a, b in itertools.pairwise(first))  # dearer layers take no more (but for rounding)


# ---- shifts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_a_shift_makes_a_bias_where_there_is_none(target):
    model = no_bias()
    samples = feeds(model, 6)
    result = quantize(model, {"weights": {"bits": 3}, "pass": [rounding(method="nearest")]}, samples, target=target)
    shifts = [spec.shift for spec in result.plan.values() if spec.codes is not None]
    assert any(shift is not None and np.abs(shift).max() > 0 for shift in shifts)
    plain = quantize(model, {"weights": {"bits": 3}}, samples, target=target)
    assert distance(model, result, samples) > distance(model, plain, samples)
    assert result.report["kernels"] == plain.report["kernels"]


def test_a_shift_of_a_weight_only_gemm():
    net = Net(["N", 32])
    model = net.model(net.gemm("x", 32, 16))
    recipe = {"weights": {"bits": 4, "block": 16}, "activations": {"bits": 32}, "pass": [rounding(method="gptq")]}
    samples = [{"x": s["x"] + 2} for s in feeds(model, 20)]
    wanted, found, plain = (
        runtimes.outputs(runtimes.session(m), samples)[0].mean(axis=0)
        for m in (model, quantize(model, recipe, samples).model, quantize(model, {**recipe, "pass": []}, samples).model)
    )
    assert np.abs(found - wanted).max() < 0.05 * np.abs(plain - wanted).max()


def test_a_shift_on_a_matmul_is_refused():
    job = make_job(transformer())
    complete(job)
    layer = next(y for y in job.graph.layers if y.op == "MatMul")
    plan = job.plan | {layer.weight: replace(job.plan[layer.weight], shift=np.zeros(layer.channels, np.float32))}
    inputs = {y.name: Planned(job.graph, plan, job.target).input(y) for y in job.graph.layers if y.weight in plan}
    assert any("no bias" in problem for problem in problems(job.target, job.graph, plan, inputs))


def test_shifts_go_stale_with_the_codes():
    assert replace(onnxq.QuantSpec(), shift=np.zeros(3)).request().shift is None


def test_correcting_twice_is_correcting_once():
    model = mobilenet()
    recipes = [{"weights": {"bits": 4}, "pass": [{"use": "bias-correct"}] * n} for n in (1, 2)]
    one, two = (quantize(model, recipe, feeds(model, 6)) for recipe in recipes)
    assert [list(p.raw_data) for p in one.model.graph.initializer] == [list(p.raw_data) for p in two.model.graph.initializer]


def test_analytic_correction_comes_near_the_empirical_one():
    net = Net(["N", 8, 12, 12], seed=3)
    x = net.op("Relu", net.batchnorm(net.conv("x", 8, 32, 1), 32))
    x = net.clip(net.batchnorm(net.conv(x, 32, 32, 3, groups=32, pads=[0] * 4), 32))
    x = net.conv(net.op("GlobalAveragePool", x), 32, 10, 1)
    model = net.model(x)
    graph = load(model)
    samples = feeds(model, 64)
    # make the statistics true: those of the data
    for layer in graph.layers:
        if layer.output in graph.batchnorms:
            values = np.concatenate(fetch(graph.model(), layer.output, samples))
            norm = graph.batchnorms[layer.output]
            graph.batchnorms[layer.output] = replace(norm, beta=values.mean((0, 2, 3)), gamma=values.std((0, 2, 3)))
    layers = graph.layers
    for layer in layers[1:]:
        mean = propagate(graph, {}, through=False)[layer.input].mean
        real = np.concatenate(fetch(graph.model(), layer.input, samples)).mean((0, 2, 3))
        assert np.abs(mean - real).max() < 0.1 * np.abs(real).max()
    assert layers[0].input not in propagate(graph, {}, through=False)


def test_analytic_correction_reports_what_it_left_out():
    model = mobilenet()
    result = quantize(
        model,
        {"weights": {"bits": 4}, "pass": [{"use": "bias-correct", "method": "analytic"}]},
        feeds(model, 3),
        verify=True,
    )
    report = result.report["steps"][0]["result"]
    assert report["left_out"] and any("no BatchNorm statistics" in note for note in result.report["notes"])


@pytest.mark.parametrize(("low", "high"), [(0, np.inf), (0, 6), (-1, 1), (-np.inf, np.inf)])
def test_clipped_moments_are_those_of_samples(low, high):
    rng = np.random.default_rng(0)
    mean, deviation = rng.normal(size=20) * 3, rng.uniform(0.1, 3, size=20)
    samples = np.clip(mean + deviation * rng.normal(size=(200_000, 20)), low, high)
    found = clipped_moments(mean, deviation**2, low, high)
    assert np.allclose(found[0], samples.mean(0), atol=0.03)
    assert np.allclose(found[1], samples.var(0), rtol=0.05, atol=0.01)


def test_widened_channels_are_coded_again_and_others_keep_learned_codes():
    net = Net(["N", 8])
    model = net.model(net.gemm("x", 8, 4))
    job = make_job(model)
    complete(job)
    layer = job.graph.layers[0]
    spec = job.plan[layer.weight]
    learned = spec.codes.copy()
    learned[:, 0] = 0
    scale = spec.scale.copy()
    scale.reshape(-1)[1] *= 1e-9
    job.plan |= {layer.weight: replace(spec, codes=learned, scale=scale)}
    complete(job)
    after = job.plan[layer.weight]
    rows = (after.codes != learned).any(axis=layer.in_axis)
    assert list(rows) == [False, True, False, False]
    assert job.report["widened"] == {layer.name: 1}


def test_nearest_is_the_start_of_every_method():
    """With plenty of bits all of them end where rounding begins."""
    w, h = np.array([[[0.25, -0.5]]]), np.eye(2)[None]
    assert np.array_equal(nearest(w, np.array([[[0.25]]]), (-7, 7)), [[[1, -2]]])
    from onnxq_plugins.solvers.rounding import Effort, solve

    for method in ("gptq", "gpfq", "descent", "adaround", "attention", "auto"):
        start = nearest(w, np.full((1, 1, 1), 0.25), (-7, 7))
        assert np.array_equal(
            solve(method, w, h, np.full((1, 1, 1), 0.25), (-7, 7), Effort(steps=20), start).codes, [[[1, -2]]]
        )
