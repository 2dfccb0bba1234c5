"""Statistics of activations against numpy, resuming and caching, and the choice of ranges from histograms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import helper

from onnxq_plugins import quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.calibration.reductions import beside_makers
from onnxq_plugins.data import Data, graph_inputs, open_data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import load
from tests.zoo import ZOO, Net, cnn, conv1d, feeds, mlp, resnet20, run, transformer

STATISTICS = ["ranges", "channel_ranges", "means", "moments", "histograms", "grams"]


def calibrate(model, n=5, **options):
    """A Calibration over `n` random samples, its graph, and the feeds."""
    graph, samples = load(model), feeds(model, n)
    return Calibration(graph, Data(graph_inputs(graph), lambda: iter(samples)), **options), graph, samples


@pytest.mark.parametrize("name", ["cnn", "transformer", "control_flow", "no_layer"])
def test_what_is_added_to_a_model_runs_where_its_inputs_are_computed(name):
    graph = load(ZOO[name]())
    model = graph.model()
    own = [node.name for node in model.graph.node]
    made = {output: node.name for node in model.graph.node for output in node.output}
    for tensor in [*graph.inputs, *made]:
        model.graph.node.append(helper.make_node("Mul", [tensor, tensor], [f"{tensor}|square"], f"{tensor}|square"))
        model.graph.node.append(helper.make_node("Size", [f"{tensor}|square"], [f"{tensor}|size"], f"{tensor}|size"))
    beside_makers(model.graph, len(own))
    names = [node.name for node in model.graph.node]
    assert [n for n in names if n in own] == own
    for tensor in [*graph.inputs, *made]:
        square = names.index(f"{tensor}|square")
        before = [n for n in names[: square + 1] if n in own]
        assert names.index(f"{tensor}|size") > square and (before[-1:] == [made[tensor]] if tensor in made else not before)


def fetch(graph, name, samples):
    """One activation for all samples, concatenated."""
    model = graph.model()
    if name in graph.inputs:
        return np.concatenate([s[name] for s in samples])
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info(name))
    return np.concatenate([run(model, s)[0] for s in samples])


def activations(graph):
    """Model inputs and the outputs of all operators, where these are float32 and have a channel axis."""
    named = [t for node in graph.nodes for t in node.outputs if t.dtype == np.float32 and len(t.shape or ()) > 1]
    return [*graph.inputs, *(t.name for t in named)]


def compute(calibration, statistic):
    graph = calibration.graph
    if statistic == "grams":
        return calibration.grams([y for y in graph.layers if y.op != "ConvTranspose"])
    return getattr(calibration, statistic)(activations(graph))


def plain(statistic):
    """A statistic as a flat list of arrays, to compare two of them."""
    if isinstance(statistic, dict):
        return [array for name in sorted(statistic) for array in plain(statistic[name])]
    if isinstance(statistic, tuple):
        return [np.asarray(x) for x in statistic]
    return [np.asarray(x) for x in vars(statistic).values()] if hasattr(statistic, "__dict__") else [np.asarray(statistic)]


def assert_same(a, b):
    for x, y in zip(plain(a), plain(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def sessions(monkeypatch):
    """Numbers of sessions created and of samples run."""
    count = {"sessions": 0, "runs": 0}
    make = runtimes.session

    class Counted:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def run(self, *args):
            count["runs"] += 1
            return self.inner.run(*args)

    def session(*args, **options):
        count["sessions"] += 1
        return Counted(make(*args, **options))

    monkeypatch.setattr(runtimes, "session", session)
    return count


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cnn", "mobilenet", "inception", "mlp", "transformer", "conv_transpose", "control_flow", "no_layer"]
)
def test_reductions_equal_numpy(name):
    calibration, graph, samples = calibrate(ZOO[name]())
    names = activations(graph)
    ranges, channels = calibration.ranges(names), calibration.channel_ranges(names)
    means, moments = calibration.means(names), calibration.moments(names)
    for tensor in names:
        x = fetch(graph, tensor, samples)
        rows = np.moveaxis(x, 1 if x.ndim == 4 else -1, 0).reshape(x.shape[1 if x.ndim == 4 else -1], -1)
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(x).max()}
        np.testing.assert_allclose(ranges[tensor], (x.min(), x.max()), **close)
        np.testing.assert_allclose(channels[tensor], (rows.min(axis=1), rows.max(axis=1)), **close)
        np.testing.assert_allclose(means[tensor], rows.mean(axis=1), **close)
        np.testing.assert_allclose(moments[tensor].mean, rows.mean(axis=1), **close)
        np.testing.assert_allclose(moments[tensor].square, (rows**2).mean(axis=1), **close)


def test_channels_of_conv1d_are_axis_1():
    """Also where no other convolution reads the tensor."""
    calibration, graph, samples = calibrate(conv1d())
    for layer in (y for y in graph.layers if y.op == "Conv"):
        for tensor in (layer.input, layer.output, layer.result):
            x = fetch(graph, tensor, samples)
            np.testing.assert_allclose(calibration.means([tensor])[tensor], x.mean(axis=(0, 2)), rtol=1e-3, atol=1e-5)


def test_scalars_and_vectors_have_ranges():
    net = Net(["N", 6])
    total = net.op("ReduceSum", net.gemm("x", 6, 8), keepdims=0)
    model = net.model(net.op("Mul", "x", total))
    calibration, graph, samples = calibrate(model)
    x = np.array([run_one(graph, total, s) for s in samples])
    assert calibration.ranges([total])[total] == pytest.approx((x.min(), x.max()), rel=1e-5)


def run_one(graph, name, feed):
    model = graph.model()
    model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info(name))
    return run(model, feed)[0]


def test_samples_of_different_sizes():
    """Mean and mean square are over the same positions, so that they give a valid variance."""
    net = Net(["N", 3, "H", "W"])
    model = net.model(net.conv("x", 3, 4))
    graph, rng = load(model), np.random.default_rng(0)
    samples = [{"x": (rng.normal(size=(1, 3, n, n + 1)) + n).astype(np.float32)} for n in (4, 9, 6)]
    calibration = Calibration(graph, Data(graph_inputs(graph), lambda: iter(samples)))
    rows = np.concatenate([s["x"].reshape(3, -1) for s in samples], axis=1)
    moments = calibration.moments(["x"])["x"]
    np.testing.assert_allclose(moments.square, (rows**2).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("bins", [256, 2048])
def test_histograms_equal_numpy(bins):
    calibration, graph, samples = calibrate(cnn())
    for tensor, h in calibration.histograms(activations(graph), bins).items():
        x = fetch(graph, tensor, samples)
        counts, _ = np.histogram(x, bins, (h.low, h.high))
        assert h.low == pytest.approx(x.min(), abs=1e-5) and h.high == pytest.approx(x.max(), rel=1e-5)
        assert h.counts.sum() == x.size and h.centers.shape == h.counts.shape
        assert np.abs(h.counts - counts).sum() <= 0.01 * x.size + 2  # values on an edge may fall on either side
        assert h.counts @ h.centers / x.size == pytest.approx(x.mean(), abs=(h.high - h.low) / bins)


def test_histograms_of_large_tensors_are_an_even_subsample():
    net = Net(["N", 4, 128, 128])
    calibration, _, samples = calibrate(net.model(net.op("Relu", "x")), n=3)
    h = calibration.histograms(["x"])["x"]
    x = fetch(calibration.graph, "x", samples)
    assert 3 * 8192 <= h.counts.sum() <= 3 * 16384 and (h.low, h.high) == (x.min(), x.max())
    counts, _ = np.histogram(x, len(h.counts), (h.low, h.high))
    assert np.abs(np.cumsum(h.counts) / h.counts.sum() - np.cumsum(counts) / x.size).max() < 0.015


def test_histogram_of_a_constant_activation():
    net = Net(["N", 8])
    calibration, _, _ = calibrate(net.model(net.op("Mul", "x", net.constant(0.0))))
    h = calibration.histograms(calibration.graph.outputs)[calibration.graph.outputs[0]]
    assert (h.low, h.high, h.counts.sum()) == (0, 0, 40)


# ---- Gram matrices --------------------------------------------------------------------------------------------------


def im2col(layer, x, pads):
    """Patches [groups, D, samples * positions] by loops; pads as (before, after) per axis."""
    kernel, rank = layer.shape[2:], len(layer.shape) - 2
    strides, dilations = layer.attrs.get("strides", [1] * rank), layer.attrs.get("dilations", [1] * rank)
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    columns = []
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    starts = [range(0, n - e + 1, s) for n, e, s in zip(x.shape[2:], extent, strides, strict=True)]
    for sample in x:
        for corner in itertools.product(*starts):
            window = tuple(slice(c, c + e, d) for c, e, d in zip(corner, extent, dilations, strict=True))
            columns.append(sample[(slice(None), *window)].reshape(layer.groups, -1))
    return np.stack(columns, axis=2)


CONVS = {  # (input, weight, attributes, pads written out)
    "plain": ((6, 7, 8), (8, 6, 3, 3), {}, [(0, 0), (0, 0)]),
    "pads": ((6, 7, 8), (8, 6, 3, 5), {"pads": [1, 2, 0, 1]}, [(1, 0), (2, 1)]),
    "strides": ((6, 9, 8), (8, 6, 3, 2), {"strides": [2, 3]}, [(0, 0), (0, 0)]),
    "dilations": ((6, 9, 9), (8, 6, 3, 2), {"dilations": [2, 3], "pads": [1] * 4}, [(1, 1), (1, 1)]),
    "pointwise": ((6, 5, 5), (8, 6, 1, 1), {"strides": [2, 2]}, [(0, 0), (0, 0)]),
    "same upper": ((6, 7, 8), (8, 6, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [(1, 2), (0, 1)]),
    "same lower": ((6, 7, 8), (8, 6, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [(2, 1), (1, 0)]),
    "valid": ((6, 7, 8), (8, 6, 3, 3), {"auto_pad": "VALID", "strides": [2, 2]}, [(0, 0), (0, 0)]),
    "groups": ((6, 7, 8), (9, 2, 3, 3), {"group": 3, "pads": [1] * 4}, [(1, 1), (1, 1)]),
    "depthwise": ((6, 7, 8), (12, 1, 3, 3), {"group": 6, "strides": [2, 1]}, [(0, 0), (0, 0)]),
    "conv1d": ((6, 21), (8, 3, 5), {"group": 2, "pads": [2, 1], "strides": [2], "dilations": [2]}, [(2, 1)]),
    "conv3d": ((4, 4, 5, 3), (5, 4, 2, 3, 1), {"pads": [1, 0, 0, 0, 1, 0], "strides": [1, 2, 1]}, [(1, 0), (0, 1), (0, 0)]),
}


@pytest.mark.parametrize("case", CONVS)
def test_grams_of_convolutions(case):
    shape, weight, attrs, pads = CONVS[case]
    net = Net(["N", *shape])
    model = net.model(net.op("Conv", "x", net.weight(*weight), net.weight(weight[0]), **attrs))
    calibration, graph, samples = calibrate(model)
    (layer,) = graph.layers
    gram = calibration.grams([layer], positions=10**6)[layer.name]
    columns = im2col(layer, fetch(graph, "x", samples), pads).astype(np.float64)
    check_gram(gram, columns)
    check_mean(gram, graph, layer, fetch(graph, layer.output, samples))


@pytest.mark.parametrize("shape", [["N", 7], ["N", 5, 7], ["N", 2, 5, 7]])
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_grams_of_matrix_products(op, shape):
    net = Net(shape)
    y = net.linear("x", 7, 9, bias=op == "Gemm")
    calibration, graph, samples = calibrate(net.model(y))
    (layer,) = graph.layers
    assert layer.op == op
    gram = calibration.grams([layer], positions=10**6)[layer.name]
    check_gram(gram, np.concatenate([s["x"] for s in samples]).reshape(-1, 7).T[None].astype(np.float64))
    check_mean(gram, graph, layer, fetch(graph, layer.output, samples))


def test_gram_of_a_gemm_with_its_weight_the_other_way_round():
    calibration, graph, samples = calibrate(mlp())
    for layer, gram in zip(graph.layers, calibration.grams(graph.layers).values(), strict=True):
        check_gram(gram, fetch(graph, layer.input, samples).T[None].astype(np.float64))
        check_mean(gram, graph, layer, fetch(graph, layer.output, samples))


def check_gram(gram, columns):
    count = columns.shape[2]
    assert gram.count == count and gram.h.dtype == np.float64
    np.testing.assert_allclose(gram.h, columns @ columns.transpose(0, 2, 1) / count, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gram.mean, columns.mean(axis=2), rtol=1e-4, atol=1e-6)


def check_mean(gram, graph, layer, output):
    """W E[x] + b is the mean output: rows of the layer's matrix and of the Gram matrix are in the same order."""
    weight = layer.matrix(graph.constant(layer.weight).astype(np.float64))
    mean = np.einsum("god,gd->go", weight, gram.mean).reshape(-1)
    mean += graph.constant(layer.bias) if layer.bias else 0
    axis = 1 if layer.op == "Conv" else output.ndim - 1
    expected = output.mean(axis=tuple(a for a in range(output.ndim) if a != axis))
    np.testing.assert_allclose(mean, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "transformer", "conv1d", "no_bias", "odd_channels"])
