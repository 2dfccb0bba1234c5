"""Factors between layers: the float function stays, ranges become equal, Clips stay idle, and what is measured is what
ships."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import audit_model, measure, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.graph import channel_groups, load
from onnxq_plugins.layers.complete import complete, complete_ranges
from onnxq_plugins.measure import drift
from onnxq_plugins.passes import BiasCorrect, Equalize
from onnxq_plugins.passes.equalize import _place, _reduced, _rescale
from onnxq_plugins.search.gains import Gains, Taken, seen_by
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.solvers.equalize import Place, balance, equalize, noise
from onnxq_plugins.solvers.spread import Read, Reader, spread
from onnxq_plugins.solvers.spread import noise as solved_noise
from tests.jobs import make_job
from tests.zoo import ZOO, Net, examples, feeds, kinds, mobilenet, run, slowly, transformer

TENSOR = {"weights": {"block": "tensor"}}


def equalized(model, n=4, steps=(), data=None, **parameters):
    return quantize(
        model,
        {**TENSOR, "pass": [{"use": "equalize", "gain": 1.0, **parameters}, *steps]},
        feeds(model, n) if data is None else data,
        verify=True,
    )


def told(made):
    return made.report["steps"][0]["result"]


def quality(model, made, data):
    """Signal to noise ratio of the quantized outputs in dB."""
    return measure.sqnr(*(runtimes.outputs(runtimes.session(m), data)[0] for m in (model, made.model)))


def passed(model, step, n=8, recipe=TENSOR, data=True):
    """The job after one pass, and what it told."""
    job = make_job(model, recipe, n)
    if not data:
        job.calibration.data = None
    job.report["notes"] = []
    return job, step.apply(job)


# ---- the models -----------------------------------------------------------------------------------------------------


def uneven(relu6=False, seed=0):
    """Conv, depthwise, Conv with channels of ranges over 100 : 1, undone by the next layer."""
    net = Net(["N", 3, 8, 8], seed)
    one, two = np.exp(net.rng.uniform(-2.3, 2.3, (2, 16)))

    def activation(x):
        return net.clip(x) if relu6 else net.op("Relu", x)

    def conv(x, weight, bias, **attrs):
        return net.op("Conv", x, net.constant(weight), net.constant(bias), **attrs)

    x = conv("x", net.rng.normal(size=(16, 3, 1, 1)) * one[:, None, None, None], one / 4)
    x = conv(
        activation(x),
        net.rng.normal(size=(16, 1, 3, 3)) * (two / one)[:, None, None, None] / 3,
        two / 4,
        group=16,
        pads=[1] * 4,
    )
    x = conv(activation(x), net.rng.normal(size=(12, 16, 1, 1)) / two[None, :, None, None] / 4, np.zeros(12))
    return net.model(net.head(net.op("Relu", x), 12))


def stream(times=50.0, channels=8):
    """MobileNetV2: linear bottlenecks on a residual stream, one channel of which is 50 times the others."""
    net = Net(["N", 3, 8, 8])
    size = np.ones(channels)
    size[2] = times

    def write(x, cin):
        weight = net.rng.normal(size=(channels, cin, 1, 1)) / np.sqrt(cin)
        return net.op("Conv", x, net.constant(weight * size[:, None, None, None]), net.constant(size / 2))

    def read(x):
        weight = net.rng.normal(size=(24, channels, 1, 1)) / np.sqrt(channels) / size[None, :, None, None]
        x = net.clip(net.op("Conv", x, net.constant(weight), net.weight(24)))
        return net.clip(net.conv(x, 24, 24, groups=24))

    x = write("x", 3)
    for _ in range(2):
        x = net.op("Add", x, write(read(x), 24))
    return net.model(net.head(read(x), 24))


def branches(first, times=16.0, channels=16):
    """A Concat of an activation and a Relu of many times its range, undone by the layer that reads both."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, channels))

    def branch(op, size):
        weight = net.rng.normal(size=(channels, channels, 1, 1)) * size / channels**0.5
        return net.op(op, net.op("Conv", x, net.constant(weight), net.constant(np.zeros(channels))))

    weight = net.rng.normal(size=(12, 2 * channels, 1, 1)) / channels**0.5
    weight[:, channels:] /= times
    both = net.op("Concat", branch(first, 1.0), branch("Relu", times), axis=1)
    return net.model(net.head(net.op("Relu", net.op("Conv", both, net.constant(weight), net.weight(12))), 12))


