"""The network whose quantizers are inputs does what the exporter's networks do."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import runtimes
from onnxq_plugins.export.qdq import export
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.layers.problem import correct_biases
from onnxq_plugins.measure import sqnr
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.alone import Alone
from onnxq_plugins.search.widths import ALONE
from onnxq_plugins.spec import Plan
from tests.export.test_constants import recurrent, table
from tests.jobs import LAYERED, make_job
from tests.networks import feed_of, network, weight
from tests.zoo import ZOO, feeds, kinds

NEAR = 90.0  # dB: sums in another order


def solved(model, samples=6):
    job = make_job(model, n=samples)
    complete(job)
    correct_biases(job, Planned.of(job).layers)
    return job


def compared(reference, other):
    return min(sqnr(y, z) for y, z in zip(reference, other, strict=True))


@pytest.mark.parametrize("name", kinds(LAYERED))
def test_all_none_and_each(name):
    model = ZOO[name]()
    job = solved(model)
    planned, samples = Planned.of(job), Samples.of(model, feeds(model, 2, seed=1))
    alone = Alone(planned)
    nothing, everything = alone.outputs([(), (*planned.plan,)], samples)
    assert compared(samples.reference, nothing) > NEAR
    exported = samples.outputs(runtimes.session(export(job.graph, job.plan, ALONE, planned.coded)))
    assert compared(exported, everything) > 35  # codes at a boundary
    weights = [layer.weight for layer in planned.layers]
    only = export(job.graph, Plan({n: s for n, s in job.plan.items() if n in weights}), ALONE)
    (found,) = alone.outputs([weights], samples)
    assert compared(samples.outputs(runtimes.session(only)), found) > NEAR
    assert compared(samples.reference, found) < NEAR  # they are rounded


@pytest.mark.parametrize("model", [recurrent("LSTM", 4), table()], ids=["lstm", "table"])
def test_constants_outside_layers(model):
    samples = [feed_of(model, seed) for seed in range(3)]
    job = make_job(model, {"pass": [{"use": "ranges"}]}, n=2)
    complete(job)
    planned = Planned.of(job)
    assert planned.constants
    judged = Samples.of(model, samples)
    nothing, rounded = Alone(planned).outputs([(), tuple(planned.constants)], judged)
    assert compared(judged.reference, nothing) > NEAR
    only = export(job.graph, planned.constants, ALONE)
    assert compared(judged.outputs(runtimes.session(only)), rounded) > NEAR
    assert 20 < compared(judged.reference, rounded) < NEAR


def test_equal_weights_are_switched_one_by_one():
    same = weight((24, 24))
    model = network([("MatMul", ["x", "a"], ["h"], {}), ("MatMul", ["h", "b"], ["y"], {})], [5, 24], {"a": same, "b": same})
    job = make_job(model)
    complete(job)
    judged = Samples.of(model, feeds(model, 2, seed=1))
    first, second, both = Alone(Planned.of(job)).outputs([("a",), ("b",), ("a", "b")], judged)
    assert max(compared(first, second), compared(first, both), compared(second, both)) < NEAR


def test_any_number_of_workers():
    model = ZOO["mobilenet"]()
    planned, samples = Planned.of(solved(model)), Samples.of(model, feeds(model, 4, seed=1))
    sets = [(name,) for name in planned.plan]
    one, more = (list(Alone(planned, workers).outputs(sets, samples)) for workers in (1, 3))
    for a, b in zip(one, more, strict=True):
        for y, z in zip(a, b, strict=True):
            np.testing.assert_array_equal(np.stack(y), np.stack(z))