def test_mean_outputs_from_grams(name):
    calibration, graph, samples = calibrate(ZOO[name]())
    for layer, gram in zip(graph.layers, calibration.grams(graph.layers, positions=10**6).values(), strict=True):
        check_mean(gram, graph, layer, fetch(graph, layer.output, samples))


def test_positions_bound_the_patches_per_sample():
    calibration, graph, _ = calibrate(cnn(), n=4)
    layer = graph.layers[0]
    few, every = (calibration.grams([layer], positions=n)[layer.name] for n in (50, 10**6))
    assert few.count == 4 * 50 and every.count == 4 * 144
    assert 0 < np.abs(few.h - every.h).max() < 0.5 * np.abs(every.h).max()


def test_samples_see_different_positions():
    net = Net(["N", 1, 16, 16])
    model = net.model(net.conv("x", 1, 4, 1, bias=False))
    graph = load(model)
    x = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    once, twice = (Calibration(graph, Data(graph_inputs(graph), lambda n=n: iter([{"x": x}] * n))) for n in (1, 2))
    a, b = (c.grams(graph.layers, positions=10)[graph.layers[0].name].mean for c in (once, twice))
    assert not np.array_equal(a, b)


# ---- the fold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("make", [cnn, transformer])
def test_results_do_not_depend_on_workers(make, statistic):
    assert_same(*(compute(calibrate(make(), n=23, workers=w)[0], statistic) for w in (1, 2)))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_second_calibration_reads_the_cache(statistic, tmp_path, sessions):
    first = compute(calibrate(cnn(), cache=tmp_path / "deep")[0], statistic)
    assert sessions["sessions"] == (2 if statistic == "histograms" else 1)
    second = compute(calibrate(cnn(), cache=tmp_path / "deep")[0], statistic)
    assert sessions["sessions"] == (2 if statistic == "histograms" else 1)
    assert_same(first, second)
    assert not list(tmp_path.rglob("*.part.npz"))


