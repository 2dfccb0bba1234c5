"""Shifts of linear tensors: the float function stays, no operator is added, what cannot be shifted is not, grids shrink."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import measure, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.graph import load, shift, shifts
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import Centre
from onnxq_plugins.solvers.centre import centre
from tests.jobs import make_job
from tests.zoo import ZOO, Net, examples, feeds, kinds, mobilenet, run

# ---- the models -----------------------------------------------------------------------------------------------------


def uncentred(channels=8, blocks=2):
    """Linear bottlenecks on a residual stream, each channel of which lies around a value of its own."""
    net = Net(["N", 3, 8, 8])

    def write(x, cin):
        weight = net.rng.normal(size=(channels, cin, 1, 1)) / np.sqrt(cin)
        return net.op("Conv", x, net.constant(weight), net.constant(net.rng.uniform(-12, 12, channels)))

    x = write("x", 3)
    for _ in range(blocks):
        y = net.clip(net.conv(x, channels, 24, 1))
        x = net.op("Add", x, write(net.clip(net.conv(y, 24, 24, groups=24)), 24))
    return net.model(net.head(net.op("Relu", net.conv(x, channels, 24, 1)), 24))


def prenorm(shape=("N", 6, 16), shared=False, bias=True):
    """LayerNormalization, some channels of which lie far from 0, in front of MatMuls, with and without a bias."""
    net = Net(list(shape))
    offset = np.zeros(16)
    offset[[3, 11]] = 15.0, -9.0
    scale, beta = net.weight(16), net.constant(offset)
    x = net.linear("x", 16, 16)
    for hidden in (24, 20):
        inputs = [scale, beta] if bias else [scale]
        y = net.op("LayerNormalization", x, *(inputs if shared else [net.weight(16), *inputs[1:]]), axis=-1)
        y = net.linear(net.op("Relu", net.linear(y, 16, hidden)), hidden, 16)
        x = net.op("Add", x, y)
    return net.model(net.linear(x, 16, 5, bias=False))


def gemms():
    """A chain of Gemms without anything in between, whose inner channels have offsets."""
    net = Net(["N", 12])
    x = "x"
    for cin, cout in ((12, 9), (9, 7), (7, 4)):
        bias = net.constant(net.rng.uniform(-20, 20, cout))
        x = net.op("Gemm", x, net.weight(cin, cout, fan_in=cin), bias)
    return net.model(x)


def pooled():
    """What moves, averages and joins: pools, Concat, Slice, Transpose, a positional constant, a Resize."""
    net = Net(["N", 3, 8, 8])
    a = net.op("MaxPool", net.conv("x", 3, 6, 1), kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    b = net.op("AveragePool", net.conv("x", 3, 6, 1), kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Concat", net.op("Add", a, b), net.op("Sub", b, a), axis=1)
    x = net.op("Add", x, net.constant(net.rng.uniform(-5, 5, (12, 4, 4))))
    x = net.op("Slice", x, *(net.constant(v, np.int64) for v in ([1], [11], [1])))
    x = net.op("Resize", net.conv(x, 10, 5, 2, pads=[0] * 4), "", net.constant([1.0, 1.0, 2.0, 2.0]), mode="nearest")
    x = net.op("Transpose", net.op("Reshape", x, net.constant([0, 5, 36], np.int64)), perm=[0, 2, 1])
    return net.model(net.linear(x, 5, 3))


def table():
    """Rows of an embedding, and of one that two things read."""
    net = Net([2, 6])
    rows = net.constant(net.rng.normal(size=(9, 8)) + net.rng.uniform(-9, 9, 8))
    x = net.op("Gather", rows, net.op("Cast", net.op("Abs", "x"), to=7))
    x = net.op("Add", x, net.constant(net.rng.uniform(-5, 5, (6, 8))))
    return net.model(net.linear(x, 8, 3), net.op("Relu", net.linear(x, 8, 4)))


NETS = {**ZOO, **{f.__name__: f for f in (uncentred, prenorm, gemms, pooled, table)}}
NETS["shared_norms"] = lambda: prenorm(shared=True)
NETS["no_norm_bias"] = lambda: prenorm(bias=False)
NETS["two_dynamic_axes"] = lambda: prenorm(("N", "T", 16))


def random_net(seed):
    """Up to ten operators, each of which reads what was made before."""
    net = Net(["N", 4, 6, 6], seed)
    ready = [net.conv("x", 4, 4, 1)]
    for _ in range(net.rng.integers(3, 10)):
        x, y = (ready[int(k)] for k in net.rng.integers(0, len(ready), 2))
        kind = net.rng.integers(0, 10)
        if kind == 0:
            z = net.op("Relu", x)
        elif kind == 1:
            z = net.conv(x, 4, 4, 3)
        elif kind == 2:
            z = net.conv(x, 4, 4, 1, groups=4)
        elif kind == 3:
            z = net.op("Mul", x, net.weight(4, 1, 1))
        elif kind == 4:
            z = net.op("Sub", x, net.constant(net.rng.normal(size=(4, 1, 1)) * 3))
        elif kind == 5:
            z = net.op("Concat", net.conv(x, 4, 2, 1, bias=False), net.conv(y, 4, 2, 1), axis=1)
        elif kind == 6:
            z = net.op("Sub", x, y)
        elif kind == 7:
            z = net.conv(x, 4, 4, 1, bias=bool(net.rng.integers(2)))
        else:
            z = net.op("Add", x, y)
        ready.append(z)
    return net.model(net.conv(ready[-1], 4, 3, 1))


def moved(graph, seed=0, size=3.0):
    """The graph with everything that may be shifted shifted at random, and what was taken off."""
    allowed, rng = shifts(graph), np.random.default_rng(seed)
    wild = [(at, off - 1.0, off + 1.0) for at in allowed.places.values() for off in [rng.normal(size=len(at)) * size]]
    return shift(graph, allowed, centre(allowed.count, allowed.sums, wild))


# ---- the rewrite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds(NETS, *(n for n in NETS if n not in ZOO)))
def test_the_float_function_stays(name):
    """Whatever is shifted, by however much; no operator comes or goes, and what is said to move moves by that much."""
    model = NETS[name]()
    graph, before = load(model), load(model)
    taken = moved(graph)
    assert [(n.op, len(n.outputs)) for n in graph.nodes] == [(n.op, len(n.outputs)) for n in before.nodes]
    for feed in feeds(model, 3):
        assert drift(run(before, feed, False), run(graph, feed, False)) <= 1e-5
    for name, axis in taken:
        values = [_fetch(g, name, feeds(model, 1)[0]) for g in (before, graph)]
        off = taken[name, axis].reshape([-1 if a == axis else 1 for a in range(values[0].ndim)])
        np.testing.assert_allclose(
            values[0] - off, values[1], atol=1e-4 * float(np.abs(values[0]).max() + np.abs(off).max())
        )


def _fetch(graph, name, feed):
    model = graph.model()
    del model.graph.output[:]
    model.graph.output.add().name = name
    return runtimes.session(model, optimize=False).run(None, feed)[0]


@examples(60)
@given(st.integers(0, 10**6))
def test_random_graphs(seed):
    model = random_net(seed)
    graph, before = load(model), load(model)
    moved(graph, seed)
    for feed in feeds(model, 2):
        assert drift(run(before, feed, False), run(graph, feed, False)) <= 1e-5


@pytest.mark.parametrize("name", ["uncentred", "prenorm", "gemms", "pooled", "table", "shared_norms", "no_norm_bias"])
def test_linear_tensors_are_found(name):
    """Else the tests above say nothing."""
    graph = load(NETS[name]())
    assert len(moved(graph)) >= 2


def test_what_pins():
    """Inputs and outputs of the model, activations and products, and what a padded convolution reads."""
    net = Net(["N", 3, 8, 8])
    free, padded, product = (net.conv("x", 3, 4, 1) for _ in range(3))
    x = net.op("Relu", net.conv(free, 4, 4, 1))
    y = net.conv(padded, 4, 4, 3)
    z = net.op("Mul", product, net.op("Sigmoid", product))
    graph = load(net.model(net.op("Add", net.op("Add", x, y), z), net.conv(free, 4, 2, 3, pads=[0] * 4)))
    assert {name for name, _ in moved(graph)} == {free}
    same_upper = Net(["N", 3, 8, 8])
    x = same_upper.conv("x", 3, 4, 1)
    graph = load(same_upper.model(same_upper.op("Relu", same_upper.conv(x, 4, 4, 3, auto_pad="SAME_UPPER"))))
    assert not moved(graph)


def test_a_product_without_a_bias_takes_no_shift():
    net = Net(["N", 6, 8])
    x = net.op("LayerNormalization", "x", net.weight(8), net.weight(8), axis=-1)
    graph = load(net.model(net.op("Relu", net.linear(x, 8, 5, bias=False))))
    assert not moved(graph)


def test_shifts_that_do_not_add_up_are_refused():
    graph = load(uncentred())
    allowed = shifts(graph)
    with pytest.raises(ValueError, match="sum of its inputs' shifts"):
        shift(graph, allowed, np.arange(allowed.count) ** 2.0)


def test_batchnorm_statistics_follow():
    net = Net(["N", 3, 8, 8])
    x = net.batchnorm(net.conv("x", 3, 6, 1, bias=False), 6)
    graph = load(net.model(net.head(net.op("Relu", net.conv(x, 6, 8, 1)), 8)))
    (name,) = graph.batchnorms
    before = graph.batchnorms[name]
    taken = moved(graph)
    np.testing.assert_allclose(before.beta - graph.batchnorms[name].beta, taken[name, 1], rtol=1e-6)
    np.testing.assert_array_equal(before.gamma, graph.batchnorms[name].gamma)


# ---- the solver -----------------------------------------------------------------------------------------------------


@st.composite
def systems(draw):
    """Residual streams: z_k = z_(k-1) +- y_k, channels with ranges of their own; some variables missing."""
    rng, channels = np.random.default_rng(draw(st.integers(0, 10**6))), draw(st.integers(1, 6))
    count, tensors, sums = 0, [], []

    def tensor():
        nonlocal count
        at = np.arange(count, count + channels)
        count += channels
        middle, half = rng.normal(size=channels) * 5, np.exp(rng.normal(size=channels))
        tensors.append((at, middle - half, middle + half))
        return at

    stream = tensor()
    for _ in range(draw(st.integers(0, 4))):
        branch, total = tensor(), tensor()
        sums.append((total, stream, branch, rng.choice([1.0, -1.0])))
        stream = total
    if draw(st.booleans()):
        sums.append((stream, tensors[0][0], np.full(channels, -1), 1.0))
    return count, sums, tensors


def width(values, tensors):
    known = np.append(values, 0.0)
    return sum((max((high - known[at]).max(), 0) - min((low - known[at]).min(), 0)) ** 2 for at, low, high in tensors)


@examples(100)
@given(systems())
def test_sums_hold_and_widths_do_not_grow(system):
    count, sums, tensors = system
    values = centre(count, sums, tensors)
    known = np.append(values, 0.0)
    for z, x, y, sign in sums:
        np.testing.assert_allclose(known[z], known[x] + sign * known[y], atol=1e-8 * (1 + np.abs(values).max()))
    assert width(values, tensors) <= width(np.zeros(count), tensors) * (1 + 1e-9)


def test_a_tensor_alone_gets_the_middle():
    low, high = np.array([1.0, -3.0, 0.0]), np.array([5.0, -1.0, 0.0])
    np.testing.assert_allclose(centre(3, [], [(np.arange(3), low, high)]), [3.0, -2.0, 0.0], rtol=1e-5)
    assert centre(0, [], []).shape == (0,)


def test_channels_with_room_make_way():
    """Two tensors want different shifts of one variable; the channel that sets the width of one is centred for that one."""
    at = np.arange(2)
    wide = (at, np.array([-10.0, -1.0]), np.array([10.0, 1.0]))
    other = (at, np.array([0.0, 3.0]), np.array([2.0, 9.0]))
    values = centre(2, [], [wide, other])
    sums = [(np.arange(2, 4), at, np.full(2, -1), 1.0)]
    tied = centre(4, sums, [wide, (np.arange(2, 4), *other[1:])])
    assert abs(tied[0]) < abs(values[0]) + 1e-9 and width(tied, [wide, other]) <= width(values, [wide, other]) * 1.001


# ---- the pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, db", [(mobilenet, 6), (prenorm, 6), (gemms, 6)])
def test_noise_falls_where_channels_lie_apart(make, db):
    """Networks that the rewrite itself moved apart, which takes nothing from what they compute. Measured on samples that
    nothing was chosen by."""
    graph = load(make())
    moved(graph, size=40.0)
    model = graph.model()
    data, fresh = feeds(model, 256), feeds(model, 16, seed=1)
    reference = runtimes.outputs(runtimes.session(model), fresh)[0]
    found = []
    for steps in ([], [{"use": "centre"}]):
        result = quantize(model, {"pass": [*steps, {"use": "ranges"}, {"use": "bias-correct"}]}, data, verify=True)
        found.append(measure.sqnr(reference, runtimes.outputs(runtimes.session(result.model), fresh)[0]))
    assert found[1] > found[0] + db
    step = result.report["steps"][0]
    assert step["drift"] <= 1e-5 and min(step["result"]["kept_share_of_range"].values()) < 0.7


@pytest.mark.parametrize("name", kinds(NETS, "uncentred", "prenorm", "pooled"))
def test_known_statistics_are_those_of_a_fresh_run(name, monkeypatch):
    """Ranges, means and moments move with the channels; nothing is run again."""
    job = make_job(NETS[name](), {}, 5)
    job.report["notes"] = []
    found = Centre().apply(job)
    names = [n for n in job.plan if not job.graph.is_constant(n) and job.graph.shape(n)]
    fresh = Calibration(job.graph, job.calibration.data)
    other, squares = fresh.ranges(names), fresh.moments(names)
    if found["tensors"]:
        monkeypatch.setattr(job.calibration, "_run", None)
    for n, ends in job.calibration.ranges(names).items():
        np.testing.assert_allclose(ends, other[n], atol=1e-4 * (other[n][1] - other[n][0] + 1e-3))
    for n, one in job.calibration.moments(names).items():
        two = squares[n]
        scale = 1e-4 * float(np.sqrt(two.square.max()) + 1e-3)
        np.testing.assert_allclose(one.mean, two.mean, atol=scale)
        np.testing.assert_allclose(one.square, two.square, atol=scale * float(np.sqrt(two.square.max()) + 1))


def test_without_data():
    """Skipped with a note; behind data-free, BatchNormalizations tell where channels lie."""
    job = make_job(uncentred())
    job.report["notes"] = []
    job.calibration.data = None
    assert Centre().apply(job) == {"tensors": 0} and "without data" in job.report["notes"][0]
    net = Net(["N", 3, 8, 8])
    bias = [net.constant(v) for v in (np.ones(6), net.rng.uniform(-9, 9, 6), np.zeros(6), np.ones(6))]
    x = net.op("BatchNormalization", net.conv("x", 3, 6, 1, bias=False), *bias)
    model = net.model(net.head(net.op("Relu", net.conv(x, 6, 8, 1)), 8))
    recipe = {"pass": [{"use": "data-free", "inputs": {"x": [-2, 2]}}, {"use": "centre"}, {"use": "ranges"}]}
    result = quantize(model, recipe, verify=True)
    assert min(result.report["steps"][1]["result"]["kept_share_of_range"].values()) < 0.8
    assert result.report["steps"][1]["drift"] <= 1e-5


def test_solutions_for_the_old_values_are_dropped():
    """Law L5: ranges, and shifts of biases, which depend on means."""
    model, steps = uncentred(), [{"use": "ranges"}, {"use": "bias-correct"}]
    data = feeds(model, 8)
    late, early = (
        quantize(model, {"pass": [*before, {"use": "centre"}, *steps]}, data, verify=True) for before in (steps, [])
    )
    for name, spec in early.plan.items():
        np.testing.assert_allclose(np.max(late.plan[name].scale), np.max(spec.scale), rtol=1e-4)
