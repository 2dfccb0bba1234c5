"""Calibration without data: what is made up for each kind of input, what is refused, and what comes out."""

from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq_plugins.calibration.synthetic import Wish, synthesize
from onnxq_plugins.cli import app
from onnxq_plugins.data import DataOptions
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import load
from onnxq_plugins.measure import sqnr
from onnxq_plugins.passes.data_free import DataFree
from onnxq_plugins.solvers.fractals import fractals
from tests.zoo import ZOO, Net, cnn, feeds, kinds, mlp, mobilenet, run, slowly, some

RECIPE = "int8-data-free"
IMAGES = [name for name, make in ZOO.items() if len(make().graph.input[0].type.tensor_type.shape.dim) == 4]
SCALES = [((0.485, 0.456, 0.406), 0.226), ((0.5, 0.5, 0.5), 0.5), ((0, 0, 0), 1 / 255)]
OTHERS = [name for name in ZOO if name not in IMAGES]


def free(model, *settings, samples=4, **options):
    return quantize(model, RECIPE, settings=[f"data-free.samples={samples}", *settings], workers=1, **options)


def told(result):
    return result.report["steps"][0]["result"]


def make(model, seed=0, **wish):
    """The samples and what is told of each input, straight from `synthesize`."""
    data, made = synthesize(load(model), Wish(**{"count": 6, **wish}), np.random.default_rng(seed))
    return list(data), made


def between(low, high):
    """A declared range."""
    return np.atleast_1d(low).astype(float), np.atleast_1d(high).astype(float)


def image_net(channels=3, size=(12, 12), batch="N", last=False, bias=True):
    net = Net([batch, *size, channels] if last else [batch, channels, *size])
    x = net.op("Transpose", "x", perm=[0, 3, 1, 2]) if last else "x"
    return net.model(net.head(net.op("Relu", net.conv(x, channels, 8, bias=bias)), 8))