def test_only_what_is_missing_is_computed(tmp_path, sessions):
    for cache in (None, tmp_path):
        calibration, graph, _ = calibrate(cnn(), cache=cache)
        names = activations(graph)
        sessions["sessions"] = 0
        some = calibration.ranges(names[:3])
        assert calibration.ranges(names[:2]) == {n: some[n] for n in names[:2]} and sessions["sessions"] == 1
        assert calibration.ranges([]) == {} and sessions["sessions"] == 1
        assert list(calibration.ranges(names)) == names and sessions["sessions"] == 2


@pytest.mark.parametrize("statistic", STATISTICS)
def test_runs_on_the_same_samples_compute_once_what_they_share(statistic, sessions):
    """As when one recipe after the other is tried; Gram matrices are too large to be kept."""
    calibration, _, _ = calibrate(cnn())
    before = compute(calibration, statistic)
    count = sessions["sessions"]
    after = compute(Calibration(load(cnn()), calibration.data), statistic)
    assert sessions["sessions"] == (2 * count if statistic == "grams" else count)
    assert_same(before, after)


def test_few_statistics_are_kept_with_the_samples(sessions):
    calibration, graph, _ = calibrate(cnn())
    for n in range(20):
        graph.set_constant(graph.layers[-1].bias, graph.constant(graph.layers[-1].bias) + 1)
        Calibration(graph, calibration.data).ranges(graph.inputs)
    assert len(calibration.data.known) < 20
    count = sessions["sessions"]
    Calibration(graph, calibration.data).ranges(graph.inputs)
    assert sessions["sessions"] == count  # the latest is still there