def prenorm():
    """LayerNormalization, some of whose channels are outliers, in front of MatMuls that make up for it."""
    net = Net(["N", 6, 32])
    size = np.ones(32)
    size[[3, 17]] = 40.0

    def linear(x, cin, cout, scale=1.0):
        weight = net.rng.normal(size=(cin, cout)) / np.sqrt(cin) / np.broadcast_to(scale, cin)[:, None]
        return net.op("Add", net.op("MatMul", x, net.constant(weight)), net.weight(cout))

    x = linear("x", 32, 32)
    y = net.op(
        "LayerNormalization",
        x,
        net.constant(net.rng.uniform(0.5, 1.5, 32) * size),
        net.constant(net.rng.normal(size=32) * size / 4),
        axis=-1,
    )
    y = linear(net.op("Relu", linear(y, 32, 48, size)), 48, 32)
    return net.model(linear(net.op("Add", x, y), 32, 5))


def partly_clipped():
    """ReLU6: every other channel reaches the maximum, the others stay far below it."""
    net = Net(["N", 4, 8, 8])
    size = np.where(np.arange(12) % 2, 5.0, 0.05)[:, None, None, None]
    x = net.clip(net.op("Conv", "x", net.constant(net.rng.normal(size=(12, 4, 1, 1)) * size), net.constant(np.zeros(12))))
    x = net.clip(
        net.op(
            "Conv",
            x,
            net.constant(net.rng.normal(size=(12, 1, 3, 3)) / 3),
            net.constant(np.ones(12) / 8),
            group=12,
            pads=[1] * 4,
        )
    )
    return net.model(net.head(net.op("Relu", net.conv(x, 12, 8, 1)), 8))


def residual_1d():
    """A residual stream over 20 positions, clipped behind the Add: positions lie where tokens have channels."""
    net = Net(["N", 3, 20])
    x = net.clip(net.conv("x", 3, 8, rank=1))
    x = net.clip(net.op("Add", x, net.conv(x, 8, 8, rank=1)))
    return net.model(net.head(net.op("Relu", net.conv(x, 8, 6, rank=1)), 6))


NETS = {**ZOO, **{f.__name__: f for f in (uneven, stream, prenorm, partly_clipped, residual_1d)}}


# ---- the solver -----------------------------------------------------------------------------------------------------


def vectors(n, low, high):
    return st.lists(st.floats(low, high), min_size=n, max_size=n).map(np.array)


@st.composite
def bounded(draw):
    n = draw(st.integers(1, 10))
    before, after = (np.where(draw(vectors(n, 0, 1)) < 0.2, 0.0, np.exp2(draw(vectors(n, -12, 0)))) for _ in range(2))
    low, high = np.exp2(draw(vectors(n, -12, 0))), np.exp2(draw(vectors(n, 0, 12)))
    held = draw(vectors(n, 0, 1)) < 0.3
    return before, after, np.where(held, 1.0, low), np.where(held, 1.0, high)


@examples(200)
@given(bounded())
def test_balance_stays_within_its_bounds(case):
    before, after, low, high = case
    f = balance(before, after, low, high)
    assert (f >= low).all() and (f <= high).all()
    assert (
        noise(before * f, after / f) <= noise(before, after) * (1 + 1e-9)
        or not ((before > 0) & (after > 0)).all()
        or (low > np.exp2(-10)).any()
        or (high < 2.0**10).any()
    )


@examples(100)
@given(st.integers(2, 12), st.integers(0, 9999), st.booleans())
def test_free_channels_meet_in_the_middle(n, seed, wide):
    """With no bounds, and with bounds that are not met: neither side's overall size changes without need."""
    rng = np.random.default_rng(seed)
    before, after = np.exp2(rng.uniform(-4, 0, (2, n)))
    low, high = (np.full(n, 2.0**-12), np.full(n, 2.0**12)) if wide else (np.zeros(n), np.full(n, np.inf))
    f = balance(before, after, low, high)
    np.testing.assert_allclose(f, np.sqrt(after / before), rtol=1e-12)
    np.testing.assert_allclose(before * f, after / f)
    assert noise(before * f, after / f) <= noise(before, after) * (1 + 1e-9)