def with_inputs(net, output, *inputs, opset=17):
    """A model with inputs beside or instead of x: (name, type, shape) each."""
    made = [helper.make_tensor_value_info(*i) for i in inputs]
    given = [net.input] if any("x" in node.input for node in net.nodes) else []
    model = helper.make_model(
        helper.make_graph(
            net.nodes,
            "net",
            [*given, *made],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            net.constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def tokens(rows=20, through=(), mask=False, length=6):
    """An embedding, perhaps with a mask that multiplies it."""
    net = Net([1])
    ids = "ids"
    for op in through:
        ids = net.op(op, ids, **({"to": TensorProto.INT32} if op == "Cast" else {}))
    x = net.op("Gather", net.weight(rows, 8), ids, axis=0)
    inputs = [("ids", TensorProto.INT64, ["N", length])]
    if mask:
        x = net.op("Mul", x, net.op("Unsqueeze", net.op("Cast", "mask", to=TensorProto.FLOAT), net.constant([2], np.int64)))
        inputs.append(("mask", TensorProto.INT64, ["N", length]))
    return with_inputs(net, net.linear(net.op("Relu", net.linear(x, 8, 16)), 16, 4), *inputs)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds(IMAGES))
def test_networks_on_images_need_nothing(name):
    model = ZOO[name]()
    result = free(model, verify=True)
    onnx.checker.check_model(result.model)
    assert json.loads(json.dumps(result.report)) == result.report
    kept = any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert told(result)["source"] == ("statistics" if kept and name == "mobilenet" else "fractals")
    assert "against_real_data" not in told(result) and not any("--data" in note for note in result.report["notes"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_need_a_range(name):
    with pytest.raises(OnnxqError, match=r"input 'x' \(float32\).*data-free.inputs=\{x=\[LOW, HIGH\]\}"):
        free(ZOO[name]())
    model = ZOO[name]()
    result = free(model, "data-free.inputs={x=[-4, 4]}", verify=True, samples=16)
    a, b = (np.concatenate([run(m, s)[0].ravel() for s in feeds(model, 4)]) for m in (model, result.model))
    assert sqnr(a, b) > 15


@pytest.mark.parametrize("source", ["auto", "fractals", "noise", "statistics"])
@pytest.mark.parametrize("name", ["mobilenet", *slowly("cnn")])
def test_every_source_quantizes_every_network(name, source):
    model = ZOO[name]()
    result = free(model, f"data-free.source={source}", "data-free.inputs={x=[-3, 3]}", verify=True)
    samples = feeds(model, 8)
    a, b = (np.concatenate([run(m, s)[0].ravel() for s in samples]) for m in (model, result.model))
    assert sqnr(a, b) > 8
    assert told(result)["source"] == (source if source != "auto" else "statistics" if name == "mobilenet" else "fractals")


@pytest.mark.parametrize("kept, chosen", [(4, "statistics"), (3, "statistics"), (2, "fractals"), (0, "fractals")])
def test_auto_takes_statistics_where_nearly_all_layers_have_them(kept, chosen):
    net = Net(["N", 3, 8, 8])
    x, last = "x", 3
    for n in range(4):
        x, last = net.conv(x, last, 6), 6
        x = net.op("Relu", net.batchnorm(x, 6) if n < kept else x)
    assert told(free(net.model(x)))["source"] == chosen


def test_a_model_without_layers_has_no_statistics():
    assert DataFree()._source(load(ZOO["no_layer"]())) == "fractals"


def test_unknown_sources_and_numbers_out_of_range():
    for setting in ("data-free.source=photos", "data-free.samples=0", "data-free.deviations=0"):
        with pytest.raises(OnnxqError, match=setting.split("=")[0].split(".")[1]):
            quantize(cnn(), RECIPE, settings=[setting])


def test_more_deviations_are_wider_ranges():
    graph = load(mobilenet())
    narrow, wide = (free(mobilenet(), f"data-free.deviations={k}").plan for k in (1.0, 6.0))
    activations = [n for n in narrow if not graph.is_constant(n)]
    assert all(narrow[n].scale <= wide[n].scale for n in activations)
    assert sum(narrow[n].scale < 0.9 * wide[n].scale for n in activations) > len(activations) / 2


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels"),
    some(
        itertools.product([(12, 12), ("H", "W"), (9, 14)], [1, 3, 4, 5]),
        *[((12, 12), 1), (("H", "W"), 3), ((9, 14), 4), ((9, 14), 5)],
    ),
)
def test_images_of_any_form(channels, size):
    model = image_net(channels, size)
    samples, _ = make(model, size=24)
    wanted = tuple(n if isinstance(n, int) else 24 for n in size)
    assert all(s["x"].shape == (1, channels, *wanted) and s["x"].dtype == np.float32 for s in samples)
    assert np.std(samples[0]["x"]) > 0
    free(model, "data-free.size=24", verify=True)


def test_dynamic_images_are_224_wide():
    samples, _ = make(image_net(3, ("H", "W")), count=1)
    assert samples[0]["x"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_may_come_last(channels):
    model = image_net(channels, (10, 14), last=True)
    samples, made = make(model)
    assert samples[0]["x"].shape == (1, 10, 14, channels) and "first layer" in made["x"].source
    first, _ = make(image_net(channels, (10, 14)))
    np.testing.assert_allclose(samples[2]["x"], first[2]["x"].transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    free(model, verify=True)


def test_a_fixed_batch_is_filled():
    model = image_net(batch=3)
    samples, _ = make(model, count=4)
    assert [s["x"].shape[0] for s in samples] == [3, 3]
    free(model, verify=True)


def test_samples_are_kept_as_bytes():
    """64 images of float32 would be four times as large."""
    import tracemalloc

    graph = load(image_net(3, (64, 64)))
    tracemalloc.start()
    data, _ = synthesize(graph, Wish(count=64), np.random.default_rng(0))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 64 * 3 * 64 * 64 <= held < 1.5 * 64 * 3 * 64 * 64 and data.size == 64


def pixels(samples):
    return np.concatenate([s["x"] for s in samples])


@pytest.mark.parametrize(
    "options, size", [(((0.5,), (0.25,)), 3), (((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), 3), (((0.1,), (2.0,)), 1)]
)
def test_mean_and_std_say_the_scale(options, size):
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in options)
    given, made = make(image_net(size), options=DataOptions(mean=options[0], std=options[1]))
    plain, _ = make(image_net(size), ranges={"x": between(0, 1)})
    np.testing.assert_allclose(pixels(given), (pixels(plain) - mean) / std, rtol=1e-4, atol=1e-5)
    assert "mean and std" in made["x"].source


def test_a_declared_range_of_an_image_is_that_of_black_and_white():
    for low, high in ((0, 1), (0, 255), (-1, 1), ([-1, -2, -3], [1, 2, 3])):
        samples, made = make(image_net(), ranges={"x": between(low, high)})
        x, ends = pixels(samples), [np.atleast_1d(v).reshape(-1, 1, 1) for v in (low, high)]
        assert (x >= ends[0] - 1e-4).all() and (x <= ends[1] + 1e-4).all() and "declared" in made["x"].source
        assert (np.ptp(x, axis=(0, 2, 3)) > 0.5 * np.ravel(ends[1] - ends[0])).all()


def test_images_that_are_rgb_over_255_as_they_are():
    """A mean of 0 and a std of 1 look as if not given, so the scale would be guessed; the declared range is the way."""
    guessed = told(free(cnn(), "data.mean=0", "data.std=1"))["inputs"]["x"]
    declared = free(cnn(), "data-free.inputs={x=[0, 1]}")
    assert "first layer" in guessed and "declared" in told(declared)["inputs"]["x"]
    assert 0.5 < declared.plan["x"].scale * 255 <= 1.01
    assert "[0, 1]" in DataFree.__doc__


@pytest.mark.parametrize(
    "size, settings, words",
    [
        (3, ["data.mean=[0.5, 0.5]"], "'x' has 3 channels.*2 values"),
        (1, ["data.mean=[0.4, 0.5, 0.6]"], "'x' has 1 channels"),
        (5, ["data.std=[0.4, 0.5, 0.6]"], "'x' has 5 channels"),
        (3, ["data.std=0.0"], "not zero"),
        (3, ["data.std=nan"], "finite"),
        (3, ["data.mean=inf"], "finite"),
        (3, ["data-free.inputs={x=[[0, 0], [1, 1]]}"], "'x' is declared for 2 channels, but it has 3"),
    ],
)
def test_scales_that_do_not_fit_the_channels(size, settings, words):
    with pytest.raises(OnnxqError, match=words) as caught:
        free(image_net(size), *settings)
    assert len(caught.value.problems) == 1


def test_noise_has_the_moments_of_the_images():
    images, noise = (pixels(make(image_net(), kind=kind, count=24)[0]) for kind in ("fractals", "noise"))
    np.testing.assert_allclose(noise.mean(axis=(0, 2, 3)), images.mean(axis=(0, 2, 3)), atol=0.1 * images.std())
    np.testing.assert_allclose(noise.std(axis=(0, 2, 3)), images.std(axis=(0, 2, 3)), rtol=0.1)
    alike = [np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1] for x in (images, noise)]
    assert alike[0] > 0.4 and abs(alike[1]) < 0.3


@pytest.mark.parametrize("name", ["cnn", "mobilenet"])
def test_told_moments_are_those_of_the_samples(name):
    samples, made = make(ZOO[name](), count=10)
    x, moments = pixels(samples), made["x"].distribution
    np.testing.assert_allclose(moments.mean, x.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(moments.variance, x.var(axis=(0, 2, 3)), rtol=1e-2)
    assert (moments.low <= x.min(axis=(0, 2, 3)) + 1e-4).all() and (moments.high >= x.max(axis=(0, 2, 3)) - 1e-4).all()


@pytest.mark.parametrize(
    ("mean", "std", "last"),
    some(
        ((mean, std, last) for mean, std in SCALES for last in (False, True)),
        *((mean, std, std == 0.5) for mean, std in SCALES),
    ),
)
def test_the_scale_is_read_off_the_statistics_of_the_first_layer(mean, std, last):
    """A BatchNormalization that saw (images - mean) / std tells the mean and the deviation of what it saw."""
    rng = np.random.default_rng(11)
    seen = (np.stack(list(fractals(48, 24, 24, 3, rng))) - np.array(mean)) / std
    net = Net(["N", 24, 24, 3] if last else ["N", 3, 24, 24])
    weight = net.rng.normal(size=(16, 3, 3, 3)) / 5 * std
    start = net.op("Transpose", "x", perm=[0, 3, 1, 2]) if last else "x"
    conv = net.op("Conv", start, net.constant(weight))
    y = run(net.model(conv), {"x": (seen if last else seen.transpose(0, 3, 1, 2)).astype(np.float32)})[0]
    gamma = net.rng.uniform(0.5, 1.5, 16)
    norm = (gamma, net.rng.normal(size=16) / 4, y.mean(axis=(0, 2, 3)), y.var(axis=(0, 2, 3)))
    model = net.model(net.head(net.op("Relu", net.op("BatchNormalization", conv, *map(net.constant, norm))), 16))
    samples, made = make(model, count=48)
    found = pixels(samples).reshape(-1, 24, 24, 3) if last else pixels(samples).transpose(0, 2, 3, 1)
    assert "statistics of the first layer" in made["x"].source
    deviation = seen.std(axis=(0, 1, 2))
    np.testing.assert_allclose(found.std(axis=(0, 1, 2)), deviation, rtol=0.25)
    np.testing.assert_allclose(found.mean(axis=(0, 1, 2)), seen.mean(axis=(0, 1, 2)), atol=0.25 * deviation.max())


def test_a_first_layer_of_zeros_says_nothing():
    net = Net(["N", 3, 8, 8])
    model = net.model(net.head(net.op("Conv", "x", net.constant(np.zeros((4, 3, 1, 1))), net.weight(4)), 4))
    assert 0 <= pixels(make(model)[0]).min() <= pixels(make(model)[0]).max() <= 1


# ---- features -------------------------------------------------------------------------------------------------------


def features(shape):
    net = Net(shape)
    return net.model(net.linear("x", shape[-1], 5))


@pytest.mark.parametrize("shape", [["N", 6], ["N", 4, 6], ["N", "T", 6]])
@pytest.mark.parametrize("low, high", [(-1, 1), (-350, 30), (0, 100), (5, 10), (-8, -2), (3, 3)])
def test_one_declared_range_is_the_range_of_the_samples(shape, low, high):
    samples, made = make(features(shape), ranges={"x": between(low, high)}, count=8)
    x = np.concatenate([s["x"].reshape(-1, 6) for s in samples])
    assert x.min() == pytest.approx(low) and x.max() == pytest.approx(high)
    assert made["x"].distribution.low.min() == pytest.approx(low) and made["x"].distribution.high.max() == pytest.approx(
        high
    )
    if low < high:
        assert len(np.unique(x)) > 8


@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (-0.5, 0.5), (0, 6), (-9, 0)])
def test_the_declared_range_is_in_the_plan(low, high):
    result = free(mlp(), f"data-free.inputs={{x=[{low}, {high}]}}", samples=16)
    spec = result.plan.get("x")
    if spec is None:  # scale-inputs took the channels apart
        spec = result.plan["x_scaled"]
    found = ((0 - spec.zero_point) * spec.scale, (255 - spec.zero_point) * spec.scale)
    assert found[0] == pytest.approx(min(low, 0), abs=0.05 * (high - low))
    assert found[1] == pytest.approx(max(high, 0), abs=0.05 * (high - low))


def test_declared_ranges_of_channels_are_theirs():
    low, high = np.array([-1, 0, -100, 5, 0, -3.0]), np.array([1, 4, 20, 6, 0, -2.0])
    for shape in (["N", 6], ["N", 3, 6]):
        samples, made = make(features(shape), ranges={"x": (low, high)}, count=12)
        x = np.concatenate([s["x"].reshape(-1, 6) for s in samples])
        np.testing.assert_allclose(x.min(axis=0), low, rtol=1e-6)
        np.testing.assert_allclose(x.max(axis=0), high, rtol=1e-6)
        assert "channels" in made["x"].source
    free(features(["N", 6]), f"data-free.inputs={{x=[{low.tolist()}, {high.tolist()}]}}", verify=True)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_channels_reach_both_ends_whatever_the_number_of_samples(count):
    samples, _ = make(features(["N", 4, 6]), ranges={"x": between([-2] * 6, [3] * 6)}, count=count)
    x = np.concatenate([s["x"].reshape(-1, 6) for s in samples])
    assert (x.min(axis=0) == -2).all() and (x.max(axis=0) == 3).all()


def test_moments_of_features_are_those_of_the_samples():
    for low, high in ((-350, 30), (-1, 1), (2, 9)):
        samples, made = make(features(["N", 50, 6]), ranges={"x": between([low] * 6, [high] * 6)}, count=60)
        x = np.concatenate([s["x"].reshape(-1, 6) for s in samples])
        np.testing.assert_allclose(made["x"].distribution.mean, x.mean(axis=0), atol=0.02 * (high - low))
        np.testing.assert_allclose(made["x"].distribution.variance, x.var(axis=0), rtol=0.15)


def test_features_behind_large_weights_get_less_of_one_range_around_zero():
    net = Net(["N", 4])
    weight = net.rng.normal(size=(4, 30)) * np.array([1, 10, 100, 1000])[:, None]
    model = net.model(net.op("MatMul", "x", net.constant(weight)))
    share = np.ptp(np.concatenate([s["x"] for s in make(model, ranges={"x": between(-1, 1)}, count=30)[0]]), axis=0)
    np.testing.assert_allclose(share, 2 / np.array([1, 10, 100, 1000.0]), rtol=0.5)
    away = np.concatenate([s["x"] for s in make(model, ranges={"x": between(5, 6)}, count=30)[0]])
    assert away.min() >= 5


def test_weights_of_zero_say_nothing_about_features():
    net = Net(["N", 4])
    model = net.model(net.op("MatMul", "x", net.constant(np.zeros((4, 3)))))
    samples, _ = make(model, ranges={"x": between(-1, 1)})
    assert np.isfinite([s["x"] for s in samples]).all() and np.ptp([s["x"] for s in samples]) > 0


def test_a_lone_number_beside_an_image():
    net = Net(["N", 3, 8, 8])
    model = with_inputs(net, net.head(net.conv(net.op("Mul", "x", "gain"), 3, 6), 6), ("gain", TensorProto.FLOAT, []))
    with pytest.raises(OnnxqError, match="'gain'"):
        free(model)
    samples, _ = make(model, ranges={"gain": between(1, 2)})
    assert all(s["gain"].shape == () and 1 <= s["gain"] <= 2 for s in samples)
    free(model, "data-free.inputs={gain=[1, 2]}", verify=True)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [(), ("Cast",), ("Identity", "Cast")])
def test_tokens_pick_rows_of_their_table(through):
    model = tokens(rows=7, through=through)
    samples, made = make(model, count=40)
    ids = np.concatenate([s["ids"] for s in samples])
    assert set(ids.ravel()) == set(range(7)) and ids.dtype == np.int64 and "rows of the table" in made["ids"].source
    free(model, verify=True)


def test_dynamic_lengths_are_128_or_as_asked():
    assert make(tokens(length="T"))[0][0]["ids"].shape == (1, 128)
    assert make(tokens(length="T"), size=9)[0][0]["ids"].shape == (1, 9)


def test_the_smallest_of_several_tables_bounds_the_tokens():
    net = Net([1])
    y = net.op("Add", *(net.op("Gather", net.weight(rows, 8), "ids") for rows in (30, 4)))
    samples, _ = make(with_inputs(net, net.linear(y, 8, 4), ("ids", TensorProto.INT64, ["N", 5])), count=20)
    assert max(s["ids"].max() for s in samples) == 3


def test_a_mask_has_to_be_declared():
    with pytest.raises(OnnxqError, match=r"'mask' \(int64\)") as caught:
        free(tokens(mask=True))
    assert len(caught.value.problems) == 1
    result = free(tokens(mask=True), "data-free.inputs={mask=[1, 1]}", verify=True)
    assert told(result)["inputs"]["mask"] == "whole numbers from 1 to 1, as declared"


def test_truth_values_are_true_unless_declared():
    net = Net(["N", 3, 8, 8])
    y = net.op("Where", "flag", net.conv("x", 3, 6), net.constant(0.0))
    model = with_inputs(net, net.head(y, 6), ("flag", TensorProto.BOOL, ["N", 6, 1, 1]))
    assert all(s["flag"].all() and s["flag"].dtype == bool for s in make(model)[0])
    mixed = np.concatenate([s["flag"] for s in make(model, ranges={"flag": between(0, 1)}, count=20)[0]])
    assert 0.2 < mixed.mean() < 0.8
    free(model, verify=True)


@pytest.mark.parametrize(
    "ends, words",
    [
        ("[0, 20]", "table of 20"),
        ("[-21, 3]", "table of 20"),
        ("[0.2, 0.8]", "whole numbers"),
        ("[[0, 0], [1, 1]]", "one range for all"),
    ],
)
def test_declared_tokens_must_be_rows_of_the_table(ends, words):
    with pytest.raises(OnnxqError, match=f"input 'ids'.*{words}") as caught:
        free(tokens(rows=20), f"data-free.inputs={{ids={ends}}}")
    assert len(caught.value.problems) == 1


def test_declared_numbers_must_fit_their_type():
    net = Net([1])
    model = with_inputs(net, net.linear(net.op("Cast", "b", to=TensorProto.FLOAT), 6, 4), ("b", TensorProto.UINT8, ["N", 6]))
    with pytest.raises(OnnxqError, match=r"'b' \(uint8\).*between 0 and 255"):
        free(model, "data-free.inputs={b=[0, 256]}")
    assert max(s["b"].max() for s in make(model, ranges={"b": between(0, 255)}, count=300)[0]) == 255


def test_two_inputs_of_different_kinds():
    net = Net(["N", 3, 8, 8])
    image = net.head(net.op("Relu", net.conv("x", 3, 8)), 8, 6)
    y = net.op("Add", image, net.linear("extra", 4, 6))
    model = with_inputs(net, y, ("extra", TensorProto.FLOAT, ["N", 4]))
    samples, made = make(model, ranges={"extra": between(-1, 1)})
    assert set(samples[0]) == {"x", "extra"} and "fractals" in made["x"].source and "noise" in made["extra"].source
    free(model, "data-free.inputs={extra=[-1, 1]}", verify=True)


def test_verify_before_there_is_data_fits_tables_masks_and_kernels():
    """The pass itself is probed without data: a table of two rows, a mask that must not be all zeros, an image that has to
    be larger than unpadded kernels."""
    net = Net([1])
    rows = net.op("Gather", net.weight(2, 8), "ids")
    score = net.op("Where", "mask", rows, net.constant(-np.inf))
    y = net.linear(net.op("MatMul", net.op("Softmax", score, axis=-1), net.weight(8, 8)), 8, 4)
    model = with_inputs(net, y, ("ids", TensorProto.INT64, ["N", 200]), ("mask", TensorProto.BOOL, ["N", 200, 8]))
    free(model, verify=True)
    net = Net(["N", 3, "H", "W"])
    x = net.op("Relu", net.conv("x", 3, 6, 7, pads=[0] * 4))
    free(net.model(net.head(net.conv(x, 6, 6, 5, pads=[0] * 4), 6)), "data-free.size=24", verify=True)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends",
    [
        "[1, -1]",
        "[0, nan]",
        "[0, inf]",
        "[0]",
        "[0, 1, 2]",
        "3",
        "'wide'",
        "[[0, 1], [1]]",
        "[[], []]",
        "[[0, 3], [1, 2]]",
        "{low=0, high=1}",
    ],
)
def test_ranges_that_are_none(ends):
    with pytest.raises(OnnxqError, match="range of 'x' must be") as caught:
        free(mlp(), f"data-free.inputs={{x={ends}}}")
    assert len(caught.value.problems) == 1
    with pytest.raises(ValueError, match="'x'"):
        DataFree(inputs={"x": [1, -1]})


