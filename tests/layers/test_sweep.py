"""The sweep: what is measured is what ships."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.export import qdq
from onnxq_plugins.graph.patches import gram, output_columns, patches
from onnxq_plugins.layers import problem as layerwise
from onnxq_plugins.layers import sweep as sweeping
from onnxq_plugins.layers.complete import complete, complete_ranges
from onnxq_plugins.layers.sweep import sweep, trust
from tests.jobs import LAYERED, fetch, make_job
from tests.zoo import ZOO, Net, feeds, mlp, mobilenet, some

CODES, BLOCKS = {"bits": 4}, {"bits": 4, "block": 16}


@pytest.mark.parametrize(
    ("name", "weights"),
    some(
        itertools.product(LAYERED, [CODES, BLOCKS]),
        *((name, CODES) for name in ("mobilenet", "inception", "grouped", "mlp", "transformer", "shared_weights")),
        *((name, BLOCKS) for name in ("mlp", "transformer", "written_out", "control_flow")),
    ),
)
def test_a_layer_sees_what_the_exported_model_gives_it(name, weights, monkeypatch):
    monkeypatch.setattr(sweeping, "trust", lambda left, y: np.ones_like(y[:, :1]))
    weight_only = "block" in weights
    recipe = {"weights": weights, **({"activations": {"bits": 32}} if weight_only else {})}
    model = ZOO[name]()
    job = make_job(model, recipe)
    complete_ranges(job)
    seen = {}
    for layer, found in sweep(job, layerwise.solvable(job), positions=10**6):
        spec = layerwise.Problem.of(job, layer, found, True).solve("descent", layerwise.Effort())[0]
        job.plan |= {layer.weight: spec}
        seen[layer.name] = found
    assert set(seen) == {y.name for y in layerwise.solvable(job)}
    assert seen or weight_only
    complete(job)
    samples = list(job.calibration.data)
    model = qdq.export(job.graph, job.plan, job.target)
    nodes = {node.name: node for node in model.graph.node}
    for layer in layerwise.solvable(job):
        most = max(64, int(np.prod(layer.shape)) // layer.channels)
        inputs = [patches(layer, x, most, i) for i, x in enumerate(fetch(model, nodes[layer.name].input[0], samples))]
        outputs = [output_columns(layer, y, most, i) for i, y in enumerate(fetch(job.graph.model(), layer.output, samples))]
        x, y = (np.concatenate(part, axis=2).astype(np.float64) for part in (inputs, outputs))
        if layer.bias is not None:
            y -= job.graph.constant(layer.bias).reshape(layer.groups, -1, 1)
        count = x.shape[2]
        found = seen[layer.name]
        assert found.count == count
        size = np.abs(gram(x)).max() / count
        near = 1e-2 if weight_only else 1e-4  # MatMulNBits of the layers before rounds its inputs
        np.testing.assert_allclose(found.h, gram(x) / count, atol=near * size)
        np.testing.assert_allclose(found.mean, x.mean(axis=2), atol=near * np.sqrt(size))
        np.testing.assert_allclose(found.output, y.mean(axis=2), atol=1e-4 * np.abs(y).max())
        left = y - layer.matrix(job.graph.constant(layer.weight)) @ x
        np.testing.assert_allclose(found.left, left @ x.swapaxes(1, 2) / count, atol=10 * near * np.abs(y).max() * size**0.5)


def test_patches_with_outlying_errors_count_little():
    left = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    left[0, :, 3] *= 100
    y = np.full_like(left, 10)
    weight = trust(left, y)
    assert weight.shape == (2, 1, 40) and np.allclose(weight.mean(axis=2), 1)
    assert weight[0, 0, 3] < 1e-3 and weight[1].min() > 0.3
    assert np.allclose(trust(1000 * left, 1000 * y), weight)  # whatever the unit
    assert np.allclose(trust(1e-3 * left[1:], y[1:]), 1, atol=1e-2)  # errors of sums in another order say nothing
    assert (trust(np.zeros((2, 5, 40)), np.zeros((2, 5, 40))) == 1).all()


@pytest.mark.parametrize("n", [6, 16])
def test_some_of_what_a_layer_sees_is_held_out(n):
    job = make_job(mobilenet(), n=n)
    complete(job)
    for layer, seen in sweep(job, layerwise.solvable(job)[:2]):
        held, others = seen.judged, seen.others()
        assert held.count + others.count == seen.count and 0.2 < held.count / seen.count < 0.3
        share = held.count / seen.count
        np.testing.assert_allclose((1 - share) * others.h + share * held.h, seen.h, rtol=1e-4)
        assert not np.allclose(others.h, held.h, rtol=1e-3)


def test_the_sweep_runs_each_operator_once_per_network(monkeypatch):
    runs = []
    run = runtimes.run
    monkeypatch.setattr(runtimes, "run", lambda runner, feed: runs.append(runner) or run(runner, feed))
    job = make_job(ZOO["resnet20"](), n=3)
    complete_ranges(job)
    layers = 0
    for layer, found in sweep(job, layerwise.solvable(job)):
        job.plan |= {layer.weight: layerwise.Problem.of(job, layer, found, True).solve("nearest", layerwise.Effort())[0]}
        layers += 1
    assert len(runs) <= 2 * 3 * layers
    assert len({id(r) for r in runs}) <= 2 * layers


def test_the_sweep_stops_behind_the_last_wanted_layer_and_skips_others():
    job = make_job(mobilenet(), n=3)
    complete(job)
    layers = layerwise.solvable(job)
    assert [y.name for y, _ in sweep(job, [layers[1], layers[3]])] == [layers[1].name, layers[3].name]


def test_the_sweep_does_not_depend_on_workers():
    found = []
    for workers in (1, 2):
        job = make_job(mobilenet(), n=9, workers=workers)
        complete(job)
        found.append([s.h for _, s in sweep(job, layerwise.solvable(job))])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def swept(name, n=9, workers=1):
    """The statistics of every layer, in a network whose layers are rounded to 4 bits one after another."""
    job = make_job(ZOO[name](), {"weights": CODES}, n=n, workers=workers)
    complete_ranges(job)
    found = {}
    for layer, statistics in sweep(job, layerwise.solvable(job)):
        spec = layerwise.Problem.of(job, layer, statistics, True).solve("nearest", layerwise.Effort())[0]
        job.plan |= {layer.weight: spec}
        found[layer.name] = (statistics.h, statistics.mean, statistics.left, statistics.output)
    return found


@pytest.mark.parametrize("name", ["mobilenet", "resnet20", "inception", "transformer", "control_flow"])
def test_activations_that_are_computed_again_are_the_same(name, monkeypatch):
    held = swept(name)
    passing = []
    finish = sweeping._Step.finish
    monkeypatch.setattr(sweeping._Step, "finish", lambda step: (passing.append(step.passing), finish(step))[1])
    monkeypatch.setattr(sweeping, "_HELD", 0)
    again = swept(name, workers=2)
    assert any(passing) and held.keys() == again.keys()
    for layer, statistics in held.items():
        assert all(np.array_equal(a, b) for a, b in zip(statistics, again[layer], strict=True)), layer


def test_the_sweep_does_not_hold_what_is_wide(monkeypatch):
    net = Net([1, 4, 16, 16])  # an inverted residual: 4 channels, 64 inside
    inside = net.op("Relu", net.conv(net.op("Relu", net.conv("x", 4, 64, 1)), 64, 64, 3, groups=64))
    model = net.model(net.head(net.op("Relu", net.conv(inside, 64, 4, 1)), 4))

    def most(limit):
        sizes = []
        monkeypatch.setattr(sweeping, "_HELD", limit)
        finish = sweeping._Step.finish

        def measured(step):
            finish(step)
            sizes.append(sum(x.nbytes for values in step.network.live.values() for x in values if step.network.sizes))

        job = make_job(model, n=8)
        complete(job)
        with monkeypatch.context() as patched:
            patched.setattr(sweeping._Step, "finish", measured)
            assert len(list(sweep(job, layerwise.solvable(job)))) == 4
        return max(sizes)

    assert most(10**9) >= 8 * 64 * 256 * 4 and most(0) == 8 * 4 * 256 * 4


@pytest.mark.parametrize(("most", "used"), [(100, 7), (7, 7), (4, 4), (3, 3), (1, 1)])
def test_the_sweep_takes_samples_evenly_and_says_so(most, used):
    job = make_job(mlp(), n=7)
    complete(job)
    ((_, seen),) = sweep(job, layerwise.solvable(job)[:1], samples=most)
    assert seen.count == used
    assert bool(job.report.get("notes")) == (used < 7)


def test_values_that_are_not_finite_are_told():
    model = mlp()
    samples = feeds(model, 3)
    job = make_job(model)
    complete_ranges(job)
    samples[1]["x"][:] = 3e38
    job.calibration = Calibration(job.graph, open_data(samples, graph_inputs(job.graph)))
    with pytest.raises(OnnxqError, match="not finite"), np.errstate(all="ignore"):
        list(sweep(job, layerwise.solvable(job)[:2]))