def test_channels_that_are_0_on_a_side_do_not_set_the_scale():
    """A row that nothing reads keeps its size; the others must not become small beside it."""
    before, after = np.array([1.0, 0.5, 0.8, 0.0]), np.array([0.3, 1.0, 0.0, 0.9])
    f = balance(before, after, np.full(4, 2.0**-12), np.full(4, 2.0**12))
    assert (f[2:] == 1).all() and (np.abs(np.log2(f[:2])) < 2).all()
    assert (balance(before, after, np.full(4, 2.0), np.full(4, 4.0))[2:] == 2).all()


def places(weights, links):
    """Groups from (weight, axis, writes) triples, one triple list per group."""
    sizes = [np.abs(w).astype(np.float64) for w in weights]
    return sizes, [
        [Place(sizes[k], axis, np.arange(sizes[k].shape[axis])[:, None], writes) for k, axis, writes in link]
        for link in links
    ]


def free(groups):
    return [(np.zeros(len(g[0].index)), np.full(len(g[0].index), np.inf)) for g in groups]


@examples(30)
@given(st.integers(2, 8), st.integers(0, 9999))
def test_three_layers_come_to_the_closed_form(n, seed):
    """Conv, depthwise, Conv: s1 = r1 / (r1 r2 r3)^(1/3), s2 = (r1 r2 r3)^(1/3) / r3, up to a common factor; divided by."""
    rng = np.random.default_rng(seed)
    r1, r2, r3 = np.exp2(rng.uniform(-4, 4, (3, n)))
    sizes, groups = places(
        [r1[:, None], r2[:, None], r3[None, :]], [[(0, 0, True), (1, 0, False)], [(1, 0, True), (2, 1, False)]]
    )
    one, two = equalize(groups, free(groups), sweeps=200, tolerance=1e-10)
    mean = np.cbrt(r1 * r2 * r3)
    for found, s in ((one, r1 / mean), (two, mean / r3)):
        ratio = found * s
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    for size in sizes:
        flat = size.max(axis=1 if size.shape[1] == 1 else 0)
        np.testing.assert_allclose(flat / flat.max(), (sizes[0] / sizes[0].max())[:, 0], rtol=1e-6)


def test_one_side_and_little_gain_are_left_alone():
    rng = np.random.default_rng(0)
    _, groups = places(np.exp2(rng.uniform(-4, 4, (2, 6, 6))), [[(0, 0, True), (1, 1, False)], [(0, 1, False)]])
    factors = equalize(groups, free(groups), gain=1.0)
    assert (factors[0] != 1).any() and (factors[1] == 1).all()
    _, groups = places(np.exp2(rng.uniform(-4, 4, (2, 6, 6))), [[(0, 0, True), (1, 1, False)]])
    assert (equalize(groups, free(groups), gain=1e6)[0] == 1).all()


def test_groups_of_a_grouped_convolution_share_its_scale():
    """Rows of one group that are small as a whole are made larger, not only evened out among themselves."""
    weight, rows = np.ones((4, 2)), [(0, 2), (2, 4)]
    weight[2:] /= 64
    first = np.ones((4, 3))
    index = [np.array([[0], [1]]), np.array([[2], [3]])]
    groups = [[Place(first, 0, index[k], True), Place(weight, 1, np.array([[0], [1]]), False, rows[k])] for k in range(2)]
    one, two = equalize(groups, free(groups))
    np.testing.assert_allclose(one / two, 8, rtol=1e-3)
    np.testing.assert_allclose(weight[2:] / weight[:2], 1 / 8, rtol=1e-3)


# ---- by weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize(
    "name", kinds(NETS, "resnet20", "no_layer", "dead_channels", "uneven", "prenorm", "partly_clipped", "residual_1d")
)
def test_the_float_function_stays(name, by):
    """And the exported network is a sound one."""
    model = NETS[name]()
    made = equalized(model, by=by)
    assert made.report["steps"][0]["drift"] <= 1e-5
    if name != "no_layer":
        assert quality(model, made, feeds(model, 4)) > 15