def test_ranges_for_inputs_that_do_not_exist():
    with pytest.raises(OnnxqError, match=r"'pixels'.*'x'") as caught:
        free(cnn(), "data-free.inputs={pixels=[0, 1]}")
    assert len(caught.value.problems) == 1


def test_all_problems_are_told_at_once():
    with pytest.raises(OnnxqError) as caught:
        free(tokens(mask=True), "data-free.inputs={tokens=[0, 1], ids=[0, 99]}")
    assert [any(word in p for p in caught.value.problems) for word in ("'tokens'", "'ids'", "'mask'")] == [True] * 3


@pytest.mark.parametrize("name", ["input.1", "serving_default_x:0", "a b"])
def test_the_setting_that_an_error_suggests_can_be_used(name):
    model = mlp()
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    with pytest.raises(OnnxqError) as caught:
        free(model)
    setting = caught.value.problems[0].split("--set '")[1].split("'")[0] if "'" not in name else ""
    free(model, setting.replace("LOW", "-1").replace("HIGH", "1"))


def test_int8_without_data_names_this_recipe():
    with pytest.raises(OnnxqError, match="int8-data-free"):
        quantize(cnn(), "int8")


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, settings",
    [
        (mobilenet, []),
        (tokens, []),
        (mlp, ["data-free.inputs={x=[-1, 1]}"]),
        *slowly((cnn, []), (cnn, ["data-free.source=noise"])),
    ],
)
def test_a_seed_decides_the_model(model, settings):
    first, again, other = (free(model(), *settings, seed=seed).model.SerializeToString() for seed in (3, 3, 4))
    assert first == again
    plans = [free(model(), *settings, seed=seed).plan for seed in (3, 4)]
    assert model is mobilenet or any(not np.array_equal(plans[0][n].scale, plans[1][n].scale) for n in plans[0])
    assert first != other