def test_cache_knows_model_and_data(tmp_path, sessions):
    calibration, graph, _ = calibrate(cnn(), cache=tmp_path)
    last = graph.layers[-1]
    before = calibration.ranges([last.output])
    graph.set_constant(last.bias, graph.constant(last.bias) + 100)
    assert calibration.ranges([last.output])[last.output][0] > before[last.output][1]
    calibrate(cnn(), n=6, cache=tmp_path)[0].ranges([last.output])
    assert sessions["sessions"] == 3
    assert calibrate(cnn(), cache=tmp_path)[0].ranges([last.output]) == before and sessions["sessions"] == 3


def test_a_truncated_cache_file_is_computed_again(tmp_path):
    expected = compute(calibrate(cnn(), cache=tmp_path)[0], "moments")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert_same(compute(calibrate(cnn(), cache=tmp_path)[0], "moments"), expected)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OnnxqError, match="cannot be written"):
        compute(calibrate(cnn(), cache=tmp_path / "file")[0], "ranges")


class Interrupted:
    """Samples whose second iteration (the first is for the digest) is interrupted after some of them."""

    def __init__(self, samples, after):
        self.samples, self.after, self.readings = samples, after, 0

    def __call__(self):
        self.readings += 1
        for n, sample in enumerate(self.samples):
            if self.readings == 2 and n == self.after:
                raise KeyboardInterrupt
            yield sample