@pytest.mark.parametrize(
    "name",
    [
        "cnn",
        "grouped",
        "inception",
        "mlp",
        "conv1d",
        "odd_channels",
        "shared_weights",
        "resnet20",
        "uneven",
        "dead_channels",
    ],
)
def test_ranges_on_both_sides_are_equal_afterwards(name):
    """For groups with one weight on either side, channels free of bounds, up to one common factor."""
    job, _ = passed(NETS[name](), Equalize(gain=1.0))
    weights, seen = _reduced(job.graph), 0
    for group in channel_groups(job.graph, "rescale"):
        members = [m for m in group.weights if m.tensor in weights and m.role != "fixed"]
        if sorted(m.role for m in members) != ["input", "output"]:
            continue
        two, one = (_place(weights[m.tensor], m).ranges() for m in sorted(members, key=lambda m: m.role))
        alive = (one > 0) & (two > 0)
        ratio = (one / np.where(two > 0, two, 1))[alive]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-2)
        seen += 1
    assert seen


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "inception", "mlp", "resnet20", "uneven", "dead_channels"])
def test_twice_is_once(name):
    """To the tolerance of the solver."""
    job, _ = passed(NETS[name](), Equalize(gain=1.0))
    before = {y.weight: job.graph.constant(y.weight).copy() for y in job.graph.layers}
    found = Equalize(gain=1.0).apply(job)
    assert found["largest_ratio_of_factors"] <= 1.1
    for name, values in before.items():
        np.testing.assert_allclose(job.graph.constant(name), values, rtol=0.02)
    assert Equalize().apply(job)["equalized"] == 0


@pytest.mark.parametrize("name", kinds([n for n in ZOO if n != "no_layer"], "dead_channels"))
def test_powers_of_two_change_no_bit(name):
    model = ZOO[name]()
    job, found = passed(model, Equalize(gain=1.0, pow2=True))
    for feed in feeds(model, 3):
        assert drift(run(model, feed, False), run(job.graph, feed, False)) == drift(
            run(model, feed, False), run(load(model), feed, False)
        )
    assert found["largest_ratio_of_factors"] == 2.0 ** round(np.log2(found["largest_ratio_of_factors"]))


@pytest.mark.parametrize("relu6", [False, True])
def test_powers_of_two_are_within_the_bounds(relu6):
    model = uneven(relu6)
    before, (job, found) = load(model), passed(model, Equalize(gain=1.0, pow2=True))
    assert found["equalized"] >= 2
    for layer in before.layers:
        old, new = (g.constant(layer.weight) for g in (before, job.graph))
        ratio = (new[old != 0] / old[old != 0]).astype(np.float64)
        assert (ratio == np.exp2(np.rint(np.log2(ratio)))).all()
    for feed in feeds(model, 8):
        assert drift(run(before, feed, False), run(job.graph, feed, False)) == 0


def test_permuted_channels_get_permuted_factors():
    model, order = uneven(), np.random.default_rng(0).permutation(16)
    made = []
    for permuted in (False, True):
        job = make_job(model, TENSOR, 4)
        first, second, third, _ = job.graph.layers
        if permuted:
            for layer, axis in ((first, 0), (second, 0), (third, 1)):
                for name in (layer.weight, layer.bias if axis == 0 else None):
                    if name:
                        job.graph.set_constant(name, np.take(job.graph.constant(name), order, axis=axis))
        Equalize(gain=1.0).apply(job)
        made.append([job.graph.constant(y.weight) for y in (first, second, third)])
    for axis, one, other in zip((0, 0, 1), *made, strict=True):
        np.testing.assert_allclose(np.take(one, order, axis=axis), other, rtol=1e-5)


def test_one_scale_then_serves_all_channels():
    """The ranges of single channels came between 100 : 1."""
    model = uneven()
    data = feeds(model, 16)
    plain = quantize(model, TENSOR, data)
    made = equalized(model, data=data)
    assert quality(model, made, data) > quality(model, plain, data) + 6


@pytest.mark.parametrize("name", ["grouped", "inception", "shared_weights", "resnet20"])
def test_grouped_joined_and_shared(name):
    assert told(equalized(NETS[name]()))["equalized"] > 0