@pytest.mark.parametrize("model", [cnn, mobilenet])
def test_real_data_is_compared_with_and_not_used(model):
    proto = model()
    alone = free(proto)
    for scale in (1.0, 50.0):
        x = np.concatenate([s["x"] for s in feeds(proto, 5)]) * np.float32(scale)
        beside = free(proto, data=x, verify=True)
        assert beside.model.SerializeToString() == alone.model.SerializeToString()
        report = told(beside)["against_real_data"]
        assert 0 <= report["overlap_mean"] <= 1 and report["width_ratio_median"] > 0 and len(report["worst"]) == 3
        assert json.loads(json.dumps(beside.report)) == beside.report


def test_overlap_with_the_very_same_ranges_is_one():
    model = features(["N", 6])
    settings = "data-free.inputs={x=[-1, 1]}"
    made, _ = make(model, ranges={"x": between(-1, 1)}, count=4)
    report = told(free(model, settings, data=made))["against_real_data"]
    assert report["overlap_mean"] > 0.7 and report["width_ratio_median"] == pytest.approx(1, abs=0.3)


def test_later_passes_ask_the_synthetic_data(tmp_path):
    """Histograms, Gram matrices and means; with a cache too."""
    recipe = {"pass": [{"use": "data-free", "samples": 6}, {"use": "ranges", "method": "mse"}, {"use": "round"}]}
    first = quantize(cnn(), recipe, cache=tmp_path)
    assert quantize(cnn(), recipe, cache=tmp_path).model.SerializeToString() == first.model.SerializeToString()
    recipe["pass"][0]["source"] = "statistics"
    a = quantize(mobilenet(), recipe, cache=tmp_path).model.SerializeToString()
    assert a == quantize(mobilenet(), recipe).model.SerializeToString()


# ---- the command line -----------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    from typer.testing import CliRunner

    onnx.save(cnn(), tmp_path / "m.onnx")
    arguments = [
        "quantize",
        str(tmp_path / "m.onnx"),
        "-o",
        str(tmp_path / "q.onnx"),
        "--report",
        str(tmp_path / "r.json"),
        "-r",
        RECIPE,
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--verify",
        "--set",
        "data-free.samples=4",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert "mean and std" in report["steps"][0]["result"]["inputs"]["x"]
    x = onnx.load(tmp_path / "q.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in x.graph.node)