@pytest.mark.parametrize("statistic", ["ranges", "moments", "grams"])
def test_interrupted_folds_resume(statistic, tmp_path, sessions, monkeypatch):
    monkeypatch.setattr(Calibration, "checkpoint", 8)
    graph = load(resnet20())
    samples = feeds(resnet20(), 60)
    source = Interrupted(samples, after=44)
    with pytest.raises(KeyboardInterrupt):
        compute(Calibration(graph, Data(graph_inputs(graph), source), cache=tmp_path), statistic)
    assert sessions["runs"] == 44 and len(list(tmp_path.glob("*.part.npz"))) == 1
    resumed = compute(Calibration(graph, Data(graph_inputs(graph), source), cache=tmp_path), statistic)
    assert sessions["runs"] == 44 + 20 and not list(tmp_path.glob("*.part.npz"))  # 40 were stored
    assert_same(resumed, compute(Calibration(graph, Data(graph_inputs(graph), lambda: iter(samples))), statistic))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_sample_ends_the_fold(workers, tmp_path):
    """The error reaches the caller, for any number of threads, and earlier samples are not lost."""
    model = cnn()
    samples = feeds(model, 20)
    samples[13] = {"x": np.full_like(samples[0]["x"], np.nan)}
    graph = load(model)
    calibration = Calibration(graph, Data(graph_inputs(graph), lambda: iter(samples)), workers=workers)
    with pytest.raises(OnnxqError, match="sample 13: input 'x' has NaN"):
        compute(calibration, "ranges")


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_activations_that_are_not_finite(statistic, spoil):
    model = cnn()
    graph = load(model)
    weight = graph.constant(graph.layers[0].weight).copy()
    weight[0, 0, 0, 0] = spoil
    graph.set_constant(graph.layers[0].weight, weight)
    calibration = Calibration(graph, Data(graph_inputs(graph), lambda: iter(feeds(model, 3))))
    with pytest.raises(OnnxqError, match="not finite"):
        compute(calibration, statistic)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_data(statistic):
    with pytest.raises(OnnxqError, match="--data"):
        compute(Calibration(load(cnn()), None), statistic)
    graph = load(cnn())
    with pytest.raises(OnnxqError, match="no sample"):
        compute(Calibration(graph, Data(graph_inputs(graph), lambda: iter(()))), statistic)


def test_lengths_that_differ_from_sample_to_sample():
    """A waveform [batch, time] has its time where others have channels."""
    net = Net(["N", "T"])
    x = net.op("Unsqueeze", "x", net.constant([1], np.int64))
    model = net.model(net.op("Relu", net.conv(x, 1, 8, 9, rank=1)))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(1, 40 + 7 * n)).astype(np.float32)} for n in range(8)]
    result = quantize(model, "int8", samples, workers=1)
    low, high = Calibration(result.graph, open_data(samples, graph_inputs(result.graph))).ranges(["x"])["x"]
    assert low == min(s["x"].min() for s in samples) and high == max(s["x"].max() for s in samples)