# ---- Clips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("make", [partly_clipped, stream, lambda: uneven(True), *slowly(mobilenet)])
def test_clips_stay_idle(make, by):
    """Channels that reach the maximum keep their values; others stay below it. Nothing becomes of the Clip, and so all stay
    integer."""
    model = make()
    data = feeds(model, 8)
    job = make_job(model, TENSOR, 8)
    sources = [n.inputs[0].name for n in job.graph.nodes if n.op == "Clip"]
    old = job.calibration.channel_ranges(sources)
    found = Equalize(by=by, gain=1.0).apply(job)
    new = job.calibration.channel_ranges(sources)
    held = 0
    for name in sources:
        reaches = old[name][1] >= 6
        np.testing.assert_allclose(new[name][1][reaches], old[name][1][reaches], rtol=1e-4)
        assert (new[name][1][~reaches] <= 6).all()
        held += int(reaches.sum())
    assert found["channels_held_by_clips"] >= held or by == "activations"  # which stops at Clips
    made = equalized(model, data=data, by=by)
    assert {y.kernel for y in audit_model(made.model).layers if y.op == "Conv"} == {"QLinearConv"}
    assert made.report["steps"][0]["drift"] <= 1e-5


def test_only_the_channels_below_the_maximum_move():
    job, found = passed(partly_clipped(), Equalize(gain=1.0))
    before = load(partly_clipped())
    old, new = (np.abs(g.constant(before.layers[0].weight)).max(axis=(1, 2, 3)) for g in (before, job.graph))
    ratio = new / old
    assert (ratio[1::2] == 1).all() and (ratio[::2] != 1).all() and found["channels_held_by_clips"] >= 6


def test_without_data_clips_are_not_passed():
    job, found = passed(uneven(True), Equalize(gain=1.0), data=False)
    assert found["groups"] == 1 and found["clips_not_passed"] == 2  # the last group lies behind a Relu
    assert any("no data to show where it is inactive (2 Clips)" in note for note in job.report["notes"])
    job, found = passed(uneven(), Equalize(gain=1.0), data=False)
    assert found["equalized"] == 3 and "clips_not_passed" not in found and not job.report["notes"]
    job, found = passed(uneven(), Equalize(by="activations"), data=False)
    assert found == {"groups": 0} and "without data" in job.report["notes"][0]


def test_ranges_along_another_axis_bound_nothing():
    """Behind an Add of 1-D convolutions statistics are told per position: nothing is known of the channels."""
    for by in ("weights", "activations"):
        made = equalized(residual_1d(), by=by)
        assert made.report["steps"][0]["drift"] <= 1e-5


@pytest.mark.parametrize("parameters", [{"margin": -1.0}, {"exponents": ()}, {"exponents": (1.5,)}])
def test_wrong_parameters(parameters):
    with pytest.raises(ValueError, match=f"{next(iter(parameters))} = .* must"):
        Equalize(**parameters)


def test_layers_of_one_weight_still_share_it():
    """Other factors in each of them would make other weights of it."""
    net = Net(["N", 3, 8, 8])
    loud = np.exp(net.rng.uniform(-2.3, 2.3, 16))
    shared = net.constant(net.rng.normal(size=(16, 16, 1, 1)) / loud[None, :, None, None] / 4)
    x, width = "x", 3
    for _ in range(2):
        weight = net.constant(net.rng.normal(size=(16, width, 1, 1)) * loud[:, None, None, None] / width)
        x, width = net.op("Relu", net.op("Conv", net.op("Relu", net.op("Conv", x, weight)), shared)), 16
    model = net.model(net.head(net.op("Relu", net.conv(x, 16, 12)), 12))
    result = quantize(model, {"pass": [{"use": "equalize", "by": "activations"}, {"use": "ranges"}]}, feeds(model, 12))
    assert told(result)["groups"] == 1  # the last one
    makers = {o: n for n in result.model.graph.node for o in n.output}
    readers = {n.name for n in model.graph.node if shared in n.input}
    codes = {makers[n.input[1]].input[0] for n in result.model.graph.node if n.name in readers}
    assert len(readers) == 2 and len(codes) == 1


# ---- by activations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, db", [(stream, 6), (prenorm, 3)])
def test_outlier_channels_no_longer_set_the_scale(make, db):
    """Measured on samples that nothing was chosen by."""
    model = make()
    data, fresh = feeds(model, 16), feeds(model, 16, seed=1)
    recipe = {"pass": [{"use": "bias-correct"}]}
    plain = quantize(model, recipe, data)
    result = quantize(model, {"pass": [{"use": "equalize", "by": "activations"}, *recipe["pass"]]}, data, verify=True)
    report = told(result)
    assert report["equalized"] and result.report["steps"][0]["drift"] <= 1e-5
    assert quality(model, result, fresh) > quality(model, plain, fresh) + db
    before, after = report["sqnr_before_and_after"]
    assert after > before + db


@pytest.mark.parametrize("first", ["Relu", "Sigmoid", "Tanh"])
def test_unlike_branches_of_a_concat_share_its_grid(first):
    """All channels of a branch get a factor towards the range of the other, also where that one has none, and no operator is
    added."""
    found = []
    for times in (1.0, 16.0):
        model = branches(first, times)
        recipe = {"pass": [{"use": "equalize", "by": "activations"}, {"use": "bias-correct"}]}
        result = quantize(model, recipe, feeds(model, 16), verify=True)
        assert len(result.graph.nodes) == len(load(model).nodes)
        found.append(quality(model, result, feeds(model, 16, seed=1)))
    assert found[1] > found[0] - 2


def test_factors_of_a_branch_know_those_of_the_others():
    """What is beside a group on a grid, and in rows of the weights that read it, is as the groups before have left it."""
    job = make_job(branches("Relu"), {}, 8)
    groups = [g for g in channel_groups(job.graph, "rescale") if len(g.tensors) > 2]
    taken = Taken()
    seen = seen_by(job, groups, taken)
    (reads, readers), factors = next(seen), np.linspace(2.0, 3.0, groups[0].size)
    taken.add(job.graph, groups[0], factors)
    other, behind = next(seen)
    joined, at = next((x, n) for n, x in enumerate(other) if x.beside[1])
    first = reads[at]
    assert joined.beside[1] == pytest.approx((first.high * factors).max())
    assert joined.beside[2] == pytest.approx((first.gain / factors**2).sum())
    own = next(w for w in readers if w.beside is not None)
    peak, power = next(w.beside for w in behind if w.beside is not None)
    np.testing.assert_allclose(peak, (own.peak / factors).max(axis=1))
    assert power == pytest.approx(own.power @ factors**2)


def test_what_does_not_help_is_left_alone(monkeypatch):
    """Factors that were tried leave no trace: not in weights, statistics or solved ranges."""
    model = stream()
    job = make_job(model, {}, 4)
    complete_ranges(job)
    digest, norms, plan = job.graph.digest(), dict(job.graph.batchnorms), job.plan
    job.graph.touched.clear()
    monkeypatch.setattr("onnxq_plugins.passes.equalize._WORTH", 0.0)
    step = Equalize(by="activations")
    found = step.apply(job)
    assert found["groups"] > 0 and found["equalized"] == 0
    assert job.graph.digest() == digest and not job.graph.touched and job.plan is plan
    assert norms.keys() == job.graph.batchnorms.keys()
    for name, norm in norms.items():
        np.testing.assert_array_equal(norm.gamma, job.graph.batchnorms[name].gamma)
        np.testing.assert_array_equal(norm.beta, job.graph.batchnorms[name].beta)


def test_solved_ranges_do_not_hide_the_gain():
    """Those of a rescaled group are solved anew; the others are kept."""
    model = stream()
    data = feeds(model, 8)
    step = {"use": "equalize", "by": "activations"}
    recipes = [{"pass": steps} for steps in ([step], [{"use": "ranges"}, step])]
    one, two = (
        next(s["result"] for s in quantize(model, r, data, verify=True).report["steps"] if s["pass"] == "equalize")
        for r in recipes
    )
    assert one["equalized"] and two["equalized"]
    assert two["sqnr_before_and_after"][1] > two["sqnr_before_and_after"][0] + 6


def test_channels_of_attention_heads():
    """Ranges of [N, heads, tokens, size] are told per head, channels lie along the last axis."""
    model = transformer()
    recipe = {"pass": [{"use": "equalize", "by": "activations"}], "layer": [{"op": "Attention", "quantize": True}]}
    result = quantize(model, recipe, feeds(model, 6), verify=True)
    assert quality(model, result, feeds(model, 6)) > 20
    assert told(result)["groups"] > told(result)["equalized"]


def test_rarely_large_channels_keep_room():
    """Channels that factors bring to the edge of the grid are the more likely to leave it the fewer values were seen."""
    rng = np.random.default_rng(0)
    high = np.exp(rng.uniform(-3, 0, 64))
    readers = [Reader(np.abs(rng.normal(size=(32, 64))), high**2 / 30, np.ones(32), 127)]
    found = []
    for count in (50, 10**8):
        reads = [Read(-high, high, np.ones(64), 255, count)]
        factors, exponent, ratio = spread(reads, readers, (0.25, 0.5, 0.75, 1.0), np.full(64, 1e-3), np.full(64, 1e3))
        least = solved_noise(factors, reads, readers) / solved_noise(np.ones(64), reads, readers)
        assert ratio == pytest.approx(least) and ratio <= 1
        found.append(exponent)
    assert found[0] < found[1]


@examples(50)
@given(st.integers(0, 9999))
def test_predictions_do_not_depend_on_the_units_of_channels(seed):
    """Channels that were scaled before are scaled back: the same products, the same noise."""
    rng = np.random.default_rng(seed)
    units, high = np.exp(rng.normal(size=(2, 9)))
    peak, gain = np.abs(rng.normal(size=(4, 9))), rng.uniform(size=9)
    plain = [Read(-high, high, gain, 255, 1000)], [Reader(peak, high**2, np.ones(4), 7)]
    scaled = (
        [Read(-high * units, high * units, gain / units**2, 255, 1000)],
        [Reader(peak / units, (high * units) ** 2, np.ones(4), 7)],
    )
    factors = np.exp(rng.normal(size=9))
    assert solved_noise(factors, *plain) == pytest.approx(solved_noise(factors / units, *scaled))


def test_gains_weigh_channels_by_their_readers():
    """Noise on a channel matters by the weights that read it, through Relu and Add; layers count relative to
    their signal."""
    net = Net(["N", 6])
    x = net.gemm("x", 6, 6)
    y = net.op("Add", net.op("Relu", x), net.gemm("x", 6, 6))
    model = net.model(net.gemm(y, 6, 4))
    job = make_job(model, {}, 8)
    last = job.graph.layers[-1]
    names = [y.input for y in job.graph.layers]
    gains = Gains(job.graph, job.calibration.moments(list(dict.fromkeys(names))))
    power = np.square(job.graph.constant(last.weight).astype(np.float64)).sum(axis=0)
    for name in (last.input, x):
        np.testing.assert_allclose(gains.tensors[name] / gains.tensors[name].sum(), power / power.sum())
    moments = job.calibration.moments([last.input])[last.input]
    assert gains.tensors[last.input] @ (moments.square - moments.mean**2) == pytest.approx(1.0)


# ---- the trial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "uneven", "mlp", "resnet20", "inception", "prenorm"])
@pytest.mark.parametrize("solved", [False, True])
def test_a_trial_after_a_rescaling_is_a_fresh_one(name, solved, monkeypatch):
    """Also where ranges were solved before: they are stale then. What calibration knows has followed, without a run."""
    job = make_job(NETS[name](), {}, 6)
    if solved:
        complete(job)
    judge, rng = Judge.of(job, apart=False), np.random.default_rng(0)
    start = judge.sqnr(job.plan)
    job.graph.touched.clear()
    _rescale(job, [(g, np.exp2(rng.uniform(-3, 3, g.size))) for g in channel_groups(job.graph, "rescale")])
    job.plan |= {n: spec.request() for n, spec in job.plan.items() if n in job.graph.touched}
    fresh = Calibration(job.graph, job.calibration.data)
    with monkeypatch.context() as patch:
        patch.setattr(job.calibration, "_run", None)
        found = judge.sqnr(job.plan)
    names = [n for n in job.plan if not job.graph.is_constant(n)]
    for n, ends in job.calibration.ranges(names).items():
        other = fresh.ranges(names)[n]
        np.testing.assert_allclose(ends, other, atol=1e-4 * (other[1] - other[0]))
    job.calibration = fresh
    assert found == pytest.approx(judge.sqnr(job.plan), abs=0.2) and abs(found - start) > 0.5


@pytest.mark.parametrize("solved", [False, True])
def test_what_a_trial_finds_worse_is_undone(solved, monkeypatch):
    """Weights, statistics and solved ranges are as before."""
    job = make_job(stream(), {}, 6)
    job.report["notes"] = []
    if solved:
        complete_ranges(job)
    job.graph.touched.clear()
    digest, plan, scores = job.graph.digest(), job.plan, iter([20.0, 19.9])
    monkeypatch.setattr(Judge, "sqnr", lambda judge, plan: next(scores))
    found = Equalize(by="activations").apply(job)
    assert found["equalized"] == 0 and "from 20.0 to 19.9 dB" in job.report["notes"][0]
    assert job.graph.digest() == digest and job.plan is plan and not job.graph.touched
    names, fresh = list(plan), Calibration(job.graph, job.calibration.data)
    names = [n for n in names if not job.graph.is_constant(n)]
    monkeypatch.setattr(job.calibration, "_run", None)  # what was known still is
    for n, ends in job.calibration.ranges(names).items():
        np.testing.assert_allclose(ends, fresh.ranges(names)[n], rtol=1e-5)


# ---- beside other things --------------------------------------------------------------------------------------------


def test_solutions_for_the_old_weights_are_dropped():
    """Law L5: codes, and ranges of what was rescaled."""
    model = uneven()
    steps = [{"use": "ranges"}, {"use": "bias-correct"}]
    data = feeds(model, 8)
    late = quantize(model, {**TENSOR, "pass": [*steps, {"use": "equalize", "gain": 1.0}, *steps]}, data, verify=True)
    early = equalized(model, steps=steps, data=data)
    for name, spec in early.plan.items():
        assert float(np.max(late.plan[name].scale)) == pytest.approx(float(np.max(spec.scale)), rel=1e-4)
    assert quality(model, late, data) == pytest.approx(quality(model, early, data), abs=0.3)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_batchnorm_statistics_follow(by):
    """gamma and beta are deviation and mean of a layer's output: they scale as the measured ones do."""
    net = Net(["N", 3, 8, 8])
    x = net.conv("x", 3, 8, bias=False)
    x = net.op("Relu", net.batchnorm(net.op("Mul", x, net.constant(np.logspace(-2, 1, 8).reshape(8, 1, 1))), 8))
    model = net.model(net.head(net.op("Relu", net.batchnorm(net.conv(x, 8, 12, bias=False), 12)), 12))
    job = make_job(model, TENSOR, 8)
    job.report["notes"] = []
    names = list(job.graph.batchnorms)
    assert names
    before, norms = job.calibration.moments(names), dict(job.graph.batchnorms)
    found = Equalize(by=by, gain=1.0).apply(job)
    after, moved = job.calibration.moments(names), 0
    for n in names:
        ratio = np.sqrt(after[n].square / before[n].square)
        np.testing.assert_allclose(job.graph.batchnorms[n].gamma / norms[n].gamma, ratio, rtol=1e-3)
        np.testing.assert_allclose(job.graph.batchnorms[n].beta / norms[n].beta, ratio, rtol=1e-3)
        moved += int((np.abs(ratio - 1) > 0.01).sum())
    assert moved == 0 if not found["equalized"] else moved > 0


@pytest.mark.parametrize("make", [uneven, lambda: uneven(True)])
def test_shifts_afterwards(make):
    """The built-in recipe for one scale per weight."""
    model = make()
    data = feeds(model, 16)
    plain = quantize(model, {"target": "per-tensor", "weights": {"block": "tensor"}}, data)
    result = quantize(model, "int8-per-tensor", data, verify=True)
    assert quality(model, result, data) > quality(model, plain, data) + 3


def test_bias_correction_takes_the_new_means():
    model = uneven()
    job, _ = passed(model, Equalize(gain=1.0))
    BiasCorrect().apply(job)
    shifted = [s for s in job.plan.values() if s.shift is not None]
    assert len(shifted) == len(job.graph.layers)
